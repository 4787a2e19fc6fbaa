// Expanded attention over a tile of keys and values: queries of one head against rows that were
// multiplied out for it, online softmax, the running state carried from tile to tile by the caller.
#include "cuda/numbers.cuh"

namespace fathom::cuda {
namespace {

// Rows of the tile that the query at `position` sees.
__device__ int64_t seen_rows(const ExpandedTileParams& p, int64_t position) {
  const int64_t seen = position + 1 - p.first_row;
  return seen < 0 ? 0 : seen < p.n_rows ? seen : p.n_rows;
}

// ---- exact: a block for each query and head ----

constexpr unsigned kExactThreads = 128;

// Shared: query [nope + rope], scores [n_rows], a word per warp.
__global__ void tile_exact_kernel(ExpandedTileParams p) {
  const int64_t token = blockIdx.x, local = blockIdx.y, head = p.first_head + local;
  const int64_t state = token * p.n_heads_all + head;
  const int key_dim = int(p.nope + p.rope), n = int(seen_rows(p, p.first_position + token));
  auto* query = reinterpret_cast<float*>(shared_memory());
  float* scores = query + key_dim;
  float* words = scores + p.n_rows;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int n_warps = int(blockDim.x / 32);
  const auto* keys = static_cast<const float*>(p.keys) + local * p.n_rows * p.nope;
  const auto* ropes = static_cast<const float*>(p.rope_keys);
  const auto* values = static_cast<const float*>(p.values) + local * p.n_rows * p.value;

  const float* q = p.q + token * p.q_token_stride + head * p.q_head_stride;
  for (int c = int(threadIdx.x); c < key_dim; c += int(blockDim.x)) query[c] = q[c] * p.scale;
  __syncthreads();
  float most = minus_infinity();
  for (int r = warp; r < n; r += n_warps) {
    float sum = 0;
    for (int c = lane; c < key_dim; c += 32)
      sum += query[c] * (c < p.nope ? keys[r * p.nope + c] : ropes[r * p.rope + c - p.nope]);
    sum = warp_sum(sum);
    if (lane == 0) scores[r] = sum;
    most = fmaxf(most, sum);
  }
  if (lane == 0) words[warp] = most;
  __syncthreads();
  const float before = p.begin ? minus_infinity() : p.max[state];
  most = before;
  for (int w = 0; w < n_warps; ++w) most = fmaxf(most, words[w]);
  const float keep = before == minus_infinity() ? 0.0f : expf(before - most);
  __syncthreads();
  float sum = 0;
  for (int r = int(threadIdx.x); r < n; r += int(blockDim.x)) {
    scores[r] = expf(scores[r] - most);
    sum += scores[r];
  }
  sum = warp_sum(sum);
  if (lane == 0) words[warp] = sum;
  __syncthreads();
  sum = p.begin ? 0.0f : p.sum[state] * keep;
  for (int w = 0; w < n_warps; ++w) sum += words[w];
  const float factor = !p.finish ? 1.0f : sum == 0 ? 0.0f : 1 / sum;
  for (int64_t c = threadIdx.x; c < p.value; c += blockDim.x) {
    float& out = p.out[state * p.value + c];
    float total = p.begin ? 0.0f : out * keep;
    for (int r = 0; r < n; ++r) total += scores[r] * values[r * p.value + c];
    out = total * factor;
  }
  __syncthreads();  // everybody has read the old state
  if (threadIdx.x == 0) {
    p.max[state] = most;
    p.sum[state] = sum;
  }
}

// ---- tensor cores: a block for 64 queries of a head, 16 for each warp ----
//
// Scores of 16 queries x 64 rows stay in registers and become the left operand of the product with
// the values: the layout of d for two neighbouring tiles of 8 is that of a for one of 16.

constexpr int kQueries = 64, kRows = 64;
constexpr unsigned kThreads = 128;
constexpr int kMaxValue = 128, kMaxKey = 256;
constexpr int kValueTiles = kMaxValue / 8;

struct Layout {
  int key_stride, value_stride;
  size_t keys, values, bytes;
  __host__ __device__ Layout(int key_dim, int value) {
    key_stride = key_dim + 8;
    value_stride = value + 8;
    keys = size_t(kQueries) * size_t(key_stride) * 2;
    values = keys + size_t(kRows) * size_t(key_stride) * 2;
    bytes = values + size_t(kRows) * size_t(value_stride) * 2;
  }
};

__device__ uint32_t pair_at(const uint16_t* at) {
  return *reinterpret_cast<const uint32_t*>(at);
}
__device__ void copy8(uint16_t* to, const uint16_t* from, bool there) {
  uint4 zero;
  zero.x = zero.y = zero.z = zero.w = 0;
  *reinterpret_cast<uint4*>(to) = there ? *reinterpret_cast<const uint4*>(from) : zero;
}

__global__ void __launch_bounds__(kThreads) tile_mma_kernel(ExpandedTileParams p) {
  const int nope = int(p.nope), rope = int(p.rope), value = int(p.value), key_dim = nope + rope;
  const Layout at(key_dim, value);
  unsigned char* shared = shared_memory();
  auto* queries = reinterpret_cast<uint16_t*>(shared);
  auto* keys = reinterpret_cast<uint16_t*>(shared + at.keys);
  auto* values = reinterpret_cast<uint16_t*>(shared + at.values);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_token = int64_t(blockIdx.x) * kQueries, local = blockIdx.y;
  const int64_t head = p.first_head + local;
  const auto* all_keys = static_cast<const uint16_t*>(p.keys) + local * p.n_rows * nope;
  const auto* all_ropes = static_cast<const uint16_t*>(p.rope_keys);
  const auto* all_values = static_cast<const uint16_t*>(p.values) + local * p.n_rows * value;

  for (int i = thread; i < kQueries * (key_dim / 2); i += int(kThreads)) {
    const int64_t token = first_token + i / (key_dim / 2);
    const int c = i % (key_dim / 2) * 2;
    const float* q = p.q + token * p.q_token_stride + head * p.q_head_stride + c;
    *reinterpret_cast<uint32_t*>(queries + i / (key_dim / 2) * at.key_stride + c) =
        token < p.n_tokens ? bf16_pair(q[0] * p.scale, q[1] * p.scale) : 0;
  }

  // Of the two queries of this thread: rows g and g + 8 of the warp's sixteen.
  int64_t token[2], seen[2];
  float most[2], sum[2], out[kValueTiles][4] = {};
  for (int i = 0; i < 2; ++i) {
    token[i] = first_token + warp * 16 + g + 8 * i;
    const bool old = token[i] < p.n_tokens && !p.begin;
    const int64_t state = token[i] * p.n_heads_all + head;
    most[i] = old ? p.max[state] : minus_infinity();
    sum[i] = old ? p.sum[state] : 0.0f;
    seen[i] = token[i] < p.n_tokens ? seen_rows(p, p.first_position + token[i]) : 0;
    if (!old) continue;
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
      if (n * 8 >= value) continue;
      out[n][2 * i] = p.out[state * value + n * 8 + 2 * t];
      out[n][2 * i + 1] = p.out[state * value + n * 8 + 2 * t + 1];
    }
  }
  const int64_t last =
      first_token + kQueries < p.n_tokens ? first_token + kQueries - 1 : p.n_tokens - 1;
  const int64_t end = seen_rows(p, p.first_position + last);

  for (int64_t row0 = 0; row0 < end; row0 += kRows) {
    __syncthreads();  // the last step's keys and values have been used
    for (int i = thread; i < kRows * (key_dim / 8); i += int(kThreads)) {
      const int64_t row = row0 + i / (key_dim / 8);
      const int c = i % (key_dim / 8) * 8;
      copy8(keys + i / (key_dim / 8) * at.key_stride + c,
            c < nope ? all_keys + row * nope + c : all_ropes + row * rope + c - nope,
            row < p.n_rows);
    }
    for (int i = thread; i < kRows * (value / 8); i += int(kThreads)) {
      const int64_t row = row0 + i / (value / 8);
      const int c = i % (value / 8) * 8;
      copy8(values + i / (value / 8) * at.value_stride + c, all_values + row * value + c,
            row < p.n_rows);
    }
    __syncthreads();

    float score[kRows / 8][4] = {};
    for (int k = 0; k < key_dim; k += 16) {
      const uint16_t* q = queries + (warp * 16 + g) * at.key_stride + k + 2 * t;
      const uint32_t a[4] = {pair_at(q), pair_at(q + 8 * at.key_stride), pair_at(q + 8),
                             pair_at(q + 8 * at.key_stride + 8)};
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        const uint16_t* key = keys + (n * 8 + g) * at.key_stride + k + 2 * t;
        const uint32_t b[2] = {pair_at(key), pair_at(key + 8)};
        mma_bf16(score[n], a, b);
      }
    }

    // Four threads share a query.
    float keep[2], top[2] = {most[0], most[1]};
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
      for (int i = 0; i < 4; ++i)
        if (row0 + n * 8 + 2 * t + i % 2 < seen[i / 2]) top[i / 2] = fmaxf(top[i / 2], score[n][i]);
    for (int i = 0; i < 2; ++i) {
      for (int bit = 2; bit > 0; bit >>= 1)
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], bit));
      keep[i] = most[i] == minus_infinity() ? 0.0f : expf(most[i] - top[i]);
      most[i] = top[i];
    }
    float added[2] = {};
    uint32_t weights[kRows / 8][2];  // of the two queries
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
      for (int i = 0; i < 2; ++i) {
        float w[2];
        for (int j = 0; j < 2; ++j) {
          const bool visible = row0 + n * 8 + 2 * t + j < seen[i];
          w[j] = bf16_value(bf16_bits(visible ? expf(score[n][2 * i + j] - most[i]) : 0.0f));
          added[i] += w[j];
        }
        weights[n][i] = bf16_pair(w[0], w[1]);
      }
    for (int i = 0; i < 2; ++i) {
      for (int bit = 2; bit > 0; bit >>= 1) added[i] += __shfl_xor_sync(0xffffffffu, added[i], bit);
      sum[i] = sum[i] * keep[i] + added[i];
    }
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n)
      for (int i = 0; i < 4; ++i) out[n][i] *= keep[i / 2];
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
      const uint32_t a[4] = {weights[2 * k][0], weights[2 * k][1], weights[2 * k + 1][0],
                             weights[2 * k + 1][1]};
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) {
        if (n * 8 >= value) continue;
        uint32_t b[2];
        load_transposed(b, values + (k * 16 + lane % 16) * at.value_stride + n * 8);
        mma_bf16(out[n], a, b);
      }
    }
  }

  for (int i = 0; i < 2; ++i) {
    if (token[i] >= p.n_tokens) continue;
    const int64_t state = token[i] * p.n_heads_all + head;
    const float factor = !p.finish ? 1.0f : sum[i] == 0 ? 0.0f : 1 / sum[i];
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n) {
      if (n * 8 >= value) continue;
      p.out[state * value + n * 8 + 2 * t] = out[n][2 * i] * factor;
      p.out[state * value + n * 8 + 2 * t + 1] = out[n][2 * i + 1] * factor;
    }
    if (t == 0) {
      p.max[state] = most[i];
      p.sum[state] = sum[i];
    }
  }
}

}  // namespace

bool attend_tile_mma_fits(int64_t nope, int64_t rope, int64_t value) noexcept {
  return nope % 16 == 0 && rope % 16 == 0 && nope + rope <= kMaxKey && value % 8 == 0 &&
         value <= kMaxValue;
}

int attend_tile_exact(Stream stream, const ExpandedTileParams& p) {
  if (p.n_tokens == 0 || p.n_heads == 0) return 0;
  const dim3 grid{static_cast<unsigned>(p.n_tokens), static_cast<unsigned>(p.n_heads), 1};
  const int64_t floats = p.nope + p.rope + p.n_rows + kExactThreads / 32;
  return launch(tile_exact_kernel, grid, kExactThreads, static_cast<size_t>(floats * 4), stream, p);
}

int attend_tile_mma(Stream stream, const ExpandedTileParams& p) {
  if (p.n_tokens == 0 || p.n_heads == 0) return 0;
  const dim3 grid{static_cast<unsigned>((p.n_tokens + kQueries - 1) / kQueries),
                  static_cast<unsigned>(p.n_heads), 1};
  return launch(tile_mma_kernel, grid, kThreads,
                Layout(static_cast<int>(p.nope + p.rope), static_cast<int>(p.value)).bytes, stream,
                p);
}

}  // namespace fathom::cuda
