// Vectors of AVX-512 (F, BW, VL, DQ, VNNI) under the names that matmul_body.h is written in: 16
// lanes.
#pragma once

// GCC 12's intrinsics pass deliberately undefined values, of which it then warns.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <stdint.h>

#include "cpu/matmul_kernels.h"
#include "cpu/simd_scales.h"
#include "fathom/quant.hpp"

namespace fathom::cpu {
namespace {

using F = __m512;   // 16 floats
using I = __m512i;  // 16 int32
using B = __m512i;  // 64 bytes: 16 rows of 4 columns
constexpr int kLanes = 16;
constexpr int kPanelRows = 8;  // rows of a panel product: more miss L1 when rows are 4 KB apart

inline F f_zero() {
  return _mm512_setzero_ps();
}
inline F f_set(float v) {
  return _mm512_set1_ps(v);
}
inline F f_load(const float* p) {
  return _mm512_loadu_ps(p);
}
inline void f_store(float* p, F v) {
  _mm512_storeu_ps(p, v);
}
inline __mmask16 first_lanes(int n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}
// The first n lanes, the others zero or untouched; n may be negative or more than kLanes.
inline F f_load_first(const float* p, int n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
inline void f_store_first(float* p, F v, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
inline F f_add(F a, F b) {
  return _mm512_add_ps(a, b);
}
inline F f_sub(F a, F b) {
  return _mm512_sub_ps(a, b);
}
inline F f_mul(F a, F b) {
  return _mm512_mul_ps(a, b);
}
inline F f_div(F a, F b) {
  return _mm512_div_ps(a, b);
}
inline F f_max(F a, F b) {
  return _mm512_max_ps(a, b);
}
inline F f_min(F a, F b) {
  return _mm512_min_ps(a, b);
}
inline F f_fma(F a, F b, F c) {
  return _mm512_fmadd_ps(a, b, c);
}  // a b + c
inline F f_fnma(F a, F b, F c) {
  return _mm512_fnmadd_ps(a, b, c);
}  // c - a b
inline F f_abs(F v) {
  return _mm512_abs_ps(v);
}
inline F f_round(F v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F f_from_i(I v) {
  return _mm512_cvtepi32_ps(v);
}
inline I f_to_i(F v) {
  return _mm512_cvtps_epi32(v);
}
// v * 2^n for integers n.
inline F f_scale2(F v, F n) {
  return _mm512_scalef_ps(v, n);
}
inline float f_sum(F v) {
  return _mm512_reduce_add_ps(v);
}
inline float f_max_lane(F v) {
  return _mm512_reduce_max_ps(v);
}
inline int32_t i_sum(I v) {
  return _mm512_reduce_add_epi32(v);
}
inline I i_load(const int32_t* p) {
  return _mm512_loadu_si512(p);
}
inline I i_add(I a, I b) {
  return _mm512_add_epi32(a, b);
}
// Sixteen integers of int8 range as bytes.
inline void i_store_i8(int8_t* p, I v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v));
}

// Sixteen values of a narrower type.
inline F f_load_f16(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline F f_load_bf16(const void* p) {
  const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// As bf16 in the low halves of the lanes, to nearest even; NaN becomes the quiet one.
inline I i_bf16(F v) {
  const I bits = _mm512_castps_si512(v);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                               _mm512_set1_epi32(0x7fc0));
}
inline void f_store_bf16(uint16_t* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(i_bf16(v)));
}
inline F f_load_u8(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
inline F f_load_i8(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
// E4M3 shifted into an f16 is 2^-8 of its value, subnormals included; 0x7f is NaN.
inline F f_load_f8(const void* p) {
  const __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)),
                                       _mm256_set1_epi16(0x7e00));
  const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), nan);
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

// Two vectors of E4M3, each 2^-8 of its value.
inline void f_load_f8_parts(const void* p, F& a, F& b) {
  const __m256i codes = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  const __m256i magnitude = _mm256_set1_epi8(0x7f);
  const __mmask32 nan = _mm256_cmpeq_epi8_mask(_mm256_and_si256(codes, magnitude), magnitude);
  // The sign fills the upper byte: shifted by seven it stands in bits 15 and 14.
  const I half = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7),
                                  _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
  const I marked = _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7e00));
  a = _mm512_cvtph_ps(_mm512_castsi512_si256(marked));
  b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(marked, 1));
}

// ---- pairs of int16: what belongs to the first and to the last 16 of 32 columns ----

inline I i_load_u8_pairs(const void* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline I i_load_i8_pairs(const void* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
// first and last / 2^kLastShift, both of int16 range.
template <int kLastShift>
inline I i_join_pairs(I first, I last) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(last, 16 - kLastShift));
}
inline I i_low_nibbles(I bytes_in_pairs) {
  return _mm512_and_si512(bytes_in_pairs, _mm512_set1_epi16(15));
}
inline I i_high_nibbles(I bytes_in_pairs) {
  return _mm512_srli_epi16(bytes_in_pairs, 4);
}
inline I i_first_of_pairs(I v) {
  return _mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16);
}
inline I i_last_of_pairs(I v) {
  return _mm512_srai_epi32(v, 16);
}
inline I i_sub_pairs(I a, I b) {
  return _mm512_sub_epi16(a, b);
}
template <int kBits>
inline I i_shift_left_pairs(I v) {
  return _mm512_slli_epi16(v, kBits);
}
// a[first] b[first] + a[last] b[last]
inline I i_dot_pairs(I a, I b) {
  return _mm512_madd_epi16(a, b);
}

// ---- bytes ----

inline B b_load(const void* p) {
  return _mm512_loadu_si512(p);
}
inline B b_zero() {
  return _mm512_setzero_si512();
}
inline void b_store(void* p, B v) {
  _mm512_storeu_si512(p, v);
}
// Each byte shifted right by kShift, left where it is below 0; its neighbours' bits come in.
template <int kShift>
inline B b_shift(B v) {
  if constexpr (kShift > 0) return _mm512_srli_epi16(v, kShift);
  if constexpr (kShift < 0) return _mm512_slli_epi16(v, -kShift);
  return v;
}
// The bits of kMask of each byte so shifted; kMask must not ask for a neighbour's.
template <int kShift, int kMask>
inline B b_bits(B v) {
  return _mm512_and_si512(b_shift<kShift>(v), _mm512_set1_epi8(kMask));
}
// codes | b_bits(v)
template <int kShift, int kMask>
inline B b_or_bits(B codes, B v) {
  return _mm512_ternarylogic_epi32(codes, b_shift<kShift>(v), _mm512_set1_epi8(kMask), 0xf8);
}
struct QuadBytes {
  int8_t bytes[4];
};

// Byte kByte of each lane's four, an E4M3 code, as 2^-120 of its value; NaN becomes a number.
template <int kByte>
inline F f_f8_plane(B codes) {
  const I high = kByte == 3 ? codes : _mm512_slli_epi32(codes, 24 - 8 * kByte);
  return _mm512_castsi512_ps(_mm512_and_si512(
      _mm512_srai_epi32(high, 4), _mm512_set1_epi32(static_cast<int32_t>(0x87f00000u))));
}
// The larger of `largest` and 2 v, as unsigned bytes.
inline B b_max_twice(B largest, B v) {
  return _mm512_max_epu8(largest, _mm512_add_epi8(v, v));
}
inline bool b_any_equal(B v, uint8_t value) {
  return _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(static_cast<int8_t>(value))) != 0;
}
// 64 consecutive floats to the first of each four, the second, and so on.
inline void f_split_quads(F (&v)[4]) {
  const F low01 = _mm512_shuffle_f32x4(v[0], v[1], 0x88),
          low23 = _mm512_shuffle_f32x4(v[2], v[3], 0x88);
  const F high01 = _mm512_shuffle_f32x4(v[0], v[1], 0xdd),
          high23 = _mm512_shuffle_f32x4(v[2], v[3], 0xdd);
  // Quads l, l + 4, l + 8, l + 12 in a vector, then 4 by 4 transposed in each quarter.
  const F q0 = _mm512_shuffle_f32x4(low01, low23, 0x88),
          q2 = _mm512_shuffle_f32x4(low01, low23, 0xdd);
  const F q1 = _mm512_shuffle_f32x4(high01, high23, 0x88),
          q3 = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  const F a = _mm512_unpacklo_ps(q0, q1), b = _mm512_unpackhi_ps(q0, q1);
  const F c = _mm512_unpacklo_ps(q2, q3), d = _mm512_unpackhi_ps(q2, q3);
  v[0] = _mm512_shuffle_ps(a, c, 0x44);
  v[1] = _mm512_shuffle_ps(a, c, 0xee);
  v[2] = _mm512_shuffle_ps(b, d, 0x44);
  v[3] = _mm512_shuffle_ps(b, d, 0xee);
}

// dpbusd wants the weights unsigned: w + 128, which the bias takes back.
inline B b_signed(B v) {
  return _mm512_xor_si512(v, _mm512_set1_epi8(-128));
}
// kIQ4Values of the codes, as b_signed() has them.
inline B b_iq4_values(B codes) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIQ4Values));
  return _mm512_shuffle_epi8(b_signed(_mm512_broadcast_i32x4(values)), codes);
}
// Byte kByte of each lane's four; of codes from b_signed() with their sign.
template <int kByte>
inline I i_byte(B v) {
  return _mm512_and_si512(_mm512_srli_epi32(v, 8 * kByte), _mm512_set1_epi32(255));
}
template <int kByte>
inline I i_signed_byte(B v) {
  return _mm512_sub_epi32(i_byte<kByte>(v), _mm512_set1_epi32(128));
}
inline I i_set(int32_t v) {
  return _mm512_set1_epi32(v);
}

// sum + w . x, four bytes of each lane of w times the four at x.  Written out because compilers
// load the broadcast apart, which costs an instruction and a register for each product.
inline I i_dot_quad(I sum, B w, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(w), "m"(*reinterpret_cast<const QuadBytes*>(x)));
  return sum;
}

// sum of w[q] . x over eight quads, codes from b_signed().  Two chains hide the latency of eight
// steps; for four, one is faster.
inline I i_dot_signed(const B* w, const XBlock& x) {
  I even = _mm512_set1_epi32(x.bias), odd = _mm512_setzero_si512();
  for (int q = 0; q < 8; q += 2) {
    even = i_dot_quad(even, w[q], x.q + 4 * q);
    odd = i_dot_quad(odd, w[q + 1], x.q + 4 * q + 4);
  }
  return i_add(even, odd);
}
// start + the same for codes 0 .. kMaxCode.
template <int kMaxCode, int kQuads>
inline I i_dot_unsigned(const B* w, const int8_t* x, I start) {
  constexpr int kChains = kQuads == 8 ? 2 : 1;
  I odd = _mm512_setzero_si512();
  for (int q = 0; q < kQuads; q += kChains) {
    start = i_dot_quad(start, w[q], x + 4 * q);
    if constexpr (kChains == 2) odd = i_dot_quad(odd, w[q + 1], x + 4 * q + 4);
  }
  return kChains == 2 ? i_add(start, odd) : start;
}

// Sixteen rows of sixteen, transposed.
inline void transpose_tile(const float* rows, int64_t stride, float* out, int64_t out_stride) {
  F a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = f_load(rows + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[4 j + c]: columns c, c + 4, c + 8, c + 12 of rows 4 j ..
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const F low02 = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88);  // columns c, c + 8; rows 0-7
    const F low13 = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);  // columns c + 4, c + 12
    const F high02 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
    const F high13 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
    f_store(out + c * out_stride, _mm512_shuffle_f32x4(low02, high02, 0x88));
    f_store(out + (c + 4) * out_stride, _mm512_shuffle_f32x4(low13, high13, 0x88));
    f_store(out + (c + 8) * out_stride, _mm512_shuffle_f32x4(low02, high02, 0xdd));
    f_store(out + (c + 12) * out_stride, _mm512_shuffle_f32x4(low13, high13, 0xdd));
  }
}

}  // namespace
}  // namespace fathom::cpu
