// A MoE layer whose routed experts live on other devices than its attention, and what goes over.
#include <algorithm>
#include <array>

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
  int64_t values = needed ? n_tokens * columns : 0;
  // Queries and sums of attention that goes to rows on other devices.
  for (const KvSpan& span : placement.kv)
    if (placement.layers_on(span.home) > 0)
      for (int d = 0; d < static_cast<int>(devices.size()); ++d)
        if (apart(span.device, d))
          values = std::max(values, std::min(n_tokens, kAbsorbedRows) * c.num_attention_heads *
                                        std::max(c.kv_lora_rank + 2, c.qk_head_dim()));
  return values * static_cast<int64_t>(sizeof(float));
}

Status transfer(Backend& from, const void* source, Backend& to, void* target, int64_t bytes,
                std::byte* staging) noexcept {
  if (from.host_accessible()) return to.upload(target, source, bytes);
  if (to.host_accessible()) return from.download(target, source, bytes);
  FATHOM_TRY(from.download(staging, source, bytes));
  return to.upload(target, staging, bytes);
}

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

namespace {

// What a pass has chosen, in host memory.
struct Choices {
  int64_t n_pairs = 0, n_found = 0;     // found among the copies
  std::array<int32_t, kCopyPairs> ids;  // [n_pairs]
  // The same by whose they are, -1 elsewhere: those with copies, and those of other devices.
  std::array<int32_t, kCopyPairs> copied, missing;

  bool any_missing(const ExpertSpan& span) const noexcept {
    return std::any_of(missing.begin(), missing.begin() + n_pairs, [&](int32_t id) {
      return id >= span.first && id < span.first + span.count;
    });
  }
};

// Tells `copies` what was chosen and, where it `looks`, finds what of it they have: then it is no
// longer than Choices.
Status look_up(const Step& s, size_t layer, ExpertCopies& copies, bool looks,
               Choices& choices) noexcept {
  const int64_t n_pairs = s.n_tokens * s.config.num_experts_per_tok;
  for (int64_t first = 0; first < n_pairs; first += kCopyPairs) {
    const int64_t n = std::min(kCopyPairs, n_pairs - first);
    FATHOM_TRY(s.device.download(choices.ids.data(), s.scratch.expert_ids + first,
                                 n * static_cast<int64_t>(sizeof(int32_t))));
    for (int64_t i = 0; i < n && looks; ++i) {
      const auto at = static_cast<size_t>(i);
      const bool found = copies.has(layer, choices.ids[at]);
      choices.copied[at] = found ? choices.ids[at] : -1;
      choices.missing[at] = found ? -1 : choices.ids[at];
      choices.n_found += found;
    }
    copies.used(layer, {choices.ids.data(), static_cast<size_t>(n)}, looks, choices.n_found);
  }
  choices.n_pairs = looks ? n_pairs : 0;
  return {};
}

// The rows of the pairs of `experts` that `ids` names, apart.
void keep_rows(const Step& s, const ExpertWeights& experts, const int32_t* ids) noexcept {
  const Scratch& b = s.scratch;
  s.device.experts(s.op, {.x = b.x_norm,
                          .n_tokens = s.n_tokens,
                          .ids = ids,
                          .weights = b.expert_weights,
                          .num_experts_per_tok = s.config.num_experts_per_tok,
                          .gate = &experts.gate,
                          .up = &experts.up,
                          .down = &experts.down,
                          .out = nullptr,
                          .first_expert = experts.first,
                          .n_experts = s.config.n_routed_experts,
                          .rows = b.expert_rows});
}

// Rows of the pairs that `device` has computed, from there home; neighbours in one copy.
Status bring_rows(const Step& s, const Choices& choices, const LayerPlacement& placement,
                  int device, const Stage& guest, std::byte* staging) noexcept {
  const int64_t hidden = s.config.hidden_size;
  const auto there = [&](int64_t pair) {
    const int32_t id = choices.missing[static_cast<size_t>(pair)];
    return std::any_of(placement.experts.begin(), placement.experts.end(), [&](const auto& span) {
      return span.device == device && id >= span.first && id < span.first + span.count;
    });
  };
  for (int64_t pair = 0; pair < choices.n_pairs;) {
    int64_t end = pair;
    while (end < choices.n_pairs && there(end)) ++end;
    if (end > pair)
      FATHOM_TRY(transfer(*guest.device, guest.scratch.expert_rows + pair * hidden, s.device,
                          s.scratch.expert_rows + pair * hidden, (end - pair) * hidden * 4,
                          staging));
    pair = std::max(end, pair + 1);
  }
  return {};
}

// All devices at once, each with the rows of its pairs; then the sum, in the order of one device.
Status add_from_rows(const Step& s, const LayerWeights& w, const LayerPlacement& placement,
                     std::span<const Stage> stages, std::byte* staging, const ExpertWeights& copies,
                     const Choices& choices) noexcept {
  const Scratch& b = s.scratch;
  const int64_t n = s.n_tokens, ids_bytes = choices.n_pairs * 4;
  const auto n_devices = static_cast<int>(stages.size());
  const auto has_work = [&](int device, const ExpertSpan& span) {
    return span.device == device && choices.any_missing(span);
  };
  // body(device, stage) for the other devices that have something to compute.
  const auto for_guests = [&](auto&& body) -> Status {
    for (int device = 0; device < n_devices; ++device)
      if (device != placement.device &&
          std::any_of(placement.experts.begin(), placement.experts.end(),
                      [&](const ExpertSpan& span) { return has_work(device, span); }))
        FATHOM_TRY(body(device, stages[static_cast<size_t>(device)]));
    return {};
  };
  const auto add_spans = [&](const Step& there, int device, const int32_t* ids) {
    for (size_t i = 0; i < placement.experts.size(); ++i)
      if (has_work(device, placement.experts[i])) keep_rows(there, w.experts[i], ids);
  };

  FATHOM_TRY(for_guests([&](int, const Stage& guest) -> Status {
    FATHOM_TRY(transfer(s.device, b.x_norm, *guest.device, guest.scratch.x_norm,
                        n * s.config.hidden_size * 4, staging));
    return guest.device->upload(guest.scratch.expert_ids, choices.missing.data(), ids_bytes);
  }));
  // Queued at home before others are waited for.
  FATHOM_TRY(s.device.upload(b.copied_ids, choices.copied.data(), ids_bytes));
  keep_rows(s, copies, b.copied_ids);
  add_spans(s, placement.device, b.expert_ids);
  add_own_network(s, w);
  FATHOM_TRY(for_guests([&](int device, const Stage& guest) -> Status {
    const Step there{*guest.device, guest.op,   s.config,    s.rope,
                     guest.scratch, s.n_tokens, s.sequences, s.form};
    add_spans(there, device, guest.scratch.expert_ids);
    return {};
  }));
  FATHOM_TRY(for_guests([&](int device, const Stage& guest) -> Status {
    FATHOM_TRY(guest.device->sync(guest.op));
    return bring_rows(s, choices, placement, device, guest, staging);
  }));
  s.device.sum_experts(s.op, {.rows = b.expert_rows,
                              .ids = b.expert_ids,
                              .weights = b.expert_weights,
                              .n_tokens = n,
                              .num_experts_per_tok = s.config.num_experts_per_tok,
                              .hidden_size = s.config.hidden_size,
                              .out = b.routed});
  add_routed(s);
  return {};
}

}  // namespace

Status tell_choices(const Step& s, size_t layer, ExpertCopies& copies) noexcept {
  if (copies.copies(layer) == nullptr) return {};
  Choices choices;
  return look_up(s, layer, copies, /*looks=*/false, choices);
}

Status feed_forward_apart(const Step& s, const LayerWeights& w, size_t layer,
                          const LayerPlacement& placement, std::span<const Stage> stages,
                          std::byte* staging, ExpertCopies* copies) noexcept {
  const int64_t sum_bytes = s.n_tokens * s.config.hidden_size * static_cast<int64_t>(sizeof(float));
  const auto stage_of = [&](int device) -> const Stage& {
    return stages[static_cast<size_t>(device)];
  };
  const auto is_home = [&](const ExpertSpan& span) { return span.device == placement.device; };

  choose_experts(s, w);
  FATHOM_TRY(s.device.sync(s.op));
  if (const ExpertWeights* kept = copies != nullptr ? copies->copies(layer) : nullptr) {
    Choices choices;
    const bool looks = s.n_tokens * s.config.num_experts_per_tok <= kCopyPairs;
    FATHOM_TRY(look_up(s, layer, *copies, looks, choices));
    if (choices.n_found > 0) return add_from_rows(s, w, placement, stages, staging, *kept, choices);
  }
  // The own network runs while other devices work and sums travel.  Behind the sending of the rows,
  // which a device with one queue does after all that was queued before; ahead of the first experts
  // elsewhere.
  bool own_queued = false;
  const auto send_to = [&](size_t first, size_t end) -> Status {
    for (size_t i = first; i < end; ++i) {
      const ExpertSpan& span = placement.experts[i];
      const bool sent = std::any_of(placement.experts.begin(),
                                    placement.experts.begin() + static_cast<std::ptrdiff_t>(i),
                                    [&](const ExpertSpan& e) { return e.device == span.device; });
      if (!is_home(span) && !sent) FATHOM_TRY(send_rows(s, stage_of(span.device), staging));
    }
    return {};
  };

  // The sum travels over the spans in ascending order.  Every device but the layer's own is waited
  // for.
  FATHOM_TRY(send_to(0, 1));
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
    const Step there{*stage.device, stage.op,   s.config,    s.rope,
                     stage.scratch, s.n_tokens, s.sequences, s.form};
    add_experts(there, w.experts[i], /*begin=*/i == 0);
    if (i == 0) FATHOM_TRY(send_to(1, placement.experts.size()));  // while the first ones work
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
