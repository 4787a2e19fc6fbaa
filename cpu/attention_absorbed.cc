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

struct WorkerScratch {
  float* tile;      // [kAttendTileRows][tile_stride]: latent, zeros to a full unit, rope
  float* queries;   // [key_dim][cols]
  float* scores;    // [kAttendTileRows][cols]
  float* decay;     // [cols]
  int32_t* limits;  // [cols]
  Partial partial;
};

// Everything that follows from the shapes.
struct Absorbed {
  int64_t latent, latent_padded, key_dim, stride;  // values of a tile's row
  int64_t n_columns, n_blocks;
  bool blocks_only;     // blocks alone are enough tasks
  int64_t wave_splits;  // splits of a wave, unless blocks_only
  int64_t n_workers;
  WorkerScratch first_worker;
  int64_t worker_bytes;
  Partial wave;  // [wave_splits][n_columns], unless blocks_only
  int64_t total_bytes;

  Absorbed(const CpuContext& context, const AttendAbsorbedParams& p, void* workspace) noexcept {
    latent = p.rows.layout.kv_lora_rank;
    latent_padded = round_up(latent, kRowUnit);
    key_dim = latent_padded + p.rows.layout.qk_rope_head_dim;
    stride = tile_stride(key_dim);
    n_columns = p.n_tokens * p.n_heads;
    n_blocks = (n_columns + kAttendMaxCols - 1) / kAttendMaxCols;
    n_workers = context.threads->size();
    blocks_only = n_blocks >= kTasksPerThread * n_workers;
    // Always the same room for partial results: more columns never need less than fewer.
    const int64_t wave_columns = kTasksPerThread * n_workers * kAttendMaxCols;
    wave_splits = blocks_only ? 0 : wave_columns / std::max<int64_t>(n_columns, 1);

    ScratchCarver worker(workspace);
    first_worker.tile = worker.take<float>(kAttendTileRows * stride);
    first_worker.queries = worker.take<float>(key_dim * kAttendMaxCols);
    first_worker.scores = worker.take<float>(kAttendTileRows * kAttendMaxCols);
    first_worker.decay = worker.take<float>(kAttendMaxCols);
    first_worker.limits = worker.take<int32_t>(kAttendMaxCols);
    first_worker.partial = take_partial(worker, kAttendMaxCols);
    worker_bytes = worker.used_bytes();

    std::byte* waves = workspace == nullptr
                           ? nullptr
                           : static_cast<std::byte*>(workspace) + n_workers * worker_bytes;
    ScratchCarver shared(waves);
    wave = take_partial(shared, wave_columns);
    total_bytes = n_workers * worker_bytes + shared.used_bytes();
  }

  Partial take_partial(ScratchCarver& carver, int64_t n) const noexcept {
    return {.max = carver.take<float>(n),
            .sum = carver.take<float>(n),
            .out = carver.take<float>(n * latent_padded)};
  }

  WorkerScratch worker_scratch(int worker) const noexcept {
    const int64_t offset = worker * worker_bytes;
    const auto moved = [&](auto* part) {
      return reinterpret_cast<decltype(part)>(reinterpret_cast<std::byte*>(part) + offset);
    };
    const WorkerScratch& w = first_worker;
    return {.tile = moved(w.tile),
            .queries = moved(w.queries),
            .scores = moved(w.scores),
            .decay = moved(w.decay),
            .limits = moved(w.limits),
            .partial = {moved(w.partial.max), moved(w.partial.sum), moved(w.partial.out)}};
  }
};

// A block of columns: [first, first + n), computed as n_padded whole vectors.
struct Block {
  int64_t first, n, n_padded;
};

// queries[k][col] = scale * query of the column; zeros as padding.
void gather_queries(const AttendAbsorbedParams& p, const Absorbed& shape, const Block& block,
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

// Attention of a block over rows [first_row, end_row) of one split, from an empty state.
void attend_split(const CpuContext& context, const AttendAbsorbedParams& p, const Absorbed& shape,
                  const WorkerScratch& scratch, const Block& block, int64_t first_row,
                  int64_t end_row, const Partial& partial) noexcept {
  std::fill_n(partial.max, block.n_padded, kLowest);
  std::fill_n(partial.sum, block.n_padded, 0.0f);
  std::fill_n(partial.out, block.n * shape.latent_padded, 0.0f);
  const int64_t first_token = block.first / p.n_heads;
  const int64_t last_token = (block.first + block.n - 1) / p.n_heads;
  const int64_t last_seen = p.first_position + last_token;
  for (int64_t row = first_row; row < std::min(end_row, last_seen + 1);) {
    const int64_t tile_end = std::min(end_row, (row / kAttendTileRows + 1) * kAttendTileRows);
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
void merge_columns(const CpuContext& context, const AttendAbsorbedParams& p, const Absorbed& shape,
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

void begin_columns(const AttendAbsorbedParams& p, const Absorbed& shape, int64_t first,
                   int64_t n) noexcept {
  std::fill_n(p.state.max + first, n, kLowest);
  std::fill_n(p.state.sum + first, n, 0.0f);
  std::fill_n(p.out + first * shape.latent, n * shape.latent, 0.0f);
}

void finish_columns(const AttendAbsorbedParams& p, const Absorbed& shape, int64_t first,
                    int64_t n) noexcept {
  for (int64_t col = first; col < first + n; ++col) {
    const float sum = p.state.sum[col];
    const float factor = sum == 0 ? 0.0f : 1 / sum;
    float* out = p.out + col * shape.latent;
    for (int64_t i = 0; i < shape.latent; ++i) out[i] *= factor;
  }
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

}  // namespace

int64_t workspace_bytes(const CpuContext& context, const AttendAbsorbedParams& p) noexcept {
  return Absorbed(context, p, nullptr).total_bytes;
}

void attend_absorbed(const CpuContext& context, const OpContext& op,
                     const AttendAbsorbedParams& p) noexcept {
  const Absorbed shape(context, p, op.workspace);
  if (shape.n_columns == 0) return;
  const int lanes = context.rows->lanes;
  const int64_t first_split = p.rows.first_row / kKvSplitRows;
  const int64_t end_split =
      std::max(first_split, (visible_end(p) + kKvSplitRows - 1) / kKvSplitRows);

  const auto make_block = [&](int64_t first, int64_t n_cols) -> Block {
    const int64_t n = std::min(n_cols, shape.n_columns - first);
    return {first, n, round_up(n, lanes)};
  };

  if (shape.blocks_only) {
    context.threads->parallel_for(shape.n_blocks, [&](int64_t task, int worker) {
      const WorkerScratch scratch = shape.worker_scratch(worker);
      const Block block = make_block(task * kAttendMaxCols, kAttendMaxCols);
      if (p.begin) begin_columns(p, shape, block.first, block.n);
      clear_columns(scratch.tile, shape.stride, kAttendTileRows, shape.latent, shape.latent_padded);
      gather_queries(p, shape, block, scratch.queries);
      for (int64_t split = first_split; split < end_split; ++split) {
        const SplitRows rows = split_rows(p, split);
        attend_split(context, p, shape, scratch, block, rows.first, rows.end, scratch.partial);
        merge_columns(context, p, shape, block.first, block.n, scratch.partial);
      }
      if (p.finish) finish_columns(p, shape, block.first, block.n);
    });
    return;
  }

  // Few splits: narrower blocks, down to half a vector, so that more threads have work.  Scores of
  // the unused lanes cost nothing extra then, and values are summed for real columns only.
  const int64_t wave_splits =
      std::min(shape.wave_splits, std::max<int64_t>(end_split - first_split, 1));
  const int64_t wanted_blocks = (shape.n_workers + wave_splits - 1) / wave_splits;
  const int64_t narrowest = std::max<int64_t>(lanes / 2, 1);
  const int64_t block_cols =
      std::clamp(round_up((shape.n_columns + wanted_blocks - 1) / wanted_blocks, narrowest),
                 narrowest, int64_t{kAttendMaxCols});
  const int64_t n_blocks = (shape.n_columns + block_cols - 1) / block_cols;
  const int64_t n_merges = (shape.n_columns + kMergeColumns - 1) / kMergeColumns;

  for (int64_t wave = first_split; wave < end_split || wave == first_split; wave += wave_splits) {
    const int64_t n_splits = std::min(wave_splits, end_split - wave);
    const auto partial_of = [&](int64_t split, int64_t col) -> Partial {
      const int64_t index = (split - wave) * shape.n_columns + col;
      return {shape.wave.max + index, shape.wave.sum + index,
              shape.wave.out + index * shape.latent_padded};
    };
    context.threads->parallel_for(n_splits * n_blocks, [&](int64_t task, int worker) {
      const WorkerScratch scratch = shape.worker_scratch(worker);
      const int64_t split = wave + task / n_blocks;
      const Block block = make_block(task % n_blocks * block_cols, block_cols);
      clear_columns(scratch.tile, shape.stride, kAttendTileRows, shape.latent, shape.latent_padded);
      gather_queries(p, shape, block, scratch.queries);
      const SplitRows rows = split_rows(p, split);
      const Partial partial = partial_of(split, block.first);
      // Maximum and sum of padding columns stay behind.
      attend_split(context, p, shape, scratch, block, rows.first, rows.end,
                   {scratch.partial.max, scratch.partial.sum, partial.out});
      std::copy_n(scratch.partial.max, block.n, partial.max);
      std::copy_n(scratch.partial.sum, block.n, partial.sum);
    });
    const bool first_wave = wave == first_split, last_wave = wave + wave_splits >= end_split;
    context.threads->parallel_for(n_merges, [&](int64_t task, int) {
      const int64_t first = task * kMergeColumns;
      const int64_t n = std::min(kMergeColumns, shape.n_columns - first);
      if (first_wave && p.begin) begin_columns(p, shape, first, n);
      for (int64_t split = wave; split < wave + n_splits; ++split)
        merge_columns(context, p, shape, first, n, partial_of(split, first));
      if (last_wave && p.finish) finish_columns(p, shape, first, n);
    });
  }
}

}  // namespace fathom::cpu
