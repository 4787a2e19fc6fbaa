// Products with tensor cores, for chunks too large for product_rows and too small, or too scattered
// over experts, for a library's product: weights are dequantised tile by tile into shared memory.
//
//   block   64 rows of weights (in pairs: 32 of gate and the same 32 of up) x 64 rows of x
//   step    64 columns: both tiles as bf16 in shared memory; each warp multiplies 16 weight rows
//           with all rows of x, so d[weight row][x row] = sum over k
#include "cuda/product_groups.cuh"

namespace fathom::cuda {
namespace {

constexpr int kTile = 64;  // rows of weights, rows of x, columns of a step
constexpr int kStride =
    72;  // of the tiles: rows shift by 4 banks, fragments load without conflicts
constexpr unsigned kThreads = 128;

struct Tiles {
  uint16_t w[kTile][kStride];
  uint16_t x[kTile][kStride];
};
// After the sums: out[x row][weight row], over the same memory.
constexpr int kOutStride = kTile + 1;
constexpr size_t kSharedBytes = sizeof(Tiles) > kTile* kOutStride * 4 ? sizeof(Tiles)
                                                                      : kTile* kOutStride * 4;

__device__ void store_pairs(uint16_t* to, const float (&v)[8]) {
  uint4 packed;
  packed.x = bf16_pair(v[0], v[1]);
  packed.y = bf16_pair(v[2], v[3]);
  packed.z = bf16_pair(v[4], v[5]);
  packed.w = bf16_pair(v[6], v[7]);
  *reinterpret_cast<uint4*>(to) = packed;
}

__global__ void __launch_bounds__(kThreads) product_tiles_kernel(ProductParams p) {
  auto& tiles = *reinterpret_cast<Tiles*>(shared_memory());
  const GroupRows group = group_rows(p);
  const bool pairs = p.up.data != nullptr;
  const int64_t first_row = int64_t(blockIdx.x) * (pairs ? kTile / 2 : kTile);
  const int64_t first_x = int64_t(blockIdx.z) * kTile;
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32), g = lane / 4, t = lane % 4;

  // Rows of x that this launch cannot provide a block for are taken in turns.
  for (int64_t x0 = first_x; x0 < group.n_rows; x0 += int64_t(gridDim.z) * kTile) {
    const int64_t n_x = group.n_rows - x0 < kTile ? group.n_rows - x0 : kTile;
    float sum[kTile / 8][4] = {};
    for (int64_t k0 = 0; k0 < p.w.cols; k0 += kTile) {
      for (int at = int(threadIdx.x); at < kTile * 8; at += int(kThreads)) {
        const int i = at / 8, column = at % 8 * 8;
        const int64_t k = k0 + column;
        float v[8] = {};
        const int64_t row = first_row + (pairs ? i % (kTile / 2) : i);
        if (row < p.w.rows && k < p.w.cols)
          dequantize8(p.w.dtype,
                      weight_row(pairs && i >= kTile / 2 ? p.up : p.w, group.matrix, row),
                      int(k / 8), v);
        store_pairs(&tiles.w[i][column], v);
        for (int c = 0; c < 8; ++c) v[c] = 0;
        if (i < n_x) {
          const float* x = group_x(p, group, x0 + i);
          for (int c = 0; c < 8; ++c)
            if (k + c < p.w.cols) v[c] = x[k + c];
        }
        store_pairs(&tiles.x[i][column], v);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kTile; k += 16) {
        const uint16_t* row = &tiles.w[warp * 16 + g][k + 2 * t];
        const auto pair = [](const uint16_t* at) { return *reinterpret_cast<const uint32_t*>(at); };
        const uint32_t a[4] = {pair(row), pair(row + 8 * kStride), pair(row + 8),
                               pair(row + 8 * kStride + 8)};
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
          if (n * 8 >= n_x) continue;
          const uint16_t* column = &tiles.x[n * 8 + g][k + 2 * t];
          const uint32_t b[2] = {pair(column), pair(column + 8)};
          mma_bf16(sum[n], a, b);
        }
      }
      __syncthreads();
    }
    auto* out_tile = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n)
      for (int i = 0; i < 4; ++i)
        out_tile[(n * 8 + 2 * t + i % 2) * kOutStride + warp * 16 + g + i / 2 * 8] = sum[n][i];
    __syncthreads();
    const int width = pairs ? kTile / 2 : kTile;
    for (int at = int(threadIdx.x); at < n_x * width; at += int(kThreads)) {
      const int i = at / width, r = at % width;
      if (first_row + r >= p.w.rows) continue;
      const float* v = out_tile + i * kOutStride + r;
      float& out = group.out[(group.first + x0 + i) * p.out_stride + first_row + r];
      if (pairs)
        out = silu(v[0]) * v[kTile / 2];
      else
        out = p.add ? out + v[0] : v[0];
    }
    __syncthreads();
  }
}

}  // namespace

int product_tiles(Stream stream, const ProductParams& p) {
  if (p.n_rows == 0) return 0;
  const int64_t rows_per_block = p.up.data != nullptr ? kTile / 2 : kTile;
  const int64_t groups = group_count(p);
  // Groups are of unknown size: blocks for twice the average, the rest in turns.
  const int64_t rows = p.groups.active == nullptr ? p.n_rows : 2 * p.n_rows / groups;
  const int64_t x_blocks = (rows + kTile - 1) / kTile;
  const dim3 grid{static_cast<unsigned>((p.w.rows + rows_per_block - 1) / rows_per_block),
                  static_cast<unsigned>(groups),
                  static_cast<unsigned>(x_blocks < 1      ? 1
                                        : x_blocks < 1024 ? x_blocks
                                                          : 1024)};
  return launch(product_tiles_kernel, grid, kThreads, kSharedBytes, stream, p);
}

}  // namespace fathom::cuda
