// Model shapes and their tensor lists; contracts in model_shapes.h.
#include "support/model_shapes.h"

#include <fmt/format.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "fathom/quant.hpp"

namespace fathom::test {
namespace {

ModelConfig deepseek_base() {
  ModelConfig c;
  c.architecture = "deepseek2";
  c.max_position_embeddings = 163840;
  c.rms_norm_eps = 1e-6;
  c.rope_theta = 10000;
  c.yarn = {.enabled = true,
            .factor = 40,
            .original_max_position_embeddings = 4096,
            .beta_fast = 32,
            .beta_slow = 1,
            .mscale = 0.707,
            .mscale_all_dim = 0.707};
  c.kv_lora_rank = 512;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.v_head_dim = 128;
  c.first_k_dense_replace = 1;
  return c;
}

void set_v3_routing(ModelConfig& c) {
  c.scoring_func = ScoringFunc::kSigmoid;
  c.topk_method = TopkMethod::kNoauxTc;
  c.norm_topk_prob = true;
  c.yarn.mscale = c.yarn.mscale_all_dim = 1;
}

void set_tiny(ModelConfig& c) {
  c.name = "tiny-" + c.name;
  c.vocab_size = 512;
  c.bos_token_id = 500;
  c.eos_token_id = 501;
  c.hidden_size = 256;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 4;
  c.max_position_embeddings = 2560;
  c.yarn.original_max_position_embeddings = 64;
  if (c.q_lora_rank > 0) c.q_lora_rank = 256;
  c.kv_lora_rank = 256;
  c.qk_nope_head_dim = 64;
  c.qk_rope_head_dim = 32;
  c.v_head_dim = 64;
  c.intermediate_size = 512;
  c.first_k_dense_replace = 1;
  c.moe_intermediate_size = 256;
  c.n_routed_experts = 8;
  c.num_experts_per_tok = 3;
  if (c.n_group > 1) {
    c.n_group = 4;
    c.topk_group = 2;
  }
}

// llama.cpp's use_more_bits(): the layers whose sensitive tensors get Q6_K in Q4_K_M.
bool more_bits(int64_t layer, int64_t n_layers) {
  return layer < n_layers / 8 || layer >= 7 * n_layers / 8 || (layer - n_layers / 8) % 3 == 2;
}

// The type itself, or what llama.cpp stores when rows of `cols` values are no whole blocks.
DType fitting(DType dtype, int64_t cols) {
  const auto fits = [cols](DType t) { return cols % dtype_info(t).block_elements == 0; };
  if (fits(dtype)) return dtype;
  DType small = DType::kQ4_0;
  switch (dtype) {
    case DType::kQ4_K:
      small = DType::kQ5_0;
      break;
    case DType::kQ5_K:
      small = DType::kQ5_1;
      break;
    case DType::kQ6_K:
      small = DType::kQ8_0;
      break;
    case DType::kIQ4_XS:
      small = DType::kIQ4_NL;
      break;
    default:
      break;
  }
  return fits(small) ? small : DType::kF16;
}

// Appends tensors under a common prefix.
class List {
 public:
  List(std::vector<TensorSpec>& out, std::string prefix) : out_(out), prefix_(std::move(prefix)) {}
  void add(std::string_view name, DType dtype, std::initializer_list<int64_t> shape) {
    out_.push_back({prefix_ + std::string(name), dtype, shape});
  }

 private:
  std::vector<TensorSpec>& out_;
  std::string prefix_;
};

// Which type each tensor of a GGUF file gets.
struct TypeChoice {
  bool mixture;  // Q4_K_M
  DType dtype;
  int64_t n_layers;

  DType plain(int64_t cols) const { return fitting(dtype, cols); }
  DType head(int64_t cols) const { return fitting(mixture ? DType::kQ6_K : dtype, cols); }
  // ffn_down and attn_kv_b, to which the mixture gives more bits in some layers.
  DType sensitive(int64_t layer, int64_t cols) const {
    return fitting(mixture && more_bits(layer, n_layers) ? DType::kQ6_K : dtype, cols);
  }
};

void add_gguf_attention(List& list, const ModelConfig& c, GgufLayout layout, const TypeChoice& type,
                        int64_t layer) {
  const int64_t hidden = c.hidden_size, heads = c.num_attention_heads, latent = c.kv_lora_rank;
  const int64_t nope = c.qk_nope_head_dim, v = c.v_head_dim, q_rows = heads * c.qk_head_dim();
  list.add("attn_norm.weight", DType::kF32, {hidden});
  list.add("ffn_norm.weight", DType::kF32, {hidden});
  if (c.q_lora_rank > 0) {
    list.add("attn_q_a.weight", type.plain(hidden), {c.q_lora_rank, hidden});
    list.add("attn_q_a_norm.weight", DType::kF32, {c.q_lora_rank});
    list.add("attn_q_b.weight", type.plain(c.q_lora_rank), {q_rows, c.q_lora_rank});
  } else {
    list.add("attn_q.weight", type.plain(hidden), {q_rows, hidden});
  }
  list.add("attn_kv_a_mqa.weight", type.plain(hidden), {c.kv_row_dim(), hidden});
  list.add("attn_kv_a_norm.weight", DType::kF32, {latent});
  list.add("attn_output.weight", type.plain(heads * v), {hidden, heads * v});
  if (layout != GgufLayout::kNew) {
    list.add("attn_kv_b.weight", type.sensitive(layer, latent), {heads * (nope + v), latent});
  }
  if (layout == GgufLayout::kMid) {
    list.add("attn_k_b.weight", type.plain(nope), {heads * latent, nope});
    list.add("attn_v_b.weight", type.plain(latent), {heads * v, latent});
  } else if (layout == GgufLayout::kNew) {
    list.add("attn_k_b.weight", type.plain(nope), {heads, latent, nope});
    list.add("attn_v_b.weight", type.plain(latent), {heads, v, latent});
  }
}

void add_gguf_ffn(List& list, const ModelConfig& c, const TypeChoice& type, int64_t layer) {
  const int64_t hidden = c.hidden_size;
  if (!c.is_moe_layer(layer)) {
    const int64_t width = c.intermediate_size;
    list.add("ffn_gate.weight", type.plain(hidden), {width, hidden});
    list.add("ffn_up.weight", type.plain(hidden), {width, hidden});
    list.add("ffn_down.weight", type.sensitive(layer, width), {hidden, width});
    return;
  }
  const int64_t experts = c.n_routed_experts, width = c.moe_intermediate_size;
  list.add("ffn_gate_inp.weight", DType::kF32, {experts, hidden});
  if (c.topk_method == TopkMethod::kNoauxTc) {
    list.add("exp_probs_b.bias", DType::kF32, {experts});
  }
  if (c.n_shared_experts > 0) {
    const int64_t shared = c.n_shared_experts * width;
    list.add("ffn_gate_shexp.weight", type.plain(hidden), {shared, hidden});
    list.add("ffn_up_shexp.weight", type.plain(hidden), {shared, hidden});
    list.add("ffn_down_shexp.weight", type.sensitive(layer, shared), {hidden, shared});
  }
  list.add("ffn_gate_exps.weight", type.plain(hidden), {experts, width, hidden});
  list.add("ffn_up_exps.weight", type.plain(hidden), {experts, width, hidden});
  list.add("ffn_down_exps.weight", type.sensitive(layer, width), {experts, hidden, width});
}

// Adds a projection, and in F8 the scales of its blocks.
void add_projection(List& list, const std::string& name, DType dtype, int64_t rows, int64_t cols) {
  list.add(name + ".weight", dtype, {rows, cols});
  if (dtype == DType::kF8E4M3) {
    list.add(
        name + ".weight_scale_inv", DType::kF32,
        {(rows + kF8ScaleBlock - 1) / kF8ScaleBlock, (cols + kF8ScaleBlock - 1) / kF8ScaleBlock});
  }
}

void add_mlp(List& list, const std::string& prefix, DType dtype, int64_t hidden, int64_t width) {
  add_projection(list, prefix + "gate_proj", dtype, width, hidden);
  add_projection(list, prefix + "up_proj", dtype, width, hidden);
  add_projection(list, prefix + "down_proj", dtype, hidden, width);
}

void add_hf_layer(List& list, const ModelConfig& c, DType dtype, DType plain, int64_t layer) {
  const int64_t hidden = c.hidden_size, heads = c.num_attention_heads;
  const int64_t q_rows = heads * c.qk_head_dim();
  list.add("input_layernorm.weight", plain, {hidden});
  list.add("post_attention_layernorm.weight", plain, {hidden});
  if (c.q_lora_rank > 0) {
    add_projection(list, "self_attn.q_a_proj", dtype, c.q_lora_rank, hidden);
    list.add("self_attn.q_a_layernorm.weight", plain, {c.q_lora_rank});
    add_projection(list, "self_attn.q_b_proj", dtype, q_rows, c.q_lora_rank);
  } else {
    add_projection(list, "self_attn.q_proj", dtype, q_rows, hidden);
  }
  add_projection(list, "self_attn.kv_a_proj_with_mqa", dtype, c.kv_row_dim(), hidden);
  list.add("self_attn.kv_a_layernorm.weight", plain, {c.kv_lora_rank});
  add_projection(list, "self_attn.kv_b_proj", dtype, heads * (c.qk_nope_head_dim + c.v_head_dim),
                 c.kv_lora_rank);
  add_projection(list, "self_attn.o_proj", dtype, hidden, heads * c.v_head_dim);
  if (!c.is_moe_layer(layer)) {
    add_mlp(list, "mlp.", dtype, hidden, c.intermediate_size);
    return;
  }
  list.add("mlp.gate.weight", plain, {c.n_routed_experts, hidden});
  if (c.topk_method == TopkMethod::kNoauxTc) {
    list.add("mlp.gate.e_score_correction_bias", DType::kF32, {c.n_routed_experts});
  }
  for (int64_t expert = 0; expert < c.n_routed_experts; ++expert) {
    add_mlp(list, fmt::format("mlp.experts.{}.", expert), dtype, hidden, c.moe_intermediate_size);
  }
  if (c.n_shared_experts > 0) {
    add_mlp(list, "mlp.shared_experts.", dtype, hidden,
            c.n_shared_experts * c.moe_intermediate_size);
  }
}

}  // namespace

ModelConfig v2_lite_shape() {
  ModelConfig c = deepseek_base();
  c.name = "v2-lite";
  c.vocab_size = 102400;
  c.bos_token_id = 100000;
  c.eos_token_id = 100001;
  c.hidden_size = 2048;
  c.num_hidden_layers = 27;
  c.num_attention_heads = 16;
  c.intermediate_size = 10944;
  c.moe_intermediate_size = 1408;
  c.n_routed_experts = 64;
  c.num_experts_per_tok = 6;
  c.n_shared_experts = 2;
  return c;
}

ModelConfig v2_shape() {
  ModelConfig c = deepseek_base();
  c.name = "v2";
  c.vocab_size = 102400;
  c.bos_token_id = 100000;
  c.eos_token_id = 100001;
  c.hidden_size = 5120;
  c.num_hidden_layers = 60;
  c.num_attention_heads = 128;
  c.q_lora_rank = 1536;
  c.intermediate_size = 12288;
  c.moe_intermediate_size = 1536;
  c.n_routed_experts = 160;
  c.num_experts_per_tok = 6;
  c.n_shared_experts = 2;
  c.n_group = 8;
  c.topk_group = 3;
  c.topk_method = TopkMethod::kGroupLimitedGreedy;
  c.routed_scaling_factor = 16;
  return c;
}

ModelConfig v3_shape() {
  ModelConfig c = deepseek_base();
  c.name = "v3";
  c.vocab_size = 129280;
  c.bos_token_id = 0;
  c.eos_token_id = 1;
  c.hidden_size = 7168;
  c.num_hidden_layers = 61;
  c.num_attention_heads = 128;
  c.q_lora_rank = 1536;
  c.intermediate_size = 18432;
  c.first_k_dense_replace = 3;
  c.moe_intermediate_size = 2048;
  c.n_routed_experts = 256;
  c.num_experts_per_tok = 8;
  c.n_shared_experts = 1;
  c.n_group = 8;
  c.topk_group = 4;
  c.routed_scaling_factor = 2.5;
  set_v3_routing(c);
  return c;
}

ModelConfig kimi_k2_shape() {
  ModelConfig c = v3_shape();
  c.name = "kimi-k2";
  c.vocab_size = 163840;
  c.bos_token_id = 163584;
  c.eos_token_id = 163585;
  c.num_attention_heads = 64;
  c.max_position_embeddings = 131072;
  c.rope_theta = 50000;
  c.yarn.factor = 32;
  c.yarn.beta_fast = 1;
  c.first_k_dense_replace = 1;
  c.n_routed_experts = 384;
  c.n_group = 1;
  c.topk_group = 1;
  c.routed_scaling_factor = 2.827;
  return c;
}

ModelConfig tiny_v2_lite_shape() {
  ModelConfig c = v2_lite_shape();
  set_tiny(c);
  return c;
}

ModelConfig tiny_v2_shape() {
  ModelConfig c = v2_shape();
  set_tiny(c);
  c.routed_scaling_factor = 4;
  return c;
}

ModelConfig tiny_v3_shape() {
  ModelConfig c = v3_shape();
  set_tiny(c);
  return c;
}

ModelConfig named_shape(std::string_view name) {
  if (name == "v2-lite") return v2_lite_shape();
  if (name == "v2") return v2_shape();
  if (name == "v3") return v3_shape();
  if (name == "kimi-k2") return kimi_k2_shape();
  if (name == "tiny-v2-lite") return tiny_v2_lite_shape();
  if (name == "tiny-v2") return tiny_v2_shape();
  if (name == "tiny-v3" || name == "tiny") return tiny_v3_shape();
  throw std::runtime_error(fmt::format(
      "no shape is named '{}'; there are v2-lite, v2, v3, kimi-k2, tiny-v2-lite, tiny-v2, tiny-v3",
      name));
}

DType dtype_named(std::string_view name) {
  for (int i = 0; i < kDTypeCount; ++i) {
    if (dtype_info(static_cast<DType>(i)).name == name) return static_cast<DType>(i);
  }
  throw std::runtime_error(fmt::format("no element type is named '{}'", name));
}

std::vector<TensorSpec> gguf_tensors(const ModelConfig& c, GgufLayout layout,
                                     std::string_view type_name) {
  const bool mixture = type_name == "Q4_K_M";
  const TypeChoice type{mixture, mixture ? DType::kQ4_K : dtype_named(type_name),
                        c.num_hidden_layers};
  std::vector<TensorSpec> tensors;
  List top(tensors, "");
  top.add("token_embd.weight", type.plain(c.hidden_size), {c.vocab_size, c.hidden_size});
  top.add("output_norm.weight", DType::kF32, {c.hidden_size});
  if (!c.tie_word_embeddings) {
    top.add("output.weight", type.head(c.hidden_size), {c.vocab_size, c.hidden_size});
  }
  for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    List list(tensors, fmt::format("blk.{}.", layer));
    add_gguf_attention(list, c, layout, type, layer);
    add_gguf_ffn(list, c, type, layer);
  }
  return tensors;
}

std::vector<TensorSpec> hf_tensors(const ModelConfig& c, DType dtype) {
  const DType plain = dtype == DType::kF8E4M3 ? DType::kBF16 : dtype;
  std::vector<TensorSpec> tensors;
  List top(tensors, "");
  top.add("model.embed_tokens.weight", plain, {c.vocab_size, c.hidden_size});
  for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    List list(tensors, fmt::format("model.layers.{}.", layer));
    add_hf_layer(list, c, dtype, plain, layer);
  }
  top.add("model.norm.weight", plain, {c.hidden_size});
  if (!c.tie_word_embeddings) top.add("lm_head.weight", plain, {c.vocab_size, c.hidden_size});
  return tensors;
}

}  // namespace fathom::test
