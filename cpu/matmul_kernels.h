// The innermost loops of products with stored weights: one table per instruction set, chosen once
// when the backend is made.  Drivers (matmul.cc, ffn.cc, experts.cc) cut the work and own the
// memory; kernels only compute and state what they assume.  Layouts: packed_blocks.h.
//
// Files compiled for one instruction set include this: plain structs only, no function bodies.
#pragma once

#include <stdint.h>

#include "cpu/packed_blocks.h"

namespace fathom::cpu {

// 32 activations rounded to int8: x[i] ~ scale * q[i], |q[i]| <= 127.
// A NaN or infinity among the 32 makes scale not finite, so that damage stays visible.
struct XBlock {
  float scale;       // largest magnitude / 127
  float scaled_sum;  // scale * sum of q: what a constant offset of the weights multiplies
  int32_t bias;      // -128 * sum of q: what codes that are 128 too high make of the products
  int16_t sums[2];   // sum of q[0..15], sum of q[16..31]
  int8_t q[32];
};
static_assert(sizeof(XBlock) == 48);

// Element types whose rows stay as in the file and are read by vector code.
enum PlainType { kPlainF32, kPlainF16, kPlainBF16, kPlainF8, kPlainTypes };

// Rows of activations: row i is x + (rows ? rows[i] : i) * x_stride.
// Rows of output: out + i * out_stride, always dense in i.

// out[i, c] (+)= sum over blocks of weights[c] . x[i], for packed row groups.
struct Int8Product {
  const uint8_t* weights;  // [n_groups] row groups of n_blocks packed blocks
  int64_t n_groups, n_blocks;
  const XBlock* x;
  int64_t x_stride;  // in XBlocks
  const int32_t* rows;
  int64_t n_rows;
  float* out;
  int64_t out_stride;
  int64_t n_cols;  // outputs that exist: 16 * (n_groups - 1) < n_cols <= 16 * n_groups
  bool add;
};

// out[i, c] (+)= sum_k x[i, k] * panel[k * panel_stride + c] for c < n_cols <= 16; f32 throughout,
// summed in ascending k.  16 values per k may be read.
struct PanelProduct {
  const float* x;
  int64_t x_stride;
  const int32_t* rows;
  int64_t n_rows;
  const float* panel;
  int64_t panel_stride;
  int64_t k;
  float* out;
  int64_t out_stride;
  int n_cols;
  bool add;
};

// out[i, c] (+)= sum_k scale(k) * weights[c, k] * x[i, k] for rows of plain weights as they lie,
// n_rows <= kDotRows.
struct PlainDot {
  const void* weights;
  int64_t weight_bytes;  // from row to row
  int64_t n_outputs, n;  // rows of weights, and their columns
  const float* scales;   // E4M3: one per kScaleColumns columns of all these rows; null: 1
  const float* x;
  int64_t x_stride;
  const int32_t* rows;
  int64_t n_rows;
  float* out;
  int64_t out_stride;
  bool add;
};
inline constexpr int kDotRows = 4;
inline constexpr int kScaleColumns = 128;  // of block-scaled F8_E4M3

struct MatmulKernels {
  const char* name;
  // Packed types in fast numerics: integers up to this many rows of activations, beyond it panels
  // of f32.  Measured with tests/bench/kernels_bench.cc.
  int64_t int8_max_rows;
  int64_t panel_rows;  // rows of activations that panel_product takes at a time

  // One row of `n` values, a multiple of 32, into n / 32 blocks.
  void (*quantize)(const float* x, int64_t n, XBlock* out);
  void (*int8_product[kPackedTypes])(const Int8Product&);
  // Columns [col0, col0 + n_cols) of a row group, both multiples of 32, into panel[n_cols][16].
  // Bit-exact to dequantize().
  void (*unpack[kPackedTypes])(const uint8_t* group, int64_t col0, int64_t n_cols, float* panel);
  // out[i] = scale * weights[i].  Bit-exact to dequantize() when scale is 1.
  void (*widen[kPlainTypes])(const void* weights, int64_t n, float scale, float* out);
  void (*plain_dot[kPlainTypes])(const PlainDot&);
  // panel[k * 16 + r] = rows[r * row_stride + k] for r < 16, k < n.
  void (*transpose16)(const float* rows, int64_t row_stride, int64_t n, float* panel);
  // rows[r * row_stride + k] = panel[k * 16 + r] for r < 16, k < n.
  void (*untranspose16)(const float* panel, int64_t n, float* rows, int64_t row_stride);
  void (*panel_product)(const PanelProduct&);
  // out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]; out may be gate.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);
  // out[i] = x[i] as bf16, to nearest even; NaN stays NaN.
  void (*to_bf16)(const float* x, int64_t n, uint16_t* out);
  // y[i] += a * x[i].
  void (*add_scaled)(float a, const float* x, int64_t n, float* y);
};

// Products of rows of E4M3 in fast numerics: scale * x is rounded to bf16 (nearest even), which
// holds the codes as they are; sums stay f32.
struct F8PairKernels {
  const char* name;
  void (*dot)(const PlainDot&);
};
const F8PairKernels& f8_pair_kernels_scalar() noexcept;
const F8PairKernels& f8_pair_kernels_avx512vbmi() noexcept;

// One per instruction set, in the files kernels_<isa>_matmul.cc.
const MatmulKernels& matmul_kernels_scalar() noexcept;
const MatmulKernels& matmul_kernels_avx2() noexcept;
const MatmulKernels& matmul_kernels_avx512() noexcept;
const MatmulKernels& matmul_kernels_amx() noexcept;

}  // namespace fathom::cpu
