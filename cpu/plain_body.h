// Rows that lie as in the file, f32, f16, bf16 and E4M3, over the vectors of simd_<isa>.h: widened,
// or multiplied as they are read.  Include the vectors first.
#pragma once

#include <stdint.h>

#include "cpu/matmul_kernels.h"

namespace fathom::cpu {
namespace {

// Each reads kLanes values, or twice as many, in units of 1 / kUnit.
struct ReadF32 {
  static constexpr int kBytes = 4;
  static constexpr float kUnit = 1;
  static F load(const uint8_t* p) { return f_load(reinterpret_cast<const float*>(p)); }
  static void load_two(const uint8_t* p, F& a, F& b) {
    a = load(p);
    b = load(p + kLanes * kBytes);
  }
};
struct ReadF16 {
  static constexpr int kBytes = 2;
  static constexpr float kUnit = 1;
  static F load(const uint8_t* p) { return f_load_f16(p); }
  static void load_two(const uint8_t* p, F& a, F& b) {
    a = load(p);
    b = load(p + kLanes * kBytes);
  }
};
struct ReadBF16 {
  static constexpr int kBytes = 2;
  static constexpr float kUnit = 1;
  static F load(const uint8_t* p) { return f_load_bf16(p); }
  static void load_two(const uint8_t* p, F& a, F& b) {
    a = load(p);
    b = load(p + kLanes * kBytes);
  }
};
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

// sum + weights . x over n values, in kChains sums.
template <class Type, int kRows, int kChains>
inline void add_plain_dots(const uint8_t* w, int64_t n, const float* const* x,
                           F (&sum)[kRows][kChains]) {
  static_assert(kChains % 2 == 0);
  int64_t i = 0;
  for (; i + kLanes * kChains <= n; i += kLanes * kChains)
    for (int c = 0; c < kChains; c += 2) {
      F a, b;
      Type::load_two(w + (i + kLanes * c) * Type::kBytes, a, b);
      for (int r = 0; r < kRows; ++r) {
        sum[r][c] = f_fma(a, f_load(x[r] + i + kLanes * c), sum[r][c]);
        sum[r][c + 1] = f_fma(b, f_load(x[r] + i + kLanes * (c + 1)), sum[r][c + 1]);
      }
    }
  for (; i < n; i += kLanes) {
    const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const F value = load_rest<Type>(w + i * Type::kBytes, left);
    for (int r = 0; r < kRows; ++r)
      sum[r][0] = f_fma(value, f_load_first(x[r] + i, left), sum[r][0]);
  }
}

template <class Type, int kRows>
void dot_rows(const PlainDot& p) {
  // The same for any number of rows: a row gets the same bits in any company.
  constexpr int kChains = 2;
  const auto* w = static_cast<const uint8_t*>(p.weights);
  const float* x[kRows];
  F sum[kRows][kChains];
  for (int r = 0; r < kRows; ++r) {
    x[r] = p.x + (p.rows ? p.rows[r] : r) * p.x_stride;
    for (int c = 0; c < kChains; ++c) sum[r][c] = f_zero();
  }
  if (p.scales == nullptr) {
    add_plain_dots<Type>(w, p.n, x, sum);
  } else {
    for (int64_t k = 0; k < p.n; k += kScaleColumns) {
      const int64_t n = p.n - k < kScaleColumns ? p.n - k : kScaleColumns;
      F part[kRows][kChains];
      for (auto& row : part)
        for (F& v : row) v = f_zero();
      add_plain_dots<Type>(w + k * Type::kBytes, n, x, part);
      const F scale = f_set(p.scales[k / kScaleColumns]);
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kChains; ++c) sum[r][c] = f_fma(part[r][c], scale, sum[r][c]);
        x[r] += n;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    F total = sum[r][0];
    for (int c = 1; c < kChains; ++c) total = f_add(total, sum[r][c]);
    p.sums[r] = Type::kUnit * f_sum(total);
  }
}

template <class Type>
void plain_dot(const PlainDot& p) {
  switch (p.n_rows) {
    case 1:
      dot_rows<Type, 1>(p);
      break;
    case 2:
      dot_rows<Type, 2>(p);
      break;
    case 3:
      dot_rows<Type, 3>(p);
      break;
    case 4:
      dot_rows<Type, 4>(p);
      break;
    default:
      break;
  }
}

}  // namespace
}  // namespace fathom::cpu
