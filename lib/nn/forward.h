// The forward pass: embed -> layers -> logits, over the devices that hold the layers.
#pragma once

#include <cstdint>
#include <span>

#include "fathom/status.hpp"
#include "layers.h"
#include "trace.h"

namespace fathom::nn {

struct ForwardParams {
  const ModelConfig& config;
  const Rope& rope;
  const Weights& weights;
  const Placement& placement;
  std::span<const Stage> stages;  // counted as the devices of the placement
  std::byte* staging = nullptr;   // staging_bytes() of host memory (transfer.h)
  std::span<const int32_t> tokens;
  // Whose rows they are: one sequence, or several (form absorbed) that share the reading of the
  // weights.  Each cache has room for its new rows.
  std::span<const Sequence> sequences;
  AttentionForm form;
  // Asked between layers; true ends the pass with kCancelled.  May be null.
  bool (*cancelled)(void* arg) = nullptr;
  void* cancelled_arg = nullptr;
  const Trace* trace = nullptr;
  int64_t section_rows = kSectionRows;  // of attention; another number for tests
  ExpertCopies* copies = nullptr;       // none: every expert is where the placement says
};

// Runs the pass; the residual stream stays in scratch.x of the last layer's device.  Writes cache
// rows but does not commit them.  Errors: kCancelled, kDevice, those of the cache's status().
// kLeave does not wait for the last layer's device: for passes whose logits are asked for next,
// which waits.
enum class PassEnd : bool { kWait, kLeave };
Status forward(const ForwardParams& params, PassEnd end = PassEnd::kWait);

// The same in parts, for passes that follow each other through the devices: queues the layers
// [first_layer, end_layer), all of which live on one device, behind bringing the rows there from
// the embedding or the layer before; run_end() says how far a device's layers go.  When all parts
// are queued, the pass ends with a sync() of the last layer's device.
Status forward_layers(const ForwardParams& params, size_t first_layer, size_t end_layer);
size_t run_end(const Placement& placement, size_t first_layer) noexcept;

// What a layer begins with, for those who go on in another way (pass_steps.cc): the rows of the
// tokens on the embedding's device; and attention of a layer, on its device.  Errors: as above.
void queue_embedding(const ForwardParams& params) noexcept;
Status queue_attention(const ForwardParams& params, size_t layer);
// Whether some of a layer's routed experts live on other devices than the layer.
bool experts_apart(const LayerPlacement& layer) noexcept;
// The pass on one device.
Step step_of(const ForwardParams& params, const Stage& stage) noexcept;

// After forward(): logits of rows [first_row, first_row + n_rows) of the pass, n_rows <=
// kLogitRows, into scratch.logits of the head's device, and to `host_logits` where it is not null.
// Errors: kDevice.
Status forward_logits(const ForwardParams& params, int64_t first_row, int64_t n_rows,
                      float* host_logits = nullptr);

// The same for one row, of which only the k likeliest tokens come to the host, where the head's
// device finds them (k in [1, its max_top_k()]): as TopKParams::out, k + 1 of them.  The logits
// stay in scratch.logits.
Status forward_likeliest(const ForwardParams& params, int64_t row, int64_t k, TokenLogit* host);
// The two halves of it.
Status queue_logits(const ForwardParams& params, int64_t first_row, int64_t n_rows);
Status fetch_logits(const ForwardParams& params, int64_t n_rows, float* host_logits = nullptr);

// Workspace bytes that any pass of 1 .. max_tokens rows asks of device number `index`: the parts of
// the pass that live there, run over a backend that only measures.
int64_t measure_workspace(const Backend& device, int index, const ModelConfig& config,
                          const Weights& weights, const Placement& placement, int64_t max_tokens,
                          KvType kv_type, int64_t page_tokens);

}  // namespace fathom::nn
