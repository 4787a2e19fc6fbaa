// Inside of dequantize(): inline conversions for its loops, and one decoder per block type.
// Each decoder writes the values of `n_blocks` blocks that start at `src`, any alignment.
// Every product and sum is rounded to f32 in the order of gguf-py's quants.py; the build keeps
// the compiler from fusing them (-ffp-contract=off).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "fathom/quant.hpp"

namespace fathom::io {

// Exact in every case and free of branches, so that loops over it vectorise; does not depend on
// the handling of subnormal f32 numbers.
inline float f16_value(uint16_t bits) noexcept {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const uint32_t rebased = magnitude + (112u << 23);  // exponent bias 15 -> 127
  // Subnormal: (2^-14 + fraction) - 2^-14.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(rebased + (1u << 23)) -
                                                 std::bit_cast<float>(113u << 23));
  const uint32_t quiet = magnitude > 0x0f800000 ? 0x00400000 : 0;
  const uint32_t special = (rebased + (112u << 23)) | quiet;
  const uint32_t value =
      magnitude >= 0x0f800000 ? special : (magnitude < 0x00800000 ? small : rebased);
  return std::bit_cast<float>(sign | value);
}

inline float bf16_value(uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// E4M3 without infinities: 0x7f and 0xff are NaN, the largest value is 448.
constexpr float e4m3_value(uint8_t code) noexcept {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t magnitude = static_cast<uint32_t>(code & 0x7f) << 20;
  const uint32_t rebased = magnitude + (120u << 23);  // exponent bias 7 -> 127
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(rebased + (1u << 23)) -
                                                 std::bit_cast<float>(121u << 23));
  const uint32_t value =
      magnitude == 0x07f00000 ? 0x7fc00000 : (magnitude < 0x00800000 ? small : rebased);
  return std::bit_cast<float>(sign | value);
}

using BlockDecoder = void (*)(const void* src, int64_t n_blocks, float* out) noexcept;

// Copies each block to aligned memory and decodes it: out [n_blocks * Block::kElements].
template <class Block, void (*kDecode)(const Block&, float*) noexcept>
void decode_blocks(const void* src, int64_t n_blocks, float* out) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(src);
  for (int64_t i = 0; i < n_blocks; ++i) {
    Block block;
    std::memcpy(&block, bytes + i * static_cast<int64_t>(sizeof(Block)), sizeof(Block));
    kDecode(block, out + i * Block::kElements);
  }
}

// dequantize_k.cc
void decode_q2_k(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_q3_k(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_q4_k(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_q5_k(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_q6_k(const void* src, int64_t n_blocks, float* out) noexcept;

// dequantize_iq.cc
void decode_iq1_s(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_iq1_m(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_iq2_xxs(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_iq2_xs(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_iq2_s(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_iq3_xxs(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_iq3_s(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_iq4_nl(const void* src, int64_t n_blocks, float* out) noexcept;
void decode_iq4_xs(const void* src, int64_t n_blocks, float* out) noexcept;

}  // namespace fathom::io
