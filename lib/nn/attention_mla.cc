// Multi-head latent attention (DeepSeek-V2 report, section 2.1) over the paged latent cache.
#include <algorithm>
#include <array>
#include <limits>

#include "layers.h"
#include "transfer.h"

namespace fathom::nn {
namespace {

// A block of n queries of one sequence as attention over latent rows sees it on one device.
struct Block {
  Backend& device;
  OpContext op;
  float* q_latent;       // [n, n_heads, kv_lora_rank]
  float* q;              // [n, n_heads, qk_head_dim], of which the RoPE columns are read
  AttentionState state;  // [n, n_heads] each
  float* out;            // [n, n_heads, kv_lora_rank]
};

AttendAbsorbedParams params_of(const Step& s, const Block& block, const KvRows& rows, int64_t n,
                               int64_t position, bool begin, bool finish) noexcept {
  const ModelConfig& c = s.config;
  const int64_t heads = c.num_attention_heads, rank = c.kv_lora_rank;
  return {.q_latent = block.q_latent,
          .q_latent_token_stride = heads * rank,
          .q_latent_head_stride = rank,
          .q_rope = block.q + c.qk_nope_head_dim,
          .q_rope_token_stride = heads * c.qk_head_dim(),
          .q_rope_head_stride = c.qk_head_dim(),
          .n_tokens = n,
          .n_heads = heads,
          .first_position = position,
          .scale = static_cast<float>(s.rope.softmax_scale),
          .rows = rows,
          .state = block.state,
          .begin = begin,
          .finish = finish,
          .out = block.out};
}

void attend(const Step& s, const Block& block, const KvRows& rows, int64_t n, int64_t position,
            bool begin, bool finish) noexcept {
  block.device.attend_absorbed(block.op, params_of(s, block, rows, n, position, begin, finish));
}

// Rows from `first` on of the pass, whose latent queries begin the block at row `block`, at home.
Block home_block(const Step& s, int64_t block, int64_t first) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  const int64_t heads = c.num_attention_heads, rank = c.kv_lora_rank;
  const int64_t at = (first - block) * heads;
  return {s.device,
          s.op,
          b.q_absorbed + at * rank,
          b.q + first * heads * c.qk_head_dim(),
          {b.attn_state.max + at, b.attn_state.sum + at},
          b.attn_absorbed + at * rank};
}
// The block's buffers on another device.
Block guest_block(const Stage& stage) noexcept {
  const Scratch& b = stage.scratch;
  return {*stage.device, stage.op, b.q_absorbed, b.q, b.attn_state, b.attn_absorbed};
}

// Takes the queries of a block from its layer's device to another one.
Status send_queries(const Step& s, const Block& from, const Block& to, int64_t n) noexcept {
  const int64_t heads = n * s.config.num_attention_heads, value = sizeof(float);
  FATHOM_TRY(from.device.sync(from.op));
  FATHOM_TRY(to.device.sync(to.op));  // of what it did before
  FATHOM_TRY(transfer(from.device, from.q_latent, to.device, to.q_latent,
                      heads * s.config.kv_lora_rank * value, s.staging));
  return transfer(from.device, from.q, to.device, to.q, heads * s.config.qk_head_dim() * value,
                  s.staging);
}

// Takes the running sums from device to device; `whole`: with the state, so that rows can be added.
Status hand_on(const Step& s, const Block& from, const Block& to, int64_t n, bool whole) noexcept {
  const int64_t heads = n * s.config.num_attention_heads, value = sizeof(float);
  FATHOM_TRY(from.device.sync(from.op));
  FATHOM_TRY(to.device.sync(to.op));
  if (whole) {
    FATHOM_TRY(
        transfer(from.device, from.state.max, to.device, to.state.max, heads * value, s.staging));
    FATHOM_TRY(
        transfer(from.device, from.state.sum, to.device, to.state.sum, heads * value, s.staging));
  }
  return transfer(from.device, from.out, to.device, to.out, heads * s.config.kv_lora_rank * value,
                  s.staging);
}

// Rows [first, first + n) of the pass, all of one sequence, whose latent queries begin the block at
// row `block`: b.q_absorbed -> b.attn_absorbed.  Goes over the sequence's rows in ascending order
// and, with the running state, from device to device as they lie, so that the partial results are
// merged in the one order that there is.  False when the cache could not bring its rows in.
Result<bool> attend_rows(const Step& s, const Sequence& sequence, LayerSlot layer, int64_t block,
                         int64_t first, int64_t n) noexcept {
  const int64_t position = sequence.first_position + first - sequence.first_row;
  const int64_t end_row = position + n;  // rows beyond the last query would be masked anyway
  const Block home = home_block(s, block, first);
  const auto block_on = [&](int stage) {
    return stage == layer.stage ? home : guest_block(s.stages[static_cast<size_t>(stage)]);
  };
  int stage = layer.stage;
  for (int64_t row = 0; row < end_row;) {
    const RowPiece piece =
        sequence.cache->piece(layer.stage, layer.slot, s.op, row, end_row, Where::kAnywhere);
    if (piece.rows.n_rows == 0) return false;
    if (piece.stage != stage) {
      if (piece.stage != layer.stage) FATHOM_TRY(send_queries(s, home, block_on(piece.stage), n));
      if (row > 0) FATHOM_TRY(hand_on(s, block_on(stage), block_on(piece.stage), n, true));
      stage = piece.stage;
    }
    const int64_t end = row + piece.rows.n_rows;
    attend(s, block_on(stage), piece.rows, n, position, row == 0, end == end_row);
    row = end;
  }
  if (stage != layer.stage) FATHOM_TRY(hand_on(s, block_on(stage), home, n, false));
  return true;
}

// b.q -> b.attn, queries taken into latent space: score = (W_k q) . c, value = W_v (p . c).
// Equal to the expanded form because W_k and W_v are linear and shared by all rows.
Status attend_absorbed(const Step& s, const LayerWeights& w, LayerSlot layer) noexcept {
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
    // Texts whose rows are all at home go together, the others one by one.
    std::array<AttendAbsorbedParams, kAbsorbedRows> texts;
    int64_t n_texts = 0;
    for (const Sequence& sequence : s.sequences) {
      const int64_t first = std::max(t, sequence.first_row);
      const int64_t end = std::min(t + n, sequence.first_row + sequence.n_tokens);
      if (first >= end) continue;
      const int64_t position = sequence.first_position + first - sequence.first_row;
      if (s.sequences.size() > 1) {
        const KvRows rows =
            sequence.cache->resident(layer.stage, layer.slot, position + end - first);
        if (rows.n_rows > 0) {
          texts[static_cast<size_t>(n_texts++)] =
              params_of(s, home_block(s, t, first), rows, end - first, position, /*begin=*/true,
                        /*finish=*/true);
          continue;
        }
      }
      FATHOM_TRY_ASSIGN(const bool attended,
                        attend_rows(s, sequence, layer, t, first, end - first));
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

void attend_as_guest(const Step& s, const KvRows& rows, int64_t n) noexcept {
  const Scratch& b = s.scratch;
  attend(s, {s.device, s.op, b.q_absorbed, b.q, b.attn_state, b.attn_absorbed}, rows, n, 0, true,
         true);
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
