// Multi-head latent attention (DeepSeek-V2 report, section 2.1) over the paged latent cache.
#include <algorithm>
#include <limits>

#include "layers.h"

namespace fathom::nn {
namespace {

// Calls attend(piece, begin, finish) for rows [0, end_row) of a layer, as the cache brings them in.
// False when it could not.
template <class Attend>
bool each_piece(const Step& s, const RowSourceOf& cache, LayerSlot layer, int64_t end_row,
                Attend&& attend) noexcept {
  for (int64_t row = 0; row < end_row;) {
    const KvRows piece = cache.piece(layer.stage, layer.slot, s.op, row, end_row);
    if (piece.n_rows == 0) return false;
    attend(piece, row == 0, row + piece.n_rows == end_row);
    row += piece.n_rows;
  }
  return true;
}

// Rows [first, first + n) of the pass, all of one sequence, whose latent queries begin the block at
// row `block`: b.q_absorbed -> b.attn_absorbed.  False when the cache could not bring its rows in.
bool attend_rows(const Step& s, const Sequence& sequence, LayerSlot layer, int64_t block,
                 int64_t first, int64_t n) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  const int64_t heads = c.num_attention_heads, rank = c.kv_lora_rank;
  const int64_t q_token = heads * c.qk_head_dim(), at = (first - block) * heads;
  const int64_t position = sequence.first_position + first - sequence.first_row;
  // Rows beyond the last query would be masked anyway.
  return each_piece(
      s, *sequence.cache, layer, position + n, [&](const KvRows& piece, bool begin, bool finish) {
        s.device.attend_absorbed(s.op, {.q_latent = b.q_absorbed + at * rank,
                                        .q_latent_token_stride = heads * rank,
                                        .q_latent_head_stride = rank,
                                        .q_rope = b.q + first * q_token + c.qk_nope_head_dim,
                                        .q_rope_token_stride = q_token,
                                        .q_rope_head_stride = c.qk_head_dim(),
                                        .n_tokens = n,
                                        .n_heads = heads,
                                        .first_position = position,
                                        .scale = static_cast<float>(s.rope.softmax_scale),
                                        .rows = piece,
                                        .state = {b.attn_state.max + at, b.attn_state.sum + at},
                                        .begin = begin,
                                        .finish = finish,
                                        .out = b.attn_absorbed + at * rank});
      });
}

// b.q -> b.attn, queries taken into latent space: score = (W_k q) . c, value = W_v (p . c).
// Equal to the expanded form because W_k and W_v are linear and shared by all rows.
void attend_absorbed(const Step& s, const LayerWeights& w, LayerSlot layer) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  const int64_t heads = c.num_attention_heads, rank = c.kv_lora_rank;
  const int64_t q_token = heads * c.qk_head_dim(), v_token = heads * c.v_head_dim;
  for (int64_t t = 0; t < s.n_tokens; t += kAbsorbedRows) {
    const int64_t n = std::min(kAbsorbedRows, s.n_tokens - t);
    s.device.heads_matmul(s.op, {.x = b.q + t * q_token,
                                 .x_token_stride = q_token,
                                 .x_head_stride = c.qk_head_dim(),
                                 .n_tokens = n,
                                 .w = &w.k_b,
                                 .transposed = w.k_b_transposed,
                                 .out = b.q_absorbed,  // [n, n_heads, kv_lora_rank]
                                 .out_token_stride = heads * rank,
                                 .out_head_stride = rank});
    for (const Sequence& sequence : s.sequences) {
      const int64_t first = std::max(t, sequence.first_row);
      const int64_t end = std::min(t + n, sequence.first_row + sequence.n_tokens);
      if (first < end && !attend_rows(s, sequence, layer, t, first, end - first)) return;
    }
    s.device.heads_matmul(s.op, {.x = b.attn_absorbed,
                                 .x_token_stride = heads * rank,
                                 .x_head_stride = rank,
                                 .n_tokens = n,
                                 .w = &w.v_b,
                                 .transposed = false,
                                 .out = b.attn + t * v_token,  // [n, n_heads, v_head_dim]
                                 .out_token_stride = v_token,
                                 .out_head_stride = c.v_head_dim});
  }
}

// b.q -> b.attn, keys and values expanded tile by tile inside the operation.
void attend_expanded(const Step& s, const LayerWeights& w, LayerSlot layer) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  const Sequence& sequence = s.sequences.front();
  const auto attend = [&](const KvRows& piece, bool begin, bool finish) {
    s.device.attend_expanded(s.op, {.q = b.q,
                                    .q_token_stride = c.num_attention_heads * c.qk_head_dim(),
                                    .q_head_stride = c.qk_head_dim(),
                                    .n_tokens = s.n_tokens,
                                    .n_heads = c.num_attention_heads,
                                    .qk_nope_head_dim = c.qk_nope_head_dim,
                                    .v_head_dim = c.v_head_dim,
                                    .first_position = sequence.first_position,
                                    .scale = static_cast<float>(s.rope.softmax_scale),
                                    .k_b = &w.k_b,
                                    .k_b_transposed = w.k_b_transposed,
                                    .v_b = &w.v_b,
                                    .rows = piece,
                                    .state = b.attn_state,
                                    .begin = begin,
                                    .finish = finish,
                                    .out = b.attn});
  };
  (void)each_piece(s, *sequence.cache, layer, sequence.first_position + s.n_tokens, attend);
}

}  // namespace

int64_t expanded_crossover_rows(const ModelConfig& c) noexcept {
  const int64_t absorbed = 2 * c.kv_lora_rank + c.qk_rope_head_dim;
  const int64_t expanded = c.qk_head_dim() + c.v_head_dim;
  if (absorbed <= expanded) return std::numeric_limits<int64_t>::max();
  const int64_t up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim);
  return (up + absorbed - expanded - 1) / (absorbed - expanded);
}

void mla_attention(const Step& s, const LayerWeights& w, LayerSlot layer) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  const int64_t n = s.n_tokens, hidden = c.hidden_size;
  const int64_t q_token = c.num_attention_heads * c.qk_head_dim();
  const float eps = static_cast<float>(c.rms_norm_eps);
  constexpr float kLatentEps = 1e-6f;  // q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps

  s.device.rms_norm(s.op, {b.x, hidden, w.attn_norm, eps, n, hidden, b.x_norm, hidden});
  if (c.q_lora_rank > 0) {
    const int64_t rank = c.q_lora_rank;
    s.device.matmul(s.op, {b.x_norm, hidden, n, &w.q_a, b.q_latent, rank});
    s.device.rms_norm(s.op, {b.q_latent, rank, w.q_a_norm, kLatentEps, n, rank, b.q_latent, rank});
    s.device.matmul(s.op, {b.q_latent, rank, n, &w.q_b, b.q, q_token});
  } else {
    s.device.matmul(s.op, {b.x_norm, hidden, n, &w.q, b.q, q_token});
  }
  s.device.rope(s.op, {.x = b.q + c.qk_nope_head_dim,
                       .token_stride = q_token,
                       .head_stride = c.qk_head_dim(),
                       .n_tokens = n,
                       .n_heads = c.num_attention_heads,
                       .rope_dim = c.qk_rope_head_dim,
                       .cos_sin = b.cos_sin});

  s.device.matmul(s.op, {b.x_norm, hidden, n, &w.kv_a, b.kv, c.kv_row_dim()});
  for (const Sequence& sequence : s.sequences) {
    KvRows fresh =
        sequence.cache->rows(layer.stage, layer.slot, sequence.first_position + sequence.n_tokens);
    fresh.first_row = sequence.first_position;
    fresh.n_rows = sequence.n_tokens;
    s.device.kv_append(s.op, {.kv = b.kv + sequence.first_row * c.kv_row_dim(),
                              .kv_stride = c.kv_row_dim(),
                              .norm_weight = w.kv_a_norm,
                              .eps = kLatentEps,
                              .cos_sin = b.cos_sin + sequence.first_row * c.qk_rope_head_dim,
                              .rows = fresh});
  }

  if (s.form == AttentionForm::kExpanded)
    attend_expanded(s, w, layer);
  else
    attend_absorbed(s, w, layer);
  const int64_t v_token = c.num_attention_heads * c.v_head_dim;
  s.device.matmul(s.op, {b.attn, v_token, n, &w.o, b.x, hidden, /*add=*/true});
}

}  // namespace fathom::nn
