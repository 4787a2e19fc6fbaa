// Absorbed attention: queries live in latent space, and keys and values are the cached rows
// themselves (DeepSeek-V2 report, section 2.1.2).  All heads share the rows, so a (token, head)
// pair is simply a column, and a tile of rows serves a block of columns at once.
//
//   columns (t, h)      blocks of up to kAttendMaxCols
//   rows of the cache   splits of kKvSplitRows at absolute multiples, tiles of kAttendTileRows
//
// Each (split, block) is attended by itself from an empty state; the partial results of a column
// are then merged in the order of the splits.  With many columns a task takes a block through all
// splits; with few, splits run in parallel in waves whose partial results fit the workspace.
#include <algorithm>
#include <limits>

#include "cpu/attention.h"
#include "cpu/attention_tiles.h"
#include "cpu/page_codec.h"

namespace fathom::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// From this many blocks per thread on, blocks alone keep the threads evenly busy; below, a wave of
// splits makes up for them.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMergeColumns = 4;  // columns of a merge task

// Running state of a block of columns, as an empty split begins it.
struct Partial {
  float *max, *sum;  // [cols]
  float* out;        // [cols][latent_padded]
};

// What follows from the shapes.
struct Shape {
  int64_t latent, latent_padded, key_dim, stride;  // values of a tile's row
  int64_t n_columns, n_blocks;
  int64_t n_workers;
  // Room for partial results, always the same: more columns never need less than fewer.
  int64_t wave_columns;

  Shape(const CpuContext& context, const AttendAbsorbedParams& p) noexcept
      : latent(p.rows.layout.kv_lora_rank),
        latent_padded(round_up(latent, kRowUnit)),
        key_dim(latent_padded + p.rows.layout.qk_rope_head_dim),
        stride(tile_stride(key_dim)),
        n_columns(p.n_tokens * p.n_heads),
        n_blocks((n_columns + kAttendMaxCols - 1) / kAttendMaxCols),
        n_workers(context.threads->size()),
        wave_columns(kTasksPerThread * n_workers * kAttendMaxCols) {}
};

Partial carve_partial(Workspace& workspace, const Shape& shape, int64_t n_columns) noexcept {
  return {.max = workspace.take<float>(n_columns),
          .sum = workspace.take<float>(n_columns),
          .out = workspace.take<float>(n_columns * shape.latent_padded)};
}

struct WorkerScratch {
  float* tile;      // [kAttendTileRows][stride]: latent, zeros to a full unit, rope
  float* queries;   // [key_dim][cols]
  float* scores;    // [kAttendTileRows][cols]
  float* decay;     // [cols]
  int32_t* limits;  // [cols]
  Partial partial;
};

WorkerScratch carve_worker(Workspace& workspace, const Shape& shape) noexcept {
  return {.tile = workspace.take<float>(kAttendTileRows * shape.stride),
          .queries = workspace.take<float>(shape.key_dim * kAttendMaxCols),
          .scores = workspace.take<float>(int64_t{kAttendTileRows} * kAttendMaxCols),
          .decay = workspace.take<float>(kAttendMaxCols),
          .limits = workspace.take<int32_t>(kAttendMaxCols),
          .partial = carve_partial(workspace, shape, kAttendMaxCols)};
}

// The whole workspace: a part for each worker, and the partial results of a wave.
struct Scratch {
  WorkerParts workers;
  Partial wave;  // [splits of the wave][n_columns]
};

Scratch carve(Workspace& workspace, const Shape& shape) noexcept {
  Workspace counting;
  carve_worker(counting, shape);
  return {.workers = WorkerParts(workspace, shape.n_workers, counting.used_bytes()),
          .wave = carve_partial(workspace, shape, shape.wave_columns)};
}

// A block of columns: [first, first + n), computed as n_padded whole vectors.
struct Block {
  int64_t first, n, n_padded;
};

// queries[k][col] = scale * query of the column; zeros as padding.
void gather_queries(const AttendAbsorbedParams& p, const Shape& shape, const Block& block,
                    float* queries) noexcept {
  const int64_t n_cols = block.n_padded;
  const auto token = [&](int64_t col) { return (block.first + col) / p.n_heads; };
  const auto head = [&](int64_t col) { return (block.first + col) % p.n_heads; };
  gather_columns(
      shape.latent, n_cols, block.n, p.scale,
      [&](int64_t col) {
        return p.q_latent + token(col) * p.q_latent_token_stride +
               head(col) * p.q_latent_head_stride;
      },
      queries);
  std::fill(queries + shape.latent * n_cols, queries + shape.latent_padded * n_cols, 0.0f);
  gather_columns(
      p.rows.layout.qk_rope_head_dim, n_cols, block.n, p.scale,
      [&](int64_t col) {
        return p.q_rope + token(col) * p.q_rope_token_stride + head(col) * p.q_rope_head_stride;
      },
      queries + shape.latent_padded * n_cols);
}

// One past the last row that any query of this call sees.
int64_t visible_end(const AttendAbsorbedParams& p) noexcept {
  return std::min(p.rows.first_row + p.rows.n_rows, p.first_position + p.n_tokens);
}

// Rows of split number `split` that this call has and any query sees.
struct SplitRows {
  int64_t first, end;
};
SplitRows split_rows(const AttendAbsorbedParams& p, int64_t split) noexcept {
  const int64_t first = split * kKvSplitRows;
  return {std::max(first, p.rows.first_row), std::min(first + kKvSplitRows, visible_end(p))};
}

// Attention of a block over the rows of one split, from an empty state.
void attend_split(const CpuContext& context, const AttendAbsorbedParams& p, const Shape& shape,
                  const WorkerScratch& scratch, const Block& block, const SplitRows& rows,
                  const Partial& partial) noexcept {
  std::fill_n(partial.max, block.n_padded, kLowest);
  std::fill_n(partial.sum, block.n_padded, 0.0f);
  std::fill_n(partial.out, block.n * shape.latent_padded, 0.0f);
  const int64_t first_token = block.first / p.n_heads;
  const int64_t last_token = (block.first + block.n - 1) / p.n_heads;
  const int64_t last_seen = p.first_position + last_token;
  for (int64_t row = rows.first; row < std::min(rows.end, last_seen + 1);) {
    const int64_t tile_end = std::min(rows.end, (row / kAttendTileRows + 1) * kAttendTileRows);
    const int64_t n_rows = tile_end - row;
    decode_pages(*context.rows, p.rows, row, n_rows, scratch.tile, shape.stride,
                 scratch.tile + shape.latent_padded, shape.stride);
    const bool all_seen = tile_end <= p.first_position + first_token + 1;
    if (!all_seen)
      for (int64_t col = 0; col < block.n_padded; ++col) {
        const int64_t token = (block.first + std::min(col, block.n - 1)) / p.n_heads;
        scratch.limits[col] = seen_rows(p.first_position + token, row);
      }
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
    row = tile_end;
  }
}

// Merges what a partial says of columns [first, first + n) into the running state.
void merge_columns(const CpuContext& context, const AttendAbsorbedParams& p, const Shape& shape,
                   int64_t first, int64_t n, const Partial& partial) noexcept {
  context.rows->merge({.n_cols = n,
                       .n_values = shape.latent,
                       .max = p.state.max + first,
                       .sum = p.state.sum + first,
                       .out = p.out + first * shape.latent,
                       .out_stride = shape.latent,
                       .part_max = partial.max,
                       .part_sum = partial.sum,
                       .part_out = partial.out,
                       .part_stride = shape.latent_padded});
}

void begin_columns(const AttendAbsorbedParams& p, const Shape& shape, int64_t first,
                   int64_t n) noexcept {
  std::fill_n(p.state.max + first, n, kLowest);
  std::fill_n(p.state.sum + first, n, 0.0f);
  std::fill_n(p.out + first * shape.latent, n * shape.latent, 0.0f);
}

void finish_columns(const AttendAbsorbedParams& p, const Shape& shape, int64_t first,
                    int64_t n) noexcept {
  for (int64_t col = first; col < first + n; ++col) {
    const float sum = p.state.sum[col];
    const float factor = sum == 0 ? 0.0f : 1 / sum;
    float* out = p.out + col * shape.latent;
    for (int64_t i = 0; i < shape.latent; ++i) out[i] *= factor;
  }
}

// Splits [first, end) of this call with rows that some query sees.
struct SplitRange {
  int64_t first, end;
};
SplitRange visible_splits(const AttendAbsorbedParams& p) noexcept {
  const int64_t first = p.rows.first_row / kKvSplitRows;
  return {first, std::max(first, (visible_end(p) + kKvSplitRows - 1) / kKvSplitRows)};
}

Block make_block(const CpuContext& context, const Shape& shape, int64_t first,
                 int64_t n_cols) noexcept {
  const int64_t n = std::min(n_cols, shape.n_columns - first);
  return {first, n, round_up(n, context.rows->lanes)};
}

// Many columns: a task takes a block through all splits.
void attend_by_blocks(const CpuContext& context, const AttendAbsorbedParams& p, const Shape& shape,
                      const Scratch& scratch) noexcept {
  const SplitRange splits = visible_splits(p);
  context.threads->parallel_for(shape.n_blocks, [&](int64_t task, int worker) {
    Workspace part = scratch.workers.part(worker);
    const WorkerScratch mine = carve_worker(part, shape);
    const Block block = make_block(context, shape, task * kAttendMaxCols, kAttendMaxCols);
    if (p.begin) begin_columns(p, shape, block.first, block.n);
    clear_columns(mine.tile, shape.stride, kAttendTileRows, shape.latent, shape.latent_padded);
    gather_queries(p, shape, block, mine.queries);
    for (int64_t split = splits.first; split < splits.end; ++split) {
      attend_split(context, p, shape, mine, block, split_rows(p, split), mine.partial);
      merge_columns(context, p, shape, block.first, block.n, mine.partial);
    }
    if (p.finish) finish_columns(p, shape, block.first, block.n);
  });
}

// Few columns: waves of splits in parallel, merged after each wave.
void attend_by_waves(const CpuContext& context, const AttendAbsorbedParams& p, const Shape& shape,
                     const Scratch& scratch) noexcept {
  const SplitRange splits = visible_splits(p);
  const int64_t wave_splits = std::clamp<int64_t>(
      splits.end - splits.first, 1, std::max<int64_t>(shape.wave_columns / shape.n_columns, 1));
  // Few splits, too: narrower blocks, down to half a vector, so that more threads have work.  The
  // scores of unused lanes cost the same, but values are summed for real columns only.
  const int64_t wanted_blocks = (shape.n_workers + wave_splits - 1) / wave_splits;
  const int64_t narrowest = std::max(context.rows->lanes / 2, 1);
  const int64_t block_cols =
      std::clamp(round_up((shape.n_columns + wanted_blocks - 1) / wanted_blocks, narrowest),
                 narrowest, int64_t{kAttendMaxCols});
  const int64_t n_blocks = (shape.n_columns + block_cols - 1) / block_cols;
  const int64_t n_merges = (shape.n_columns + kMergeColumns - 1) / kMergeColumns;

  // One wave at least: it begins and finishes the state even when no row is seen.
  int64_t wave = splits.first;
  do {
    const int64_t n_splits = std::min(wave_splits, splits.end - wave);
    const bool first_wave = wave == splits.first, last_wave = wave + n_splits == splits.end;
    const auto partial_of = [&](int64_t split, int64_t col) -> Partial {
      const int64_t index = split * shape.n_columns + col;
      return {scratch.wave.max + index, scratch.wave.sum + index,
              scratch.wave.out + index * shape.latent_padded};
    };
    context.threads->parallel_for(n_splits * n_blocks, [&](int64_t task, int worker) {
      Workspace part = scratch.workers.part(worker);
      const WorkerScratch mine = carve_worker(part, shape);
      const int64_t split = task / n_blocks;
      const Block block = make_block(context, shape, task % n_blocks * block_cols, block_cols);
      clear_columns(mine.tile, shape.stride, kAttendTileRows, shape.latent, shape.latent_padded);
      gather_queries(p, shape, block, mine.queries);
      const Partial partial = partial_of(split, block.first);
      // Maximum and sum of padding columns stay behind.
      attend_split(context, p, shape, mine, block, split_rows(p, wave + split),
                   {mine.partial.max, mine.partial.sum, partial.out});
      std::copy_n(mine.partial.max, block.n, partial.max);
      std::copy_n(mine.partial.sum, block.n, partial.sum);
    });
    context.threads->parallel_for(n_merges, [&](int64_t task, int) {
      const int64_t first = task * kMergeColumns;
      const int64_t n = std::min(kMergeColumns, shape.n_columns - first);
      if (first_wave && p.begin) begin_columns(p, shape, first, n);
      for (int64_t split = 0; split < n_splits; ++split)
        merge_columns(context, p, shape, first, n, partial_of(split, first));
      if (last_wave && p.finish) finish_columns(p, shape, first, n);
    });
    wave += n_splits;
  } while (wave < splits.end);
}

}  // namespace

int64_t workspace_bytes(const CpuContext& context, const AttendAbsorbedParams& p) noexcept {
  Workspace counting;
  carve(counting, Shape(context, p));
  return counting.used_bytes();
}

// Which way is taken shows in the time only: a column's arithmetic is the same in both.
void attend_absorbed(const CpuContext& context, const OpContext& op,
                     const AttendAbsorbedParams& p) noexcept {
  const Shape shape(context, p);
  if (shape.n_columns == 0) return;
  Workspace workspace(op);
  const Scratch scratch = carve(workspace, shape);
  if (shape.n_blocks >= kTasksPerThread * shape.n_workers)
    attend_by_blocks(context, p, shape, scratch);
  else
    attend_by_waves(context, p, shape, scratch);
}

}  // namespace fathom::cpu
