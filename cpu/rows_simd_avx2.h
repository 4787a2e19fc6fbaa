// What rows_body.h needs of AVX2 beyond simd_avx2.h.
#pragma once

#include "cpu/matmul_kernels.h"
#include "cpu/rows_kernels.h"

#include "cpu/simd_avx2.h"  // after the structs that it mentions

namespace fathom::cpu {
namespace {

constexpr int kBlockRows = 6;  // 6 x 2 sums, 2 weights, 1 broadcast: 15 of 16 registers
constexpr int kBlockVectors = 2;

// value where !(x < bound), else 0.
inline F f_zero_below(F x, F bound, F value) {
  return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_NLT_UQ), value);
}
// 0 where a == b, else a.
inline F f_zero_where_equal(F a, F b) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ), a);
}
// v where index < limits[lane], else other.
inline F f_keep_below(F v, int index, const int32_t* limits, F other) {
  const I bound = _mm256_loadu_si256(reinterpret_cast<const I*>(limits));
  const I keep = _mm256_cmpgt_epi32(bound, _mm256_set1_epi32(index));
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(keep));
}
// Pairs of x rotated by pairs (cosine, sine).
inline F f_rotate(F x, F cos_sin) {
  const F swapped = _mm256_permute_ps(x, 0xb1);
  return _mm256_fmaddsub_ps(x, _mm256_moveldup_ps(cos_sin),
                            _mm256_mul_ps(swapped, _mm256_movehdup_ps(cos_sin)));
}
inline float f16_value(uint16_t bits) {
  return _cvtsh_ss(bits);
}
inline void f16_store(uint16_t* out, F v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace fathom::cpu
