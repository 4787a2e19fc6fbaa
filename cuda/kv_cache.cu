// Writing rows into typed pages, rewriting pages in another type, and decoding rows for the
// expanded form of attention.
#include "cuda/kv_rows.cuh"

namespace fathom::cuda {
namespace {

// ---- append: a block for each row ----

constexpr unsigned kAppendThreads = 256;

__global__ void append_kernel(AppendParams p) {
  auto* sums = reinterpret_cast<double*>(shared_memory());
  const int64_t index = blockIdx.x;
  const float* latent = p.kv + index * p.kv_stride;
  const float* position = latent + p.rows.rank;
  const float* cos_sin = p.cos_sin + index * p.rows.rope;
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int n_warps = int(blockDim.x / 32);

  double sum = 0;
  for (int i = int(threadIdx.x); i < p.rows.rank; i += int(blockDim.x))
    sum += double(latent[i]) * latent[i];
  sum = warp_sum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < n_warps; ++w) sum += sums[w];
  const auto factor = float(1.0 / sqrt(sum / p.rows.rank + double(p.eps)));

  const KvRow row = kv_row(p.rows, p.rows.first_row + index);
  for (int first = warp * kEncodeColumns; first < p.rows.rank; first += n_warps * kEncodeColumns) {
    float v[4];
    for (int i = 0; i < 4; ++i) {
      const int c = first + 32 * i + lane;
      v[i] = c < p.rows.rank ? latent[c] * factor * p.norm_weight[c] : 0.0f;
    }
    encode_latent(row.type, v, first, p.rows.rank, row.latent);
  }
  for (int first = warp * kEncodeColumns; first < p.rows.rope; first += n_warps * kEncodeColumns) {
    float v[4];
    for (int i = 0; i < 4; ++i) {
      const int c = first + 32 * i + lane;
      v[i] = 0;
      if (c >= p.rows.rope) continue;
      const float cosine = cos_sin[c & ~1], sine = cos_sin[c | 1];
      const float a = position[c & ~1], b = position[c | 1];
      v[i] = c % 2 == 0 ? a * cosine - b * sine : a * sine + b * cosine;
    }
    encode_plain(row.type, v, first, p.rows.rope, row.rope);
  }
}

// ---- convert: one block, since a row is written where rows before it were ----
//
// A batch of rows is read into shared memory, then written; batches, planes and layers follow each
// other upwards, and no row is written above the place it was read from.

constexpr unsigned kConvertThreads = 512;
constexpr int64_t kBatchBytes = 48 << 10;

struct Plane {
  int64_t n_rows, n_cols;
  const uint8_t* src;
  int64_t src_bytes;
  uint8_t* dst;
  int64_t dst_bytes;
  bool is_latent;
};

struct Offsets {
  int64_t latent, rope;   // bytes of a row
  int64_t rope_at, slot;  // of the rope plane, and from layer to layer
  __device__ Offsets(const KvLayout& layout, KvType type)
      : latent(layout.latent_row_bytes(type)),
        rope(layout.rope_row_bytes(type)),
        rope_at(layout.rope_plane_offset(type)),
        slot(layout.layer_bytes(type)) {}
};

__device__ void convert_plane(KvType from, KvType to, const Plane& p, uint8_t* batch) {
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int n_warps = int(blockDim.x / 32);
  const int64_t batch_rows = kBatchBytes / p.src_bytes;
  for (int64_t row = 0; row < p.n_rows; row += batch_rows) {
    const int64_t n = p.n_rows - row < batch_rows ? p.n_rows - row : batch_rows;
    for (int64_t i = threadIdx.x; i < n * p.src_bytes; i += blockDim.x)
      batch[i] = p.src[row * p.src_bytes + i];
    __syncthreads();
    for (int64_t r = warp; r < n; r += n_warps) {
      const uint8_t* src = batch + r * p.src_bytes;
      uint8_t* dst = p.dst + (row + r) * p.dst_bytes;
      for (int first = 0; first < p.n_cols; first += kEncodeColumns) {
        float v[4];
        for (int i = 0; i < 4; ++i) {
          const int c = first + 32 * i + lane;
          v[i] = c >= p.n_cols ? 0.0f
                 : p.is_latent ? latent_value(from, src, int(p.n_cols), c)
                               : plain_value(from, src, c);
        }
        if (p.is_latent)
          encode_latent(to, v, first, int(p.n_cols), dst);
        else
          encode_plain(to, v, first, int(p.n_cols), dst);
      }
    }
    __syncthreads();
  }
}

__global__ void convert_kernel(KvConvertParams p) {
  uint8_t* batch = shared_memory();
  const KvLayout layout = p.layout;
  auto* page = static_cast<uint8_t*>(p.page);
  const Offsets from(layout, p.from), to(layout, p.to);
  for (int64_t slot = 0; slot < p.n_layers; ++slot) {
    const uint8_t* src = page + slot * from.slot;
    uint8_t* dst = page + slot * to.slot;
    convert_plane(p.from, p.to,
                  {layout.page_tokens, layout.kv_lora_rank, src, from.latent, dst, to.latent, true},
                  batch);
    convert_plane(p.from, p.to,
                  {layout.page_tokens, layout.qk_rope_head_dim, src + from.rope_at, from.rope,
                   dst + to.rope_at, to.rope, false},
                  batch);
  }
}

// ---- decode: a warp for each row ----

__device__ void put(void* out, bool bf16, int64_t at, float value) {
  if (bf16)
    static_cast<uint16_t*>(out)[at] = bf16_bits(value);
  else
    static_cast<float*>(out)[at] = value;
}

__global__ void decode_kernel(DecodeRowsParams p) {
  const int lane = int(threadIdx.x % 32);
  const int64_t n = p.rows.end_row - p.rows.first_row;
  const int64_t index = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (index >= n) return;
  const KvRow row = kv_row(p.rows, p.rows.first_row + index);
  for (int c = lane; c < p.rows.rank; c += 32)
    put(p.latent, p.bf16, index * p.rows.rank + c,
        latent_value(row.type, row.latent, p.rows.rank, c));
  for (int c = lane; c < p.rows.rope; c += 32)
    put(p.rope, p.bf16, index * p.rows.rope + c, plain_value(row.type, row.rope, c));
}

}  // namespace

int kv_append(Stream stream, const AppendParams& p) {
  const int64_t n = p.rows.end_row - p.rows.first_row;
  return n == 0 ? 0
                : launch(append_kernel, {static_cast<unsigned>(n), 1, 1}, kAppendThreads,
                         kAppendThreads / 32 * sizeof(double), stream, p);
}

int kv_convert(Stream stream, const KvConvertParams& p) {
  if (p.from == p.to || p.n_layers == 0) return 0;
  return launch(convert_kernel, {1, 1, 1}, kConvertThreads, kBatchBytes, stream, p);
}

int decode_rows(Stream stream, const DecodeRowsParams& p) {
  const int64_t n = p.rows.end_row - p.rows.first_row;
  return n == 0
             ? 0
             : launch(decode_kernel, {static_cast<unsigned>((n + 7) / 8), 1, 1}, 256, 0, stream, p);
}

}  // namespace fathom::cuda
