// What the tests of the CPU backend share: backends for every instruction set that runs here,
// reproducible values, workspaces with guards, and comparisons that name the first difference.
#pragma once

#include <fmt/format.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/cpu_backend.h"
#include "fathom/backend.hpp"

namespace fathom::cpu_test {

// Names of the instruction sets that this machine runs, "scalar" last.
inline std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const IsaInfo& info : cpu_isas())
    if (info.available) names.push_back(info.name);
  return names;
}

inline std::unique_ptr<cpu::CpuBackend> make_backend(const std::string& isa, int threads = 2,
                                                     Numerics numerics = Numerics::kExact) {
  CpuOptions options;
  options.isa = isa;
  options.threads = threads;
  options.numerics = numerics;
  auto backend = cpu::CpuBackend::create(options);
  INFO(backend.status().message());
  REQUIRE(backend.ok());
  return std::move(backend).value();
}

inline std::vector<float> random_values(int64_t n, uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = normal(random);
  return values;
}

// Room of exactly `bytes`, 64-byte aligned, filled with NaN bytes and with guards at both ends.
class GuardedWorkspace {
 public:
  explicit GuardedWorkspace(int64_t bytes) : bytes_(bytes) {
    const size_t total = (static_cast<size_t>(bytes) + 2 * kGuard + 63) / 64 * 64;
    memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(64, total)));
    std::memset(memory_.get(), 0xff, total);
  }
  OpContext op() const { return {memory_.get() + kGuard, bytes_}; }
  bool intact() const {
    for (size_t i = 0; i < kGuard; ++i)
      if (memory_.get()[i] != 0xff ||
          memory_.get()[kGuard + static_cast<size_t>(bytes_) + i] != 0xff)
        return false;
    return true;
  }

 private:
  static constexpr size_t kGuard = 256;
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  int64_t bytes_;
  std::unique_ptr<unsigned char[], Free> memory_;
};

// Fails unless |got - expected| <= tolerance everywhere (NaN never passes).
template <class Expected>
void check_close(const std::string& what, const std::vector<float>& got,
                 const std::vector<Expected>& expected, double tolerance) {
  REQUIRE(got.size() == expected.size());
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::fabs(double(got[i]) - double(expected[i]));
    if (!(difference <= tolerance))
      FAIL(fmt::format("{}: value {} is {}, expected {} +- {}", what, i, got[i],
                       double(expected[i]), tolerance));
    worst = std::max(worst, difference);
  }
  INFO(what << ": largest difference " << worst);
  SUCCEED();
}

// Fails unless the two are the same bits.
inline void check_same_bits(const std::string& what, const std::vector<float>& got,
                            const std::vector<float>& expected) {
  REQUIRE(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i)
    if (std::memcmp(&got[i], &expected[i], sizeof(float)) != 0)
      FAIL(fmt::format("{}: value {} is {:a}, expected the bits of {:a}", what, i, got[i],
                       expected[i]));
  SUCCEED();
}

}  // namespace fathom::cpu_test
