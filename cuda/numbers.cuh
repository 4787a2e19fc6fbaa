// Number formats on the device.  Bit-exact to the conversions of fathom/tensor.hpp, but for which
// NaN a NaN becomes.  What one instruction does is that instruction under nvcc; the emulation has
// the formulas.
#pragma once

#include "cuda/device_code.h"

namespace fathom::cuda {

__device__ inline float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}
__device__ inline uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
#endif
}

__device__ inline float f16_value(uint16_t bits) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  // The exponent is moved up by 112 through a product, which is exact for subnormals too.
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
  const float value = rest >= 0x7c00 ? float_of_bits(0x7f800000u | (rest & 0x3ff) << 13)
                                     : float_of_bits(rest << 13) * 5.192296858534828e33f;  // 2^112
  return float_of_bits(bits_of_float(value) | sign);
#endif
}
__device__ inline float bf16_value(uint16_t bits) {
  return float_of_bits(uint32_t(bits) << 16);
}
__device__ inline float e4m3_value(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80) << 24, rest = code & 0x7f;
  const float value =
      rest == 0x7f ? float_of_bits(0x7fc00000u) : float_of_bits(rest << 20) * 1.329227995784916e36f;
  return float_of_bits(bits_of_float(value) | sign);  // 2^120
}

__device__ inline uint16_t f16_bits(float value) {
#ifdef __CUDA_ARCH__
  uint32_t pair;  // of one alone is several times slower
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  return uint16_t(pair);
#else
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  else if (magnitude >= 0x477ff000)
    half = 0x7c00;
  else if (magnitude < 0x38800000)  // subnormal: the sum rounds to its unit
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  else
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return uint16_t(sign | half);
#endif
}
__device__ inline uint16_t bf16_bits(float value) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
  return uint16_t(pair);
#else
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
__device__ inline uint8_t e4m3_bits(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  uint32_t code;
  if (magnitude > 0x7f800000)
    code = 0x7f;
  else if (magnitude >= 0x43e00000)
    code = 0x7e;
  else if (magnitude < 0x3c800000)
    code = bits_of_float(float_of_bits(magnitude) + 16384.0f) - bits_of_float(16384.0f);
  else
    code = (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  return uint8_t(sign | code);
}

// ---- two values in one register, the first in the lower half ----

__device__ inline uint32_t bf16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return bf16_bits(low) | uint32_t(bf16_bits(high)) << 16;
#endif
}

// Two f16 times 256.
__device__ inline uint32_t times_256(uint32_t pair) {
#ifdef __CUDA_ARCH__
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(0x5c005c00u));
  return product;
#else
  return f16_bits(f16_value(uint16_t(pair)) * 256) |
         uint32_t(f16_bits(f16_value(uint16_t(pair >> 16)) * 256)) << 16;
#endif
}

// Two e4m3 codes, the first in the lower byte, as f16: all of them are there, exactly.
//
// By bits: a code's fields, put where those of f16 are, mean 1/256 of its value, since the biases
// of the exponents are 7 and 15; so do they for subnormals, but not for NaN.
__device__ inline uint32_t f16_pair_by_bits(uint32_t codes) {
  const uint32_t apart = __byte_perm(codes, 0, 0x1404);  // each in the upper byte of its half
  return times_256((apart & 0x80008000u) | (apart >> 1 & 0x3f803f80u));
}
// Not 0 where one of four codes is NaN.
__device__ inline uint32_t e4m3_nans(uint32_t codes) {
  return ((codes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}
__device__ inline void e4m3_values8_by_bits(const uint32_t (&codes)[2], float (&v)[8]) {
  for (int i = 0; i < 8; i += 2) {
    const uint32_t pair = f16_pair_by_bits(codes[i / 4] >> (8 * (i & 3)));
    v[i] = f16_value(uint16_t(pair));
    v[i + 1] = f16_value(uint16_t(pair >> 16));
  }
  if ((e4m3_nans(codes[0]) | e4m3_nans(codes[1])) == 0) return;
  for (int i = 0; i < 8; ++i)
    if ((codes[i / 4] >> (8 * (i & 3)) & 0x7f) == 0x7f) v[i] = float_of_bits(0x7fc00000u);
}

// v[i] = value of code i of eight: by the instruction of sm_89 and newer, else by bits.
__device__ inline void e4m3_values8(const uint32_t (&codes)[2], float (&v)[8]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  for (int i = 0; i < 8; i += 2) {
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(uint16_t(codes[i / 4] >> (8 * (i & 3)))));
    v[i] = f16_value(uint16_t(pair));
    v[i + 1] = f16_value(uint16_t(pair >> 16));
  }
#else
  e4m3_values8_by_bits(codes, v);
#endif
}

// Loads of fields that are aligned to 2 only.
__device__ inline uint16_t load16(const uint8_t* p) {
  return *reinterpret_cast<const uint16_t*>(p);
}
__device__ inline float load_f16(const uint8_t* p) {
  return f16_value(load16(p));
}

__device__ inline float minus_infinity() {
  return float_of_bits(0xff800000u);
}
__device__ inline bool is_finite(float value) {
  return (bits_of_float(value) & 0x7f800000u) != 0x7f800000u;
}

// ---- sums and maxima over a warp; every lane gets the result, lanes in a fixed tree ----

__device__ inline float warp_sum(float v) {
  for (int bit = 16; bit > 0; bit >>= 1) v += __shfl_xor_sync(0xffffffffu, v, bit);
  return v;
}
__device__ inline double warp_sum(double v) {
  for (int bit = 16; bit > 0; bit >>= 1) v += __shfl_xor_sync(0xffffffffu, v, bit);
  return v;
}
__device__ inline float warp_max(float v) {
  for (int bit = 16; bit > 0; bit >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, bit));
  return v;
}

}  // namespace fathom::cuda
