// dequantize(): the choice of the decoder, plain element types, and the small blocks: Q4_0 to
// Q8_0, MXFP4 and the ternary types.  K types: dequantize_k.cc.  IQ types: dequantize_iq.cc.
#include "dequantize.h"

#include <array>
#include <cassert>

#include "fathom/tensor.hpp"

namespace fathom {
namespace io {
namespace {

// out [n] from values of T at any alignment.
template <class T, class Convert>
void decode_plain(const void* src, int64_t n, float* out, Convert convert) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(src);
  for (int64_t i = 0; i < n; ++i) {
    T value;
    std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    out[i] = convert(value);
  }
}

void f8_e4m3(const void* src, int64_t n, float* out) noexcept {
  static constexpr auto kValues = [] {
    std::array<float, 256> values{};
    for (int code = 0; code < 256; ++code) {
      values[static_cast<size_t>(code)] = e4m3_value(static_cast<uint8_t>(code));
    }
    return values;
  }();
  decode_plain<uint8_t>(src, n, out, [](uint8_t code) { return kValues[code]; });
}

void q4_0(const BlockQ4_0& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>((b.qs[j] & 15) - 8);
    out[j + 16] = d * static_cast<float>((b.qs[j] >> 4) - 8);
  }
}

void q4_1(const BlockQ4_1& b, float* out) noexcept {
  const float d = f16_value(b.d), m = f16_value(b.m);
  for (int j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>(b.qs[j] & 15) + m;
    out[j + 16] = d * static_cast<float>(b.qs[j] >> 4) + m;
  }
}

// Code of values j and j + 16 of a Q5 block: four bits from qs, the fifth from qh.
struct Q5Codes {
  int low, high;
};

Q5Codes q5_codes(uint8_t qs, uint32_t qh, int j) noexcept {
  return {static_cast<int>((qs & 15) | (qh >> j & 1) << 4),
          static_cast<int>((qs >> 4) | (qh >> (j + 16) & 1) << 4)};
}

void q5_0(const BlockQ5_0& b, float* out) noexcept {
  const float d = f16_value(b.d);
  uint32_t qh;
  std::memcpy(&qh, b.qh, sizeof qh);
  for (int j = 0; j < 16; ++j) {
    const Q5Codes codes = q5_codes(b.qs[j], qh, j);
    out[j] = d * static_cast<float>(codes.low - 16);
    out[j + 16] = d * static_cast<float>(codes.high - 16);
  }
}

void q5_1(const BlockQ5_1& b, float* out) noexcept {
  const float d = f16_value(b.d), m = f16_value(b.m);
  uint32_t qh;
  std::memcpy(&qh, b.qh, sizeof qh);
  for (int j = 0; j < 16; ++j) {
    const Q5Codes codes = q5_codes(b.qs[j], qh, j);
    out[j] = d * static_cast<float>(codes.low) + m;
    out[j + 16] = d * static_cast<float>(codes.high) + m;
  }
}

void q8_0(const BlockQ8_0& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(b.qs[i]);
}

void mxfp4(const BlockMXFP4& b, float* out) noexcept {
  // 2^(e - 128); the two smallest exponents are subnormal f32 numbers.
  const uint32_t bits = b.e < 2 ? 0x00200000u << b.e : static_cast<uint32_t>(b.e - 1) << 23;
  const float d = std::bit_cast<float>(bits);
  for (int j = 0; j < 16; ++j) {
    out[j] = d * static_cast<float>(kMXFP4Values[b.qs[j] & 15]);
    out[j + 16] = d * static_cast<float>(kMXFP4Values[b.qs[j] >> 4]);
  }
}

// Writes digit `n` (as -d, 0 or d) of `count` bytes.
void ternary_digits(const uint8_t* bytes, int count, int n, float d, float* out) noexcept {
  constexpr uint8_t kPow3[5] = {1, 3, 9, 27, 81};
  for (int k = 0; k < count; ++k) {
    const auto fraction = static_cast<uint8_t>(bytes[k] * kPow3[n]);
    out[k] = d * static_cast<float>((fraction * 3 >> 8) - 1);
  }
}

void tq1_0(const BlockTQ1_0& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int n = 0; n < 5; ++n) ternary_digits(b.qs, 32, n, d, out + 32 * n);
  for (int n = 0; n < 5; ++n) ternary_digits(b.qs + 32, 16, n, d, out + 160 + 16 * n);
  for (int n = 0; n < 4; ++n) ternary_digits(b.qh, 4, n, d, out + 240 + 4 * n);
}

void tq2_0(const BlockTQ2_0& b, float* out) noexcept {
  const float d = f16_value(b.d);
  for (int j = 0; j < 8; ++j) {
    const uint8_t* qs = b.qs + j / 4 * 32;
    for (int k = 0; k < 32; ++k) {
      out[32 * j + k] = d * static_cast<float>((qs[k] >> (j % 4 * 2) & 3) - 1);
    }
  }
}

BlockDecoder block_decoder(DType dtype) noexcept {
  switch (dtype) {
    case DType::kQ4_0:
      return decode_blocks<BlockQ4_0, q4_0>;
    case DType::kQ4_1:
      return decode_blocks<BlockQ4_1, q4_1>;
    case DType::kQ5_0:
      return decode_blocks<BlockQ5_0, q5_0>;
    case DType::kQ5_1:
      return decode_blocks<BlockQ5_1, q5_1>;
    case DType::kQ8_0:
      return decode_blocks<BlockQ8_0, q8_0>;
    case DType::kQ2_K:
      return decode_q2_k;
    case DType::kQ3_K:
      return decode_q3_k;
    case DType::kQ4_K:
      return decode_q4_k;
    case DType::kQ5_K:
      return decode_q5_k;
    case DType::kQ6_K:
      return decode_q6_k;
    case DType::kIQ1_S:
      return decode_iq1_s;
    case DType::kIQ1_M:
      return decode_iq1_m;
    case DType::kIQ2_XXS:
      return decode_iq2_xxs;
    case DType::kIQ2_XS:
      return decode_iq2_xs;
    case DType::kIQ2_S:
      return decode_iq2_s;
    case DType::kIQ3_XXS:
      return decode_iq3_xxs;
    case DType::kIQ3_S:
      return decode_iq3_s;
    case DType::kIQ4_NL:
      return decode_iq4_nl;
    case DType::kIQ4_XS:
      return decode_iq4_xs;
    case DType::kTQ1_0:
      return decode_blocks<BlockTQ1_0, tq1_0>;
    case DType::kTQ2_0:
      return decode_blocks<BlockTQ2_0, tq2_0>;
    case DType::kMXFP4:
      return decode_blocks<BlockMXFP4, mxfp4>;
    default:
      return nullptr;
  }
}

}  // namespace
}  // namespace io

void dequantize(DType dtype, const void* src, int64_t n, float* out) noexcept {
  assert(is_weight_dtype(dtype) && n >= 0 && n % dtype_info(dtype).block_elements == 0);
  if (n == 0) return;
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out, src, static_cast<size_t>(n) * sizeof(float));
      return;
    case DType::kF16:
      return io::decode_plain<uint16_t>(src, n, out, [](uint16_t v) { return io::f16_value(v); });
    case DType::kBF16:
      return io::decode_plain<uint16_t>(src, n, out, [](uint16_t v) { return io::bf16_value(v); });
    case DType::kF64:
      return io::decode_plain<double>(src, n, out, [](double v) { return static_cast<float>(v); });
    case DType::kF8E4M3:
      return io::f8_e4m3(src, n, out);
    default:
      if (const io::BlockDecoder decode = io::block_decoder(dtype)) {
        decode(src, n / dtype_info(dtype).block_elements, out);
      }
  }
}

}  // namespace fathom
