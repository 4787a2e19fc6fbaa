// Names and shapes: gguf-py's tensor maps for deepseek2 and modeling_deepseek.py.  Types of the
// Q4_K_M mixture: llama.cpp, src/llama-quant.cpp.
#include "tensor_listing.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <initializer_list>
#include <system_error>
#include <utility>

#include "checked.h"
#include "fathom/quant.hpp"
#include "tensor_file_builder.h"

namespace fathom::io {
namespace {

constexpr int64_t kMaxParameters = int64_t{1} << 52;  // 4000 times the largest released model

bool is_file(const std::filesystem::path& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

// Collects tensors; the first that cannot be is kept and ends the list.
class Listing {
 public:
  explicit Listing(std::vector<TensorInfo>& tensors) : tensors_(tensors) {}

  void add(std::string name, DType dtype, std::initializer_list<int64_t> shape) {
    if (!status_.ok()) return;
    TensorInfo tensor;
    tensor.name = std::move(name);
    tensor.dtype = dtype;
    Checked elements(1);
    for (const int64_t extent : shape) {
      tensor.shape[tensor.n_dims++] = extent;
      elements = elements * extent;
    }
    total_ = total_ + elements;
    if (!total_.at_most(kMaxParameters) || std::cmp_greater_equal(tensors_.size(), kMaxTensors)) {
      status_ = Status(Code::kFormat, fmt::format("the configuration asks for more than {} "
                                                  "parameters or {} tensors",
                                                  kMaxParameters, kMaxTensors));
      return;
    }
    tensor.bytes = row_bytes(dtype, tensor.elements());
    tensors_.push_back(std::move(tensor));
  }
  bool ok() const noexcept { return status_.ok(); }
  Status take_status() { return std::move(status_); }

 private:
  std::vector<TensorInfo>& tensors_;
  Checked total_{0};
  Status status_;
};

// ---- as GGUF has them ----

// llama.cpp's use_more_bits(): the layers whose sensitive tensors get Q6_K in Q4_K_M.
bool more_bits(int64_t layer, int64_t n_layers) {
  return layer < n_layers / 8 || layer >= 7 * n_layers / 8 || (layer - n_layers / 8) % 3 == 2;
}

bool fits(DType dtype, int64_t cols) {
  return cols % dtype_info(dtype).block_elements == 0;
}

// The type itself, or what llama.cpp takes when rows of `cols` values are no whole blocks.
DType fitting(DType dtype, int64_t cols) {
  if (fits(dtype, cols)) return dtype;
  const DType smaller_blocks = dtype == DType::kQ4_K ? DType::kQ5_0 : DType::kQ8_0;
  return fits(smaller_blocks, cols) ? smaller_blocks : DType::kF16;
}

class GgufListing {
 public:
  GgufListing(Listing& list, const ModelConfig& config, DType dtype)
      : list_(list), c_(config), dtype_(dtype) {}

  void run() {
    matrix("token_embd.weight", dtype_, {c_.vocab_size, c_.hidden_size});
    vector("output_norm.weight", c_.hidden_size);
    if (!c_.tie_word_embeddings)
      matrix("output.weight", dtype_ == DType::kQ4_K ? DType::kQ6_K : dtype_,
             {c_.vocab_size, c_.hidden_size});
    for (int64_t layer = 0; layer < c_.num_hidden_layers && list_.ok(); ++layer) {
      attention(layer);
      feed_forward(layer);
    }
  }

 private:
  static std::string block(int64_t layer, std::string_view name) {
    return fmt::format("blk.{}.{}.weight", layer, name);
  }
  void matrix(std::string name, DType dtype, std::initializer_list<int64_t> shape) {
    list_.add(std::move(name), fitting(dtype, *(shape.end() - 1)), shape);
  }
  void vector(std::string name, int64_t n) { list_.add(std::move(name), DType::kF32, {n}); }

  void attention(int64_t l) {
    const int64_t hidden = c_.hidden_size, heads = c_.num_attention_heads, rank = c_.kv_lora_rank;
    const int64_t q_rows = heads * c_.qk_head_dim(), v = c_.v_head_dim;
    vector(block(l, "attn_norm"), hidden);
    if (c_.q_lora_rank > 0) {
      matrix(block(l, "attn_q_a"), dtype_, {c_.q_lora_rank, hidden});
      vector(block(l, "attn_q_a_norm"), c_.q_lora_rank);
      matrix(block(l, "attn_q_b"), dtype_, {q_rows, c_.q_lora_rank});
    } else {
      matrix(block(l, "attn_q"), dtype_, {q_rows, hidden});
    }
    matrix(block(l, "attn_kv_a_mqa"), dtype_, {c_.kv_row_dim(), hidden});
    vector(block(l, "attn_kv_a_norm"), rank);
    matrix(block(l, "attn_k_b"), dtype_, {heads, rank, c_.qk_nope_head_dim});
    matrix(block(l, "attn_v_b"), dtype_, {heads, v, rank});
    matrix(block(l, "attn_output"), dtype_, {hidden, heads * v});
  }

  void feed_forward(int64_t l) {
    const int64_t hidden = c_.hidden_size;
    const DType down =
        dtype_ == DType::kQ4_K && more_bits(l, c_.num_hidden_layers) ? DType::kQ6_K : dtype_;
    vector(block(l, "ffn_norm"), hidden);
    if (!c_.is_moe_layer(l)) {
      const int64_t width = c_.intermediate_size;
      matrix(block(l, "ffn_gate"), dtype_, {width, hidden});
      matrix(block(l, "ffn_up"), dtype_, {width, hidden});
      matrix(block(l, "ffn_down"), down, {hidden, width});
      return;
    }
    const int64_t experts = c_.n_routed_experts, width = c_.moe_intermediate_size;
    list_.add(block(l, "ffn_gate_inp"), DType::kF32, {experts, hidden});
    if (c_.topk_method == TopkMethod::kNoauxTc)
      vector(fmt::format("blk.{}.exp_probs_b.bias", l), experts);
    matrix(block(l, "ffn_gate_exps"), dtype_, {experts, width, hidden});
    matrix(block(l, "ffn_up_exps"), dtype_, {experts, width, hidden});
    matrix(block(l, "ffn_down_exps"), down, {experts, hidden, width});
    if (const int64_t shared = c_.n_shared_experts * width; shared > 0) {
      matrix(block(l, "ffn_gate_shexp"), dtype_, {shared, hidden});
      matrix(block(l, "ffn_up_shexp"), dtype_, {shared, hidden});
      matrix(block(l, "ffn_down_shexp"), down, {hidden, shared});
    }
  }

  Listing& list_;
  const ModelConfig& c_;
  const DType dtype_;
};

// ---- as FP8 checkpoints have them ----

class Fp8Listing {
 public:
  Fp8Listing(Listing& list, const ModelConfig& config) : list_(list), c_(config) {}

  void run() {
    plain("model.embed_tokens", {c_.vocab_size, c_.hidden_size});
    plain("model.norm", {c_.hidden_size});
    if (!c_.tie_word_embeddings) plain("lm_head", {c_.vocab_size, c_.hidden_size});
    for (int64_t layer = 0; layer < c_.num_hidden_layers && list_.ok(); ++layer) {
      const std::string prefix = fmt::format("model.layers.{}.", layer);
      attention(prefix);
      feed_forward(prefix, layer);
    }
  }

 private:
  void plain(const std::string& name, std::initializer_list<int64_t> shape) {
    list_.add(name + ".weight", DType::kBF16, shape);
  }
  void projection(const std::string& name, int64_t rows, int64_t cols) {
    const auto blocks = [](int64_t n) { return (n + kF8ScaleBlock - 1) / kF8ScaleBlock; };
    list_.add(name + ".weight", DType::kF8E4M3, {rows, cols});
    list_.add(name + ".weight_scale_inv", DType::kF32, {blocks(rows), blocks(cols)});
  }
  void mlp(const std::string& prefix, int64_t width) {
    projection(prefix + "gate_proj", width, c_.hidden_size);
    projection(prefix + "up_proj", width, c_.hidden_size);
    projection(prefix + "down_proj", c_.hidden_size, width);
  }

  void attention(const std::string& layer) {
    const std::string prefix = layer + "self_attn.";
    const int64_t hidden = c_.hidden_size, heads = c_.num_attention_heads;
    plain(layer + "input_layernorm", {hidden});
    if (c_.q_lora_rank > 0) {
      projection(prefix + "q_a_proj", c_.q_lora_rank, hidden);
      plain(prefix + "q_a_layernorm", {c_.q_lora_rank});
      projection(prefix + "q_b_proj", heads * c_.qk_head_dim(), c_.q_lora_rank);
    } else {
      projection(prefix + "q_proj", heads * c_.qk_head_dim(), hidden);
    }
    projection(prefix + "kv_a_proj_with_mqa", c_.kv_row_dim(), hidden);
    plain(prefix + "kv_a_layernorm", {c_.kv_lora_rank});
    projection(prefix + "kv_b_proj", heads * (c_.qk_nope_head_dim + c_.v_head_dim),
               c_.kv_lora_rank);
    projection(prefix + "o_proj", hidden, heads * c_.v_head_dim);
  }

  void feed_forward(const std::string& layer, int64_t l) {
    plain(layer + "post_attention_layernorm", {c_.hidden_size});
    if (!c_.is_moe_layer(l)) return mlp(layer + "mlp.", c_.intermediate_size);
    plain(layer + "mlp.gate", {c_.n_routed_experts, c_.hidden_size});
    if (c_.topk_method == TopkMethod::kNoauxTc)
      list_.add(layer + "mlp.gate.e_score_correction_bias", DType::kF32, {c_.n_routed_experts});
    for (int64_t expert = 0; expert < c_.n_routed_experts && list_.ok(); ++expert)
      mlp(fmt::format("{}mlp.experts.{}.", layer, expert), c_.moe_intermediate_size);
    if (c_.n_shared_experts > 0)
      mlp(layer + "mlp.shared_experts.", c_.n_shared_experts * c_.moe_intermediate_size);
  }

  Listing& list_;
  const ModelConfig& c_;
};

DType gguf_type(WeightsType type) {
  switch (type) {
    case WeightsType::kQ8_0:
      return DType::kQ8_0;
    case WeightsType::kQ4_K:
      return DType::kQ4_K;
    case WeightsType::kF16:
      return DType::kF16;
    default:
      return DType::kBF16;
  }
}

}  // namespace

bool is_config_only(const std::string& path) {
  const std::filesystem::path place(path);
  std::error_code error;
  if (!std::filesystem::is_directory(place, error))
    return path.ends_with(".json") && is_file(place);
  return is_file(place / "config.json") && !is_file(place / "model.safetensors") &&
         !is_file(place / "model.safetensors.index.json");
}

Result<TensorFile> list_tensors(const std::string& path, std::optional<WeightsType> type) {
  std::error_code error;
  const bool folder = std::filesystem::is_directory(path, error);
  const std::string file = folder ? (std::filesystem::path(path) / "config.json").string() : path;
  ModelConfig config;
  bool tie_is_known = false;  // what config.json leaves out is false, as its readers have it
  TensorFileBuilder facts(FileFormat::kSafetensors);
  FATHOM_TRY(read_config_json(file, &facts, &config, &tie_is_known));
  const bool is_fp8 =
      std::find(facts.metadata().begin(), facts.metadata().end(),
                std::pair<std::string, std::string>("quantization_config.quant_method", "fp8")) !=
      facts.metadata().end();
  const WeightsType listed = type.value_or(is_fp8 ? WeightsType::kF8 : WeightsType::kBF16);

  TensorFileBuilder builder(listed == WeightsType::kF8 ? FileFormat::kSafetensors
                                                       : FileFormat::kGguf);
  builder.hash = facts.hash;
  builder.hash.update(static_cast<uint64_t>(listed));
  builder.metadata() = std::move(facts.metadata());
  builder.tokenizer() = std::move(facts.tokenizer());
  Listing list(builder.tensors());
  if (listed == WeightsType::kF8)
    Fp8Listing(list, config).run();
  else
    GgufListing(list, config, gguf_type(listed)).run();
  if (Status status = list.take_status(); !status.ok()) return std::move(status).in(file);
  FATHOM_TRY(builder.sort_tensors());
  config.remarks.push_back(
      fmt::format("There are no weights; weights.type {} is assumed.", weights_type_name(listed)));
  builder.set_config(std::move(config));
  return std::move(builder).finish();
}

}  // namespace fathom::io
