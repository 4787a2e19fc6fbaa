// Multi-head latent attention (DeepSeek-V2 report, section 2.1) over the paged latent cache.
#include <algorithm>
#include <array>
#include <limits>

#include "layers.h"

namespace fathom::nn {
namespace {

// b.q -> b.attn, queries taken into latent space: score = (W_k q) . c, value = W_v (p . c).
// Equal to the expanded form because W_k and W_v are linear and shared by all rows.
Status attend_absorbed(const Step& s, const LayerWeights& w, LayerSlot layer) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  const int64_t heads = c.num_attention_heads, rank = c.kv_lora_rank;
  const int64_t q_token = heads * c.qk_head_dim(), v_token = heads * c.v_head_dim;
  // Texts of several sections need room for one beside the block's own sums.
  const bool sections = std::any_of(s.sequences.begin(), s.sequences.end(), [&](const Sequence& q) {
    return q.first_position + q.n_tokens > s.section_rows;
  });
  const int64_t block = sections ? b.block_rows / 2 : b.block_rows;
  for (int64_t t = 0; t < s.n_tokens; t += block) {
    const int64_t n = std::min(block, s.n_tokens - t);
    s.device.heads_matmul(s.op, {.x = b.q + t * q_token,
                                 .x_token_stride = q_token,
                                 .x_head_stride = c.qk_head_dim(),
                                 .n_tokens = n,
                                 .w = &w.k_b,
                                 .transposed = w.k_b_transposed,
                                 .out = b.q_absorbed,  // [n, n_heads, kv_lora_rank]
                                 .out_token_stride = heads * rank,
                                 .out_head_stride = rank});
    // Texts of one section whose rows are all at home go together, the others one by one.
    std::array<AttendAbsorbedParams, kAbsorbedRows> texts;
    int64_t n_texts = 0;
    for (const Sequence& sequence : s.sequences) {
      const int64_t first = std::max(t, sequence.first_row);
      const int64_t end = std::min(t + n, sequence.first_row + sequence.n_tokens);
      if (first >= end) continue;
      const int64_t position = sequence.first_position + first - sequence.first_row;
      if (s.sequences.size() > 1 && position + end - first <= s.section_rows) {
        const KvRows rows =
            sequence.cache->resident(layer.stage, layer.slot, position + end - first);
        if (rows.n_rows > 0) {
          texts[static_cast<size_t>(n_texts++)] =
              params_at_home(s, {t, n}, first, end - first, rows, position);
          continue;
        }
      }
      FATHOM_TRY_ASSIGN(const bool attended,
                        attend_rows(s, sequence, layer, {t, n}, first, end - first));
      if (!attended) return {};
    }
    if (n_texts > 0) s.device.attend_texts(s.op, texts.data(), n_texts);
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
  return {};
}

// b.q -> b.attn, keys and values expanded tile by tile inside the operation.  Rows of other devices
// come here: they are fewer bytes than the queries of a chunk, and need no second copy of k_b, v_b.
void attend_expanded(const Step& s, const LayerWeights& w, LayerSlot layer) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  const Sequence& sequence = s.sequences.front();
  const int64_t end_row = sequence.first_position + s.n_tokens;
  for (int64_t row = 0; row < end_row;) {
    const KvRows piece =
        sequence.cache->piece(layer.stage, layer.slot, s.op, row, end_row, Where::kHere).rows;
    if (piece.n_rows == 0) return;
    const int64_t end = row + piece.n_rows;
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
                                    .begin = row == 0,
                                    .finish = end == end_row,
                                    .out = b.attn});
    row = end;
  }
}

// b.kv into the caches of the sequences.
void append_rows(const Step& s, const LayerWeights& w, LayerSlot layer, float eps) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  for (const Sequence& sequence : s.sequences) {
    const int64_t end_row = sequence.first_position + sequence.n_tokens;
    for (int64_t row = sequence.first_position; row < end_row;) {
      const KvRows room = sequence.cache->room(layer.stage, layer.slot, s.op, row, end_row);
      if (room.n_rows == 0) break;
      const int64_t at = sequence.first_row + row - sequence.first_position;
      s.device.kv_append(s.op, {.kv = b.kv + at * c.kv_row_dim(),
                                .kv_stride = c.kv_row_dim(),
                                .norm_weight = w.kv_a_norm,
                                .eps = eps,
                                .cos_sin = b.cos_sin + at * c.qk_rope_head_dim,
                                .rows = room});
      sequence.cache->written(layer.stage, layer.slot, s.op, room);
      row += room.n_rows;
    }
  }
}

}  // namespace

int64_t expanded_crossover_rows(const ModelConfig& c) noexcept {
  const int64_t absorbed = 2 * c.kv_lora_rank + c.qk_rope_head_dim;
  const int64_t expanded = c.qk_head_dim() + c.v_head_dim;
  if (absorbed <= expanded) return std::numeric_limits<int64_t>::max();
  const int64_t up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim);
  return (up + absorbed - expanded - 1) / (absorbed - expanded);
}

Status mla_attention(const Step& s, const LayerWeights& w, LayerSlot layer) noexcept {
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
  append_rows(s, w, layer, kLatentEps);

  if (s.form == AttentionForm::kExpanded)
    attend_expanded(s, w, layer);
  else
    FATHOM_TRY(attend_absorbed(s, w, layer));
  const int64_t v_token = c.num_attention_heads * c.v_head_dim;
  s.device.matmul(s.op, {b.attn, v_token, n, &w.o, b.x, hidden, /*add=*/true});
  return {};
}

}  // namespace fathom::nn
