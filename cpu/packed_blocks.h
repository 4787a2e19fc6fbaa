// Byte layouts of packed weights ("R16"): 16 output rows interleaved by 4 columns, so that one
// 64-byte vector holds 4 consecutive columns of 16 rows.  A lane is a row: the activation quad is
// broadcast, no horizontal sums are needed, AVX2 takes the two halves, and a run of 16 such vectors
// is an AMX int8 tile as it lies.
//
//   vector of 64 bytes:  row 0: k k+1 k+2 k+3 | row 1: k .. k+3 | ... | row 15
//
// Plain constants only: files compiled for one instruction set include this.
#pragma once

#include <stdint.h>

namespace fathom::cpu {

// A matrix is a sequence of row groups, a row group of blocks, each of 16 rows and `cols` columns.
inline constexpr int kGroupRows = 16;

enum PackedType {
  kPackedQ8_0,
  kPackedQ4_0,
  kPackedQ4_1,
  kPackedQ5_0,
  kPackedQ5_1,
  kPackedIQ4_NL,
  kPackedQ2_K,
  kPackedQ3_K,
  kPackedQ4_K,
  kPackedQ5_K,
  kPackedQ6_K,
  kPackedIQ4_XS,
  kPackedTypes
};

struct PackedBlock {
  int cols, bytes;
};

// "Quad q" is columns 4 q .. 4 q + 3.  Nibbles of 32 columns lie in four vectors: the low half of
// vector j is quad j, the high half quad j + 4.  Single bits of 32 columns lie in one vector: bit j
// belongs to quad j.  Pairs of bits lie in two: bits 2 p, 2 p + 1 of vector v belong to quad 4 v +
// p.
//
// Codes of two and three bits of 32 columns lie so that the last 16 columns need fewer shifts:
// their dot product is taken of codes where they lie, 4 or 8 times too large, and shifted as a
// whole.
//
// Scales of six bits, n to each row, are taken apart for a whole block, 32 bytes at a time: with
// the scales of all rows in the order of their use, 16 n of them, u8 low[8 n] has the low four bits
// of scale i in the low half of byte i, of scale i + 8 n in the high half; u8 high[4 n] has two
// bits each of scales i, i + 4 n, i + 8 n, i + 12 n.

// f16 d[16]; int8 codes: vector q is quad q.
struct PackedQ8_0 {
  static constexpr PackedBlock kBlock{32, 544};
  static constexpr int kCodes = 32;
};
// f16 d[16]; nibbles of 32 columns.
struct PackedQ4_0 {
  static constexpr PackedBlock kBlock{32, 288};
  static constexpr int kCodes = 32;
};
// f16 d[16], m[16]; nibbles of 32 columns.
struct PackedQ4_1 {
  static constexpr PackedBlock kBlock{32, 320};
  static constexpr int kMinFactors = 32, kCodes = 64;
};
// f16 d[16]; nibbles of 32 columns, their fifth bits.
struct PackedQ5_0 {
  static constexpr PackedBlock kBlock{32, 352};
  static constexpr int kCodes = 32, kHigh = 256;
};
// f16 d[16], m[16]; nibbles of 32 columns, their fifth bits.
struct PackedQ5_1 {
  static constexpr PackedBlock kBlock{32, 384};
  static constexpr int kMinFactors = 32, kCodes = 64, kHigh = 256;
};
// f16 d[16]; nibbles of 32 columns: numbers into kIQ4Values.
struct PackedIQ4_NL {
  static constexpr PackedBlock kBlock{32, 288};
  static constexpr int kCodes = 32;
};

// The super-blocks: factors, then scales, then all bits of each 32 columns together.  A second
// stream inside a block, 2 KB away, cut the rate of reading from memory to a third.

// f16 d[16], dmin[16]; u8 scales[8][16][2], two per 32 columns of a row, side by side: scale in the
// low half, min in the high one; codes of 8 times 32 columns in two vectors each: bits 0 and 1 of
// vector v are quad 2 v, bits 2 and 3 quad 2 v + 4, bits 4 and 5 quad 2 v + 1, bits 6 and 7 quad 2
// v + 5.
struct PackedQ2_K {
  static constexpr PackedBlock kBlock{256, 1344};
  static constexpr int kMinFactors = 32, kScales = 64, kCodes = 320;
  static constexpr int kSubBytes = 128;
};
// f16 d[16], 32 bytes of padding, so that codes begin on cache lines; scales of 6 bits, one per 16
// columns, in the order [8][16 rows][2]; codes of 8 times 32 columns in three vectors each: bits 0
// to 2 of vector v are quad v, bits 3 to 5 quad v + 4.  Quad 3 has its low bits in bits 6 and 7 of
// vector 0 and its high one in bit 6 of vector 2, quad 7 in bits 6 and 7 of vector 1 and bit 7 of
// vector 2.
struct PackedQ3_K {
  static constexpr PackedBlock kBlock{256, 1792};
  static constexpr int kScales = 64, kHighScales = 192, kCodes = 256;
  static constexpr int kSubBytes = 192;
};
// f16 d[16], dmin[16]; u8 scales[8][16], mins[8][16]; nibbles of 8 times 32 columns.
struct PackedQ4_K {
  static constexpr PackedBlock kBlock{256, 2368};
  static constexpr int kMinFactors = 32, kScales = 64, kMins = 192, kCodes = 320;
  static constexpr int kSubBytes = 256;
};
// As Q4_K, and after the nibbles of each 32 columns their fifth bits.
struct PackedQ5_K {
  static constexpr PackedBlock kBlock{256, 2880};
  static constexpr int kMinFactors = 32, kScales = 64, kMins = 192, kCodes = 320;
  static constexpr int kSubBytes = 320, kHigh = 256;
};
// f16 d[16], 32 bytes of padding, so that codes begin on cache lines; i8 scales[16][16], one per 16
// columns; nibbles of 8 times 32 columns, each followed by their two high bits.
struct PackedQ6_K {
  static constexpr PackedBlock kBlock{256, 3392};
  static constexpr int kScales = 64, kCodes = 320;
  static constexpr int kSubBytes = 384, kHigh = 256;
};
// f16 d[16]; scales of 6 bits, one per 32 columns, in the order [8][16 rows]; nibbles of 8 times 32
// columns: numbers into kIQ4Values.
struct PackedIQ4_XS {
  static constexpr PackedBlock kBlock{256, 2176};
  static constexpr int kScales = 32, kHighScales = 96, kCodes = 128;
  static constexpr int kSubBytes = 256;
};

inline constexpr PackedBlock kPackedBlocks[kPackedTypes] = {
    PackedQ8_0::kBlock, PackedQ4_0::kBlock,   PackedQ4_1::kBlock, PackedQ5_0::kBlock,
    PackedQ5_1::kBlock, PackedIQ4_NL::kBlock, PackedQ2_K::kBlock, PackedQ3_K::kBlock,
    PackedQ4_K::kBlock, PackedQ5_K::kBlock,   PackedQ6_K::kBlock, PackedIQ4_XS::kBlock};

}  // namespace fathom::cpu
