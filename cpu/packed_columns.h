// How the packed types of packed_blocks.h are read, over the vectors of simd_<isa>.h: 32 columns of
// one half (kLanes rows) at a time.  Include the vectors first.
//
// Factors: what is constant in a block, of one half.   Columns32: codes and scales of 32 columns.
// value = scale * (code - kOffset) - min.
//
// Types whose 16-column scales are small integers that are multiplied as such (kPairs) also have
// pairs(), scales and mins as pairs of int16, and codes(), which leaves the last 16 columns
// 2^kLastShift times too large.
#pragma once

#include <stdint.h>

#include "cpu/packed_blocks.h"
#include "fathom/quant.hpp"

namespace fathom::cpu {
namespace {

constexpr int kHalves = kGroupRows / kLanes;  // vectors that 16 rows take

struct Factors {
  F d, dmin;
  const int8_t* scales = nullptr;  // those of six bits, of all rows, as OpenBlock has them
};

struct Columns32 {
  B w[8];              // quad q
  F scale = f_zero();  // of all 32, or of the first 16
  F scale_high = f_zero();
  F min = f_zero(), min_high = f_zero();
};

// Scales of six bits, n to each row, less 32: vector j of n / 2 and those after it.
template <int n, int j = 0>
inline void unpack_six_bits(const uint8_t* low, const uint8_t* high, int8_t* scales) {
  if constexpr (j < n / 2) {
    constexpr int kSecond = j / (n / 4), kPart = j / (n / 8);
    const S low4 = s_bits<4 * kSecond, 15>(s_load(low + 32 * (j % (n / 4))));
    const S all = s_or_bits<2 * kPart - 4, 48>(low4, s_load(high + 32 * (j % (n / 8))));
    s_store(scales + 32 * j, s_sub(all, 32));
    unpack_six_bits<n, j + 1>(low, high, scales);
  }
}

template <class Type>
constexpr int six_bit_scales() {
  if constexpr (requires { Type::kHighScales; })
    return (Type::kHighScales - Type::kScales) / 8;
  else
    return 0;
}

// What is read once of a block, whose scales of six bits are taken apart here.
template <class Type>
class OpenBlock {
 public:
  explicit OpenBlock(const uint8_t* block) {
    if constexpr (kScales > 0)
      unpack_six_bits<kScales>(block + Type::kScales, block + Type::kHighScales, scales_);
    for (int h = 0; h < kHalves; ++h) {
      factors_[h] = Type::factors(block, h);
      if constexpr (kScales > 0) factors_[h].scales = scales_;
    }
  }
  OpenBlock(const OpenBlock&) = delete;
  OpenBlock& operator=(const OpenBlock&) = delete;
  const Factors& operator[](int half) const { return factors_[half]; }

 private:
  static constexpr int kScales = six_bit_scales<Type>();
  Factors factors_[kHalves];
  alignas(32) int8_t scales_[kScales > 0 ? 16 * kScales : 1];
};

inline void load_nibbles(const uint8_t* codes, Columns32& c) {
  for (int j = 0; j < 4; ++j) {
    const B pairs = b_load(codes + 64 * j);
    c.w[j] = b_bits<0, 15>(pairs);
    c.w[j + 4] = b_bits<4, 15>(pairs);
  }
}

// The fifth bits of eight quads.
inline void add_fifth_bits(const uint8_t* high, Columns32& c) {
  const B bits = b_load(high);
  c.w[0] = b_or_bits<-4, 16>(c.w[0], bits);
  c.w[1] = b_or_bits<-3, 16>(c.w[1], bits);
  c.w[2] = b_or_bits<-2, 16>(c.w[2], bits);
  c.w[3] = b_or_bits<-1, 16>(c.w[3], bits);
  c.w[4] = b_or_bits<0, 16>(c.w[4], bits);
  c.w[5] = b_or_bits<1, 16>(c.w[5], bits);
  c.w[6] = b_or_bits<2, 16>(c.w[6], bits);
  c.w[7] = b_or_bits<3, 16>(c.w[7], bits);
}

struct Pairs {
  I scales;
  I mins = i_set(0);
};

// Codes and scales of a type that has pairs().
template <class Type>
inline void read_pairs(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
  Type::codes(block, sub, half, c);
  for (int q = 4; q < 8; ++q) c.w[q] = b_bits<Type::kLastShift, Type::kMaxCode>(c.w[q]);
  const Pairs pairs = Type::pairs(block, sub, half, f);
  c.scale = f_mul(f.d, f_from_i(i_first_of_pairs(pairs.scales)));
  c.scale_high = f_mul(f.d, f_from_i(i_last_of_pairs(pairs.scales)));
  if constexpr (Type::kMin) {
    c.min = f_mul(f.dmin, f_from_i(i_first_of_pairs(pairs.mins)));
    c.min_high = f_mul(f.dmin, f_from_i(i_last_of_pairs(pairs.mins)));
  }
}

struct ReadQ8_0 : PackedQ8_0 {
  static constexpr bool kSigned = true, kMin = false, kTwoScales = false, kPairs = false;
  static constexpr int kMaxCode = 127, kOffset = 0;
  static constexpr bool kPrefetch = false;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half), f_zero()};
  }
  static void read(const uint8_t* block, int, int half, const Factors& f, Columns32& c) {
    const uint8_t* codes = block + kCodes + 4 * kLanes * half;
    for (int q = 0; q < 8; ++q) c.w[q] = b_signed(b_load(codes + 64 * q));
    c.scale = f.d;
  }
};

// q - 8 is written as scale * q - min with min = 8 d.
struct ReadQ4_0 : PackedQ4_0 {
  static constexpr bool kSigned = false, kMin = true, kTwoScales = false, kPairs = false;
  static constexpr bool kPrefetch = true;
  static constexpr int kMaxCode = 15, kOffset = 0;
  static Factors factors(const uint8_t* block, int half) {
    const F d = f_load_f16(block + 2 * kLanes * half);
    return {d, f_mul(d, f_set(8.0f))};
  }
  static void read(const uint8_t* block, int, int half, const Factors& f, Columns32& c) {
    load_nibbles(block + kCodes + 4 * kLanes * half, c);
    c.scale = f.d;
    c.min = f.dmin;
  }
};

// d q + m.
template <class Layout>
struct ReadMin : Layout {
  static constexpr bool kSigned = false, kMin = true, kTwoScales = false, kPairs = false;
  static constexpr bool kPrefetch = true;
  static constexpr int kOffset = 0;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half),
            f_sub(f_zero(), f_load_f16(block + Layout::kMinFactors + 2 * kLanes * half))};
  }
  static void read(const uint8_t* block, int, int half, const Factors& f, Columns32& c) {
    load_nibbles(block + Layout::kCodes + 4 * kLanes * half, c);
    c.scale = f.d;
    c.min = f.dmin;
  }
};

struct ReadQ4_1 : ReadMin<PackedQ4_1> {
  static constexpr int kMaxCode = 15;
};

struct ReadQ5_1 : ReadMin<PackedQ5_1> {
  static constexpr int kMaxCode = 31;
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    ReadMin::read(block, sub, half, f, c);
    add_fifth_bits(block + kCodes + kHigh + 4 * kLanes * half, c);
  }
};

// q - 16 is written as scale * q - min with min = 16 d.
struct ReadQ5_0 : PackedQ5_0 {
  static constexpr bool kSigned = false, kMin = true, kTwoScales = false, kPairs = false;
  static constexpr bool kPrefetch = true;
  static constexpr int kMaxCode = 31, kOffset = 0;
  static Factors factors(const uint8_t* block, int half) {
    const F d = f_load_f16(block + 2 * kLanes * half);
    return {d, f_mul(d, f_set(16.0f))};
  }
  static void read(const uint8_t* block, int, int half, const Factors& f, Columns32& c) {
    const uint8_t* codes = block + kCodes + 4 * kLanes * half;
    load_nibbles(codes, c);
    add_fifth_bits(codes + kHigh, c);
    c.scale = f.d;
    c.min = f.dmin;
  }
};

// Nibbles that are numbers into kIQ4Values.
template <class Layout>
struct ReadIQ4 : Layout {
  static constexpr bool kSigned = true, kMin = false, kTwoScales = false, kPairs = false;
  static constexpr bool kPrefetch = true;
  static constexpr int kMaxCode = 127, kOffset = 0;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half), f_zero()};
  }
  static void load(const uint8_t* codes, Columns32& c) {
    for (int j = 0; j < 4; ++j) {
      const B pairs = b_load(codes + 64 * j);
      c.w[j] = b_iq4_values(b_bits<0, 15>(pairs));
      c.w[j + 4] = b_iq4_values(b_bits<4, 15>(pairs));
    }
  }
};

struct ReadIQ4_NL : ReadIQ4<PackedIQ4_NL> {
  static void read(const uint8_t* block, int, int half, const Factors& f, Columns32& c) {
    load(block + kCodes + 4 * kLanes * half, c);
    c.scale = f.d;
  }
};

struct ReadIQ4_XS : ReadIQ4<PackedIQ4_XS> {
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    load(block + kCodes + kSubBytes * sub + 4 * kLanes * half, c);
    c.scale = f_mul(f.d, f_load_i8(f.scales + 16 * sub + kLanes * half));
  }
};

struct ReadQ2_K : PackedQ2_K {
  static constexpr bool kSigned = false, kMin = true, kTwoScales = true, kPairs = true;
  static constexpr bool kPrefetch = true;
  static constexpr int kMaxCode = 3, kOffset = 0, kLastShift = 2;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half),
            f_load_f16(block + kMinFactors + 2 * kLanes * half)};
  }
  static void codes(const uint8_t* block, int sub, int half, Columns32& c) {
    const uint8_t* from = block + kCodes + kSubBytes * sub + 4 * kLanes * half;
    for (int v = 0; v < 2; ++v) {
      const B bits = b_load(from + 64 * v);
      const B next = b_bits<4, 15>(bits);
      c.w[2 * v] = b_bits<0, 3>(bits);
      c.w[2 * v + 1] = b_bits<0, 3>(next);
      c.w[2 * v + 4] = b_bits<0, 12>(bits);
      c.w[2 * v + 5] = b_bits<0, 12>(next);
    }
  }
  static Pairs pairs(const uint8_t* block, int sub, int half, const Factors&) {
    const I both = i_load_u8_pairs(block + kScales + 32 * sub + 2 * kLanes * half);
    return {i_low_nibbles(both), i_high_nibbles(both)};
  }
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    read_pairs<ReadQ2_K>(block, sub, half, f, c);
  }
};

// Codes are kept at 0 .. 7; the sums of the activations take 4 off (kOffset).
struct ReadQ3_K : PackedQ3_K {
  static constexpr bool kSigned = false, kMin = false, kTwoScales = true, kPairs = true;
  static constexpr bool kPrefetch = true;
  static constexpr int kMaxCode = 7, kOffset = 4, kLastShift = 3;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half), f_zero()};
  }
  static void codes(const uint8_t* block, int sub, int half, Columns32& c) {
    const uint8_t* from = block + kCodes + kSubBytes * sub + 4 * kLanes * half;
    const B v0 = b_load(from), v1 = b_load(from + 64), v2 = b_load(from + 128);
    c.w[0] = b_bits<0, 7>(v0);
    c.w[1] = b_bits<0, 7>(v1);
    c.w[2] = b_bits<0, 7>(v2);
    c.w[3] = b_or_bits<4, 4>(b_bits<6, 3>(v0), v2);
    c.w[4] = b_bits<0, 7 << 3>(v0);
    c.w[5] = b_bits<0, 7 << 3>(v1);
    c.w[6] = b_bits<0, 7 << 3>(v2);
    c.w[7] = b_or_bits<2, 4 << 3>(b_bits<3, 3 << 3>(v1), v2);
  }
  static Pairs pairs(const uint8_t*, int sub, int half, const Factors& f) {
    return {i_load_i8_pairs(f.scales + 32 * sub + 2 * kLanes * half)};
  }
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    read_pairs<ReadQ3_K>(block, sub, half, f, c);
  }
};

// What Q4_K and Q5_K share: all but the fifth bit.
template <class Layout>
struct ReadK : Layout {
  static constexpr bool kSigned = false, kMin = true, kTwoScales = false, kPairs = false;
  static constexpr bool kPrefetch = true;
  static constexpr int kOffset = 0;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half),
            f_load_f16(block + Layout::kMinFactors + 2 * kLanes * half)};
  }
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    load_nibbles(block + Layout::kCodes + Layout::kSubBytes * sub + 4 * kLanes * half, c);
    c.scale = f_mul(f.d, f_load_u8(block + Layout::kScales + 16 * sub + kLanes * half));
    c.min = f_mul(f.dmin, f_load_u8(block + Layout::kMins + 16 * sub + kLanes * half));
  }
};

struct ReadQ4_K : ReadK<PackedQ4_K> {
  static constexpr int kMaxCode = 15;
};

struct ReadQ5_K : ReadK<PackedQ5_K> {
  static constexpr int kMaxCode = 31;
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    ReadK::read(block, sub, half, f, c);
    add_fifth_bits(block + kCodes + kSubBytes * sub + kHigh + 4 * kLanes * half, c);
  }
};

// Codes are kept at 0 .. 63; the sums of the activations take 32 off (kOffset).
struct ReadQ6_K : PackedQ6_K {
  static constexpr bool kSigned = false, kMin = false, kTwoScales = true, kPairs = false;
  static constexpr bool kPrefetch = true;
  static constexpr int kMaxCode = 63, kOffset = 32;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half), f_zero()};
  }
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    const uint8_t* codes = block + kCodes + kSubBytes * sub + 4 * kLanes * half;
    load_nibbles(codes, c);
    const B low = b_load(codes + kHigh);
    const B high = b_load(codes + kHigh + 64);
    c.w[0] = b_or_bits<-4, 48>(c.w[0], low);
    c.w[1] = b_or_bits<-2, 48>(c.w[1], low);
    c.w[2] = b_or_bits<0, 48>(c.w[2], low);
    c.w[3] = b_or_bits<2, 48>(c.w[3], low);
    c.w[4] = b_or_bits<-4, 48>(c.w[4], high);
    c.w[5] = b_or_bits<-2, 48>(c.w[5], high);
    c.w[6] = b_or_bits<0, 48>(c.w[6], high);
    c.w[7] = b_or_bits<2, 48>(c.w[7], high);
    const uint8_t* scales = block + kScales + 32 * sub + kLanes * half;
    c.scale = f_mul(f.d, f_load_i8(scales));
    c.scale_high = f_mul(f.d, f_load_i8(scales + 16));
  }
};

}  // namespace
}  // namespace fathom::cpu
