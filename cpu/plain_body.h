// Rows that lie as in the file, f32, f16, bf16 and E4M3, over the vectors of simd_<isa>.h: widened,
// or multiplied as they are read; E4M3 is multiplied in f8_body.h.  Include the vectors first.
#pragma once

#include <stdint.h>

#include "cpu/matmul_kernels.h"

namespace fathom::cpu {
namespace {

// Each reads kLanes values, or twice as many, in units of 1 / kUnit.
template <class Layout>
struct ReadFloats : Layout {
  static constexpr float kUnit = 1;
  static void load_two(const uint8_t* p, F& a, F& b) {
    a = Layout::load(p);
    b = Layout::load(p + kLanes * Layout::kBytes);
  }
};
struct LayoutF32 {
  static constexpr int kBytes = 4;
  static F load(const uint8_t* p) { return f_load(reinterpret_cast<const float*>(p)); }
};
struct LayoutF16 {
  static constexpr int kBytes = 2;
  static F load(const uint8_t* p) { return f_load_f16(p); }
};
struct LayoutBF16 {
  static constexpr int kBytes = 2;
  static F load(const uint8_t* p) { return f_load_bf16(p); }
};
using ReadF32 = ReadFloats<LayoutF32>;
using ReadF16 = ReadFloats<LayoutF16>;
using ReadBF16 = ReadFloats<LayoutBF16>;
struct ReadF8 {
  static constexpr int kBytes = 1;
  static constexpr float kUnit = 256;
  static F load(const uint8_t* p) { return f_mul(f_load_f8(p), f_set(1 / kUnit)); }
  static void load_two(const uint8_t* p, F& a, F& b) { f_load_f8_parts(p, a, b); }
};

// The last n < kLanes values, the other lanes zero.
template <class Type>
inline F load_rest(const uint8_t* p, int64_t n) {
  uint8_t rest[kLanes * Type::kBytes] = {};
  __builtin_memcpy(rest, p, static_cast<uint64_t>(n * Type::kBytes));
  return Type::load(rest);
}

template <class Type>
void widen(const void* weights, int64_t n, float scale, float* out) {
  const auto* w = static_cast<const uint8_t*>(weights);
  const F factor = f_set(scale * Type::kUnit);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    F a, b;
    Type::load_two(w + i * Type::kBytes, a, b);
    f_store(out + i, f_mul(a, factor));
    f_store(out + i + kLanes, f_mul(b, factor));
  }
  for (; i < n; i += kLanes) {
    const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    f_store_first(out + i, f_mul(load_rest<Type>(w + i * Type::kBytes, left), factor), left);
  }
}

// One row of weights times kRows rows of activations.  One row after the other: a single stream is
// what the processor looks ahead in best, and four sums hide the latency of their additions.
template <class Type, int kRows>
void dot_row(const uint8_t* w, int64_t n, const float* const* x, float* sums) {
  // The same for any number of rows: a row gets the same bits in any company.
  constexpr int kChains = 4;
  F sum[kRows][kChains];
  for (auto& chains : sum)
    for (F& v : chains) v = f_zero();
  int64_t i = 0;
  for (; i + kLanes * kChains <= n; i += kLanes * kChains)
    for (int c = 0; c < kChains; ++c) {
      const F value = Type::load(w + (i + kLanes * c) * Type::kBytes);
      for (int r = 0; r < kRows; ++r)
        sum[r][c] = f_fma(value, f_load(x[r] + i + kLanes * c), sum[r][c]);
    }
  for (; i < n; i += kLanes) {
    const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const F value = load_rest<Type>(w + i * Type::kBytes, left);
    for (int r = 0; r < kRows; ++r)
      sum[r][0] = f_fma(value, f_load_first(x[r] + i, left), sum[r][0]);
  }
  for (int r = 0; r < kRows; ++r)
    sums[r] = f_sum(f_add(f_add(sum[r][0], sum[r][1]), f_add(sum[r][2], sum[r][3])));
}

// Rows of activations whose sums stay in registers.
constexpr int kDotTileRows = kLanes == 16 ? 4 : 2;

// Rows [first, first + kRows) of the activations.
template <class Type, int kRows>
void dot_rows(const PlainDot& p, int64_t first) {
  const auto* w = static_cast<const uint8_t*>(p.weights);
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r)
    x[r] = p.x + (p.rows ? p.rows[first + r] : first + r) * p.x_stride;
  for (int64_t c = 0; c < p.n_outputs; ++c, w += p.weight_bytes) {
    float sums[kRows];
    dot_row<Type, kRows>(w, p.n, x, sums);
    for (int r = 0; r < kRows; ++r) {
      float& to = p.out[(first + r) * p.out_stride + c];
      to = p.add ? to + sums[r] : sums[r];
    }
  }
}

template <class Type, int kRows = kDotTileRows>
void plain_dot_part(const PlainDot& p, int64_t first, int64_t n) {
  if constexpr (kRows > 1) {
    if (n < kRows) return plain_dot_part<Type, kRows - 1>(p, first, n);
  }
  dot_rows<Type, kRows>(p, first);
}

template <class Type>
void plain_dot(const PlainDot& p) {
  for (int64_t first = 0; first < p.n_rows; first += kDotTileRows)
    plain_dot_part<Type>(p, first, p.n_rows - first);
}

}  // namespace
}  // namespace fathom::cpu
