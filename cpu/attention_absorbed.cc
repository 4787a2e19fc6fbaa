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

#include "cpu/absorbed_tiles.h"
#include "cpu/attention.h"
#include "cpu/pair_kernels.h"

namespace fathom::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// From this many blocks per thread on, blocks alone keep the threads evenly busy; below, a wave of
// splits makes up for them.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMergeColumns = 4;  // columns of a merge task

int64_t block_count(const AbsorbedShape& shape) noexcept {
  return (shape.n_columns + kAttendMaxCols - 1) / kAttendMaxCols;
}
// Room for partial results, always the same: more columns never need less than fewer.
int64_t wave_columns(const AbsorbedShape& shape) noexcept {
  return kTasksPerThread * shape.n_workers * kAttendMaxCols;
}

// The whole workspace: a part for each worker, and the partial results of a wave.
struct Scratch {
  WorkerParts workers;
  AbsorbedPartial wave;  // [splits of the wave][n_columns]
};

Scratch carve(Workspace& workspace, const CpuContext& context,
              const AbsorbedShape& shape) noexcept {
  Workspace counting;
  carve_absorbed(counting, context, shape);
  const int64_t columns = wave_columns(shape);
  return {.workers = WorkerParts(workspace, shape.n_workers, counting.used_bytes()),
          .wave = {.max = workspace.take<float>(columns),
                   .sum = workspace.take<float>(columns),
                   .out = workspace.take<float>(columns * shape.latent_padded)}};
}

AbsorbedScratch worker_scratch(const CpuContext& context, const AbsorbedShape& shape,
                               const Scratch& scratch, int worker) noexcept {
  Workspace part = scratch.workers.part(worker);
  return carve_absorbed(part, context, shape);
}

// One past the last row that any query of this call sees.
int64_t visible_end(const AttendAbsorbedParams& p) noexcept {
  return std::min(p.rows.first_row + p.rows.n_rows, p.first_position + p.n_tokens);
}

// Rows of split number `split` that this call has and any query sees.
SplitRows split_rows(const AttendAbsorbedParams& p, int64_t split) noexcept {
  const int64_t first = split * kKvSplitRows;
  return {std::max(first, p.rows.first_row), std::min(first + kKvSplitRows, visible_end(p))};
}

// Merges what a partial says of columns [first, first + n) into the running state.
void merge_columns(const CpuContext& context, const AttendAbsorbedParams& p,
                   const AbsorbedShape& shape, int64_t first, int64_t n,
                   const AbsorbedPartial& partial) noexcept {
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

void begin_columns(const AttendAbsorbedParams& p, const AbsorbedShape& shape, int64_t first,
                   int64_t n) noexcept {
  std::fill_n(p.state.max + first, n, kLowest);
  std::fill_n(p.state.sum + first, n, 0.0f);
  std::fill_n(p.out + first * shape.latent, n * shape.latent, 0.0f);
}

void finish_columns(const float* sums, float* outs, int64_t latent, int64_t first,
                    int64_t n) noexcept {
  for (int64_t col = first; col < first + n; ++col) {
    const float factor = sums[col] == 0 ? 0.0f : 1 / sums[col];
    float* out = outs + col * latent;
    for (int64_t i = 0; i < latent; ++i) out[i] *= factor;
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

// Columns of a block come in multiples of it.
int64_t lanes(const CpuContext& context) noexcept {
  return context.pairs != nullptr ? kPairUnit : context.rows->lanes;
}

AbsorbedBlock make_block(const CpuContext& context, const AbsorbedShape& shape, int64_t first,
                         int64_t n_cols) noexcept {
  const int64_t n = std::min(n_cols, shape.n_columns - first);
  return {first, n, round_up(n, lanes(context))};
}

// Many columns: a task takes a block through all splits.
void attend_by_blocks(const CpuContext& context, const AttendAbsorbedParams& p,
                      const AbsorbedShape& shape, const Scratch& scratch) noexcept {
  const SplitRange splits = visible_splits(p);
  context.threads->parallel_for(block_count(shape), [&](int64_t task, int worker) {
    const AbsorbedScratch mine = worker_scratch(context, shape, scratch, worker);
    const AbsorbedBlock block = make_block(context, shape, task * kAttendMaxCols, kAttendMaxCols);
    if (p.begin) begin_columns(p, shape, block.first, block.n);
    gather_absorbed(context, p, shape, mine, block);
    for (int64_t split = splits.first; split < splits.end; ++split) {
      attend_split(context, p, shape, mine, block, split_rows(p, split), mine.partial);
      merge_columns(context, p, shape, block.first, block.n, mine.partial);
    }
    if (p.finish) finish_columns(p.state.sum, p.out, shape.latent, block.first, block.n);
  });
}

// Few columns: waves of splits in parallel, merged after each wave.
void attend_by_waves(const CpuContext& context, const AttendAbsorbedParams& p,
                     const AbsorbedShape& shape, const Scratch& scratch) noexcept {
  const SplitRange splits = visible_splits(p);
  const int64_t wave_splits = std::clamp<int64_t>(
      splits.end - splits.first, 1, std::max<int64_t>(wave_columns(shape) / shape.n_columns, 1));
  // Few splits, too: narrower blocks, down to half a vector, so that more threads have work.  The
  // scores of unused lanes cost the same, but values are summed for real columns only.
  const int64_t wanted_blocks = (shape.n_workers + wave_splits - 1) / wave_splits;
  const int64_t narrowest = std::max<int64_t>(lanes(context) / 2, 1);
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
    const auto partial_of = [&](int64_t split, int64_t col) -> AbsorbedPartial {
      const int64_t index = split * shape.n_columns + col;
      return {scratch.wave.max + index, scratch.wave.sum + index,
              scratch.wave.out + index * shape.latent_padded};
    };
    context.threads->parallel_for(n_splits * n_blocks, [&](int64_t task, int worker) {
      const AbsorbedScratch mine = worker_scratch(context, shape, scratch, worker);
      const int64_t split = task / n_blocks;
      const AbsorbedBlock block =
          make_block(context, shape, task % n_blocks * block_cols, block_cols);
      gather_absorbed(context, p, shape, mine, block);
      const AbsorbedPartial partial = partial_of(split, block.first);
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
      if (last_wave && p.finish) finish_columns(p.state.sum, p.out, shape.latent, first, n);
    });
    wave += n_splits;
  } while (wave < splits.end);
}

}  // namespace

int64_t workspace_bytes(const CpuContext& context, const AttendAbsorbedParams& p) noexcept {
  Workspace counting;
  carve(counting, context, AbsorbedShape(context, p));
  return counting.used_bytes();
}

// Which way is taken shows in the time only: a column's arithmetic is the same in both.
void attend_absorbed(const CpuContext& context, const OpContext& op,
                     const AttendAbsorbedParams& p) noexcept {
  const AbsorbedShape shape(context, p);
  if (shape.n_columns == 0) return;
  Workspace workspace(op);
  const Scratch scratch = carve(workspace, context, shape);
  for (int worker = 0; worker < shape.n_workers; ++worker)
    begin_absorbed(context, shape, worker_scratch(context, shape, scratch, worker));
  if (block_count(shape) >= kTasksPerThread * shape.n_workers)
    attend_by_blocks(context, p, shape, scratch);
  else
    attend_by_waves(context, p, shape, scratch);
}

void merge_attention(const CpuContext& context, const MergeAttentionParams& p) noexcept {
  const int64_t n_columns = p.n_tokens * p.n_heads, latent = p.kv_lora_rank;
  const int64_t n_tasks = (n_columns + kMergeColumns - 1) / kMergeColumns;
  context.threads->parallel_for(n_tasks, [&](int64_t task, int) {
    const int64_t first = task * kMergeColumns, n = std::min(kMergeColumns, n_columns - first);
    context.rows->merge({.n_cols = n,
                         .n_values = latent,
                         .max = p.state.max + first,
                         .sum = p.state.sum + first,
                         .out = p.out + first * latent,
                         .out_stride = latent,
                         .part_max = p.part.max + first,
                         .part_sum = p.part.sum + first,
                         .part_out = p.part_out + first * latent,
                         .part_stride = latent});
    if (p.finish) finish_columns(p.state.sum, p.out, latent, first, n);
  });
}

}  // namespace fathom::cpu
