// Absorbed attention on tensor cores (sm_80 and newer), over splits that are not wholly f16
// (attend_absorbed_f16.cu has those).  Queries, cached rows and weights of the softmax are rounded
// to bf16, sums are f32.
//
//   block      kTiles tiles of 16 columns, four warps each, over one split in steps of 64 rows
//   step       rows decoded once into shared memory, keys and values for all columns
//   scores     each warp 16 of the 64 rows          d[column][row]   = sum_k  q[column][k] row[k]
//   values     each warp a quarter of the rank      d[column][value] = sum_r  p[column][r] row[r]
#include "cuda/attend_tile.cuh"

namespace fathom::cuda {
namespace {

constexpr int kRows = 64;  // of a step
constexpr int kScoreStride = kRows + 4, kWeightStride = kRows + 8;

// Where things are in shared memory.  Rows of queries and keys shift by four banks.
struct Layout {
  int stride;  // of queries and keys, in values
  size_t keys, scores, weights, decay, pages, bytes;
  __host__ __device__ Layout(int key_dim, int n_tiles) {
    stride = key_dim + 8;
    keys = size_t(n_tiles) * kColumns * size_t(stride) * 2;
    scores = keys + size_t(kRows) * size_t(stride) * 2;
    weights = scores + size_t(n_tiles) * kColumns * kScoreStride * 4;
    decay = weights + size_t(n_tiles) * kColumns * kWeightStride * 2;
    pages = decay + size_t(n_tiles) * kColumns * 4;
    bytes = pages + kRows / kKvTileRows * sizeof(KvRow);
  }
};

__device__ void store8(uint16_t* to, const float (&v)[8]) {
  uint4 packed;
  packed.x = bf16_pair(v[0], v[1]);
  packed.y = bf16_pair(v[2], v[3]);
  packed.z = bf16_pair(v[4], v[5]);
  packed.w = bf16_pair(v[6], v[7]);
  *reinterpret_cast<uint4*>(to) = packed;
}

template <int kTiles>
__global__ void __launch_bounds__(kTiles * 128) partial_mma_kernel(PartialParams p) {
  const int rank = p.rows.rank, rope = p.rows.rope, key_dim = rank + rope;
  const Layout at(key_dim, kTiles);
  unsigned char* shared = shared_memory();
  auto* queries = reinterpret_cast<uint16_t*>(shared);
  auto* keys = reinterpret_cast<uint16_t*>(shared + at.keys);
  auto* scores = reinterpret_cast<float*>(shared + at.scores);
  auto* weights = reinterpret_cast<uint16_t*>(shared + at.weights);
  auto* decay = reinterpret_cast<float*>(shared + at.decay);
  auto* pages = reinterpret_cast<KvRow*>(shared + at.pages);

  const int thread = int(threadIdx.x), n_threads = kTiles * 128;
  const int lane = thread % 32, warp = thread / 32 % 4, tile = thread / 128;
  const int g = lane / 4, t = lane % 4;
  const AttendPiece piece = block_piece(p);
  const int64_t first_column = int64_t(blockIdx.y) * (kTiles * kColumns);
  const int split = int(blockIdx.x) - piece.first_split;
  const int64_t first_row = piece.first_row + int64_t(split) * kPartialRows;
  const int64_t end_row =
      first_row + kPartialRows < piece.end_row ? first_row + kPartialRows : piece.end_row;
  if (first_column >= piece.n_columns) return;                  // other texts have more
  if (is_f16_split(p.rows, piece, first_row, end_row)) return;  // the other kernel's

  const int groups = key_dim / 8;
  for (int i = thread; i < kTiles * kColumns * groups; i += n_threads) {
    const int64_t column = first_column + i / groups;
    const int c = i % groups * 8;
    float v[8] = {};
    if (column < piece.n_columns) {
      const float* q = query_at(p, piece, column, c);
      for (int k = 0; k < 8; ++k) v[k] = q[k] * p.scale;
    }
    store8(queries + (i / groups) * at.stride + c, v);
  }

  const int my_column = thread % 128 / 8, my_part = thread % 8;
  const int64_t my_global = first_column + tile * kColumns + my_column;
  const int64_t my_position = piece.first_position + my_global / p.n_heads;
  ColumnState state{minus_infinity(), 0};
  float out[kValueTiles][4] = {};
  const int warp_values = rank / 4;  // a multiple of 8

  for (int64_t row0 = first_row; row0 < end_row; row0 += kRows) {
    // A page holds whole groups of kKvTileRows rows.
    if (thread < kRows / int(kKvTileRows) && row0 + thread * kKvTileRows < end_row)
      pages[thread] = kv_row(p, piece, row0 + thread * kKvTileRows);
    __syncthreads();  // also: the last step's keys have been used
    for (int i = thread; i < kRows * groups; i += n_threads) {
      const int r = i / groups, group = i % groups;
      float v[8] = {};
      if (row0 + r < end_row) {
        const KvRow& page = pages[r / int(kKvTileRows)];
        const int in_page = r % int(kKvTileRows);
        const KvLayout layout{p.rows.page_tokens, rank, rope};
        if (group * 8 < rank)
          latent_values8(page.type, page.latent + in_page * layout.latent_row_bytes(page.type),
                         rank, group, v);
        else
          plain_values8(page.type, page.rope + in_page * layout.rope_row_bytes(page.type),
                        group - rank / 8, v);
      }
      store8(keys + r * at.stride + group * 8, v);
    }
    __syncthreads();

    float score[2][4] = {};
    for (int k = 0; k < key_dim; k += 16) {
      const uint16_t* q = queries + (tile * kColumns + g) * at.stride + k + 2 * t;
      const uint32_t a[4] = {pair_at(q), pair_at(q + 8 * at.stride), pair_at(q + 8),
                             pair_at(q + 8 * at.stride + 8)};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint16_t* key = keys + (warp * 16 + n * 8 + g) * at.stride + k + 2 * t;
        const uint32_t b[2] = {pair_at(key), pair_at(key + 8)};
        mma_bf16(score[n], a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
      for (int i = 0; i < 4; ++i)
        scores[(tile * kColumns + g + i / 2 * 8) * kScoreStride + warp * 16 + n * 8 + 2 * t +
               i % 2] = score[n][i];
    __syncthreads();

    const int column = tile * kColumns + my_column;
    const int64_t seen = (my_position + 1 < end_row ? my_position + 1 : end_row) - row0;
    const float keep = softmax_step<BF16Numbers, kRows>(
        scores + column * kScoreStride, seen, my_part, weights + column * kWeightStride, state);
    if (my_part == 0) decay[column] = keep;
    __syncthreads();
    add_rows<BF16Numbers, kRows>(weights + tile * kColumns * kWeightStride, kWeightStride,
                                 decay + tile * kColumns, keys + warp * warp_values, at.stride,
                                 warp_values, out);
  }

  store_split(p, piece, split, my_global, my_part == 0, state, first_column + tile * kColumns,
              warp * warp_values, warp_values, out);
}

template <int kTiles>
int launch_tiles(Stream stream, const PartialParams& p) {
  const dim3 grid{
      static_cast<unsigned>(p.n_splits),
      static_cast<unsigned>((p.most_columns + kTiles * kColumns - 1) / (kTiles * kColumns)), 1};
  return launch(partial_mma_kernel<kTiles>, grid, kTiles * 128,
                Layout(p.rows.rank + p.rows.rope, kTiles).bytes, stream, p);
}

}  // namespace

bool attend_partial_mma_fits(int64_t rank, int64_t rope) noexcept {
  return rank % 32 == 0 && rank <= kMaxRank && rope % 16 == 0 && rope <= 64;
}

int attend_partial_mma(Stream stream, const PartialParams& p) {
  if (p.n_splits == 0) return 0;
  const auto fits = [&](int n_tiles) {
    return p.most_columns > (n_tiles - 1) * kColumns &&
           static_cast<int64_t>(Layout(p.rows.rank + p.rows.rope, n_tiles).bytes) <=
               p.max_shared_bytes;
  };
  if (fits(4)) return launch_tiles<4>(stream, p);
  if (fits(2)) return launch_tiles<2>(stream, p);
  return launch_tiles<1>(stream, p);
}

}  // namespace fathom::cuda
