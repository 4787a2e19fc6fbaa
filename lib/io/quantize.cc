// Reference quantisers of the row formats that a cache can have.  Bit-exact to ggml's
// quantize_row_q8_0_ref and quantize_row_q4_0_ref for finite input.
#include <cmath>
#include <cstring>

#include "fathom/quant.hpp"
#include "fathom/tensor.hpp"

namespace fathom {
namespace {

constexpr uint16_t kF16NaN = 0x7e00;

// The value of largest magnitude, sign kept, the first of equals; NaN if any of x is not finite.
float extreme(const float* x, int n) noexcept {
  float at = 0;
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return std::nanf("");
    if (std::fabs(x[i]) > std::fabs(at)) at = x[i];
  }
  return at;
}

// 1 / d, or 0 where that is no finite number (d is 0, or far below what f16 can hold).
float inverse(float d) noexcept {
  const float id = d != 0 ? 1.0f / d : 0.0f;
  return std::isfinite(id) ? id : 0.0f;
}

}  // namespace

void quantize_q8_0(const float* x, int64_t n, void* out) noexcept {
  auto* dst = static_cast<unsigned char*>(out);
  for (int64_t at = 0; at < n; at += 32, x += 32, dst += sizeof(BlockQ8_0)) {
    BlockQ8_0 block{};
    const float d = std::fabs(extreme(x, 32)) / 127.0f;
    if (std::isnan(d)) {
      block.d = kF16NaN;
    } else {
      block.d = f32_to_f16(d);
      const float id = inverse(d);
      for (int i = 0; i < 32; ++i) block.qs[i] = static_cast<int8_t>(std::round(x[i] * id));
    }
    std::memcpy(dst, &block, sizeof block);
  }
}

void quantize_q4_0(const float* x, int64_t n, void* out) noexcept {
  // Codes are 0..15 around 8; the extreme value becomes code 0, which is exactly -8 d.
  const auto code = [](float scaled) {
    const int q = static_cast<int>(scaled + 8.5f);
    return static_cast<uint8_t>(q < 15 ? q : 15);
  };
  auto* dst = static_cast<unsigned char*>(out);
  for (int64_t at = 0; at < n; at += 32, x += 32, dst += sizeof(BlockQ4_0)) {
    BlockQ4_0 block{};
    const float d = extreme(x, 32) / -8.0f;
    if (std::isnan(d)) {
      block.d = kF16NaN;
    } else {
      block.d = f32_to_f16(d);
      const float id = inverse(d);
      for (int j = 0; j < 16; ++j) {
        block.qs[j] = static_cast<uint8_t>(code(x[j] * id) | code(x[16 + j] * id) << 4);
      }
    }
    std::memcpy(dst, &block, sizeof block);
  }
}

void quantize_f8_e4m3(const float* x, int64_t n, void* out) noexcept {
  auto* dst = static_cast<uint8_t*>(out);
  for (int64_t i = 0; i < n; ++i) dst[i] = f32_to_e4m3(x[i]);
}

}  // namespace fathom
