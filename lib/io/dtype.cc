// The table of element types, and the conversions of single values.
#include <bit>
#include <cstddef>
#include <iterator>

#include "dequantize.h"
#include "fathom/quant.hpp"
#include "fathom/tensor.hpp"

namespace fathom {
namespace {

template <class Block>
constexpr DTypeInfo block(std::string_view name) {
  return {name, Block::kElements, static_cast<int32_t>(sizeof(Block))};
}

// In the order of DType; dtype_rows_are_in_order() below fails to compile otherwise.
constexpr struct {
  DType dtype;
  DTypeInfo info;
} kTable[] = {
    {DType::kF32, {"F32", 1, 4}},
    {DType::kF16, {"F16", 1, 2}},
    {DType::kBF16, {"BF16", 1, 2}},
    {DType::kF64, {"F64", 1, 8}},
    {DType::kI8, {"I8", 1, 1}},
    {DType::kI16, {"I16", 1, 2}},
    {DType::kI32, {"I32", 1, 4}},
    {DType::kI64, {"I64", 1, 8}},
    {DType::kF8E4M3, {"F8_E4M3", 1, 1}},
    {DType::kQ4_0, block<BlockQ4_0>("Q4_0")},
    {DType::kQ4_1, block<BlockQ4_1>("Q4_1")},
    {DType::kQ5_0, block<BlockQ5_0>("Q5_0")},
    {DType::kQ5_1, block<BlockQ5_1>("Q5_1")},
    {DType::kQ8_0, block<BlockQ8_0>("Q8_0")},
    {DType::kQ8_1, block<BlockQ8_1>("Q8_1")},
    {DType::kQ2_K, block<BlockQ2_K>("Q2_K")},
    {DType::kQ3_K, block<BlockQ3_K>("Q3_K")},
    {DType::kQ4_K, block<BlockQ4_K>("Q4_K")},
    {DType::kQ5_K, block<BlockQ5_K>("Q5_K")},
    {DType::kQ6_K, block<BlockQ6_K>("Q6_K")},
    {DType::kQ8_K, block<BlockQ8_K>("Q8_K")},
    {DType::kIQ1_S, block<BlockIQ1_S>("IQ1_S")},
    {DType::kIQ1_M, block<BlockIQ1_M>("IQ1_M")},
    {DType::kIQ2_XXS, block<BlockIQ2_XXS>("IQ2_XXS")},
    {DType::kIQ2_XS, block<BlockIQ2_XS>("IQ2_XS")},
    {DType::kIQ2_S, block<BlockIQ2_S>("IQ2_S")},
    {DType::kIQ3_XXS, block<BlockIQ3_XXS>("IQ3_XXS")},
    {DType::kIQ3_S, block<BlockIQ3_S>("IQ3_S")},
    {DType::kIQ4_NL, block<BlockIQ4_NL>("IQ4_NL")},
    {DType::kIQ4_XS, block<BlockIQ4_XS>("IQ4_XS")},
    {DType::kTQ1_0, block<BlockTQ1_0>("TQ1_0")},
    {DType::kTQ2_0, block<BlockTQ2_0>("TQ2_0")},
    {DType::kMXFP4, block<BlockMXFP4>("MXFP4")},
};

consteval bool dtype_rows_are_in_order() {
  if (std::size(kTable) != kDTypeCount) return false;
  for (size_t i = 0; i < std::size(kTable); ++i) {
    if (static_cast<size_t>(kTable[i].dtype) != i) return false;
  }
  return true;
}
static_assert(dtype_rows_are_in_order());

}  // namespace

const DTypeInfo& dtype_info(DType dtype) noexcept {
  return kTable[static_cast<size_t>(dtype)].info;
}

bool is_weight_dtype(DType dtype) noexcept {
  switch (dtype) {
    case DType::kI8:
    case DType::kI16:
    case DType::kI32:
    case DType::kI64:
    case DType::kQ8_1:
    case DType::kQ8_K:
      return false;
    default:
      return true;
  }
}

float f16_to_f32(uint16_t bits) noexcept {
  return io::f16_value(bits);
}
float bf16_to_f32(uint16_t bits) noexcept {
  return io::bf16_value(bits);
}
float e4m3_to_f32(uint8_t code) noexcept {
  return io::e4m3_value(code);
}

uint16_t f32_to_f16(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);  // quiet, upper payload bits kept
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and more is nearer to 65536, which f16 does not have
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 the result is subnormal.  Adding 0.5 puts its unit, 2^-24, at the last bit of
    // the f32 sum: the addition itself rounds to nearest even.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t odd = magnitude >> 13 & 1;
    half = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

uint16_t f32_to_bf16(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint8_t f32_to_e4m3(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 24 & 0x80;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t code;
  if (magnitude > 0x7f800000) {
    code = 0x7f;
  } else if (magnitude >= 0x43e00000) {
    code = 0x7e;  // 448, the largest; infinity saturates as well
  } else if (magnitude < 0x3c800000) {
    // Below 2^-6: subnormal, unit 2^-9.  The same trick as in f32_to_f16 with 2^14.
    const float sum = std::bit_cast<float>(magnitude) + 16384.0f;
    code = std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(16384.0f);
  } else {
    const uint32_t odd = magnitude >> 20 & 1;
    code = (magnitude - (120u << 23) + 0x7ffff + odd) >> 20;
  }
  return static_cast<uint8_t>(sign | code);
}

}  // namespace fathom
