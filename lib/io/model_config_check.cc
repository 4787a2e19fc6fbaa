// Relations between the values of a ModelConfig, the same for both file formats.
#include <fmt/format.h>

#include <cmath>

#include "checked.h"
#include "model_config.h"

namespace fathom::io {
namespace {

Status bad(std::string_view key, std::string_view message) {
  return Status(Code::kFormat, message).about(key);
}

Status check_router(const ModelConfig& c) {
  if (c.n_routed_experts == 0) return {};
  if (c.num_experts_per_tok < 1 || c.num_experts_per_tok > c.n_routed_experts)
    return bad("num_experts_per_tok",
               fmt::format("num_experts_per_tok is {}, must be in [1, {}], the number of experts",
                           c.num_experts_per_tok, c.n_routed_experts));
  if (c.n_group < 1 || c.n_routed_experts % c.n_group != 0)
    return bad("n_group", fmt::format("n_group is {}, must divide the {} experts", c.n_group,
                                      c.n_routed_experts));
  if (c.topk_group < 1 || c.topk_group > c.n_group)
    return bad("topk_group", fmt::format("topk_group is {}, must be in [1, {}], the number of "
                                         "groups",
                                         c.topk_group, c.n_group));
  const int64_t group_size = c.n_routed_experts / c.n_group;
  if (c.num_experts_per_tok > c.topk_group * group_size)
    return bad("topk_group",
               fmt::format("topk_group is {}: groups of {} experts cannot give {} per token",
                           c.topk_group, group_size, c.num_experts_per_tok));
  // Groups are ranked by their two best experts there.
  if (c.topk_method == TopkMethod::kNoauxTc && c.n_group > 1 && group_size < 2)
    return bad("n_group",
               fmt::format("n_group is {}, leaving groups of {} expert; noaux_tc needs 2",
                           c.n_group, group_size));
  if (c.moe_intermediate_size < 1 && c.first_k_dense_replace < c.num_hidden_layers)
    return bad("moe_intermediate_size",
               fmt::format("moe_intermediate_size is {}, must be positive in a model with experts",
                           c.moe_intermediate_size));
  return {};
}

}  // namespace

Status check_config(const ModelConfig& c) {
  if (c.qk_rope_head_dim % 2 != 0)
    return bad("qk_rope_head_dim",
               fmt::format("qk_rope_head_dim is {}, must be even", c.qk_rope_head_dim));
  if (c.first_k_dense_replace > c.num_hidden_layers)
    return bad("first_k_dense_replace",
               fmt::format("first_k_dense_replace is {}, must be at most {}, the number of layers",
                           c.first_k_dense_replace, c.num_hidden_layers));
  const bool has_dense_layers = c.n_routed_experts == 0 || c.first_k_dense_replace > 0;
  if (has_dense_layers && c.intermediate_size < 1)
    return bad("intermediate_size", fmt::format("intermediate_size is {}, must be positive in a "
                                                "model with dense layers",
                                                c.intermediate_size));
  FATHOM_TRY(check_router(c));

  // Widths of the products of two values; kernels count them in 32 bits.
  constexpr int64_t kMaxWidth = int64_t{1} << 30;
  const struct {
    const char* key;
    Checked width;
  } widths[] = {
      {"num_attention_heads", Checked(c.num_attention_heads) * c.qk_head_dim()},
      {"num_attention_heads", Checked(c.num_attention_heads) * c.v_head_dim},
      {"num_attention_heads", Checked(c.num_attention_heads) * c.kv_row_dim()},
      {"n_shared_experts", Checked(c.n_shared_experts) * c.moe_intermediate_size},
  };
  for (const auto& [key, width] : widths)
    if (!width.at_most(kMaxWidth))
      return bad(key, fmt::format("{} makes a row wider than {} values", key, kMaxWidth));

  if (c.yarn.enabled && c.yarn.beta_fast < c.yarn.beta_slow)
    return bad("beta_fast", fmt::format("beta_fast is {}, must be at least beta_slow, {}",
                                        c.yarn.beta_fast, c.yarn.beta_slow));
  if (c.yarn.enabled && c.rope_theta <= 1)
    return bad("rope_theta",
               fmt::format("rope_theta is {}, must be above 1 with yarn", c.rope_theta));
  for (const auto& [key, id] :
       {std::pair{"bos_token_id", c.bos_token_id}, std::pair{"eos_token_id", c.eos_token_id}})
    if (c.vocab_size > 0 && id >= c.vocab_size)
      return bad(key, fmt::format("{} is {}, must be below {}, the size of the vocabulary", key, id,
                                  c.vocab_size));
  return {};
}

Status check_vocabulary(const TensorInfo* embeddings, const TensorInfo* output,
                        std::string_view output_name, bool tie_is_known, ModelConfig* config) {
  for (const TensorInfo* matrix : {embeddings, output}) {
    if (matrix == nullptr) continue;
    if (matrix->n_dims != 2 || matrix->shape[0] != config->vocab_size ||
        matrix->shape[1] != config->hidden_size)
      return Status(Code::kFormat,
                    fmt::format("tensor {} has {} rows of {} in {} dimensions, must have {} of {}: "
                                "vocab_size and hidden_size",
                                matrix->name, matrix->shape[0], matrix->cols(), matrix->n_dims,
                                config->vocab_size, config->hidden_size))
          .about(matrix->name);
  }
  if (!tie_is_known) {
    config->tie_word_embeddings = output == nullptr;
    if (output == nullptr)
      config->remarks.push_back(
          fmt::format("There is no {}; the embeddings serve as the output matrix.", output_name));
  } else if (!config->tie_word_embeddings && output == nullptr) {
    return Status(
               Code::kFormat,
               fmt::format("tensor {} is missing, and tie_word_embeddings is false", output_name))
        .about(output_name);
  }
  return {};
}

}  // namespace fathom::io
