// Vectors of AVX2 under the names that matmul_body.h is written in: 8 lanes.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "cpu/matmul_kernels.h"
#include "cpu/simd_scales.h"
#include "fathom/quant.hpp"

namespace fathom::cpu {
namespace {

using F = __m256;   // 8 floats
using I = __m256i;  // 8 int32
using B = __m256i;  // 32 bytes: 8 rows of 4 columns
constexpr int kLanes = 8;
constexpr int kPanelRows = 6;  // rows of a panel product: 2 x 6 sums, 2 weights, 1 activation

inline F f_zero() {
  return _mm256_setzero_ps();
}
inline F f_set(float v) {
  return _mm256_set1_ps(v);
}
inline F f_load(const float* p) {
  return _mm256_loadu_ps(p);
}
inline void f_store(float* p, F v) {
  _mm256_storeu_ps(p, v);
}
inline I first_lanes(int n) {
  const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}
// The first n lanes, the others zero or untouched; n may be negative or more than kLanes.
inline F f_load_first(const float* p, int n) {
  return _mm256_maskload_ps(p, first_lanes(n));
}
inline void f_store_first(float* p, F v, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), v);
}
inline F f_add(F a, F b) {
  return _mm256_add_ps(a, b);
}
inline F f_sub(F a, F b) {
  return _mm256_sub_ps(a, b);
}
inline F f_mul(F a, F b) {
  return _mm256_mul_ps(a, b);
}
inline F f_div(F a, F b) {
  return _mm256_div_ps(a, b);
}
inline F f_max(F a, F b) {
  return _mm256_max_ps(a, b);
}
inline F f_min(F a, F b) {
  return _mm256_min_ps(a, b);
}
inline F f_fma(F a, F b, F c) {
  return _mm256_fmadd_ps(a, b, c);
}  // a b + c
inline F f_fnma(F a, F b, F c) {
  return _mm256_fnmadd_ps(a, b, c);
}  // c - a b
inline F f_abs(F v) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
}
inline F f_round(F v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F f_from_i(I v) {
  return _mm256_cvtepi32_ps(v);
}
inline I f_to_i(F v) {
  return _mm256_cvtps_epi32(v);
}
// v * 2^n for integers n in [-126, 127].
inline F f_scale2(F v, F n) {
  const I bits =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(v, _mm256_castsi256_ps(bits));
}
inline float f_sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float f_max_lane(F v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline int32_t i_sum(I v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline I i_load(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const I*>(p));
}
inline I i_add(I a, I b) {
  return _mm256_add_epi32(a, b);
}
// Eight integers of int8 range as bytes.
inline void i_store_i8(int8_t* p, I v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

// Eight values of a narrower type.
inline F f_load_f16(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline F f_load_bf16(const void* p) {
  const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
// As bf16 in the low halves of the lanes, to nearest even; NaN becomes the quiet one.
inline I i_bf16(F v) {
  const I bits = _mm256_castps_si256(v);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const F nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
}
inline void f_store_bf16(uint16_t* p, F v) {
  const I words = _mm256_packus_epi32(i_bf16(v), _mm256_setzero_si256());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08)));
}
inline F f_load_u8(const void* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
inline F f_load_i8(const void* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
// E4M3 shifted into an f16 is 2^-8 of its value, subnormals included; 0x7f is NaN.
inline F f_load_f8(const void* p) {
  const __m128i code = _mm_cvtepu8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  const __m128i magnitude = _mm_and_si128(code, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(code, _mm_set1_epi16(0x80)), 8);
  const __m128i nan =
      _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

// Two vectors of E4M3, each 2^-8 of its value.
inline void f_load_f8_parts(const void* p, F& a, F& b) {
  const __m128i codes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  const __m128i magnitude = _mm_set1_epi8(0x7f);
  const __m128i nan = _mm_cmpeq_epi8(_mm_and_si128(codes, magnitude), magnitude);
  // The sign fills the upper byte: shifted by seven it stands in bits 15 and 14.
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7),
                                        _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  const __m256i marked =
      _mm256_or_si256(half, _mm256_and_si256(_mm256_cvtepi8_epi16(nan), _mm256_set1_epi16(0x7e00)));
  a = _mm256_cvtph_ps(_mm256_castsi256_si128(marked));
  b = _mm256_cvtph_ps(_mm256_extracti128_si256(marked, 1));
}

// ---- pairs of int16: what belongs to the first and to the last 16 of 32 columns ----

inline I i_load_u8_pairs(const void* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline I i_load_i8_pairs(const void* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
// first and last / 2^kLastShift, both of int16 range.
template <int kLastShift>
inline I i_join_pairs(I first, I last) {
  return _mm256_blend_epi16(first, _mm256_slli_epi32(last, 16 - kLastShift), 0xaa);
}
inline I i_low_nibbles(I bytes_in_pairs) {
  return _mm256_and_si256(bytes_in_pairs, _mm256_set1_epi16(15));
}
inline I i_high_nibbles(I bytes_in_pairs) {
  return _mm256_srli_epi16(bytes_in_pairs, 4);
}
inline I i_first_of_pairs(I v) {
  return _mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16);
}
inline I i_last_of_pairs(I v) {
  return _mm256_srai_epi32(v, 16);
}
inline I i_sub_pairs(I a, I b) {
  return _mm256_sub_epi16(a, b);
}
template <int kBits>
inline I i_shift_left_pairs(I v) {
  return _mm256_slli_epi16(v, kBits);
}
// a[first] b[first] + a[last] b[last]
inline I i_dot_pairs(I a, I b) {
  return _mm256_madd_epi16(a, b);
}

// ---- bytes ----

inline B b_load(const void* p) {
  return _mm256_loadu_si256(static_cast<const B*>(p));
}
inline B b_zero() {
  return _mm256_setzero_si256();
}
inline void b_store(void* p, B v) {
  _mm256_storeu_si256(static_cast<B*>(p), v);
}
// The bits of kMask of each byte shifted right by kShift, and `codes` with them: those of scales
// have vectors of the same length.
template <int kShift, int kMask>
inline B b_bits(B v) {
  return s_bits<kShift, kMask>(v);
}
template <int kShift, int kMask>
inline B b_or_bits(B codes, B v) {
  return s_or_bits<kShift, kMask>(codes, v);
}
inline B b_quad(const int8_t* x) {
  int32_t quad;
  __builtin_memcpy(&quad, x, 4);
  return _mm256_set1_epi32(quad);
}

// Byte kByte of each lane's four, an E4M3 code, as 2^-120 of its value; NaN becomes a number.
template <int kByte>
inline F f_f8_plane(B codes) {
  const I high = kByte == 3 ? codes : _mm256_slli_epi32(codes, 24 - 8 * kByte);
  return _mm256_castsi256_ps(_mm256_and_si256(
      _mm256_srai_epi32(high, 4), _mm256_set1_epi32(static_cast<int32_t>(0x87f00000u))));
}
// The larger of `largest` and 2 v, as unsigned bytes.
inline B b_max_twice(B largest, B v) {
  return _mm256_max_epu8(largest, _mm256_add_epi8(v, v));
}
inline bool b_any_equal(B v, uint8_t value) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_set1_epi8(static_cast<int8_t>(value)))) !=
         0;
}
// 32 consecutive floats to the first of each four, the second, and so on.
inline void f_split_quads(F (&v)[4]) {
  // Quads l and l + 4 in a vector, then 4 by 4 transposed in each half.
  const F q0 = _mm256_permute2f128_ps(v[0], v[2], 0x20),
          q1 = _mm256_permute2f128_ps(v[0], v[2], 0x31);
  const F q2 = _mm256_permute2f128_ps(v[1], v[3], 0x20),
          q3 = _mm256_permute2f128_ps(v[1], v[3], 0x31);
  const F a = _mm256_unpacklo_ps(q0, q1), b = _mm256_unpackhi_ps(q0, q1);
  const F c = _mm256_unpacklo_ps(q2, q3), d = _mm256_unpackhi_ps(q2, q3);
  v[0] = _mm256_shuffle_ps(a, c, 0x44);
  v[1] = _mm256_shuffle_ps(a, c, 0xee);
  v[2] = _mm256_shuffle_ps(b, d, 0x44);
  v[3] = _mm256_shuffle_ps(b, d, 0xee);
}

// Signed codes as the dot product wants them.
inline B b_signed(B v) {
  return v;
}
// kIQ4Values of the codes, as b_signed() has them.
inline B b_iq4_values(B codes) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIQ4Values));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), codes);
}
// Byte kByte of each lane's four; of codes from b_signed() with their sign.
template <int kByte>
inline I i_byte(B v) {
  return _mm256_and_si256(_mm256_srli_epi32(v, 8 * kByte), _mm256_set1_epi32(255));
}
template <int kByte>
inline I i_signed_byte(B v) {
  return _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * kByte), 24);
}
inline I i_pairs(B products) {
  return _mm256_madd_epi16(products, _mm256_set1_epi16(1));
}

// sum of w[q] . x over eight quads, signed codes.
// maddubs wants one unsigned side: |w| times x with w's sign.  2 * 128 * 127 fits 16 bits.
inline I i_dot_signed(const B* w, const XBlock& x) {
  I sum = _mm256_setzero_si256();
  for (int q = 0; q < 8; ++q) {
    const B signed_x = _mm256_sign_epi8(b_quad(x.q + 4 * q), w[q]);
    sum = i_add(sum, i_pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(w[q]), signed_x)));
  }
  return sum;
}
// start + the same for codes 0 .. kMaxCode: pairs are added in 16 bits as long as they fit.
template <int kMaxCode, int kQuads>
inline I i_dot_unsigned(const B* w, const int8_t* x, I start) {
  constexpr int kFit = 32767 / (2 * 127 * kMaxCode);
  constexpr int kRun = kFit > kQuads ? kQuads : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  I sum = start;
  for (int q = 0; q < kQuads; q += kRun) {
    B run = _mm256_maddubs_epi16(w[q], b_quad(x + 4 * q));
    for (int i = q + 1; i < q + kRun; ++i)
      run = _mm256_add_epi16(run, _mm256_maddubs_epi16(w[i], b_quad(x + 4 * i)));
    sum = i_add(sum, i_pairs(run));
  }
  return sum;
}
inline I i_set(int32_t v) {
  return _mm256_set1_epi32(v);
}

// Eight rows of eight, transposed.
inline void transpose_tile(const float* rows, int64_t stride, float* out, int64_t out_stride) {
  F a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = f_load(rows + i * stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    f_store(out + i * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    f_store(out + (i + 4) * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

}  // namespace
}  // namespace fathom::cpu
