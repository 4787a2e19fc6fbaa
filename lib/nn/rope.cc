#include "rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace fathom::nn {
namespace {

// m(x) = 0.1 x ln(factor) + 1.
double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

}  // namespace

Rope make_rope(const ModelConfig& c) {
  Rope rope;
  const int64_t dim = c.qk_rope_head_dim;
  rope.softmax_scale = 1 / std::sqrt(static_cast<double>(c.qk_head_dim()));
  rope.inv_freq.resize(static_cast<size_t>(dim / 2));
  for (int64_t i = 0; i < dim / 2; ++i)
    rope.inv_freq[static_cast<size_t>(i)] =
        std::pow(c.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
  if (!c.yarn.enabled) return rope;

  // The dimension whose wave makes `rotations` turns over the original length.
  const YarnConfig& y = c.yarn;
  const auto correction_dim = [&](double rotations) {
    return static_cast<double>(dim) *
           std::log(static_cast<double>(y.original_max_position_embeddings) /
                    (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(c.rope_theta));
  };
  const double low = std::max(std::floor(correction_dim(y.beta_fast)), 0.0);
  double high = std::min(std::ceil(correction_dim(y.beta_slow)), static_cast<double>(dim - 1));
  if (low == high) high += 0.001;  // as the original: no division by zero

  // Fast waves are kept, slow ones interpolated, a ramp in between.
  for (int64_t i = 0; i < dim / 2; ++i) {
    double& f = rope.inv_freq[static_cast<size_t>(i)];
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    f = f / y.factor * ramp + f * (1 - ramp);
  }
  rope.multiplier = yarn_mscale(y.factor, y.mscale) / yarn_mscale(y.factor, y.mscale_all_dim);
  if (y.mscale_all_dim != 0) {
    const double m = yarn_mscale(y.factor, y.mscale_all_dim);
    rope.softmax_scale *= m * m;
  }
  return rope;
}

}  // namespace fathom::nn
