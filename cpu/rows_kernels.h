// The innermost loops over rows of activations and of the KV cache: norm, RoPE, decoding of cached
// rows, and attention over one tile of them.  One table per instruction set, chosen once when the
// backend is made.  Drivers (rms_norm.cc, rope.cc, page_codec.cc, attention*.cc) cut the work and
// own the memory; kernels only compute and state what they assume.
//
// Files compiled for one instruction set include this: plain structs only, no function bodies.
#pragma once

#include <stdint.h>

namespace fathom::cpu {

// Rows of the cache that attention works on at a time.  Divides kKvSplitRows, and tiles begin at
// absolute multiples of it: results do not depend on how rows are handed over.
inline constexpr int kAttendTileRows = 64;
// Columns of one attend_tile: (token, head) pairs in the absorbed form, tokens in the expanded.
inline constexpr int kAttendMaxCols = 32;
// Widths of values and of expanded keys are padded with zeros to multiples of this.
inline constexpr int kRowUnit = 16;

// How the values of one cached row are stored; see fathom/kv_page.hpp.
enum RowType { kRowF32, kRowF16, kRowBF16, kRowF8, kRowQ8_0, kRowQ4_0, kRowTypes };

// out[i, c] = value c of stored row i, c < n_cols.
struct DecodeRows {
  RowType type;
  const void* rows;  // any alignment
  int64_t row_bytes;
  int64_t n_rows, n_cols;
  float* out;
  int64_t out_stride;
};

// out[i, c] = sum_k x[i, k] * panel(c / 16)[k, c % 16], c < 16 * n_panels; ascending k.
struct ExpandRows {
  const float* x;
  int64_t x_stride;
  int64_t n_rows, k;
  const float* panels;  // [n_panels][k][16]
  int64_t panel_stride;
  int64_t n_panels;
  float* out;
  int64_t out_stride;
};

// One step of the online softmax: attention of n_cols query columns over the rows of one tile.
//   score[row, col] = sum_k keys[row, k] * queries[k, col], seen when row < limits[col]
//   max' = max(max, scores), sum' = sum * exp(max - max') + sum_row exp(score - max'),
//   out'[col] = out[col] * exp(max - max') + sum_row exp(score - max') * values[row]
// Sums over k and rows run upwards; what a column gets does not depend on its neighbours.
// Columns [n_used, n_cols) fill the last vector: they have scores, max and sum, and no out.
struct AttendTile {
  const float* queries;  // [k][n_cols], times the softmax scale
  int64_t n_cols;        // multiple of RowKernels::lanes, at most kAttendMaxCols
  int64_t n_used;
  const float* keys;  // [n_rows][k]
  int64_t key_stride, k;
  const float* values;  // [n_rows][n_values]
  int64_t value_stride;
  int64_t n_values;       // multiple of kRowUnit
  int64_t n_rows;         // at most kAttendTileRows
  const int32_t* limits;  // [n_cols], or null when every column sees every row
  float* max;             // [n_cols]; -infinity before the first row
  float* sum;             // [n_cols]; 0 before the first row
  float* out;             // [n_used][n_values]; finite before the first row
  int64_t out_stride;
  float* scores;  // scratch [kAttendTileRows][n_cols]
  float* decay;   // scratch [n_cols]
};

// Adds a partial result to the running state of n_cols columns, each by itself.
// A partial maximum of -infinity says that the column has seen no row: it is left alone.
struct MergeColumns {
  int64_t n_cols, n_values;
  float *max, *sum, *out;  // [n_cols], [n_cols], [n_cols][n_values]; out is not read while max is
  int64_t out_stride;      // -infinity
  const float *part_max, *part_sum, *part_out;
  int64_t part_stride;
};

struct RowKernels {
  const char* name;
  int lanes;  // columns of attend_tile come in multiples of it

  double (*sum_squares)(const float* x, int64_t n);
  // out[i] = x[i] * scale * weight[i]; out may be x.
  void (*scale)(const float* x, float scale, const float* weight, int64_t n, float* out);
  // (x[2i], x[2i + 1]) -> (x[2i] c - x[2i + 1] s, x[2i + 1] c + x[2i] s), i < n / 2, with
  // (c, s) = cos_sin[i]; out may be x.
  void (*rotate)(const float* x, const float* cos_sin, int64_t n, float* out);
  // Nearest f16, ties to even.
  void (*pack_f16)(const float* x, int64_t n, uint16_t* out);
  void (*decode)(const DecodeRows&);
  void (*expand)(const ExpandRows&);
  void (*attend_tile)(const AttendTile&);
  void (*merge)(const MergeColumns&);
};

const RowKernels& row_kernels_scalar() noexcept;
const RowKernels& row_kernels_avx2() noexcept;
const RowKernels& row_kernels_avx512() noexcept;
const RowKernels& row_kernels_amx() noexcept;

}  // namespace fathom::cpu
