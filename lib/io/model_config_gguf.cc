// GGUF keys of architecture deepseek2 -> ModelConfig.  Two generations of files exist:
//   old  key_length = nope + rope, value_length = v; no expert groups; often no gating function
//   new  key_length = kv_lora + rope, value_length = kv_lora (the cached row), and the head sizes
//        in key_length_mla, value_length_mla
// Source: llama.cpp, convert_hf_to_gguf.py and llama-model.cpp (deepseek2).
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "checked.h"
#include "model_config.h"
#include "text.h"

namespace fathom::io {
namespace {

constexpr std::string_view kPrefix = "deepseek2.";

// Expert groups as published, for files that were converted before there were keys for them.
struct KnownShape {
  const char* model;
  int64_t hidden_size, num_hidden_layers, n_routed_experts, num_experts_per_tok;
  int64_t n_group, topk_group;
};
constexpr KnownShape kKnownShapes[] = {
    {"DeepSeek-V2, V2.5 and Coder-V2 (236B)", 5120, 60, 160, 6, 8, 3},
    {"DeepSeek-V2-Lite, Coder-V2-Lite and Moonlight (16B)", 2048, 27, 64, 6, 1, 1},
    {"DeepSeek-V3 and R1 (671B)", 7168, 61, 256, 8, 8, 4},
};

const TensorInfo* find(std::span<const TensorInfo> tensors, std::string_view name) {
  const auto it = std::lower_bound(
      tensors.begin(), tensors.end(), name,
      [](const TensorInfo& tensor, std::string_view wanted) { return tensor.name < wanted; });
  return it != tensors.end() && it->name == name ? &*it : nullptr;
}

bool has_router_bias(std::span<const TensorInfo> tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const TensorInfo& tensor) {
    return tensor.name.find(".exp_probs_b") != std::string::npos;
  });
}

// The keys of one architecture, without their prefix.
class Keys {
 public:
  explicit Keys(const GgufMetadata& metadata) noexcept : metadata_(metadata) {}
  bool has(std::string_view key) const { return metadata_.find(full(key)) != nullptr; }
  Result<int64_t> integer(std::string_view key, int64_t min, int64_t max) const {
    return metadata_.integer(full(key), min, max);
  }
  Result<int64_t> integer_or(std::string_view key, int64_t fallback, int64_t min,
                             int64_t max) const {
    return metadata_.integer_or(full(key), fallback, min, max);
  }
  Result<double> number(std::string_view key, double min, double max) const {
    return metadata_.number(full(key), min, max);
  }
  Result<double> number_or(std::string_view key, double fallback, double min, double max) const {
    return metadata_.number_or(full(key), fallback, min, max);
  }
  Result<bool> boolean_or(std::string_view key, bool fallback) const {
    return metadata_.boolean_or(full(key), fallback);
  }
  Result<std::string_view> string_or(std::string_view key, std::string_view fallback) const {
    return metadata_.string_or(full(key), fallback);
  }
  static std::string full(std::string_view key) { return std::string(kPrefix).append(key); }

 private:
  const GgufMetadata& metadata_;
};

Status read_sizes(const Keys& keys, std::span<const TensorInfo> tensors, ModelConfig* c) {
  FATHOM_TRY_ASSIGN(c->hidden_size, keys.integer("embedding_length", 1, bound::kWidth));
  FATHOM_TRY_ASSIGN(const int64_t n_blocks, keys.integer("block_count", 1, bound::kLayers));
  FATHOM_TRY_ASSIGN(const int64_t n_extra,
                    keys.integer_or("nextn_predict_layers", 0, 0, n_blocks - 1));
  c->num_hidden_layers = n_blocks - n_extra;
  FATHOM_TRY_ASSIGN(c->num_attention_heads, keys.integer("attention.head_count", 1, bound::kHeads));
  FATHOM_TRY_ASSIGN(c->max_position_embeddings, keys.integer("context_length", 1, bound::kContext));
  FATHOM_TRY_ASSIGN(c->rms_norm_eps, keys.number("attention.layer_norm_rms_epsilon",
                                                 bound::kSmallEps, bound::kLargeEps));
  FATHOM_TRY_ASSIGN(c->intermediate_size,
                    keys.integer_or("feed_forward_length", 0, 0, bound::kWidth));

  const TensorInfo* embeddings = find(tensors, "token_embd.weight");
  if (embeddings == nullptr)
    return Status(Code::kFormat, "tensor token_embd.weight is missing").about("token_embd.weight");
  FATHOM_TRY_ASSIGN(c->vocab_size,
                    keys.integer_or("vocab_size", embeddings->shape[0], 1, bound::kVocab));
  return check_vocabulary(embeddings, find(tensors, "output.weight"), "output.weight", false, c);
}

Status read_attention(const Keys& keys, ModelConfig* c) {
  FATHOM_TRY_ASSIGN(c->q_lora_rank, keys.integer_or("attention.q_lora_rank", 0, 0, bound::kWidth));
  FATHOM_TRY_ASSIGN(c->kv_lora_rank, keys.integer("attention.kv_lora_rank", 1, bound::kKvColumns));
  FATHOM_TRY_ASSIGN(c->qk_rope_head_dim, keys.integer("rope.dimension_count", 2, bound::kHeadDim));
  const bool is_new = keys.has("attention.key_length_mla");
  const char* key_length = is_new ? "attention.key_length_mla" : "attention.key_length";
  const char* value_length = is_new ? "attention.value_length_mla" : "attention.value_length";
  FATHOM_TRY_ASSIGN(const int64_t qk_head_dim,
                    keys.integer(key_length, c->qk_rope_head_dim + 1, 2 * bound::kHeadDim));
  c->qk_nope_head_dim = qk_head_dim - c->qk_rope_head_dim;
  FATHOM_TRY_ASSIGN(c->v_head_dim, keys.integer(value_length, 1, bound::kHeadDim));
  if (is_new) {  // what the other two then must be
    FATHOM_TRY(
        keys.integer_or("attention.key_length", c->kv_row_dim(), c->kv_row_dim(), c->kv_row_dim())
            .status());
    FATHOM_TRY(
        keys.integer_or("attention.value_length", c->kv_lora_rank, c->kv_lora_rank, c->kv_lora_rank)
            .status());
  }
  return {};
}

Status read_rope(const Keys& keys, ModelConfig* c) {
  FATHOM_TRY_ASSIGN(c->rope_theta, keys.number_or("rope.freq_base", 10000, bound::kSmallTheta,
                                                  bound::kLargeTheta));
  FATHOM_TRY_ASSIGN(const std::string_view type, keys.string_or("rope.scaling.type", "none"));
  if (type == "none") return {};
  if (type != "yarn")
    return Status(Code::kUnsupported,
                  fmt::format("{} is \"{}\"; \"yarn\" and \"none\" are supported",
                              Keys::full("rope.scaling.type"), printable(type)))
        .about(Keys::full("rope.scaling.type"));
  YarnConfig& yarn = c->yarn;
  yarn.enabled = true;
  FATHOM_TRY_ASSIGN(yarn.factor, keys.number("rope.scaling.factor", 1, bound::kScale));
  FATHOM_TRY_ASSIGN(yarn.original_max_position_embeddings,
                    keys.integer("rope.scaling.original_context_length", 1, bound::kContext));
  FATHOM_TRY_ASSIGN(yarn.beta_fast,
                    keys.number_or("rope.scaling.yarn_beta_fast", 32, 0, bound::kScale));
  FATHOM_TRY_ASSIGN(yarn.beta_slow,
                    keys.number_or("rope.scaling.yarn_beta_slow", 1, 0, bound::kScale));
  // The key holds 0.1 * mscale_all_dim as an f32; the published value has few digits.  mscale is
  // not stored: it equals mscale_all_dim in every released model.
  FATHOM_TRY_ASSIGN(const double log_multiplier,
                    keys.number_or("rope.scaling.yarn_log_multiplier", 0, 0, 100));
  yarn.mscale_all_dim = std::round(log_multiplier * 10 * 1e6) / 1e6;
  yarn.mscale = yarn.mscale_all_dim;
  if (log_multiplier == 0) {
    yarn.mscale = 1;
    c->remarks.push_back(
        "The file has no rope.scaling.yarn_log_multiplier; mscale 1 and mscale_all_dim 0, the "
        "defaults, are used.");
  }
  return {};
}

Status read_groups(const Keys& keys, ModelConfig* c) {
  if (keys.has("expert_group_count")) {
    FATHOM_TRY_ASSIGN(c->n_group, keys.integer("expert_group_count", 1, c->n_routed_experts));
    FATHOM_TRY_ASSIGN(c->topk_group, keys.integer("expert_group_used_count", 1, c->n_group));
    return {};
  }
  for (const KnownShape& known : kKnownShapes) {
    if (c->hidden_size != known.hidden_size || c->num_hidden_layers != known.num_hidden_layers ||
        c->n_routed_experts != known.n_routed_experts ||
        c->num_experts_per_tok != known.num_experts_per_tok)
      continue;
    c->n_group = known.n_group;
    c->topk_group = known.topk_group;
    c->remarks.push_back(
        fmt::format("The file does not tell its expert groups; n_group {} and topk_group {} are "
                    "the published values of {}.",
                    known.n_group, known.topk_group, known.model));
    return {};
  }
  c->remarks.push_back(
      "The file does not tell its expert groups, and its shape is that of no known model; experts "
      "are chosen without groups.");
  return {};
}

Status read_experts(const Keys& keys, std::span<const TensorInfo> tensors, ModelConfig* c) {
  FATHOM_TRY_ASSIGN(c->n_routed_experts, keys.integer_or("expert_count", 0, 0, bound::kExperts));
  FATHOM_TRY_ASSIGN(c->first_k_dense_replace,
                    keys.integer_or("leading_dense_block_count", 0, 0, c->num_hidden_layers));
  if (c->n_routed_experts == 0) return {};
  FATHOM_TRY_ASSIGN(c->num_experts_per_tok,
                    keys.integer("expert_used_count", 1, c->n_routed_experts));
  FATHOM_TRY_ASSIGN(c->n_shared_experts,
                    keys.integer_or("expert_shared_count", 0, 0, bound::kExperts));
  FATHOM_TRY_ASSIGN(c->moe_intermediate_size,
                    keys.integer("expert_feed_forward_length", 1, bound::kWidth));
  FATHOM_TRY_ASSIGN(c->norm_topk_prob, keys.boolean_or("expert_weights_norm", false));
  FATHOM_TRY_ASSIGN(c->routed_scaling_factor,
                    keys.number_or("expert_weights_scale", 0, 0, bound::kScale));
  if (c->routed_scaling_factor == 0) c->routed_scaling_factor = 1;  // written for "none"
  FATHOM_TRY(read_groups(keys, c));

  constexpr int64_t kUntold = 0, kSoftmax = 1, kSigmoid = 2;
  const bool biased = has_router_bias(tensors);
  FATHOM_TRY_ASSIGN(int64_t gating, keys.integer_or("expert_gating_func", kUntold, 0, 255));
  if (gating == kUntold) gating = biased ? kSigmoid : kSoftmax;
  if (gating != kSoftmax && gating != kSigmoid)
    return Status(Code::kUnsupported,
                  fmt::format("{} is {}; 1 (softmax) and 2 (sigmoid) are supported",
                              Keys::full("expert_gating_func"), gating))
        .about(Keys::full("expert_gating_func"));
  if (gating == kSoftmax && biased)
    return Status(
               Code::kUnsupported,
               fmt::format("{} is 1 (softmax) in a file whose router has a bias (exp_probs_b); a "
                           "bias is supported with sigmoid scores only",
                           Keys::full("expert_gating_func")))
        .about(Keys::full("expert_gating_func"));
  c->scoring_func = gating == kSigmoid ? ScoringFunc::kSigmoid : ScoringFunc::kSoftmax;
  c->topk_method = gating == kSigmoid ? TopkMethod::kNoauxTc
                   : c->n_group > 1   ? TopkMethod::kGroupLimitedGreedy
                                      : TopkMethod::kGreedy;
  return {};
}

}  // namespace

Result<ModelConfig> config_from_gguf(const GgufMetadata& metadata,
                                     std::span<const TensorInfo> tensors) {
  ModelConfig c;
  c.architecture = "deepseek2";
  FATHOM_TRY_ASSIGN(c.name, metadata.string_or("general.name", ""));
  const Keys keys(metadata);
  FATHOM_TRY(read_sizes(keys, tensors, &c));
  FATHOM_TRY(read_attention(keys, &c));
  FATHOM_TRY(read_rope(keys, &c));
  FATHOM_TRY(read_experts(keys, tensors, &c));
  FATHOM_TRY_ASSIGN(c.bos_token_id,
                    metadata.integer_or("tokenizer.ggml.bos_token_id", -1, 0, c.vocab_size - 1));
  FATHOM_TRY_ASSIGN(c.eos_token_id,
                    metadata.integer_or("tokenizer.ggml.eos_token_id", -1, 0, c.vocab_size - 1));
  FATHOM_TRY(check_config(c));
  return c;
}

}  // namespace fathom::io
