// Timelines as JSON and CSV, their sentence, and what the drawn formats share.
#include "timeline_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "config_schema.h"
#include "fathom/version.hpp"

namespace fathom {
namespace run {

std::string human_bytes(int64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (std::fabs(value) >= 1024 && unit + 1 < kUnits.size()) value /= 1024, ++unit;
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.2f} {}", value, kUnits[unit]);
}

std::string grouped_digits(int64_t value) {
  std::string digits = fmt::format("{}", value);
  for (int64_t at = static_cast<int64_t>(digits.size()) - 3; at > (value < 0 ? 1 : 0); at -= 3)
    digits.insert(static_cast<size_t>(at), ",");
  return digits;
}

std::string human_duration(double seconds) {
  if (seconds < 1) return fmt::format("{:.0f} ms", seconds * 1e3);
  if (seconds < 60) return fmt::format("{:.3g} s", seconds);
  const auto s = static_cast<int64_t>(seconds + 0.5);
  if (s < 3600) return fmt::format("{}:{:02}", s / 60, s % 60);
  return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
}

std::string xml_quote(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '&')
      out += "&amp;";
    else if (c == '"')
      out += "&quot;";
    else if (static_cast<unsigned char>(c) < 0x20)
      out += ' ';
    else
      out += c;
  }
  return out;
}

double tick_step(double range, int most) {
  const double least = std::max(range, 1e-9) / most;
  const double power = std::pow(10, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (factor * power >= least) return factor * power;
  return 10 * power;
}

double time_tick_step(double seconds, int most) {
  if (seconds < 60) return tick_step(seconds, most);
  for (const int step : {10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800})
    if (seconds <= step * most) return step;
  return 3600 * tick_step(seconds / 3600, most);
}

double byte_tick_step(double range, int most) {
  return std::exp2(std::ceil(std::log2(std::max(range, 1.0) / most)));
}

Scale scale_of(const TimelineDevice& device) {
  const auto held =
      static_cast<double>(std::max({device.peak_bytes, device.planned_bytes, int64_t{1}}));
  const auto budget = static_cast<double>(device.budget_bytes);
  const bool near = budget <= 2 * held;
  return {1.06 * (near ? std::max(held, budget) : held), near};
}

}  // namespace run

Result<TimelineFormat> parse_timeline_format(std::string_view name) {
  if (name == "json") return TimelineFormat::kJson;
  if (name == "csv") return TimelineFormat::kCsv;
  if (name == "svg") return TimelineFormat::kSvg;
  if (name == "html") return TimelineFormat::kHtml;
  return Status(Code::kInvalidArgument,
                fmt::format("timeline format \"{}\" is not json, csv, svg or html", name));
}

Result<TimelineFormat> timeline_format_of(std::string_view path) {
  const size_t dot = path.rfind('.');
  if (dot == std::string_view::npos || path.find('/', dot) != std::string_view::npos)
    return Status(Code::kInvalidArgument,
                  fmt::format("\"{}\" ends with none of .json, .csv, .svg, .html", path));
  return parse_timeline_format(path.substr(dot + 1));
}

int64_t Timeline::planned_bytes() const noexcept {
  int64_t sum = 0;
  for (const TimelineDevice& device : devices) sum += device.planned_bytes;
  return sum;
}

int64_t Timeline::peak_bytes() const noexcept {
  int64_t sum = 0;
  for (const TimelineDevice& device : devices) sum += device.peak_bytes;
  return sum;
}

std::string Timeline::summary() const {
  const int64_t planned = planned_bytes(), peak = peak_bytes();
  if (planned == 0) return fmt::format("no plan, measured peak {}", run::human_bytes(peak));
  return fmt::format("planned peak {}, measured peak {}, difference {:+.1f}%",
                     run::human_bytes(planned), run::human_bytes(peak),
                     100.0 * static_cast<double>(peak - planned) / static_cast<double>(planned));
}

std::string Timeline::to_json() const {
  std::string purposes, list;
  for (int p = 0; p < kPurposeCount; ++p)
    purposes += fmt::format("{}\"{}\"", p ? ", " : "", purpose_name(static_cast<Purpose>(p)));
  for (const TimelineDevice& device : devices) {
    list += fmt::format(
        "{}\n  {{\"name\": {}, \"budget_bytes\": {}, \"planned_bytes\": {}, \"peak_bytes\": {}, "
        "\"peaks\": [{}],\n   \"points\": [",
        list.empty() ? "" : ",", run::json_quote(device.name), device.budget_bytes,
        device.planned_bytes, device.peak_bytes, fmt::join(device.peaks, ", "));
    for (size_t i = 0; i < device.points.size(); ++i) {
      const TimelinePoint& p = device.points[i];
      list += fmt::format("{}\n    [{:.6f}, {}, \"{}\", {}]", i ? "," : "", p.seconds, p.n_tokens,
                          timeline_phase_name(p.phase), fmt::join(p.bytes, ", "));
    }
    list += "]}";
  }
  std::string all_marks;
  for (const TimelineMark& mark : marks)
    all_marks += fmt::format(
        "{}\n  {{\"seconds\": {:.6f}, \"kind\": {}, \"text\": {}, \"n_tokens\": {}, \"bytes\": {}, "
        "\"count\": {}}}",
        all_marks.empty() ? "" : ",", mark.seconds, run::json_quote(mark.kind),
        run::json_quote(mark.text), mark.n_tokens, mark.bytes, mark.count);
  return fmt::format(
      "{{\"fathom\": {}, \"seconds\": {:.6f}, \"n_changes\": {},\n"
      " \"planned_bytes\": {}, \"peak_bytes\": {}, \"summary\": {},\n"
      " \"purposes\": [{}],\n \"point\": [\"seconds\", \"n_tokens\", \"phase\", {}],\n"
      " \"devices\": [{}],\n \"marks\": [{}]}}\n",
      run::json_quote(version()), seconds, n_changes, planned_bytes(), peak_bytes(),
      run::json_quote(summary()), purposes, purposes, list, all_marks);
}

std::string Timeline::to_csv() const {
  std::string out = "seconds,device,phase,n_tokens";
  for (int p = 0; p < kPurposeCount; ++p)
    out += fmt::format(",{}", purpose_name(static_cast<Purpose>(p)));
  out += ",total,planned,budget\n";
  for (const TimelineDevice& device : devices)
    for (const TimelinePoint& p : device.points)
      out += fmt::format("{:.6f},{},{},{},{},{},{},{}\n", p.seconds, device.name,
                         timeline_phase_name(p.phase), p.n_tokens, fmt::join(p.bytes, ","),
                         p.total(), device.planned_bytes, device.budget_bytes);
  return out;
}

}  // namespace fathom
