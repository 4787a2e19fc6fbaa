// The vector kernels of rows_kernels.h, written once over the names of simd_<isa>.h and compiled
// in each kernels_<isa>_rows.cc with that file's flags.  Everything is local to the file.
//
// The including file provides, beside simd_<isa>.h: kBlockRows (rows of a register block of the
// products), kBlockVectors (its width), f_keep_below, f_rotate, f16_value, f16_store.

#include "cpu/exp_body.h"

namespace fathom::cpu {
namespace {

inline int min_int(int64_t a, int64_t b) {
  return static_cast<int>(a < b ? a : b);
}

inline float exp_one(float x) {
  float lanes[kLanes];
  f_store(lanes, f_exp(f_set(x)));
  return lanes[0];
}

// ---- rows of activations ----------------------------------------------------------------------

double sum_squares(const float* x, int64_t n) {
  F sums[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const F v = f_load(x + i + j * kLanes);
      sums[j] = f_fma(v, v, sums[j]);
    }
  for (; i < n; i += kLanes) {
    const F v = f_load_first(x + i, min_int(kLanes, n - i));
    sums[0] = f_fma(v, v, sums[0]);
  }
  return f_sum(f_add(f_add(sums[0], sums[1]), f_add(sums[2], sums[3])));
}

void scale(const float* x, float factor, const float* weight, int64_t n, float* out) {
  const F f = f_set(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    f_store(out + i, f_mul(f_mul(f_load(x + i), f), f_load(weight + i)));
  if (i < n) {
    const int left = min_int(kLanes, n - i);
    f_store_first(out + i,
                  f_mul(f_mul(f_load_first(x + i, left), f), f_load_first(weight + i, left)), left);
  }
}

void rotate(const float* x, const float* cos_sin, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    f_store(out + i, f_rotate(f_load(x + i), f_load(cos_sin + i)));
  if (i < n) {
    const int left = min_int(kLanes, n - i);
    f_store_first(out + i, f_rotate(f_load_first(x + i, left), f_load_first(cos_sin + i, left)),
                  left);
  }
}

void pack_f16(const float* x, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f16_store(out + i, f_load(x + i));
  if (i < n) {
    const int left = min_int(kLanes, n - i);
    uint16_t last[kLanes];
    f16_store(last, f_load_first(x + i, left));
    __builtin_memcpy(out + i, last, static_cast<size_t>(left) * 2);
  }
}

// ---- rows of the cache ------------------------------------------------------------------------

// Values [0, n) of elements that lie one after the other, `load` reading kLanes of them.
template <class Element, F (*load)(const void*)>
inline void decode_plain(const Element* row, int64_t n, F factor, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f_store(out + i, f_mul(load(row + i), factor));
  if (i < n) {  // the row may end where the memory ends
    const int left = min_int(kLanes, n - i);
    Element last[kLanes] = {};
    __builtin_memcpy(last, row + i, static_cast<size_t>(left) * sizeof(Element));
    f_store_first(out + i, f_mul(load(last), factor), left);
  }
}

// A block of 32 signed bytes times d.
inline void decode_codes(const int8_t* codes, uint16_t d, int n, float* out) {
  const F factor = f_set(f16_value(d));
  for (int i = 0; i < n; i += kLanes) {
    const F values = f_mul(f_load_i8(codes + i), factor);
    if (n - i >= kLanes)
      f_store(out + i, values);
    else
      f_store_first(out + i, values, n - i);
  }
}

inline void decode_f8(const uint8_t* row, int64_t n, float* out) {
  const int64_t n_scales = (n + 127) / 128;
  const uint8_t* codes = row + 4 * n_scales;
  for (int64_t s = 0; s < n_scales; ++s) {
    float factor;
    __builtin_memcpy(&factor, row + 4 * s, 4);
    decode_plain<uint8_t, f_load_f8>(codes + 128 * s, n - 128 * s < 128 ? n - 128 * s : 128,
                                     f_set(factor), out + 128 * s);
  }
}

inline void decode_q8_0(const uint8_t* row, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 32, row += 34) {
    uint16_t d;
    __builtin_memcpy(&d, row, 2);
    decode_codes(reinterpret_cast<const int8_t*>(row + 2), d, min_int(32, n - i), out + i);
  }
}

inline void decode_q4_0(const uint8_t* row, int64_t n, float* out) {
  const __m128i low = _mm_set1_epi8(15), middle = _mm_set1_epi8(8);
  for (int64_t i = 0; i < n; i += 32, row += 18) {
    uint16_t d;
    __builtin_memcpy(&d, row, 2);
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2));
    alignas(32) int8_t codes[32];
    _mm_store_si128(reinterpret_cast<__m128i*>(codes),
                    _mm_sub_epi8(_mm_and_si128(packed, low), middle));
    _mm_store_si128(reinterpret_cast<__m128i*>(codes + 16),
                    _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(packed, 4), low), middle));
    decode_codes(codes, d, min_int(32, n - i), out + i);
  }
}

inline F load_f32(const void* p) {
  return f_load(static_cast<const float*>(p));
}

void decode(const DecodeRows& a) {
  const auto* row = static_cast<const uint8_t*>(a.rows);
  float* out = a.out;
  const F one = f_set(1.0f);
  const int64_t n = a.n_cols;
  for (int64_t i = 0; i < a.n_rows; ++i, row += a.row_bytes, out += a.out_stride) {
    switch (a.type) {
      case kRowF32:
        decode_plain<float, load_f32>(reinterpret_cast<const float*>(row), n, one, out);
        break;
      case kRowF16:
        decode_plain<uint16_t, f_load_f16>(reinterpret_cast<const uint16_t*>(row), n, one, out);
        break;
      case kRowBF16:
        decode_plain<uint16_t, f_load_bf16>(reinterpret_cast<const uint16_t*>(row), n, one, out);
        break;
      case kRowF8:
        decode_f8(row, n, out);
        break;
      case kRowQ8_0:
        decode_q8_0(row, n, out);
        break;
      case kRowQ4_0:
        decode_q4_0(row, n, out);
        break;
      case kRowTypes:
        break;
    }
  }
}

// ---- products ---------------------------------------------------------------------------------

// c[i, j] = start(i, j) + sum_k a[i, k] * b[k, j]:  the one product under everything here.
// Vector v of a row of b is at unit v * kLanes / 16, 16 values each, unit_stride apart.
struct Product {
  const float* a;
  int64_t a_row, a_k;  // strides
  const float* b;
  int64_t b_k, unit_stride;
  int64_t k;
  float* c;
  int64_t c_row;
  const float* decay;  // start: c[i, j] * decay[i]; null: 0
};

constexpr int kUnitVectors = kRowUnit / kLanes;

template <int kRows, int kVectors>
void product_block(const Product& p, int64_t row, int64_t vector) {
  F sums[kRows][kVectors];
  const float* a = p.a + row * p.a_row;
  const float* b[kVectors];
  float* c = p.c + row * p.c_row + vector * kLanes;
  for (int v = 0; v < kVectors; ++v)
    b[v] = p.b + (vector + v) / kUnitVectors * p.unit_stride + (vector + v) % kUnitVectors * kLanes;
  for (int i = 0; i < kRows; ++i) {
    const F decay = p.decay != nullptr ? f_set(p.decay[row + i]) : f_zero();
    for (int v = 0; v < kVectors; ++v)
      sums[i][v] =
          p.decay != nullptr ? f_mul(f_load(c + i * p.c_row + v * kLanes), decay) : f_zero();
  }
  const int64_t a_row = p.a_row, a_k = p.a_k, b_k = p.b_k;
  for (int64_t k = 0; k < p.k; ++k) {
    F w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = f_load(b[v] + k * b_k);
    for (int i = 0; i < kRows; ++i) {
      const F x = f_set(a[i * a_row]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = f_fma(x, w[v], sums[i][v]);
    }
    a += a_k;
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) f_store(c + i * p.c_row + v * kLanes, sums[i][v]);
}

template <int kRows, int kVectors>
void product_rows(const Product& p, int64_t row, int64_t n_rows, int64_t vector) {
  if (n_rows == kRows)
    product_block<kRows, kVectors>(p, row, vector);
  else if constexpr (kRows > 1)
    product_rows<kRows - 1, kVectors>(p, row, n_rows, vector);
}

// All blocks of an [n_rows, n_vectors * kLanes] product.  A panel of b stays in the cache while the
// rows pass.
void product(const Product& p, int64_t n_rows, int64_t n_vectors) {
  int64_t v = 0;
  for (; v + kBlockVectors <= n_vectors; v += kBlockVectors)
    for (int64_t i = 0; i < n_rows; i += kBlockRows)
      product_rows<kBlockRows, kBlockVectors>(p, i, min_int(kBlockRows, n_rows - i), v);
  // A single vector has twice the rows: sums enough to hide the latency of a multiply-add.
  for (; v < n_vectors; ++v)
    for (int64_t i = 0; i < n_rows; i += 2 * kBlockRows)
      product_rows<2 * kBlockRows, 1>(p, i, min_int(2 * kBlockRows, n_rows - i), v);
}

void expand(const ExpandRows& a) {
  product({.a = a.x,
           .a_row = a.x_stride,
           .a_k = 1,
           .b = a.panels,
           .b_k = kRowUnit,
           .unit_stride = a.panel_stride,
           .k = a.k,
           .c = a.out,
           .c_row = a.out_stride,
           .decay = nullptr},
          a.n_rows, a.n_panels * kUnitVectors);
}

// ---- attention --------------------------------------------------------------------------------

// Scores to weights, one vector of columns.
inline void softmax_columns(const AttendTile& t, int64_t col) {
  const F lowest = f_set(-__builtin_inff());
  const F before = f_load(t.max + col);
  float* scores = t.scores + col;
  F top = before;
  if (t.limits != nullptr) {
    for (int64_t row = 0; row < t.n_rows; ++row) {
      const F seen = f_keep_below(f_load(scores + row * t.n_cols), static_cast<int>(row),
                                  t.limits + col, lowest);
      f_store(scores + row * t.n_cols, seen);
      top = f_max(top, seen);
    }
  } else {
    for (int64_t row = 0; row < t.n_rows; ++row) top = f_max(top, f_load(scores + row * t.n_cols));
  }
  // Where nothing has been seen, -infinity minus -infinity would be no number.
  const F base = f_zero_where_equal(top, lowest);
  F total = f_zero();
  for (int64_t row = 0; row < t.n_rows; ++row) {
    const F weight = f_exp(f_sub(f_load(scores + row * t.n_cols), base));
    f_store(scores + row * t.n_cols, weight);
    total = f_add(total, weight);
  }
  const F decay = f_exp(f_sub(before, base));
  f_store(t.decay + col, decay);
  f_store(t.sum + col, f_fma(f_load(t.sum + col), decay, total));
  f_store(t.max + col, top);
}

void attend_tile(const AttendTile& t) {
  product({.a = t.keys,
           .a_row = t.key_stride,
           .a_k = 1,
           .b = t.queries,
           .b_k = t.n_cols,
           .unit_stride = kRowUnit,
           .k = t.k,
           .c = t.scores,
           .c_row = t.n_cols,
           .decay = nullptr},
          t.n_rows, t.n_cols / kLanes);
  for (int64_t col = 0; col < t.n_cols; col += kLanes) softmax_columns(t, col);
  product({.a = t.scores,
           .a_row = 1,
           .a_k = t.n_cols,
           .b = t.values,
           .b_k = t.value_stride,
           .unit_stride = kRowUnit,
           .k = t.n_rows,
           .c = t.out,
           .c_row = t.out_stride,
           .decay = t.decay},
          t.n_used, t.n_values / kLanes);
}

void merge(const MergeColumns& a) {
  const float lowest = -__builtin_inff();
  for (int64_t col = 0; col < a.n_cols; ++col) {
    const float part_max = a.part_max[col];
    if (part_max == lowest) continue;
    float* out = a.out + col * a.out_stride;
    const float* part = a.part_out + col * a.part_stride;
    if (a.max[col] == lowest) {
      a.max[col] = part_max;
      a.sum[col] = a.part_sum[col];
      __builtin_memcpy(out, part, static_cast<size_t>(a.n_values) * 4);
      continue;
    }
    const float top = a.max[col] < part_max ? part_max : a.max[col];
    const float old_weight = exp_one(a.max[col] - top), new_weight = exp_one(part_max - top);
    a.sum[col] = a.sum[col] * old_weight + a.part_sum[col] * new_weight;
    a.max[col] = top;
    const F keep = f_set(old_weight), take = f_set(new_weight);
    for (int64_t i = 0; i < a.n_values; i += kLanes) {
      const int left = min_int(kLanes, a.n_values - i);
      const F sum =
          f_fma(f_load_first(part + i, left), take, f_mul(f_load_first(out + i, left), keep));
      f_store_first(out + i, sum, left);
    }
  }
}

}  // namespace
}  // namespace fathom::cpu
