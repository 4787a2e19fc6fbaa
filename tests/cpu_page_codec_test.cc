// Cached rows in every type: values by hand, errors within the type's step, vector decoding bit by
// bit as the definition, damage visible, neighbours untouched.
#include "cpu/page_codec.h"

#include <catch2/catch.hpp>

#include "fathom/tensor.hpp"
#include "support/cpu_pages.h"
#include "support/cpu_test.h"

using namespace fathom;
using namespace fathom::cpu;
using namespace fathom::cpu_test;

namespace {

const RowType kTypes[] = {kRowF32, kRowF16, kRowBF16, kRowF8, kRowQ8_0, kRowQ4_0};
const KvType kKvTypes[] = {KvType::kF32, KvType::kF16,  KvType::kBF16,
                           KvType::kF8,  KvType::kQ8_0, KvType::kQ4_0};

int64_t row_bytes_of(RowType type, int64_t n) {
  for (size_t i = 0; i < std::size(kTypes); ++i)
    if (kTypes[i] == type) return KvLayout{1, n, 0}.latent_row_bytes(kKvTypes[i]);
  return 0;
}

// Largest error of a stored value, for values up to `largest` in its scale group.
double step_of(RowType type, double value, double largest) {
  switch (type) {
    case kRowF32:
      return 0;
    case kRowF16:
      return std::fabs(value) * std::exp2(-11) + std::exp2(-25);
    case kRowBF16:
      return std::fabs(value) * std::exp2(-8);
    // Three bits of mantissa; below 2^-6 of the code range the step is 2^-10 codes.
    case kRowF8:
      return std::fabs(value) * std::exp2(-4) * 1.001 + largest / 448 * std::exp2(-10);
    // The f16 scale is off by 2^-11 of the value, too.
    case kRowQ8_0:
      return largest / 127 * 0.501 + std::fabs(value) * std::exp2(-11);
    // ggml takes the value of the largest magnitude as code -8; the other end stops at 7.
    case kRowQ4_0:
      return largest / 8 * 1.001 + std::fabs(value) * std::exp2(-11);
    default:
      return -1;
  }
}

std::vector<std::byte> encode(const RowKernels& kernels, RowType type,
                              const std::vector<float>& values) {
  const auto n = static_cast<int64_t>(values.size());
  const auto size = static_cast<size_t>(row_bytes_of(type, n));
  std::vector<std::byte> row(size + 8, std::byte{0xab});
  for (int64_t first = 0; first < n; first += kEncodeColumns)
    encode_columns(kernels, type, values.data() + first, first, std::min(kEncodeColumns, n - first),
                   n, row.data());
  for (size_t i = size; i < row.size(); ++i) REQUIRE(row[i] == std::byte{0xab});
  return {row.begin(), row.begin() + static_cast<std::ptrdiff_t>(size)};
}

}  // namespace

TEST_CASE("types of the two planes") {
  for (size_t i = 0; i < std::size(kTypes); ++i) CHECK(latent_row_type(kKvTypes[i]) == kTypes[i]);
  CHECK(rope_row_type(KvType::kF32) == kRowF32);
  CHECK(rope_row_type(KvType::kF16) == kRowF16);
  CHECK(rope_row_type(KvType::kBF16) == kRowBF16);
  for (const KvType type : {KvType::kF8, KvType::kQ8_0, KvType::kQ4_0})
    CHECK(rope_row_type(type) == kRowF16);
}

TEST_CASE("stored values are within a step of what was written") {
  for (const int64_t n : {1, 12, 31, 32, 44, 127, 128, 129, 300, 512})
    for (const RowType type : kTypes) {
      std::vector<float> values = random_values(n, static_cast<uint32_t>(n));
      values[0] = 0;
      const std::vector<std::byte> row = encode(row_kernels(Isa::kScalar), type, values);
      std::vector<float> got(values.size());
      decode_row(type, row.data(), n, got.data());
      const int64_t group = type == kRowF8 ? 128 : 32;
      for (int64_t i = 0; i < n; ++i) {
        double largest = 0;
        for (int64_t j = i / group * group; j < std::min(n, (i / group + 1) * group); ++j)
          largest = std::max(largest, std::fabs(double(values[size_t(j)])));
        const double difference = std::fabs(double(got[size_t(i)]) - values[size_t(i)]);
        if (difference > step_of(type, values[size_t(i)], largest))
          FAIL(fmt::format("type {} n {} value {}: {} stored as {}", int(type), n, i,
                           values[size_t(i)], got[size_t(i)]));
      }
    }
}

TEST_CASE("an fp8 row by hand") {
  std::vector<float> values(130, 0.0f);
  values[0] = 448 * 2;  // scale 2
  values[1] = 2;        // code of 1
  values[2] = -4;       // code of -2
  values[128] = 44.8f;  // the second group has a scale of its own
  values[129] = -44.8f;
  const std::vector<std::byte> row = encode(row_kernels(Isa::kScalar), kRowF8, values);
  REQUIRE(row.size() == 8 + 130);
  float scales[2];
  std::memcpy(scales, row.data(), 8);
  CHECK(scales[0] == 2.0f);
  CHECK(scales[1] == 44.8f / 448);
  CHECK(row[8] == std::byte{0x7e});
  CHECK(row[9] == std::byte{0x38});
  CHECK(row[10] == std::byte{0xc0});
  CHECK(row[11] == std::byte{0});
  CHECK(row[8 + 128] == std::byte{0x7e});
  CHECK(row[8 + 129] == std::byte{0xfe});
}

TEST_CASE("every instruction set encodes the same bytes and decodes the same bits") {
  for (const int64_t n : {1, 7, 12, 16, 44, 64, 96, 129, 300, 512})
    for (const RowType type : kTypes) {
      std::vector<float> values = random_values(n, static_cast<uint32_t>(n) + 50);
      if (n > 40) {
        values[3] = 1e-7f;  // a subnormal f16
        values[4] = -0.0f;
        values[33] *= 1000;
      }
      const std::vector<std::byte> expected_row = encode(row_kernels(Isa::kScalar), type, values);
      std::vector<float> expected(values.size());
      decode_row(type, expected_row.data(), n, expected.data());
      for (const std::string& isa : runnable_isas()) {
        auto backend = make_backend(isa, 1);
        const RowKernels& kernels = *backend->context().rows;
        const std::vector<std::byte> row = encode(kernels, type, values);
        CHECK(row == expected_row);
        // Three rows that end where their memory ends (ASan watches), odd strides.
        std::vector<std::byte> rows;
        for (int i = 0; i < 3; ++i) rows.insert(rows.end(), row.begin(), row.end());
        const int64_t stride = n + 5;
        std::vector<float> got(static_cast<size_t>(3 * stride), 77.0f);
        kernels.decode({.type = type,
                        .rows = rows.data(),
                        .row_bytes = static_cast<int64_t>(row.size()),
                        .n_rows = 3,
                        .n_cols = n,
                        .out = got.data(),
                        .out_stride = stride});
        for (int64_t i = 0; i < 3; ++i) {
          check_same_bits(fmt::format("{} type {} n {} row {}", isa, int(type), n, i),
                          {got.begin() + i * stride, got.begin() + i * stride + n}, expected);
          for (int64_t j = n; j < stride; ++j) CHECK(got[size_t(i * stride + j)] == 77.0f);
        }
      }
    }
}

TEST_CASE("all 256 fp8 codes and all f16 codes decode as defined, on every instruction set") {
  for (const std::string& isa : runnable_isas()) {
    auto backend = make_backend(isa, 1);
    const RowKernels& kernels = *backend->context().rows;
    std::vector<std::byte> row(8 + 256);
    const float scales[2] = {1, 0.5f};
    std::memcpy(row.data(), scales, 8);
    for (int i = 0; i < 256; ++i) row[size_t(8 + i)] = static_cast<std::byte>(i);
    std::vector<float> got(256);
    kernels.decode({kRowF8, row.data(), 264, 1, 256, got.data(), 256});
    for (int i = 0; i < 256; ++i) {
      const float expected = e4m3_to_f32(static_cast<uint8_t>(i)) * scales[i / 128];
      if (std::isnan(expected))
        CHECK(std::isnan(got[size_t(i)]));
      else
        CHECK(got[size_t(i)] == expected);
    }
    std::vector<uint16_t> halves(65536);
    for (int i = 0; i < 65536; ++i) halves[size_t(i)] = static_cast<uint16_t>(i);
    std::vector<float> wide(65536);
    kernels.decode({kRowF16, halves.data(), 131072, 1, 65536, wide.data(), 65536});
    int wrong = 0;
    for (int i = 0; i < 65536; ++i) {
      const float expected = f16_to_f32(static_cast<uint16_t>(i));
      wrong += std::isnan(expected) ? !std::isnan(wide[size_t(i)]) : wide[size_t(i)] != expected;
    }
    CHECK(wrong == 0);
    // And back, with every rounding case that lies between two of them.
    std::vector<float> between;
    for (int i = 0; i < 0x7bff; ++i) {
      const double low = f16_to_f32(static_cast<uint16_t>(i));
      const double high = f16_to_f32(static_cast<uint16_t>(i + 1));
      for (const double part : {0.0, 0.25, 0.5, 0.75})
        between.push_back(static_cast<float>(low + (high - low) * part));
    }
    std::vector<uint16_t> packed(between.size());
    kernels.pack_f16(between.data(), static_cast<int64_t>(between.size()), packed.data());
    for (size_t i = 0; i < between.size(); ++i) wrong += packed[i] != f32_to_f16(between[i]);
    CHECK(wrong == 0);
  }
}

TEST_CASE("a NaN or infinity that is written is a NaN or infinity when read") {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (const RowType type : kTypes) {
      std::vector<float> values = random_values(200, 9);
      values[70] = bad;
      const std::vector<std::byte> row = encode(row_kernels(Isa::kScalar), type, values);
      std::vector<float> got(200);
      decode_row(type, row.data(), 200, got.data());
      CHECK_FALSE(std::isfinite(got[70]));
      CHECK(std::isfinite(got[199]));  // another scale group is not harmed
    }
}

TEST_CASE("runs of rows end with their page") {
  Pages pages(48, 40, 8, {KvType::kQ8_0, KvType::kF32}, 150, 2, 1);
  const KvRows rows = pages.rows();
  PageRun run = page_run(rows, 0, 1000);
  CHECK(run.n_rows == 48);
  CHECK(run.type == KvType::kQ8_0);
  const auto slot = static_cast<std::byte*>(pages.page(0).data) +
                    rows.layout.layer_bytes(KvType::kQ8_0);  // the second layer
  CHECK(run.latent == slot);
  CHECK(run.rope == slot + rows.layout.rope_plane_offset(KvType::kQ8_0));
  run = page_run(rows, 50, 1000);
  CHECK(run.n_rows == 46);
  CHECK(run.type == KvType::kF32);
  CHECK(run.latent == static_cast<std::byte*>(pages.page(1).data) +
                          rows.layout.layer_bytes(KvType::kF32) + 2 * 160);
  CHECK(page_run(rows, 50, 3).n_rows == 3);
}
