// Random weights of every type for the tests of products: file rows, the same rows stored the
// backend's way, and their values by the reference dequantisation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "cpu/cpu_context.h"
#include "cpu/isa.h"
#include "cpu/matmul.h"
#include "cpu/matmul_kernels.h"
#include "cpu/threads.h"
#include "cpu/weight_layout.h"
#include "fathom/quant.hpp"
#include "fathom/tensor.hpp"

namespace fathom::cpu_test {

using Rng = std::mt19937;

inline std::vector<float> random_values(Rng& rng, int64_t n, float deviation = 1.0f) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = normal(rng);
  return values;
}

// One row of `cols` values: random codes with scales that keep the values near 1.
inline std::vector<uint8_t> random_row(Rng& rng, DType dtype, int64_t cols) {
  const DTypeInfo& info = dtype_info(dtype);
  std::vector<uint8_t> row(static_cast<size_t>(row_bytes(dtype, cols)));
  std::normal_distribution<float> normal;
  const auto put16 = [&](size_t at, uint16_t bits) { std::memcpy(&row[at], &bits, 2); };
  if (info.block_elements == 1) {
    for (size_t i = 0; i < static_cast<size_t>(cols); ++i) {
      const float v = normal(rng);
      switch (dtype) {
        case DType::kF32:
          std::memcpy(&row[4 * i], &v, 4);
          break;
        case DType::kF16:
          put16(2 * i, f32_to_f16(v));
          break;
        case DType::kBF16:
          put16(2 * i, f32_to_bf16(v));
          break;
        case DType::kF8E4M3:
          row[i] = f32_to_e4m3(v);
          break;
        default: {
          const double d = v;
          std::memcpy(&row[8 * i], &d, 8);
        }
      }
    }
    return row;
  }
  for (uint8_t& byte : row) byte = static_cast<uint8_t>(rng());
  std::uniform_real_distribution<float> around(0.5f, 1.5f);
  // Places of the f16 factors in a block, and what they are about.
  struct Factor {
    int at;
    float size;
  };
  std::vector<Factor> factors;
  switch (dtype) {
    case DType::kQ4_0:
      factors = {{0, 0.2f}};
      break;
    case DType::kQ4_1:
      factors = {{0, 0.2f}, {2, -1.5f}};
      break;
    case DType::kQ5_0:
      factors = {{0, 0.1f}};
      break;
    case DType::kQ5_1:
      factors = {{0, 0.1f}, {2, -1.5f}};
      break;
    case DType::kQ8_0:
      factors = {{0, 0.013f}};
      break;
    case DType::kQ2_K:
      factors = {{80, 0.1f}, {82, 0.1f}};
      break;
    case DType::kQ3_K:
      factors = {{108, 0.02f}};
      break;
    case DType::kQ4_K:
    case DType::kQ5_K:
      factors = {{0, 0.005f}, {2, 0.03f}};
      break;
    case DType::kQ6_K:
      factors = {{208, 0.0004f}};
      break;
    case DType::kTQ1_0:
      factors = {{52, 1.0f}};
      break;
    case DType::kTQ2_0:
      factors = {{64, 1.0f}};
      break;
    case DType::kIQ1_M:
      break;  // below
    case DType::kMXFP4:
      break;
    case DType::kIQ4_XS:
      factors = {{0, 0.0005f}};
      break;
    case DType::kIQ4_NL:
      factors = {{0, 0.015f}};
      break;
    default:
      factors = {{0, 0.01f}};
      break;  // IQ types
  }
  for (size_t b = 0; b < row.size(); b += static_cast<size_t>(info.block_bytes)) {
    for (const Factor& f : factors)
      put16(b + static_cast<size_t>(f.at), f32_to_f16(f.size * around(rng)));
    if (dtype == DType::kMXFP4) row[b] = static_cast<uint8_t>(125 + rng() % 3);
    if (dtype == DType::kIQ1_M)  // the top nibbles of the four scales are an f16 of about 0.02
      for (size_t i = 0; i < 4; ++i) {
        uint8_t& byte = row[b + 48 + 2 * i + 1];
        byte = static_cast<uint8_t>((byte & 15) | (i == 3 ? 0x20 : i == 2 ? 0x50 : 0));
      }
  }
  return row;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<std::byte, Free>;
inline AlignedBytes aligned_bytes(int64_t n) {
  const auto size = static_cast<size_t>((n + 63) / 64 * 64 + 64);
  AlignedBytes bytes(static_cast<std::byte*>(std::aligned_alloc(64, size)));
  REQUIRE(bytes != nullptr);
  std::memset(bytes.get(), 0xa5, size);  // what a kernel must not depend on
  return bytes;
}

// Threads that share the storing of rows.
inline cpu::ThreadPool& store_threads() {
  static const auto pool = [] {
    auto made = cpu::ThreadPool::create(2);
    REQUIRE(made.ok());
    return std::move(made.value());
  }();
  return *pool;
}

// `count` matrices [rows, cols] stored by store_rows(), with their values beside them.
struct TestWeight {
  Weight weight;
  AlignedBytes memory;
  std::vector<uint8_t> file;  // [count, rows, row_bytes]
  std::vector<float> scales;  // [count, row blocks, col blocks] when block_scaled
  std::vector<float> values;  // [count, rows, cols]

  const float* row(int64_t index, int64_t r) const {
    return values.data() + (index * weight.rows + r) * weight.cols;
  }
};

inline TestWeight random_weight(Rng& rng, DType dtype, int64_t rows, int64_t cols,
                                int64_t count = 1, bool block_scaled = false) {
  TestWeight t;
  t.weight = {
      .dtype = dtype, .block_scaled = block_scaled, .rows = rows, .cols = cols, .count = count};
  const Status status = cpu::weight_layout(t.weight);
  INFO(status.message());
  REQUIRE(status.ok());
  t.memory = aligned_bytes(t.weight.matrix_bytes * count);
  t.weight.data = t.memory.get();
  t.values.resize(static_cast<size_t>(count * rows * cols));
  for (int64_t i = 0; i < count * rows; ++i) {
    const std::vector<uint8_t> row = random_row(rng, dtype, cols);
    dequantize(dtype, row.data(), cols, t.values.data() + i * cols);
    t.file.insert(t.file.end(), row.begin(), row.end());
  }
  const int64_t row_blocks = (rows + 127) / 128, col_blocks = (cols + 127) / 128;
  for (int64_t m = 0; m < count; ++m) {
    REQUIRE(cpu::store_rows(store_threads(), t.weight, m, 0, rows,
                            t.file.data() + m * rows * row_bytes(dtype, cols))
                .ok());
    if (!block_scaled) continue;
    for (int64_t i = 0; i < row_blocks * col_blocks; ++i)
      t.scales.push_back(0.25f + 0.001f * static_cast<float>(rng() % 1000));
    const float* scales = t.scales.data() + m * row_blocks * col_blocks;
    REQUIRE(cpu::store_scales(t.weight, m, scales).ok());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c)
        t.values[static_cast<size_t>((m * rows + r) * cols + c)] *=
            scales[r / 128 * col_blocks + c / 128];
  }
  return t;
}

inline std::vector<DType> weight_dtypes() {
  std::vector<DType> types;
  for (int i = 0; i < kDTypeCount; ++i)
    if (is_weight_dtype(static_cast<DType>(i))) types.push_back(static_cast<DType>(i));
  return types;
}

// The smallest multiple of the type's block that is at least n.
inline int64_t whole_blocks(DType dtype, int64_t n) {
  const int64_t block = dtype_info(dtype).block_elements;
  return (n + block - 1) / block * block;
}

// The kernel tables that this machine runs.
inline std::vector<cpu::Isa> runnable_isas() {
  std::vector<cpu::Isa> isas;
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    const auto isa = static_cast<cpu::Isa>(i);
    if (cpu::isa_refusal(isa, cpu::cpu_features()).empty()) isas.push_back(isa);
  }
  return isas;
}

// A context with threads of its own.
struct TestContext {
  std::unique_ptr<cpu::ThreadPool> threads;
  cpu::CpuContext ctx;
};
inline TestContext make_context(cpu::Isa isa, Numerics numerics, int n_threads = 2) {
  auto pool = cpu::ThreadPool::create(n_threads);
  REQUIRE(pool.ok());
  TestContext t;
  t.threads = std::move(pool.value());
  t.ctx.threads = t.threads.get();
  t.ctx.isa = isa;
  t.ctx.numerics = numerics;
  t.ctx.matmul = &cpu::matmul_kernels(isa);
  t.ctx.f8_pairs = cpu::f8_pair_kernels(isa, numerics);
  return t;
}

// Exactly the promised number of bytes, with guards on both sides that check() looks at.
class GuardedWorkspace {
 public:
  explicit GuardedWorkspace(int64_t n) : bytes_(n), memory_(aligned_bytes(n + 2 * kGuard)) {}
  OpContext op() const { return {memory_.get() + kGuard, bytes_}; }
  void check() const {
    bool intact = true;
    for (int64_t i = 0; i < kGuard; ++i)
      intact &= memory_.get()[i] == std::byte{0xa5} &&
                memory_.get()[kGuard + bytes_ + i] == std::byte{0xa5};
    CHECK(intact);
  }

 private:
  static constexpr int64_t kGuard = 256;
  int64_t bytes_;
  AlignedBytes memory_;
};

// Tolerances of a product, relative to |x| |w|.
//   exact  f32 sums of at most some thousand rounded products
//   fast   activations rounded to 1/127 of the largest of 32, so each is wrong by up to 0.4 % of
//          that: standard deviation 0.6 % of a typical one; seven times that for the worst of many
//          sums, and the errors of K columns add up to sqrt(K) of one
inline float tolerance(bool fast, int64_t cols) {
  return fast ? 0.04f / std::sqrt(static_cast<float>(cols)) : 2e-6f;
}

inline double norm(const float* v, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(v[i]) * v[i];
  return std::sqrt(sum);
}

// What a product should give, and how far a result may be off.
struct Expected {
  std::vector<double> values, bounds;

  void add(double value, double bound) {
    values.push_back(value);
    bounds.push_back(bound);
  }
  // Names the first value that is off.
  void check(const std::vector<float>& got, const std::string& what) const {
    REQUIRE(got.size() == values.size());
    for (size_t i = 0; i < got.size(); ++i) {
      if (std::fabs(got[i] - values[i]) <= bounds[i]) continue;
      FAIL_CHECK(what << ": value " << i << " is " << got[i] << ", expected " << values[i]
                      << " within " << bounds[i]);
      return;
    }
    SUCCEED();
  }
};

inline double dot(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

}  // namespace fathom::cpu_test
