#include "forward.h"

#include <algorithm>

#include "transfer.h"

namespace fathom::nn {

Step step_of(const ForwardParams& p, const Stage& stage) noexcept {
  return {.device = *stage.device,
          .op = stage.op,
          .config = p.config,
          .rope = p.rope,
          .scratch = stage.scratch,
          .n_tokens = static_cast<int64_t>(p.tokens.size()),
          .sequences = p.sequences,
          .form = p.form,
          .stages = p.stages,
          .staging = p.staging,
          .section_rows = p.section_rows};
}

bool experts_apart(const LayerPlacement& layer) noexcept {
  return std::any_of(layer.experts.begin(), layer.experts.end(),
                     [&](const ExpertSpan& span) { return span.device != layer.device; });
}

namespace {

// Hands rows of the residual stream to another device.
Status hand_over(const ForwardParams& p, const Stage& from, int64_t first_row, const Stage& to,
                 int64_t n_rows) {
  const int64_t hidden = p.config.hidden_size;
  FATHOM_TRY(from.device->sync(from.op));
  FATHOM_TRY(to.device->sync(to.op));  // of a pass before this one
  return transfer(*from.device, from.scratch.x + first_row * hidden, *to.device, to.scratch.x,
                  n_rows * hidden * static_cast<int64_t>(sizeof(float)), p.staging);
}

const Stage& stage_of(const ForwardParams& p, int device) {
  return p.stages[static_cast<size_t>(device)];
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

void queue_embedding(const ForwardParams& p) noexcept {
  const Stage& at = stage_of(p, p.placement.embed_device);
  at.device->embed(at.op, {p.tokens.data(), static_cast<int64_t>(p.tokens.size()), &p.weights.embed,
                           at.scratch.x});
}

Status queue_attention(const ForwardParams& p, size_t layer) {
  const ModelConfig& c = p.config;
  const LayerPlacement& place = p.placement.layers[layer];
  const Stage& stage = stage_of(p, place.device);
  if (p.cancelled && p.cancelled(p.cancelled_arg)) {
    FATHOM_TRY(stage.device->sync(stage.op));
    return Status(Code::kCancelled, "cancelled");
  }
  if (place.slot == 0)  // the device's first layer: the rotations for all of them
    for (const Sequence& sequence : p.sequences)
      stage.device->rope_table(
          stage.op, {.inv_freq = p.rope.inv_freq.data(),
                     .multiplier = p.rope.multiplier,
                     .rope_dim = c.qk_rope_head_dim,
                     .first_position = sequence.first_position,
                     .n_tokens = sequence.n_tokens,
                     .cos_sin = stage.scratch.cos_sin + sequence.first_row * c.qk_rope_head_dim});
  Status attended =
      mla_attention(step_of(p, stage), p.weights.layers[layer], {place.device, place.slot});
  for (const Sequence& sequence : p.sequences)
    if (attended.ok()) attended = sequence.cache->status();
  if (!attended.ok()) FATHOM_TRY(stage.device->sync(stage.op));
  return attended;
}

Status forward_layers(const ForwardParams& p, size_t first_layer, size_t end_layer) {
  const ModelConfig& c = p.config;
  const auto n = static_cast<int64_t>(p.tokens.size());
  const int device = p.placement.layers[first_layer].device;
  const Stage& stage = stage_of(p, device);
  int at = first_layer > 0 ? p.placement.layers[first_layer - 1].device : p.placement.embed_device;
  if (first_layer == 0) {
    queue_embedding(p);
    const Stage& embed = stage_of(p, at);
    if (p.trace) FATHOM_TRY(trace_point(p, embed, "embed", -1, embed.scratch.x, c.hidden_size));
  }
  if (at != device) FATHOM_TRY(hand_over(p, stage_of(p, at), 0, stage, n));

  for (size_t l = first_layer; l < end_layer; ++l) {
    const LayerPlacement& place = p.placement.layers[l];
    const LayerWeights& w = p.weights.layers[l];
    FATHOM_TRY(queue_attention(p, l));
    const Step step = step_of(p, stage);
    if (experts_apart(place))
      FATHOM_TRY(feed_forward_apart(step, w, l, place, p.stages, p.staging, p.copies));
    else
      feed_forward(step, w, c.is_moe_layer(static_cast<int64_t>(l)));
    if (p.trace) FATHOM_TRY(trace_layer(p, stage, static_cast<int64_t>(l)));
  }
  return {};
}

size_t run_end(const Placement& placement, size_t first_layer) noexcept {
  size_t end = first_layer + 1;
  while (end < placement.layers.size() &&
         placement.layers[end].device == placement.layers[first_layer].device)
    ++end;
  return end;
}

Status forward(const ForwardParams& p, PassEnd how) {
  for (size_t l = 0; l < p.placement.layers.size();) {
    const size_t end = run_end(p.placement, l);
    FATHOM_TRY(forward_layers(p, l, end));
    l = end;
  }
  if (how == PassEnd::kLeave) return {};
  const Stage& last = stage_of(p, p.placement.layers.back().device);
  return last.device->sync(last.op);
}

Status queue_logits(const ForwardParams& p, int64_t first_row, int64_t n_rows) {
  const int last = p.placement.layers.back().device;
  const Stage& head = stage_of(p, p.placement.head_device);
  if (p.placement.head_device != last) {
    FATHOM_TRY(hand_over(p, stage_of(p, last), first_row, head, n_rows));
    first_row = 0;
  }
  logits(step_of(p, head), p.weights, first_row, n_rows);
  return {};
}

Status forward_likeliest(const ForwardParams& p, int64_t row, int64_t k, TokenLogit* host) {
  const Stage& head = stage_of(p, p.placement.head_device);
  FATHOM_TRY(queue_logits(p, row, 1));
  likeliest(step_of(p, head), k);
  FATHOM_TRY(head.device->sync(head.op));
  return head.device->download(host, head.scratch.likeliest,
                               (k + 1) * static_cast<int64_t>(sizeof(TokenLogit)));
}

Status fetch_logits(const ForwardParams& p, int64_t n_rows, float* host_logits) {
  const Stage& head = stage_of(p, p.placement.head_device);
  FATHOM_TRY(head.device->sync(head.op));
  if (host_logits == nullptr) return {};
  return head.device->download(host_logits, head.scratch.logits,
                               n_rows * p.config.vocab_size * static_cast<int64_t>(sizeof(float)));
}

Status forward_logits(const ForwardParams& p, int64_t first_row, int64_t n_rows,
                      float* host_logits) {
  FATHOM_TRY(queue_logits(p, first_row, n_rows));
  return fetch_logits(p, n_rows, host_logits);
}

}  // namespace fathom::nn
