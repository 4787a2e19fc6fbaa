// Number formats in kernels: every value of the small ones, bit for bit.
#include "cuda/numbers.cuh"

#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

#include "fathom/tensor.hpp"

namespace fathom::cuda {
namespace {

bool same(float a, float b) {
  return bits_of_float(a) == bits_of_float(b) || (std::isnan(a) && std::isnan(b));
}

TEST_CASE("pairs of FP8 codes become their values", "[cuda][numbers]") {
  int64_t n_wrong = 0;
  for (uint32_t pair = 0; pair < 65536; ++pair)
    for (const uint32_t others : {0u, 0x7e017e01u, 0x7fff0000u, 0xffffffffu}) {
      // In the lower half with others in the upper one, and the other way round.
      const uint32_t words[] = {pair | (others & 0xffff0000u), pair << 16 | (others & 0xffffu)};
      for (const uint32_t word : words) {
        float by_bits[8], v[8];
        const uint32_t codes[2] = {word, others};
        e4m3_values8_by_bits(codes, by_bits);
        e4m3_values8(codes, v);
        for (int i = 0; i < 8; ++i) {
          const float expected = e4m3_to_f32(uint8_t(codes[i / 4] >> (8 * (i % 4))));
          n_wrong += !same(by_bits[i], expected) + !same(v[i], expected);
        }
      }
    }
  CHECK(n_wrong == 0);
  CHECK(e4m3_nans(0x7f000000u) != 0);
  CHECK(e4m3_nans(0x000000ffu) != 0);
  CHECK(e4m3_nans(0x7e80fe01u) == 0);
}

TEST_CASE("16-bit numbers and back", "[cuda][numbers]") {
  int64_t n_wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = uint16_t(bits);
    n_wrong += !same(f16_value(half), f16_to_f32(half));
    n_wrong += !same(bf16_value(half), bf16_to_f32(half));
    // Values of either, and between two of them: to the nearest, ties to even.
    for (const float value :
         {f16_to_f32(half), bf16_to_f32(half), float_of_bits(bits << 16 | 0x8000),
          float_of_bits(bits << 16 | 0x1fff), float_of_bits(bits << 16 | 0x9000)}) {
      if (std::isnan(value)) continue;
      n_wrong += f16_bits(value) != f32_to_f16(value);
      n_wrong += bf16_bits(value) != f32_to_bf16(value);
      n_wrong += e4m3_bits(value) != f32_to_e4m3(value);
      n_wrong += bf16_pair(value, 1.0f) != (uint32_t{f32_to_bf16(value)} | 0x3f80u << 16);
    }
  }
  CHECK(n_wrong == 0);
}

}  // namespace
}  // namespace fathom::cuda
