// A MoE layer whose routed experts live on other devices than its attention, and what goes over.
#include <algorithm>

#include "layers.h"
#include "transfer.h"

namespace fathom::nn {

int64_t staging_bytes(const Placement& placement, std::span<const Backend* const> devices,
                      const ModelConfig& c, int64_t n_tokens) noexcept {
  const auto apart = [&](int a, int b) {
    return a != b && !devices[static_cast<size_t>(a)]->host_accessible() &&
           !devices[static_cast<size_t>(b)]->host_accessible();
  };
  int at = placement.embed_device;
  bool needed = false;
  for (const LayerPlacement& layer : placement.layers) {
    needed = needed || apart(at, layer.device);
    at = layer.device;
    for (const ExpertSpan& span : layer.experts) needed = needed || apart(at, span.device);
  }
  needed = needed || apart(at, placement.head_device);
  const int64_t columns = std::max(c.hidden_size, c.num_experts_per_tok);
  return needed ? n_tokens * columns * static_cast<int64_t>(sizeof(float)) : 0;
}

Status transfer(Backend& from, const void* source, Backend& to, void* target, int64_t bytes,
                std::byte* staging) noexcept {
  if (from.host_accessible()) return to.upload(target, source, bytes);
  if (to.host_accessible()) return from.download(target, source, bytes);
  FATHOM_TRY(from.download(staging, source, bytes));
  return to.upload(target, staging, bytes);
}

namespace {

// The hidden rows of a pass and the experts chosen for them, from the layer's device to another.
Status send_rows(const Step& s, const Stage& guest, std::byte* staging) noexcept {
  const Scratch& from = s.scratch;
  const Scratch& to = guest.scratch;
  const int64_t n = s.n_tokens, choices = n * s.config.num_experts_per_tok * 4;
  const auto copy = [&](const void* source, void* target, int64_t bytes) {
    return transfer(s.device, source, *guest.device, target, bytes, staging);
  };
  FATHOM_TRY(copy(from.x_norm, to.x_norm, n * s.config.hidden_size * 4));
  FATHOM_TRY(copy(from.expert_ids, to.expert_ids, choices));
  return copy(from.expert_weights, to.expert_weights, choices);
}

}  // namespace

Status feed_forward_apart(const Step& s, const LayerWeights& w, const LayerPlacement& placement,
                          std::span<const Stage> stages, std::byte* staging) noexcept {
  const int64_t sum_bytes = s.n_tokens * s.config.hidden_size * static_cast<int64_t>(sizeof(float));
  const auto stage_of = [&](int device) -> const Stage& {
    return stages[static_cast<size_t>(device)];
  };
  const auto is_home = [&](const ExpertSpan& span) { return span.device == placement.device; };

  choose_experts(s, w);
  FATHOM_TRY(s.device.sync(s.op));
  for (size_t i = 0; i < placement.experts.size(); ++i) {
    const ExpertSpan& span = placement.experts[i];
    const bool sent = std::any_of(placement.experts.begin(),
                                  placement.experts.begin() + static_cast<std::ptrdiff_t>(i),
                                  [&](const ExpertSpan& e) { return e.device == span.device; });
    if (!is_home(span) && !sent) FATHOM_TRY(send_rows(s, stage_of(span.device), staging));
  }

  // The sum travels over the spans in ascending order.  Every device but the layer's own is waited
  // for; the own network is queued before the first wait, so that it runs meanwhile.
  bool own_queued = false;
  int at = placement.device;
  for (size_t i = 0; i < placement.experts.size(); ++i) {
    const ExpertSpan& span = placement.experts[i];
    const Stage& stage = stage_of(span.device);
    if (i > 0 && span.device != at) {
      const Stage& before = stage_of(at);
      FATHOM_TRY(before.device->sync(before.op));
      FATHOM_TRY(transfer(*before.device, before.scratch.routed, *stage.device,
                          stage.scratch.routed, sum_bytes, staging));
    }
    at = span.device;
    if (!is_home(span) && !own_queued) {
      add_own_network(s, w);
      own_queued = true;
    }
    const Step there{*stage.device, stage.op,    s.config, s.rope, stage.scratch,
                     s.n_tokens,    s.sequences, s.form};
    add_experts(there, w.experts[i], /*begin=*/i == 0);
  }
  if (!own_queued) add_own_network(s, w);
  if (at != placement.device) {
    const Stage& last = stage_of(at);
    FATHOM_TRY(last.device->sync(last.op));
    FATHOM_TRY(transfer(*last.device, last.scratch.routed, s.device, s.scratch.routed, sum_bytes,
                        staging));
  }
  add_routed(s);
  return {};
}

}  // namespace fathom::nn
