// Choosing experts, sorting rows by expert, and adding their results up or keeping them apart.  The
// products between are those of product_rows and product_tiles, by groups.
#include "cuda/numbers.cuh"

namespace fathom::cuda {
namespace {

// ---- route: a block for each token (V2: softmax, groups by their best; V3: sigmoid and bias,
// groups by their two best) ----

constexpr unsigned kRouteThreads = 256;

struct Best {
  float value;
  int index;
};
// The greater value, the lower index of equals; a free position when all are NaN.
__device__ Best better(Best a, Best b) {
  if (b.index < 0) return a;
  if (a.index < 0) return b;
  if (b.value > a.value) return b;
  if (a.value > b.value) return a;
  if (a.value == b.value) return a.index < b.index ? a : b;
  // A NaN on one side or both: as a loop that begins with the lower index and asks for "greater".
  return a.index < b.index ? a : b;
}
__device__ Best warp_best(Best v) {
  for (int bit = 16; bit > 0; bit >>= 1)
    v = better(v, {__shfl_xor_sync(0xffffffffu, v.value, bit),
                   __shfl_xor_sync(0xffffffffu, v.index, bit)});
  return v;
}

// Shared: probability and choice [n_experts], group scores [n_groups], taken bytes, words of warps.
__global__ void route_kernel(RouteParams p) {
  const int n = int(p.n_experts), n_groups = int(p.n_group);
  auto* probability = reinterpret_cast<float*>(shared_memory());
  float* choice = probability + n;
  float* group_score = choice + n;
  float* words = group_score + n_groups;  // [32]
  auto* word_index = reinterpret_cast<int*>(words + 32);
  auto* taken = reinterpret_cast<uint8_t*>(word_index + 32);  // [n], then groups [n_groups]
  uint8_t* group_chosen = taken + n;
  const int64_t token = blockIdx.x;
  const float* logits = p.scores + token * n;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int n_threads = int(blockDim.x), n_warps = n_threads / 32;

  float top = minus_infinity();
  if (p.scoring_func == ScoringFunc::kSoftmax) {
    for (int e = thread; e < n; e += n_threads) top = fmaxf(top, logits[e]);
    top = warp_max(top);
    if (lane == 0) words[warp] = top;
    __syncthreads();
    for (int w = 0; w < n_warps; ++w) top = fmaxf(top, words[w]);
    __syncthreads();
  }
  for (int e = thread; e < n; e += n_threads) {
    probability[e] = p.scoring_func == ScoringFunc::kSigmoid ? 1 / (1 + expf(-logits[e]))
                                                             : expf(logits[e] - top);
    taken[e] = 0;
  }
  for (int i = thread; i < n_groups; i += n_threads) group_chosen[i] = 0;
  __syncthreads();
  float factor = 1;
  if (p.scoring_func == ScoringFunc::kSoftmax) {
    double sum = 0;
    for (int e = thread; e < n; e += n_threads) sum += probability[e];
    sum = warp_sum(sum);
    if (lane == 0) words[warp] = float(sum);
    __syncthreads();
    sum = 0;
    for (int w = 0; w < n_warps; ++w) sum += words[w];
    factor = float(1 / sum);
    __syncthreads();
  }
  for (int e = thread; e < n; e += n_threads) {
    probability[e] *= factor;
    choice[e] = p.bias != nullptr ? probability[e] + p.bias[e] : probability[e];
  }
  __syncthreads();

  const bool limited =
      p.topk_method != TopkMethod::kGreedy && n_groups > 1 && p.topk_group < n_groups;
  if (limited) {
    const int size = n / n_groups;
    for (int i = thread; i < n_groups; i += n_threads) {
      float first = minus_infinity(), second = minus_infinity();
      for (int e = i * size; e < (i + 1) * size; ++e) {
        if (choice[e] > first) {
          second = first;
          first = choice[e];
        } else if (choice[e] > second) {
          second = choice[e];
        }
      }
      group_score[i] = p.topk_method == TopkMethod::kNoauxTc && size > 1 ? first + second : first;
    }
    __syncthreads();
    if (thread == 0)
      for (int k = 0; k < p.topk_group; ++k) {
        int best = -1;
        for (int i = 0; i < n_groups; ++i)
          if (!group_chosen[i] && (best < 0 || group_score[i] > group_score[best])) best = i;
        group_chosen[best] = 1;
      }
    __syncthreads();
    for (int e = thread; e < n; e += n_threads) taken[e] = !group_chosen[e / size];
    __syncthreads();
  }

  int32_t* ids = p.ids + token * p.num_experts_per_tok;
  float* weights = p.weights + token * p.num_experts_per_tok;
  double total = 0;
  for (int k = 0; k < p.num_experts_per_tok; ++k) {
    Best best{minus_infinity(), -1};
    for (int e = thread; e < n; e += n_threads)
      if (!taken[e]) best = better(best, {choice[e], e});
    best = warp_best(best);
    if (lane == 0) {
      words[warp] = best.value;
      word_index[warp] = best.index;
    }
    __syncthreads();
    best = {words[0], word_index[0]};
    for (int w = 1; w < n_warps; ++w) best = better(best, {words[w], word_index[w]});
    __syncthreads();
    if (thread == 0) {
      taken[best.index] = 1;
      ids[k] = best.index;
      weights[k] = probability[best.index];
      total += probability[best.index];
    }
    __syncthreads();
  }
  if (thread == 0) {
    const double scale = p.norm_topk_prob ? double(p.routed_scaling_factor) / (total + 1e-20)
                                          : double(p.routed_scaling_factor);
    for (int k = 0; k < p.num_experts_per_tok; ++k) weights[k] = float(weights[k] * scale);
  }
}

// ---- sort: one block, a thread for each expert ----
//
// Each expert's thread walks the ids in order, so equal experts keep their order without atomics;
// the ids come from shared memory piece by piece.

constexpr int kSortPiece = 4096;

__global__ void sort_kernel(SortParams p) {
  auto* piece = reinterpret_cast<int32_t*>(shared_memory());  // [kSortPiece]
  int32_t* counts = piece + kSortPiece;                       // [n_experts + 1]
  const int expert = int(threadIdx.x), n = int(p.n_experts);
  const auto index_of = [&](int64_t pair) { return p.ids[pair] - int32_t(p.first_expert); };
  int count = 0;
  for (int64_t first = 0; first < p.n_pairs; first += kSortPiece) {
    const int size = int(p.n_pairs - first < kSortPiece ? p.n_pairs - first : kSortPiece);
    for (int i = expert; i < size; i += int(blockDim.x)) {
      const int32_t id = index_of(first + i);
      piece[i] = id;
      if (id < 0 || id >= n) p.places[first + i] = -1;
    }
    __syncthreads();
    for (int i = 0; i < size; ++i) count += piece[i] == expert;
    __syncthreads();
  }
  if (expert < n) counts[expert + 1] = count;
  __syncthreads();
  if (expert == 0) {
    counts[0] = 0;
    int n_active = 0;
    for (int e = 0; e < n; ++e) {
      if (counts[e + 1] > 0) p.active[n_active++] = e;
      counts[e + 1] += counts[e];
    }
    *p.n_active = n_active;
  }
  __syncthreads();
  for (int e = expert; e <= n; e += int(blockDim.x)) p.first[e] = counts[e];
  int place = expert < n ? counts[expert] : 0;
  for (int64_t first = 0; first < p.n_pairs; first += kSortPiece) {
    const int size = int(p.n_pairs - first < kSortPiece ? p.n_pairs - first : kSortPiece);
    for (int i = expert; i < size; i += int(blockDim.x)) piece[i] = index_of(first + i);
    __syncthreads();
    if (expert < n)
      for (int i = 0; i < size; ++i)
        if (piece[i] == expert) {
          p.tokens[place] = int32_t((first + i) / p.num_experts_per_tok);
          p.places[first + i] = place++;
        }
    __syncthreads();
  }
}

// ---- adding up: a thread for each value ----

// sum += weights[k] * value(k) for k by ascending order[k], which differ; negative ones are passed
// over.  Both kernels add by it, so that rows that were kept apart add up to the same bits.
template <class Value>
__device__ float add_in_order(float sum, const int32_t* order, const float* weights, int n,
                              Value value) {
  for (int32_t last = -1;;) {
    int next = -1;
    for (int k = 0; k < n; ++k)
      if (order[k] > last && (next < 0 || order[k] < order[next])) next = k;
    if (next < 0) return sum;
    last = order[next];
    sum += weights[next] * value(next);
  }
}

__global__ void combine_kernel(CombineParams p) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, n = p.num_experts_per_tok;
  if (c >= p.n_cols) return;
  for (int64_t t = blockIdx.y; t < p.n_tokens; t += gridDim.y) {
    const int32_t* places = p.places + t * n;  // ascend with the expert
    float& out = p.out[t * p.out_stride + p.first_col + c];
    out = add_in_order(p.add ? out : 0.0f, places, p.weights + t * n, int(n),
                       [&](int k) { return p.rows[places[k] * p.n_cols + c]; });
  }
}

__global__ void sum_kernel(SumExpertsParams p) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, n = p.num_experts_per_tok;
  if (c >= p.hidden_size) return;
  for (int64_t t = blockIdx.y; t < p.n_tokens; t += gridDim.y)
    p.out[t * p.hidden_size + c] =
        add_in_order(0.0f, p.ids + t * n, p.weights + t * n, int(n),
                     [&](int k) { return p.rows[(t * n + k) * p.hidden_size + c]; });
}

__global__ void keep_kernel(KeepRowsParams p) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= p.n_cols) return;
  for (int64_t pair = blockIdx.y; pair < p.n_pairs; pair += gridDim.y)
    if (const int64_t place = p.places[pair]; place >= 0)
      p.out[pair * p.out_stride + p.first_col + c] = p.rows[place * p.n_cols + c];
}

// Blocks for values [n_rows, n_cols].
constexpr unsigned kValueThreads = 256;
dim3 grid_of(int64_t n_rows, int64_t n_cols) {
  return {static_cast<unsigned>((n_cols + kValueThreads - 1) / kValueThreads),
          static_cast<unsigned>(n_rows < 65535 ? n_rows : 65535), 1};
}

}  // namespace

int route(Stream stream, const RouteParams& p) {
  if (p.n_tokens == 0) return 0;
  const int64_t bytes = (2 * p.n_experts + p.n_group + 64) * 4 + p.n_experts + p.n_group;
  return launch(route_kernel, {static_cast<unsigned>(p.n_tokens), 1, 1}, kRouteThreads,
                static_cast<size_t>(bytes), stream, p);
}

int sort_by_expert(Stream stream, const SortParams& p) {
  const auto threads = static_cast<unsigned>((p.n_experts + 31) / 32 * 32);
  return launch(sort_kernel, {1, 1, 1}, threads,
                static_cast<size_t>((kSortPiece + p.n_experts + 1) * 4), stream, p);
}

int combine_experts(Stream stream, const CombineParams& p) {
  if (p.n_tokens == 0 || p.n_cols == 0) return 0;
  return launch(combine_kernel, grid_of(p.n_tokens, p.n_cols), kValueThreads, 0, stream, p);
}

int keep_expert_rows(Stream stream, const KeepRowsParams& p) {
  if (p.n_pairs == 0 || p.n_cols == 0) return 0;
  return launch(keep_kernel, grid_of(p.n_pairs, p.n_cols), kValueThreads, 0, stream, p);
}

int sum_experts(Stream stream, const SumExpertsParams& p) {
  if (p.n_tokens == 0 || p.hidden_size == 0) return 0;
  return launch(sum_kernel, grid_of(p.n_tokens, p.hidden_size), kValueThreads, 0, stream, p);
}

}  // namespace fathom::cuda
