// Products with stored weights: every type, instruction set and numerics on awkward shapes, against
// sums in double.
#include "cpu_weights.h"

#include <limits>

#include "cpu/product.h"

using namespace fathom;
using namespace fathom::cpu_test;

namespace {

std::string describe(const cpu::CpuContext& ctx, const Weight& w, int64_t n_rows) {
  return std::string(ctx.matmul->name) + " " + std::string(dtype_info(w.dtype).name) + " " +
         (ctx.numerics == Numerics::kFast ? "fast " : "exact ") + std::to_string(n_rows) + " x " +
         std::to_string(w.cols) + " -> " + std::to_string(w.rows);
}

bool rounds(const cpu::CpuContext& ctx, const Weight& w) {
  return ctx.numerics == Numerics::kFast &&
         (cpu::is_packed(w) || w.dtype == DType::kBF16 ||
          (w.dtype == DType::kF8E4M3 && ctx.f8_pairs != nullptr));
}

// Runs with exactly the promised workspace.
void run_matmul(const cpu::CpuContext& ctx, const MatmulParams& p) {
  const GuardedWorkspace space(cpu::workspace_bytes(ctx, p));
  cpu::matmul(ctx, space.op(), p);
  space.check();
}

void check_matmul(const cpu::CpuContext& ctx, const TestWeight& t, int64_t n_rows, bool add,
                  Rng& rng) {
  const Weight& w = t.weight;
  const int64_t x_stride = w.cols + 3, out_stride = w.rows + 5;
  const std::vector<float> x = random_values(rng, n_rows * x_stride);
  const std::vector<float> before = random_values(rng, n_rows * out_stride);
  std::vector<float> out = before;
  run_matmul(ctx, {.x = x.data(),
                   .x_stride = x_stride,
                   .n_rows = n_rows,
                   .w = &w,
                   .out = out.data(),
                   .out_stride = out_stride,
                   .add = add});
  Expected expected;
  for (int64_t i = 0; i < n_rows; ++i) {
    const float* row = x.data() + i * x_stride;
    for (int64_t c = 0; c < out_stride; ++c) {
      const float old = before[static_cast<size_t>(i * out_stride + c)];
      if (c >= w.rows) {
        expected.add(old, 0);  // between the rows nothing is written
        continue;
      }
      const double bound =
          tolerance(rounds(ctx, w), w.cols) * norm(row, w.cols) * norm(t.row(0, c), w.cols);
      expected.add(dot(row, t.row(0, c), w.cols) + (add ? old : 0), bound + 1e-6);
    }
  }
  expected.check(out, describe(ctx, w, n_rows) + (add ? ", added" : ""));
}

}  // namespace

TEST_CASE("matmul of every type on every instruction set", "[cpu][matmul]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
      const TestContext test = make_context(isa, numerics);
      for (const DType dtype : weight_dtypes()) {
        Rng rng(11);
        for (const auto& [rows, cols] :
             {std::pair{1, 20}, std::pair{15, 44}, std::pair{33, 300}, std::pair{208, 520}}) {
          const TestWeight t = random_weight(rng, dtype, rows, whole_blocks(dtype, cols));
          for (const int64_t n_rows : {1, 2, 4, 7, 17})
            check_matmul(test.ctx, t, n_rows, n_rows == 7, rng);
        }
        const TestWeight t = random_weight(rng, dtype, 50, whole_blocks(dtype, 64));
        for (const int64_t n_rows : {3, 16, 63, 70, 150})
          check_matmul(test.ctx, t, n_rows, n_rows == 63, rng);
      }
      Rng rng(12);
      const TestWeight scaled = random_weight(rng, DType::kF8E4M3, 150, 300, 1, true);
      for (const int64_t n_rows : {1, 3, 17}) check_matmul(test.ctx, scaled, n_rows, false, rng);
    }
  }
}

TEST_CASE("matmul of no rows touches nothing", "[cpu][matmul]") {
  const TestContext test = make_context(runnable_isas().back(), Numerics::kFast);
  Rng rng(13);
  const TestWeight t = random_weight(rng, DType::kQ8_0, 16, 32);
  const MatmulParams p{
      .x = nullptr, .x_stride = 32, .n_rows = 0, .w = &t.weight, .out = nullptr, .out_stride = 16};
  CHECK(cpu::workspace_bytes(test.ctx, p) == 0);
  cpu::matmul(test.ctx, {}, p);
}

TEST_CASE("the number of threads does not change a bit", "[cpu][matmul]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF8E4M3, DType::kQ4_K, DType::kQ2_K,
                              DType::kQ3_K, DType::kIQ4_XS, DType::kMXFP4}) {
      for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
        for (const int64_t n_rows : {1, 33}) {
          std::vector<float> first;
          for (const int n_threads : {1, 2, 3, 5}) {
            const TestContext test = make_context(isa, numerics, n_threads);
            Rng rng(14);
            const TestWeight t = random_weight(rng, dtype, 500, 512);
            const std::vector<float> x = random_values(rng, n_rows * 512);
            std::vector<float> out(static_cast<size_t>(n_rows * 500));
            run_matmul(test.ctx, {.x = x.data(),
                                  .x_stride = 512,
                                  .n_rows = n_rows,
                                  .w = &t.weight,
                                  .out = out.data(),
                                  .out_stride = 500});
            if (first.empty()) first = out;
            INFO(describe(test.ctx, t.weight, n_rows) << ", " << n_threads << " threads");
            CHECK(std::memcmp(first.data(), out.data(), out.size() * 4) == 0);
          }
        }
      }
    }
  }
}

TEST_CASE("exact overrules fast numerics", "[cpu][matmul]") {
  for (const cpu::Isa isa : runnable_isas()) {
    const TestContext fast = make_context(isa, Numerics::kFast);
    const TestContext exact = make_context(isa, Numerics::kExact);
    Rng rng(15);
    const TestWeight t = random_weight(rng, DType::kQ8_0, 40, 256);
    const std::vector<float> x = random_values(rng, 3 * 256);
    std::vector<float> want(3 * 40), got(3 * 40), rounded(3 * 40);
    MatmulParams p{.x = x.data(),
                   .x_stride = 256,
                   .n_rows = 3,
                   .w = &t.weight,
                   .out = want.data(),
                   .out_stride = 40};
    run_matmul(exact.ctx, p);
    p.out = rounded.data();
    run_matmul(fast.ctx, p);
    p.out = got.data();
    p.exact = true;
    run_matmul(fast.ctx, p);
    CHECK(got == want);
    CHECK(rounded != want);
  }
}

TEST_CASE("workspace never falls with the number of rows", "[cpu][matmul]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
      const TestContext test = make_context(isa, numerics);
      for (const DType dtype : {DType::kF32, DType::kQ4_K}) {
        Weight w{.dtype = dtype, .rows = 1408, .cols = 2048, .count = 8};
        REQUIRE(cpu::weight_layout(w).ok());
        Weight down{.dtype = DType::kQ8_0, .rows = 2048, .cols = 1408, .count = 8};
        REQUIRE(cpu::weight_layout(down).ok());
        int64_t matmul = 0, heads = 0, ffn = 0, experts = 0;
        for (int64_t n = 0; n < 300; ++n) {
          const auto grows = [&](int64_t& last, int64_t now) {
            CHECK(now >= last);
            last = now;
          };
          MatmulParams m{};
          m.n_rows = n;
          m.w = &w;
          grows(matmul, cpu::workspace_bytes(test.ctx, m));
          HeadsMatmulParams h{};
          h.n_tokens = n;
          h.w = &w;
          grows(heads, cpu::workspace_bytes(test.ctx, h));
          FfnParams f{};
          f.n_tokens = n;
          f.gate = f.up = &w;
          f.down = &down;
          grows(ffn, cpu::workspace_bytes(test.ctx, f));
          ExpertsParams e{};
          e.n_tokens = n;
          e.num_experts_per_tok = 6;
          e.gate = e.up = &w;
          e.down = &down;
          grows(experts, cpu::workspace_bytes(test.ctx, e));
        }
      }
    }
  }
}

TEST_CASE("heads are multiplied in both orientations", "[cpu][matmul]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
      const TestContext test = make_context(isa, numerics);
      for (const DType dtype : weight_dtypes()) {
        for (const bool transposed : {false, true}) {
          for (const int64_t n_tokens : {0, 1, 3, 19, 140}) {
            Rng rng(16);
            const int64_t heads = 3, rows = n_tokens == 3 ? 300 : 36,
                          cols = whole_blocks(dtype, n_tokens == 19 ? 300 : 44);
            const TestWeight t = random_weight(rng, dtype, rows, cols, heads);
            const int64_t in = transposed ? rows : cols, out_n = transposed ? cols : rows;
            const int64_t x_head = in + 2, x_token = heads * x_head + 1;
            const int64_t out_head = out_n + 4, out_token = heads * out_head + 2;
            const std::vector<float> x = random_values(rng, n_tokens * x_token);
            std::vector<float> out(static_cast<size_t>(n_tokens * out_token), -7.0f);
            const HeadsMatmulParams p{.x = x.data(),
                                      .x_token_stride = x_token,
                                      .x_head_stride = x_head,
                                      .n_tokens = n_tokens,
                                      .w = &t.weight,
                                      .transposed = transposed,
                                      .out = out.data(),
                                      .out_token_stride = out_token,
                                      .out_head_stride = out_head};
            const GuardedWorkspace space(cpu::workspace_bytes(test.ctx, p));
            cpu::heads_matmul(test.ctx, space.op(), p);
            space.check();
            Expected expected;
            expected.values.assign(out.size(), -7.0);
            expected.bounds.assign(out.size(), 0.0);
            std::vector<float> column(static_cast<size_t>(in));
            for (int64_t i = 0; i < n_tokens * heads; ++i) {
              const int64_t token = i / heads, head = i % heads;
              const float* row = x.data() + token * x_token + head * x_head;
              for (int64_t c = 0; c < out_n; ++c) {
                for (int64_t k = 0; k < in; ++k)
                  column[static_cast<size_t>(k)] =
                      transposed ? t.row(head, k)[c] : t.row(head, c)[k];
                const auto at = static_cast<size_t>(token * out_token + head * out_head + c);
                expected.values[at] = dot(row, column.data(), in);
                expected.bounds[at] = tolerance(rounds(test.ctx, t.weight) && !transposed, in) *
                                          norm(row, in) * norm(column.data(), in) +
                                      1e-6;
              }
            }
            expected.check(
                out, describe(test.ctx, t.weight, n_tokens) + (transposed ? " transposed" : ""));
          }
        }
      }
    }
  }
}

TEST_CASE("embed gives rows of the table", "[cpu][matmul]") {
  for (const cpu::Isa isa : runnable_isas()) {
    const TestContext test = make_context(isa, Numerics::kFast);
    for (const DType dtype : weight_dtypes()) {
      Rng rng(17);
      const int64_t cols = whole_blocks(dtype, 300);
      const TestWeight t = random_weight(rng, dtype, 37, cols);
      const std::vector<int32_t> tokens = {36, 0, 15, 16, 16, 31};
      std::vector<float> out(tokens.size() * static_cast<size_t>(cols));
      cpu::embed(test.ctx, {},
                 {.tokens = tokens.data(), .n_tokens = 6, .table = &t.weight, .out = out.data()});
      INFO(test.ctx.matmul->name << " " << dtype_info(dtype).name);
      for (size_t i = 0; i < tokens.size(); ++i) {
        const float* want = t.row(0, tokens[i]);
        CHECK(std::equal(want, want + cols, out.data() + i * static_cast<size_t>(cols)));
      }
    }
  }
}

TEST_CASE("activations are rounded alike by every instruction set", "[cpu][matmul]") {
  Rng rng(18);
  std::vector<float> x = random_values(rng, 64 * 32);
  for (int i = 0; i < 32; ++i) x[static_cast<size_t>(32 + i)] = 0;    // a block of zeros
  for (int i = 64; i < 96; ++i) x[static_cast<size_t>(i)] *= 1e-40f;  // subnormal
  for (int i = 96; i < 128; ++i) x[static_cast<size_t>(i)] *= 1e37f;  // large
  std::vector<cpu::XBlock> want(64), got(64);
  cpu::matmul_kernels(cpu::Isa::kScalar).quantize(x.data(), 64 * 32, want.data());
  CHECK(want[0].scale > 0);
  for (const cpu::Isa isa : runnable_isas()) {
    cpu::matmul_kernels(isa).quantize(x.data(), 64 * 32, got.data());
    INFO(cpu::matmul_kernels(isa).name);
    CHECK(std::memcmp(want.data(), got.data(), sizeof want[0] * want.size()) == 0);
  }
}

TEST_CASE("integer products equal the scalar ones on the same codes", "[cpu][matmul]") {
  const cpu::MatmulKernels& scalar = cpu::matmul_kernels(cpu::Isa::kScalar);
  for (const cpu::Isa isa : runnable_isas()) {
    const cpu::MatmulKernels& kernels = cpu::matmul_kernels(isa);
    for (const DType dtype : weight_dtypes()) {
      if (cpu::packed_type(dtype) == cpu::kPackedTypes) continue;
      Rng rng(19);
      const int64_t cols = 1024;
      TestWeight t = random_weight(rng, dtype, 40, cols);
      if (dtype == DType::kQ8_0)  // the code -128, which has no positive twin
        for (int64_t i = 32; i < 544; i += 3) t.memory.get()[i] = std::byte{0x80};
      std::vector<float> x = random_values(rng, 25 * cols);
      for (size_t i = 0; i < 2048; ++i) x[i] = i % 7 == 0 ? -3.0f : 3.0f;  // codes at the limits
      std::vector<cpu::XBlock> blocks(static_cast<size_t>(25 * cols / 32));
      scalar.quantize(x.data(), 25 * cols, blocks.data());
      std::vector<float> want(25 * 40, 1.0f), got(25 * 40, 1.0f);
      const std::vector<int32_t> order = {24, 0, 3, 3, 7, 1, 2, 9, 11, 20, 21};
      const cpu::PackedType type = cpu::packed_type(dtype);
      for (const bool chosen : {false, true}) {
        cpu::Int8Product p{.weights = reinterpret_cast<uint8_t*>(t.memory.get()),
                           .n_groups = 3,
                           .n_blocks = cols / cpu::kPackedBlocks[type].cols,
                           .x = blocks.data(),
                           .x_stride = cols / 32,
                           .rows = chosen ? order.data() : nullptr,
                           .n_rows = chosen ? 11 : 25,
                           .out = want.data(),
                           .out_stride = 40,
                           .n_cols = 40,
                           .add = chosen};
        scalar.int8_product[type](p);
        p.out = got.data();
        kernels.int8_product[type](p);
        Expected expected;
        for (size_t i = 0; i < want.size(); ++i)
          expected.add(want[i], 1e-5 * std::fabs(want[i]) + 2e-3);
        expected.check(got, std::string(kernels.name) + " " + std::string(dtype_info(dtype).name));
      }
    }
  }
}

namespace {

struct F8Kernel {
  std::string name;
  void (*dot)(const cpu::PlainDot&);
  void (*scalar)(const cpu::PlainDot&);
};

std::vector<F8Kernel> f8_kernels() {
  std::vector<F8Kernel> kernels;
  for (const cpu::Isa isa : runnable_isas()) {
    const cpu::MatmulKernels& table = cpu::matmul_kernels(isa);
    kernels.push_back({table.name, table.plain_dot[cpu::kPlainF8],
                       cpu::matmul_kernels(cpu::Isa::kScalar).plain_dot[cpu::kPlainF8]});
    if (const cpu::F8PairKernels* pairs = cpu::f8_pair_kernels(isa, Numerics::kFast))
      kernels.push_back({pairs->name, pairs->dot, cpu::f8_pair_kernels_scalar().dot});
  }
  return kernels;
}

}  // namespace

TEST_CASE("E4M3 rows equal the scalar ones, in any company", "[cpu][matmul]") {
  constexpr int64_t kOutputs = 5, kRows = 6;
  for (const F8Kernel& kernel : f8_kernels()) {
    for (const int64_t n : {1, 31, 32, 63, 64, 65, 128, 200, 2048, 2050, 4096, 4230}) {
      Rng rng(22);
      const int64_t stride = n + 3;
      std::vector<uint8_t> codes(static_cast<size_t>(kOutputs * stride));
      for (uint8_t& code : codes) {  // every code but NaN, subnormals and zeros among them
        code = static_cast<uint8_t>(rng());
        if ((code & 0x7f) == 0x7f) code &= 0x87;
      }
      const std::vector<float> x = random_values(rng, kRows * stride);
      std::vector<float> scales(static_cast<size_t>((n + 127) / 128));
      for (float& scale : scales) scale = 0.001f + 0.01f * static_cast<float>(rng() % 100);
      const std::vector<int32_t> order = {5, 0, 2, 2};
      for (const bool chosen : {false, true}) {
        cpu::PlainDot p{.weights = codes.data(),
                        .weight_bytes = stride,
                        .n_outputs = kOutputs,
                        .n = n,
                        .scales = chosen ? scales.data() : nullptr,
                        .x = x.data(),
                        .x_stride = stride,
                        .rows = chosen ? order.data() : nullptr,
                        .n_rows = 4,
                        .out = nullptr,
                        .out_stride = kOutputs,
                        .add = chosen};
        std::vector<float> want(4 * kOutputs, 1.0f), got(4 * kOutputs, 1.0f);
        p.out = want.data();
        kernel.scalar(p);
        p.out = got.data();
        kernel.dot(p);
        Expected expected;
        for (size_t i = 0; i < want.size(); ++i)
          expected.add(want[i], 1e-4 * std::sqrt(static_cast<double>(n)));
        expected.check(got, kernel.name + " " + std::to_string(n));
        for (int64_t few = 1; few < 4; ++few) {
          std::vector<float> alone(static_cast<size_t>(few * kOutputs), 1.0f);
          p.n_rows = few;
          p.out = alone.data();
          kernel.dot(p);
          INFO(kernel.name << " " << few << " rows of " << n);
          CHECK(std::equal(alone.begin(), alone.end(), got.begin()));
        }
      }
    }
  }
}

TEST_CASE("E4M3 rows keep NaN, and large and small activations", "[cpu][matmul]") {
  for (const F8Kernel& kernel : f8_kernels()) {
    for (const int64_t n : {40, 256}) {
      for (const float size : {1.0f, 1e-15f, 1e15f, 1e30f}) {
        std::vector<uint8_t> codes(static_cast<size_t>(3 * n), uint8_t{0x38});  // 1
        codes[static_cast<size_t>(n - 1)] = 0xff;
        codes[static_cast<size_t>(2 * n - 1)] = 0x01;  // 2^-9
        codes[static_cast<size_t>(2 * n)] = 0xfe;      // -448
        const std::vector<float> x(static_cast<size_t>(n), size);
        std::vector<float> out(3);
        kernel.dot({.weights = codes.data(),
                    .weight_bytes = n,
                    .n_outputs = 3,
                    .n = n,
                    .scales = nullptr,
                    .x = x.data(),
                    .x_stride = n,
                    .rows = nullptr,
                    .n_rows = 1,
                    .out = out.data(),
                    .out_stride = 3,
                    .add = false});
        INFO(kernel.name << " " << n << " " << size);
        const auto count = static_cast<float>(n - 1);
        CHECK(std::isnan(out[0]));
        CHECK(out[1] == Approx((count + 0x1p-9f) * size).epsilon(0.005));
        CHECK(out[2] == Approx((count - 448) * size).epsilon(0.005));
      }
    }
  }
}

TEST_CASE("NaN and infinity stay visible in fast numerics", "[cpu][matmul]") {
  for (const cpu::Isa isa : runnable_isas()) {
    const TestContext test = make_context(isa, Numerics::kFast);
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Rng rng(20);
      const TestWeight t = random_weight(rng, DType::kQ8_0, 16, 64);
      std::vector<float> x = random_values(rng, 64), out(16);
      x[37] = bad;
      run_matmul(test.ctx, {.x = x.data(),
                            .x_stride = 64,
                            .n_rows = 1,
                            .w = &t.weight,
                            .out = out.data(),
                            .out_stride = 16});
      INFO(test.ctx.matmul->name);
      for (const float v : out) CHECK(!std::isfinite(v));
    }
  }
}

TEST_CASE("types in circulation are packed", "[cpu][matmul]") {
  int packed = 0;
  for (const DType dtype :
       {DType::kQ8_0, DType::kQ4_0, DType::kQ4_1, DType::kQ5_0, DType::kQ5_1, DType::kIQ4_NL,
        DType::kQ2_K, DType::kQ3_K, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K, DType::kIQ4_XS})
    packed |= 1 << cpu::packed_type(dtype);
  CHECK(packed == (1 << cpu::kPackedTypes) - 1);  // each has a layout, and a different one
  for (const cpu::Isa isa : runnable_isas())
    for (int type = 0; type < cpu::kPackedTypes; ++type) {
      INFO(cpu::isa_name(isa) << " type " << type);
      CHECK(cpu::matmul_kernels(isa).int8_product[type] != nullptr);
      CHECK(cpu::matmul_kernels(isa).unpack[type] != nullptr);
    }
}

namespace {
// Counts the calls of one kernel; tables hold plain functions, so the counter is global.
int int8_calls = 0, panel_calls = 0, dot_calls = 0;
cpu::MatmulKernels original;
void count_int8(const cpu::Int8Product& p) {
  ++int8_calls;
  original.int8_product[cpu::kPackedQ4_K](p);
}
void count_panel(const cpu::PanelProduct& p) {
  ++panel_calls;
  original.panel_product(p);
}
void count_dot(const cpu::PlainDot& p) {
  ++dot_calls;
  original.plain_dot[cpu::kPlainBF16](p);
}
}  // namespace

TEST_CASE("the table that was asked for runs, by the method that was chosen", "[cpu][matmul]") {
  for (const cpu::Isa isa : runnable_isas()) {
    original = cpu::matmul_kernels(isa);
    CHECK(std::string(original.name) == cpu::isa_name(isa));
    cpu::MatmulKernels counting = original;
    counting.int8_product[cpu::kPackedQ4_K] = count_int8;
    counting.panel_product = count_panel;
    counting.plain_dot[cpu::kPlainBF16] = count_dot;
    const auto run = [&](Numerics numerics, DType dtype, int64_t n_rows) {
      TestContext test = make_context(isa, numerics, 1);
      test.ctx.matmul = &counting;
      Rng rng(21);
      const TestWeight t = random_weight(rng, dtype, 16, 256);
      const std::vector<float> x = random_values(rng, n_rows * 256);
      std::vector<float> out(static_cast<size_t>(n_rows * 16));
      int8_calls = panel_calls = dot_calls = 0;
      run_matmul(test.ctx, {.x = x.data(),
                            .x_stride = 256,
                            .n_rows = n_rows,
                            .w = &t.weight,
                            .out = out.data(),
                            .out_stride = 16});
    };
    INFO(original.name);
    run(Numerics::kFast, DType::kQ4_K, 1);
    CHECK((int8_calls == 1 && panel_calls == 0 && dot_calls == 0));
    run(Numerics::kExact, DType::kQ4_K, 1);
    CHECK((int8_calls == 0 && panel_calls == 1 && dot_calls == 0));
    run(Numerics::kFast, DType::kBF16, 1);
    CHECK((int8_calls == 0 && panel_calls == 0 && dot_calls == 1));
    run(Numerics::kFast, DType::kBF16, 20);
    CHECK((int8_calls == 0 && panel_calls > 0 && dot_calls == 0));
    run(Numerics::kFast, DType::kQ4_K, 200);
    CHECK((int8_calls > 0) == (original.int8_max_rows >= 200));
  }
}
