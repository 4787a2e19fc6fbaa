// Which rows a block of a product works on: shared by the kernels of products.
#pragma once

#include "cuda/dequantize.cuh"

namespace fathom::cuda {

// One group of rows with one matrix.
struct GroupRows {
  int64_t matrix;
  int64_t first, n_rows;  // sorted rows; n_rows 0: nothing to do
  const float* x;         // of row 0
  float* out;
};

// blockIdx.y chooses the group.
__device__ inline GroupRows group_rows(const ProductParams& p) {
  const int64_t at = blockIdx.y;
  if (p.groups.active == nullptr)
    return {at, 0, p.n_rows, p.x + at * p.x_matrix_stride, p.out + at * p.out_matrix_stride};
  if (at >= *p.groups.n_active) return {0, 0, 0, p.x, p.out};
  const int64_t matrix = p.groups.active[at];
  const int64_t first = p.groups.first[matrix];
  return {matrix, first, p.groups.first[matrix + 1] - first, p.x, p.out};
}

// Where row i of the group is in x.
__device__ inline const float* group_x(const ProductParams& p, const GroupRows& g, int64_t i) {
  const int64_t row = g.first + i;
  return g.x + (p.groups.tokens != nullptr ? p.groups.tokens[row] : row) * p.x_stride;
}

// Groups that a launch must provide for: all matrices, or no more than there are rows.
inline int64_t group_count(const ProductParams& p) {
  return p.groups.active == nullptr || p.w.count < p.n_rows ? p.w.count : p.n_rows;
}

__device__ inline float silu(float v) {
  return v / (1 + expf(-v));
}

// Weight rows that a warp takes; in pairs: two of w, two of up.
inline constexpr int kSlots = 4;

// What a warp has found for one row of the group, summed over its lanes, to its place: kSlots
// values of w, or silu(w) times up of pairs.
__device__ inline void store_sums(const ProductParams& p, const GroupRows& group, int64_t row,
                                  int64_t first_row, float (&sum)[kSlots]) {
#pragma unroll
  for (int s = 0; s < kSlots; ++s) sum[s] = warp_sum(sum[s]);
  if (threadIdx.x % 32 != 0) return;
  float* out = group.out + (group.first + row) * p.out_stride + first_row;
  if (p.up.data != nullptr) {
    for (int s = 0; s < 2 && first_row + s < p.w.rows; ++s) out[s] = silu(sum[s]) * sum[2 + s];
  } else {
    for (int s = 0; s < kSlots && first_row + s < p.w.rows; ++s)
      out[s] = p.add ? out[s] + sum[s] : sum[s];
  }
}

}  // namespace fathom::cuda
