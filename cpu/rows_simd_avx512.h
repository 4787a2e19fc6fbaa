// What rows_body.h needs of AVX-512 beyond simd_avx512.h.
#pragma once

#include "cpu/matmul_kernels.h"
#include "cpu/rows_kernels.h"

#include "cpu/simd_avx512.h"  // after the structs that it mentions

namespace fathom::cpu {
namespace {

constexpr int kBlockRows = 8;  // 8 x 2 sums, 2 weights, 1 broadcast
constexpr int kBlockVectors = 2;

// value where !(x < bound), else 0.
inline F f_zero_below(F x, F bound, F value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), value);
}
// 0 where a == b, else a.
inline F f_zero_where_equal(F a, F b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ), a);
}
// v where index < limits[lane], else other.
inline F f_keep_below(F v, int index, const int32_t* limits, F other) {
  const __mmask16 keep =
      _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(limits), _mm512_set1_epi32(index));
  return _mm512_mask_mov_ps(other, keep, v);
}
// Pairs of x rotated by pairs (cosine, sine).
inline F f_rotate(F x, F cos_sin) {
  const F swapped = _mm512_permute_ps(x, 0xb1);
  return _mm512_fmaddsub_ps(x, _mm512_moveldup_ps(cos_sin),
                            _mm512_mul_ps(swapped, _mm512_movehdup_ps(cos_sin)));
}
inline float f16_value(uint16_t bits) {
  return _cvtsh_ss(bits);
}
inline void f16_store(uint16_t* out, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace fathom::cpu
