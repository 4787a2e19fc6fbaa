// The likeliest tokens of a row of logits, so that a step brings a few hundred bytes to the host
// and not the whole row.
//
//   slices   a block for 4,096 logits: its k likeliest, found one after the other
//   merge    a block for each row: the k likeliest of all slices' candidates
#include "cuda/numbers.cuh"

namespace fathom::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kSlice = 4096;

// As the sampler orders tokens; id -1 is none.
__device__ bool likelier(TokenLogit a, TokenLogit b) {
  if (a.id < 0 || b.id < 0) return a.id >= 0;
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The likeliest of the block's, the same for every thread; `shared` has a word for each warp.
__device__ TokenLogit block_likeliest(TokenLogit v, TokenLogit* shared) {
  for (int bit = 16; bit > 0; bit >>= 1) {
    const TokenLogit other{__shfl_xor_sync(0xffffffffu, v.logit, bit),
                           __shfl_xor_sync(0xffffffffu, v.id, bit)};
    if (likelier(other, v)) v = other;
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w)
    if (likelier(shared[w], v)) v = shared[w];
  __syncthreads();  // shared may be used again
  return v;
}

// out[0 .. k) = the k likeliest of `n` tokens in shared memory, which are used up; fewer: id -1.
__device__ void take_likeliest(TokenLogit* tokens, int n, int k, TokenLogit* words,
                               TokenLogit* out) {
  for (int i = 0; i < k; ++i) {
    TokenLogit best{0, -1};
    int place = -1;
    for (int at = int(threadIdx.x); at < n; at += int(blockDim.x))
      if (likelier(tokens[at], best)) best = tokens[at], place = at;
    const TokenLogit winner = block_likeliest(best, words);
    if (place >= 0 && best.id == winner.id) tokens[place].id = -1;  // ids are distinct
    if (threadIdx.x == 0) out[i] = winner;
    __syncthreads();
  }
}

__device__ bool is_broken(float logit) {
  return !(logit < float_of_bits(0x7f800000u));
}

struct TopKArgs {
  TopKParams p;
  int n_slices;
  TokenLogit* found;   // [n_rows, n_slices, k]
  TokenLogit* broken;  // [n_rows, n_slices]
};

// Shared: tokens [kSlice], a word for each warp.
__global__ void slice_kernel(TopKArgs args) {
  const TopKParams& p = args.p;
  auto* tokens = reinterpret_cast<TokenLogit*>(shared_memory());
  TokenLogit* words = tokens + kSlice;
  const int64_t row = blockIdx.y, slice = blockIdx.x, first = slice * kSlice;
  const int n = int(p.n_cols - first < kSlice ? p.n_cols - first : kSlice);
  // The first broken token is the likeliest of equals.
  TokenLogit broken{0, -1};
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    const float logit = p.logits[row * p.n_cols + first + i];
    tokens[i] = {logit, int32_t(first + i)};
    if (is_broken(logit) && broken.id < 0) broken = {0, int32_t(first + i)};
  }
  __syncthreads();
  broken = block_likeliest(broken, words);
  if (threadIdx.x == 0) args.broken[row * args.n_slices + slice] = broken;
  take_likeliest(tokens, n, int(p.k), words, args.found + (row * args.n_slices + slice) * p.k);
}

// Shared: tokens [n_slices * k], a word for each warp.
__global__ void merge_likeliest_kernel(TopKArgs args) {
  const TopKParams& p = args.p;
  auto* tokens = reinterpret_cast<TokenLogit*>(shared_memory());
  const int n = args.n_slices * int(p.k);
  TokenLogit* words = tokens + n;
  const int64_t row = blockIdx.x;
  TokenLogit* out = p.out + row * (p.k + 1);
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) tokens[i] = args.found[row * n + i];
  __syncthreads();
  take_likeliest(tokens, n, int(p.k), words, out);
  if (threadIdx.x != 0) return;
  TokenLogit broken{0, -1};
  for (int s = 0; s < args.n_slices && broken.id < 0; ++s)
    broken = args.broken[row * args.n_slices + s];
  if (broken.id >= 0) broken.logit = p.logits[row * p.n_cols + broken.id];
  out[p.k] = broken;
}

}  // namespace

int64_t top_k_slices(int64_t n_cols) noexcept {
  return (n_cols + kSlice - 1) / kSlice;
}

int top_k(Stream stream, const TopKParams& p, TokenLogit* found, TokenLogit* broken) {
  if (p.n_rows == 0) return 0;
  const TopKArgs args{p, int(top_k_slices(p.n_cols)), found, broken};
  constexpr size_t kWords = kThreads / 32 * sizeof(TokenLogit);
  if (int e = launch(slice_kernel,
                     {static_cast<unsigned>(args.n_slices), static_cast<unsigned>(p.n_rows), 1},
                     kThreads, kSlice * sizeof(TokenLogit) + kWords, stream, args))
    return e;
  return launch(merge_likeliest_kernel, {static_cast<unsigned>(p.n_rows), 1, 1}, kThreads,
                static_cast<size_t>(args.n_slices * p.k) * sizeof(TokenLogit) + kWords, stream,
                args);
}

}  // namespace fathom::cuda
