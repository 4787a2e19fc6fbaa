// The range check of values from files, and its message: key, value, bound.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <cstdint>
#include <string_view>

#include "fathom/status.hpp"

namespace fathom::io {

inline Result<int64_t> in_range(std::string_view key, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return value;
  return Status(Code::kFormat, fmt::format("{} is {}, must be in [{}, {}]", key, value, min, max))
      .about(key);
}

// NaN and infinities are refused whatever the bounds.
inline Result<double> in_range(std::string_view key, double value, double min, double max) {
  if (std::isfinite(value) && value >= min && value <= max) return value;
  return Status(Code::kFormat,
                fmt::format("{} is {}, must be a number in [{}, {}]", key, value, min, max))
      .about(key);
}

}  // namespace fathom::io
