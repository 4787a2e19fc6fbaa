// The weights of a model as views, and the map from a file's tensors to them.
//
// Planning and loading are one walk: map_weights() pairs every weight with the rows of the file it
// is made of and asks the device for its layout; carve() places them in an arena - a counting one
// for the plan, the real one for the load.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../io/arena.h"
#include "../io/tensor_file.h"
#include "fathom/backend.hpp"
#include "fathom/memory.hpp"
#include "fathom/model_config.hpp"
#include "fathom/placement.hpp"
#include "fathom/status.hpp"

namespace fathom::nn {

// Routed experts [first, first + gate.count) of a layer, on one device.
struct ExpertWeights {
  int64_t first = 0;
  Weight gate, up, down;  // count: experts of the span
};

// One layer.  Shapes are [out features, in features]; names follow modeling_deepseek.py.
struct LayerWeights {
  const float* attn_norm = nullptr;  // [hidden_size]            input_layernorm
  Weight q;                          // [n_heads * qk_head_dim, hidden_size]; only without q_lora
  Weight q_a;                        // [q_lora_rank, hidden_size]
  const float* q_a_norm = nullptr;   // [q_lora_rank]
  Weight q_b;                        // [n_heads * qk_head_dim, q_lora_rank]
  Weight kv_a;                       // [kv_lora_rank + qk_rope_head_dim, hidden_size]
  const float* kv_a_norm = nullptr;  // [kv_lora_rank]
  // Per head, the key half of kv_b_proj: [kv_lora_rank, nope], or [nope, kv_lora_rank] when
  // k_b_transposed (as files that keep kv_b in one piece have it).
  Weight k_b;
  bool k_b_transposed = false;
  Weight v_b;  // per head [v_head_dim, kv_lora_rank]
  Weight o;    // [hidden_size, n_heads * v_head_dim]

  const float* ffn_norm = nullptr;  // [hidden_size]             post_attention_layernorm
  // Dense feed-forward, or the shared experts of a MoE layer; rows == 0 when there are none.
  Weight gate, up, down;
  // MoE layers only.
  Weight router;                       // [n_routed_experts, hidden_size]
  const float* router_bias = nullptr;  // [n_routed_experts] e_score_correction_bias, or null
  std::vector<ExpertWeights> experts;  // the spans of the placement, ascending
};

struct Weights {
  Weight embed;                       // [vocab_size, hidden_size]
  const float* final_norm = nullptr;  // [hidden_size], on the head's device
  Weight head;                        // [vocab_size, hidden_size], likewise; may share embed's data
  std::vector<LayerWeights> layers;
};

// Every weight and vector of a model, always in the same order, those that it lacks too:
// body(Weight&) and body(const float*&), const where the weights are.
template <class AnyWeights, class Body>
void for_each_weight(AnyWeights& weights, Body&& body) {
  body(weights.embed);
  body(weights.final_norm);
  body(weights.head);
  for (auto& l : weights.layers) {
    for (auto* vector : {&l.attn_norm, &l.q_a_norm, &l.kv_a_norm, &l.ffn_norm, &l.router_bias})
      body(*vector);
    for (auto* weight :
         {&l.q, &l.q_a, &l.q_b, &l.kv_a, &l.k_b, &l.v_b, &l.o, &l.gate, &l.up, &l.down, &l.router})
      body(*weight);
    for (auto& span : l.experts)
      for (auto* weight : {&span.gate, &span.up, &span.down}) body(*weight);
  }
}

// The routed experts of a layer as `device` lays them out: all n_experts of them, data null.
// Errors: kUnsupported for a type without kernels there.
Result<ExpertWeights> experts_on(const Backend& device, const LayerWeights& layer,
                                 int64_t n_experts);

// Rows of the file that make one stored matrix.
struct RowSource {
  const io::TensorInfo* tensor = nullptr;  // seen as [elements / cols, cols]
  int64_t first_row = 0;
  const io::TensorInfo* scales = nullptr;  // FP8 block scales of the whole tensor, or null
};

// One weight (or f32 vector) on its way from the file to a device.
struct WeightItem {
  std::string name;  // of the (first) tensor, for messages
  int device = 0;
  Purpose purpose = Purpose::kWeights;
  Weight weight;                // shape, type and layout; data null
  bool to_f32 = false;          // the file's type is converted while loading
  std::vector<RowSource> rows;  // [weight.count]
  Weight* target = nullptr;     // set by carve(); null for vectors
  const float** vector = nullptr;
};

// Host memory that load_matrix() needs for reading and converting rows.
int64_t staging_bytes(const WeightItem& item) noexcept;
int64_t file_bytes(const WeightItem& item) noexcept;  // that loading it reads
// Reads and converts matrix `index` of `item` and stores it as matrix `at` of `target`, which has
// the item's shape and type, in the layout of `device`.  `on_bytes(n)` is called after every n
// bytes read and returns false to cancel; may be empty.  `scales_read`: the block scales of this
// matrix's tensor are in `staging` from the call before.  Errors: kIo, kCancelled, kDevice.
Status load_matrix(const io::TensorFile& file, const WeightItem& item, size_t index,
                   const Weight& target, int64_t at, Backend& device, std::span<std::byte> staging,
                   const std::function<bool(int64_t)>& on_bytes, bool scales_read = false);

class WeightMap {
 public:
  // Finds and checks every tensor.  `placement` says where each part lives.
  // The file must outlive the map.  Errors: kFormat (missing tensor, wrong shape: names both),
  // kUnsupported (a type without kernels).
  static Result<WeightMap> create(const io::TensorFile& file, const Placement& placement,
                                  std::span<const std::unique_ptr<Backend>> devices);

  // Places all weights of one device and purpose in `arena` and sets their data pointers in
  // weights().  Same order and alignment for counting and real arenas.
  void carve(int device, Purpose purpose, Arena& arena);
  // Says where one item is, in its target and in weights() too.
  void set_place(size_t item, void* data) noexcept;
  // Host memory that load() needs for reading and converting rows.
  int64_t staging_bytes() const noexcept;
  // Reads, converts and stores one item, after carve() with a real arena.  `staging` has
  // staging_bytes().  `on_bytes(n)` is called after every n bytes read and returns false to cancel.
  // Errors: kIo, kCancelled, kDevice.
  Status load(const io::TensorFile& file, const WeightItem& item, Backend& device,
              std::span<std::byte> staging, const std::function<bool(int64_t)>& on_bytes) const;

  std::span<const WeightItem> items() const noexcept { return items_; }
  const Weights& weights() const noexcept { return *weights_; }
  std::unique_ptr<Weights> take_weights() && { return std::move(weights_); }
  int64_t file_bytes() const noexcept;  // bytes that load() reads for all items
  int64_t n_params() const noexcept;
  int64_t n_params_active(const ModelConfig&) const noexcept;
  std::vector<std::string> remarks;  // layout found, types

 private:
  friend class WeightMapper;
  std::unique_ptr<Weights> weights_;  // stable address: items point into it
  std::vector<WeightItem> items_;
  bool head_is_embed_ = false;  // tied embeddings on one device: one copy serves both
};

}  // namespace fathom::nn
