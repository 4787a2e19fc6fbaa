// pair_kernels.h for AVX512_BF16: vdpbf16ps takes 16 lanes of two products each.
#include <stddef.h>

#include "cpu/rows_simd_avx512.h"
// The exponential is written in the names of the vectors.
#include "cpu/exp_body.h"
#include "cpu/pair_kernels.h"

namespace fathom::cpu {
namespace {

inline int min_int(int64_t a, int64_t b) {
  return static_cast<int>(a < b ? a : b);
}

// Sixteen values as bf16.
inline __m256i narrow(F v) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
}
// bf16 of 16 values of `even` in the lower half, of `odd` in the upper.
inline I halves_of(F even, F odd) {
  return reinterpret_cast<I>(_mm512_cvtne2ps_pbh(odd, even));
}
// Halves to pairs, lane by lane.
inline I interleaved(I halves) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}
inline I pairs_of(F even, F odd) {
  return interleaved(halves_of(even, odd));
}
// sum += both products of each lane.
inline F dot_pairs(F sum, I a, I b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// ---- packing ----------------------------------------------------------------------------------

void pack_columns(const PackColumns& p) {
  const F factor = f_set(p.scale);
  for (int64_t unit = 0; unit * kPairUnit < p.n_columns; ++unit) {
    const float* const* columns = p.columns + unit * kPairUnit;
    const int n_columns = min_int(kPairUnit, p.n_columns - unit * kPairUnit);
    for (int64_t i = 0; i < p.n; i += 32) {
      const int left = min_int(32, p.n - i);
      // A row of sixteen pairs for each column, then transposed.
      alignas(64) float rows[kPairUnit][16];
      for (int c = 0; c < kPairUnit; ++c) {
        I pairs = _mm512_setzero_si512();
        if (c < n_columns) {
          const F low = f_mul(f_load_first(columns[c] + i, left), factor);
          const F high =
              f_mul(left > 16 ? f_load_first(columns[c] + i + 16, left - 16) : f_zero(), factor);
          pairs = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(high, low));
        }
        _mm512_store_si512(rows[c], pairs);
      }
      alignas(64) float turned[16][kPairUnit];
      transpose_tile(rows[0], 16, turned[0], kPairUnit);
      uint32_t* out = p.out + unit * p.unit_stride + i / 2 * kPairUnit;
      for (int k = 0; k < (left + 1) / 2; ++k)
        _mm512_storeu_si512(out + k * kPairUnit, _mm512_load_si512(turned[k]));
    }
  }
}

// Columns [0, n) of sixteen of two rows as halves; n may be more than 16, the lanes behind are
// zero.
struct HalvesF32 {
  static constexpr int kBytes = 4;
  static I load(const uint8_t* even, const uint8_t* odd, int n) {
    return halves_of(
        f_load_first(reinterpret_cast<const float*>(even), n),
        odd == nullptr ? f_zero() : f_load_first(reinterpret_cast<const float*>(odd), n));
  }
};
inline __m256i load_words(const uint8_t* p, int n) {
  return p == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(first_lanes(n), p);
}
struct HalvesF16 {
  static constexpr int kBytes = 2;
  static I load(const uint8_t* even, const uint8_t* odd, int n) {
    return halves_of(_mm512_cvtph_ps(load_words(even, n)), _mm512_cvtph_ps(load_words(odd, n)));
  }
};
struct HalvesBF16 {
  static constexpr int kBytes = 2;
  static I load(const uint8_t* even, const uint8_t* odd, int n) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_words(even, n)), load_words(odd, n), 1);
  }
};

template <class Halves>
void pack_rows_of(const PackRows& p) {
  for (int64_t r = 0; r < p.n_rows; r += 2) {
    const uint8_t* even = static_cast<const uint8_t*>(p.x) + r * p.x_bytes;
    const uint8_t* odd = r + 1 < p.n_rows ? even + p.x_bytes : nullptr;
    uint16_t* rows = p.rows + r * p.row_stride;
    uint32_t* pairs = p.pairs + r / 2 * kPairUnit;
    for (int64_t c = 0; c < p.n_cols; c += kLanes) {
      const int64_t at = c * Halves::kBytes;
      const I halves = Halves::load(even + at, odd == nullptr ? nullptr : odd + at,
                                    min_int(kLanes, p.n_cols - c));
      if (p.rows != nullptr) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + c), _mm512_castsi512_si256(halves));
        if (odd != nullptr)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + p.row_stride + c),
                              _mm512_extracti64x4_epi64(halves, 1));
      }
      if (p.pairs != nullptr)
        _mm512_storeu_si512(pairs + c / kPairUnit * p.panel_stride, interleaved(halves));
    }
  }
}

void pack_rows(const PackRows& p) {
  if (p.type == kRowF32)
    pack_rows_of<HalvesF32>(p);
  else if (p.type == kRowF16)
    pack_rows_of<HalvesF16>(p);
  else
    pack_rows_of<HalvesBF16>(p);
}

// ---- products ---------------------------------------------------------------------------------

// sums[i][v] += sum_k a[i, k] . b[k, v]: the one product under everything here.
struct Operands {
  const uint32_t* a;  // pairs
  int64_t a_row, a_k;
  const uint32_t* b;  // vector v of step k at b + v * unit_stride + k * b_k
  int64_t b_k, unit_stride;
  int64_t k;  // steps, of two values each
};

constexpr int64_t kLineBytes = 64;

// What is left to fetch, in portions of one line per step of a product.
class Fetcher {
 public:
  explicit Fetcher(const FetchAhead* ahead) : ahead_(ahead), left_(kFetches) {}
  // Up to n lines.
  FetchAhead next(int64_t n) {
    while (left_ > 0 && at_ >= ahead_->bytes) {
      ++ahead_;
      --left_;
      at_ = 0;
    }
    if (left_ == 0) return {};
    const int64_t rest = ahead_->bytes - at_, most = n * kLineBytes;
    const FetchAhead portion{static_cast<const char*>(ahead_->p) + at_, rest < most ? rest : most};
    at_ += most;
    return portion;
  }

 private:
  const FetchAhead* ahead_;
  int left_;
  int64_t at_ = 0;
};

template <int kRows, int kVectors>
inline void multiply(const Operands& p, int64_t row, int64_t vector, F (&sums)[kRows][kVectors],
                     const FetchAhead& fetch) {
  const uint32_t* a = p.a + row * p.a_row;
  const uint32_t* b[kVectors];
  for (int v = 0; v < kVectors; ++v) b[v] = p.b + (vector + v) * p.unit_stride;
  const int64_t a_row = p.a_row, a_k = p.a_k, b_k = p.b_k;
  const auto step = [&](int64_t k) {
    I w[kVectors];
    for (int v = 0; v < kVectors; ++v) w[v] = _mm512_loadu_si512(b[v] + k * b_k);
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, a + i * a_row, 4);
      const I x = _mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = dot_pairs(sums[i][v], x, w[v]);
    }
    a += a_k;
  };
  int64_t k = 0;
  for (const int64_t lines = fetch.bytes / kLineBytes; k < lines; ++k) {
    __builtin_prefetch(static_cast<const char*>(fetch.p) + k * kLineBytes, 0, 2);
    step(k);
  }
  for (; k < p.k; ++k) step(k);
}

// Where the products go.
struct ToF32 {
  float* c;
  int64_t c_row;
  const float* decay;  // start: c[i, j] * decay[i]; null: 0
  template <int kRows, int kVectors>
  void start(int64_t row, int64_t vector, F (&sums)[kRows][kVectors]) const {
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v)
        sums[i][v] = decay == nullptr ? f_zero()
                                      : f_mul(f_load(c + (row + i) * c_row + (vector + v) * kLanes),
                                              f_set(decay[row + i]));
  }
  template <int kRows, int kVectors>
  void finish(int64_t row, int64_t vector, F (&sums)[kRows][kVectors]) const {
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v)
        f_store(c + (row + i) * c_row + (vector + v) * kLanes, sums[i][v]);
  }
};

struct ToRows {
  uint16_t* rows;
  int64_t row_stride;
  template <int kRows, int kVectors>
  void start(int64_t, int64_t, F (&sums)[kRows][kVectors]) const {
    for (auto& row : sums)
      for (F& sum : row) sum = f_zero();
  }
  template <int kRows, int kVectors>
  void finish(int64_t row, int64_t vector, F (&sums)[kRows][kVectors]) const {
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) {
        uint16_t* to = rows + (row + i) * row_stride + (vector + v) * kLanes;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(sums[i][v]));
      }
  }
};

// Blocks begin at even rows.
struct ToPairs {
  uint32_t* pairs;
  int64_t panel_stride;
  template <int kRows, int kVectors>
  void start(int64_t, int64_t, F (&sums)[kRows][kVectors]) const {
    for (auto& row : sums)
      for (F& sum : row) sum = f_zero();
  }
  template <int kRows, int kVectors>
  void finish(int64_t row, int64_t vector, F (&sums)[kRows][kVectors]) const {
    for (int i = 0; i < kRows; i += 2)
      for (int v = 0; v < kVectors; ++v) {
        const F odd = i + 1 < kRows ? sums[i + 1 < kRows ? i + 1 : i][v] : f_zero();
        _mm512_storeu_si512(pairs + (vector + v) * panel_stride + (row + i) / 2 * kPairUnit,
                            pairs_of(sums[i][v], odd));
      }
  }
};

template <int kRows, int kVectors, class To>
inline void product_rows(const Operands& p, const To& to, int64_t row, int64_t n_rows,
                         int64_t vector, const FetchAhead& fetch) {
  if (n_rows == kRows) {
    F sums[kRows][kVectors];
    to.start(row, vector, sums);
    multiply(p, row, vector, sums, fetch);
    to.finish(row, vector, sums);
  } else if constexpr (kRows > 1) {
    product_rows<kRows - 1, kVectors>(p, to, row, n_rows, vector, fetch);
  }
}

template <class To>
void product(const Operands& p, const To& to, int64_t n_rows, int64_t n_vectors, Fetcher& fetcher) {
  int64_t v = 0;
  for (; v + 2 <= n_vectors; v += 2)
    for (int64_t i = 0; i < n_rows; i += 8)
      product_rows<8, 2>(p, to, i, min_int(8, n_rows - i), v, fetcher.next(p.k));
  if (v < n_vectors)
    for (int64_t i = 0; i < n_rows; i += 16)
      product_rows<16, 1>(p, to, i, min_int(16, n_rows - i), v, fetcher.next(p.k));
}

void expand(const ExpandPairs& p) {
  const Operands operands{.a = reinterpret_cast<const uint32_t*>(p.x),
                          .a_row = p.x_stride / 2,
                          .a_k = 1,
                          .b = p.weights,
                          .b_k = kPairUnit,
                          .unit_stride = p.weight_stride,
                          .k = p.k / 2};
  static constexpr FetchAhead kNothing[kFetches] = {};
  Fetcher fetcher(kNothing);
  if (p.rows != nullptr)
    product(operands, ToRows{p.rows, p.row_stride}, p.n_rows, p.n_panels, fetcher);
  else
    product(operands, ToPairs{p.pairs, p.panel_stride}, p.n_rows, p.n_panels, fetcher);
}

// ---- attention --------------------------------------------------------------------------------

// Scores to pairs of weights, one vector of columns.
inline void softmax_columns(const AttendPairs& t, int64_t col) {
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
  for (int64_t row = 0; row < t.n_rows; row += 2) {
    const F even = f_exp(f_sub(f_load(scores + row * t.n_cols), base));
    const F odd =
        row + 1 < t.n_rows ? f_exp(f_sub(f_load(scores + (row + 1) * t.n_cols), base)) : f_zero();
    _mm512_storeu_si512(t.weights + row / 2 * t.n_cols + col, pairs_of(even, odd));
    total = f_add(f_add(total, even), odd);
  }
  const F decay = f_exp(f_sub(before, base));
  f_store(t.decay + col, decay);
  f_store(t.sum + col, f_fma(f_load(t.sum + col), decay, total));
  f_store(t.max + col, top);
}

void attend(const AttendPairs& t) {
  Fetcher fetcher(t.fetch);
  product({.a = reinterpret_cast<const uint32_t*>(t.keys),
           .a_row = t.key_stride / 2,
           .a_k = 1,
           .b = t.queries,
           .b_k = kPairUnit,
           .unit_stride = t.query_stride,
           .k = t.k / 2},
          ToF32{t.scores, t.n_cols, nullptr}, t.n_rows, t.n_cols / kLanes, fetcher);
  for (int64_t col = 0; col < t.n_cols; col += kLanes) softmax_columns(t, col);
  product({.a = t.weights,
           .a_row = 1,
           .a_k = t.n_cols,
           .b = t.values,
           .b_k = kPairUnit,
           .unit_stride = t.value_stride,
           .k = (t.n_rows + 1) / 2},
          ToF32{t.out, t.out_stride, t.decay}, t.n_used, t.n_values / kLanes, fetcher);
}

}  // namespace

const PairKernels& pair_kernels_avx512bf16() noexcept {
  static constexpr PairKernels kKernels = {.name = "avx512bf16",
                                           .pack_columns = pack_columns,
                                           .pack_rows = pack_rows,
                                           .expand = expand,
                                           .attend = attend};
  return kKernels;
}

}  // namespace fathom::cpu
