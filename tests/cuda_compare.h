// What results of the CUDA backend are compared with, and how.
#pragma once

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cpu/cpu_backend.h"

namespace fathom::cuda_test {

inline std::unique_ptr<cpu::CpuBackend> make_scalar() {
  CpuOptions options;
  options.isa = "scalar";
  options.threads = 1;
  options.numerics = Numerics::kExact;
  auto backend = cpu::CpuBackend::create(options);
  REQUIRE(backend.ok());
  return std::move(backend).value();
}

// Every |got - expected| <= tolerance, NaN never.
inline void check_close(const std::string& what, const std::vector<float>& got,
                        const std::vector<float>& expected, double tolerance) {
  REQUIRE(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::fabs(double(got[i]) - expected[i]) <= tolerance) continue;
    FAIL_CHECK(what << ": value " << i << " is " << got[i] << ", expected " << expected[i] << " +- "
                    << tolerance);
    return;
  }
  SUCCEED();
}

inline double size_of(const std::vector<float>& v) {
  double most = 0;
  for (const float x : v) most = std::max(most, std::fabs(double(x)));
  return most;
}

}  // namespace fathom::cuda_test
