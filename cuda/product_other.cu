// Products by the other way through a matrix, dequantised panels, and the choice of the few-rows
// kernel.
#include "cuda/product_rows.cuh"

namespace fathom::cuda {
namespace {

// ---- out[i, c] = sum_r x[i, r] w[r, c] ----
//
// A thread has eight columns; the warps of a block share the rows among them, and their sums meet
// in shared memory.  Lanes read neighbouring codes of one row.
constexpr unsigned kTransposedThreads = 256;
constexpr int kTransposedRows = 4;  // rows of x at a time

__global__ void transposed_kernel(ProductParams p) {
  auto* sums = reinterpret_cast<float*>(shared_memory());  // [warps][rows][256 columns]
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int n_warps = int(blockDim.x / 32);
  const int64_t group8 = int64_t(blockIdx.x) * 32 + lane;
  const GroupRows group = group_rows(p);
  for (int64_t t = 0; t < p.n_rows; t += kTransposedRows) {
    const int n = int(p.n_rows - t < kTransposedRows ? p.n_rows - t : kTransposedRows);
    float sum[kTransposedRows][8] = {};
    if (group8 * 8 < p.w.cols)
      for (int64_t r = warp; r < p.w.rows; r += n_warps) {
        float w[8];
        dequantize8(p.w.dtype, weight_row(p.w, group.matrix, r), int(group8), w);
#pragma unroll
        for (int i = 0; i < kTransposedRows; ++i) {
          if (i >= n) continue;
          const float x = group.x[(t + i) * p.x_stride + r];
#pragma unroll
          for (int c = 0; c < 8; ++c) sum[i][c] += x * w[c];
        }
      }
#pragma unroll
    for (int i = 0; i < kTransposedRows; ++i)
      for (int c = 0; c < 8; ++c)
        sums[(warp * kTransposedRows + i) * 256 + lane * 8 + c] = sum[i][c];
    __syncthreads();
    for (int at = int(threadIdx.x); at < n * 256; at += int(blockDim.x)) {
      const int64_t column = int64_t(blockIdx.x) * 256 + at % 256;
      float total = 0;
      for (int w = 0; w < n_warps; ++w)
        total += sums[(w * kTransposedRows + at / 256) * 256 + at % 256];
      if (column < p.w.cols) group.out[(t + at / 256) * p.out_stride + column] = total;
    }
    __syncthreads();
  }
}

// ---- dequantised panels ----

__global__ void dequantize_kernel(DequantizeParams p) {
  const int64_t n_groups = (p.w.cols + 7) / 8;
  const int64_t total = p.n_matrices * p.n_rows * n_groups;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < total;
       at += int64_t(gridDim.x) * blockDim.x) {
    const int64_t group = at % n_groups, row = at / n_groups % p.n_rows;
    const int64_t matrix = at / n_groups / p.n_rows;
    float v[8];
    dequantize8(p.w.dtype, weight_row(p.w, p.first_matrix + matrix, p.first_row + row), int(group),
                v);
    const int64_t to = (matrix * p.n_rows + row) * p.w.cols + group * 8;
    for (int i = 0; i < 8; ++i) {
      if (group * 8 + i >= p.w.cols) break;
      if (p.bf16)
        static_cast<uint16_t*>(p.out)[to + i] = bf16_bits(v[i]);
      else
        static_cast<float*>(p.out)[to + i] = v[i];
    }
  }
}

}  // namespace

int product_few_rows(Stream stream, const ProductParams& p) {
  return p.n_rows == 0 ? 0 : product_rows_plain(stream, p);
}

int product_transposed(Stream stream, const ProductParams& p) {
  if (p.n_rows == 0) return 0;
  const dim3 grid{static_cast<unsigned>((p.w.cols + 255) / 256), static_cast<unsigned>(p.w.count),
                  1};
  return launch(transposed_kernel, grid, kTransposedThreads,
                kTransposedThreads / 32 * kTransposedRows * 256 * sizeof(float), stream, p);
}

int dequantize_rows(Stream stream, const DequantizeParams& p) {
  const int64_t groups = p.n_matrices * p.n_rows * ((p.w.cols + 7) / 8);
  if (groups == 0) return 0;
  const int64_t blocks = (groups + 255) / 256;
  return launch(dequantize_kernel, {static_cast<unsigned>(blocks < 65535 ? blocks : 65535), 1, 1},
                256, 0, stream, p);
}

}  // namespace fathom::cuda
