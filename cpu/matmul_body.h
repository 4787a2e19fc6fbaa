// The kernels of matmul_kernels.h, written once over the vectors of simd_<isa>.h and compiled in
// kernels_<isa>_matmul.cc with that file's flags.  Include the vectors first.
//
// Everything is local to the including file and no library function is called: a weak symbol built
// for a newer processor could be picked by the linker for the whole program.
#pragma once

#include <stdint.h>

#include "cpu/matmul_kernels.h"
#include "cpu/packed_columns.h"
#include "cpu/plain_body.h"
// After the body of the other plain types, whose tile it uses.
#include "cpu/f8_body.h"

namespace fathom::cpu {
namespace {

// ---- integer products ----

inline I sums_of(const XBlock& x) {
  int32_t pair;
  __builtin_memcpy(&pair, x.sums, sizeof pair);
  return i_set(pair);
}
// Where the sum over 16 columns begins when their codes are kOffset too high.
template <int kOffset>
inline I start_of(const XBlock& x, int half) {
  return i_dot_pairs(sums_of(x), i_set(half == 0 ? -kOffset & 0xffff : -kOffset * 0x10000));
}

// 32 columns in int32, scales included.  With codes below 8 (less kOffset) a dot product of 16
// columns fits in 16 bits, and two of them times their scales in 32.
template <class Type>
inline F add_pairs(const Columns32& c, const Pairs& pairs, const Factors& f, const XBlock& x,
                   F sum) {
  static_assert(16 * 127 * Type::kMaxCode <= 32767);
  constexpr int kShift = Type::kLastShift;
  const I zero = i_set(0);
  I dots =
      i_join_pairs<kShift>(i_dot_unsigned<Type::kMaxCode, 4>(c.w, x.q, zero),
                           i_dot_unsigned<(Type::kMaxCode << kShift), 4>(c.w + 4, x.q + 16, zero));
  static_assert(Type::kOffset == 0 || Type::kOffset == 4);
  if constexpr (Type::kOffset == 4) dots = i_sub_pairs(dots, i_shift_left_pairs<2>(sums_of(x)));
  F part = f_mul(f_from_i(i_dot_pairs(dots, pairs.scales)), f.d);
  if constexpr (Type::kMin)
    part = f_fnma(f_from_i(i_dot_pairs(sums_of(x), pairs.mins)), f.dmin, part);
  return f_fma(part, f_set(x.scale), sum);
}

template <class Type>
inline F add_columns(const Columns32& c, const XBlock& x, F sum) {
  if constexpr (Type::kTwoScales) {
    static_assert(!Type::kMin && Type::kOffset != 0);
    const I low = i_dot_unsigned<Type::kMaxCode, 4>(c.w, x.q, start_of<Type::kOffset>(x, 0));
    const I high =
        i_dot_unsigned<Type::kMaxCode, 4>(c.w + 4, x.q + 16, start_of<Type::kOffset>(x, 1));
    const F part = f_fma(f_from_i(high), c.scale_high, f_mul(f_from_i(low), c.scale));
    return f_fma(part, f_set(x.scale), sum);
  } else {
    I dot;
    if constexpr (Type::kSigned)
      dot = i_dot_signed(c.w, x);
    else
      dot = i_dot_unsigned<Type::kMaxCode, 8>(c.w, x.q, i_set(0));
    sum = f_fma(f_mul(f_from_i(dot), c.scale), f_set(x.scale), sum);
    if constexpr (Type::kMin) sum = f_fnma(c.min, f_set(x.scaled_sum), sum);
    return sum;
  }
}

// The weights kPrefetchAhead bytes further on.  The processor's own look-ahead ends with the page,
// and with the few hundred operations that it holds: a block takes most of those.
constexpr int kPrefetchAhead = 6144;

template <int kBytes>
inline void prefetch_weights(const uint8_t* p) {
  for (int i = 0; i < kBytes; i += 64)
    __builtin_prefetch(
        reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kPrefetchAhead + i), 0, 1);
}

// One row group times kRows rows of activations.
template <class Type, int kRows>
void int8_tile(const uint8_t* group, int64_t n_blocks, const XBlock* const* x_rows,
               float* const* out, int n_cols, bool add) {
  constexpr int kSubs = Type::kBlock.cols / 32;
  F sum[kHalves][kRows];
  for (int h = 0; h < kHalves; ++h)
    for (int r = 0; r < kRows; ++r) sum[h][r] = f_zero();
  int64_t at = 0;
  for (int64_t b = 0; b < n_blocks; ++b, group += Type::kBlock.bytes) {
    const OpenBlock<Type> factors(group);
    for (int s = 0; s < kSubs; ++s, ++at) {
      if constexpr (kRows <= 2 && Type::kPrefetch)
        prefetch_weights<Type::kBlock.bytes / kSubs>(group + s * (Type::kBlock.bytes / kSubs));
      for (int h = 0; h < kHalves; ++h) {
        Columns32 c;
        if constexpr (Type::kPairs) {
          Type::codes(group, s, h, c);
          const Pairs pairs = Type::pairs(group, s, h, factors[h]);
          for (int r = 0; r < kRows; ++r)
            sum[h][r] = add_pairs<Type>(c, pairs, factors[h], x_rows[r][at], sum[h][r]);
        } else {
          Type::read(group, s, h, factors[h], c);
          for (int r = 0; r < kRows; ++r)
            sum[h][r] = add_columns<Type>(c, x_rows[r][at], sum[h][r]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < kHalves; ++h) {
      float* to = out[r] + kLanes * h;
      const int n = n_cols - kLanes * h;
      if (add) sum[h][r] = f_add(sum[h][r], f_load_first(to, n));
      f_store_first(to, sum[h][r], n);
    }
  }
}

constexpr int kInt8Rows = 8;

template <class Type>
void int8_product(const Int8Product& p) {
  const int64_t group_bytes = p.n_blocks * Type::kBlock.bytes;
  for (int64_t g = 0; g < p.n_groups; ++g) {
    const uint8_t* group = p.weights + g * group_bytes;
    const int64_t left = p.n_cols - kGroupRows * g;
    const int n_cols = left < kGroupRows ? static_cast<int>(left) : kGroupRows;
    const XBlock* x[kInt8Rows];
    float* out[kInt8Rows];
    for (int64_t row = 0; row < p.n_rows;) {
      const int64_t rows_left = p.n_rows - row;
      const int n = rows_left >= 8 ? 8 : rows_left >= 4 ? 4 : rows_left >= 2 ? 2 : 1;
      for (int r = 0; r < n; ++r) {
        x[r] = p.x + (p.rows ? p.rows[row + r] : row + r) * p.x_stride;
        out[r] = p.out + (row + r) * p.out_stride + kGroupRows * g;
      }
      switch (n) {
        case 8:
          int8_tile<Type, 8>(group, p.n_blocks, x, out, n_cols, p.add);
          break;
        case 4:
          int8_tile<Type, 4>(group, p.n_blocks, x, out, n_cols, p.add);
          break;
        case 2:
          int8_tile<Type, 2>(group, p.n_blocks, x, out, n_cols, p.add);
          break;
        default:
          int8_tile<Type, 1>(group, p.n_blocks, x, out, n_cols, p.add);
          break;
      }
      row += n;
    }
  }
}

void quantize(const float* x, int64_t n, XBlock* out) {
  constexpr int kVectors = 32 / kLanes;
  for (int64_t b = 0; b < n / 32; ++b, x += 32) {
    F v[kVectors];
    F largest = f_zero(), probe = f_zero();
    for (int i = 0; i < kVectors; ++i) {
      v[i] = f_load(x + kLanes * i);
      largest = f_max(f_abs(v[i]), largest);
      probe = f_fma(v[i], f_zero(), probe);  // NaN if any value is not finite
    }
    const float max = f_max_lane(largest);
    XBlock& block = out[b];
    block.scale = max / 127.0f + f_sum(probe);
    // Below 2^-120 the inverse would overflow; such values count as zero.
    const F inverse = f_set(max > 0x1p-120f ? 127.0f / max : 0.0f);
    int32_t sum[2] = {0, 0};
    for (int i = 0; i < kVectors; ++i) {
      // The bounds only matter for NaN, which max() turns into the number.
      const F scaled = f_max(f_mul(v[i], inverse), f_set(-127.0f));
      const I q = f_to_i(f_min(scaled, f_set(127.0f)));
      i_store_i8(block.q + kLanes * i, q);
      sum[kLanes * i / 16] += i_sum(q);
    }
    block.scaled_sum = block.scale * static_cast<float>(sum[0] + sum[1]);
    block.bias = -128 * (sum[0] + sum[1]);
    block.sums[0] = static_cast<int16_t>(sum[0]);
    block.sums[1] = static_cast<int16_t>(sum[1]);
  }
}

// ---- panels of f32 ----

// Column kByte of a quad.  value = scale * (code - kOffset) - min; all products are exact in f32
// but for the last one, as in dequantize(), so the bits are the same whether or not the subtraction
// is fused.
template <class Type, int kByte>
inline void unpack_column(B quad, F scale, F min, float* panel) {
  F code;
  if constexpr (Type::kSigned)
    code = f_from_i(i_signed_byte<kByte>(quad));
  else
    code = f_from_i(i_byte<kByte>(quad));
  if constexpr (Type::kOffset != 0) code = f_sub(code, f_set(static_cast<float>(Type::kOffset)));
  F value = f_mul(scale, code);
  if constexpr (Type::kMin) value = f_sub(value, min);
  f_store(panel + kByte * kGroupRows, value);
}

template <class Type>
void unpack(const uint8_t* group, int64_t col0, int64_t n_cols, float* panel) {
  for (int64_t col = col0; col < col0 + n_cols; col += 32, panel += 32 * kGroupRows) {
    const uint8_t* block = group + col / Type::kBlock.cols * Type::kBlock.bytes;
    const OpenBlock<Type> factors(block);
    const int sub = static_cast<int>(col % Type::kBlock.cols / 32);
    for (int h = 0; h < kHalves; ++h) {
      Columns32 c;
      Type::read(block, sub, h, factors[h], c);
      for (int q = 0; q < 8; ++q) {
        const bool second = Type::kTwoScales && q >= 4;
        const F scale = second ? c.scale_high : c.scale;
        const F min = second ? c.min_high : c.min;
        float* to = panel + 4 * q * kGroupRows + kLanes * h;
        unpack_column<Type, 0>(c.w[q], scale, min, to);
        unpack_column<Type, 1>(c.w[q], scale, min, to);
        unpack_column<Type, 2>(c.w[q], scale, min, to);
        unpack_column<Type, 3>(c.w[q], scale, min, to);
      }
    }
  }
}

// kRows rows of activations times a panel of 16 columns.
template <int kRows>
void panel_tile(const PanelProduct& p, int64_t row0) {
  const float* x[kRows];
  F sum[kRows][kHalves];
  for (int r = 0; r < kRows; ++r) {
    x[r] = p.x + (p.rows ? p.rows[row0 + r] : row0 + r) * p.x_stride;
    const float* out = p.out + (row0 + r) * p.out_stride;
    for (int h = 0; h < kHalves; ++h)
      sum[r][h] = p.add ? f_load_first(out + kLanes * h, p.n_cols - kLanes * h) : f_zero();
  }
  // Several steps per pass over the rows: there are more row pointers than registers.
  constexpr int kSteps = kLanes == 16 ? 2 : 1;
  const float* panel = p.panel;
  int64_t k = 0;
  for (; k + kSteps <= p.k; k += kSteps, panel += kSteps * p.panel_stride) {
    F w[kSteps][kHalves];
    for (int s = 0; s < kSteps; ++s)
      for (int h = 0; h < kHalves; ++h) w[s][h] = f_load(panel + s * p.panel_stride + kLanes * h);
    for (int r = 0; r < kRows; ++r) {
      const float* values = x[r] + k;
      for (int s = 0; s < kSteps; ++s) {
        const F value = f_set(values[s]);
        for (int h = 0; h < kHalves; ++h) sum[r][h] = f_fma(value, w[s][h], sum[r][h]);
      }
    }
  }
  for (; k < p.k; ++k, panel += p.panel_stride) {
    F w[kHalves];
    for (int h = 0; h < kHalves; ++h) w[h] = f_load(panel + kLanes * h);
    for (int r = 0; r < kRows; ++r) {
      const F value = f_set(x[r][k]);
      for (int h = 0; h < kHalves; ++h) sum[r][h] = f_fma(value, w[h], sum[r][h]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = p.out + (row0 + r) * p.out_stride;
    for (int h = 0; h < kHalves; ++h)
      f_store_first(out + kLanes * h, sum[r][h], p.n_cols - kLanes * h);
  }
}

template <int kRows>
void panel_rest(const PanelProduct& p, int64_t row0, int64_t n) {
  if constexpr (kRows > 0) {
    if (n == kRows)
      panel_tile<kRows>(p, row0);
    else
      panel_rest<kRows - 1>(p, row0, n);
  }
}

void panel_product(const PanelProduct& p) {
  int64_t row = 0;
  for (; row + kPanelRows <= p.n_rows; row += kPanelRows) panel_tile<kPanelRows>(p, row);
  panel_rest<kPanelRows - 1>(p, row, p.n_rows - row);
}

// ---- small things ----

void transpose16(const float* rows, int64_t row_stride, int64_t n, float* panel) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes)
    for (int h = 0; h < kHalves; ++h)
      transpose_tile(rows + kLanes * h * row_stride + k, row_stride,
                     panel + k * kGroupRows + kLanes * h, kGroupRows);
  for (; k < n; ++k)
    for (int r = 0; r < kGroupRows; ++r) panel[k * kGroupRows + r] = rows[r * row_stride + k];
}

void untranspose16(const float* panel, int64_t n, float* rows, int64_t row_stride) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes)
    for (int h = 0; h < kHalves; ++h)
      transpose_tile(panel + k * kGroupRows + kLanes * h, kGroupRows,
                     rows + kLanes * h * row_stride + k, row_stride);
  for (; k < n; ++k)
    for (int r = 0; r < kGroupRows; ++r) rows[r * row_stride + k] = panel[k * kGroupRows + r];
}

// exp(v) to 2 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; ln 2 in two parts, Taylor
// coefficients to degree 7.
inline F exp_vector(F v) {
  v = f_min(f_max(v, f_set(-87.0f)), f_set(88.0f));
  const F n = f_round(f_mul(v, f_set(1.44269504088896341f)));
  F r = f_fnma(n, f_set(0.693145751953125f), v);
  r = f_fnma(n, f_set(1.42860682030941723e-6f), r);
  F p = f_set(1.0f / 5040);
  p = f_fma(p, r, f_set(1.0f / 720));
  p = f_fma(p, r, f_set(1.0f / 120));
  p = f_fma(p, r, f_set(1.0f / 24));
  p = f_fma(p, r, f_set(1.0f / 6));
  p = f_fma(p, r, f_set(0.5f));
  p = f_fma(p, r, f_set(1.0f));
  p = f_fma(p, r, f_set(1.0f));
  return f_scale2(p, n);
}

inline F swiglu_vector(F gate, F up) {
  const F one = f_set(1.0f);
  return f_mul(f_div(gate, f_add(one, exp_vector(f_sub(f_zero(), gate)))), up);
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    f_store_first(out + i, swiglu_vector(f_load_first(gate + i, left), f_load_first(up + i, left)),
                  left);
  }
}

void to_bf16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f_store_bf16(out + i, f_load(x + i));
  if (i < n) {
    uint16_t rest[kLanes];
    f_store_bf16(rest, f_load_first(x + i, static_cast<int>(n - i)));
    __builtin_memcpy(out + i, rest, static_cast<uint64_t>(n - i) * sizeof rest[0]);
  }
}

void add_scaled(float a, const float* x, int64_t n, float* y) {
  const F factor = f_set(a);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    f_store_first(y + i, f_fma(factor, f_load_first(x + i, left), f_load_first(y + i, left)), left);
  }
}

constexpr MatmulKernels table(const char* name, int64_t int8_max_rows) {
  return {
      .name = name,
      .int8_max_rows = int8_max_rows,
      .panel_rows = kPanelRows,
      .quantize = quantize,
      .int8_product = {int8_product<ReadQ8_0>, int8_product<ReadQ4_0>, int8_product<ReadQ4_1>,
                       int8_product<ReadQ5_0>, int8_product<ReadQ5_1>, int8_product<ReadIQ4_NL>,
                       int8_product<ReadQ2_K>, int8_product<ReadQ3_K>, int8_product<ReadQ4_K>,
                       int8_product<ReadQ5_K>, int8_product<ReadQ6_K>, int8_product<ReadIQ4_XS>},
      .unpack = {unpack<ReadQ8_0>, unpack<ReadQ4_0>, unpack<ReadQ4_1>, unpack<ReadQ5_0>,
                 unpack<ReadQ5_1>, unpack<ReadIQ4_NL>, unpack<ReadQ2_K>, unpack<ReadQ3_K>,
                 unpack<ReadQ4_K>, unpack<ReadQ5_K>, unpack<ReadQ6_K>, unpack<ReadIQ4_XS>},
      .widen = {widen<ReadF32>, widen<ReadF16>, widen<ReadBF16>, widen<ReadF8>},
      .plain_dot = {plain_dot<ReadF32>, plain_dot<ReadF16>, plain_dot<ReadBF16>, f8_dot},
      .transpose16 = transpose16,
      .untranspose16 = untranspose16,
      .panel_product = panel_product,
      .swiglu = swiglu,
      .to_bf16 = to_bf16,
      .add_scaled = add_scaled,
  };
}

}  // namespace
}  // namespace fathom::cpu
