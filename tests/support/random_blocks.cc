// Random valid blocks of every weight type; contract in random_weights.h.
//
// Codes are raw random bits.  Scales are set so that the values have the wanted deviation; the
// sign of a scale is random where the codes have a mean of their own, which cancels it.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "fathom/quant.hpp"
#include "support/random_weights.h"

namespace fathom::test {
namespace {

// SplitMix64's output function: any number to a random one.
uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

// Eight scales around one size, with random signs where asked.
class Scales {
 public:
  Scales(float size, bool signs) {
    for (int i = 0; i < 8; ++i) {
      const float spread = 0.75f + 0.5f * static_cast<float>(i / 2) / 3.0f;
      const float sign = signs && i % 2 != 0 ? -1.0f : 1.0f;
      values_[i] = size * spread * sign;
      codes_[i] = f32_to_f16(values_[i]);
    }
  }
  uint16_t code(uint64_t random) const { return codes_[random & 7]; }
  uint16_t scaled_code(uint64_t random, float factor) const {
    return f32_to_f16(values_[random & 7] * factor);
  }

 private:
  std::array<float, 8> values_{};
  std::array<uint16_t, 8> codes_{};
};

// Equal scales and minima of Q4_K and Q5_K, so that d * s * q - dmin * s is centred by
// dmin = d * (middle of q).  Each s is 32..63.  Layout: see BlockQ4_K.
void pack_equal_scales(uint8_t* packed, uint64_t random) {
  for (int k = 0; k < 4; ++k) {
    const auto low = static_cast<uint8_t>(32 | (random >> (8 * k) & 31));
    const auto high = static_cast<uint8_t>(32 | (random >> (8 * k + 32) & 31));
    packed[k] = packed[4 + k] = static_cast<uint8_t>(low | high >> 4 << 6);
    packed[8 + k] = static_cast<uint8_t>((high & 15) * 17);
  }
}

// Fixes the scales of a block whose bytes are random.  `random` is independent of them.
// kStep is the deviation of the values when d is 1.
template <class Block>
struct Recipe;

#define FATHOM_SIMPLE_RECIPE(Type, step)                                                           \
  template <>                                                                                      \
  struct Recipe<Type> {                                                                            \
    static constexpr float kStep = step;                                                           \
    static void fix(Type& b, const Scales& scales, uint64_t random) { b.d = scales.code(random); } \
  }
FATHOM_SIMPLE_RECIPE(BlockQ4_0, 4.64f);
FATHOM_SIMPLE_RECIPE(BlockQ5_0, 9.25f);
FATHOM_SIMPLE_RECIPE(BlockQ8_0, 73.9f);
FATHOM_SIMPLE_RECIPE(BlockIQ4_NL, 69.0f);
FATHOM_SIMPLE_RECIPE(BlockIQ4_XS, 1270.0f);
FATHOM_SIMPLE_RECIPE(BlockQ3_K, 42.4f);
FATHOM_SIMPLE_RECIPE(BlockQ6_K, 1367.0f);
FATHOM_SIMPLE_RECIPE(BlockIQ2_XXS, 60.0f);
FATHOM_SIMPLE_RECIPE(BlockIQ2_XS, 60.0f);
FATHOM_SIMPLE_RECIPE(BlockIQ2_S, 60.0f);
FATHOM_SIMPLE_RECIPE(BlockIQ3_XXS, 150.0f);
FATHOM_SIMPLE_RECIPE(BlockIQ3_S, 150.0f);
FATHOM_SIMPLE_RECIPE(BlockIQ1_S, 7.5f);
FATHOM_SIMPLE_RECIPE(BlockTQ1_0, 0.82f);
FATHOM_SIMPLE_RECIPE(BlockTQ2_0, 1.1f);
#undef FATHOM_SIMPLE_RECIPE

// d * q + m with m at minus the middle of q.
template <>
struct Recipe<BlockQ4_1> {
  static constexpr float kStep = 4.61f;
  static void fix(BlockQ4_1& b, const Scales& scales, uint64_t random) {
    b.d = scales.code(random);
    b.m = scales.scaled_code(random, -7.5f);
  }
};
template <>
struct Recipe<BlockQ5_1> {
  static constexpr float kStep = 9.23f;
  static void fix(BlockQ5_1& b, const Scales& scales, uint64_t random) {
    b.d = scales.code(random);
    b.m = scales.scaled_code(random, -15.5f);
  }
};
template <>
struct Recipe<BlockQ2_K> {
  static constexpr float kStep = 13.0f;
  static void fix(BlockQ2_K& b, const Scales& scales, uint64_t random) {
    for (int j = 0; j < 16; ++j) {
      b.scales[j] = static_cast<uint8_t>((8 | (random >> (3 * j + 8) & 7)) * 17);
    }
    b.d = scales.code(random);
    b.dmin = scales.scaled_code(random, 1.5f);
  }
};
template <>
struct Recipe<BlockQ4_K> {
  static constexpr float kStep = 222.0f;
  static void fix(BlockQ4_K& b, const Scales& scales, uint64_t random) {
    pack_equal_scales(b.scales, mix(random));
    b.d = scales.code(random);
    b.dmin = scales.scaled_code(random, 7.5f);
  }
};
template <>
struct Recipe<BlockQ5_K> {
  static constexpr float kStep = 444.0f;
  static void fix(BlockQ5_K& b, const Scales& scales, uint64_t random) {
    pack_equal_scales(b.scales, mix(random));
    b.d = scales.code(random);
    b.dmin = scales.scaled_code(random, 15.5f);
  }
};
template <>
struct Recipe<BlockIQ1_M> {
  static constexpr float kStep = 7.5f;
  static void fix(BlockIQ1_M& b, const Scales& scales, uint64_t random) {
    const uint16_t d = scales.code(random);
    for (int k = 0; k < 4; ++k) {
      uint8_t& high = b.scales[2 * k + 1];
      high = static_cast<uint8_t>((high & 15) | (d >> (4 * k) & 15) << 4);
    }
  }
};

template <class Block>
void fill_blocks(float stddev, uint64_t seed, int64_t first, std::span<std::byte> out) {
  constexpr size_t kWords = (sizeof(Block) + 7) / 8;
  const Scales scales(stddev / Recipe<Block>::kStep, true);
  std::byte* at = out.data();
  for (size_t i = 0; i < out.size() / sizeof(Block); ++i, at += sizeof(Block)) {
    uint64_t state = mix(seed + (static_cast<uint64_t>(first) + i) * kGolden);
    const uint64_t random = state;
    std::array<uint64_t, kWords> words;
    for (uint64_t& word : words) word = mix(state += kGolden);
    Block block;
    std::memcpy(&block, words.data(), sizeof block);
    Recipe<Block>::fix(block, scales, random);
    std::memcpy(at, &block, sizeof block);
  }
}

// MXFP4's scale is a power of two; the codes have a deviation of 6.
void fill_mxfp4(float stddev, uint64_t seed, int64_t first, std::span<std::byte> out) {
  const auto exponent = static_cast<int>(std::lround(std::log2(stddev / 6.0f))) + 128;
  for (size_t i = 0; i < out.size() / sizeof(BlockMXFP4); ++i) {
    BlockMXFP4 block;
    block.e = static_cast<uint8_t>(exponent);
    for (int half = 0; half < 2; ++half) {
      const uint64_t word = mix(seed + (2 * (static_cast<uint64_t>(first) + i) + half) * kGolden);
      std::memcpy(block.qs + 8 * half, &word, 8);
    }
    std::memcpy(out.data() + i * sizeof block, &block, sizeof block);
  }
}

// Plain types: entries of a table of evenly spread values, chosen by random bits.
template <class T>
void fill_plain(const std::array<T, 256>& table, uint64_t seed, int64_t first,
                std::span<std::byte> out) {
  const size_t n = out.size() / sizeof(T);
  std::byte* at = out.data();
  for (size_t i = 0; i < n; i += 8) {
    uint64_t word =
        mix(seed + static_cast<uint64_t>(first / 8 + static_cast<int64_t>(i / 8)) * kGolden);
    T values[8];
    for (T& value : values) {
      value = table[word & 255];
      word >>= 8;
    }
    const size_t count = std::min<size_t>(8, n - i);
    std::memcpy(at + i * sizeof(T), values, count * sizeof(T));
  }
}

template <class T, class Convert>
void fill_converted(float stddev, uint64_t seed, int64_t offset, std::span<std::byte> out,
                    Convert convert) {
  std::array<T, 256> table;
  for (int i = 0; i < 256; ++i) {
    table[static_cast<size_t>(i)] = convert((static_cast<float>(i) - 127.5f) / 73.9f * stddev);
  }
  fill_plain(table, seed, offset / static_cast<int64_t>(sizeof(T)), out);
}

}  // namespace

void fill_random_blocks(DType dtype, float stddev, uint64_t seed, int64_t offset,
                        std::span<std::byte> out) {
  const int64_t first = offset / dtype_info(dtype).block_bytes;
  const auto blocks = [&]<class Block>(std::type_identity<Block>) {
    fill_blocks<Block>(stddev, seed, first, out);
  };
  switch (dtype) {
    case DType::kF32:
      return fill_converted<float>(stddev, seed, offset, out, [](float v) { return v; });
    case DType::kF64:
      return fill_converted<double>(stddev, seed, offset, out, [](float v) { return v; });
    case DType::kF16:
      return fill_converted<uint16_t>(stddev, seed, offset, out, f32_to_f16);
    case DType::kBF16:
      return fill_converted<uint16_t>(stddev, seed, offset, out, f32_to_bf16);
    case DType::kF8E4M3:
      return fill_converted<uint8_t>(stddev, seed, offset, out, f32_to_e4m3);
    case DType::kQ4_0:
      return blocks(std::type_identity<BlockQ4_0>());
    case DType::kQ4_1:
      return blocks(std::type_identity<BlockQ4_1>());
    case DType::kQ5_0:
      return blocks(std::type_identity<BlockQ5_0>());
    case DType::kQ5_1:
      return blocks(std::type_identity<BlockQ5_1>());
    case DType::kQ8_0:
      return blocks(std::type_identity<BlockQ8_0>());
    case DType::kQ2_K:
      return blocks(std::type_identity<BlockQ2_K>());
    case DType::kQ3_K:
      return blocks(std::type_identity<BlockQ3_K>());
    case DType::kQ4_K:
      return blocks(std::type_identity<BlockQ4_K>());
    case DType::kQ5_K:
      return blocks(std::type_identity<BlockQ5_K>());
    case DType::kQ6_K:
      return blocks(std::type_identity<BlockQ6_K>());
    case DType::kIQ1_S:
      return blocks(std::type_identity<BlockIQ1_S>());
    case DType::kIQ1_M:
      return blocks(std::type_identity<BlockIQ1_M>());
    case DType::kIQ2_XXS:
      return blocks(std::type_identity<BlockIQ2_XXS>());
    case DType::kIQ2_XS:
      return blocks(std::type_identity<BlockIQ2_XS>());
    case DType::kIQ2_S:
      return blocks(std::type_identity<BlockIQ2_S>());
    case DType::kIQ3_XXS:
      return blocks(std::type_identity<BlockIQ3_XXS>());
    case DType::kIQ3_S:
      return blocks(std::type_identity<BlockIQ3_S>());
    case DType::kIQ4_NL:
      return blocks(std::type_identity<BlockIQ4_NL>());
    case DType::kIQ4_XS:
      return blocks(std::type_identity<BlockIQ4_XS>());
    case DType::kTQ1_0:
      return blocks(std::type_identity<BlockTQ1_0>());
    case DType::kTQ2_0:
      return blocks(std::type_identity<BlockTQ2_0>());
    case DType::kMXFP4:
      return fill_mxfp4(stddev, seed, first, out);
    default:
      throw std::runtime_error("no random blocks of type " + std::string(dtype_info(dtype).name));
  }
}

}  // namespace fathom::test
