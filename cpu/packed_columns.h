// How the packed types of packed_blocks.h are read, over the vectors of simd_<isa>.h: 32 columns of
// one half (kLanes rows) at a time.  Include the vectors first.
//
// Factors: what is constant in a block.   Columns32: codes and scales of 32 columns.
// value = scale * (code - kOffset) - min.  Types whose 16-column scales are small integers that are
// multiplied as such (kPairs) also have pairs(): scales and mins as pairs of int16.
#pragma once

#include <stdint.h>

#include "cpu/packed_blocks.h"
#include "fathom/quant.hpp"

namespace fathom::cpu {
namespace {

constexpr int kHalves = kGroupRows / kLanes;  // vectors that 16 rows take

struct Factors {
  F d, dmin;
};

struct Columns32 {
  B w[8];              // quad q
  F scale = f_zero();  // of all 32, or of the first 16
  F scale_high = f_zero();
  F min = f_zero(), min_high = f_zero();
};

inline void load_nibbles(const uint8_t* codes, Columns32& c) {
  for (int j = 0; j < 4; ++j) {
    const B pairs = b_load(codes + 64 * j);
    c.w[j] = b_low4(pairs);
    c.w[j + 4] = b_high4(pairs);
  }
}

// The fifth bits of eight quads.
inline void add_fifth_bits(const uint8_t* high, Columns32& c) {
  const B bits = b_load(high);
  c.w[0] = b_fifth_bit<0>(c.w[0], bits);
  c.w[1] = b_fifth_bit<1>(c.w[1], bits);
  c.w[2] = b_fifth_bit<2>(c.w[2], bits);
  c.w[3] = b_fifth_bit<3>(c.w[3], bits);
  c.w[4] = b_fifth_bit<4>(c.w[4], bits);
  c.w[5] = b_fifth_bit<5>(c.w[5], bits);
  c.w[6] = b_fifth_bit<6>(c.w[6], bits);
  c.w[7] = b_fifth_bit<7>(c.w[7], bits);
}

inline void load_bit_pairs(const uint8_t* codes, Columns32& c) {
  const B low = b_load(codes), high = b_load(codes + 64);
  c.w[0] = b_bit_pair<0>(low);
  c.w[1] = b_bit_pair<1>(low);
  c.w[2] = b_bit_pair<2>(low);
  c.w[3] = b_bit_pair<3>(low);
  c.w[4] = b_bit_pair<0>(high);
  c.w[5] = b_bit_pair<1>(high);
  c.w[6] = b_bit_pair<2>(high);
  c.w[7] = b_bit_pair<3>(high);
}

// Signed scales of six bits from their two parts, which begin at the bits given.
inline S six_bit_scales(S low, int low_shift, S high, int high_shift) {
  return s_sub(s_or(s_bits(low, low_shift, 15), s_high2(high, high_shift)), 32);
}

struct Pairs {
  I scales;
  I mins = i_set(0);
};

// The scales of a type that has pairs().
template <class Type>
inline void read_pairs(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
  const Pairs pairs = Type::pairs(block, sub, half);
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
    load_nibbles(codes, c);
    for (int q = 0; q < 8; ++q) c.w[q] = b_iq4_values(c.w[q]);
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
    const S low = s_load(block + kScales + 16 * (sub / 2) + kLanes * half);
    const S high = s_load(block + kHighScales + 16 * (sub / 4) + kLanes * half);
    c.scale = f_mul(f.d, f_from_i8(six_bit_scales(low, 4 * (sub % 2), high, 2 * (sub % 4))));
  }
};

struct ReadQ2_K : PackedQ2_K {
  static constexpr bool kSigned = false, kMin = true, kTwoScales = true, kPairs = true;
  static constexpr bool kPrefetch = true;
  static constexpr int kMaxCode = 3, kOffset = 0;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half),
            f_load_f16(block + kMinFactors + 2 * kLanes * half)};
  }
  static void codes(const uint8_t* block, int sub, int half, Columns32& c) {
    load_bit_pairs(block + kCodes + kSubBytes * sub + 4 * kLanes * half, c);
  }
  static Pairs pairs(const uint8_t* block, int sub, int half) {
    const I both = i_load_u8_pairs(block + kScales + 32 * sub + 2 * kLanes * half);
    return {i_low_nibbles(both), i_high_nibbles(both)};
  }
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    codes(block, sub, half, c);
    read_pairs<ReadQ2_K>(block, sub, half, f, c);
  }
};

// Codes are kept at 0 .. 7; the sums of the activations take 4 off (kOffset).
struct ReadQ3_K : PackedQ3_K {
  static constexpr bool kSigned = false, kMin = false, kTwoScales = true, kPairs = true;
  static constexpr bool kPrefetch = true;
  static constexpr int kMaxCode = 7, kOffset = 4;
  static Factors factors(const uint8_t* block, int half) {
    return {f_load_f16(block + 2 * kLanes * half), f_zero()};
  }
  static void codes(const uint8_t* block, int sub, int half, Columns32& c) {
    const uint8_t* from = block + kCodes + kSubBytes * sub + 4 * kLanes * half;
    load_bit_pairs(from, c);
    const B bits = b_load(from + kHigh);
    c.w[0] = b_third_bit<0>(c.w[0], bits);
    c.w[1] = b_third_bit<1>(c.w[1], bits);
    c.w[2] = b_third_bit<2>(c.w[2], bits);
    c.w[3] = b_third_bit<3>(c.w[3], bits);
    c.w[4] = b_third_bit<4>(c.w[4], bits);
    c.w[5] = b_third_bit<5>(c.w[5], bits);
    c.w[6] = b_third_bit<6>(c.w[6], bits);
    c.w[7] = b_third_bit<7>(c.w[7], bits);
  }
  static Pairs pairs(const uint8_t* block, int sub, int half) {
    const S low = s_load(block + kScales + 16 * sub + kLanes * half);
    const S high = s_load(block + kHighScales + 16 * (sub / 2) + kLanes * half);
    const int shift = 4 * (sub % 2);
    return {i_pairs_from_i8(six_bit_scales(low, 0, high, shift),
                            six_bit_scales(low, 4, high, shift + 2))};
  }
  static void read(const uint8_t* block, int sub, int half, const Factors& f, Columns32& c) {
    codes(block, sub, half, c);
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
    c.w[0] = b_high_bits<0>(c.w[0], low);
    c.w[1] = b_high_bits<1>(c.w[1], low);
    c.w[2] = b_high_bits<2>(c.w[2], low);
    c.w[3] = b_high_bits<3>(c.w[3], low);
    c.w[4] = b_high_bits<0>(c.w[4], high);
    c.w[5] = b_high_bits<1>(c.w[5], high);
    c.w[6] = b_high_bits<2>(c.w[6], high);
    c.w[7] = b_high_bits<3>(c.w[7], high);
    const uint8_t* scales = block + kScales + 32 * sub + kLanes * half;
    c.scale = f_mul(f.d, f_load_i8(scales));
    c.scale_high = f_mul(f.d, f_load_i8(scales + 16));
  }
};

}  // namespace
}  // namespace fathom::cpu
