#include "forward.h"

namespace fathom::nn {
namespace {

Step step_of(const ForwardParams& p, const Stage& stage) {
  return {.device = *stage.device,
          .op = stage.op,
          .config = p.config,
          .rope = p.rope,
          .scratch = stage.scratch,
          .n_tokens = static_cast<int64_t>(p.tokens.size()),
          .sequences = p.sequences,
          .form = p.form};
}

// Hands the residual stream to the next device.  One of the two is readable by the host.
Status copy_residual(const Stage& from, const Stage& to, int64_t bytes) {
  FATHOM_TRY(from.device->sync(from.op));
  if (from.device->host_accessible()) return to.device->upload(to.scratch.x, from.scratch.x, bytes);
  return from.device->download(to.scratch.x, from.scratch.x, bytes);
}

Status trace_point(const ForwardParams& p, const Stage& stage, std::string_view name, int64_t layer,
                   const void* data, int64_t n_cols) {
  FATHOM_TRY(stage.device->sync(stage.op));
  (*p.trace)({name, layer, data, static_cast<int64_t>(p.tokens.size()), n_cols,
              p.sequences.front().first_position});
  return {};
}

// After a layer: the residual stream, and for MoE layers the experts chosen (still in scratch).
Status trace_layer(const ForwardParams& p, const Stage& stage, int64_t layer) {
  const Scratch& b = stage.scratch;
  if (p.config.is_moe_layer(layer)) {
    const int64_t k = p.config.num_experts_per_tok;
    FATHOM_TRY(trace_point(p, stage, "route_ids", layer, b.expert_ids, k));
    FATHOM_TRY(trace_point(p, stage, "route_weights", layer, b.expert_weights, k));
  }
  return trace_point(p, stage, "layer", layer, b.x, p.config.hidden_size);
}

}  // namespace

Status forward(const ForwardParams& p) {
  const ModelConfig& c = p.config;
  const int64_t n = static_cast<int64_t>(p.tokens.size());
  for (size_t i = 0; i < p.stages.size(); ++i) {
    const Stage& stage = p.stages[i];
    const Step step = step_of(p, stage);
    if (i == 0) {
      stage.device->embed(stage.op, {p.tokens.data(), n, &p.weights.embed, stage.scratch.x});
      if (p.trace) FATHOM_TRY(trace_point(p, stage, "embed", -1, stage.scratch.x, c.hidden_size));
    } else {
      FATHOM_TRY(copy_residual(p.stages[i - 1], stage,
                               n * c.hidden_size * static_cast<int64_t>(sizeof(float))));
    }
    for (const Sequence& sequence : p.sequences)
      stage.device->rope_table(
          stage.op, {.inv_freq = p.rope.inv_freq.data(),
                     .multiplier = p.rope.multiplier,
                     .rope_dim = c.qk_rope_head_dim,
                     .first_position = sequence.first_position,
                     .n_tokens = sequence.n_tokens,
                     .cos_sin = stage.scratch.cos_sin + sequence.first_row * c.qk_rope_head_dim});
    for (int64_t slot = 0; slot < stage.n_layers; ++slot) {
      if (p.cancelled && p.cancelled(p.cancelled_arg)) {
        FATHOM_TRY(stage.device->sync(stage.op));
        return Status(Code::kCancelled, "cancelled");
      }
      const int64_t layer = stage.first_layer + slot;
      const LayerWeights& w = p.weights.layers[static_cast<size_t>(layer)];
      mla_attention(step, w, {static_cast<int>(i), slot});
      for (const Sequence& sequence : p.sequences)
        if (Status brought = sequence.cache->status(); !brought.ok()) {
          FATHOM_TRY(stage.device->sync(stage.op));
          return brought;
        }
      feed_forward(step, w, c.is_moe_layer(layer));
      if (p.trace) FATHOM_TRY(trace_layer(p, stage, layer));
    }
  }
  const Stage& last = p.stages.back();
  return last.device->sync(last.op);
}

Status forward_logits(const ForwardParams& p, int64_t first_row, int64_t n_rows) {
  const Stage& last = p.stages.back();
  logits(step_of(p, last), p.weights, first_row, n_rows);
  return last.device->sync(last.op);
}

}  // namespace fathom::nn
