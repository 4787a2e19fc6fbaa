// Rows of x as bytes, and products of blocks of 32 values with them.
#include "cuda/product_int8.cuh"

namespace fathom::cuda {
namespace {

// ---- rounding: a warp for two segments ----

struct RoundArgs {
  const float* x;
  int64_t x_stride, n_rows, n_cols;
  Int8Rows out;
};

__global__ void round_int8_kernel(RoundArgs p) {
  const int lane = int(threadIdx.x % 32);
  const int64_t n_pairs = p.n_cols / (2 * kSegment);
  const int64_t at = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= p.n_rows * n_pairs) return;
  const int64_t row = at / n_pairs, first = at % n_pairs * 2 * kSegment;
  const float value = p.x[row * p.x_stride + first + lane];
  float largest = fabsf(value);
  for (int bit = kSegment / 2; bit > 0; bit >>= 1)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
  // What is no number must not become one: it goes into the scale.
  const uint32_t finite = __ballot_sync(0xffffffffu, is_finite(value));
  const uint32_t mine = lane < kSegment ? finite & 0xffffu : finite >> 16;
  const float d = mine == 0xffffu ? largest / 127.0f : float_of_bits(0x7fc00000u);
  const float inverse = d > 0 ? 1.0f / d : 0.0f;  // 0 for what is no number, too
  const int q = inverse > 0 && is_finite(inverse) ? int(rintf(value * inverse)) : 0;
  int sum = q;
  for (int bit = kSegment / 2; bit > 0; bit >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  p.out.codes[row * p.n_cols + first + lane] = uint8_t(int8_t(q < -127 ? -127 : q > 127 ? 127 : q));
  if (lane % kSegment == 0)
    p.out.scales[(row * p.n_cols + first) / kSegment + lane / kSegment] = {d, d * float(sum)};
}

}  // namespace

bool has_int8_product(DType dtype) noexcept {
  switch (dtype) {
    case DType::kQ4_0:
    case DType::kQ4_1:
    case DType::kQ5_0:
    case DType::kQ5_1:
    case DType::kQ8_0:
    case DType::kIQ4_NL:
    case DType::kQ4_K:
    case DType::kQ5_K:
    case DType::kQ6_K:
    case DType::kIQ4_XS:
      return true;
    default:
      return false;
  }
}

int round_to_int8(Stream stream, const float* x, int64_t x_stride, int64_t n_rows, int64_t n_cols,
                  const Int8Rows& out) {
  const int64_t warps = n_rows * (n_cols / (2 * kSegment));
  if (warps == 0) return 0;
  return launch(round_int8_kernel, {static_cast<unsigned>((warps + 7) / 8), 1, 1}, 256, 0, stream,
                RoundArgs{x, x_stride, n_rows, n_cols, out});
}

int product_int8_blocks(Stream stream, const ProductParams& p, const Int8Rows& x) {
  switch (p.w.dtype) {
    case DType::kQ4_0:
      return launch_product_int8<DType::kQ4_0>(stream, p, x);
    case DType::kQ4_1:
      return launch_product_int8<DType::kQ4_1>(stream, p, x);
    case DType::kQ5_0:
      return launch_product_int8<DType::kQ5_0>(stream, p, x);
    case DType::kQ5_1:
      return launch_product_int8<DType::kQ5_1>(stream, p, x);
    case DType::kQ8_0:
      return launch_product_int8<DType::kQ8_0>(stream, p, x);
    case DType::kIQ4_NL:
      return launch_product_int8<DType::kIQ4_NL>(stream, p, x);
    default:
      return product_int8_super(stream, p, x);
  }
}

int product_int8(Stream stream, const ProductParams& p, const Int8Rows& x) {
  return p.n_rows == 0 ? 0 : product_int8_blocks(stream, p, x);
}

}  // namespace fathom::cuda
