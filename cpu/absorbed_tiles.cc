// The two forms of a tile of absorbed attention.
#include "cpu/absorbed_tiles.h"

#include <limits>

#include "cpu/page_codec.h"
#include "cpu/pair_kernels.h"
#include "cpu/pair_pages.h"

namespace fathom::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
static_assert(kKvSplitRows % kPairTileRows == 0);
static_assert(kPairMaxCols == kAttendMaxCols);
// Pairs of a panel of values; an odd number of cache lines, as in tile_stride().
constexpr int64_t kValuePanel = (kPairTileRows / 2 + 1) * kPairUnit;

const float* latent_query(const AttendAbsorbedParams& p, int64_t column) noexcept {
  return p.q_latent + column / p.n_heads * p.q_latent_token_stride +
         column % p.n_heads * p.q_latent_head_stride;
}
const float* rope_query(const AttendAbsorbedParams& p, int64_t column) noexcept {
  return p.q_rope + column / p.n_heads * p.q_rope_token_stride +
         column % p.n_heads * p.q_rope_head_stride;
}

// queries[k][col] = scale * query of the column; zeros as padding.
void gather_floats(const AttendAbsorbedParams& p, const AbsorbedShape& shape,
                   const AbsorbedBlock& block, float* queries) noexcept {
  const int64_t n_cols = block.n_padded;
  gather_columns(
      shape.latent, n_cols, block.n, p.scale,
      [&](int64_t col) { return latent_query(p, block.first + col); }, queries);
  std::fill(queries + shape.latent * n_cols, queries + shape.latent_padded * n_cols, 0.0f);
  gather_columns(
      p.rows.layout.qk_rope_head_dim, n_cols, block.n, p.scale,
      [&](int64_t col) { return rope_query(p, block.first + col); },
      queries + shape.latent_padded * n_cols);
}

int64_t query_stride(const AbsorbedShape& shape) noexcept {
  return shape.key_dim / 2 * kPairUnit;
}

void gather_pairs(const PairKernels& kernels, const AttendAbsorbedParams& p,
                  const AbsorbedShape& shape, const AbsorbedBlock& block,
                  uint32_t* queries) noexcept {
  const float* columns[kPairMaxCols];
  PackColumns pack{.columns = columns,
                   .n_columns = block.n,
                   .n = shape.latent,
                   .scale = p.scale,
                   .out = queries,
                   .unit_stride = query_stride(shape)};
  for (int64_t col = 0; col < block.n; ++col) columns[col] = latent_query(p, block.first + col);
  kernels.pack_columns(pack);
  const int64_t latent_pairs = (shape.latent + 1) / 2;
  for (int64_t unit = 0; unit < block.n_padded / kPairUnit; ++unit)
    std::fill(queries + unit * pack.unit_stride + latent_pairs * kPairUnit,
              queries + unit * pack.unit_stride + shape.latent_padded / 2 * kPairUnit, 0u);
  for (int64_t col = 0; col < block.n; ++col) columns[col] = rope_query(p, block.first + col);
  pack.n = p.rows.layout.qk_rope_head_dim;
  pack.out = queries + shape.latent_padded / 2 * kPairUnit;
  kernels.pack_columns(pack);
}

void set_limits(const AttendAbsorbedParams& p, const AbsorbedBlock& block, int64_t row,
                int64_t tile_rows, int32_t* limits) noexcept {
  for (int64_t col = 0; col < block.n_padded; ++col) {
    const int64_t token = (block.first + std::min(col, block.n - 1)) / p.n_heads;
    limits[col] = seen_rows(p.first_position + token, row, tile_rows);
  }
}

void attend_floats(const CpuContext& context, const AttendAbsorbedParams& p,
                   const AbsorbedShape& shape, const AbsorbedScratch& scratch,
                   const AbsorbedBlock& block, int64_t row, int64_t n_rows, bool all_seen,
                   const AbsorbedPartial& partial) noexcept {
  decode_pages(*context.rows, p.rows, row, n_rows, scratch.tile, shape.stride,
               scratch.tile + shape.latent_padded, shape.stride);
  context.rows->attend_tile({.queries = scratch.queries,
                             .n_cols = block.n_padded,
                             .n_used = block.n,
                             .keys = scratch.tile,
                             .key_stride = shape.stride,
                             .k = shape.key_dim,
                             .values = scratch.tile,
                             .value_stride = shape.stride,
                             .n_values = shape.latent_padded,
                             .n_rows = n_rows,
                             .limits = all_seen ? nullptr : scratch.limits,
                             .max = partial.max,
                             .sum = partial.sum,
                             .out = partial.out,
                             .out_stride = shape.latent_padded,
                             .scores = scratch.scores,
                             .decay = scratch.decay});
}

void attend_pairs(const CpuContext& context, const AttendAbsorbedParams& p,
                  const AbsorbedShape& shape, const AbsorbedScratch& scratch,
                  const AbsorbedBlock& block, int64_t row, int64_t n_rows, int64_t split_end,
                  bool all_seen, const AbsorbedPartial& partial) noexcept {
  pack_pages(context, p.rows, row, n_rows, split_end, scratch.tile,
             {.latent = scratch.keys,
              .latent_stride = shape.stride,
              .pairs = scratch.values,
              .panel_stride = kValuePanel,
              .rope = scratch.keys + shape.latent_padded,
              .rope_stride = shape.stride});
  AttendPairs attend{.queries = scratch.query_pairs,
                     .query_stride = query_stride(shape),
                     .n_cols = block.n_padded,
                     .n_used = block.n,
                     .keys = scratch.keys,
                     .key_stride = shape.stride,
                     .k = shape.key_dim,
                     .values = scratch.values,
                     .value_stride = kValuePanel,
                     .n_values = shape.latent_padded,
                     .n_rows = n_rows,
                     .limits = all_seen ? nullptr : scratch.limits,
                     .max = partial.max,
                     .sum = partial.sum,
                     .out = partial.out,
                     .out_stride = shape.latent_padded,
                     .scores = scratch.scores,
                     .weights = scratch.weights,
                     .decay = scratch.decay};
  fetch_ahead(p.rows, row + n_rows, std::min<int64_t>(kPairTileRows, split_end - row - n_rows),
              attend.fetch);
  context.pairs->attend(attend);
}

}  // namespace

AbsorbedShape::AbsorbedShape(const CpuContext& context, const AttendAbsorbedParams& p) noexcept
    : latent(p.rows.layout.kv_lora_rank),
      latent_padded(round_up(latent, kRowUnit)),
      key_dim(latent_padded + p.rows.layout.qk_rope_head_dim),
      stride(tile_stride(key_dim)),
      stage_floats(pair_stage_floats(p.rows.layout)),
      n_columns(p.n_tokens * p.n_heads),
      n_workers(context.threads->size()) {}

AbsorbedScratch carve_absorbed(Workspace& workspace, const CpuContext& context,
                               const AbsorbedShape& shape) noexcept {
  const bool pairs = context.pairs != nullptr;
  const int64_t tile_rows = pairs ? kPairTileRows : kAttendTileRows;
  AbsorbedScratch s{};
  s.gathered = workspace.take<int64_t>(2);
  s.tile = workspace.take<float>(pairs ? shape.stage_floats : tile_rows * shape.stride);
  s.scores = workspace.take<float>(tile_rows * kAttendMaxCols);
  s.decay = workspace.take<float>(kAttendMaxCols);
  s.limits = workspace.take<int32_t>(kAttendMaxCols);
  s.partial = {.max = workspace.take<float>(kAttendMaxCols),
               .sum = workspace.take<float>(kAttendMaxCols),
               .out = workspace.take<float>(kAttendMaxCols * shape.latent_padded)};
  if (!pairs) {
    s.queries = workspace.take<float>(shape.key_dim * kAttendMaxCols);
    return s;
  }
  s.query_pairs = workspace.take<uint32_t>(kAttendMaxCols / kPairUnit * query_stride(shape));
  s.keys = workspace.take<uint16_t>(kPairTileRows * shape.stride);
  s.values = workspace.take<uint32_t>(shape.latent_padded / kPairUnit * kValuePanel);
  s.weights = workspace.take<uint32_t>(kPairTileRows / 2 * kAttendMaxCols);
  return s;
}

void begin_absorbed(const CpuContext& context, const AbsorbedShape& shape,
                    const AbsorbedScratch& scratch) noexcept {
  scratch.gathered[0] = scratch.gathered[1] = -1;
  // Padding that decoding leaves alone and products read.
  if (context.pairs == nullptr)
    clear_columns(scratch.tile, shape.stride, kAttendTileRows, shape.latent, shape.latent_padded);
}

void gather_absorbed(const CpuContext& context, const AttendAbsorbedParams& p,
                     const AbsorbedShape& shape, const AbsorbedScratch& scratch,
                     const AbsorbedBlock& block) noexcept {
  if (scratch.gathered[0] == block.first && scratch.gathered[1] == block.n) return;
  scratch.gathered[0] = block.first;
  scratch.gathered[1] = block.n;
  if (context.pairs != nullptr)
    gather_pairs(*context.pairs, p, shape, block, scratch.query_pairs);
  else
    gather_floats(p, shape, block, scratch.queries);
}

void attend_split(const CpuContext& context, const AttendAbsorbedParams& p,
                  const AbsorbedShape& shape, const AbsorbedScratch& scratch,
                  const AbsorbedBlock& block, const SplitRows& rows,
                  const AbsorbedPartial& partial) noexcept {
  std::fill_n(partial.max, block.n_padded, kLowest);
  std::fill_n(partial.sum, block.n_padded, 0.0f);
  std::fill_n(partial.out, block.n * shape.latent_padded, 0.0f);
  const int64_t tile_rows = context.pairs != nullptr ? kPairTileRows : kAttendTileRows;
  const int64_t first_token = block.first / p.n_heads;
  const int64_t last_token = (block.first + block.n - 1) / p.n_heads;
  const int64_t last_seen = p.first_position + last_token;
  for (int64_t row = rows.first; row < std::min(rows.end, last_seen + 1);) {
    // Rows behind the block's last query would be masked.
    const int64_t tile_end = std::min({rows.end, (row / tile_rows + 1) * tile_rows, last_seen + 1});
    const bool all_seen = tile_end <= p.first_position + first_token + 1;
    if (!all_seen) set_limits(p, block, row, tile_rows, scratch.limits);
    if (context.pairs != nullptr)
      attend_pairs(context, p, shape, scratch, block, row, tile_end - row, rows.end, all_seen,
                   partial);
    else
      attend_floats(context, p, shape, scratch, block, row, tile_end - row, all_seen, partial);
    row = tile_end;
  }
}

}  // namespace fathom::cpu
