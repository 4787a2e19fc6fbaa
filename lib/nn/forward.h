// The forward pass: embed -> layers -> logits, over the devices that hold the layers.
#pragma once

#include <cstdint>
#include <span>

#include "fathom/status.hpp"
#include "layers.h"
#include "trace.h"

namespace fathom::nn {

// A device's part of the pass: its contiguous layers, its scratch, its workspace.
struct Stage {
  Backend* device = nullptr;
  OpContext op;
  Scratch scratch{};
  int64_t first_layer = 0, n_layers = 0;
};

struct ForwardParams {
  const ModelConfig& config;
  const Rope& rope;
  const Weights& weights;
  std::span<const Stage> stages;  // in the order of their layers; at least one
  std::span<const int32_t> tokens;
  // Whose rows they are: one sequence, or several (form absorbed) that share the reading of the
  // weights.  Each cache has room for its new rows.
  std::span<const Sequence> sequences;
  AttentionForm form;
  // Asked between layers; true ends the pass with kCancelled.  May be null.
  bool (*cancelled)(void* arg) = nullptr;
  void* cancelled_arg = nullptr;
  const Trace* trace = nullptr;
};

// Runs the pass; the residual stream stays in the last stage's scratch.x.  Writes cache rows but
// does not commit them.  Errors: kCancelled, kDevice, those of the cache's status().
Status forward(const ForwardParams& params);

// After forward(): logits of rows [first_row, first_row + n_rows) of the pass, n_rows <=
// kLogitRows, into the last stage's scratch.logits.  Errors: kDevice.
Status forward_logits(const ForwardParams& params, int64_t first_row, int64_t n_rows);

// Workspace bytes that any pass of 1 .. max_tokens rows over layers [first_layer, first_layer +
// n_layers) asks of `device`: the passes themselves, run over a backend that only measures.
int64_t measure_workspace(const Backend& device, const ModelConfig& config, const Weights& weights,
                          int64_t first_layer, int64_t n_layers, int64_t max_tokens, KvType kv_type,
                          int64_t page_tokens);

}  // namespace fathom::nn
