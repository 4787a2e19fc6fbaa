// Operations on rows of activations: embedding, norm, RoPE, rounding, SwiGLU.
#include "cuda/dequantize.cuh"
#include "cuda/numbers.cuh"

namespace fathom::cuda {
namespace {

constexpr unsigned kThreads = 256;

// Grids have at most 2^31 - 1 blocks in x; larger work is walked with a stride.
dim3 blocks_for(int64_t n_values, int64_t per_block = kThreads) {
  const int64_t n = (n_values + per_block - 1) / per_block;
  return {static_cast<unsigned>(n < 65535 ? n : 65535), 1, 1};
}

// Sum over the block, the same for every thread; `shared` has a double for each warp.
__device__ double block_sum(double v, double* shared) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += shared[w];
  __syncthreads();  // shared may be used again
  return sum;
}

// ---- embed ----

// Token ids travel as parameters: no copy, no memory of their own.
constexpr int kEmbedTokens = 512;
struct EmbedArgs {
  WeightView table;
  float* out;
  int32_t tokens[kEmbedTokens];
};

__global__ void embed_kernel(EmbedArgs p) {
  const WeightRow row = weight_row(p.table, 0, p.tokens[blockIdx.x]);
  float* out = p.out + int64_t(blockIdx.x) * p.table.cols;
  for (int64_t group = threadIdx.x; group * 8 < p.table.cols; group += blockDim.x) {
    float v[8];
    dequantize8(p.table.dtype, row, int(group), v);
    for (int i = 0; i < 8; ++i)
      if (group * 8 + i < p.table.cols) out[group * 8 + i] = v[i];
  }
}

// ---- norm ----

__global__ void rms_norm_kernel(RmsNormParams p) {
  auto* sums = reinterpret_cast<double*>(shared_memory());
  for (int64_t row = blockIdx.x; row < p.n_rows; row += gridDim.x) {
    const float* x = p.x + row * p.x_stride;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < p.n_cols; i += blockDim.x) sum += double(x[i]) * x[i];
    const double mean = block_sum(sum, sums) / double(p.n_cols);
    const auto factor = float(1.0 / sqrt(mean + double(p.eps)));
    for (int64_t i = threadIdx.x; i < p.n_cols; i += blockDim.x)
      p.out[row * p.out_stride + i] = x[i] * factor * p.weight[i];
  }
}

// ---- RoPE ----

constexpr int kTablePairs = 64;
struct TableArgs {
  double multiplier;
  int64_t n_pairs, first_pair, first_position, n_tokens;
  float* cos_sin;
  double inv_freq[kTablePairs];
};

__global__ void rope_table_kernel(TableArgs p) {
  const int64_t left = p.n_pairs - p.first_pair;
  const int64_t n = left < kTablePairs ? left : kTablePairs;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < p.n_tokens * n;
       at += int64_t(gridDim.x) * blockDim.x) {
    const int64_t t = at / n, i = at % n;
    const double angle = double(p.first_position + t) * p.inv_freq[i];
    float* out = p.cos_sin + (t * p.n_pairs + p.first_pair + i) * 2;
    out[0] = float(cos(angle) * p.multiplier);
    out[1] = float(sin(angle) * p.multiplier);
  }
}

__global__ void rope_kernel(RopeParams p) {
  const int64_t n_pairs = p.rope_dim / 2;
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
       at < p.n_tokens * p.n_heads * n_pairs; at += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = at % n_pairs, head = at / n_pairs % p.n_heads, t = at / n_pairs / p.n_heads;
    float* x = p.x + t * p.token_stride + head * p.head_stride + 2 * i;
    const float* cs = p.cos_sin + t * p.rope_dim + 2 * i;
    const float a = x[0], b = x[1];
    x[0] = a * cs[0] - b * cs[1];
    x[1] = a * cs[1] + b * cs[0];
  }
}

// ---- element by element ----

struct RoundArgs {
  const float* x;
  int64_t x_stride, n_rows, n_cols;
  uint16_t* out;
};
__global__ void round_kernel(RoundArgs p) {
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < p.n_rows * p.n_cols;
       at += int64_t(gridDim.x) * blockDim.x)
    p.out[at] = bf16_bits(p.x[at / p.n_cols * p.x_stride + at % p.n_cols]);
}

struct SwigluArgs {
  float* gate;
  const float* up;
  int64_t n;
};
__global__ void swiglu_kernel(SwigluArgs p) {
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < p.n;
       at += int64_t(gridDim.x) * blockDim.x) {
    const float g = p.gate[at];
    p.gate[at] = g / (1 + expf(-g)) * p.up[at];
  }
}

__global__ void add_kernel(AddParams p) {
  for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < p.n;
       at += int64_t(gridDim.x) * blockDim.x)
    p.out[at] += p.x[at];
}

}  // namespace

int embed(Stream stream, const WeightView& table, const EmbedParams& p) {
  for (int64_t t = 0; t < p.n_tokens; t += kEmbedTokens) {
    const int64_t n = p.n_tokens - t < kEmbedTokens ? p.n_tokens - t : kEmbedTokens;
    EmbedArgs args{.table = table, .out = p.out + t * table.cols, .tokens = {}};
    for (int64_t i = 0; i < n; ++i) args.tokens[i] = p.tokens[t + i];
    if (int e = launch(embed_kernel, {static_cast<unsigned>(n), 1, 1}, 128, 0, stream, args))
      return e;
  }
  return 0;
}

int rms_norm(Stream stream, const RmsNormParams& p) {
  if (p.n_rows == 0) return 0;
  return launch(rms_norm_kernel, blocks_for(p.n_rows, 1), kThreads, kThreads / 32 * sizeof(double),
                stream, p);
}

int rope_table(Stream stream, const RopeTableParams& p) {
  if (p.n_tokens == 0) return 0;
  for (int64_t first = 0; first < p.rope_dim / 2; first += kTablePairs) {
    TableArgs args{.multiplier = p.multiplier,
                   .n_pairs = p.rope_dim / 2,
                   .first_pair = first,
                   .first_position = p.first_position,
                   .n_tokens = p.n_tokens,
                   .cos_sin = p.cos_sin,
                   .inv_freq = {}};
    const int64_t n = args.n_pairs - first < kTablePairs ? args.n_pairs - first : kTablePairs;
    for (int64_t i = 0; i < n; ++i) args.inv_freq[i] = p.inv_freq[first + i];
    if (int e = launch(rope_table_kernel, blocks_for(p.n_tokens * n), kThreads, 0, stream, args))
      return e;
  }
  return 0;
}

int rope(Stream stream, const RopeParams& p) {
  const int64_t n = p.n_tokens * p.n_heads * (p.rope_dim / 2);
  return n == 0 ? 0 : launch(rope_kernel, blocks_for(n), kThreads, 0, stream, p);
}

int round_to_bf16(Stream stream, const float* x, int64_t x_stride, int64_t n_rows, int64_t n_cols,
                  uint16_t* out) {
  const RoundArgs args{x, x_stride, n_rows, n_cols, out};
  return n_rows * n_cols == 0
             ? 0
             : launch(round_kernel, blocks_for(n_rows * n_cols), kThreads, 0, stream, args);
}

int swiglu(Stream stream, float* gate, const float* up, int64_t n) {
  return n == 0
             ? 0
             : launch(swiglu_kernel, blocks_for(n), kThreads, 0, stream, SwigluArgs{gate, up, n});
}

int add(Stream stream, const AddParams& p) {
  return p.n == 0 ? 0 : launch(add_kernel, blocks_for(p.n), kThreads, 0, stream, p);
}

}  // namespace fathom::cuda
