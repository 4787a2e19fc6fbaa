// Products of the CUDA backend against the values that the reference dequantisation gives.
#include <algorithm>

#include "cuda_test.h"

using namespace fathom;
using namespace fathom::cuda_test;
using cpu_test::dot;
using cpu_test::Expected;
using cpu_test::norm;
using cpu_test::random_weight;
using cpu_test::TestWeight;

namespace {

// Relative to |x| |w|: f32 sums, or both factors rounded to bf16 (half of 2^-8 each, averaging
// out).
double tolerance(bool rounded, int64_t cols) {
  return rounded ? 0.02 / std::sqrt(double(cols)) + 1e-3 : 2e-6;
}

// As kernels for few rows round x: each 16 values to signed bytes and a scale.
std::vector<float> rounded_to_int8(std::vector<float> x, int64_t n_rows, int64_t stride,
                                   int64_t cols) {
  for (int64_t i = 0; i < n_rows; ++i)
    for (int64_t c = 0; c < cols; c += 16) {
      float* v = x.data() + i * stride + c;
      float largest = 0;
      for (int k = 0; k < 16; ++k) largest = std::max(largest, std::fabs(v[k]));
      const float d = largest / 127.0f, inverse = d > 0 ? 1 / d : 0;
      for (int k = 0; k < 16; ++k) v[k] = d * std::rint(v[k] * inverse);
    }
  return x;
}

void check_matmul(TestGpu& gpu, Numerics numerics, const TestWeight& t, int64_t n_rows, bool add,
                  bool exact, Rng& rng, const std::string& what) {
  const auto stored = gpu.store(t);
  const int64_t rows = t.weight.rows, cols = t.weight.cols;
  const int64_t x_stride = cols + 4, out_stride = rows + 3;
  const std::vector<float> x = random_values(rng, n_rows * x_stride);
  std::vector<float> out = random_values(rng, n_rows * out_stride);
  const std::vector<float> before = out;
  const MatmulParams p{x.data(),   x_stride,   n_rows, &stored.weight,
                       out.data(), out_stride, add,    exact};
  gpu.run(p, [&](const OpContext& op) { gpu->matmul(op, p); });
  const bool fast = numerics == Numerics::kFast && !exact, rounded = fast && n_rows > 8;
  const bool int8 = fast && n_rows <= 8 && cuda::has_int8_product(t.weight.dtype);
  const std::vector<float> seen = int8 ? rounded_to_int8(x, n_rows, x_stride, cols) : x;
  Expected expected;
  for (int64_t i = 0; i < n_rows; ++i)
    for (int64_t r = 0; r < out_stride; ++r) {
      const double old = before[static_cast<size_t>(i * out_stride + r)];
      if (r >= rows) {
        expected.add(old, 0);
        continue;
      }
      const float *row = t.row(0, r), *v = seen.data() + i * x_stride;
      // Codes and minima are summed apart and cancel: a few bits of the f32 sums.
      const double share = int8 ? 2e-5 : tolerance(rounded, cols);
      expected.add((add ? old : 0) + dot(v, row, cols),
                   share * norm(v, cols) * norm(row, cols) + 1e-6);
    }
  expected.check(out, what + " rows " + std::to_string(n_rows));
}

}  // namespace

TEST_CASE("matmul with every weight type", "[cuda][products]") {
  Rng rng(61);
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const DType dtype : cuda_dtypes())
      for (const bool scaled : {false, true}) {
        if (scaled && dtype != DType::kF8E4M3) continue;
        TestGpu gpu(numerics, kOrders[rng() % 3]);
        const int64_t cols = cpu_test::whole_blocks(dtype, 260);
        const TestWeight t = random_weight(rng, dtype, 70, cols, 1, scaled);
        const std::string what =
            std::string(dtype_info(dtype).name) + (scaled ? " scaled " : " ") + name_of(numerics);
        for (const int64_t n : {0, 1, 3, 8, 9, 20})
          check_matmul(gpu, numerics, t, n, n % 2 == 1, false, rng, what);
      }
}

TEST_CASE("matmul of awkward shapes, in every order of threads", "[cuda][products]") {
  struct Shape {
    DType dtype;
    int64_t rows, cols;
  };
  const Shape shapes[] = {
      {DType::kF32, 1, 1},     {DType::kF32, 5, 7},        {DType::kBF16, 33, 76},
      {DType::kF16, 16, 9},    {DType::kQ8_0, 3, 32},      {DType::kQ4_0, 130, 96},
      {DType::kQ4_K, 17, 512}, {DType::kF8E4M3, 129, 133}, {DType::kQ6_K, 65, 256},
      {DType::kQ5_0, 9, 1056}, {DType::kQ5_K, 5, 1280},    {DType::kIQ4_XS, 2, 1024}};
  Rng rng(62);
  for (const Order order : kOrders)
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
      for (const Shape& s : shapes) {
        TestGpu gpu(numerics, order);
        const TestWeight t =
            random_weight(rng, s.dtype, s.rows, s.cols, 1, s.dtype == DType::kF8E4M3);
        const std::string what = std::string(dtype_info(s.dtype).name) + " " +
                                 std::to_string(s.rows) + " x " + std::to_string(s.cols) + " " +
                                 name_of(numerics) + " " + order_name(order);
        for (const int64_t n : {1, 2, 9, 63, 65, 130})
          check_matmul(gpu, numerics, t, n, n % 2 == 0, false, rng, what);
        check_matmul(gpu, numerics, t, 12, false, true, rng, what + " exact call");
      }
}

TEST_CASE("rows keep their bits in company of others", "[cuda][products]") {
  Rng rng(65);
  for (const DType dtype :
       {DType::kQ8_0, DType::kQ4_K, DType::kQ5_0, DType::kQ6_K, DType::kF8E4M3}) {
    TestGpu gpu(Numerics::kFast);
    const int64_t rows = 21, cols = 512;
    const auto stored = gpu.store(random_weight(rng, dtype, rows, cols));
    const auto x = random_values(rng, 8 * cols);
    std::vector<float> together(8 * rows), alone(together);
    for (const int64_t n : {1, 8}) {
      std::vector<float>& out = n == 1 ? alone : together;
      for (int64_t i = 0; i < 8; i += n) {
        const MatmulParams p{x.data() + i * cols,   cols, n, &stored.weight,
                             out.data() + i * rows, rows};
        gpu.run(p, [&](const OpContext& op) { gpu->matmul(op, p); });
      }
    }
    INFO(dtype_info(dtype).name);
    CHECK(together == alone);
  }
}

TEST_CASE("what is no number does not become one by rounding", "[cuda][products]") {
  Rng rng(66);
  TestGpu gpu(Numerics::kFast);
  const auto stored = gpu.store(random_weight(rng, DType::kQ4_0, 5, 96));
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    auto x = random_values(rng, 2 * 96);
    x[96 + 37] = bad;  // in the second row
    std::vector<float> out(10);
    const MatmulParams p{x.data(), 96, 2, &stored.weight, out.data(), 5};
    gpu.run(p, [&](const OpContext& op) { gpu->matmul(op, p); });
    for (size_t i = 0; i < 10; ++i) CHECK(std::isfinite(out[i]) == (i < 5));
  }
}

TEST_CASE("large chunks go to the library, panel by panel", "[cuda][products]") {
  Rng rng(63);
  TestGpu gpu(Numerics::kExact);
  // More values than a panel holds: two panels, the second partial.
  const TestWeight t = random_weight(rng, DType::kQ8_0, 260, 32 * 1024, 1);
  const int64_t before = gpu.device().gemms();
  check_matmul(gpu, Numerics::kExact, t, 9, true, false, rng, "panels");
  CHECK(gpu.device().gemms() - before == 2);
}

TEST_CASE("matrices per head, straight and turned", "[cuda][products]") {
  Rng rng(64);
  struct Shape {
    DType dtype;
    int64_t heads, rows, cols;
  };
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const Shape& s : {Shape{DType::kF32, 3, 20, 36}, Shape{DType::kQ8_0, 2, 40, 64},
                           Shape{DType::kBF16, 5, 17, 300}, Shape{DType::kQ4_K, 1, 12, 256}}) {
      TestGpu gpu(numerics, kOrders[rng() % 3]);
      const TestWeight t = random_weight(rng, s.dtype, s.rows, s.cols, s.heads);
      const auto stored = gpu.store(t);
      for (const bool transposed : {false, true})
        for (const int64_t n : {1, 2, 5, 11, 32}) {
          const int64_t in = transposed ? s.rows : s.cols, out_n = transposed ? s.cols : s.rows;
          const std::vector<float> x = random_values(rng, n * s.heads * (in + 2));
          std::vector<float> out(static_cast<size_t>(n * s.heads * (out_n + 1)), -5.0f);
          const HeadsMatmulParams p{.x = x.data(),
                                    .x_token_stride = s.heads * (in + 2),
                                    .x_head_stride = in + 2,
                                    .n_tokens = n,
                                    .w = &stored.weight,
                                    .transposed = transposed,
                                    .out = out.data(),
                                    .out_token_stride = s.heads * (out_n + 1),
                                    .out_head_stride = out_n + 1};
          gpu.run(p, [&](const OpContext& op) { gpu->heads_matmul(op, p); });
          const bool rounded = numerics == Numerics::kFast && !transposed && n > 8;
          Expected expected;
          std::vector<float> column(static_cast<size_t>(in));
          for (int64_t i = 0; i < n; ++i)
            for (int64_t h = 0; h < s.heads; ++h)
              for (int64_t r = 0; r <= out_n; ++r) {
                if (r == out_n) {
                  expected.add(-5, 0);
                  continue;
                }
                for (int64_t c = 0; c < in; ++c)
                  column[static_cast<size_t>(c)] = transposed ? t.row(h, c)[r] : t.row(h, r)[c];
                const float* v = x.data() + (i * s.heads + h) * (in + 2);
                expected.add(dot(v, column.data(), in),
                             tolerance(rounded, in) * norm(v, in) * norm(column.data(), in) + 1e-6);
              }
          expected.check(out, std::string(dtype_info(s.dtype).name) +
                                  (transposed ? " turned " : " ") + name_of(numerics) + " tokens " +
                                  std::to_string(n));
        }
    }
}

TEST_CASE("types without kernels are refused by name", "[cuda][products]") {
  TestGpu gpu(Numerics::kFast);
  for (const DType dtype : cpu_test::weight_dtypes()) {
    Weight w{.dtype = dtype, .rows = 16, .cols = 256};
    const Status status = gpu->weight_layout(w);
    const bool known = cuda::block_shape(dtype) != nullptr;
    CHECK(status.ok() == known);
    if (!known) {
      CHECK(status.code() == Code::kUnsupported);
      CHECK(status.message().find(dtype_info(dtype).name) != std::string_view::npos);
    }
  }
  Weight odd{.dtype = DType::kQ4_K, .rows = 16, .cols = 100};
  CHECK(gpu->weight_layout(odd).code() == Code::kInvalidArgument);
}

TEST_CASE("workspace of products never falls with the rows", "[cuda][products]") {
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const DType dtype : {DType::kBF16, DType::kQ4_K, DType::kF32}) {
      TestGpu gpu(numerics);
      Weight w{.dtype = dtype, .rows = 1408, .cols = 2048};
      REQUIRE(gpu->weight_layout(w).ok());
      Weight down{.dtype = dtype, .rows = 2048, .cols = 1536, .count = 1};
      REQUIRE(gpu->weight_layout(down).ok());
      int64_t most = 0, most_ffn = 0, most_experts = 0;
      for (int64_t n = 1; n < 9000; n += n < 200 ? 1 : 97) {
        const int64_t bytes =
            gpu->workspace_bytes(MatmulParams{nullptr, 2048, n, &w, nullptr, 1408});
        const int64_t ffn =
            gpu->workspace_bytes(FfnParams{nullptr, n, &w, &w, &down, nullptr, true});
        const int64_t experts = gpu->workspace_bytes(
            ExpertsParams{nullptr, n, nullptr, nullptr, 6, &w, &w, &down, nullptr});
        CHECK(bytes >= most);
        CHECK(ffn >= most_ffn);
        CHECK(experts >= most_experts);
        most = bytes, most_ffn = ffn, most_experts = experts;
      }
    }
}
