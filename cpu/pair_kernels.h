// Attention over bf16 pairs: what fast numerics use where the processor multiplies two pairs of
// bf16 and adds to f32 in one step, at twice the rate of f32.  Beside rows_kernels.h: the same
// tiles, softmax and order of the sums; queries, keys, values and weights are rounded to bf16
// (nearest even), sums and the running state stay f32.
//
// A "pair" is 32 bits: the lower half the bf16 of the even index, the upper half of the odd one.
//
// Files compiled for one instruction set include this: plain structs only, no function bodies.
#pragma once

#include <stdint.h>

#include "cpu/rows_kernels.h"

namespace fathom::cpu {

// Rows of the cache per tile; both divide kKvSplitRows.  Larger than the f32 tiles: the running
// output is read and written once per tile.
inline constexpr int kPairTileRows = 128;      // absorbed form
inline constexpr int kPairExpandedRows = 256;  // expanded form
inline constexpr int kPairMaxRows = 256;
// Columns of one attend; units of 16.
inline constexpr int kPairMaxCols = 32;
inline constexpr int kPairUnit = 16;

// Columns of queries, as the pairs along k that attend reads:
//   out[c / 16 * unit_stride + i / 2 * 16 + c % 16] = pair(scale * columns[c][i], .. [i + 1])
// for c < round_up(n_columns, 16), i < n even; what is not there counts as zero.
struct PackColumns {
  const float* const* columns;  // [n_columns]
  int64_t n_columns, n;
  float scale;
  uint32_t* out;
  int64_t unit_stride;
};

// Rows as bf16 in the two forms that attend reads, each if not null; whole units of 16 columns are
// written, zeros behind n_cols.
//   rows[r * row_stride + c] = bf16 of x[r, c]
//   pairs[c / 16 * panel_stride + r / 2 * 16 + c % 16] = pair(x[r, c], x[r + 1, c]), r even;
//                                                        behind an odd end, zero
// Panels, because products walk down the rows of a few columns: rows 2 KB apart would share two
// sets of the cache.
struct PackRows {
  RowType type;  // kRowF32, kRowF16 or kRowBF16
  const void* x;
  int64_t x_bytes;  // from row to row
  int64_t n_rows, n_cols;
  uint16_t* rows;
  int64_t row_stride;
  uint32_t* pairs;
  int64_t panel_stride;
};

// Products of rows with panels of 16 outputs, rounded to bf16 in one of the forms of PackRows (the
// other is null).  Ascending k; k % 2 == 0.
struct ExpandPairs {
  const uint16_t* x;  // [n_rows][k]
  int64_t x_stride;
  int64_t n_rows, k;
  const uint32_t* weights;  // [n_panels][k / 2][16]
  int64_t weight_stride;    // from panel to panel
  int64_t n_panels;
  uint16_t* rows;
  int64_t row_stride;
  uint32_t* pairs;
  int64_t panel_stride;
};

// Bytes that will be wanted next: fetched into L2 while products are summed, a cache line per step,
// so that memory works while the arithmetic does.  A hint only.
struct FetchAhead {
  const void* p = nullptr;
  int64_t bytes = 0;
};
inline constexpr int kFetches = 8;

// As AttendTile in rows_kernels.h.
struct AttendPairs {
  const uint32_t* queries;  // units of PackColumns, [k / 2][16] each
  int64_t query_stride;     // from unit to unit
  int64_t n_cols;           // multiple of 16, at most kPairMaxCols
  int64_t n_used;
  const uint16_t* keys;  // [n_rows][k]
  int64_t key_stride, k;
  const uint32_t* values;  // panels of PackRows: [n_values / 16][round_up(n_rows, 2) / 2][16]
  int64_t value_stride;    // from panel to panel
  int64_t n_values;        // multiple of 16
  int64_t n_rows;          // at most kPairMaxRows
  const int32_t* limits;   // [n_cols], or null when every column sees every row
  float *max, *sum;        // [n_cols]
  float* out;              // [n_used][n_values]
  int64_t out_stride;
  float* scores;      // scratch [n_rows][n_cols]
  uint32_t* weights;  // scratch [round_up(n_rows, 2) / 2][n_cols]
  float* decay;       // scratch [n_cols]
  FetchAhead fetch[kFetches] = {};
};

struct PairKernels {
  const char* name;
  void (*pack_columns)(const PackColumns&);
  void (*pack_rows)(const PackRows&);
  void (*expand)(const ExpandPairs&);
  void (*attend)(const AttendPairs&);
};

const PairKernels& pair_kernels_scalar() noexcept;
const PairKernels& pair_kernels_avx512bf16() noexcept;

}  // namespace fathom::cpu
