// f8_pair_kernels() for AVX512_BF16 and AVX512_VBMI.  bf16 holds every E4M3 code as it is: vpermi2b
// looks up the upper and the lower bytes of 64 codes in tables of all magnitudes, the sign is put
// back, and vdpbf16ps multiplies 32 at a time.
#include "cpu/simd_avx512.h"

namespace fathom::cpu {
namespace {

constexpr int kStep = 64;       // columns of a vector of codes
constexpr int kColumns = 4096;  // whose activations are rounded at a time
constexpr int kRowsAtOnce = 4;
static_assert(kScaleColumns % kStep == 0 && kColumns % kScaleColumns == 0);

// Upper and lower bytes of the bf16 of the codes 0 .. 127; the last one is NaN.
struct Tables {
  alignas(64) uint8_t high[128], low[128];
};
constexpr Tables make_tables() {
  Tables t{};
  for (int code = 0; code < 128; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    int bits = (exponent + 120) << 7 | mantissa << 4;
    if (exponent == 0) {  // mantissa * 2^-9
      const int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
      bits = mantissa == 0 ? 0 : (118 + top) << 7 | (mantissa << (7 - top) & 0x7f);
    }
    if (code == 0x7f) bits = 0x7fc0;
    t.high[code] = static_cast<uint8_t>(bits >> 8);
    t.low[code] = static_cast<uint8_t>(bits & 0xff);
  }
  return t;
}
constexpr Tables kTables = make_tables();

struct Lookup {
  I high[2], low[2];
};
inline Lookup load_tables() {
  return {{_mm512_load_si512(kTables.high), _mm512_load_si512(kTables.high + 64)},
          {_mm512_load_si512(kTables.low), _mm512_load_si512(kTables.low + 64)}};
}

// scale * x as bf16: of each 64, first columns 0 .. 7 of every 16, then columns 8 .. 15, the order
// in which the halves of the codes come.  Zeros up to whole steps.
inline void round_row(const float* x, int64_t n, const float* scales, uint16_t* out) {
  for (int64_t i = 0; i < n; i += kStep) {
    const F scale = f_set(scales == nullptr ? 1.0f : scales[i / kScaleColumns]);
    F v[4];
    for (int q = 0; q < 4; ++q) {
      const int64_t left = n - i - q * kLanes;
      v[q] = f_mul(left >= kLanes ? f_load(x + i + q * kLanes)
                   : left > 0     ? f_load_first(x + i + q * kLanes, static_cast<int>(left))
                                  : f_zero(),
                   scale);
    }
    const I low = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(v[1], v[0]));
    const I high = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(v[3], v[2]));
    _mm512_store_si512(out + i, _mm512_shuffle_i64x2(low, high, 0x88));
    _mm512_store_si512(out + i + kStep / 2, _mm512_shuffle_i64x2(low, high, 0xdd));
  }
}

// Columns [at, at + 64) into the sums kFirst and kFirst + 1.
template <int kFirst, int kRows>
inline void add_step(const Lookup& tables, I codes, int64_t at, const uint16_t* const* x,
                     F (&sum)[kRows][4]) {
  I high = _mm512_permutex2var_epi8(tables.high[0], codes, tables.high[1]);
  const I low = _mm512_permutex2var_epi8(tables.low[0], codes, tables.low[1]);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8);  // a | b & c
  const auto first = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi8(low, high));
  const auto last = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi8(low, high));
  for (int r = 0; r < kRows; ++r) {
    const uint16_t* values = x[r] + at;
    sum[r][kFirst] = _mm512_dpbf16_ps(sum[r][kFirst], first,
                                      reinterpret_cast<__m512bh>(_mm512_load_si512(values)));
    sum[r][kFirst + 1] =
        _mm512_dpbf16_ps(sum[r][kFirst + 1], last,
                         reinterpret_cast<__m512bh>(_mm512_load_si512(values + kStep / 2)));
  }
}

// One row of weights times kRows rows of rounded activations; a row gets the same bits in any
// company.
template <int kRows>
void dot_row(const uint8_t* w, int64_t n, const uint16_t* const* x, float* sums) {
  const Lookup tables = load_tables();
  F sum[kRows][4];
  for (auto& chains : sum)
    for (F& v : chains) v = f_zero();
  int64_t i = 0;
  for (; i + 2 * kStep <= n; i += 2 * kStep) {
    add_step<0, kRows>(tables, b_load(w + i), i, x, sum);
    add_step<2, kRows>(tables, b_load(w + i + kStep), i + kStep, x, sum);
  }
  for (; i < n; i += kStep) {
    const __mmask64 mask = n - i >= kStep ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
    add_step<0, kRows>(tables, _mm512_maskz_loadu_epi8(mask, w + i), i, x, sum);
  }
  for (int r = 0; r < kRows; ++r)
    sums[r] = f_sum(f_add(f_add(sum[r][0], sum[r][1]), f_add(sum[r][2], sum[r][3])));
}

template <int kRows>
void dot_rows(const PlainDot& p) {
  alignas(64) uint16_t rounded[kRows][kColumns];
  const uint16_t* x[kRows];
  for (int64_t k = 0; k < p.n; k += kColumns) {
    const int64_t n = p.n - k < kColumns ? p.n - k : kColumns;
    const float* scales = p.scales == nullptr ? nullptr : p.scales + k / kScaleColumns;
    for (int r = 0; r < kRows; ++r) {
      round_row(p.x + (p.rows ? p.rows[r] : r) * p.x_stride + k, n, scales, rounded[r]);
      x[r] = rounded[r];
    }
    const auto* w = static_cast<const uint8_t*>(p.weights) + k;
    for (int64_t c = 0; c < p.n_outputs; ++c, w += p.weight_bytes) {
      float sums[kRows];
      dot_row<kRows>(w, n, x, sums);
      for (int r = 0; r < kRows; ++r) {
        float& to = p.out[r * p.out_stride + c];
        to = p.add || k > 0 ? to + sums[r] : sums[r];
      }
    }
  }
}

void dot(const PlainDot& p) {
  static_assert(kDotRows == kRowsAtOnce);
  switch (p.n_rows) {
    case 1:
      dot_rows<1>(p);
      break;
    case 2:
      dot_rows<2>(p);
      break;
    case 3:
      dot_rows<3>(p);
      break;
    case 4:
      dot_rows<4>(p);
      break;
    default:
      break;
  }
}

}  // namespace

const F8PairKernels& f8_pair_kernels_avx512vbmi() noexcept {
  static constexpr F8PairKernels kTable = {.name = "avx512vbmi", .dot = dot};
  return kTable;
}

}  // namespace fathom::cpu
