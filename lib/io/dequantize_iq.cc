// Decoders of the IQ blocks: values looked up in a table of grid points (dequantize_tables.h) or,
// for the IQ4 types, in one table of sixteen numbers.
#include "dequantize.h"
#include "dequantize_tables.h"

namespace fathom::io {
namespace {

uint32_t load32(const uint8_t* bytes) noexcept {
  uint32_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

int nibble(const uint8_t* bytes, int i) noexcept {
  return bytes[i / 2] >> (i % 2 * 4) & 15;
}

// Eight signs from seven bits: the number of minus signs is even.
uint8_t even_signs(uint32_t seven_bits) noexcept {
  const uint32_t bits = seven_bits & 127;
  return static_cast<uint8_t>(bits | (std::popcount(bits) & 1) << 7);
}

// `value` times -1 if bit `i` of `signs` is set.
float with_sign(float value, uint8_t signs, int i) noexcept {
  const uint32_t sign = static_cast<uint32_t>(signs >> i & 1) << 31;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) ^ sign);
}

// Eight values of an IQ2 grid point: two-bit indices, value 0 lowest.
void iq2_group(float scale, uint16_t point, uint8_t signs, float* out) noexcept {
  constexpr float kMagnitude[4] = {8, 25, 43, 0};  // a point never holds index 3
  for (int i = 0; i < 8; ++i) {
    out[i] = with_sign(scale * kMagnitude[point >> (2 * i) & 3], signs, i);
  }
}

void iq2_xxs(const BlockIQ2_XXS& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int j = 0; j < 8; ++j) {
    const uint8_t* points = b.qs + 8 * j;
    const uint32_t word = load32(points + 4);
    const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.25f;
    for (int k = 0; k < 4; ++k) {
      iq2_group(scale, kIQ2XXSGrid[points[k]], even_signs(word >> (7 * k)), out + 32 * j + 8 * k);
    }
  }
}

void iq2_xs(const BlockIQ2_XS& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int g = 0; g < 32; ++g) {
    const float scale = d * (0.5f + static_cast<float>(nibble(b.scales, g / 2))) * 0.25f;
    iq2_group(scale, kIQ2XSGrid[b.qs[g] & 511], even_signs(b.qs[g] >> 9), out + 8 * g);
  }
}

void iq2_s(const BlockIQ2_S& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int g = 0; g < 32; ++g) {
    const float scale = d * (0.5f + static_cast<float>(nibble(b.scales, g / 2))) * 0.25f;
    const int point = b.qs[g] | (b.qh[g / 4] >> (g % 4 * 2) & 3) << 8;
    iq2_group(scale, kIQ2SGrid[point], b.signs[g], out + 8 * g);
  }
}

// Eight values from two IQ3 grid points; a point is four nibbles, value 0 lowest.
void iq3_group(float scale, const float* magnitudes, uint16_t point_a, uint16_t point_b,
               uint8_t signs, float* out) noexcept {
  for (int i = 0; i < 4; ++i) {
    out[i] = with_sign(scale * magnitudes[point_a >> (4 * i) & 7], signs, i);
    out[4 + i] = with_sign(scale * magnitudes[point_b >> (4 * i) & 7], signs, 4 + i);
  }
}

void iq3_xxs(const BlockIQ3_XXS& b, float* out) noexcept {
  constexpr float kMagnitude[8] = {4, 12, 20, 28, 36, 44, 52, 62};
  const float d = f16_value(b.d);
  for (int g = 0; g < 32; ++g) {
    const uint32_t word = load32(b.words + g / 4 * 4);
    const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
    iq3_group(scale, kMagnitude, kIQ3XXSGrid[b.qs[2 * g]], kIQ3XXSGrid[b.qs[2 * g + 1]],
              even_signs(word >> (g % 4 * 7)), out + 8 * g);
  }
}

void iq3_s(const BlockIQ3_S& b, float* out) noexcept {
  constexpr float kMagnitude[8] = {1, 3, 5, 7, 9, 11, 13, 15};
  const float d = f16_value(b.d);
  const auto point = [&b](int c) { return kIQ3SGrid[b.qs[c] | (b.qh[c / 8] >> (c % 8) & 1) << 8]; };
  for (int g = 0; g < 32; ++g) {
    const float scale = d * static_cast<float>(1 + 2 * nibble(b.scales, g / 4));
    iq3_group(scale, kMagnitude, point(2 * g), point(2 * g + 1), b.signs[g], out + 8 * g);
  }
}

// Eight values of an IQ1 grid point: two-bit codes for -1, 0, 1.
void iq1_group(float scale, float delta, uint16_t point, float* out) noexcept {
  for (int i = 0; i < 8; ++i) {
    out[i] = scale * (static_cast<float>((point >> (2 * i) & 3) - 1) + delta);
  }
}

void iq1_s(const BlockIQ1_S& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int g = 0; g < 32; ++g) {
    const int qh = b.qh[g / 4];
    const float scale = d * static_cast<float>(2 * (qh >> 12 & 7) + 1);
    const int point = b.qs[g] | (qh >> (g % 4 * 3) & 7) << 8;
    iq1_group(scale, (qh & 0x8000) != 0 ? -0.125f : 0.125f, kIQ1SGrid[point], out + 8 * g);
  }
}

void iq1_m(const BlockIQ1_M& b, float* out) noexcept {
  uint16_t scales[4];
  std::memcpy(scales, b.scales, sizeof scales);
  const float d = f16_value(static_cast<uint16_t>(scales[0] >> 12 | scales[1] >> 12 << 4 |
                                                  scales[2] >> 12 << 8 | scales[3] >> 12 << 12));
  for (int g = 0; g < 32; ++g) {
    const float scale = d * static_cast<float>(2 * (scales[g / 8] >> (g / 2 % 4 * 3) & 7) + 1);
    const int high = nibble(b.qh, g);
    const int point = b.qs[g] | (high & 7) << 8;
    iq1_group(scale, (high & 8) != 0 ? -0.125f : 0.125f, kIQ1SGrid[point], out + 8 * g);
  }
}

// 32 values from 16 bytes, low nibbles first.
void iq4_group(float scale, const uint8_t* qs, float* out) noexcept {
  for (int j = 0; j < 16; ++j) {
    out[j] = scale * static_cast<float>(kIQ4Values[qs[j] & 15]);
    out[j + 16] = scale * static_cast<float>(kIQ4Values[qs[j] >> 4]);
  }
}

void iq4_nl(const BlockIQ4_NL& b, float* out) noexcept {
  iq4_group(f16_value(b.d), b.qs, out);
}

void iq4_xs(const BlockIQ4_XS& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int j = 0; j < 8; ++j) {
    const int s = nibble(b.scales_l, j) | (b.scales_h >> (2 * j) & 3) << 4;
    iq4_group(d * static_cast<float>(s - 32), b.qs + 16 * j, out + 32 * j);
  }
}

}  // namespace

void decode_iq1_s(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ1_S, iq1_s>(src, n_blocks, out);
}
void decode_iq1_m(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ1_M, iq1_m>(src, n_blocks, out);
}
void decode_iq2_xxs(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ2_XXS, iq2_xxs>(src, n_blocks, out);
}
void decode_iq2_xs(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ2_XS, iq2_xs>(src, n_blocks, out);
}
void decode_iq2_s(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ2_S, iq2_s>(src, n_blocks, out);
}
void decode_iq3_xxs(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ3_XXS, iq3_xxs>(src, n_blocks, out);
}
void decode_iq3_s(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ3_S, iq3_s>(src, n_blocks, out);
}
void decode_iq4_nl(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ4_NL, iq4_nl>(src, n_blocks, out);
}
void decode_iq4_xs(const void* src, int64_t n_blocks, float* out) noexcept {
  decode_blocks<BlockIQ4_XS, iq4_xs>(src, n_blocks, out);
}

}  // namespace fathom::io
