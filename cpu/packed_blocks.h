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

enum PackedType { kPackedQ8_0, kPackedQ4_0, kPackedQ4_K, kPackedQ5_K, kPackedQ6_K, kPackedTypes };

struct PackedBlock {
  int cols, bytes;
};

// "Quad q" is columns 4 q .. 4 q + 3.  Nibbles of 32 columns lie in four vectors: the low half of
// vector j is quad j, the high half quad j + 4.

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
// f16 d[16], dmin[16]; u8 scales[8][16], mins[8][16]; nibbles of 8 times 32 columns.
struct PackedQ4_K {
  static constexpr PackedBlock kBlock{256, 2368};
  static constexpr int kMinFactors = 32, kScales = 64, kMins = 192, kCodes = 320;
  static constexpr int kSubBytes = 256;
};
// As Q4_K, and after the nibbles of each 32 columns one vector whose bit j is the fifth bit of quad
// j.
struct PackedQ5_K {
  static constexpr PackedBlock kBlock{256, 2880};
  static constexpr int kMinFactors = 32, kScales = 64, kMins = 192, kCodes = 320;
  static constexpr int kSubBytes = 320, kHigh = 256;
};
// f16 d[16]; i8 scales[16][16], one per 16 columns; nibbles of 8 times 32 columns, each followed by
// two vectors: bits 2 p, 2 p + 1 of vector v are the two high bits of quad 4 v + p.
struct PackedQ6_K {
  static constexpr PackedBlock kBlock{256, 3360};
  static constexpr int kScales = 32, kCodes = 288;
  static constexpr int kSubBytes = 384, kHigh = 256;
};
// All bits of 32 columns lie together: a second stream inside a block, 2 KB away, cut the rate of
// reading from memory to a third.

inline constexpr PackedBlock kPackedBlocks[kPackedTypes] = {PackedQ8_0::kBlock, PackedQ4_0::kBlock,
                                                            PackedQ4_K::kBlock, PackedQ5_K::kBlock,
                                                            PackedQ6_K::kBlock};

}  // namespace fathom::cpu
