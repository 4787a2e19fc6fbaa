// Checked: the arithmetic of sizes and offsets that come from a file.  A negative or too large
// operand, an overflow, a rounding beyond the end: each leaves the value in an error state that
// every later operation keeps, so that one test at the end of a formula is enough.
//
//   const Checked end = Checked(data_start) + Checked(offset) + rows * row_bytes;
//   if (!end.ok() || end.value() > file_size) return ...
#pragma once

#include <cassert>
#include <concepts>
#include <cstdint>
#include <limits>
#include <utility>

namespace fathom::io {

class Checked {
 public:
  static constexpr int64_t kMax = std::numeric_limits<int64_t>::max();

  // Any integer; values outside [0, 2^63) are the error state.
  template <std::integral T>
  constexpr Checked(T value) noexcept  // NOLINT: implicit, so that formulas read as formulas
      : value_(std::cmp_less(value, 0) || std::cmp_greater(value, kMax)
                   ? kBad
                   : static_cast<int64_t>(value)) {}

  constexpr bool ok() const noexcept { return value_ != kBad; }
  // The size.  Only when ok().
  constexpr int64_t value() const noexcept {
    assert(ok());
    return value_;
  }
  // True when the value is known and at most `bound`; the usual last question.
  constexpr bool at_most(int64_t bound) const noexcept { return ok() && value_ <= bound; }

  friend constexpr Checked operator+(Checked a, Checked b) noexcept {
    if (!a.ok() || !b.ok() || a.value_ > kMax - b.value_) return bad();
    return Checked(a.value_ + b.value_);
  }
  friend constexpr Checked operator-(Checked a, Checked b) noexcept {
    if (!a.ok() || !b.ok() || a.value_ < b.value_) return bad();
    return Checked(a.value_ - b.value_);
  }
  friend constexpr Checked operator*(Checked a, Checked b) noexcept {
    if (!a.ok() || !b.ok()) return bad();
    if (a.value_ != 0 && b.value_ > kMax / a.value_) return bad();
    return Checked(a.value_ * b.value_);
  }
  // a / b when it divides evenly, else the error state.
  friend constexpr Checked exact_quotient(Checked a, Checked b) noexcept {
    if (!a.ok() || !b.ok() || b.value_ == 0 || a.value_ % b.value_ != 0) return bad();
    return Checked(a.value_ / b.value_);
  }
  // The next multiple of `alignment` (a power of two) at or above the value.
  constexpr Checked aligned(int64_t alignment) const noexcept {
    assert(alignment > 0 && (alignment & (alignment - 1)) == 0);
    if (!ok() || value_ > kMax - (alignment - 1)) return bad();
    return Checked((value_ + (alignment - 1)) & ~(alignment - 1));
  }
  // Whether T holds the value, and the value as a T.
  template <std::integral T>
  constexpr bool fits() const noexcept {
    return ok() && std::in_range<T>(value_);
  }
  template <std::integral T>
  constexpr T narrow() const noexcept {
    assert(fits<T>());
    return static_cast<T>(value_);
  }

 private:
  static constexpr int64_t kBad = -1;
  static constexpr Checked bad() noexcept { return Checked(kBad); }
  int64_t value_;
};

}  // namespace fathom::io
