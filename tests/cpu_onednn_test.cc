// bf16 products: rounding of activations, oneDNN where it serves, and that matmul uses it then.
#include "cpu_weights.h"

#include <fstream>
#include <limits>

#include "cpu/gemm_onednn.h"

using namespace fathom;
using namespace fathom::cpu_test;

TEST_CASE("activations become bf16 as the reference says", "[cpu][onednn]") {
  Rng rng(51);
  std::vector<float> x = random_values(rng, 103);
  const float special[] = {0.0f,
                           -0.0f,
                           1e-40f,
                           -1e-40f,
                           3.4e38f,
                           1.00390625f,
                           1.01171875f,
                           1e30f,
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity()};
  std::copy(std::begin(special), std::end(special), x.begin() + 5);
  uint32_t nan_bits[] = {0x7fc00000, 0x7fffffff, 0xffffffff, 0x7f800001};
  std::memcpy(&x[40], nan_bits, sizeof nan_bits);
  for (const cpu::Isa isa : runnable_isas()) {
    std::vector<uint16_t> got(x.size() + 1, 0x1234);
    cpu::matmul_kernels(isa).to_bf16(x.data(), static_cast<int64_t>(x.size()), got.data());
    INFO(cpu::matmul_kernels(isa).name);
    for (size_t i = 0; i < x.size(); ++i) {
      INFO("value " << i);
      if (std::isnan(x[i]))
        CHECK(std::isnan(bf16_to_f32(got[i])));
      else
        CHECK(got[i] == f32_to_bf16(x[i]));
    }
    CHECK(got.back() == 0x1234);
  }
}

TEST_CASE("a product that oneDNN takes is right, one that it refuses says so", "[cpu][onednn]") {
  CHECK((cpu::onednn_refusal()[0] == '\0') == cpu::onednn_serves_bf16());
  for (const auto& [rows, cols, k] :
       {std::tuple{1, 16, 32}, std::tuple{33, 20, 44}, std::tuple{128, 256, 512}}) {
    const cpu::Bf16Gemm gemm(rows, cols, k);
    if (gemm.refused()) {
      CHECK(gemm.scratch_bytes() == 0);
      continue;
    }
    Rng rng(52);
    const TestWeight x = random_weight(rng, DType::kBF16, rows, k);
    const TestWeight w = random_weight(rng, DType::kBF16, cols, k);
    std::vector<float> out(static_cast<size_t>(rows * cols));
    const GuardedWorkspace space(gemm.scratch_bytes());
    REQUIRE(gemm.run(reinterpret_cast<const uint16_t*>(x.memory.get()),
                     reinterpret_cast<const uint16_t*>(w.memory.get()), out.data(),
                     static_cast<std::byte*>(space.op().workspace)));
    space.check();
    Expected expected;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < cols; ++c)
        expected.add(dot(x.row(0, i), w.row(0, c), k),
                     tolerance(false, k) * norm(x.row(0, i), k) * norm(w.row(0, c), k) + 1e-6);
    expected.check(out, "oneDNN " + std::to_string(rows) + " x " + std::to_string(cols));
  }
}

// What matmul gives for n_rows rows with every number of threads, and what it should.
void check_matmul(cpu::Isa isa, Numerics numerics, int64_t n_rows) {
  std::vector<float> first;
  for (const int n_threads : {1, 3}) {
    const TestContext test = make_context(isa, numerics, n_threads);
    Rng rng(53);
    const int64_t rows = 300, cols = 256;
    const TestWeight t = random_weight(rng, DType::kBF16, rows, cols);
    const std::vector<float> x = random_values(rng, n_rows * cols);
    std::vector<float> out(static_cast<size_t>(n_rows * rows), 1.0f);
    const MatmulParams p{.x = x.data(),
                         .x_stride = cols,
                         .n_rows = n_rows,
                         .w = &t.weight,
                         .out = out.data(),
                         .out_stride = rows,
                         .add = true};
    const GuardedWorkspace space(cpu::workspace_bytes(test.ctx, p));
    cpu::matmul(test.ctx, space.op(), p);
    space.check();
    const bool rounded = numerics == Numerics::kFast && isa >= cpu::Isa::kAvx512 &&
                         !cpu::Bf16Gemm(128, 256, cols).refused();
    // A last block of few rows is computed in f32.
    const int64_t n_rounded = !rounded ? 0 : n_rows % 128 < 64 ? n_rows / 128 * 128 : n_rows;
    std::vector<float> used = x;
    for (int64_t i = 0; i < n_rounded * cols; ++i)
      used[static_cast<size_t>(i)] = bf16_to_f32(f32_to_bf16(used[static_cast<size_t>(i)]));
    Expected expected;
    for (int64_t i = 0; i < n_rows; ++i)
      for (int64_t c = 0; c < rows; ++c)
        expected.add(
            1 + dot(used.data() + i * cols, t.row(0, c), cols),
            tolerance(false, cols) * norm(x.data() + i * cols, cols) * norm(t.row(0, c), cols) +
                1e-6);
    expected.check(out, std::string(test.ctx.matmul->name) + (rounded ? " bf16 " : " f32 ") +
                            std::to_string(n_rows) + " rows");
    if (first.empty()) first = out;
    CHECK(std::memcmp(first.data(), out.data(), out.size() * 4) == 0);
  }
}

TEST_CASE("matmul of bf16 weights rounds activations where oneDNN serves", "[cpu][onednn]") {
  for (const cpu::Isa isa : runnable_isas())
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
      for (const int64_t n_rows : {63, 64, 150, 200}) check_matmul(isa, numerics, n_rows);
}

// Private memory of the process that may be written, touched or not.
int64_t data_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmData:", 0) == 0) return std::stoll(line.substr(7)) * 1024;
  return -1;
}

TEST_CASE("what oneDNN keeps is booked", "[cpu][onednn]") {
  // The projections of V3: q_a, kv_a, q_b, o, whole and last slices, with the scratch of one
  // worker.
  std::vector<uint16_t> x(128 * 16384), w(256 * 16384);
  std::vector<float> out(128 * 256);
  std::vector<std::byte> scratch(int64_t{1} << 20);
  const int64_t before = data_bytes();
  for (const auto& [cols, k] : {std::pair{256, 7168}, std::pair{64, 7168}, std::pair{256, 1536},
                                std::pair{64, 1536}, std::pair{256, 16384}, std::pair{64, 16384}}) {
    const cpu::Bf16Gemm gemm(128, cols, k);
    CHECK(gemm.scratch_bytes() == cpu::Bf16Gemm::scratch_bytes(128, cols, k));
    REQUIRE(gemm.scratch_bytes() <= static_cast<int64_t>(scratch.size()));
    if (!gemm.refused()) CHECK(gemm.run(x.data(), w.data(), out.data(), scratch.data()));
  }
  const int64_t kept = data_bytes() - before;
  INFO(kept << " bytes");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(kept <= cpu::Bf16Gemm::kKeptBytes);
#endif
}
