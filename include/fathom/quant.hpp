// Byte layouts of quantised blocks: facts that every backend shares.  A row of a tensor is a
// sequence of these blocks; all fields are little-endian and no struct has padding.  What the
// fields mean is told by the formula of each block; the code of record is dequantize().
// Source: ggml's block structures and gguf-py's quants.py; FP8: the DeepSeek-V3 checkpoints.
//
// Only plain structs, constants and declarations live here, so that files compiled for one
// instruction set can include it.  Blocks have the alignment of their widest field (1, 2 or 4);
// bytes straight from a file may have less and must be copied.
//
// Notation: x[i] is value i of the block, d and m are f16 fields read as f32, lo(b) = b & 15,
// hi(b) = b >> 4, bits(v, at, n) = (v >> at) & (2^n - 1).
#pragma once

#include <cstdint>

namespace fathom {

inline constexpr int kSuperBlock = 256;    // values of a "K", "IQ" or "TQ" super-block
inline constexpr int kF8ScaleBlock = 128;  // F8_E4M3: one f32 scale per 128 x 128 weights

// ---- blocks of 32 values ----------------------------------------------------------------------
//
// 4-bit codes come in one order everywhere in this group: byte j holds values j and j + 16.
//
//   byte    0     1        15
//   low   x[0]  x[1] .. x[15]
//   high  x[16] x[17] .. x[31]

// x[i] = d * (q[i] - 8)
struct BlockQ4_0 {
  static constexpr int kElements = 32;
  uint16_t d;  // f16
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

// x[i] = d * q[i] + m
struct BlockQ4_1 {
  static constexpr int kElements = 32;
  uint16_t d, m;  // f16
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

// x[i] = d * ((q[i] | bit i of qh << 4) - 16);  qh is one 32-bit number in four bytes
struct BlockQ5_0 {
  static constexpr int kElements = 32;
  uint16_t d;  // f16
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_0) == 22);

// x[i] = d * (q[i] | bit i of qh << 4) + m
struct BlockQ5_1 {
  static constexpr int kElements = 32;
  uint16_t d, m;  // f16
  uint8_t qh[4];
  uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_1) == 24);

// x[i] = d * qs[i]
struct BlockQ8_0 {
  static constexpr int kElements = 32;
  uint16_t d;  // f16
  int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

// Activations of a dot product with Q4_1 or Q5_1: x[i] = d * qs[i], s = d * sum of qs.
struct BlockQ8_1 {
  static constexpr int kElements = 32;
  uint16_t d, s;  // f16
  int8_t qs[32];
};
static_assert(sizeof(BlockQ8_1) == 36);

// x[i] = d * kIQ4Values[q[i]]
struct BlockIQ4_NL {
  static constexpr int kElements = 32;
  uint16_t d;  // f16
  uint8_t qs[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18);

// x[i] = 2^(e - 128) * kMXFP4Values[q[i]]   (the values are those of E2M1, doubled)
struct BlockMXFP4 {
  static constexpr int kElements = 32;
  uint8_t e;  // E8M0 exponent
  uint8_t qs[16];
};
static_assert(sizeof(BlockMXFP4) == 17);

inline constexpr int8_t kIQ4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};
inline constexpr int8_t kMXFP4Values[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                            0, -1, -2, -3, -4, -6, -8, -12};

// ---- K super-blocks of 256 values -------------------------------------------------------------

// Sub-blocks of 16 values, j = i / 16:  x[i] = d * lo(scales[j]) * q[i] - dmin * hi(scales[j])
//
//   qs: two halves of 32 bytes; half h holds values 128 h .. 128 h + 127, byte k of it
//     bits 0-1  x[128 h + k]          bits 4-5  x[128 h + 64 + k]
//     bits 2-3  x[128 h + 32 + k]     bits 6-7  x[128 h + 96 + k]
struct BlockQ2_K {
  static constexpr int kElements = kSuperBlock;
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d, dmin;  // f16
};
static_assert(sizeof(BlockQ2_K) == 84);

// Sub-blocks of 16 values:  x[i] = d * (s[i / 16] - 32) * (q[i] - (hbit[i] ? 0 : 4))
// qs as in Q2_K; hbit[i] = bit (i / 32) of hmask[i % 32].
//
//   scales: sixteen 6-bit numbers s[0..15] in twelve bytes
//     byte k = 0..7    low  s[k] bits 0-3               high  s[k + 8] bits 0-3
//     byte 8 + k, k = 0..3, two bits each from low to high: bits 4-5 of
//                      s[k]   s[k + 4]   s[k + 8]   s[k + 12]
struct BlockQ3_K {
  static constexpr int kElements = kSuperBlock;
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;  // f16
};
static_assert(sizeof(BlockQ3_K) == 110);

// Sub-blocks of 32 values, j = i / 32:  x[i] = d * s[j] * q[i] - dmin * m[j]
//
//   qs: four quarters of 32 bytes; quarter h, byte k: low x[64 h + k], high x[64 h + 32 + k]
//
//   scales: eight 6-bit pairs (s, m) in twelve bytes, k = 0..3
//     byte k       bits 0-5  s[k]                     bits 6-7  bits 4-5 of s[k + 4]
//     byte 4 + k   bits 0-5  m[k]                     bits 6-7  bits 4-5 of m[k + 4]
//     byte 8 + k   low       bits 0-3 of s[k + 4]     high      bits 0-3 of m[k + 4]
struct BlockQ4_K {
  static constexpr int kElements = kSuperBlock;
  uint16_t d, dmin;  // f16
  uint8_t scales[12];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

// As Q4_K with a fifth bit:  q[i] = 4 bits of qs | bit (i / 32) of qh[i % 32] << 4
struct BlockQ5_K {
  static constexpr int kElements = kSuperBlock;
  uint16_t d, dmin;  // f16
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

// Sub-blocks of 16 values:  x[i] = d * scales[i / 16] * (q[i] - 32)
//
//   two halves h of 128 values, k = 0..31; low four bits from ql, high two from qh
//     x[128 h + k]        lo(ql[64 h + k])        bits 0-1 of qh[32 h + k]
//     x[128 h + 32 + k]   lo(ql[64 h + 32 + k])   bits 2-3
//     x[128 h + 64 + k]   hi(ql[64 h + k])        bits 4-5
//     x[128 h + 96 + k]   hi(ql[64 h + 32 + k])   bits 6-7
struct BlockQ6_K {
  static constexpr int kElements = kSuperBlock;
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;  // f16
};
static_assert(sizeof(BlockQ6_K) == 210);

// Activations of a dot product with a super-block: x[i] = d * qs[i], bsums[j] = sum of
// qs[16 j .. 16 j + 15].
struct BlockQ8_K {
  static constexpr int kElements = kSuperBlock;
  float d;
  int8_t qs[256];
  int16_t bsums[16];
};
static_assert(sizeof(BlockQ8_K) == 292);

// ---- IQ super-blocks of 256 values ------------------------------------------------------------
//
// Values come in groups of 8 (g = i / 8, 32 groups) or 4 from a table of grid points.  Seven sign
// bits stand for eight: the eighth makes the number of minus signs even.

// Per 32 values two 32-bit words in qs:
//   word 0  four grid numbers (8 bits), one per group
//   word 1  four 7-bit signs from bit 0 up, then a 4-bit scale s in bits 28-31
// x = d * (s + 1/2) / 4 * grid * sign
struct BlockIQ2_XXS {
  static constexpr int kElements = kSuperBlock;
  uint16_t d;  // f16
  uint8_t qs[64];
};
static_assert(sizeof(BlockIQ2_XXS) == 66);

// Group g: grid number bits 0-8 of qs[g], signs bits 9-15; s = nibble g / 2 of scales.
// x = d * (s + 1/2) / 4 * grid * sign
struct BlockIQ2_XS {
  static constexpr int kElements = kSuperBlock;
  uint16_t d;  // f16
  uint16_t qs[32];
  uint8_t scales[8];
};
static_assert(sizeof(BlockIQ2_XS) == 74);

// Group g: grid number qs[g] | bits(qh[g / 4], 2 (g % 4), 2) << 8, eight sign bits signs[g];
// s = nibble g / 2 of scales.   x = d * (s + 1/2) / 4 * grid * sign
struct BlockIQ2_S {
  static constexpr int kElements = kSuperBlock;
  uint16_t d;  // f16
  uint8_t qs[32];
  uint8_t signs[32];
  uint8_t qh[8];
  uint8_t scales[8];
};
static_assert(sizeof(BlockIQ2_S) == 82);

// Quartet i / 4: grid number qs[i / 4].  Per 32 values a 32-bit word in `words`: four 7-bit signs
// from bit 0 up (8 values each), then s in bits 28-31.   x = d * (s + 1/2) / 2 * grid * sign
struct BlockIQ3_XXS {
  static constexpr int kElements = kSuperBlock;
  uint16_t d;  // f16
  uint8_t qs[64];
  uint8_t words[32];
};
static_assert(sizeof(BlockIQ3_XXS) == 98);

// Quartet c = i / 4: grid number qs[c] | bit (c % 8) of qh[c / 8] << 8; sign bit i % 8 of
// signs[i / 8]; s = nibble i / 32 of scales.   x = d * (1 + 2 s) * grid * sign
struct BlockIQ3_S {
  static constexpr int kElements = kSuperBlock;
  uint16_t d;  // f16
  uint8_t qs[64];
  uint8_t qh[8];
  uint8_t signs[32];
  uint8_t scales[4];
};
static_assert(sizeof(BlockIQ3_S) == 110);

// Group g: grid number qs[g] | bits(qh[g / 4], 3 (g % 4), 3) << 8; s = bits(qh[g / 4], 12, 3);
// bit 15 of qh[g / 4] set: delta = -1/8, else 1/8.   x = d * (2 s + 1) * (grid + delta)
struct BlockIQ1_S {
  static constexpr int kElements = kSuperBlock;
  uint16_t d;  // f16
  uint8_t qs[32];
  uint16_t qh[8];
};
static_assert(sizeof(BlockIQ1_S) == 50);

// Group g with h = nibble g of qh: grid number qs[g] | (h & 7) << 8, delta negative if h & 8.
// s = bits(scales[g / 8], 3 (g / 2 % 4), 3); the top four bits of the four scales are d, an f16,
// low nibble first.   x = d * (2 s + 1) * (grid + delta)
struct BlockIQ1_M {
  static constexpr int kElements = kSuperBlock;
  uint8_t qs[32];
  uint8_t qh[16];
  uint8_t scales[8];  // four 16-bit numbers
};
static_assert(sizeof(BlockIQ1_M) == 56);

// Sub-blocks of 32 values, j = i / 32, nibbles ordered as in the blocks of 32:
//   s[j] = nibble j of scales_l | bits(scales_h, 2 j, 2) << 4
//   x[i] = d * (s[j] - 32) * kIQ4Values[q[i]]
struct BlockIQ4_XS {
  static constexpr int kElements = kSuperBlock;
  uint16_t d;  // f16
  uint16_t scales_h;
  uint8_t scales_l[4];
  uint8_t qs[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136);

// ---- ternary super-blocks of 256 values -------------------------------------------------------

// Five (in qh: four) base-3 digits to a byte, as a fraction: digit n of b is (b * 3^n % 256) * 3 /
// 256.
//   x[32 n + k]        digit n of qs[k]        n < 5, k < 32
//   x[160 + 16 n + k]  digit n of qs[32 + k]   n < 5, k < 16
//   x[240 + 4 n + k]   digit n of qh[k]        n < 4, k < 4
// x = d * (digit - 1)
struct BlockTQ1_0 {
  static constexpr int kElements = kSuperBlock;
  uint8_t qs[48];
  uint8_t qh[4];
  uint16_t d;  // f16
};
static_assert(sizeof(BlockTQ1_0) == 54);

// x[i] = d * (q[i] - 1), two-bit codes ordered as in Q2_K.
struct BlockTQ2_0 {
  static constexpr int kElements = kSuperBlock;
  uint8_t qs[64];
  uint16_t d;  // f16
};
static_assert(sizeof(BlockTQ2_0) == 66);

// ---- quantisers -------------------------------------------------------------------------------
//
// The scalar definitions for cache rows; bit-exact to ggml's reference for finite input.
//   x [n] f32, n a multiple of the block size      out row_bytes(dtype, n) bytes, any alignment
// A block that holds an infinity or NaN gets d = NaN and zero codes: damage stays visible.

void quantize_q8_0(const float* x, int64_t n, void* out) noexcept;
void quantize_q4_0(const float* x, int64_t n, void* out) noexcept;
// One f32_to_e4m3() per value; no scale is applied or stored.
void quantize_f8_e4m3(const float* x, int64_t n, void* out) noexcept;

}  // namespace fathom
