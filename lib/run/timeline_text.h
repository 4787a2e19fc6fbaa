// What the writers of a timeline share: numbers for people, and the look.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "fathom/timeline.hpp"

namespace fathom::run {

std::string human_bytes(int64_t bytes);        // "14.50 MiB", "512 B"
std::string grouped_digits(int64_t value);     // "163,840"
std::string human_duration(double seconds);    // "84 ms", "7.2 s", "1:02:03"
std::string xml_quote(std::string_view text);  // safe in text and in attributes

// From bottom to top of the stack: what stays, what comes and goes, copies of experts, which make
// room for the cache, which grows.
inline constexpr std::array<Purpose, kPurposeCount> kStackOrder = {
    Purpose::kWeights, Purpose::kExperts,     Purpose::kTokenizer,
    Purpose::kRuntime, Purpose::kActivations, Purpose::kWorkspace,
    Purpose::kStaging, Purpose::kExpertCache, Purpose::kKv};

// By purpose.  Okabe and Ito's palette, which the colour-blind can tell apart ("Color Universal
// Design", 2008), with the yellow a little darker so that it stands on white.
inline constexpr std::array<std::string_view, kPurposeCount> kPurposeColours = {
    "#0072b2", "#56b4e9", "#e69f00", "#009e73", "#cc79a7",
    "#d9cf2f", "#d55e00", "#8a8f98", "#a6cee3"};

// A step that cuts a range into at most `most` parts: 1, 2 or 5 times a power of ten; parts of
// minutes and hours for a long time; a power of two for bytes.
double tick_step(double range, int most);
double time_tick_step(double seconds, int most);
double byte_tick_step(double range, int most);

// The top of a device's scale: what was held and planned, and the budget where it is near enough
// to leave the rest legible.
struct Scale {
  double top = 1;
  bool shows_budget = false;
};
Scale scale_of(const TimelineDevice& device);

}  // namespace fathom::run
