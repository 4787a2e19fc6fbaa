// RMS norm on every instruction set against the formula in double precision.
#include <catch2/catch.hpp>

#include "support/cpu_test.h"

using namespace fathom;
using namespace fathom::cpu_test;

TEST_CASE("rms_norm equals its formula, for odd widths, strides and in place") {
  for (const int64_t n_cols : {1, 7, 8, 15, 16, 17, 44, 63, 512, 1536, 7168})
    for (const int64_t n_rows : {0, 1, 3, 40}) {
      const int64_t x_stride = n_cols + 3, out_stride = n_cols + 1;
      const std::vector<float> x = random_values(n_rows * x_stride + 1, 1, 3);
      const std::vector<float> weight = random_values(n_cols, 2);
      const float eps = 1e-6f;
      std::vector<double> expected;
      for (int64_t row = 0; row < n_rows; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < n_cols; ++i)
          sum += double(x[size_t(row * x_stride + i)]) * x[size_t(row * x_stride + i)];
        const double factor = 1 / std::sqrt(sum / double(n_cols) + double(eps));
        for (int64_t i = 0; i < n_cols; ++i)
          expected.push_back(x[size_t(row * x_stride + i)] * factor * weight[size_t(i)]);
      }
      for (const std::string& isa : runnable_isas()) {
        auto backend = make_backend(isa);
        const std::string what = fmt::format("{}: {} x {}", isa, n_rows, n_cols);
        std::vector<float> out(static_cast<size_t>(n_rows * out_stride), 55.0f), got;
        backend->rms_norm({}, {.x = x.data(),
                               .x_stride = x_stride,
                               .weight = weight.data(),
                               .eps = eps,
                               .n_rows = n_rows,
                               .n_cols = n_cols,
                               .out = out.data(),
                               .out_stride = out_stride});
        std::vector<float> in_place = x, got_in_place;
        backend->rms_norm({}, {.x = in_place.data(),
                               .x_stride = x_stride,
                               .weight = weight.data(),
                               .eps = eps,
                               .n_rows = n_rows,
                               .n_cols = n_cols,
                               .out = in_place.data(),
                               .out_stride = x_stride});
        for (int64_t row = 0; row < n_rows; ++row) {
          got.insert(got.end(), out.begin() + row * out_stride,
                     out.begin() + row * out_stride + n_cols);
          got_in_place.insert(got_in_place.end(), in_place.begin() + row * x_stride,
                              in_place.begin() + row * x_stride + n_cols);
          CHECK(out[size_t(row * out_stride + n_cols)] == 55.0f);
        }
        // Values up to 16: two roundings of the result, one of the factor.
        check_close(what, got, expected, 16 * 4e-7);
        check_same_bits(what + ", in place", got_in_place, got);
      }
    }
}

TEST_CASE("rms_norm of zeros is zero, and tiny values keep their digits") {
  for (const std::string& isa : runnable_isas()) {
    auto backend = make_backend(isa, 1);
    std::vector<float> x(100, 0.0f), weight(100, 2.0f), out(100, 9.0f);
    const RmsNormParams p{.x = x.data(),
                          .x_stride = 100,
                          .weight = weight.data(),
                          .eps = 1e-6f,
                          .n_rows = 1,
                          .n_cols = 100,
                          .out = out.data(),
                          .out_stride = 100};
    backend->rms_norm({}, p);
    for (const float v : out) CHECK(v == 0.0f);
    x.assign(100, 1e-3f);  // mean square 1e-6, as much as eps
    backend->rms_norm({}, p);
    for (const float v : out) CHECK(v == Approx(2 / std::sqrt(2.0)).epsilon(1e-5));
  }
}
