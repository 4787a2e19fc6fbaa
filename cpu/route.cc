// Routing of tokens to experts: V2 (softmax, groups by their best expert; DeepSeek-V2 report,
// section 2.1.2) and V3 (sigmoid, a bias for the choice only, groups by their two best;
// DeepSeek-V3 report, section 2.1.2).
#include "cpu/route.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

#include "cpu/rows.h"

namespace fathom::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// The position of the greatest value that is not taken; the first of equals.  Any free position
// when the values are no numbers: ids must be valid whatever the model computed.
int64_t best_free(const float* values, const bool* taken, int64_t n) noexcept {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i)
    if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
  return best;
}

// probability[e] of each expert from its logit.
void score_experts(const RouteParams& p, const float* logits, float* probability) noexcept {
  if (p.scoring_func == ScoringFunc::kSigmoid) {
    for (int64_t e = 0; e < p.n_experts; ++e) probability[e] = 1 / (1 + std::exp(-logits[e]));
    return;
  }
  const float top = *std::max_element(logits, logits + p.n_experts);
  double sum = 0;
  for (int64_t e = 0; e < p.n_experts; ++e) {
    probability[e] = std::exp(logits[e] - top);
    sum += probability[e];
  }
  const auto factor = static_cast<float>(1 / sum);
  for (int64_t e = 0; e < p.n_experts; ++e) probability[e] *= factor;
}

// What a group is worth: its best choice, or the sum of its two best.
float score_group(const float* choice, int64_t n, TopkMethod method) noexcept {
  float first = kNever, second = kNever;
  for (int64_t i = 0; i < n; ++i) {
    if (choice[i] > first) {
      second = first;
      first = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return method == TopkMethod::kNoauxTc && n > 1 ? first + second : first;
}

// Marks the experts outside the topk_group best groups as taken.
void limit_groups(const RouteParams& p, const float* choice, bool* taken) noexcept {
  const int64_t group_size = p.n_experts / p.n_group;
  float scores[kMaxExperts];
  bool chosen[kMaxExperts] = {};
  for (int64_t g = 0; g < p.n_group; ++g)
    scores[g] = score_group(choice + g * group_size, group_size, p.topk_method);
  for (int64_t i = 0; i < p.topk_group; ++i) chosen[best_free(scores, chosen, p.n_group)] = true;
  for (int64_t e = 0; e < p.n_experts; ++e) taken[e] = !chosen[e / group_size];
}

void route_token(const RouteParams& p, int64_t token) noexcept {
  float probability[kMaxExperts], choice[kMaxExperts];
  bool taken[kMaxExperts] = {};
  score_experts(p, p.scores + token * p.n_experts, probability);
  for (int64_t e = 0; e < p.n_experts; ++e)
    choice[e] = p.bias != nullptr ? probability[e] + p.bias[e] : probability[e];
  const bool limited =
      p.topk_method != TopkMethod::kGreedy && p.n_group > 1 && p.topk_group < p.n_group;
  if (limited) limit_groups(p, choice, taken);

  int32_t* ids = p.ids + token * p.num_experts_per_tok;
  float* weights = p.weights + token * p.num_experts_per_tok;
  double sum = 0;
  for (int64_t i = 0; i < p.num_experts_per_tok; ++i) {
    const int64_t expert = best_free(choice, taken, p.n_experts);
    taken[expert] = true;
    ids[i] = static_cast<int32_t>(expert);
    // Written by score_experts(), which the analyser does not follow.
    weights[i] = probability[expert];  // NOLINT(clang-analyzer-core.uninitialized.Assign)
    sum += weights[i];
  }
  // 1e-20 as in the published code: all probabilities may be zero.
  const double factor =
      p.norm_topk_prob ? p.routed_scaling_factor / (sum + 1e-20) : p.routed_scaling_factor;
  for (int64_t i = 0; i < p.num_experts_per_tok; ++i)
    weights[i] = static_cast<float>(weights[i] * factor);
}

}  // namespace

void route(const CpuContext& context, const RouteParams& p) noexcept {
  assert(p.n_experts <= kMaxExperts && p.num_experts_per_tok <= p.n_experts);
  // An exponential and num_experts_per_tok comparisons for each expert.
  for_row_groups(context, p.n_tokens, p.n_experts * (8 + p.num_experts_per_tok),
                 [&](int64_t first, int64_t end) {
                   for (int64_t token = first; token < end; ++token) route_token(p, token);
                 });
}

}  // namespace fathom::cpu
