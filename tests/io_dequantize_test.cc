// Element types: the table, the conversions of single values (exhaustive over 16-bit codes),
// dequantize() against gguf-py bit for bit, and the reference quantisers.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "fathom/quant.hpp"
#include "fathom/tensor.hpp"
#include "lib/io/tensor_file.h"
#include "support/golden.h"

using namespace fathom;

namespace {

// ---- small floating-point formats, by their definition ----

// sign | exponent | mantissa, IEEE subnormals.  `all_ones_is_special`: the top exponent holds
// infinity and NaN; otherwise only the code of all ones is NaN (E4M3).
struct SmallFormat {
  int exponent_bits, mantissa_bits;
  bool all_ones_is_special;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t sign_bit() const { return 1u << (exponent_bits + mantissa_bits); }
  // The largest finite code without sign.
  uint32_t max_code() const {
    const uint32_t top = sign_bit() - 1;
    return all_ones_is_special ? top - (1u << mantissa_bits) : top - 1;
  }
  double value(uint32_t code) const {  // of finite codes
    const uint32_t exponent = (code & (sign_bit() - 1)) >> mantissa_bits;
    const uint32_t mantissa = code & ((1u << mantissa_bits) - 1);
    const double magnitude = exponent == 0
                                 ? std::ldexp(mantissa, 1 - bias() - mantissa_bits)
                                 : std::ldexp(mantissa + (1u << mantissa_bits),
                                              static_cast<int>(exponent) - bias() - mantissa_bits);
    return (code & sign_bit()) != 0 ? -magnitude : magnitude;
  }
};

constexpr SmallFormat kF16Format{5, 10, true};
constexpr SmallFormat kBF16Format{8, 7, true};
constexpr SmallFormat kE4M3Format{4, 3, false};

// Every finite code decodes to its value and encodes back; every midpoint of two neighbours goes
// to the even code, and the f32 numbers beside the midpoint to the nearer one.
template <class Decode, class Encode>
void check_format(const SmallFormat& format, Decode decode, Encode encode) {
  int failures = 0;
  const auto expect = [&](bool good, const char* what, uint32_t code) {
    if (!good && ++failures < 10) FAIL_CHECK(what << " is wrong at code " << code);
  };
  for (uint32_t sign : {0u, format.sign_bit()}) {
    for (uint32_t magnitude = 0; magnitude <= format.max_code(); ++magnitude) {
      const uint32_t code = sign | magnitude;
      const auto value = static_cast<float>(format.value(code));
      expect(decode(code) == value && std::signbit(decode(code)) == (sign != 0), "decoding", code);
      expect(encode(value) == code, "encoding", code);
      if (magnitude == format.max_code()) break;
      const double mid = (format.value(code) + format.value(code + 1)) / 2;
      const auto midpoint = static_cast<float>(mid);
      if (static_cast<double>(midpoint) != mid) continue;  // below the smallest f32
      expect(encode(midpoint) == (code % 2 == 0 ? code : code + 1), "a tie", code);
      expect(encode(std::nextafterf(midpoint, value)) == code, "rounding toward zero", code);
      const auto next = static_cast<float>(format.value(code + 1));
      expect(encode(std::nextafterf(midpoint, next)) == code + 1, "rounding away from zero", code);
    }
  }
  CHECK(failures == 0);
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::string hex(const void* data, size_t n) {
  std::string text;
  for (size_t i = 0; i < n; ++i) {
    const unsigned byte = static_cast<const unsigned char*>(data)[i];
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

}  // namespace

TEST_CASE("dtype table: names are unique, sizes are those of the blocks") {
  std::set<std::string_view> names;
  for (int i = 0; i < kDTypeCount; ++i) {
    const DTypeInfo& info = dtype_info(static_cast<DType>(i));
    CHECK(names.insert(info.name).second);
    CHECK(info.block_elements > 0);
    CHECK(info.block_bytes > 0);
  }
  CHECK(dtype_info(DType::kF8E4M3).name == "F8_E4M3");
  CHECK(row_bytes(DType::kF32, 7) == 28);
  CHECK(row_bytes(DType::kQ8_0, 2048) == 2048 / 32 * 34);
  CHECK(row_bytes(DType::kQ4_K, 7168) == 7168 / 256 * 144);
  CHECK(row_bytes(DType::kMXFP4, 64) == 34);
  CHECK(row_bytes(DType::kQ6_K, 0) == 0);
  for (const DType dtype :
       {DType::kI8, DType::kI16, DType::kI32, DType::kI64, DType::kQ8_1, DType::kQ8_K}) {
    CHECK_FALSE(is_weight_dtype(dtype));
  }
  CHECK(is_weight_dtype(DType::kF64));
  CHECK(is_weight_dtype(DType::kIQ1_M));
}

TEST_CASE("dequantize: bit-exact to gguf-py for every type of blocks.gguf, aligned or not") {
  auto source = io::open_file(test::test_data("quant/blocks.gguf"));
  REQUIRE(source.ok());
  auto blocks = io::TensorFile::parse_gguf(std::move(source).value());
  INFO(blocks.status().message());
  REQUIRE(blocks.ok());
  const test::Golden golden =
      test::Golden::load(test::test_data("quant/blocks.golden.safetensors"));
  REQUIRE(blocks->tensors().size() == golden.tensors().size());
  std::set<DType> seen;
  for (const io::TensorInfo& rows : blocks->tensors()) {
    const std::span<const float> expected = golden.f32(rows.name);
    REQUIRE(static_cast<int64_t>(expected.size()) == rows.elements());
    REQUIRE(rows.name.substr(5) == dtype_info(rows.dtype).name);
    for (size_t shift : {0u, 1u, 3u}) {
      std::vector<std::byte> bytes(static_cast<size_t>(rows.bytes) + shift);
      REQUIRE(blocks->read(rows, 0, std::span(bytes).subspan(shift)).ok());
      std::vector<float> got(expected.size(), -12345.0f);
      dequantize(rows.dtype, bytes.data() + shift, rows.elements(), got.data());
      INFO(rows.name << ", source shifted by " << shift);
      CHECK(test::describe(test::first_bit_difference(expected, got)) == "none");
    }
    seen.insert(rows.dtype);
  }
  // The plain types that the file lacks have cases of their own below.
  for (int i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    if (dtype == DType::kF32 || dtype == DType::kF64 || dtype == DType::kF8E4M3) continue;
    INFO(dtype_info(dtype).name);
    CHECK(seen.count(dtype) == (is_weight_dtype(dtype) ? 1 : 0));
  }
}

TEST_CASE("dequantize: plain types, and zero values") {
  float got[3] = {9, 9, 9};
  const float f32[3] = {1.5f, -0.0f, kInfinity};
  dequantize(DType::kF32, f32, 3, got);
  CHECK(std::memcmp(got, f32, sizeof f32) == 0);

  const double f64[3] = {0.1, -1e-300, 1e300};
  dequantize(DType::kF64, f64, 3, got);
  CHECK(got[0] == 0.1f);
  CHECK((got[1] == 0.0f && std::signbit(got[1])));
  CHECK(got[2] == kInfinity);

  const uint8_t f8[3] = {0x38, 0xfe, 0x01};
  dequantize(DType::kF8E4M3, f8, 3, got);
  CHECK(got[0] == 1.0f);
  CHECK(got[1] == -448.0f);
  CHECK(got[2] == std::ldexp(1.0f, -9));

  got[0] = 7;
  dequantize(DType::kQ4_K, nullptr, 0, got);
  CHECK(got[0] == 7);
}

TEST_CASE("dequantize: MXFP4 exponents at the ends of their range") {
  for (const int e : {0, 1, 2, 127, 254}) {
    BlockMXFP4 block{};
    block.e = static_cast<uint8_t>(e);
    block.qs[0] = 0xf1;  // value 0: 1, value 16: -12
    float got[32];
    dequantize(DType::kMXFP4, &block, 32, got);
    INFO("e = " << e);
    CHECK(got[0] == std::ldexp(1.0f, e - 128));
    CHECK(got[16] == std::ldexp(-12.0f, e - 128));
    CHECK(got[1] == 0.0f);
  }
}

TEST_CASE("f16: all codes, all ties, overflow and NaN") {
  check_format(
      kF16Format, [](uint32_t code) { return f16_to_f32(static_cast<uint16_t>(code)); },
      [](float value) { return static_cast<uint32_t>(f32_to_f16(value)); });
  CHECK(f16_to_f32(0x7c00) == kInfinity);
  CHECK(f16_to_f32(0xfc00) == -kInfinity);
  CHECK(f32_to_f16(kInfinity) == 0x7c00);
  CHECK(f32_to_f16(-kInfinity) == 0xfc00);
  CHECK(f32_to_f16(std::nextafterf(65520.0f, 0.0f)) == 0x7bff);
  CHECK(f32_to_f16(65520.0f) == 0x7c00);
  CHECK(f32_to_f16(-3e38f) == 0xfc00);
  CHECK(f32_to_f16(1e-30f) == 0);
  CHECK(f32_to_f16(from_bits(1)) == 0);
  CHECK(f32_to_f16(from_bits(0x80000001)) == 0x8000);
  for (uint32_t code = 0x7c01; code <= 0x7fff; ++code) {
    for (const uint32_t sign : {0u, 0x8000u}) {
      const float value = f16_to_f32(static_cast<uint16_t>(sign | code));
      REQUIRE(std::isnan(value));
      REQUIRE(std::signbit(value) == (sign != 0));
      REQUIRE(f32_to_f16(value) == (sign | code | 0x200));  // quiet, payload kept
    }
  }
  CHECK((f32_to_f16(from_bits(0x7f800001)) & 0x7fff) > 0x7c00);  // payload below f16's bits
}

TEST_CASE("bf16: all codes, all ties, overflow and NaN") {
  check_format(
      kBF16Format, [](uint32_t code) { return bf16_to_f32(static_cast<uint16_t>(code)); },
      [](float value) { return static_cast<uint32_t>(f32_to_bf16(value)); });
  CHECK(bf16_to_f32(0x7f80) == kInfinity);
  CHECK(f32_to_bf16(-kInfinity) == 0xff80);
  CHECK(f32_to_bf16(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(f32_to_bf16(from_bits(0x7f7f7fff)) == 0x7f7f);
  CHECK(f32_to_bf16(from_bits(0x7f7f8000)) == 0x7f80);
  for (uint32_t code = 0x7f81; code <= 0x7fff; ++code) {
    REQUIRE(std::isnan(bf16_to_f32(static_cast<uint16_t>(code))));
    REQUIRE(f32_to_bf16(from_bits(code << 16)) == (code | 0x40));
  }
  CHECK((f32_to_bf16(from_bits(0xff800001)) & 0x7fff) > 0x7f80);
}

TEST_CASE("e4m3: all codes, all ties, saturation and NaN") {
  check_format(
      kE4M3Format, [](uint32_t code) { return e4m3_to_f32(static_cast<uint8_t>(code)); },
      [](float value) { return static_cast<uint32_t>(f32_to_e4m3(value)); });
  CHECK(std::isnan(e4m3_to_f32(0x7f)));
  CHECK(std::isnan(e4m3_to_f32(0xff)));
  CHECK(f32_to_e4m3(std::nanf("")) == 0x7f);
  CHECK(f32_to_e4m3(-std::nanf("")) == 0xff);
  for (const float large : {448.0f, 449.0f, 464.0f, 1e30f, kInfinity}) {
    CHECK(f32_to_e4m3(large) == 0x7e);
    CHECK(f32_to_e4m3(-large) == 0xfe);
  }
  CHECK(f32_to_e4m3(1e-30f) == 0);
  CHECK(f32_to_e4m3(-1e-30f) == 0x80);
}

TEST_CASE("quantize: the bytes that gguf-py writes") {
  // a[i] = (37 i mod 64 - 29) / 8,  b[i] = (23 i mod 61 - 40) / 32 with b[7] = 0;
  // expected: gguf.quants.quantize(x, Q8_0 | Q4_0), gguf 0.17.
  float x[64];
  for (int i = 0; i < 32; ++i) {
    x[i] = static_cast<float>(i * 37 % 64 - 29) / 8.0f;
    x[32 + i] = i == 7 ? 0.0f : static_cast<float>(i * 23 % 61 - 40) / 32.0f;
  }
  unsigned char out[69];
  quantize_q8_0(x, 64, out + 1);  // an odd address on purpose
  CHECK(hex(out + 1, 34) == "4928941eb943de69049f29c44eea740faa34cf5af57f1ab540db65009b25c04be670");
  CHECK(hex(out + 35, 34) ==
        "0a2181ca139ae32cb40084cd169ee730b70087d019a1ea33ba038bd41da4ed36bd06");
  quantize_q4_0(x, 64, out + 1);
  CHECK(hex(out + 1, 18) == "40b8bf269c046ad148ae258ce369c137ad15");
  CHECK(hex(out + 19, 18) == "00310055a92276bb43881055a92276bb4388");
}

TEST_CASE("quantize: a round trip stays within half a step") {
  constexpr int kN = 32 * 64;
  std::vector<float> x(kN), back(kN);
  uint32_t state = 1;
  for (int i = 0; i < kN; ++i) {
    state = state * 1664525u + 1013904223u;
    const float unit = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    x[static_cast<size_t>(i)] = std::ldexp(unit, i / 32 % 24 - 12);  // 2^-12 .. 2^11 by block
  }
  struct Case {
    void (*quantize)(const float*, int64_t, void*) noexcept;
    DType dtype;
    float steps_at_extreme;  // |largest value| / d
    float slack;             // of the step: rounding of d to f16, and Q4_0's clipped code 16
  };
  for (const Case& c : {Case{quantize_q8_0, DType::kQ8_0, 127, 0.57f},
                        Case{quantize_q4_0, DType::kQ4_0, 8, 1.01f}}) {
    std::vector<std::byte> bytes(static_cast<size_t>(row_bytes(c.dtype, kN)));
    c.quantize(x.data(), kN, bytes.data());
    dequantize(c.dtype, bytes.data(), kN, back.data());
    for (int block = 0; block < kN / 32; ++block) {
      float extreme = 0;
      for (int i = 0; i < 32; ++i) {
        extreme = std::max(extreme, std::fabs(x[static_cast<size_t>(32 * block + i)]));
      }
      // d is rounded to f16, whose unit is at least 2^-24.
      const float bound = extreme / c.steps_at_extreme * c.slack + std::ldexp(127.0f, -25);
      const auto at = static_cast<size_t>(32 * block);
      const test::Difference worst =
          test::max_abs_diff(std::span(x).subspan(at, 32), std::span(back).subspan(at, 32));
      INFO(dtype_info(c.dtype).name << " block " << block << ": " << test::describe(worst));
      CHECK(worst.value <= bound);
    }
  }
}

TEST_CASE("quantize: zeros, tiny values, infinities and NaN") {
  float x[32] = {}, back[32];
  unsigned char bytes[34];
  quantize_q8_0(x, 32, bytes);
  dequantize(DType::kQ8_0, bytes, 32, back);
  CHECK(test::describe(test::max_abs_diff(x, back)) == "none");

  for (float& value : x) value = from_bits(3);  // subnormal: 1 / d is infinite
  quantize_q8_0(x, 32, bytes);
  dequantize(DType::kQ8_0, bytes, 32, back);
  for (const float value : back) CHECK(value == 0.0f);
  quantize_q4_0(x, 32, bytes);
  dequantize(DType::kQ4_0, bytes, 32, back);
  for (const float value : back) CHECK(value == 0.0f);

  for (const float bad : {kInfinity, -kInfinity, std::nanf("")}) {
    for (float& value : x) value = 1.0f;
    x[13] = bad;
    quantize_q8_0(x, 32, bytes);
    dequantize(DType::kQ8_0, bytes, 32, back);
    for (const float value : back) CHECK(std::isnan(value));
    quantize_q4_0(x, 32, bytes);
    dequantize(DType::kQ4_0, bytes, 32, back);
    for (const float value : back) CHECK(std::isnan(value));
  }
}

TEST_CASE("quantize: F8_E4M3 rows are single conversions") {
  const float x[4] = {1.0f, -500.0f, 0.3f, std::nanf("")};
  uint8_t codes[4];
  quantize_f8_e4m3(x, 4, codes);
  for (int i = 0; i < 4; ++i) CHECK(codes[i] == f32_to_e4m3(x[i]));
  CHECK(codes[1] == 0xfe);
}
