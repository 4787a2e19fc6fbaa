// What the two kernels of absorbed attention on tensor cores share: 16 columns of queries, whose
// scores over a step of kRows rows lie in shared memory, become weights and add up rows.
#pragma once

#include "cuda/kv_rows.cuh"

namespace fathom::cuda {

inline constexpr int kColumns = 16;   // of a tile
inline constexpr int kMaxRank = 512;  // what the accumulators of a warp hold: 16 tiles of 8 values
inline constexpr int kValueTiles = kMaxRank / 4 / 8;

// The 16-bit numbers that rows and weights are multiplied in.
struct F16Numbers {
  static __device__ uint16_t bits(float v) { return f16_bits(v); }
  static __device__ float value(uint16_t bits) { return f16_value(bits); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
};
struct BF16Numbers {
  static __device__ uint16_t bits(float v) { return bf16_bits(v); }
  static __device__ float value(uint16_t bits) { return bf16_value(bits); }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};

__device__ inline uint32_t pair_at(const uint16_t* at) {
  return *reinterpret_cast<const uint32_t*>(at);
}

// Query of a (token, head) from value c on: latent values, then those of RoPE.
__device__ inline const float* query_at(const PartialParams& p, const AttendPiece& piece,
                                        int64_t column, int c) {
  const int64_t token = column / p.n_heads, head = column % p.n_heads;
  const int rank = p.rows.rank;
  return c < rank
             ? piece.q_latent + token * p.q_latent_token_stride + head * p.q_latent_head_stride + c
             : piece.q_rope + token * p.q_rope_token_stride + head * p.q_rope_head_stride +
                   (c - rank);
}

// The state of the softmax of one column: eight threads share it, and each has it.
struct ColumnState {
  float most, sum;
};

// One step of the online softmax: scores of the column's rows, of which the first `seen` count, to
// weights.  Returns what the sums so far are to be multiplied by.
template <class Numbers, int kRows>
__device__ float softmax_step(const float* scores, int64_t seen, int part, uint16_t* weights,
                              ColumnState& state) {
  float top = state.most;
  for (int r = part; r < kRows; r += 8)
    if (r < seen) top = fmaxf(top, scores[r]);
  for (int bit = 4; bit > 0; bit >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, bit));
  const float keep = state.most == minus_infinity() ? 0.0f : expf(state.most - top);
  float added = 0;
  for (int r = part; r < kRows; r += 8) {
    // The sum is over the rounded weights, which are those that the values get.
    const uint16_t weight = Numbers::bits(r < seen ? expf(scores[r] - top) : 0.0f);
    weights[r] = weight;
    added += Numbers::value(weight);
  }
  for (int bit = 4; bit > 0; bit >>= 1) added += __shfl_xor_sync(0xffffffffu, added, bit);
  state.sum = state.sum * keep + added;
  state.most = top;
  return keep;
}

// out = out * decay + weights . rows, for the warp's n_values values of the tile's 16 columns.
// `weights` and `decay` are the tile's; `rows` begins at the warp's first value.
template <class Numbers, int kRows>
__device__ void add_rows(const uint16_t* weights, int weight_stride, const float* decay,
                         const uint16_t* rows, int stride, int n_values,
                         float (&out)[kValueTiles][4]) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const float low = decay[g], high = decay[g + 8];
#pragma unroll
  for (int n = 0; n < kValueTiles; ++n) {
    out[n][0] *= low;
    out[n][1] *= low;
    out[n][2] *= high;
    out[n][3] *= high;
  }
#pragma unroll
  for (int k = 0; k < kRows; k += 16) {
    const uint16_t* w = weights + g * weight_stride + k + 2 * t;
    const uint32_t a[4] = {pair_at(w), pair_at(w + 8 * weight_stride), pair_at(w + 8),
                           pair_at(w + 8 * weight_stride + 8)};
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
      if (n * 8 >= n_values) continue;
      uint32_t b[2];
      load_transposed(b, rows + (k + lane % 16) * stride + n * 8);
      Numbers::mma(out[n], a, b);
    }
  }
}

// The split's result: state of the thread's column, and the warp's values, from first_value on, of
// the tile that begins at tile_column.
__device__ inline void store_split(const PartialParams& p, const AttendPiece& piece, int split,
                                   int64_t column, bool stores_state, const ColumnState& state,
                                   int64_t tile_column, int first_value, int n_values,
                                   const float (&out)[kValueTiles][4]) {
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int64_t part = piece.first_part + int64_t(split) * piece.n_columns;
  if (stores_state && column < piece.n_columns) {
    p.max[part + column] = state.most;
    p.sum[part + column] = state.sum;
  }
#pragma unroll
  for (int n = 0; n < kValueTiles; ++n)
    for (int i = 0; i < 4; ++i) {
      const int64_t to = tile_column + g + i / 2 * 8;
      const int value = first_value + n * 8 + 2 * t + i % 2;
      if (n * 8 < n_values && to < piece.n_columns)
        p.out[(part + to) * p.rows.rank + value] = out[n][i];
    }
}

}  // namespace fathom::cuda
