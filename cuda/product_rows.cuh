// Products for few rows of x: a warp takes four rows of weights, its lanes eight columns each, and
// every weight is read once for up to eight rows of x.  Memory bound: codes are read in 8-byte
// words by neighbouring lanes, x comes from the first-level cache once for four rows of weights.
//
// One .cu file for each few types includes this, so that they compile side by side.
#pragma once

#include "cuda/product_groups.cuh"

namespace fathom::cuda {

inline constexpr unsigned kProductThreads = 128;

// kRows rows of x at a time.
template <DType kType, int kRows>
__global__ void product_rows_kernel(ProductParams p) {
  const int lane = int(threadIdx.x % 32);
  const int64_t warp = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const GroupRows group = group_rows(p);
  const bool pairs = p.up.data != nullptr;
  const int64_t first_row = warp * (pairs ? kSlots / 2 : kSlots);
  if (first_row >= p.w.rows || group.n_rows == 0) return;

  WeightRow slots[kSlots];
  for (int s = 0; s < kSlots; ++s) {  // beyond the last row: the last again, never written
    const int64_t row = first_row + (pairs ? s % 2 : s);
    slots[s] =
        weight_row(pairs && s >= 2 ? p.up : p.w, group.matrix, row < p.w.rows ? row : p.w.rows - 1);
  }
  const auto n_groups = int((p.w.cols + 7) / 8);
  for (int64_t t = 0; t < group.n_rows; t += kRows) {
    const int64_t left = group.n_rows - t;
    const float* x[kRows];
    for (int n = 0; n < kRows; ++n) x[n] = group_x(p, group, t + (n < left ? n : 0));
    float sum[kRows][kSlots] = {};
    for (int g = lane; g < n_groups; g += 32) {
      float values[kRows][8];
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        if (n >= left) continue;
        if (g * 8 + 8 <= p.w.cols) {
#pragma unroll
          for (int i = 0; i < 8; ++i) values[n][i] = x[n][g * 8 + i];
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) values[n][i] = g * 8 + i < p.w.cols ? x[n][g * 8 + i] : 0.0f;
        }
      }
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        float w[8];
        dequantize8<kType>(slots[s], g, w);
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          if (n >= left) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[n][s] += w[i] * values[n][i];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n)
      if (n < left) store_sums(p, group, t + n, first_row, sum[n]);
  }
}

template <DType kType>
int launch_product_rows(Stream stream, const ProductParams& p) {
  constexpr int64_t kBlockRows = kSlots * (kProductThreads / 32);
  const int64_t rows_per_block = p.up.data != nullptr ? kBlockRows / 2 : kBlockRows;
  const dim3 grid{static_cast<unsigned>((p.w.rows + rows_per_block - 1) / rows_per_block),
                  static_cast<unsigned>(group_count(p)), 1};
  const auto kernel = p.n_rows == 1 || (p.groups.active != nullptr && p.n_rows <= p.w.count / 4)
                          ? product_rows_kernel<kType, 1>
                          : product_rows_kernel<kType, 8>;
  return launch(kernel, grid, kProductThreads, 0, stream, p);
}

int product_rows_plain(Stream, const ProductParams&);
int product_rows_blocks(Stream, const ProductParams&);
int product_rows_super(Stream, const ProductParams&);

}  // namespace fathom::cuda
