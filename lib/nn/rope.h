// RoPE frequencies and the attention scale, with YaRN as DeepSeek's own code applies it
// (modeling_deepseek.py, DeepseekV2YarnRotaryEmbedding; YaRN: Peng et al. 2023).
#pragma once

#include <vector>

#include "fathom/model_config.hpp"

namespace fathom::nn {

struct Rope {
  std::vector<double> inv_freq;  // [qk_rope_head_dim / 2]
  double multiplier = 1;         // of cos and sin: m(mscale) / m(mscale_all_dim)
  double softmax_scale = 1;      // qk_head_dim^-0.5 * m(mscale_all_dim)^2
};

Rope make_rope(const ModelConfig& config);

}  // namespace fathom::nn
