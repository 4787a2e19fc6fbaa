// Element and block types of stored tensors, and what a block of each is made of.
// Byte layouts of the blocks: GGUF specification and ggml's block structures; FP8 as in the
// DeepSeek-V3 checkpoints (E4M3 codes; the scales per 128 x 128 block are a tensor of their own).
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace fathom {

enum class DType : uint8_t {
  // clang-format off
  kF32, kF16, kBF16, kF64, kI8, kI16, kI32, kI64, kF8E4M3,
  kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ8_1,
  kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kQ8_K,
  kIQ1_S, kIQ1_M, kIQ2_XXS, kIQ2_XS, kIQ2_S, kIQ3_XXS, kIQ3_S, kIQ4_NL, kIQ4_XS,
  kTQ1_0, kTQ2_0, kMXFP4,
  // clang-format on
};
inline constexpr int kDTypeCount = static_cast<int>(DType::kMXFP4) + 1;

// A row is a sequence of blocks: `block_elements` values in `block_bytes` bytes.
struct DTypeInfo {
  std::string_view name;   // as GGUF tools print it: "F32", "Q4_K", "F8_E4M3"
  int32_t block_elements;  // 1 for plain element types
  int32_t block_bytes;
};

const DTypeInfo& dtype_info(DType) noexcept;

// Bytes of a row of `n_elements`, which must be a multiple of block_elements.
inline int64_t row_bytes(DType dtype, int64_t n_elements) noexcept {
  const DTypeInfo& info = dtype_info(dtype);
  return n_elements / info.block_elements * info.block_bytes;
}

// True when values of this type are weights that dequantize() can turn into f32.
// (Not: integer types, Q8_1 and Q8_K, which are activation formats.)
bool is_weight_dtype(DType) noexcept;

// out[i] = value of element i.  The scalar definition of every weight type: bit-exact to the
// reference dequantisation (gguf-py), the oracle of all faster code.
//   src  row_bytes(dtype, n) bytes, any alignment      out  [n], must not overlap src
// n is a multiple of the block size.  kF8E4M3 is decoded without its block scales.
void dequantize(DType dtype, const void* src, int64_t n, float* out) noexcept;

// Conversions of single values: round to nearest even; NaN stays NaN.
float f16_to_f32(uint16_t bits) noexcept;
uint16_t f32_to_f16(float value) noexcept;
float bf16_to_f32(uint16_t bits) noexcept;
uint16_t f32_to_bf16(float value) noexcept;
float e4m3_to_f32(uint8_t code) noexcept;
uint8_t f32_to_e4m3(float value) noexcept;  // saturates at +-448

}  // namespace fathom
