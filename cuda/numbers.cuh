// Number formats on the device.  Bit-exact to the conversions of fathom/tensor.hpp.
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
  // The exponent is moved up by 112 through a product, which is exact for subnormals too.
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
  const float value = rest >= 0x7c00 ? float_of_bits(0x7f800000u | (rest & 0x3ff) << 13)
                                     : float_of_bits(rest << 13) * 5.192296858534828e33f;  // 2^112
  return float_of_bits(bits_of_float(value) | sign);
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
}
__device__ inline uint16_t bf16_bits(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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

__device__ inline uint32_t bf16_pair(float low, float high) {
  return bf16_bits(low) | uint32_t(bf16_bits(high)) << 16;
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
