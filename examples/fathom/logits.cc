#include "logits.h"

#include <algorithm>
#include <cmath>

namespace cli {
namespace {

// log of the sum of exp(logit)
double log_total(std::span<const float> logits) noexcept {
  const double best = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(logit - best);
  return best + std::log(sum);
}

}  // namespace

double negative_log_likelihood(std::span<const float> logits, int32_t token) noexcept {
  return log_total(logits) - logits[static_cast<size_t>(token)];
}

double kl_divergence(std::span<const float> p_logits, std::span<const float> q_logits) noexcept {
  const double p_total = log_total(p_logits), q_total = log_total(q_logits);
  double sum = 0;
  for (size_t i = 0; i < p_logits.size(); ++i) {
    const double log_p = p_logits[i] - p_total;
    sum += std::exp(log_p) * (log_p - (q_logits[i] - q_total));
  }
  return sum;
}

int32_t first_token(std::span<const float> logits) noexcept {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace cli
