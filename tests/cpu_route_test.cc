// Routing: small cases by hand, a plain second implementation for many shapes, and ids that stay
// valid whatever the scores are.  The golden routes are compared where whole models run.
#include "cpu/route.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <numeric>

#include "support/cpu_test.h"

using namespace fathom;
using namespace fathom::cpu_test;

namespace {

struct Routes {
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

Routes run(cpu::CpuBackend& backend, RouteParams p) {
  Routes r;
  r.ids.assign(static_cast<size_t>(p.n_tokens * p.num_experts_per_tok), -7);
  r.weights.assign(r.ids.size(), -7.0f);
  p.ids = r.ids.data();
  p.weights = r.weights.data();
  backend.route({}, p);
  return r;
}

// As the papers say it: sort, mask, sort.
Routes plain(const RouteParams& p) {
  Routes result;
  for (int64_t t = 0; t < p.n_tokens; ++t) {
    std::vector<double> probability, choice;
    double sum = 0;
    for (int64_t e = 0; e < p.n_experts; ++e) {
      const double x = p.scores[t * p.n_experts + e];
      probability.push_back(p.scoring_func == ScoringFunc::kSigmoid ? 1 / (1 + std::exp(-x))
                                                                    : std::exp(x));
      sum += probability.back();
    }
    for (int64_t e = 0; e < p.n_experts; ++e) {
      if (p.scoring_func == ScoringFunc::kSoftmax) probability[size_t(e)] /= sum;
      choice.push_back(probability[size_t(e)] + (p.bias ? double(p.bias[e]) : 0));
    }
    const auto best_first = [](const std::vector<double>& v) {
      std::vector<int32_t> order(v.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int32_t a, int32_t b) { return v[size_t(a)] > v[size_t(b)]; });
      return order;
    };
    if (p.topk_method != TopkMethod::kGreedy) {
      const int64_t size = p.n_experts / p.n_group;
      std::vector<double> groups;
      for (int64_t g = 0; g < p.n_group; ++g) {
        std::vector<double> members(choice.begin() + g * size, choice.begin() + (g + 1) * size);
        std::sort(members.rbegin(), members.rend());
        groups.push_back(p.topk_method == TopkMethod::kNoauxTc && size > 1 ? members[0] + members[1]
                                                                           : members[0]);
      }
      const std::vector<int32_t> order = best_first(groups);
      for (size_t i = size_t(p.topk_group); i < order.size(); ++i)
        for (int64_t e = 0; e < size; ++e) choice[size_t(order[i] * size + e)] = -1e30;
    }
    const std::vector<int32_t> order = best_first(choice);
    double chosen = 0;
    for (int64_t i = 0; i < p.num_experts_per_tok; ++i)
      chosen += probability[size_t(order[size_t(i)])];
    for (int64_t i = 0; i < p.num_experts_per_tok; ++i) {
      const int32_t e = order[size_t(i)];
      result.ids.push_back(e);
      result.weights.push_back(float(probability[size_t(e)] / (p.norm_topk_prob ? chosen : 1) *
                                     double(p.routed_scaling_factor)));
    }
  }
  return result;
}

}  // namespace

TEST_CASE("V2-Lite by hand: softmax, the best two, weights as they are") {
  for (const std::string& isa : runnable_isas()) {
    auto backend = make_backend(isa, 1);
    const float scores[] = {0, std::log(4.0f), std::log(2.0f), 0};  // softmax 1 4 2 1 eighths
    const Routes r = run(*backend, {.scores = scores,
                                    .bias = nullptr,
                                    .n_tokens = 1,
                                    .n_experts = 4,
                                    .num_experts_per_tok = 2,
                                    .n_group = 1,
                                    .topk_group = 1,
                                    .scoring_func = ScoringFunc::kSoftmax,
                                    .topk_method = TopkMethod::kGreedy,
                                    .norm_topk_prob = false,
                                    .routed_scaling_factor = 1,
                                    .ids = nullptr,
                                    .weights = nullptr});
    CHECK(r.ids == std::vector<int32_t>{1, 2});
    CHECK(r.weights[0] == Approx(0.5));
    CHECK(r.weights[1] == Approx(0.25));
  }
}

TEST_CASE("V3 by hand: the bias chooses and leaves the weights alone; groups by their two best") {
  auto backend = make_backend("scalar", 1);
  const auto logit = [](float p) { return std::log(p / (1 - p)); };
  // Group 0 has the best expert, group 1 the two best together.
  const float scores[] = {logit(0.9f), logit(0.1f), logit(0.6f), logit(0.5f)};
  const float bias[] = {0, 0, 0, 0.25f};
  RouteParams p{.scores = scores,
                .bias = bias,
                .n_tokens = 1,
                .n_experts = 4,
                .num_experts_per_tok = 2,
                .n_group = 2,
                .topk_group = 1,
                .scoring_func = ScoringFunc::kSigmoid,
                .topk_method = TopkMethod::kNoauxTc,
                .norm_topk_prob = true,
                .routed_scaling_factor = 2.5f,
                .ids = nullptr,
                .weights = nullptr};
  Routes r = run(*backend, p);
  CHECK(r.ids == std::vector<int32_t>{3, 2});  // 0.75 and 0.6 by choice
  CHECK(r.weights[0] == Approx(2.5 * 0.5 / 1.1));
  CHECK(r.weights[1] == Approx(2.5 * 0.6 / 1.1));
  p.topk_method = TopkMethod::kGroupLimitedGreedy;  // by the best: group 0
  r = run(*backend, p);
  CHECK(r.ids == std::vector<int32_t>{0, 1});
  p.topk_method = TopkMethod::kGreedy;  // no groups
  r = run(*backend, p);
  CHECK(r.ids == std::vector<int32_t>{0, 3});
}

TEST_CASE("ties go to the lower index, of experts and of groups") {
  auto backend = make_backend("scalar", 1);
  const std::vector<float> scores(16, 0.5f);
  RouteParams p{.scores = scores.data(),
                .bias = nullptr,
                .n_tokens = 1,
                .n_experts = 16,
                .num_experts_per_tok = 3,
                .n_group = 4,
                .topk_group = 2,
                .scoring_func = ScoringFunc::kSoftmax,
                .topk_method = TopkMethod::kGroupLimitedGreedy,
                .norm_topk_prob = false,
                .routed_scaling_factor = 16,
                .ids = nullptr,
                .weights = nullptr};
  Routes r = run(*backend, p);
  CHECK(r.ids == std::vector<int32_t>{0, 1, 2});
  CHECK(r.weights[0] == Approx(1));
  p.num_experts_per_tok = 8;
  r = run(*backend, p);
  CHECK(r.ids == std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7});
}

TEST_CASE("routes equal a plain second implementation") {
  struct Shape {
    int64_t experts, per_token, groups, top_groups;
    ScoringFunc scoring;
    TopkMethod method;
    bool norm, biased;
  };
  const Shape shapes[] = {
      {64, 6, 1, 1, ScoringFunc::kSoftmax, TopkMethod::kGreedy, false, false},
      {160, 6, 8, 3, ScoringFunc::kSoftmax, TopkMethod::kGroupLimitedGreedy, false, false},
      {256, 8, 8, 4, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true, true},
      {384, 8, 1, 1, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true, true},
      {16, 16, 4, 4, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, true, true},
      {3, 1, 3, 1, ScoringFunc::kSigmoid, TopkMethod::kNoauxTc, false, true},
  };
  for (const Shape& s : shapes)
    for (const int threads : {1, 3}) {
      auto backend = make_backend("auto", threads);
      const std::vector<float> scores = random_values(100 * s.experts, 11, 2);
      const std::vector<float> bias = random_values(s.experts, 12, 0.1f);
      const RouteParams p{.scores = scores.data(),
                          .bias = s.biased ? bias.data() : nullptr,
                          .n_tokens = 100,
                          .n_experts = s.experts,
                          .num_experts_per_tok = s.per_token,
                          .n_group = s.groups,
                          .topk_group = s.top_groups,
                          .scoring_func = s.scoring,
                          .topk_method = s.method,
                          .norm_topk_prob = s.norm,
                          .routed_scaling_factor = 2.5f,
                          .ids = nullptr,
                          .weights = nullptr};
      const Routes got = run(*backend, p), expected = plain(p);
      CHECK(got.ids == expected.ids);
      check_close(fmt::format("{} experts", s.experts), got.weights, expected.weights, 2e-6);
    }
}

TEST_CASE("ids are valid and distinct whatever the scores are") {
  auto backend = make_backend("scalar", 1);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {nan, infinity, -infinity})
    for (const TopkMethod method :
         {TopkMethod::kGreedy, TopkMethod::kGroupLimitedGreedy, TopkMethod::kNoauxTc})
      for (const ScoringFunc scoring : {ScoringFunc::kSoftmax, ScoringFunc::kSigmoid})
        for (const int n_bad : {1, 16}) {
          std::vector<float> scores = random_values(16, 13);
          for (int i = 0; i < n_bad; ++i) scores[size_t(i)] = bad;
          const Routes r = run(*backend, {.scores = scores.data(),
                                          .bias = nullptr,
                                          .n_tokens = 1,
                                          .n_experts = 16,
                                          .num_experts_per_tok = 4,
                                          .n_group = 4,
                                          .topk_group = 2,
                                          .scoring_func = scoring,
                                          .topk_method = method,
                                          .norm_topk_prob = true,
                                          .routed_scaling_factor = 1,
                                          .ids = nullptr,
                                          .weights = nullptr});
          std::vector<int32_t> ids = r.ids;
          std::sort(ids.begin(), ids.end());
          CHECK(ids.front() >= 0);
          CHECK(ids.back() < 16);
          CHECK(std::adjacent_find(ids.begin(), ids.end()) == ids.end());
        }
}
