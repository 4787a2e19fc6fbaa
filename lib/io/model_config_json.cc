// config.json of a DeepSeek-V2 or -V3 checkpoint -> ModelConfig.  What the model code of the
// publishers would do differently from us is refused as kUnsupported, never ignored.
// Source: configuration_deepseek.py and modeling_deepseek.py of the released checkpoints, and the
// form that transformers writes since rope_parameters replaced rope_scaling.
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "model_config.h"
#include "text.h"

namespace fathom::io {
namespace {

Status unsupported(std::string_view key, std::string_view found, std::string_view wanted) {
  return Status(Code::kUnsupported,
                fmt::format("{} is {}; supported: {}", key, printable(found), wanted))
      .about(key);
}

// Which defaults hold for what config.json leaves out.
enum class Family : uint8_t { kV2, kV3 };

Result<Family> read_family(JsonValue root) {
  FATHOM_TRY_ASSIGN(const std::string_view type, json_string_or(root, "model_type", ""));
  const JsonValue architectures = root.find("architectures");
  std::string_view architecture;
  if (!architectures.is_null_or_absent()) {
    if (!architectures.is_array() || architectures.size() != 1 ||
        !(*architectures.begin()).is_string())
      return Status(Code::kFormat, "architectures must be an array of one string")
          .about("architectures");
    architecture = (*architectures.begin()).string();
  }
  constexpr std::string_view kSupported = "DeepseekV2ForCausalLM, DeepseekV3ForCausalLM";
  if (!architecture.empty() && architecture != "DeepseekV2ForCausalLM" &&
      architecture != "DeepseekV3ForCausalLM")
    return unsupported("architectures", architecture, kSupported);
  if (!type.empty() && type != "deepseek_v2" && type != "deepseek_v3" && type != "kimi_k2")
    return unsupported("model_type", type, "deepseek_v2, deepseek_v3, kimi_k2");
  if (architecture.empty() && type.empty())
    return Status(Code::kFormat, "architectures and model_type are both missing")
        .about("architectures");
  const bool is_v2 =
      architecture.empty() ? type == "deepseek_v2" : architecture == "DeepseekV2ForCausalLM";
  return is_v2 ? Family::kV2 : Family::kV3;
}

// Switches of the model code that we do not have.
Status refuse_unsupported(JsonValue root) {
  FATHOM_TRY_ASSIGN(const std::string_view activation, json_string_or(root, "hidden_act", "silu"));
  if (activation != "silu") return unsupported("hidden_act", activation, "silu");
  FATHOM_TRY_ASSIGN(const bool attention_bias, json_boolean_or(root, "attention_bias", false));
  if (attention_bias) return unsupported("attention_bias", "true", "false");
  FATHOM_TRY_ASSIGN(const bool interleaved, json_boolean_or(root, "rope_interleave", true));
  if (!interleaved) return unsupported("rope_interleave", "false", "true");
  const JsonValue frequency = root.find("moe_layer_freq");
  if (!frequency.is_null_or_absent() &&
      (frequency.type() != JsonType::kInteger || frequency.integer() != 1))
    return unsupported("moe_layer_freq", json_text(frequency), "1");
  const JsonValue sparse = root.find("index_topk");
  if (!sparse.is_null_or_absent())
    return unsupported("index_topk", json_text(sparse), "models without sparse attention");

  const JsonValue quantization = root.find("quantization_config");
  if (quantization.is_null_or_absent()) return {};
  if (!quantization.is_object())
    return Status(Code::kFormat, "quantization_config must be an object")
        .about("quantization_config");
  FATHOM_TRY_ASSIGN(const std::string_view method, json_string(quantization, "quant_method"));
  if (method != "fp8") return unsupported("quant_method", method, "fp8");
  FATHOM_TRY_ASSIGN(const std::string_view form, json_string_or(quantization, "fmt", "e4m3"));
  if (form != "e4m3") return unsupported("fmt", form, "e4m3");
  const JsonValue block = quantization.find("weight_block_size");
  bool is_128 = block.is_array() && block.size() == 2;
  for (const JsonValue size : block) is_128 = is_128 && size.integer() == 128;
  if (!is_128) return unsupported("weight_block_size", "another", "[128, 128]");
  return {};
}

Status read_sizes(JsonValue root, ModelConfig* c) {
  FATHOM_TRY_ASSIGN(c->vocab_size, json_integer(root, "vocab_size", 1, bound::kVocab));
  FATHOM_TRY_ASSIGN(c->hidden_size, json_integer(root, "hidden_size", 1, bound::kWidth));
  FATHOM_TRY_ASSIGN(c->num_hidden_layers,
                    json_integer(root, "num_hidden_layers", 1, bound::kLayers));
  FATHOM_TRY_ASSIGN(c->num_attention_heads,
                    json_integer(root, "num_attention_heads", 1, bound::kHeads));
  FATHOM_TRY_ASSIGN(c->max_position_embeddings,
                    json_integer(root, "max_position_embeddings", 1, bound::kContext));
  FATHOM_TRY_ASSIGN(c->rms_norm_eps,
                    json_number_or(root, "rms_norm_eps", 1e-6, bound::kSmallEps, bound::kLargeEps));
  FATHOM_TRY_ASSIGN(c->tie_word_embeddings, json_boolean_or(root, "tie_word_embeddings", false));
  FATHOM_TRY(json_integer_or(root, "num_nextn_predict_layers", 0, 0, bound::kLayers).status());
  return {};
}

Status read_attention(JsonValue root, ModelConfig* c) {
  FATHOM_TRY_ASSIGN(c->q_lora_rank, json_integer_or(root, "q_lora_rank", 0, 0, bound::kWidth));
  FATHOM_TRY_ASSIGN(c->kv_lora_rank, json_integer(root, "kv_lora_rank", 1, bound::kKvColumns));
  FATHOM_TRY_ASSIGN(c->qk_nope_head_dim,
                    json_integer(root, "qk_nope_head_dim", 1, bound::kHeadDim));
  FATHOM_TRY_ASSIGN(c->qk_rope_head_dim,
                    json_integer(root, "qk_rope_head_dim", 2, bound::kHeadDim));
  FATHOM_TRY_ASSIGN(c->v_head_dim, json_integer(root, "v_head_dim", 1, bound::kHeadDim));
  FATHOM_TRY(
      json_integer_or(root, "qk_head_dim", c->qk_head_dim(), c->qk_head_dim(), c->qk_head_dim())
          .status());
  return {};
}

Status read_rope(JsonValue root, ModelConfig* c) {
  JsonValue rope = root.find("rope_scaling");
  if (rope.is_null_or_absent()) rope = root.find("rope_parameters");
  if (!rope.is_null_or_absent() && !rope.is_object())
    return Status(Code::kFormat, "rope_scaling must be null or an object").about("rope_scaling");
  const JsonValue theta_home = root.find("rope_theta").is_null_or_absent() ? rope : root;
  FATHOM_TRY_ASSIGN(c->rope_theta, json_number_or(theta_home, "rope_theta", 10000,
                                                  bound::kSmallTheta, bound::kLargeTheta));
  if (!rope.is_object() || rope.size() == 0) return {};

  FATHOM_TRY_ASSIGN(std::string_view type, json_string_or(rope, "rope_type", ""));
  if (type.empty()) {
    FATHOM_TRY_ASSIGN(type, json_string_or(rope, "type", "default"));
  }
  if (type == "default") return {};
  if (type != "yarn") return unsupported("rope_type", type, "yarn, default");
  if (!rope.find("attention_factor").is_null_or_absent())
    return unsupported("attention_factor", json_text(rope.find("attention_factor")), "none");
  FATHOM_TRY_ASSIGN(const bool truncate, json_boolean_or(rope, "truncate", true));
  if (!truncate) return unsupported("truncate", "false", "true");

  YarnConfig& yarn = c->yarn;
  yarn.enabled = true;
  FATHOM_TRY_ASSIGN(yarn.factor, json_number(rope, "factor", 1, bound::kScale));
  FATHOM_TRY_ASSIGN(yarn.original_max_position_embeddings,
                    json_integer(rope, "original_max_position_embeddings", 1, bound::kContext));
  FATHOM_TRY_ASSIGN(yarn.beta_fast, json_number_or(rope, "beta_fast", 32, 0, bound::kScale));
  FATHOM_TRY_ASSIGN(yarn.beta_slow, json_number_or(rope, "beta_slow", 1, 0, bound::kScale));
  FATHOM_TRY_ASSIGN(yarn.mscale, json_number_or(rope, "mscale", 1, 0, 1000));
  FATHOM_TRY_ASSIGN(yarn.mscale_all_dim, json_number_or(rope, "mscale_all_dim", 0, 0, 1000));
  return {};
}

Status read_router(JsonValue root, Family family, ModelConfig* c) {
  const bool is_v2 = family == Family::kV2;
  FATHOM_TRY_ASSIGN(const std::string_view scoring,
                    json_string_or(root, "scoring_func", is_v2 ? "softmax" : "sigmoid"));
  FATHOM_TRY_ASSIGN(const std::string_view method,
                    json_string_or(root, "topk_method", is_v2 ? "greedy" : "noaux_tc"));
  if (scoring == "softmax" && method == "greedy") {
    c->topk_method = TopkMethod::kGreedy;
  } else if (scoring == "softmax" && method == "group_limited_greedy") {
    c->topk_method = TopkMethod::kGroupLimitedGreedy;
  } else if (scoring == "sigmoid" && method == "noaux_tc") {
    c->topk_method = TopkMethod::kNoauxTc;
  } else {
    return unsupported("topk_method", fmt::format("{} with scoring_func {}", method, scoring),
                       "greedy or group_limited_greedy with softmax, noaux_tc with sigmoid");
  }
  c->scoring_func = scoring == "sigmoid" ? ScoringFunc::kSigmoid : ScoringFunc::kSoftmax;

  FATHOM_TRY_ASSIGN(c->n_group, json_integer_or(root, "n_group", 1, 1, c->n_routed_experts));
  FATHOM_TRY_ASSIGN(c->topk_group, json_integer_or(root, "topk_group", 1, 1, c->n_group));
  if (c->topk_method == TopkMethod::kGreedy) c->n_group = c->topk_group = 1;  // it ignores them
  FATHOM_TRY_ASSIGN(c->norm_topk_prob, json_boolean_or(root, "norm_topk_prob", !is_v2));
  FATHOM_TRY_ASSIGN(
      c->routed_scaling_factor,
      json_number_or(root, "routed_scaling_factor", is_v2 ? 1.0 : 2.5, 1e-6, bound::kScale));
  return {};
}

Status read_feed_forward(JsonValue root, Family family, ModelConfig* c) {
  FATHOM_TRY_ASSIGN(c->intermediate_size,
                    json_integer_or(root, "intermediate_size", 0, 0, bound::kWidth));
  FATHOM_TRY_ASSIGN(c->n_routed_experts,
                    json_integer_or(root, "n_routed_experts", 0, 0, bound::kExperts));
  if (c->n_routed_experts == 0) return {};
  FATHOM_TRY_ASSIGN(c->first_k_dense_replace,
                    json_integer(root, "first_k_dense_replace", 0, c->num_hidden_layers));
  FATHOM_TRY_ASSIGN(c->moe_intermediate_size,
                    json_integer(root, "moe_intermediate_size", 1, bound::kWidth));
  FATHOM_TRY_ASSIGN(c->num_experts_per_tok,
                    json_integer(root, "num_experts_per_tok", 1, c->n_routed_experts));
  FATHOM_TRY_ASSIGN(c->n_shared_experts,
                    json_integer_or(root, "n_shared_experts", 0, 0, bound::kExperts));
  return read_router(root, family, c);
}

// A token id, or an array of which the first counts.
Status read_token_id(JsonValue root, const char* key, int64_t vocab_size, int64_t* id,
                     std::vector<std::string>* remarks) {
  const JsonValue value = root.find(key);
  if (!value.is_array()) {
    FATHOM_TRY_ASSIGN(*id, json_integer_or(root, key, -1, 0, vocab_size - 1));
    return {};
  }
  for (const JsonValue element : value)
    if (element.type() != JsonType::kInteger || element.integer() < 0 ||
        element.integer() >= vocab_size)
      return Status(Code::kFormat, fmt::format("{} has the element {}, must be in [0, {}]", key,
                                               printable(json_text(element)), vocab_size - 1))
          .about(key);
  if (value.size() == 0) return {};
  *id = (*value.begin()).integer();
  if (value.size() > 1)
    remarks->push_back(
        fmt::format("{} lists {} tokens; the first, {}, is used.", key, value.size(), *id));
  return {};
}

}  // namespace

Result<ModelConfig> config_from_json(const JsonDocument& document) {
  const JsonValue root = document.root();
  if (!root.is_object())
    return Status(Code::kFormat, fmt::format("config.json must be an object, found {}",
                                             json_type_name(root.type())));
  ModelConfig c;
  c.architecture = "deepseek2";
  FATHOM_TRY_ASSIGN(const Family family, read_family(root));
  FATHOM_TRY(refuse_unsupported(root));
  FATHOM_TRY(read_sizes(root, &c));
  FATHOM_TRY(read_attention(root, &c));
  FATHOM_TRY(read_rope(root, &c));
  FATHOM_TRY(read_feed_forward(root, family, &c));
  FATHOM_TRY(read_token_id(root, "bos_token_id", c.vocab_size, &c.bos_token_id, &c.remarks));
  FATHOM_TRY(read_token_id(root, "eos_token_id", c.vocab_size, &c.eos_token_id, &c.remarks));
  FATHOM_TRY(check_config(c));
  return c;
}

Result<ModelConfig> parse_config_json(std::string_view text) {
  constexpr JsonLimits kLimits = {.max_bytes = 16 << 20, .max_depth = 64, .max_values = 1 << 20};
  FATHOM_TRY_ASSIGN(const JsonDocument document, JsonDocument::parse(text, kLimits));
  return config_from_json(document);
}

}  // namespace fathom::io
