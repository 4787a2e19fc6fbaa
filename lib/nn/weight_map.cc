// Tensor names to weights: GGUF (deepseek2, three MLA layouts) and Hugging Face names.
#include <fmt/format.h>

#include <map>

#include "weights.h"

namespace fathom::nn {
namespace {

// A role's tensor name in either format; "{}" is the layer.
struct RoleName {
  const char* gguf;
  const char* hugging_face;
};
constexpr RoleName kEmbed{"token_embd.weight", "model.embed_tokens.weight"};
constexpr RoleName kFinalNorm{"output_norm.weight", "model.norm.weight"};
constexpr RoleName kHead{"output.weight", "lm_head.weight"};
constexpr RoleName kAttnNorm{"blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"};
constexpr RoleName kQ{"blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight"};
constexpr RoleName kQA{"blk.{}.attn_q_a.weight", "model.layers.{}.self_attn.q_a_proj.weight"};
constexpr RoleName kQANorm{"blk.{}.attn_q_a_norm.weight",
                           "model.layers.{}.self_attn.q_a_layernorm.weight"};
constexpr RoleName kQB{"blk.{}.attn_q_b.weight", "model.layers.{}.self_attn.q_b_proj.weight"};
constexpr RoleName kKvA{"blk.{}.attn_kv_a_mqa.weight",
                        "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight"};
constexpr RoleName kKvANorm{"blk.{}.attn_kv_a_norm.weight",
                            "model.layers.{}.self_attn.kv_a_layernorm.weight"};
constexpr RoleName kKvB{"blk.{}.attn_kv_b.weight", "model.layers.{}.self_attn.kv_b_proj.weight"};
constexpr RoleName kKB{"blk.{}.attn_k_b.weight", ""};
constexpr RoleName kVB{"blk.{}.attn_v_b.weight", ""};
constexpr RoleName kO{"blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"};
constexpr RoleName kFfnNorm{"blk.{}.ffn_norm.weight",
                            "model.layers.{}.post_attention_layernorm.weight"};
constexpr RoleName kGate{"blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"};
constexpr RoleName kUp{"blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"};
constexpr RoleName kDown{"blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"};
constexpr RoleName kSharedGate{"blk.{}.ffn_gate_shexp.weight",
                               "model.layers.{}.mlp.shared_experts.gate_proj.weight"};
constexpr RoleName kSharedUp{"blk.{}.ffn_up_shexp.weight",
                             "model.layers.{}.mlp.shared_experts.up_proj.weight"};
constexpr RoleName kSharedDown{"blk.{}.ffn_down_shexp.weight",
                               "model.layers.{}.mlp.shared_experts.down_proj.weight"};
constexpr RoleName kRouter{"blk.{}.ffn_gate_inp.weight", "model.layers.{}.mlp.gate.weight"};
constexpr RoleName kRouterBias{"blk.{}.exp_probs_b.bias",
                               "model.layers.{}.mlp.gate.e_score_correction_bias"};
constexpr RoleName kGateExps{"blk.{}.ffn_gate_exps.weight",
                             "model.layers.{}.mlp.experts.{}.gate_proj.weight"};
constexpr RoleName kUpExps{"blk.{}.ffn_up_exps.weight",
                           "model.layers.{}.mlp.experts.{}.up_proj.weight"};
constexpr RoleName kDownExps{"blk.{}.ffn_down_exps.weight",
                             "model.layers.{}.mlp.experts.{}.down_proj.weight"};

std::string shape_text(const io::TensorInfo& t) {
  std::string text = "[";
  for (int i = 0; i < t.n_dims; ++i) text += fmt::format("{}{}", i ? ", " : "", t.shape[i]);
  return text + "]";
}

}  // namespace

// Walks the layers and fills a WeightMap; the first problem is kept and ends the walk.
class WeightMapper {
 public:
  WeightMapper(const io::TensorFile& file, const Placement& placement,
               std::span<const std::unique_ptr<Backend>> devices)
      : file_(file), c_(file.config()), placement_(placement), devices_(devices) {}

  Result<WeightMap> run() {
    map_.weights_ = std::make_unique<Weights>();
    Weights& w = *map_.weights_;
    w.layers.resize(static_cast<size_t>(c_.num_hidden_layers));
    const int first = placement_.embed_device, last = placement_.head_device;
    const Purpose weights = Purpose::kWeights;

    matrix(w.embed, kEmbed, -1, first, weights, c_.vocab_size, c_.hidden_size);
    for (int64_t l = 0; l < c_.num_hidden_layers && status_.ok(); ++l) layer(l);
    vector(w.final_norm, kFinalNorm, -1, last, c_.hidden_size);
    map_.head_is_embed_ = c_.tie_word_embeddings && first == last;
    if (!map_.head_is_embed_)
      matrix(w.head, c_.tie_word_embeddings ? kEmbed : kHead, -1, last, weights, c_.vocab_size,
             c_.hidden_size);
    if (!status_.ok()) return std::move(status_);

    std::string types;
    for (const auto& [dtype, count] : types_)
      types += fmt::format("{}{} {}", types.empty() ? "" : ", ", count, dtype_info(dtype).name);
    map_.remarks.push_back("weight types: " + types);
    if (!mla_layout_.empty()) map_.remarks.push_back("MLA layout: " + mla_layout_);
    return std::move(map_);
  }

 private:
  std::string name_of(const RoleName& role, int64_t layer, int64_t expert = 0) const {
    const char* pattern = file_.format() == io::FileFormat::kGguf ? role.gguf : role.hugging_face;
    return fmt::format(fmt::runtime(pattern), layer, expert);
  }

  const io::TensorInfo* find(const RoleName& role, int64_t layer, int64_t expert = 0) const {
    return file_.find(name_of(role, layer, expert));
  }

  void fail(Code code, const std::string& name, const std::string& message) {
    if (status_.ok()) status_ = Status(code, message).about(name);
  }

  // The tensor seen as [rows, cols]; reports a missing tensor or another shape.
  const io::TensorInfo* require(const std::string& name, int64_t rows, int64_t cols) {
    if (!status_.ok()) return nullptr;
    const io::TensorInfo* t = file_.find(name);
    if (t == nullptr) {
      fail(Code::kFormat, name, fmt::format("tensor {} is missing", name));
      return nullptr;
    }
    if (t->cols() != cols || t->elements() != rows * cols) {
      fail(Code::kFormat, name,
           fmt::format("tensor {} has shape {}, the configuration asks for [{}, {}]", name,
                       shape_text(*t), rows, cols));
      return nullptr;
    }
    if (!is_weight_dtype(t->dtype)) {
      fail(Code::kUnsupported, name,
           fmt::format("tensor {} has type {}, which is not a weight type", name,
                       dtype_info(t->dtype).name));
      return nullptr;
    }
    return t;
  }

  const io::TensorInfo* scales_of(const io::TensorInfo& t) {
    if (t.dtype != DType::kF8E4M3) return nullptr;
    const std::string name = t.name + "_scale_inv";
    const io::TensorInfo* s = file_.find(name);
    const int64_t rows = t.elements() / t.cols();
    if (s == nullptr) {
      fail(Code::kFormat, name,
           fmt::format("tensor {} (block scales of {}) is missing", name, t.name));
    } else if (s->dtype != DType::kF32 || s->n_dims != 2 || s->shape[0] != (rows + 127) / 128 ||
               s->shape[1] != (t.cols() + 127) / 128) {
      fail(Code::kFormat, name,
           fmt::format("tensor {} must be F32 [{}, {}], is {} {}", name, (rows + 127) / 128,
                       (t.cols() + 127) / 128, dtype_info(s->dtype).name, shape_text(*s)));
    }
    return s;
  }

  // Adds a weight of `count` matrices [rows, cols] made of `sources`.
  void add(Weight& target, int device, Purpose purpose, int64_t rows, int64_t cols,
           std::vector<RowSource> sources) {
    if (!status_.ok()) return;
    WeightItem item;
    item.name = sources.front().tensor->name;
    item.device = device;
    item.purpose = purpose;
    item.weight.dtype = sources.front().tensor->dtype;
    item.weight.block_scaled = sources.front().scales != nullptr;
    item.weight.rows = rows;
    item.weight.cols = cols;
    item.weight.count = static_cast<int64_t>(sources.size());
    for (const RowSource& s : sources) {
      if (s.tensor->dtype != item.weight.dtype)
        return fail(
            Code::kUnsupported, s.tensor->name,
            fmt::format("tensor {} has type {}, its siblings {}", s.tensor->name,
                        dtype_info(s.tensor->dtype).name, dtype_info(item.weight.dtype).name));
      // Block scales must start with the matrix; where a slice cuts a block (never in published
      // shapes) its values are stored as f32 instead, which is exact.
      if (s.scales != nullptr && s.first_row % 128 != 0) item.to_f32 = true;
    }
    if (item.to_f32) item.weight.dtype = DType::kF32, item.weight.block_scaled = false;
    if (Status s = devices_[static_cast<size_t>(device)]->weight_layout(item.weight); !s.ok()) {
      status_ = std::move(s).in(item.name);
      return;
    }
    ++types_[sources.front().tensor->dtype];
    item.rows = std::move(sources);
    item.target = &target;
    target = item.weight;
    map_.items_.push_back(std::move(item));
  }

  void matrix(Weight& target, const RoleName& role, int64_t layer, int device, Purpose purpose,
              int64_t rows, int64_t cols) {
    if (const io::TensorInfo* t = require(name_of(role, layer), rows, cols))
      add(target, device, purpose, rows, cols, {{t, 0, scales_of(*t)}});
  }

  void vector(const float*& target, const RoleName& role, int64_t layer, int device, int64_t n) {
    const io::TensorInfo* t = require(name_of(role, layer), 1, n);
    if (t == nullptr) return;
    WeightItem item;
    item.name = t->name;
    item.device = device;
    item.weight.rows = 1;
    item.weight.cols = n;
    item.to_f32 = true;
    item.rows = {{t, 0, nullptr}};
    item.vector = &target;
    map_.items_.push_back(std::move(item));
  }

  // `span` of the `count` matrices stacked in one tensor, on the span's device.
  void stacked(Weight& target, const std::string& name, const ExpertSpan& span, Purpose purpose,
               int64_t count, int64_t rows, int64_t cols) {
    const io::TensorInfo* t = require(name, count * rows, cols);
    if (t == nullptr) return;
    std::vector<RowSource> sources;
    for (int64_t i = span.first; i < span.first + span.count; ++i)
      sources.push_back({t, i * rows, nullptr});
    if (t->dtype == DType::kF8E4M3)
      return fail(Code::kUnsupported, name, fmt::format("tensor {}: stacked FP8 tensors", name));
    add(target, span.device, purpose, rows, cols, std::move(sources));
  }

  void experts(Weight& target, const RoleName& role, int64_t layer, const ExpertSpan& span,
               int64_t rows, int64_t cols) {
    if (file_.format() == io::FileFormat::kGguf)
      return stacked(target, name_of(role, layer), span, Purpose::kExperts, c_.n_routed_experts,
                     rows, cols);
    std::vector<RowSource> sources;
    for (int64_t e = span.first; e < span.first + span.count; ++e) {
      const io::TensorInfo* t = require(name_of(role, layer, e), rows, cols);
      if (t == nullptr) return;
      sources.push_back({t, 0, scales_of(*t)});
    }
    add(target, span.device, Purpose::kExperts, rows, cols, std::move(sources));
  }

  // kv_b_proj by head: split as GGUF's newer layouts have it, or cut out of the one tensor.
  void key_value_up(LayerWeights& w, int64_t l, int device) {
    const int64_t heads = c_.num_attention_heads, nope = c_.qk_nope_head_dim, v = c_.v_head_dim,
                  rank = c_.kv_lora_rank;
    if (file_.format() == io::FileFormat::kGguf && find(kKB, l) != nullptr) {
      mla_layout_ = find(kKvB, l) != nullptr ? "attn_k_b + attn_v_b (attn_kv_b ignored)"
                                             : "attn_k_b + attn_v_b";
      const ExpertSpan all{device, 0, heads};
      stacked(w.k_b, name_of(kKB, l), all, Purpose::kWeights, heads, rank, nope);
      stacked(w.v_b, name_of(kVB, l), all, Purpose::kWeights, heads, v, rank);
      return;
    }
    mla_layout_ = "kv_b in one piece, cut by head";
    const io::TensorInfo* t = require(name_of(kKvB, l), heads * (nope + v), rank);
    if (t == nullptr) return;
    const io::TensorInfo* scales = scales_of(*t);
    std::vector<RowSource> k_rows, v_rows;
    for (int64_t h = 0; h < heads; ++h) {
      k_rows.push_back({t, h * (nope + v), scales});
      v_rows.push_back({t, h * (nope + v) + nope, scales});
    }
    w.k_b_transposed = true;
    add(w.k_b, device, Purpose::kWeights, nope, rank, std::move(k_rows));
    add(w.v_b, device, Purpose::kWeights, v, rank, std::move(v_rows));
  }

  void layer(int64_t l) {
    LayerWeights& w = map_.weights_->layers[static_cast<size_t>(l)];
    const LayerPlacement& place = placement_.layers[static_cast<size_t>(l)];
    const int device = place.device;
    const int64_t hidden = c_.hidden_size, heads = c_.num_attention_heads;
    const int64_t q_rows = heads * c_.qk_head_dim();
    const Purpose weights = Purpose::kWeights;

    vector(w.attn_norm, kAttnNorm, l, device, hidden);
    if (c_.q_lora_rank > 0) {
      matrix(w.q_a, kQA, l, device, weights, c_.q_lora_rank, hidden);
      vector(w.q_a_norm, kQANorm, l, device, c_.q_lora_rank);
      matrix(w.q_b, kQB, l, device, weights, q_rows, c_.q_lora_rank);
    } else {
      matrix(w.q, kQ, l, device, weights, q_rows, hidden);
    }
    matrix(w.kv_a, kKvA, l, device, weights, c_.kv_row_dim(), hidden);
    vector(w.kv_a_norm, kKvANorm, l, device, c_.kv_lora_rank);
    key_value_up(w, l, device);
    matrix(w.o, kO, l, device, weights, hidden, heads * c_.v_head_dim);

    vector(w.ffn_norm, kFfnNorm, l, device, hidden);
    if (!c_.is_moe_layer(l)) {
      matrix(w.gate, kGate, l, device, weights, c_.intermediate_size, hidden);
      matrix(w.up, kUp, l, device, weights, c_.intermediate_size, hidden);
      matrix(w.down, kDown, l, device, weights, hidden, c_.intermediate_size);
      return;
    }
    const int64_t moe = c_.moe_intermediate_size, shared = c_.n_shared_experts * moe;
    matrix(w.router, kRouter, l, device, weights, c_.n_routed_experts, hidden);
    if (find(kRouterBias, l) != nullptr)
      vector(w.router_bias, kRouterBias, l, device, c_.n_routed_experts);
    else if (c_.topk_method == TopkMethod::kNoauxTc)
      fail(Code::kFormat, name_of(kRouterBias, l),
           fmt::format("tensor {} is missing", name_of(kRouterBias, l)));
    w.experts.resize(place.experts.size());  // items point into it
    for (size_t i = 0; i < place.experts.size(); ++i) {
      const ExpertSpan& span = place.experts[i];
      w.experts[i].first = span.first;
      experts(w.experts[i].gate, kGateExps, l, span, moe, hidden);
      experts(w.experts[i].up, kUpExps, l, span, moe, hidden);
      experts(w.experts[i].down, kDownExps, l, span, hidden, moe);
    }
    if (shared > 0) {
      matrix(w.gate, kSharedGate, l, device, weights, shared, hidden);
      matrix(w.up, kSharedUp, l, device, weights, shared, hidden);
      matrix(w.down, kSharedDown, l, device, weights, hidden, shared);
    }
  }

  const io::TensorFile& file_;
  const ModelConfig& c_;
  const Placement& placement_;
  std::span<const std::unique_ptr<Backend>> devices_;
  WeightMap map_;
  std::map<DType, int> types_;
  std::string mla_layout_;
  Status status_;
};

Result<WeightMap> WeightMap::create(const io::TensorFile& file, const Placement& placement,
                                    std::span<const std::unique_ptr<Backend>> devices) {
  return WeightMapper(file, placement, devices).run();
}

}  // namespace fathom::nn
