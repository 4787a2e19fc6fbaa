#include <algorithm>

#include "layers.h"

namespace fathom::nn {

Scratch Scratch::carve(Arena& arena, const ModelConfig& c, int64_t n) {
  Scratch s{};
  const int64_t heads = c.num_attention_heads;
  s.logits = arena.take<float>(std::min(n, kLogitRows) * c.vocab_size);
  s.x = arena.take<float>(n * c.hidden_size);
  s.x_norm = arena.take<float>(n * c.hidden_size);
  s.cos_sin = arena.take<float>(n * c.qk_rope_head_dim);

  const int64_t mark = arena.mark();
  const int64_t rows = std::min(n, kAbsorbedRows);
  s.q_latent = arena.take<float>(n * c.q_lora_rank);
  s.q = arena.take<float>(n * heads * c.qk_head_dim());
  s.kv = arena.take<float>(n * c.kv_row_dim());
  s.attn = arena.take<float>(n * heads * c.v_head_dim);
  s.attn_state.max = arena.take<float>(n * heads);
  s.attn_state.sum = arena.take<float>(n * heads);
  s.q_absorbed = arena.take<float>(rows * heads * c.kv_lora_rank);
  s.attn_absorbed = arena.take<float>(rows * heads * c.kv_lora_rank);

  arena.rewind(mark);
  s.scores = arena.take<float>(n * c.n_routed_experts);
  s.expert_ids = arena.take<int32_t>(n * c.num_experts_per_tok);
  s.expert_weights = arena.take<float>(n * c.num_experts_per_tok);
  arena.rewind(mark);
  return s;
}

}  // namespace fathom::nn
