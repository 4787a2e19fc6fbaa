#include <algorithm>

#include "layers.h"

namespace fathom::nn {

DeviceRoles DeviceRoles::of(const Placement& placement, int device) noexcept {
  DeviceRoles roles{.embed = placement.embed_device == device,
                    .head = placement.head_device == device,
                    .copies = placement.has_copies(device),
                    .rows = placement.holds_rows_of_others(device)};
  for (const LayerPlacement& layer : placement.layers) {
    if (layer.device == device) roles.layers = true;
    for (const ExpertSpan& span : layer.experts)
      if (span.device == device && layer.device != device) {
        roles.guests = true;
        roles.copies |= placement.has_copies(layer.device);
      }
  }
  return roles;
}

Scratch Scratch::carve(Arena& arena, const ModelConfig& c, int64_t n, const DeviceRoles& roles) {
  return carve_in_flight(arena, c, n, roles, 1)[0];
}

Scratch::InFlight Scratch::carve_in_flight(Arena& arena, const ModelConfig& c, int64_t n,
                                           const DeviceRoles& roles, int64_t n_passes) {
  InFlight all{};
  Scratch& s = all[0];
  const int64_t heads = c.num_attention_heads, logit_rows = std::min(n, kLogitRows);
  const bool rows = roles.embed || roles.layers;
  const bool all_normed = roles.layers || roles.guests || (rows && roles.head);
  const bool experts = c.n_routed_experts > 0 && (roles.layers || roles.guests);
  const auto floats = [&](bool needed, int64_t count) {
    return needed ? arena.take<float>(count) : nullptr;
  };
  const auto take_normed = [&](Scratch& of) {
    of.x_norm = floats(all_normed || roles.head, (all_normed ? n : logit_rows) * c.hidden_size);
  };
  const auto take_choices = [&](Scratch& of) {
    of.expert_ids = arena.take<int32_t>(n * c.num_experts_per_tok);
    of.expert_weights = arena.take<float>(n * c.num_experts_per_tok);
    of.routed = arena.take<float>(n * c.hidden_size);
  };
  s.logits = floats(roles.head, logit_rows * c.vocab_size);
  s.likeliest = roles.head ? arena.take<TokenLogit>(kMaxTopK + 1) : nullptr;
  for (int64_t i = 0; i < n_passes; ++i) {
    Scratch& of = all[static_cast<size_t>(i)];
    of.x = floats(rows || roles.head, (rows ? n : logit_rows) * c.hidden_size);
    of.cos_sin = floats(roles.layers, n * c.qk_rope_head_dim);
    if (n_passes == 1) break;
    take_normed(of);
    if (experts) take_choices(of);
  }

  // Latent queries of absorbed attention take the place of what they are computed from: x_norm and
  // q_latent are read by the projections before, and written anew behind.
  const int64_t normed_mark = arena.mark();
  s.block_rows = std::min(std::max<int64_t>(n, 2), kAbsorbedRows);
  if (roles.layers) {
    s.q_absorbed = arena.take<float>(s.block_rows * heads * c.kv_lora_rank);
    s.attn_absorbed = arena.take<float>(s.block_rows * heads * (c.kv_lora_rank + 2));
  }
  const int64_t absorbed_mark = arena.mark();
  arena.rewind(normed_mark);
  if (n_passes == 1) take_normed(s);
  const int64_t mark = arena.mark();
  if (roles.layers) {
    s.q_latent = arena.take<float>(n * c.q_lora_rank);
    arena.rewind(std::max(arena.mark(), absorbed_mark));
    s.q = arena.take<float>(n * heads * c.qk_head_dim());
    s.kv = arena.take<float>(n * c.kv_row_dim());
    s.attn = arena.take<float>(n * heads * c.v_head_dim);
    s.attn_state.max = arena.take<float>(n * heads);
    s.attn_state.sum = arena.take<float>(n * heads);
  }

  if (roles.rows && !roles.layers) {
    const int64_t block = s.block_rows;
    s.q = arena.take<float>(block * heads * c.qk_head_dim());
    s.attn_state.max = arena.take<float>(block * heads);
    s.attn_state.sum = arena.take<float>(block * heads);
    s.q_absorbed = arena.take<float>(block * heads * c.kv_lora_rank);
    s.attn_absorbed = arena.take<float>(block * heads * (c.kv_lora_rank + 2));
  }

  arena.rewind(mark);
  if (experts) {
    s.scores = floats(roles.layers, n * c.n_routed_experts);
    if (n_passes == 1) take_choices(s);
    const int64_t pairs = std::min(n * c.num_experts_per_tok, kCopyPairs);
    s.expert_rows = floats(roles.copies, pairs * c.hidden_size);
    if (roles.copies) s.copied_ids = arena.take<int32_t>(pairs);
  }
  arena.rewind(mark);

  for (size_t i = 1; i < static_cast<size_t>(n_passes); ++i) {
    const Scratch own = all[i];
    all[i] = s;
    all[i].x = own.x;
    all[i].x_norm = own.x_norm;
    all[i].cos_sin = own.cos_sin;
    all[i].expert_ids = own.expert_ids;
    all[i].expert_weights = own.expert_weights;
    all[i].routed = own.routed;
  }
  return all;
}

}  // namespace fathom::nn
