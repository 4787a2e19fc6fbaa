// What a model file says about the model's shape, under the names of the published config.json.
// Filled by lib/io from config.json or GGUF keys, every value range-checked there, trusted after.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fathom {

enum class ScoringFunc : uint8_t { kSoftmax, kSigmoid };                     // scoring_func
enum class TopkMethod : uint8_t { kGreedy, kGroupLimitedGreedy, kNoauxTc };  // topk_method

// rope_scaling of type "yarn" (DeepSeek-V2 report, section 3.1.4; modeling_deepseek.py).
struct YarnConfig {
  bool enabled = false;  // false: plain RoPE, the rest is ignored
  double factor = 1;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32, beta_slow = 1;
  double mscale = 1, mscale_all_dim = 0;
};

struct ModelConfig {
  std::string architecture;  // "deepseek2" for all; the kind is told by the values
  std::string name;          // general.name or the folder's name; may be empty

  int64_t vocab_size = 0;  // rows of embed_tokens and lm_head
  int64_t hidden_size = 0;
  int64_t num_hidden_layers = 0;  // without multi-token-prediction layers, which are skipped
  int64_t num_attention_heads = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  YarnConfig yarn;
  bool tie_word_embeddings = false;

  // Attention (MLA).
  int64_t q_lora_rank = 0;  // 0: none, queries come from q_proj directly
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;

  // Feed-forward: the first `first_k_dense_replace` layers are dense, the others MoE.
  int64_t intermediate_size = 0;
  int64_t first_k_dense_replace = 0;
  int64_t moe_intermediate_size = 0;
  int64_t n_routed_experts = 0;  // 0: all layers dense
  int64_t num_experts_per_tok = 0;
  int64_t n_shared_experts = 0;
  int64_t n_group = 1, topk_group = 1;
  ScoringFunc scoring_func = ScoringFunc::kSoftmax;
  TopkMethod topk_method = TopkMethod::kGreedy;
  bool norm_topk_prob = false;
  double routed_scaling_factor = 1;

  int64_t bos_token_id = -1, eos_token_id = -1;  // -1: the file does not say

  // Remarks for the load report: values that the file lacked and that were taken from the
  // published model of this shape, layers skipped, and the like.  One sentence each.
  std::vector<std::string> remarks;

  int64_t qk_head_dim() const noexcept { return qk_nope_head_dim + qk_rope_head_dim; }
  // Values of a cached row of one token in one layer: [kv_lora_rank latent | qk_rope_head_dim].
  int64_t kv_row_dim() const noexcept { return kv_lora_rank + qk_rope_head_dim; }
  bool is_moe_layer(int64_t layer) const noexcept {
    return n_routed_experts > 0 && layer >= first_k_dense_replace;
  }
};

}  // namespace fathom
