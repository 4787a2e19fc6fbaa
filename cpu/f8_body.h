// Products with rows of E4M3 as they lie, in f32, over the vectors of simd_<isa>.h.  Include the
// vectors first.
//
// A lane of a vector of codes holds four consecutive columns; "plane" j is the j-th of each.  With
// its exponent where f32 has it, a code is 2^-120 of its value, subnormals included: three integer
// operations and no conversion.  The activations are brought into the order of the planes once for
// all rows of a call, and are multiplied there by the scales and by a power of two that keeps the
// products within f32.
#pragma once

#include <stdint.h>

#include "cpu/matmul_kernels.h"

namespace fathom::cpu {
namespace {

constexpr int kF8Step = 4 * kLanes;  // columns of a vector of codes
constexpr int kF8Columns = 2048;     // whose activations are prepared at a time
static_assert(kScaleColumns % kF8Step == 0 && kF8Columns % kScaleColumns == 0);

// out = factor * scale * x in the order of the planes, zeros up to whole steps; returns the largest
// magnitude of scale * x, not counting NaN.
inline float order_for_f8(const float* x, int64_t n, const float* scales, float factor,
                          float* out) {
  F largest = f_zero();
  for (int64_t i = 0; i < n; i += kF8Step) {
    const F scale = f_set(scales == nullptr ? 1.0f : scales[i / kScaleColumns]);
    F v[4];
    for (int q = 0; q < 4; ++q) {
      const int64_t left = n - i - q * kLanes;
      v[q] = left >= kLanes ? f_load(x + i + q * kLanes)
             : left > 0     ? f_load_first(x + i + q * kLanes, static_cast<int>(left))
                            : f_zero();
      v[q] = f_mul(v[q], scale);
      largest = f_max(f_abs(v[q]), largest);
      v[q] = f_mul(v[q], f_set(factor));
    }
    f_split_quads(v);
    for (int j = 0; j < 4; ++j) f_store(out + i + j * kLanes, v[j]);
  }
  return f_max_lane(largest);
}

// Prepares the activations; returns what takes sums of code times prepared value to the result.
inline float prepare_for_f8(const float* x, int64_t n, const float* scales, float* out) {
  constexpr float kFactor = 0x1p60f;
  if (order_for_f8(x, n, scales, kFactor, out) < 0x1p60f) return 0x1p120f / kFactor;
  order_for_f8(x, n, scales, 1.0f, out);
  return 0x1p120f;
}

template <int kRows>
inline void add_f8_step(B codes, int64_t at, const float* const* x, F (&sum)[kRows][4]) {
  const F plane[4] = {f_f8_plane<0>(codes), f_f8_plane<1>(codes), f_f8_plane<2>(codes),
                      f_f8_plane<3>(codes)};
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < 4; ++j)
      sum[r][j] = f_fma(plane[j], f_load(x[r] + at + j * kLanes), sum[r][j]);
}

// One row of weights times kRows rows of prepared activations.
template <int kRows>
void f8_dot_row(const uint8_t* w, int64_t n, const float* const* x, float* sums) {
  F sum[kRows][4];
  for (auto& planes : sum)
    for (F& v : planes) v = f_zero();
  B largest = b_zero();  // magnitudes, twice: a NaN is the largest there is
  int64_t i = 0;
  for (; i + kF8Step <= n; i += kF8Step) {
    const B codes = b_load(w + i);
    largest = b_max_twice(largest, codes);
    add_f8_step<kRows>(codes, i, x, sum);
  }
  if (i < n) {
    uint8_t rest[kF8Step] = {};
    __builtin_memcpy(rest, w + i, static_cast<uint64_t>(n - i));
    const B codes = b_load(rest);
    largest = b_max_twice(largest, codes);
    add_f8_step<kRows>(codes, i, x, sum);
  }
  const bool nan = b_any_equal(largest, 0xfe);
  for (int r = 0; r < kRows; ++r) {
    const F total = f_add(f_add(sum[r][0], sum[r][1]), f_add(sum[r][2], sum[r][3]));
    sums[r] = nan ? __builtin_nanf("") : f_sum(total);
  }
}

// Rows [first, first + kRows) of the activations.
template <int kRows>
void f8_dot_rows(const PlainDot& p, int64_t first) {
  alignas(64) float prepared[kRows][kF8Columns];
  float factor[kRows];
  const float* x[kRows];
  for (int64_t k = 0; k < p.n; k += kF8Columns) {
    const int64_t n = p.n - k < kF8Columns ? p.n - k : kF8Columns;
    const float* scales = p.scales == nullptr ? nullptr : p.scales + k / kScaleColumns;
    for (int r = 0; r < kRows; ++r) {
      const float* row = p.x + (p.rows ? p.rows[first + r] : first + r) * p.x_stride;
      factor[r] = prepare_for_f8(row + k, n, scales, prepared[r]);
      x[r] = prepared[r];
    }
    const auto* w = static_cast<const uint8_t*>(p.weights) + k;
    for (int64_t c = 0; c < p.n_outputs; ++c, w += p.weight_bytes) {
      float sums[kRows];
      f8_dot_row<kRows>(w, n, x, sums);
      for (int r = 0; r < kRows; ++r) {
        float& to = p.out[(first + r) * p.out_stride + c];
        to = p.add || k > 0 ? to + factor[r] * sums[r] : factor[r] * sums[r];
      }
    }
  }
}

template <int kRows = kDotTileRows>
void f8_dot_part(const PlainDot& p, int64_t first, int64_t n) {
  if constexpr (kRows > 1) {
    if (n < kRows) return f8_dot_part<kRows - 1>(p, first, n);
  }
  f8_dot_rows<kRows>(p, first);
}

void f8_dot(const PlainDot& p) {
  for (int64_t first = 0; first < p.n_rows; first += kDotTileRows)
    f8_dot_part(p, first, p.n_rows - first);
}

}  // namespace
}  // namespace fathom::cpu
