// The dense feed-forward network against three products in double.
#include "cpu_weights.h"

using namespace fathom;
using namespace fathom::cpu_test;

namespace {

double silu(double v) {
  return v / (1 + std::exp(-v));
}

struct Network {
  TestWeight gate, up, down;
};

Network random_network(Rng& rng, DType gate, DType up, DType down, int64_t hidden, int64_t inner) {
  return {random_weight(rng, gate, inner, hidden), random_weight(rng, up, inner, hidden),
          random_weight(rng, down, hidden, inner)};
}

void check_ffn(const cpu::CpuContext& ctx, const Network& n, int64_t n_tokens, bool add, Rng& rng) {
  const int64_t hidden = n.gate.weight.cols, inner = n.gate.weight.rows;
  // Sizes that keep silu away from its flat ends.
  const std::vector<float> x =
      random_values(rng, n_tokens * hidden, 1.0f / std::sqrt(static_cast<float>(hidden)));
  std::vector<float> out = random_values(rng, n_tokens * hidden);
  const std::vector<float> before = out;
  const FfnParams p{.x = x.data(),
                    .n_tokens = n_tokens,
                    .gate = &n.gate.weight,
                    .up = &n.up.weight,
                    .down = &n.down.weight,
                    .out = out.data(),
                    .add = add};
  const GuardedWorkspace space(cpu::workspace_bytes(ctx, p));
  cpu::ffn(ctx, space.op(), p);
  space.check();

  const bool fast = ctx.numerics == Numerics::kFast;
  Expected expected;
  std::vector<float> h(static_cast<size_t>(inner));
  for (int64_t t = 0; t < n_tokens; ++t) {
    const float* row = x.data() + t * hidden;
    for (int64_t i = 0; i < inner; ++i)
      h[static_cast<size_t>(i)] = static_cast<float>(silu(dot(row, n.gate.row(0, i), hidden)) *
                                                     dot(row, n.up.row(0, i), hidden));
    for (int64_t c = 0; c < hidden; ++c) {
      // Two products in a row: errors of the first pass through the second, whose factors are
      // about as large.
      const double bound = 3 * tolerance(fast, std::min(hidden, inner)) *
                           norm(n.down.row(0, c), inner) * norm(h.data(), inner);
      const float old = before[static_cast<size_t>(t * hidden + c)];
      expected.add(dot(h.data(), n.down.row(0, c), inner) + (add ? old : 0), bound + 1e-5);
    }
  }
  expected.check(out, std::string(ctx.matmul->name) + (fast ? " fast " : " exact ") +
                          std::string(dtype_info(n.gate.weight.dtype).name) + "/" +
                          std::string(dtype_info(n.down.weight.dtype).name) + " tokens " +
                          std::to_string(n_tokens));
}

}  // namespace

TEST_CASE("ffn on every instruction set", "[cpu][ffn]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
      const TestContext test = make_context(isa, numerics);
      Rng rng(31);
      const Network networks[] = {
          random_network(rng, DType::kF32, DType::kF32, DType::kF32, 76, 52),
          random_network(rng, DType::kBF16, DType::kF16, DType::kBF16, 20, 44),
          random_network(rng, DType::kQ8_0, DType::kQ8_0, DType::kQ8_0, 96, 160),
          random_network(rng, DType::kQ4_K, DType::kQ6_K, DType::kQ8_0, 256, 96),
          random_network(rng, DType::kQ4_K, DType::kQ4_K, DType::kQ6_K, 256, 768),
          random_network(rng, DType::kQ4_0, DType::kQ4_0, DType::kMXFP4, 64, 96),
          random_network(rng, DType::kMXFP4, DType::kQ5_0, DType::kQ4_0, 64, 96),
          random_network(rng, DType::kQ8_0, DType::kF32, DType::kF32, 64, 50),
      };
      for (const Network& n : networks)
        for (const int64_t n_tokens : {0, 1, 5, 16, 17, 40, 150})
          check_ffn(test.ctx, n, n_tokens, n_tokens % 2 == 1, rng);
    }
  }
}

TEST_CASE("swiglu of extreme values", "[cpu][ffn]") {
  const std::vector<float> gate = {0.0f,   -0.0f,   1.0f,  -1.0f,  20.0f,  -20.0f, 88.0f,
                                   -88.0f, 1000.0f, -1e3f, 1e30f,  -1e30f, 1e-30f, -1e-30f,
                                   0.5f,   -0.5f,   3.25f, -3.25f, 10.0f,  -10.0f, 7.0f};
  const std::vector<float> up(gate.size(), 1.5f);
  for (const cpu::Isa isa : runnable_isas()) {
    std::vector<float> out(gate.size());
    cpu::matmul_kernels(isa).swiglu(gate.data(), up.data(), static_cast<int64_t>(gate.size()),
                                    out.data());
    for (size_t i = 0; i < gate.size(); ++i) {
      const double want = silu(gate[i]) * 1.5;
      INFO(cpu::matmul_kernels(isa).name << " gate " << gate[i]);
      // Where exp(-gate) leaves f32 the result is as good as 0.
      CHECK(std::fabs(out[i] - want) <= 1e-6 * std::fabs(want) + (gate[i] < -80 ? 1e-6 : 1e-35));
    }
  }
}

TEST_CASE("ffn gives the same bits with any number of threads", "[cpu][ffn]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
      Rng rng(32);
      const Network n = random_network(rng, DType::kQ4_K, DType::kQ4_K, DType::kQ6_K, 512, 768);
      const std::vector<float> x = random_values(rng, 20 * 512, 0.05f);
      std::vector<float> first;
      for (const int n_threads : {1, 2, 3, 5}) {
        const TestContext test = make_context(isa, numerics, n_threads);
        std::vector<float> out(20 * 512);
        const FfnParams p{.x = x.data(),
                          .n_tokens = 20,
                          .gate = &n.gate.weight,
                          .up = &n.up.weight,
                          .down = &n.down.weight,
                          .out = out.data(),
                          .add = false};
        const GuardedWorkspace space(cpu::workspace_bytes(test.ctx, p));
        cpu::ffn(test.ctx, space.op(), p);
        if (first.empty()) first = out;
        INFO(test.ctx.matmul->name << " " << n_threads);
        CHECK(std::memcmp(first.data(), out.data(), out.size() * 4) == 0);
      }
    }
  }
}

TEST_CASE("a wide network in parts of its chunk has the bits of one part at a time", "[cpu][ffn]") {
  // 300 rows of 18,432 f32 values are 21 MiB.
  constexpr int64_t kTokens = 300, kHidden = 32, kInner = 18432;
  for (const cpu::Isa isa : runnable_isas()) {
    if (isa == cpu::Isa::kScalar) continue;  // the same code around slower kernels
    const TestContext test = make_context(isa, Numerics::kFast, 2);
    Rng rng(33);
    const Network n =
        random_network(rng, DType::kBF16, DType::kBF16, DType::kBF16, kHidden, kInner);
    const std::vector<float> x = random_values(rng, kTokens * kHidden, 0.2f);
    const auto run = [&](int64_t first, int64_t n_tokens, float* out) {
      const FfnParams p{.x = x.data() + first * kHidden,
                        .n_tokens = n_tokens,
                        .gate = &n.gate.weight,
                        .up = &n.up.weight,
                        .down = &n.down.weight,
                        .out = out + first * kHidden,
                        .add = false};
      const GuardedWorkspace space(cpu::workspace_bytes(test.ctx, p));
      CHECK(cpu::workspace_bytes(test.ctx, p) < int64_t{18} << 20);
      cpu::ffn(test.ctx, space.op(), p);
      space.check();
    };
    std::vector<float> whole(x.size()), parts(x.size());
    run(0, kTokens, whole.data());
    for (int64_t first = 0; first < kTokens; first += 100) run(first, 100, parts.data());
    INFO(test.ctx.matmul->name);
    CHECK(std::memcmp(whole.data(), parts.data(), whole.size() * sizeof(float)) == 0);
  }
}
