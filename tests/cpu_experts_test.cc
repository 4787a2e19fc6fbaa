// Routed experts against a plain loop over tokens and choices in double.
#include "cpu_weights.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/rows.h"

using namespace fathom;
using namespace fathom::cpu_test;

namespace {

struct Experts {
  TestWeight gate, up, down;
};

Experts random_experts(Rng& rng, DType in, DType out, int64_t n_experts, int64_t hidden,
                       int64_t inner) {
  return {random_weight(rng, in, inner, hidden, n_experts),
          random_weight(rng, in, inner, hidden, n_experts),
          random_weight(rng, out, hidden, inner, n_experts)};
}

struct Routing {
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

// `spread` experts are ever chosen, so that some have no rows and some have many.
Routing random_routing(Rng& rng, int64_t n_tokens, int64_t k, int64_t n_experts, int64_t spread) {
  Routing r;
  std::vector<int32_t> pool(static_cast<size_t>(n_experts));
  std::iota(pool.begin(), pool.end(), 0);
  std::shuffle(pool.begin(), pool.end(), rng);
  pool.resize(static_cast<size_t>(spread));
  for (int64_t t = 0; t < n_tokens; ++t) {
    std::shuffle(pool.begin(), pool.end(), rng);
    r.ids.insert(r.ids.end(), pool.begin(), pool.begin() + k);
  }
  r.weights = random_values(rng, n_tokens * k);
  return r;
}

std::vector<float> run(const cpu::CpuContext& ctx, const Experts& e, const Routing& r, int64_t k,
                       const std::vector<float>& x, std::vector<float> out) {
  const ExpertsParams p{.x = x.data(),
                        .n_tokens = static_cast<int64_t>(r.ids.size()) / k,
                        .ids = r.ids.data(),
                        .weights = r.weights.data(),
                        .num_experts_per_tok = k,
                        .gate = &e.gate.weight,
                        .up = &e.up.weight,
                        .down = &e.down.weight,
                        .out = out.data()};
  const GuardedWorkspace space(cpu::workspace_bytes(ctx, p));
  cpu::experts(ctx, space.op(), p);
  space.check();
  return out;
}

void check_experts(const cpu::CpuContext& ctx, const Experts& e, const Routing& r, int64_t k,
                   Rng& rng) {
  const int64_t hidden = e.gate.weight.cols, inner = e.gate.weight.rows;
  const int64_t n_tokens = static_cast<int64_t>(r.ids.size()) / k;
  const std::vector<float> x =
      random_values(rng, n_tokens * hidden, 1.0f / std::sqrt(static_cast<float>(hidden)));
  const std::vector<float> before = random_values(rng, n_tokens * hidden);
  const std::vector<float> out = run(ctx, e, r, k, x, before);
  const bool fast = ctx.numerics == Numerics::kFast;
  Expected expected;
  std::vector<float> h(static_cast<size_t>(inner));
  std::vector<double> sum(static_cast<size_t>(hidden)), bound(static_cast<size_t>(hidden));
  for (int64_t t = 0; t < n_tokens; ++t) {
    const float* row = x.data() + t * hidden;
    for (int64_t c = 0; c < hidden; ++c) {
      sum[static_cast<size_t>(c)] = before[static_cast<size_t>(t * hidden + c)];
      bound[static_cast<size_t>(c)] = 1e-5;
    }
    for (int64_t j = 0; j < k; ++j) {
      const int32_t id = r.ids[static_cast<size_t>(t * k + j)];
      const double weight = r.weights[static_cast<size_t>(t * k + j)];
      if (id < 0 || id >= e.gate.weight.count) continue;
      for (int64_t i = 0; i < inner; ++i) {
        const double g = dot(row, e.gate.row(id, i), hidden);
        h[static_cast<size_t>(i)] =
            static_cast<float>(g / (1 + std::exp(-g)) * dot(row, e.up.row(id, i), hidden));
      }
      for (int64_t c = 0; c < hidden; ++c) {
        sum[static_cast<size_t>(c)] += weight * dot(h.data(), e.down.row(id, c), inner);
        bound[static_cast<size_t>(c)] += std::fabs(weight) * 3 *
                                         tolerance(fast, std::min(hidden, inner)) *
                                         norm(e.down.row(id, c), inner) * norm(h.data(), inner);
      }
    }
    for (size_t c = 0; c < sum.size(); ++c) expected.add(sum[c], bound[c]);
  }
  expected.check(out, std::string(ctx.matmul->name) + (fast ? " fast " : " exact ") +
                          std::string(dtype_info(e.gate.weight.dtype).name) + " tokens " +
                          std::to_string(n_tokens) + " choices " + std::to_string(k));
}

}  // namespace

TEST_CASE("experts on every instruction set", "[cpu][experts]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
      const TestContext test = make_context(isa, numerics);
      Rng rng(41);
      const Experts sets[] = {
          random_experts(rng, DType::kF32, DType::kF32, 10, 76, 20),
          random_experts(rng, DType::kBF16, DType::kBF16, 7, 52, 36),
          random_experts(rng, DType::kQ8_0, DType::kQ8_0, 8, 64, 96),
          random_experts(rng, DType::kQ4_K, DType::kQ8_0, 5, 256, 352),
          random_experts(rng, DType::kMXFP4, DType::kQ4_0, 6, 64, 64),
      };
      for (const Experts& e : sets) {
        const int64_t n = e.gate.weight.count;
        for (const int64_t n_tokens : {0, 1, 2, 7, 33, 140}) {
          check_experts(test.ctx, e, random_routing(rng, n_tokens, 3, n, n), 3, rng);
          check_experts(test.ctx, e, random_routing(rng, n_tokens, 2, n, 2), 2, rng);
        }
      }
    }
  }
}

TEST_CASE("one expert may take every row, one token may choose it twice", "[cpu][experts]") {
  for (const cpu::Isa isa : runnable_isas()) {
    const TestContext test = make_context(isa, Numerics::kFast);
    Rng rng(42);
    const Experts e = random_experts(rng, DType::kQ8_0, DType::kQ8_0, 4, 64, 544);
    Routing r = random_routing(rng, 150, 1, 4, 1);
    check_experts(test.ctx, e, r, 1, rng);
    r = random_routing(rng, 12, 2, 4, 2);
    for (size_t i = 0; i < r.ids.size(); ++i) r.ids[i] = i % 3 == 0 ? 1 : 3;
    r.ids[0] = r.ids[1] = 2;
    check_experts(test.ctx, e, r, 2, rng);
  }
}

TEST_CASE("ids of experts that are not here are passed over", "[cpu][experts]") {
  const TestContext test = make_context(runnable_isas().back(), Numerics::kFast);
  Rng rng(43);
  const Experts e = random_experts(rng, DType::kQ8_0, DType::kQ8_0, 4, 64, 64);
  Routing r = random_routing(rng, 3, 2, 4, 4);
  r.ids[1] = -1;
  r.ids[2] = 4;
  check_experts(test.ctx, e, r, 2, rng);
}

// The same experts on two devices at once: each keeps the rows of its pairs, and their sum has the
// bits of one device.
TEST_CASE("rows kept apart add up to the same bits", "[cpu][experts]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
      for (const int64_t n_tokens : {0, 1, 2, 7, 33}) {
        const TestContext test = make_context(isa, numerics, 2);
        Rng rng(45);
        const Experts sets[] = {random_experts(rng, DType::kF32, DType::kF32, 9, 76, 20),
                                random_experts(rng, DType::kQ4_K, DType::kQ8_0, 8, 256, 352)};
        for (const Experts& e : sets) {
          const int64_t n = e.gate.weight.count, hidden = e.gate.weight.cols, k = 3;
          const Routing r = random_routing(rng, n_tokens, k, n, n);
          const std::vector<float> x = random_values(rng, n_tokens * hidden, 0.05f);
          std::vector<float> expected(x.size()), got(x.size(), NAN);
          std::vector<float> rows(x.size() * static_cast<size_t>(k), NAN);
          const auto ask = [&](const std::vector<int32_t>& ids, float* out, float* kept) {
            const ExpertsParams p{.x = x.data(),
                                  .n_tokens = n_tokens,
                                  .ids = ids.data(),
                                  .weights = r.weights.data(),
                                  .num_experts_per_tok = k,
                                  .gate = &e.gate.weight,
                                  .up = &e.up.weight,
                                  .down = &e.down.weight,
                                  .out = out,
                                  .n_experts = n,
                                  .add = false,
                                  .rows = kept};
            const GuardedWorkspace space(cpu::workspace_bytes(test.ctx, p));
            cpu::experts(test.ctx, space.op(), p);
            space.check();
          };
          ask(r.ids, expected.data(), nullptr);
          for (const int32_t part : {0, 1, 2}) {
            std::vector<int32_t> ids = r.ids;
            for (int32_t& id : ids)
              if (id % 3 != part) id = -1;
            ask(ids, nullptr, rows.data());
          }
          cpu::sum_experts(test.ctx, {.rows = rows.data(),
                                      .ids = r.ids.data(),
                                      .weights = r.weights.data(),
                                      .n_tokens = n_tokens,
                                      .num_experts_per_tok = k,
                                      .hidden_size = hidden,
                                      .out = got.data()});
          INFO(test.ctx.matmul->name << " tokens " << n_tokens);
          CHECK((got.empty() || std::memcmp(expected.data(), got.data(), got.size() * 4) == 0));
        }
      }
    }
  }
}

TEST_CASE("experts give the same bits with any number of threads", "[cpu][experts]") {
  for (const cpu::Isa isa : runnable_isas()) {
    for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
      for (const int64_t n_tokens : {1, 50}) {
        Rng rng(44);
        const Experts e = random_experts(rng, DType::kQ4_K, DType::kQ8_0, 8, 256, 352);
        const Routing r = random_routing(rng, n_tokens, 3, 8, 8);
        const std::vector<float> x = random_values(rng, n_tokens * 256, 0.05f);
        const std::vector<float> before = random_values(rng, n_tokens * 256);
        std::vector<float> first;
        for (const int n_threads : {1, 2, 3, 5}) {
          const TestContext test = make_context(isa, numerics, n_threads);
          const std::vector<float> out = run(test.ctx, e, r, 3, x, before);
          if (first.empty()) first = out;
          INFO(test.ctx.matmul->name << " " << n_threads);
          CHECK(std::memcmp(first.data(), out.data(), out.size() * 4) == 0);
        }
      }
    }
  }
}

TEST_CASE(
    "a chunk whose hidden values are more than the workspace takes at a time has the bits of its "
    "halves",
    "[cpu][experts]") {
  // 1,400 pairs of 4,096 f32 values are 22 MiB; one expert has most of them and is cut itself.
  constexpr int64_t kTokens = 700, kHidden = 32, kInner = 4096, kExperts = 5;
  for (const cpu::Isa isa : runnable_isas()) {
    const TestContext test = make_context(isa, Numerics::kFast, 2);
    if (isa == cpu::Isa::kScalar) continue;  // the same code around slower kernels
    Rng rng(47);
    const Experts e = random_experts(rng, DType::kBF16, DType::kBF16, kExperts, kHidden, kInner);
    Routing r = random_routing(rng, kTokens, 2, kExperts, kExperts);
    for (int64_t t = 0; t < kTokens; ++t)
      if (t % 7 != 0)
        r.ids[static_cast<size_t>(2 * t)] = 3, r.ids[static_cast<size_t>(2 * t + 1)] = t % 2;
    const std::vector<float> x = random_values(rng, kTokens * kHidden, 0.2f);
    const std::vector<float> before = random_values(rng, kTokens * kHidden);
    const std::vector<float> whole = run(test.ctx, e, r, 2, x, before);
    const auto half = [](const auto& all, int64_t i) {
      return std::decay_t<decltype(all)>(
          all.begin() + i * static_cast<int64_t>(all.size()) / 2,
          all.begin() + (i + 1) * static_cast<int64_t>(all.size()) / 2);
    };
    std::vector<float> halves;
    for (const int64_t i : {0, 1}) {
      const std::vector<float> part =
          run(test.ctx, e, {half(r.ids, i), half(r.weights, i)}, 2, half(x, i), half(before, i));
      halves.insert(halves.end(), part.begin(), part.end());
    }
    INFO(test.ctx.matmul->name);
    CHECK(std::memcmp(whole.data(), halves.data(), whole.size() * sizeof(float)) == 0);
    const ExpertsParams p{.x = x.data(),
                          .n_tokens = kTokens,
                          .ids = r.ids.data(),
                          .weights = r.weights.data(),
                          .num_experts_per_tok = 2,
                          .gate = &e.gate.weight,
                          .up = &e.up.weight,
                          .down = &e.down.weight,
                          .out = halves.data()};
    CHECK(cpu::workspace_bytes(test.ctx, p) < int64_t{18} << 20);
  }
}

TEST_CASE("a sum handed on over spans of experts has the bits of one device", "[cpu][experts]") {
  const auto span_of = [](const Weight& w, int64_t first, int64_t count) {
    Weight part = w;
    part.count = count;
    part.data = w.matrix(first);
    return part;
  };
  for (const cpu::Isa isa : runnable_isas()) {
    const TestContext test = make_context(isa, Numerics::kFast);
    Rng rng(45);
    const Experts e = random_experts(rng, DType::kQ4_K, DType::kQ8_0, 8, 256, 352);
    for (const int64_t n_tokens : {1, 9, 70}) {
      const Routing r = random_routing(rng, n_tokens, 3, 8, 8);
      const std::vector<float> x = random_values(rng, n_tokens * 256, 0.05f);
      const std::vector<float> zero(x.size(), 0.0f), other = random_values(rng, n_tokens * 256);
      const std::vector<float> whole = run(test.ctx, e, r, 3, x, zero);
      for (const int64_t cut : {1, 3, 7}) {
        std::vector<float> out = other;  // what is there must not matter to the first span
        for (const bool second : {false, true}) {
          const int64_t first = second ? cut : 0, count = second ? 8 - cut : cut;
          const Weight gate = span_of(e.gate.weight, first, count),
                       up = span_of(e.up.weight, first, count),
                       down = span_of(e.down.weight, first, count);
          const ExpertsParams p{.x = x.data(),
                                .n_tokens = n_tokens,
                                .ids = r.ids.data(),
                                .weights = r.weights.data(),
                                .num_experts_per_tok = 3,
                                .gate = &gate,
                                .up = &up,
                                .down = &down,
                                .out = out.data(),
                                .first_expert = first,
                                .n_experts = 8,
                                .add = second};
          const GuardedWorkspace space(cpu::workspace_bytes(test.ctx, p));
          cpu::experts(test.ctx, space.op(), p);
          space.check();
        }
        INFO(test.ctx.matmul->name << " tokens " << n_tokens << " cut " << cut);
        CHECK(std::memcmp(whole.data(), out.data(), out.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST_CASE("add adds every value once, for any length", "[cpu][rows]") {
  const TestContext test = make_context(runnable_isas().front(), Numerics::kFast, 3);
  Rng rng(46);
  for (const int64_t n : {0, 1, 17, 32768, 70001}) {
    const std::vector<float> x = random_values(rng, n), before = random_values(rng, n);
    std::vector<float> out = before;
    cpu::add(test.ctx, {x.data(), n, out.data()});
    for (size_t i = 0; i < out.size(); ++i) REQUIRE(out[i] == before[i] + x[i]);
  }
}
