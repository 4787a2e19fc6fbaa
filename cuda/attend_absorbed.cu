// Absorbed attention: columns are (token, head) pairs in latent space, keys and values the cached
// rows themselves.  A block attends kPartialRows rows by itself; attend_merge puts the partial
// results of a column together in the order of the rows (log-sum-exp), so neither pages nor calls
// nor the number of multiprocessors change a bit.  Nor do other texts of a launch.
//
// Here: the exact form in f32, and the merge.  attend_absorbed_mma.cu: tensor cores.
#include "cuda/kv_rows.cuh"

namespace fathom::cuda {
namespace {

// ---- exact: scores of all rows, then the weighted sum ----

constexpr unsigned kThreads = 256;
constexpr int kMaxColumns = 8;  // of a block, if their queries fit
constexpr int64_t kQueryBytes = 64 << 10;

struct ExactArgs {
  PartialParams p;
  int32_t block_columns;
};

// Shared: queries [columns][rank + rope], scores [columns][kPartialRows].
__global__ void partial_exact_kernel(ExactArgs args) {
  const PartialParams& p = args.p;
  const int rank = p.rows.rank, rope = p.rows.rope, key_dim = rank + rope;
  const AttendPiece piece = block_piece(p);
  const int first_column = int(blockIdx.y) * args.block_columns;
  const int n = piece.n_columns - first_column < args.block_columns ? piece.n_columns - first_column
                                                                    : args.block_columns;
  if (n <= 0) return;  // other texts have more columns
  auto* queries = reinterpret_cast<float*>(shared_memory());
  float* scores = queries + args.block_columns * key_dim;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int n_warps = int(blockDim.x / 32);
  const int split = int(blockIdx.x) - piece.first_split;
  const int64_t first_row = piece.first_row + int64_t(split) * kPartialRows;
  const int n_rows =
      int(piece.end_row - first_row < kPartialRows ? piece.end_row - first_row : kPartialRows);

  for (int at = int(threadIdx.x); at < n * key_dim; at += int(blockDim.x)) {
    const int64_t column = first_column + at / key_dim;
    const int64_t token = column / p.n_heads, head = column % p.n_heads;
    const int c = at % key_dim;
    const float q =
        c < rank
            ? piece.q_latent[token * p.q_latent_token_stride + head * p.q_latent_head_stride + c]
            : piece.q_rope[token * p.q_rope_token_stride + head * p.q_rope_head_stride + c - rank];
    queries[at] = q * p.scale;
  }
  __syncthreads();

  for (int r = warp; r < n_rows; r += n_warps) {
    const KvRow row = kv_row(p, piece, first_row + r);
    float sum[kMaxColumns] = {};
    for (int c = lane; c < key_dim; c += 32) {
      const float v = c < rank ? latent_value(row.type, row.latent, rank, c)
                               : plain_value(row.type, row.rope, c - rank);
#pragma unroll
      for (int i = 0; i < kMaxColumns; ++i)
        if (i < n) sum[i] += v * queries[i * key_dim + c];
    }
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i) {
      if (i >= n) continue;
      const float score = warp_sum(sum[i]);
      const bool seen = first_row + r <= piece.first_position + (first_column + i) / p.n_heads;
      if (lane == 0) scores[i * kPartialRows + r] = seen ? score : minus_infinity();
    }
  }
  __syncthreads();

  const int64_t part = piece.first_part + int64_t(split) * piece.n_columns + first_column;
  for (int i = warp; i < n; i += n_warps) {
    float most = minus_infinity(), sum = 0;
    for (int r = lane; r < n_rows; r += 32) most = fmaxf(most, scores[i * kPartialRows + r]);
    most = warp_max(most);
    for (int r = lane; r < n_rows; r += 32) {
      float& score = scores[i * kPartialRows + r];
      score = most == minus_infinity() ? 0.0f : expf(score - most);
      sum += score;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      p.max[part + i] = most;
      p.sum[part + i] = sum;
    }
  }
  __syncthreads();

  for (int c = int(threadIdx.x); c < rank; c += int(blockDim.x)) {
    float sum[kMaxColumns] = {};
    for (int r = 0; r < n_rows; ++r) {
      const KvRow row = kv_row(p, piece, first_row + r);
      const float v = latent_value(row.type, row.latent, rank, c);
#pragma unroll
      for (int i = 0; i < kMaxColumns; ++i)
        if (i < n) sum[i] += v * scores[i * kPartialRows + r];
    }
#pragma unroll
    for (int i = 0; i < kMaxColumns; ++i)
      if (i < n) p.out[(part + i) * rank + c] = sum[i];
  }
}

// ---- merge: blocks of one column and 128 values ----

constexpr unsigned kMergeThreads = 128;

__global__ void merge_kernel(MergeParams p) {
  const MergePiece piece = p.pieces[blockIdx.z];
  const auto column = int(blockIdx.x);
  if (column >= piece.n_columns) return;
  const int64_t c = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  float* out = piece.out + column * p.rank + c;
  float most = piece.begin ? minus_infinity() : piece.max[column];
  float sum = piece.begin ? 0.0f : piece.sum[column];
  float value = piece.begin || c >= p.rank ? 0.0f : *out;
  for (int split = 0; split < piece.n_splits; ++split) {
    const int64_t part = piece.first_part + int64_t(split) * piece.n_columns + column;
    const float part_most = p.part_max[part];
    if (part_most == minus_infinity()) continue;  // no row of it is seen
    const float top = fmaxf(most, part_most);
    const float keep = most == minus_infinity() ? 0.0f : expf(most - top);
    const float take = expf(part_most - top);
    most = top;
    sum = sum * keep + p.part_sum[part] * take;
    if (c < p.rank) value = value * keep + p.part_out[part * p.rank + c] * take;
  }
  if (piece.finish) value = sum == 0 ? 0.0f : value * (1 / sum);
  if (c < p.rank) *out = value;
}

// After all blocks of merge_kernel have read the old state.
__global__ void merge_state_kernel(MergeParams p) {
  const MergePiece piece = p.pieces[blockIdx.z];
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= piece.n_columns) return;
  float most = piece.begin ? minus_infinity() : piece.max[column];
  float sum = piece.begin ? 0.0f : piece.sum[column];
  for (int split = 0; split < piece.n_splits; ++split) {
    const int64_t part = piece.first_part + int64_t(split) * piece.n_columns + column;
    const float part_most = p.part_max[part];
    if (part_most == minus_infinity()) continue;
    const float top = fmaxf(most, part_most);
    sum = sum * (most == minus_infinity() ? 0.0f : expf(most - top)) +
          p.part_sum[part] * expf(part_most - top);
    most = top;
  }
  piece.max[column] = most;
  piece.sum[column] = sum;
}

}  // namespace

int attend_partial_exact(Stream stream, const PartialParams& p) {
  if (p.n_splits == 0) return 0;
  const int64_t column_bytes = (p.rows.rank + p.rows.rope + kPartialRows) * 4;
  int64_t columns = kQueryBytes / column_bytes;
  columns = columns < 1 ? 1 : columns < kMaxColumns ? columns : kMaxColumns;
  const dim3 grid{static_cast<unsigned>(p.n_splits),
                  static_cast<unsigned>((p.most_columns + columns - 1) / columns), 1};
  return launch(partial_exact_kernel, grid, kThreads, static_cast<size_t>(columns * column_bytes),
                stream, ExactArgs{p, static_cast<int32_t>(columns)});
}

int attend_merge(Stream stream, const MergeParams& p) {
  if (p.n_pieces == 0) return 0;
  const auto pieces = static_cast<unsigned>(p.n_pieces);
  const dim3 grid{static_cast<unsigned>(p.most_columns),
                  static_cast<unsigned>((p.rank + kMergeThreads - 1) / kMergeThreads), pieces};
  if (int e = launch(merge_kernel, grid, kMergeThreads, 0, stream, p)) return e;
  const auto blocks = static_cast<unsigned>((p.most_columns + kMergeThreads - 1) / kMergeThreads);
  return launch(merge_state_kernel, {blocks, 1, pieces}, kMergeThreads, 0, stream, p);
}

}  // namespace fathom::cuda
