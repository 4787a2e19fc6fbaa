// Vectors of one byte per row, in which packed scales are taken apart before they are widened: a
// quarter of the work of doing it in int32.  SSE2 only; the way in and out is in simd_<isa>.h.
#pragma once

#include <emmintrin.h>
#include <stdint.h>

namespace fathom::cpu {
namespace {

using S = __m128i;  // kLanes bytes, the rest of the 16 zero

inline S s_or(S a, S b) {
  return _mm_or_si128(a, b);
}
inline S s_sub(S a, int8_t b) {
  return _mm_sub_epi8(a, _mm_set1_epi8(b));
}
// (v >> shift) & mask in each byte; mask has no bits that a neighbour's could reach.
inline S s_bits(S v, int shift, int8_t mask) {
  return _mm_and_si128(_mm_srl_epi16(v, _mm_cvtsi32_si128(shift)), _mm_set1_epi8(mask));
}
// Bits shift, shift + 1 of each byte, as bits 4 and 5.
inline S s_high2(S v, int shift) {
  return _mm_slli_epi16(s_bits(v, shift, 3), 4);
}

}  // namespace
}  // namespace fathom::cpu
