// TimelineRecorder: what stands behind fathom/timeline.hpp.  One per engine, quiet until started;
// its buffer is one range, booked as runtime.  Thread-safe; nothing is allocated while it records.
//
//   bucket i: time [i, i + 1) * width, per device:  | low | high |   states with the smallest and
//                                                                  the largest total
//
// A bucket opens with the state at its beginning, and the one after a bucket in which something
// changed is always opened, so the last state of every bucket is in one of the two.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <string_view>

#include "../io/arena.h"
#include "fathom/timeline.hpp"
#include "ledger.h"
#include "memory_range.h"

namespace fathom::run {

class TimelineRecorder final : public LedgerWatcher {
 public:
  // `clock`: seconds that do not go back; asked under the ledger's lock.
  explicit TimelineRecorder(std::function<double()> clock);
  ~TimelineRecorder();

  // What start() wants to write into.  Errors: kInvalidArgument (max_points).
  static Result<int64_t> buffer_bytes(const TimelineOptions& options, int64_t n_devices);
  // `buffer` is booked on `host_device` as runtime.  Errors: kState (it runs).
  Status start(MemoryRange buffer, Ledger& ledger, int host_device, const TimelineOptions& options);
  // Forgets what was recorded.  Errors: kState (it does not run).
  Status stop();
  // Errors: kState (it does not run).
  Result<Timeline> picture() const;

  void set_clock(std::function<double()> clock);  // for tests

  // ---- what happens; cheap while it does not run ----
  void tokens(int64_t delta) noexcept;
  void begin(TimelinePhase phase) noexcept;  // until another one begins
  void mark(std::string_view kind, std::string_view text, int64_t n_tokens, int64_t bytes) noexcept;
  void begin_load(std::string_view model) noexcept;

  // As LedgerWatcher.
  void watching(int device, std::span<const int64_t> bytes_now) noexcept override;
  void changed(int device, Purpose purpose, int64_t bytes_now) noexcept override;

 private:
  using Bytes = std::array<int64_t, kPurposeCount>;
  struct Sample {
    double seconds;
    int64_t n_tokens, total;
    TimelinePhase phase;
    Bytes bytes;
  };
  struct Pair {
    Sample low, high;
  };
  struct Current {
    int64_t total, peak;
    Bytes bytes, peaks;
  };
  struct Mark {
    double seconds, last_seconds;
    int64_t n_tokens, bytes, count;
    char kind[24];
    char text[104];
  };
  struct Buffer {
    Current* current;  // [n_devices]
    Pair* pairs;       // [n_buckets, n_devices]
    bool* used;        // [n_buckets]
    Mark* marks;       // [kMaxMarks]
    static Buffer carve(Arena& arena, int64_t n_buckets, int64_t n_devices);
  };
  static constexpr int64_t kMaxMarks = 128;
  static constexpr double kFirstWidth = 1.0 / 1024;  // seconds

  double now() const;  // since start
  Sample sample(int device, double seconds) const noexcept;
  void reach(double seconds) noexcept;  // opens the bucket of this moment: last_bucket_
  void open_bucket(int64_t bucket, double seconds) noexcept;
  void merge_pairs() noexcept;
  void take(int device, double seconds) noexcept;
  void take_all(double seconds) noexcept;
  void enter(TimelinePhase phase, double seconds) noexcept;
  void add_mark(std::string_view kind, std::string_view text, int64_t n_tokens, int64_t bytes,
                double seconds) noexcept;
  void thin_marks() noexcept;
  Pair& pair(int64_t bucket, int device) const noexcept {
    return at_.pairs[bucket * n_devices_ + device];
  }

  mutable std::mutex control_;  // one start or stop at a time
  std::atomic<bool> running_{false};
  std::atomic<int64_t> n_tokens_{0};
  mutable std::mutex mutex_;  // taken inside the ledger's, never around it
  std::function<double()> clock_;

  Ledger* ledger_ = nullptr;  // while it runs
  int host_device_ = 0;
  MemoryRange buffer_;  // of at_
  int64_t planned_bytes_ = 0;
  int64_t n_buckets_ = 0;
  int n_devices_ = 0;
  Buffer at_{};
  int64_t n_marks_ = 0;
  double start_ = 0, width_ = 0, mark_gap_ = 0;
  int64_t last_bucket_ = -1;
  int64_t n_changes_ = 0;
  TimelinePhase phase_ = TimelinePhase::kStart;
};

}  // namespace fathom::run
