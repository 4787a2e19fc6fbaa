// Both forms of attention: the cut into launches and their workspace.
#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/kv_view.h"
#include "cuda/weights.h"

namespace fathom::cuda {
namespace {

// One past the last row that any query of the call sees.
template <class Params>
int64_t visible_end(const Params& p) noexcept {
  return std::min(p.rows.first_row + p.rows.n_rows, p.first_position + p.n_tokens);
}

// ---- absorbed ----
//
// Splits, of one text or several, are attended in waves whose partial results fit the workspace,
// and merged after each wave.

// Columns x splits of a wave: enough blocks for the largest GPUs, and partial results that stay in
// their second-level cache.
constexpr int64_t kWaveColumns = 8192;

struct AbsorbedScratch {
  int64_t n_parts;
  float *max, *sum, *out;  // [n_parts], out [n_parts, kv_lora_rank]
};
AbsorbedScratch carve(Workspace& space, const AttendAbsorbedParams& p) noexcept {
  const int64_t n_columns = p.n_tokens * p.n_heads;
  AbsorbedScratch s{};
  s.n_parts = std::max(kWaveColumns, n_columns);
  s.max = space.take<float>(s.n_parts);
  s.sum = space.take<float>(s.n_parts);
  s.out = space.take<float>(s.n_parts * p.rows.layout.kv_lora_rank);
  return s;
}

// Partial results of the splits of a wave, on tensor cores.
int attend_on_tensor_cores(Stream stream, const PartialParams& part) noexcept {
  bool f16 = false, others = false;
  for (int i = 0; i < part.rows.n_segments; ++i) {
    f16 = f16 || part.rows.segments[i].type == KvType::kF16;
    others = others || part.rows.segments[i].type != KvType::kF16;
  }
  if (f16)
    if (int e = attend_partial_f16(stream, part)) return e;
  return others ? attend_partial_mma(stream, part) : 0;
}

// What is gathered until it is run: pieces of texts, in order.
struct Wave {
  PartialParams part;
  MergeParams merge;
  int64_t n_parts;  // that the pieces take

  Wave(const AttendAbsorbedParams& p, const AbsorbedScratch& s, int64_t max_shared_bytes) noexcept
      : part{.q_latent_token_stride = p.q_latent_token_stride,
             .q_latent_head_stride = p.q_latent_head_stride,
             .q_rope_token_stride = p.q_rope_token_stride,
             .q_rope_head_stride = p.q_rope_head_stride,
             .n_heads = p.n_heads,
             .scale = p.scale,
             .n_pieces = 0,
             .n_splits = 0,
             .most_columns = 0,
             .pieces = {},
             .rows = {},
             .max = s.max,
             .sum = s.sum,
             .out = s.out,
             .max_shared_bytes = max_shared_bytes},
        merge{.rank = p.rows.layout.kv_lora_rank,
              .part_max = s.max,
              .part_sum = s.sum,
              .part_out = s.out,
              .n_pieces = 0,
              .most_columns = 0,
              .pieces = {}},
        n_parts(0) {}

  void clear() noexcept {
    part.n_pieces = part.n_splits = part.most_columns = part.rows.n_segments = 0;
    merge.n_pieces = merge.most_columns = 0;
    n_parts = 0;
  }

  // Adds rows of a text from `row` on, as many as there is room for; returns where they end, or
  // kFull.  No rows are a piece as well: they begin and finish a state.
  static constexpr int64_t kFull = -1;
  int64_t add(const AttendAbsorbedParams& p, int64_t row, int64_t end,
              int64_t most_parts) noexcept {
    if (merge.n_pieces == kMaxPieces) return kFull;
    const int64_t n_columns = p.n_tokens * p.n_heads;
    const auto n = static_cast<int32_t>(n_columns);
    int64_t reached = row, n_splits = 0;
    if (row < end) {
      const int64_t splits = (most_parts - n_parts) / n_columns;
      const int32_t first_segment = part.rows.n_segments;
      if (splits > 0)
        reached = add_segments(p.rows, row, std::min(end, row + splits * kPartialRows),
                               kPartialRows, part.rows);
      if (reached == row) return kFull;
      n_splits = (reached - row + kPartialRows - 1) / kPartialRows;
      part.pieces[part.n_pieces++] = {.q_latent = p.q_latent,
                                      .q_rope = p.q_rope,
                                      .first_position = p.first_position,
                                      .first_row = static_cast<int32_t>(row),
                                      .end_row = static_cast<int32_t>(reached),
                                      .first_split = part.n_splits,
                                      .first_part = static_cast<int32_t>(n_parts),
                                      .n_columns = n,
                                      .first_segment = static_cast<int16_t>(first_segment),
                                      .end_segment = static_cast<int16_t>(part.rows.n_segments)};
      part.n_splits += static_cast<int32_t>(n_splits);
      part.most_columns = std::max(part.most_columns, n);
    }
    merge.pieces[merge.n_pieces++] = {.max = p.state.max,
                                      .sum = p.state.sum,
                                      .out = p.out,
                                      .first_part = static_cast<int32_t>(n_parts),
                                      .n_splits = static_cast<int32_t>(n_splits),
                                      .n_columns = n,
                                      .begin = p.begin && row == p.rows.first_row,
                                      .finish = p.finish && reached >= end};
    merge.most_columns = std::max(merge.most_columns, n);
    n_parts += n_splits * n_columns;
    return reached;
  }
};

// ---- expanded ----
//
// For each group of heads: its k_b and v_b as dense panels, then tiles of rows: decode, expand to
// keys and values by a library's batched product, attend, carrying the state.

constexpr int64_t kExpandRows = 2048;  // of a tile
constexpr int64_t kExpandHeads = 16;   // of a group

struct ExpandedScratch {
  bool bf16;
  int64_t n_heads;           // of a group
  std::byte *k_b, *v_b;      // [n_heads, nope or v_head_dim, kv_lora_rank]
  std::byte *latent, *rope;  // [kExpandRows, kv_lora_rank], [kExpandRows, rope]
  std::byte *keys, *values;  // [n_heads, kExpandRows, nope or v_head_dim]
  std::byte* gemm;
};
ExpandedScratch carve(Workspace& space, const AttendExpandedParams& p, bool exact) noexcept {
  const int64_t rank = p.rows.layout.kv_lora_rank, rope = p.rows.layout.qk_rope_head_dim;
  ExpandedScratch s{};
  s.bf16 = !exact && rank % 8 == 0 && attend_tile_mma_fits(p.qk_nope_head_dim, rope, p.v_head_dim);
  s.n_heads = std::min(kExpandHeads, p.n_heads);
  const int64_t size = s.bf16 ? 2 : 4;
  s.k_b = space.take_bytes(s.n_heads * p.qk_nope_head_dim * rank * size);
  s.v_b = space.take_bytes(s.n_heads * p.v_head_dim * rank * size);
  s.latent = space.take_bytes(kExpandRows * rank * size);
  s.rope = space.take_bytes(kExpandRows * rope * size);
  s.keys = space.take_bytes(s.n_heads * kExpandRows * p.qk_nope_head_dim * size);
  s.values = space.take_bytes(s.n_heads * kExpandRows * p.v_head_dim * size);
  s.gemm = space.take_bytes(kGemmWorkspaceBytes);
  return s;
}

// Rows of `latent` times the heads' matrices -> out [n_heads, n_rows, n_cols].
int expand(Device& device, const ExpandedScratch& s, int64_t rank, int64_t n_rows, int64_t n_heads,
           const std::byte* panel, bool turned, int64_t n_cols, std::byte* out) noexcept {
  return device.gemm({.x = s.latent,
                      .x_stride = rank,
                      .x_batch_stride = 0,
                      .w = panel,
                      .w_stride = turned ? n_cols : rank,
                      .w_batch_stride = n_cols * rank,
                      .w_is_turned = turned,
                      .out = out,
                      .out_stride = n_cols,
                      .out_batch_stride = n_rows * n_cols,
                      .n_rows = n_rows,
                      .n_cols = n_cols,
                      .k = rank,
                      .n_batch = n_heads,
                      .bf16 = s.bf16,
                      .out_bf16 = s.bf16,
                      .add = false,
                      .workspace = s.gemm});
}

int dequantize_heads(Device& device, const Weight& w, int64_t first, int64_t n, bool bf16,
                     std::byte* out) noexcept {
  return dequantize_rows(device.stream(), {.w = view_of(w),
                                           .first_matrix = first,
                                           .n_matrices = n,
                                           .first_row = 0,
                                           .n_rows = w.rows,
                                           .out = out,
                                           .bf16 = bf16});
}

int attend_heads(Device& device, const AttendExpandedParams& p, const ExpandedScratch& s,
                 int64_t first_head, int64_t n_heads) noexcept {
  const int64_t rank = p.rows.layout.kv_lora_rank, end = visible_end(p);
  if (int e = dequantize_heads(device, *p.k_b, first_head, n_heads, s.bf16, s.k_b)) return e;
  if (int e = dequantize_heads(device, *p.v_b, first_head, n_heads, s.bf16, s.v_b)) return e;
  ExpandedTileParams tile{.q = p.q,
                          .q_token_stride = p.q_token_stride,
                          .q_head_stride = p.q_head_stride,
                          .n_tokens = p.n_tokens,
                          .n_heads_all = p.n_heads,
                          .first_head = first_head,
                          .n_heads = n_heads,
                          .nope = p.qk_nope_head_dim,
                          .rope = p.rows.layout.qk_rope_head_dim,
                          .value = p.v_head_dim,
                          .first_position = p.first_position,
                          .first_row = p.rows.first_row,
                          .n_rows = 0,
                          .scale = p.scale,
                          .keys = s.keys,
                          .rope_keys = s.rope,
                          .values = s.values,
                          .max = p.state.max,
                          .sum = p.state.sum,
                          .out = p.out,
                          .begin = p.begin,
                          .finish = false};
  int64_t row = p.rows.first_row;
  do {  // once at least: the state begins and finishes even when no row is seen
    DecodeRowsParams decode{.rows = {}, .latent = s.latent, .rope = s.rope, .bf16 = s.bf16};
    const int64_t tile_end = std::min(end, (row / kExpandRows + 1) * kExpandRows);
    const int64_t next =
        row < end ? make_view(p.rows, row, tile_end, kPartialRows, decode.rows) : row;
    tile.first_row = row;
    tile.n_rows = next - row;
    tile.finish = p.finish && next >= end;
    if (tile.n_rows > 0) {
      if (int e = decode_rows(device.stream(), decode)) return e;
      if (int e = expand(device, s, rank, tile.n_rows, n_heads, s.k_b, !p.k_b_transposed,
                         p.qk_nope_head_dim, s.keys))
        return e;
      if (int e =
              expand(device, s, rank, tile.n_rows, n_heads, s.v_b, false, p.v_head_dim, s.values))
        return e;
    }
    if (int e = s.bf16 ? attend_tile_mma(device.stream(), tile)
                       : attend_tile_exact(device.stream(), tile))
      return e;
    tile.begin = false;
    row = next;
  } while (row < end);
  return 0;
}

}  // namespace

int64_t CudaBackend::workspace_bytes(const AttendAbsorbedParams& p) const noexcept {
  Workspace counting;
  carve(counting, p);
  return counting.peak_bytes();
}

void CudaBackend::attend_absorbed(const OpContext& op, const AttendAbsorbedParams& p) noexcept {
  attend_texts(op, &p, 1);
}

void CudaBackend::attend_texts(const OpContext& op, const AttendAbsorbedParams* texts,
                               int64_t n_texts) noexcept {
  if (n_texts == 0) return;
  AttendAbsorbedParams all = texts[0];
  all.n_tokens = 0;
  for (int64_t i = 0; i < n_texts; ++i) all.n_tokens += texts[i].n_tokens;
  if (all.n_tokens * all.n_heads == 0) return;
  Workspace space(op);
  const AbsorbedScratch s = carve(space, all);
  const KvLayout& layout = all.rows.layout;
  const bool tensor_cores =
      !exact() && attend_partial_mma_fits(layout.kv_lora_rank, layout.qk_rope_head_dim);
  Wave wave(all, s, device_->max_shared_bytes());
  const auto run = [&] {
    check(op, tensor_cores ? attend_on_tensor_cores(device_->stream(), wave.part)
                           : attend_partial_exact(device_->stream(), wave.part));
    check(op, attend_merge(device_->stream(), wave.merge));
    wave.clear();
  };
  for (int64_t i = 0; i < n_texts; ++i) {
    const AttendAbsorbedParams& p = texts[i];
    if (p.n_tokens == 0) continue;
    const int64_t end = visible_end(p);
    int64_t row = p.rows.first_row;
    do {  // once at least: the state begins and finishes even when no row is seen
      int64_t reached = wave.add(p, row, end, s.n_parts);
      if (reached == Wave::kFull) {
        run();
        reached = wave.add(p, row, end, s.n_parts);
      }
      row = reached;
    } while (row < end);
  }
  run();
}

void CudaBackend::merge_attention(const OpContext& op, const MergeAttentionParams& p) noexcept {
  const auto n_columns = static_cast<int32_t>(p.n_tokens * p.n_heads);
  if (n_columns == 0) return;
  MergeParams merge{};
  merge.rank = p.kv_lora_rank;
  merge.part_max = p.part.max;
  merge.part_sum = p.part.sum;
  merge.part_out = p.part_out;
  merge.n_pieces = 1;
  merge.most_columns = n_columns;
  merge.pieces[0] = {.max = p.state.max,
                     .sum = p.state.sum,
                     .out = p.out,
                     .first_part = 0,
                     .n_splits = 1,
                     .n_columns = n_columns,
                     .begin = false,
                     .finish = p.finish};
  check(op, attend_merge(device_->stream(), merge));
}

int64_t CudaBackend::workspace_bytes(const AttendExpandedParams& p) const noexcept {
  Workspace counting;
  carve(counting, p, exact());
  return counting.peak_bytes();
}

void CudaBackend::attend_expanded(const OpContext& op, const AttendExpandedParams& p) noexcept {
  if (p.n_tokens == 0 || p.n_heads == 0) return;
  Workspace space(op);
  const ExpandedScratch s = carve(space, p, exact());
  for (int64_t head = 0; head < p.n_heads; head += s.n_heads)
    check(op, attend_heads(*device_, p, s, head, std::min(s.n_heads, p.n_heads - head)));
}

}  // namespace fathom::cuda
