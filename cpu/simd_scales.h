// Vectors of 32 bytes in which packed scales are taken apart before they are widened: a quarter of
// the work of doing it in int32.  AVX2, which every set of vectors has.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fathom::cpu {
namespace {

using S = __m256i;

inline S s_load(const void* p) {
  return _mm256_loadu_si256(static_cast<const S*>(p));
}
inline void s_store(void* p, S v) {
  _mm256_storeu_si256(static_cast<S*>(p), v);
}
inline S s_sub(S a, int8_t b) {
  return _mm256_sub_epi8(a, _mm256_set1_epi8(b));
}
// (v >> kShift) & kMask in each byte, v << -kShift where that is below 0; kMask must not ask for a
// neighbour's bits.
template <int kShift, int kMask>
inline S s_bits(S v) {
  if constexpr (kShift > 0) v = _mm256_srli_epi16(v, kShift);
  if constexpr (kShift < 0) v = _mm256_slli_epi16(v, -kShift);
  return _mm256_and_si256(v, _mm256_set1_epi8(kMask));
}
// a | s_bits(v)
template <int kShift, int kMask>
inline S s_or_bits(S a, S v) {
  return _mm256_or_si256(a, s_bits<kShift, kMask>(v));
}

}  // namespace
}  // namespace fathom::cpu
