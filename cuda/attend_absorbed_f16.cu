// Absorbed attention over f16 pages on tensor cores: rows go from the cache into shared memory as
// they lie, by copies that run beside the arithmetic, and are keys and values there without being
// converted.  Queries and weights of the softmax are rounded to f16, sums are f32.
//
//   block    kTiles tiles of 16 columns, four warps each, over one split in steps of 32 rows
//   step     the next rows are on their way while these are used: two stages
//   scores   each warp 8 of the 32 rows             d[column][row]   = sum_k  q[column][k] row[k]
//   values   each warp a quarter of the rank        d[column][value] = sum_r  p[column][r] row[r]
//
// A stage of latent 512 + rope 64 is 37 KB and two blocks of 16 columns share a multiprocessor, so
// that some 75 KB are under way: more than bandwidth times latency of an H100 asks for (15 KB).
#include "cuda/attend_tile.cuh"

namespace fathom::cuda {
namespace {

constexpr int kRows = 32;  // of a step
constexpr int kScoreStride = kRows + 4, kWeightStride = kRows + 8;
constexpr int kPieces = int(kPartialRows / kKvTileRows);  // of a split, each in one page

struct Layout {
  int stride;  // of queries and keys, in values: rows shift by four banks
  size_t keys, stage, scores, weights, decay, pieces, bytes;
  __host__ __device__ Layout(int key_dim, int n_tiles) {
    stride = key_dim + 8;
    keys = size_t(n_tiles) * kColumns * size_t(stride) * 2;
    stage = size_t(kRows) * size_t(stride) * 2;
    scores = keys + 2 * stage;
    weights = scores + size_t(n_tiles) * kColumns * kScoreStride * 4;
    decay = weights + size_t(n_tiles) * kColumns * kWeightStride * 2;
    pieces = decay + size_t(n_tiles) * kColumns * 4;
    bytes = pieces + kPieces * sizeof(KvRow);
  }
};

// Beyond what f16 holds: its largest value.
__device__ uint16_t f16_within(float v) {
  return f16_bits(v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v);
}

template <int kTiles>
__global__ void __launch_bounds__(kTiles * 128) partial_f16_kernel(PartialParams p) {
  const int rank = p.rows.rank, rope = p.rows.rope, key_dim = rank + rope, groups = key_dim / 8;
  const Layout at(key_dim, kTiles);
  unsigned char* shared = shared_memory();
  auto* queries = reinterpret_cast<uint16_t*>(shared);
  auto* scores = reinterpret_cast<float*>(shared + at.scores);
  auto* weights = reinterpret_cast<uint16_t*>(shared + at.weights);
  auto* decay = reinterpret_cast<float*>(shared + at.decay);
  auto* pieces = reinterpret_cast<KvRow*>(shared + at.pieces);

  const int thread = int(threadIdx.x), n_threads = kTiles * 128;
  const int lane = thread % 32, warp = thread / 32 % 4, tile = thread / 128;
  const int g = lane / 4, t = lane % 4;
  const AttendPiece piece = block_piece(p);
  const int64_t first_column = int64_t(blockIdx.y) * (kTiles * kColumns);
  const int split = int(blockIdx.x) - piece.first_split;
  const int64_t first_row = piece.first_row + int64_t(split) * kPartialRows;
  const int64_t end_row =
      first_row + kPartialRows < piece.end_row ? first_row + kPartialRows : piece.end_row;
  if (first_column >= piece.n_columns) return;                   // other texts have more
  if (!is_f16_split(p.rows, piece, first_row, end_row)) return;  // the other kernel's

  if (thread < kPieces && first_row + thread * kKvTileRows < end_row)
    pieces[thread] = kv_row(p, piece, first_row + thread * kKvTileRows);
  for (int i = thread; i < kTiles * kColumns * groups; i += n_threads) {
    const int64_t column = first_column + i / groups;
    const int c = i % groups * 8;
    uint16_t* to = queries + (i / groups) * at.stride + c;
    const float* q = query_at(p, piece, column, c);
    for (int k = 0; k < 8; ++k) to[k] = column < piece.n_columns ? f16_within(q[k] * p.scale) : 0;
  }
  __syncthreads();

  const auto stage_at = [&](int stage) {
    return reinterpret_cast<uint16_t*>(shared + at.keys + size_t(stage) * at.stage);
  };
  const auto load = [&](int64_t row0, int stage) {
    uint16_t* keys = stage_at(stage);
    for (int i = thread; i < kRows * groups; i += n_threads) {
      const int r = i / groups, group = i % groups;
      uint16_t* to = keys + r * at.stride + group * 8;
      if (row0 + r >= end_row) {
        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
        continue;
      }
      const auto row = int(row0 - first_row) + r;
      const KvRow& piece = pieces[row / int(kKvTileRows)];
      const int in_piece = row % int(kKvTileRows);
      copy_async16(to, group * 8 < rank ? piece.latent + (in_piece * rank + group * 8) * 2
                                        : piece.rope + (in_piece * rope + group * 8 - rank) * 2);
    }
    commit_copies();
  };

  const int my_column = thread % 128 / 8, my_part = thread % 8;
  const int64_t my_global = first_column + tile * kColumns + my_column;
  const int64_t my_position = piece.first_position + my_global / p.n_heads;
  ColumnState state{minus_infinity(), 0};
  float out[kValueTiles][4] = {};
  const int warp_values = rank / 4;  // a multiple of 8

  load(first_row, 0);
  int stage = 0;
  for (int64_t row0 = first_row; row0 < end_row; row0 += kRows, stage ^= 1) {
    if (row0 + kRows < end_row) {
      load(row0 + kRows, stage ^ 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const uint16_t* keys = stage_at(stage);

    float score[4] = {};
    for (int k = 0; k < key_dim; k += 16) {
      const uint16_t* q = queries + (tile * kColumns + g) * at.stride + k + 2 * t;
      const uint32_t a[4] = {pair_at(q), pair_at(q + 8 * at.stride), pair_at(q + 8),
                             pair_at(q + 8 * at.stride + 8)};
      const uint16_t* key = keys + (warp * 8 + g) * at.stride + k + 2 * t;
      const uint32_t b[2] = {pair_at(key), pair_at(key + 8)};
      mma_f16(score, a, b);
    }
    for (int i = 0; i < 4; ++i)
      scores[(tile * kColumns + g + i / 2 * 8) * kScoreStride + warp * 8 + 2 * t + i % 2] =
          score[i];
    __syncthreads();

    const int column = tile * kColumns + my_column;
    const int64_t seen = (my_position + 1 < end_row ? my_position + 1 : end_row) - row0;
    const float keep = softmax_step<F16Numbers, kRows>(
        scores + column * kScoreStride, seen, my_part, weights + column * kWeightStride, state);
    if (my_part == 0) decay[column] = keep;
    __syncthreads();
    add_rows<F16Numbers, kRows>(weights + tile * kColumns * kWeightStride, kWeightStride,
                                decay + tile * kColumns, keys + warp * warp_values, at.stride,
                                warp_values, out);
    __syncthreads();  // the stage may be filled again
  }

  store_split(p, piece, split, my_global, my_part == 0, state, first_column + tile * kColumns,
              warp * warp_values, warp_values, out);
}

template <int kTiles>
int launch_f16_tiles(Stream stream, const PartialParams& p) {
  const dim3 grid{
      static_cast<unsigned>(p.n_splits),
      static_cast<unsigned>((p.most_columns + kTiles * kColumns - 1) / (kTiles * kColumns)), 1};
  return launch(partial_f16_kernel<kTiles>, grid, kTiles * 128,
                Layout(p.rows.rank + p.rows.rope, kTiles).bytes, stream, p);
}

}  // namespace

int attend_partial_f16(Stream stream, const PartialParams& p) {
  if (p.n_splits == 0) return 0;
  const auto fits = [&](int n_tiles) {
    return p.most_columns > (n_tiles - 1) * kColumns &&
           static_cast<int64_t>(Layout(p.rows.rank + p.rows.rope, n_tiles).bytes) <=
               p.max_shared_bytes;
  };
  if (fits(4)) return launch_f16_tiles<4>(stream, p);
  if (fits(2)) return launch_f16_tiles<2>(stream, p);
  return launch_f16_tiles<1>(stream, p);
}

}  // namespace fathom::cuda
