#include "timeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

namespace fathom::run {
namespace {

// Copies text into a fixed field, cut at a character, NUL-terminated.
template <size_t N>
void put_text(std::string_view text, char (&field)[N]) noexcept {
  size_t n = std::min(text.size(), N - 1);
  if (n < text.size())
    while (n > 0 && (static_cast<unsigned char>(text[n]) & 0xc0) == 0x80) --n;
  std::memcpy(field, text.data(), n);
  field[n] = '\0';
}

// One point is for the end.
constexpr int64_t buckets_for(const TimelineOptions& options) noexcept {
  return (options.max_points - 1) / 2;
}

}  // namespace

TimelineRecorder::TimelineRecorder(std::function<double()> clock) : clock_(std::move(clock)) {}

TimelineRecorder::~TimelineRecorder() {
  if (ledger_) (void)stop();
}

void TimelineRecorder::set_clock(std::function<double()> clock) {
  std::lock_guard lock(mutex_);
  clock_ = std::move(clock);
}

TimelineRecorder::Buffer TimelineRecorder::Buffer::carve(Arena& arena, int64_t n_buckets,
                                                         int64_t n_devices) {
  return {.current = arena.take<Current>(n_devices),
          .pairs = arena.take<Pair>(n_buckets * n_devices),
          .used = arena.take<bool>(n_buckets),
          .marks = arena.take<Mark>(kMaxMarks)};
}

Result<int64_t> TimelineRecorder::buffer_bytes(const TimelineOptions& options, int64_t n_devices) {
  if (options.max_points < 16 || options.max_points > kTimelineMaxPoints)
    return Status(Code::kInvalidArgument, fmt::format("max_points {} is not in [16, {}]",
                                                      options.max_points, kTimelineMaxPoints));
  Arena arena;
  Buffer::carve(arena, buckets_for(options), n_devices);
  return arena.peak_bytes();
}

Status TimelineRecorder::start(MemoryRange buffer, Ledger& ledger, int host_device,
                               const TimelineOptions& options) {
  std::lock_guard control(control_);
  if (ledger_) return Status(Code::kState, "the timeline's recorder runs already");
  const auto n_devices = static_cast<int>(ledger.snapshot().devices.size());
  planned_bytes_ = buffer.size_bytes();
  ledger.add_planned(host_device, Purpose::kRuntime, planned_bytes_);
  ledger.add_planned_peak(host_device, planned_bytes_);
  {
    std::lock_guard lock(mutex_);
    n_buckets_ = buckets_for(options);
    n_devices_ = n_devices;
    host_device_ = host_device;
    Arena arena(buffer.data(), buffer.size_bytes());
    at_ = Buffer::carve(arena, n_buckets_, n_devices);
    std::fill_n(at_.used, n_buckets_, false);
    buffer_ = std::move(buffer);
    n_marks_ = n_changes_ = 0;
    mark_gap_ = 0;
    width_ = kFirstWidth;
    last_bucket_ = -1;
    phase_ = TimelinePhase::kStart;
    start_ = clock_();
  }
  ledger_ = &ledger;
  ledger.watch(this);
  return {};
}

void TimelineRecorder::watching(int device, std::span<const int64_t> bytes_now) noexcept {
  std::lock_guard lock(mutex_);
  Current& current = at_.current[device];
  std::copy(bytes_now.begin(), bytes_now.end(), current.bytes.begin());
  current.total = std::accumulate(bytes_now.begin(), bytes_now.end(), int64_t{0});
  current.peak = current.total;
  current.peaks = current.bytes;
  if (device < n_devices_ - 1) return;
  open_bucket(0, 0);
  running_.store(true, std::memory_order_release);
}

Status TimelineRecorder::stop() {
  std::lock_guard control(control_);
  if (!ledger_) return Status(Code::kState, "the timeline's recorder does not run");
  ledger_->watch(nullptr);
  MemoryRange gone;
  {
    std::lock_guard lock(mutex_);
    running_.store(false, std::memory_order_release);
    gone = std::move(buffer_);
  }
  ledger_->add_planned(host_device_, Purpose::kRuntime, -planned_bytes_);
  ledger_->add_planned_peak(host_device_, -planned_bytes_);
  ledger_ = nullptr;
  return {};
}

double TimelineRecorder::now() const {
  return std::max(0.0, clock_() - start_);
}

TimelineRecorder::Sample TimelineRecorder::sample(int device, double seconds) const noexcept {
  const Current& current = at_.current[device];
  return {seconds, n_tokens_.load(std::memory_order_relaxed), current.total, phase_, current.bytes};
}

void TimelineRecorder::open_bucket(int64_t bucket, double seconds) noexcept {
  for (int d = 0; d < n_devices_; ++d) {
    const Sample state = sample(d, seconds);
    pair(bucket, d) = {state, state};
  }
  at_.used[bucket] = true;
  last_bucket_ = bucket;
}

// Two buckets become one of twice the width.
void TimelineRecorder::merge_pairs() noexcept {
  for (int64_t to = 0; to < n_buckets_; ++to) {
    const int64_t a = 2 * to, b = a + 1;
    const bool has_a = a < n_buckets_ && at_.used[a], has_b = b < n_buckets_ && at_.used[b];
    for (int d = 0; d < n_devices_ && (has_a || has_b); ++d) {
      Pair merged = pair(has_a ? a : b, d);
      if (has_a && has_b) {
        const Pair& later = pair(b, d);
        if (later.low.total < merged.low.total) merged.low = later.low;
        if (later.high.total >= merged.high.total) merged.high = later.high;
      }
      pair(to, d) = merged;
    }
    at_.used[to] = has_a || has_b;
  }
  width_ *= 2;
  last_bucket_ /= 2;
}

// Before the change at `seconds` is noted: what holds from the last bucket's end until then gets a
// bucket of its own when there is one in between.
void TimelineRecorder::reach(double seconds) noexcept {
  while (seconds >= width_ * static_cast<double>(n_buckets_)) merge_pairs();
  const auto bucket =
      std::clamp(static_cast<int64_t>(seconds / width_), last_bucket_, n_buckets_ - 1);
  for (const int64_t open : {last_bucket_ + 1, bucket})
    if (open > last_bucket_ && open <= bucket)
      open_bucket(open, width_ * static_cast<double>(open));
}

void TimelineRecorder::take(int device, double seconds) noexcept {
  const Sample state = sample(device, seconds);
  Pair& extremes = pair(last_bucket_, device);
  if (state.total < extremes.low.total) extremes.low = state;
  if (state.total >= extremes.high.total) extremes.high = state;
}

void TimelineRecorder::take_all(double seconds) noexcept {
  ++n_changes_;
  for (int d = 0; d < n_devices_; ++d) take(d, seconds);
}

void TimelineRecorder::changed(int device, Purpose purpose, int64_t bytes_now) noexcept {
  std::lock_guard lock(mutex_);
  if (!running_.load(std::memory_order_relaxed)) return;
  const double seconds = now();
  reach(seconds);
  Current& current = at_.current[device];
  const auto p = static_cast<size_t>(purpose);
  current.total += bytes_now - current.bytes[p];
  current.bytes[p] = bytes_now;
  current.peak = std::max(current.peak, current.total);
  current.peaks[p] = std::max(current.peaks[p], bytes_now);
  ++n_changes_;
  take(device, seconds);
}

void TimelineRecorder::tokens(int64_t delta) noexcept {
  if (!running_.load(std::memory_order_acquire)) {
    n_tokens_.fetch_add(delta, std::memory_order_relaxed);
    return;
  }
  std::lock_guard lock(mutex_);
  if (!running_.load(std::memory_order_relaxed)) {
    n_tokens_.fetch_add(delta, std::memory_order_relaxed);
    return;
  }
  const double seconds = now();
  reach(seconds);
  n_tokens_.fetch_add(delta, std::memory_order_relaxed);
  take_all(seconds);
}

void TimelineRecorder::begin(TimelinePhase phase) noexcept {
  if (!running_.load(std::memory_order_acquire)) return;
  std::lock_guard lock(mutex_);
  if (running_.load(std::memory_order_relaxed)) enter(phase, now());
}

void TimelineRecorder::begin_load(std::string_view model) noexcept {
  if (!running_.load(std::memory_order_acquire)) return;
  std::lock_guard lock(mutex_);
  if (!running_.load(std::memory_order_relaxed)) return;
  const double seconds = now();
  reach(seconds);
  phase_ = TimelinePhase::kLoad;
  add_mark("load", model, n_tokens_.load(std::memory_order_relaxed), 0, seconds);
  take_all(seconds);
}

void TimelineRecorder::enter(TimelinePhase phase, double seconds) noexcept {
  if (phase == phase_) return;
  reach(seconds);
  phase_ = phase;
  add_mark(timeline_phase_name(phase), "", n_tokens_.load(std::memory_order_relaxed), 0, seconds);
}

void TimelineRecorder::mark(std::string_view kind, std::string_view text, int64_t n_tokens,
                            int64_t bytes) noexcept {
  if (!running_.load(std::memory_order_acquire)) return;
  std::lock_guard lock(mutex_);
  if (running_.load(std::memory_order_relaxed)) add_mark(kind, text, n_tokens, bytes, now());
}

void TimelineRecorder::add_mark(std::string_view kind, std::string_view text, int64_t n_tokens,
                                int64_t bytes, double seconds) noexcept {
  for (int64_t i = n_marks_ - 1; i >= 0; --i) {  // the last of this kind
    Mark& mark = at_.marks[i];
    if (kind != mark.kind) continue;
    if (seconds - mark.last_seconds >= mark_gap_) break;
    mark.last_seconds = seconds;
    mark.n_tokens = n_tokens;
    mark.bytes += bytes;
    ++mark.count;
    put_text(text, mark.text);
    return;
  }
  if (n_marks_ == kMaxMarks) thin_marks();
  if (n_marks_ == kMaxMarks) return;  // so many kinds do not exist
  Mark& mark = at_.marks[n_marks_++];
  mark = {seconds, seconds, n_tokens, bytes, 1, {}, {}};
  put_text(kind, mark.kind);
  put_text(text, mark.text);
}

// Widens the gap below which marks of a kind are counted as one until a quarter of the room is
// free.
void TimelineRecorder::thin_marks() noexcept {
  const double all = at_.marks[n_marks_ - 1].last_seconds;
  while (n_marks_ > kMaxMarks * 3 / 4 && mark_gap_ <= all) {
    mark_gap_ = std::max(2 * mark_gap_, width_);
    int64_t kept = 0;
    for (int64_t i = 0; i < n_marks_; ++i) {
      int64_t same = kept - 1;
      while (same >= 0 && std::strcmp(at_.marks[same].kind, at_.marks[i].kind) != 0) --same;
      if (same >= 0 && at_.marks[i].seconds - at_.marks[same].last_seconds < mark_gap_) {
        Mark& into = at_.marks[same];
        into.last_seconds = at_.marks[i].last_seconds;
        into.n_tokens = at_.marks[i].n_tokens;
        into.bytes += at_.marks[i].bytes;
        into.count += at_.marks[i].count;
        std::memcpy(into.text, at_.marks[i].text, sizeof into.text);
      } else {
        at_.marks[kept++] = at_.marks[i];
      }
    }
    n_marks_ = kept;
  }
}

Result<Timeline> TimelineRecorder::picture() const {
  std::lock_guard control(control_);
  if (!ledger_) return Status(Code::kState, "the timeline's recorder does not run");
  const MemorySnapshot memory = ledger_->snapshot();
  std::lock_guard lock(mutex_);
  Timeline picture;
  picture.seconds = now();
  picture.n_changes = n_changes_;
  const auto point = [](const Sample& s) {
    return TimelinePoint{s.seconds, s.n_tokens, s.phase, s.bytes};
  };
  for (int d = 0; d < n_devices_; ++d) {
    const DeviceMemory& now_held = memory.devices[static_cast<size_t>(d)];
    TimelineDevice device{.name = now_held.name,
                          .budget_bytes = now_held.budget_bytes,
                          .planned_bytes = now_held.bytes_planned,
                          .peak_bytes = at_.current[d].peak,
                          .peaks = at_.current[d].peaks,
                          .points = {}};
    for (int64_t b = 0; b < n_buckets_; ++b) {
      if (!at_.used[b]) continue;
      const Pair& extremes = pair(b, d);
      const bool low_first = extremes.low.seconds <= extremes.high.seconds;
      const Sample& first = low_first ? extremes.low : extremes.high;
      const Sample& second = low_first ? extremes.high : extremes.low;
      device.points.push_back(point(first));
      if (second.seconds != first.seconds || second.total != first.total)
        device.points.push_back(point(second));
    }
    device.points.push_back(point(sample(d, picture.seconds)));
    picture.devices.push_back(std::move(device));
  }
  for (int64_t i = 0; i < n_marks_; ++i) {
    const Mark& m = at_.marks[i];
    picture.marks.push_back({m.seconds, m.kind, m.text, m.n_tokens, m.bytes, m.count});
  }
  return picture;
}

}  // namespace fathom::run
