// GGUF keys and config.json; contracts in model_metadata.h.
#include "support/model_metadata.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <vector>

#include "fathom/quant.hpp"

namespace fathom::test {
namespace {

// The byte-level alphabet of GPT-2: printable bytes are themselves, the others U+0100 and on.
std::string byte_piece(int byte) {
  const auto printable = [](int b) {
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
  };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += printable(b) ? 0 : 1;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

void add_tokenizer(GgufWriter& gguf, const ModelConfig& c) {
  enum : int32_t { kNormal = 1, kControl = 3, kUnused = 5 };
  const std::string space = byte_piece(' ');
  const std::vector<std::string> merges = {"h e", "i n", "o u", space + " t", space + "t he"};
  std::vector<std::string> pieces;
  for (int byte = 0; byte < 256; ++byte) pieces.push_back(byte_piece(byte));
  for (const std::string& merge : merges) {
    const size_t gap = merge.find(' ');
    pieces.push_back(merge.substr(0, gap) + merge.substr(gap + 1));
  }
  const bool v3 = c.scoring_func == ScoringFunc::kSigmoid;
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  size_t next = 0;
  for (int64_t id = 0; id < c.vocab_size; ++id) {
    if (id == c.bos_token_id || id == c.eos_token_id) {
      tokens.push_back(id == c.bos_token_id ? "<｜begin▁of▁sentence｜>" : "<｜end▁of▁sentence｜>");
      types.push_back(kControl);
    } else if (next < pieces.size()) {
      tokens.push_back(pieces[next++]);
      types.push_back(kNormal);
    } else {
      tokens.push_back(fmt::format("[PAD{}]", id));
      types.push_back(kUnused);
    }
  }
  if (next < pieces.size()) {
    throw std::runtime_error(fmt::format("a vocabulary of {} is too small", c.vocab_size));
  }
  gguf.set_string("tokenizer.ggml.model", "gpt2");
  gguf.set_string("tokenizer.ggml.pre", v3 ? "deepseek-v3" : "deepseek-llm");
  gguf.set_strings("tokenizer.ggml.tokens", tokens);
  gguf.set_i32s("tokenizer.ggml.token_type", types);
  gguf.set_strings("tokenizer.ggml.merges", merges);
  gguf.set_u32("tokenizer.ggml.bos_token_id", static_cast<uint32_t>(c.bos_token_id));
  gguf.set_u32("tokenizer.ggml.eos_token_id", static_cast<uint32_t>(c.eos_token_id));
  gguf.set_bool("tokenizer.ggml.add_bos_token", true);
  gguf.set_bool("tokenizer.ggml.add_eos_token", false);
}

// llama.cpp's number of the file's prevailing type (llama_ftype).
uint32_t file_type(std::string_view type) {
  static constexpr struct {
    std::string_view name;
    uint32_t number;
  } kTypes[] = {{"F32", 0},   {"F16", 1},     {"Q4_0", 2},    {"Q4_1", 3},
                {"Q8_0", 7},  {"Q5_0", 8},    {"Q5_1", 9},    {"Q2_K", 10},
                {"Q3_K", 12}, {"Q4_K", 14},   {"Q4_K_M", 15}, {"Q5_K", 16},
                {"Q6_K", 18}, {"IQ4_NL", 25}, {"IQ4_XS", 30}, {"BF16", 32}};
  for (const auto& entry : kTypes) {
    if (entry.name == type) return entry.number;
  }
  return 1024;  // LLAMA_FTYPE_GUESSED
}

}  // namespace

GgufWriter gguf_metadata(const ModelConfig& c, GgufLayout layout, std::string_view type) {
  GgufWriter gguf;
  const auto key = [](std::string_view name) { return "deepseek2." + std::string(name); };
  const auto u32 = [&](std::string_view name, int64_t value) {
    gguf.set_u32(key(name), static_cast<uint32_t>(value));
  };
  const auto f32 = [&](std::string_view name, double value) {
    gguf.set_f32(key(name), static_cast<float>(value));
  };
  const bool current = layout == GgufLayout::kNew;
  const bool sigmoid = c.scoring_func == ScoringFunc::kSigmoid;
  gguf.set_string("general.architecture", "deepseek2");
  gguf.set_string("general.name", c.name);
  u32("block_count", c.num_hidden_layers);
  u32("context_length", c.max_position_embeddings);
  u32("embedding_length", c.hidden_size);
  u32("feed_forward_length", c.intermediate_size);
  u32("attention.head_count", c.num_attention_heads);
  u32("attention.head_count_kv", current ? 1 : c.num_attention_heads);
  f32("rope.freq_base", c.rope_theta);
  f32("attention.layer_norm_rms_epsilon", c.rms_norm_eps);
  u32("expert_used_count", c.num_experts_per_tok);
  if (current) {
    u32("expert_group_count", c.n_group);
    u32("expert_group_used_count", c.topk_group);
  }
  if (current || sigmoid) u32("expert_gating_func", sigmoid ? 2 : 1);
  gguf.set_u32("general.file_type", file_type(type));
  gguf.set_u32("general.quantization_version", 2);
  u32("leading_dense_block_count", c.first_k_dense_replace);
  u32("vocab_size", c.vocab_size);
  if (c.q_lora_rank > 0) u32("attention.q_lora_rank", c.q_lora_rank);
  u32("attention.kv_lora_rank", c.kv_lora_rank);
  u32("attention.key_length", current ? c.kv_row_dim() : c.qk_head_dim());
  u32("attention.value_length", current ? c.kv_lora_rank : c.v_head_dim);
  if (current) {
    u32("attention.key_length_mla", c.qk_head_dim());
    u32("attention.value_length_mla", c.v_head_dim);
  }
  u32("expert_feed_forward_length", c.moe_intermediate_size);
  u32("expert_count", c.n_routed_experts);
  u32("expert_shared_count", c.n_shared_experts);
  f32("expert_weights_scale", c.routed_scaling_factor);
  if (c.norm_topk_prob) gguf.set_bool(key("expert_weights_norm"), true);
  u32("rope.dimension_count", c.qk_rope_head_dim);
  if (c.yarn.enabled) {
    gguf.set_string(key("rope.scaling.type"), "yarn");
    f32("rope.scaling.factor", c.yarn.factor);
    u32("rope.scaling.original_context_length", c.yarn.original_max_position_embeddings);
    f32("rope.scaling.yarn_log_multiplier", 0.1 * c.yarn.mscale_all_dim);
    if (current) {
      f32("rope.scaling.yarn_beta_fast", c.yarn.beta_fast);
      f32("rope.scaling.yarn_beta_slow", c.yarn.beta_slow);
    }
  }
  add_tokenizer(gguf, c);
  return gguf;
}

std::string hf_config_json(const ModelConfig& c, DType dtype) {
  const bool v3 = c.scoring_func == ScoringFunc::kSigmoid;
  const char* topk_method = c.topk_method == TopkMethod::kNoauxTc ? "noaux_tc"
                            : c.topk_method == TopkMethod::kGroupLimitedGreedy
                                ? "group_limited_greedy"
                                : "greedy";
  const char* torch_dtype = dtype == DType::kF32   ? "float32"
                            : dtype == DType::kF16 ? "float16"
                                                   : "bfloat16";
  nlohmann::json j = {
      {"architectures", {v3 ? "DeepseekV3ForCausalLM" : "DeepseekV2ForCausalLM"}},
      {"model_type", v3 ? "deepseek_v3" : "deepseek_v2"},
      {"attention_bias", false},
      {"bos_token_id", c.bos_token_id},
      {"eos_token_id", c.eos_token_id},
      {"first_k_dense_replace", c.first_k_dense_replace},
      {"hidden_act", "silu"},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"kv_lora_rank", c.kv_lora_rank},
      {"max_position_embeddings", c.max_position_embeddings},
      {"moe_intermediate_size", c.moe_intermediate_size},
      {"moe_layer_freq", 1},
      {"n_group", c.n_group},
      {"n_routed_experts", c.n_routed_experts},
      {"n_shared_experts", c.n_shared_experts},
      {"norm_topk_prob", c.norm_topk_prob},
      {"num_attention_heads", c.num_attention_heads},
      {"num_experts_per_tok", c.num_experts_per_tok},
      {"num_hidden_layers", c.num_hidden_layers},
      {"num_key_value_heads", c.num_attention_heads},
      {"num_nextn_predict_layers", 0},
      {"q_lora_rank", nullptr},
      {"qk_nope_head_dim", c.qk_nope_head_dim},
      {"qk_rope_head_dim", c.qk_rope_head_dim},
      {"rms_norm_eps", c.rms_norm_eps},
      {"rope_theta", c.rope_theta},
      {"routed_scaling_factor", c.routed_scaling_factor},
      {"scoring_func", v3 ? "sigmoid" : "softmax"},
      {"tie_word_embeddings", c.tie_word_embeddings},
      {"topk_group", c.topk_group},
      {"topk_method", topk_method},
      {"torch_dtype", torch_dtype},
      {"v_head_dim", c.v_head_dim},
      {"vocab_size", c.vocab_size},
  };
  if (c.q_lora_rank > 0) j["q_lora_rank"] = c.q_lora_rank;
  if (c.yarn.enabled) {
    j["rope_scaling"] = {
        {"type", "yarn"},
        {"factor", c.yarn.factor},
        {"original_max_position_embeddings", c.yarn.original_max_position_embeddings},
        {"beta_fast", c.yarn.beta_fast},
        {"beta_slow", c.yarn.beta_slow},
        {"mscale", c.yarn.mscale},
        {"mscale_all_dim", c.yarn.mscale_all_dim}};
  }
  if (dtype == DType::kF8E4M3) {
    j["quantization_config"] = {{"activation_scheme", "dynamic"},
                                {"fmt", "e4m3"},
                                {"quant_method", "fp8"},
                                {"weight_block_size", {kF8ScaleBlock, kF8ScaleBlock}}};
  }
  return j.dump(2);
}

}  // namespace fathom::test
