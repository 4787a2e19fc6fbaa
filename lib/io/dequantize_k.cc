// Decoders of the K super-blocks: 256 values with scales of their own per 16 or 32.
#include "dequantize.h"

namespace fathom::io {
namespace {

// Where the two-bit codes of a sub-block of 16 values stand in Q2_K and Q3_K.
struct TwoBits {
  const uint8_t* bytes;  // [16]
  int shift;
};

TwoBits two_bits(const uint8_t* qs, int sub_block) noexcept {
  return {qs + sub_block / 8 * 32 + sub_block % 2 * 16, sub_block % 8 / 2 * 2};
}

void q2_k(const BlockQ2_K& b, float* out) noexcept {
  const float d = f16_value(b.d), dmin = f16_value(b.dmin);
  for (int j = 0; j < 16; ++j) {
    const float dl = d * static_cast<float>(b.scales[j] & 15);
    const float ml = dmin * static_cast<float>(b.scales[j] >> 4);
    const TwoBits codes = two_bits(b.qs, j);
    for (int k = 0; k < 16; ++k) {
      out[16 * j + k] = dl * static_cast<float>(codes.bytes[k] >> codes.shift & 3) - ml;
    }
  }
}

void q3_k(const BlockQ3_K& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int j = 0; j < 16; ++j) {
    const int low = b.scales[j % 8] >> (j / 8 * 4) & 15;
    const int high = b.scales[8 + j % 4] >> (j / 4 * 2) & 3;
    const float dl = d * static_cast<float>((low | high << 4) - 32);
    const TwoBits codes = two_bits(b.qs, j);
    const uint8_t* hmask = b.hmask + j % 2 * 16;
    for (int k = 0; k < 16; ++k) {
      // The third bit stands for 4, less the offset of 4.
      const int code = (codes.bytes[k] >> codes.shift & 3) + (hmask[k] >> (j / 2) & 1) * 4 - 4;
      out[16 * j + k] = dl * static_cast<float>(code);
    }
  }
}

struct ScaleMin {
  uint8_t scale, min;
};

// Pair j of the eight packed 6-bit pairs of Q4_K and Q5_K.
ScaleMin scale_min(const uint8_t* packed, int j) noexcept {
  if (j < 4) {
    return {static_cast<uint8_t>(packed[j] & 63), static_cast<uint8_t>(packed[4 + j] & 63)};
  }
  const int k = j - 4;
  return {static_cast<uint8_t>((packed[8 + k] & 15) | (packed[k] >> 6 << 4)),
          static_cast<uint8_t>((packed[8 + k] >> 4) | (packed[4 + k] >> 6 << 4))};
}

void q4_k(const BlockQ4_K& b, float* out) noexcept {
  const float d = f16_value(b.d), dmin = f16_value(b.dmin);
  for (int j = 0; j < 8; ++j) {
    const ScaleMin sm = scale_min(b.scales, j);
    const float dl = d * static_cast<float>(sm.scale), ml = dmin * static_cast<float>(sm.min);
    const uint8_t* qs = b.qs + j / 2 * 32;
    const int shift = j % 2 * 4;
    for (int k = 0; k < 32; ++k) {
      out[32 * j + k] = dl * static_cast<float>(qs[k] >> shift & 15) - ml;
    }
  }
}

void q5_k(const BlockQ5_K& b, float* out) noexcept {
  const float d = f16_value(b.d), dmin = f16_value(b.dmin);
  for (int j = 0; j < 8; ++j) {
    const ScaleMin sm = scale_min(b.scales, j);
    const float dl = d * static_cast<float>(sm.scale), ml = dmin * static_cast<float>(sm.min);
    const uint8_t* qs = b.qs + j / 2 * 32;
    const int shift = j % 2 * 4;
    for (int k = 0; k < 32; ++k) {
      const int code = (qs[k] >> shift & 15) | (b.qh[k] >> j & 1) << 4;
      out[32 * j + k] = dl * static_cast<float>(code) - ml;
    }
  }
}

void q6_k(const BlockQ6_K& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int j = 0; j < 16; ++j) {
    const float dl = d * static_cast<float>(b.scales[j]);
    const int half = j / 8, quarter = j % 8 / 2;  // quarter: which 32 values of the half
    const uint8_t* ql = b.ql + 64 * half + quarter % 2 * 32 + j % 2 * 16;
    const uint8_t* qh = b.qh + 32 * half + j % 2 * 16;
    for (int k = 0; k < 16; ++k) {
      const int code = (ql[k] >> (quarter / 2 * 4) & 15) | (qh[k] >> (quarter * 2) & 3) << 4;
      out[16 * j + k] = dl * static_cast<float>(code - 32);
    }
  }
}

}  // namespace

void decode_q2_k(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockQ2_K, q2_k>(src, n_blocks, out);
}
void decode_q3_k(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockQ3_K, q3_k>(src, n_blocks, out);
}
void decode_q4_k(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockQ4_K, q4_k>(src, n_blocks, out);
}
void decode_q5_k(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockQ5_K, q5_k>(src, n_blocks, out);
}
void decode_q6_k(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockQ6_K, q6_k>(src, n_blocks, out);
}

}  // namespace fathom::io
