// Embedding, norm, RoPE, routing, feed-forward and experts of the CUDA backend against the scalar
// CPU backend.
#include <algorithm>
#include <limits>
#include <numeric>

#include "cuda_test.h"

using namespace fathom;
using namespace fathom::cuda_test;
using cpu_test::random_weight;
using cpu_test::TestWeight;

TEST_CASE("embedding of every weight type", "[cuda][layers]") {
  Rng rng(81);
  for (const DType dtype : cuda_dtypes()) {
    TestGpu gpu(Numerics::kFast, kOrders[rng() % 3]);
    const int64_t cols = cpu_test::whole_blocks(dtype, 76);
    const TestWeight table = random_weight(rng, dtype, 37, cols);
    const auto stored = gpu.store(table);
    for (const int64_t n : {0, 1, 5, 1100}) {
      std::vector<int32_t> tokens;
      for (int64_t i = 0; i < n; ++i) tokens.push_back(static_cast<int32_t>(rng() % 37));
      std::vector<float> out(static_cast<size_t>(n * cols)), expected;
      gpu->embed({}, {tokens.data(), n, &stored.weight, out.data()});
      std::fill(tokens.begin(), tokens.end(), 1 << 30);  // read at the call, not later
      gpu.finish();
    }
    std::vector<int32_t> tokens = {36, 0, 17, 17};
    std::vector<float> out(4 * static_cast<size_t>(cols)), expected;
    for (const int32_t t : tokens)
      expected.insert(expected.end(), table.row(0, t), table.row(0, t) + cols);
    gpu->embed({}, {tokens.data(), 4, &stored.weight, out.data()});
    gpu.finish();
    check_close(std::string(dtype_info(dtype).name), out, expected, 1e-6);
  }
}

TEST_CASE("norm of rows", "[cuda][layers]") {
  const auto scalar = make_scalar();
  Rng rng(82);
  for (const Order order : kOrders)
    for (const int64_t cols : {1, 7, 64, 513, 2048})
      for (const int64_t n : {0, 1, 3}) {
        TestGpu gpu(Numerics::kFast, order);
        std::vector<float> x = random_values(rng, n * (cols + 2)),
                           weight = random_values(rng, cols);
        std::vector<float> a(static_cast<size_t>(n * cols)), b(a);
        gpu->rms_norm({}, {x.data(), cols + 2, weight.data(), 1e-5f, n, cols, a.data(), cols});
        scalar->rms_norm({}, {x.data(), cols + 2, weight.data(), 1e-5f, n, cols, b.data(), cols});
        gpu.finish();
        check_close("norm " + std::to_string(cols), a, b, 2e-6);
        // In place.
        gpu->rms_norm({}, {x.data(), cols + 2, weight.data(), 1e-5f, n, cols, x.data(), cols + 2});
        gpu.finish();
        for (int64_t i = 0; i < n * cols; ++i)
          CHECK(x[static_cast<size_t>(i / cols * (cols + 2) + i % cols)] ==
                a[static_cast<size_t>(i)]);
      }
}

TEST_CASE("rope table and rotation", "[cuda][layers]") {
  const auto scalar = make_scalar();
  Rng rng(83);
  for (const int64_t dim : {2, 16, 64, 200})
    for (const int64_t n : {0, 1, 9}) {
      TestGpu gpu(Numerics::kFast, kOrders[rng() % 3]);
      std::vector<double> inv_freq;
      for (int64_t i = 0; i < dim / 2; ++i)
        inv_freq.push_back(std::pow(10000.0, -2.0 * double(i) / double(dim)));
      std::vector<float> a(static_cast<size_t>(n * dim)), b(a);
      RopeTableParams p{inv_freq.data(), 1.1, dim, 163000, n, a.data()};
      gpu->rope_table({}, p);
      p.cos_sin = b.data();
      scalar->rope_table({}, p);
      gpu.finish();
      check_close("table", a, b, 1e-7);
      const int64_t heads = 3, head_stride = dim + 5, token_stride = heads * head_stride + 1;
      std::vector<float> x = random_values(rng, n * token_stride + 1), y = x;
      gpu->rope({}, {x.data() + 1, token_stride, head_stride, n, heads, dim, a.data()});
      scalar->rope({}, {y.data() + 1, token_stride, head_stride, n, heads, dim, a.data()});
      gpu.finish();
      check_close("rope", x, y, 1e-6);
    }
}

TEST_CASE("routing chooses what the CPU chooses", "[cuda][layers]") {
  const auto scalar = make_scalar();
  Rng rng(84);
  struct Shape {
    int64_t experts, k, groups, topk_group;
    ScoringFunc scoring;
    TopkMethod method;
    bool bias, norm;
  };
  const Shape shapes[] = {
      {64, 6, 1, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, false, false},
      {160, 6, 8, 3, ScoringFunc::kSoftmax, TopkMethod::kGroupLimitedGreedy, false, false},
      {256, 8, 8, 4, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true, true},
      {384, 8, 1, 1, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true, true},
      {6, 4, 3, 2, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true, true},
      {1, 1, 1, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, false, true}};
  for (const Order order : kOrders)
    for (const Shape& s : shapes)
      for (const int kind : {0, 1, 2}) {  // distinct, many ties, damaged
        TestGpu gpu(Numerics::kFast, order);
        const int64_t n = 7;
        std::vector<float> scores = random_values(rng, n * s.experts),
                           bias = random_values(rng, s.experts, 0.1f);
        if (kind == 1)
          for (float& v : scores) v = std::round(v);
        if (kind == 1) std::fill(bias.begin(), bias.end(), 0.25f);
        if (kind == 2) std::fill(scores.begin(), scores.end(), std::nanf(""));
        std::vector<int32_t> a(static_cast<size_t>(n * s.k)), b(a);
        std::vector<float> wa(a.size()), wb(a.size());
        RouteParams p{scores.data(),
                      s.bias ? bias.data() : nullptr,
                      n,
                      s.experts,
                      s.k,
                      s.groups,
                      s.topk_group,
                      s.scoring,
                      s.method,
                      s.norm,
                      2.5f,
                      a.data(),
                      wa.data()};
        gpu->route({}, p);
        p.ids = b.data();
        p.weights = wb.data();
        scalar->route({}, p);
        gpu.finish();
        INFO(s.experts << " experts, kind " << kind);
        if (kind == 2) {  // any, but valid and distinct
          for (int64_t t = 0; t < n; ++t) {
            std::vector<int32_t> ids(a.begin() + t * s.k, a.begin() + (t + 1) * s.k);
            std::sort(ids.begin(), ids.end());
            CHECK(std::adjacent_find(ids.begin(), ids.end()) == ids.end());
            CHECK(ids.front() >= 0);
            CHECK(ids.back() < s.experts);
          }
          continue;
        }
        CHECK(a == b);
        check_close("weights", wa, wb, 1e-6);
      }
}

namespace {

struct Experts {
  TestWeight gate, up, down;
};
Experts random_experts(Rng& rng, DType gate, DType up, DType down, int64_t n, int64_t hidden,
                       int64_t inner) {
  const auto scaled = [](DType t) { return t == DType::kF8E4M3; };
  return {random_weight(rng, gate, inner, hidden, n, scaled(gate)),
          random_weight(rng, up, inner, hidden, n, scaled(up)),
          random_weight(rng, down, hidden, inner, n, scaled(down))};
}

}  // namespace

TEST_CASE("feed-forward networks", "[cuda][layers]") {
  const auto scalar = make_scalar();
  Rng rng(85);
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const int kind : {0, 1, 2, 3}) {
      const Experts e =
          kind == 0   ? random_experts(rng, DType::kF32, DType::kF32, DType::kF32, 1, 76, 20)
          : kind == 1 ? random_experts(rng, DType::kQ8_0, DType::kQ8_0, DType::kQ4_0, 1, 64, 96)
          : kind == 2
              ? random_experts(rng, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K, 1, 256, 256)
              : random_experts(rng, DType::kF8E4M3, DType::kF8E4M3, DType::kBF16, 1, 150, 140);
      TestGpu gpu(numerics, kOrders[rng() % 3]);
      const auto gate = gpu.store(e.gate), up = gpu.store(e.up), down = gpu.store(e.down);
      const int64_t hidden = e.gate.weight.cols;
      for (const int64_t n : {0, 1, 8, 9, 63, 70})
        for (const bool add : {false, true}) {
          const auto x = random_values(rng, n * hidden, 1 / std::sqrt(float(hidden)));
          std::vector<float> a = random_values(rng, n * hidden), b = a;
          const FfnParams p{x.data(), n, &gate.weight, &up.weight, &down.weight, a.data(), add};
          gpu.run(p, [&](const OpContext& op) { gpu->ffn(op, p); });
          const FfnParams q{x.data(), n,  &e.gate.weight, &e.up.weight, &e.down.weight,
                            b.data(), add};
          const cpu_test::GuardedWorkspace space(scalar->workspace_bytes(q));
          scalar->ffn(space.op(), q);
          const bool exact = numerics == Numerics::kExact ||
                             (n <= 8 && !cuda::has_int8_product(e.gate.weight.dtype) &&
                              !cuda::has_int8_product(e.down.weight.dtype));
          // As for routed experts below.
          check_close("kind " + std::to_string(kind) + " " + name_of(numerics) + " tokens " +
                          std::to_string(n),
                      a, b, (exact ? 1e-5 : 0.04) * (size_of(b) + 1));
        }
    }
}

TEST_CASE("routed experts", "[cuda][layers]") {
  const auto scalar = make_scalar();
  Rng rng(86);
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const int kind : {0, 1, 2, 3, 4}) {
      const int64_t n_experts = kind == 3 ? 37 : 6;
      const Experts e =
          kind == 0 ? random_experts(rng, DType::kF32, DType::kF32, DType::kF32, n_experts, 76, 20)
          : kind == 1
              ? random_experts(rng, DType::kQ8_0, DType::kQ8_0, DType::kQ8_0, n_experts, 64, 96)
          : kind == 2
              ? random_experts(rng, DType::kQ4_K, DType::kQ4_K, DType::kQ6_K, n_experts, 256, 256)
          : kind == 3
              ? random_experts(rng, DType::kBF16, DType::kF16, DType::kQ4_0, n_experts, 40, 32)
              : random_experts(rng, DType::kF8E4M3, DType::kF8E4M3, DType::kF8E4M3, n_experts, 140,
                               130);
      TestGpu gpu(numerics, kOrders[rng() % 3]);
      const auto gate = gpu.store(e.gate), up = gpu.store(e.up), down = gpu.store(e.down);
      const int64_t hidden = e.gate.weight.cols, k = 3;
      for (const int64_t n : {0, 1, 7, 70}) {
        std::vector<int32_t> ids;
        for (int64_t i = 0; i < n * k; ++i) ids.push_back(static_cast<int32_t>(rng() % n_experts));
        // One expert gets most rows; ids that are not here are passed over; one chosen twice.
        for (size_t i = 0; i < ids.size(); i += 2) ids[i] = 2;
        if (n > 1) ids[3] = -1, ids[4] = static_cast<int32_t>(n_experts), ids[1] = ids[0];
        const auto weights = random_values(rng, n * k);
        const auto x = random_values(rng, n * hidden, 1 / std::sqrt(float(hidden)));
        std::vector<float> a = random_values(rng, n * hidden), b = a;
        ExpertsParams p{x.data(),     n,          ids.data(),   weights.data(), k,
                        &gate.weight, &up.weight, &down.weight, a.data()};
        if (n == 7) {  // a span of a larger layer
          p.first_expert = 5;
          p.n_experts = n_experts + 9;
          for (int32_t& id : ids) id += 5;
        }
        p.add = n != 70;
        gpu.run(p, [&](const OpContext& op) { gpu->experts(op, p); });
        ExpertsParams q = p;
        q.gate = &e.gate.weight, q.up = &e.up.weight, q.down = &e.down.weight, q.out = b.data();
        const cpu_test::GuardedWorkspace space(scalar->workspace_bytes(q));
        scalar->experts(space.op(), q);
        // Rounded twice, to bytes where there are few rows: 0.4 % of the deviation each time, which
        // is more than twice that of bf16, and grows in the product of gate and up.
        check_close("kind " + std::to_string(kind) + " " + name_of(numerics) + " tokens " +
                        std::to_string(n),
                    a, b, (numerics == Numerics::kExact ? 1e-5 : 0.04) * (size_of(b) + 1));
      }
    }
}

// What copies of experts on a card stand on: each device keeps the rows of its pairs, and their sum
// has the bits of one device.
TEST_CASE("rows of experts kept apart add up to the same bits", "[cuda][layers]") {
  const auto scalar = make_scalar();
  Rng rng(91);
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const int kind : {0, 1, 2}) {
      const int64_t n_experts = 5;
      const Experts e =
          kind == 0 ? random_experts(rng, DType::kF32, DType::kF32, DType::kF32, n_experts, 76, 20)
          : kind == 1
              ? random_experts(rng, DType::kQ4_K, DType::kQ8_0, DType::kQ4_0, n_experts, 256, 32)
              : random_experts(rng, DType::kF8E4M3, DType::kF8E4M3, DType::kF8E4M3, n_experts, 140,
                               130);
      for (const int64_t n : {0, 1, 7, 33}) {  // the last: more than a card takes as few rows
        TestGpu gpu(numerics, kOrders[rng() % 3]);
        const auto gate = gpu.store(e.gate), up = gpu.store(e.up), down = gpu.store(e.down);
        const int64_t hidden = e.gate.weight.cols, k = 3;
        std::vector<int32_t> ids;
        for (int64_t t = 0; t < n; ++t) {  // of a token: different ones, in any order
          int32_t all[] = {0, 1, 2, 3, 4};
          std::shuffle(std::begin(all), std::end(all), rng);
          ids.insert(ids.end(), all, all + k);
        }
        const auto weights = random_values(rng, n * k);
        const auto x = random_values(rng, n * hidden, 1 / std::sqrt(float(hidden)));
        constexpr float kUntouched = -77;
        std::vector<float> expected(static_cast<size_t>(n * hidden)), sum(expected),
            by_scalar(expected), rows(expected.size() * size_t(k), kUntouched);
        const auto ask = [&](const std::vector<int32_t>& asked, float* out, float* kept) {
          const ExpertsParams p{.x = x.data(),
                                .n_tokens = n,
                                .ids = asked.data(),
                                .weights = weights.data(),
                                .num_experts_per_tok = k,
                                .gate = &gate.weight,
                                .up = &up.weight,
                                .down = &down.weight,
                                .out = out,
                                .n_experts = n_experts,
                                .add = false,
                                .rows = kept};
          gpu.run(p, [&](const OpContext& op) { gpu->experts(op, p); });
        };
        INFO("kind " << kind << " " << name_of(numerics) << " tokens " << n);
        ask(ids, expected.data(), nullptr);
        for (const int32_t part : {1, 0}) {  // two devices, whatever their order
          std::vector<int32_t> mine = ids;
          for (int32_t& id : mine)
            if (id % 2 != part) id = -1;
          ask(mine, nullptr, rows.data());
          for (size_t pair = 0; pair < ids.size() && part == 1; ++pair)
            for (int64_t c = 0; c < hidden; ++c)
              REQUIRE((rows[pair * size_t(hidden) + size_t(c)] == kUntouched) == (mine[pair] < 0));
        }
        SumExpertsParams p{rows.data(), ids.data(), weights.data(), n, k, hidden, sum.data()};
        gpu->sum_experts({}, p);
        gpu.finish();
        CHECK((n == 0 || std::memcmp(sum.data(), expected.data(), sum.size() * 4) == 0));
        p.out = by_scalar.data();
        scalar->sum_experts({}, p);
        check_close("sum", sum, by_scalar, 1e-6 * (size_of(by_scalar) + 1));
      }
    }
}

TEST_CASE("the likeliest tokens, in the sampler's order", "[cuda][layers]") {
  Rng rng(89);
  for (const Order order : kOrders)
    for (const int64_t n_cols : {1, 5, 300, 4096, 4097, 9001})
      for (const int64_t k : {int64_t{1}, int64_t{2}, int64_t{40}, kMaxTopK}) {
        if (k > n_cols) continue;
        TestGpu gpu(Numerics::kFast, order);
        const int64_t n_rows = 2;
        std::vector<float> logits = random_values(rng, n_rows * n_cols);
        for (int64_t i = 0; i < n_cols; ++i) {  // the second row: many ties, some impossible
          float& v = logits[static_cast<size_t>(n_cols + i)];
          v = i % 3 == 0 ? -INFINITY : std::round(v * 2);
        }
        std::vector<TokenLogit> out(static_cast<size_t>(n_rows * (k + 1)));
        const TopKParams p{logits.data(), n_rows, n_cols, k, out.data()};
        gpu.run(p, [&](const OpContext& op) { gpu->top_k(op, p); });
        INFO(n_cols << " tokens, k " << k << ", " << order_name(order));
        for (int64_t row = 0; row < n_rows; ++row) {
          const float* v = logits.data() + row * n_cols;
          std::vector<int32_t> ids(static_cast<size_t>(n_cols));
          std::iota(ids.begin(), ids.end(), 0);
          std::stable_sort(ids.begin(), ids.end(),
                           [&](int32_t a, int32_t b) { return v[a] > v[b]; });
          bool same = true;
          for (int64_t i = 0; i < k; ++i) {
            const TokenLogit& got = out[static_cast<size_t>(row * (k + 1) + i)];
            const int32_t id = ids[static_cast<size_t>(i)];
            same = same && got.id == id && got.logit == v[id];
          }
          CHECK(same);
          CHECK(out[static_cast<size_t>(row * (k + 1) + k)].id == -1);
        }
        // Broken logits are told of, the first of them.
        const auto bad = static_cast<size_t>(n_cols / 2);
        logits[bad] = std::nanf("");
        logits[static_cast<size_t>(2 * n_cols - 1)] = INFINITY;
        gpu.run(p, [&](const OpContext& op) { gpu->top_k(op, p); });
        CHECK(out[static_cast<size_t>(k)].id == int32_t(bad));
        CHECK(std::isnan(out[static_cast<size_t>(k)].logit));
        CHECK(out[static_cast<size_t>(2 * k + 1)].id == int32_t(n_cols - 1));
        CHECK(out[static_cast<size_t>(2 * k + 1)].logit == INFINITY);
      }
}

TEST_CASE("values are added", "[cuda][layers]") {
  Rng rng(88);
  TestGpu gpu(Numerics::kFast);
  for (const int64_t n : {0, 1, 300, 70001}) {
    const auto x = random_values(rng, n), before = random_values(rng, n);
    std::vector<float> out = before;
    gpu->add({}, {x.data(), n, out.data()});
    REQUIRE(gpu->sync({}).ok());
    for (size_t i = 0; i < out.size(); ++i) REQUIRE(out[i] == before[i] + x[i]);
  }
}

TEST_CASE("many pairs: results of the experts are added up slice by slice",
          "[cuda][layers][slow]") {
  const auto scalar = make_scalar();
  Rng rng(87);
  // 16,400 pairs leave room for 255 columns: slices of 128.
  const Experts e = random_experts(rng, DType::kF8E4M3, DType::kF8E4M3, DType::kF8E4M3, 2, 300, 8);
  TestGpu gpu(Numerics::kFast);
  const auto gate = gpu.store(e.gate), up = gpu.store(e.up), down = gpu.store(e.down);
  const int64_t n = 8200, k = 2, hidden = 300;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n * k; ++i) ids.push_back(static_cast<int32_t>(i % 2));
  const std::vector<float> weights(static_cast<size_t>(n * k), 0.5f);
  const auto x = random_values(rng, n * hidden, 0.05f);
  std::vector<float> a(static_cast<size_t>(n * hidden)), b = a;
  const ExpertsParams p{x.data(),     n,          ids.data(),   weights.data(), k,
                        &gate.weight, &up.weight, &down.weight, a.data()};
  gpu.run(p, [&](const OpContext& op) { gpu->experts(op, p); });
  ExpertsParams q = p;
  q.gate = &e.gate.weight, q.up = &e.up.weight, q.down = &e.down.weight, q.out = b.data();
  const cpu_test::GuardedWorkspace space(scalar->workspace_bytes(q));
  scalar->experts(space.op(), q);
  check_close("slices", a, b, 0.02 * (size_of(b) + 1));

  std::vector<float> rows(static_cast<size_t>(n * k * hidden)), sum(a.size());
  ExpertsParams kept = p;
  kept.out = nullptr, kept.rows = rows.data();
  gpu.run(kept, [&](const OpContext& op) { gpu->experts(op, kept); });
  gpu->sum_experts({}, {rows.data(), ids.data(), weights.data(), n, k, hidden, sum.data()});
  gpu.finish();
  ExpertsParams whole = p;
  whole.add = false;
  gpu.run(whole, [&](const OpContext& op) { gpu->experts(op, whole); });
  CHECK(sum == a);
}
