// Timeline: what an engine's memory did over time, in a bounded number of points.
//
//   engine.start_timeline();
//   ... load, prefill, generate ...
//   engine.write_timeline("run.html", TimelineFormat::kHtml);
//
// While a recorder runs it sees every change of the ledger and every pass of every session.  Time
// is cut into buckets of equal width; each keeps, per device, the state in which the device held
// least and the one in which it held most.  When the buckets are used up they are merged in pairs,
// so that a recording of any length takes the same memory and loses no extreme.
//
// A Timeline is a value: a copy of what was recorded until then.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/memory.hpp"
#include "fathom/status.hpp"

namespace fathom {

inline constexpr int64_t kTimelineMaxPoints = 2000;

struct TimelineOptions {
  int64_t max_points = kTimelineMaxPoints;  // per device.  [16, 2000]
};

// What the engine was doing last.
enum class TimelinePhase : uint8_t { kStart, kLoad, kPrefill, kDecode };
constexpr std::string_view timeline_phase_name(TimelinePhase phase) noexcept {
  constexpr std::string_view kNames[] = {"start", "load", "prefill", "decode"};
  return kNames[static_cast<int>(phase)];
}

// The state of one device at one moment; it holds until the next point.
struct TimelinePoint {
  double seconds = 0;    // since the recorder was started
  int64_t n_tokens = 0;  // in all sessions of the engine
  TimelinePhase phase = TimelinePhase::kStart;
  std::array<int64_t, kPurposeCount> bytes{};

  int64_t total() const noexcept {
    int64_t sum = 0;
    for (const int64_t b : bytes) sum += b;
    return sum;
  }
};

struct TimelineDevice {
  std::string name;
  int64_t budget_bytes = 0;   // now
  int64_t planned_bytes = 0;  // peak that the plans of the loaded models promise; 0 without one
  int64_t peak_bytes = 0;     // the most it held while the recorder ran, exactly
  std::array<int64_t, kPurposeCount> peaks{};  // the same by purpose; not all at one moment
  std::vector<TimelinePoint> points;           // at most max_points, by time
};

// Something that happened.  Marks of one kind that are close together are counted as one.
struct TimelineMark {
  double seconds = 0;  // of the first
  std::string kind;    // "load", "prefill", "decode", "truncate", "budget", kinds of Event
  std::string text;    // of the last; may be empty
  int64_t n_tokens = 0;
  int64_t bytes = 0;  // freed or moved, all together
  int64_t count = 1;
};

struct Timeline {
  double seconds = 0;     // how long was recorded
  int64_t n_changes = 0;  // of the ledger and of token counts, that were seen
  std::vector<TimelineDevice> devices;
  std::vector<TimelineMark> marks;  // by time

  int64_t planned_bytes() const noexcept;  // over all devices
  int64_t peak_bytes() const noexcept;     // the sum of the devices' peaks
  // "planned peak 14.50 MiB, measured peak 14.50 MiB, difference 0.0%"
  std::string summary() const;

  std::string to_json() const;
  std::string to_csv() const;  // a row per device and point
  std::string to_svg() const;
  std::string to_html() const;  // one page that needs nothing else
};

enum class TimelineFormat : uint8_t { kJson, kCsv, kSvg, kHtml };
// "json", "csv", "svg", "html".  Errors: kInvalidArgument.
Result<TimelineFormat> parse_timeline_format(std::string_view name);
// By what a file's name ends with.  Errors: kInvalidArgument.
Result<TimelineFormat> timeline_format_of(std::string_view path);

}  // namespace fathom
