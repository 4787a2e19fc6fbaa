// Launch functions of the kernels: plain C++ with parameter structs, no CUDA syntax.  Each queues
// its work on the stream and returns 0, or the error of a launch that the device refused.
// Pointers are device memory unless said.  What the operations mean: fathom/backend.hpp.
#pragma once

#include <cstdint>

#include "cuda/launch_queue.h"
#include "fathom/backend.hpp"

namespace fathom::cuda {

using Stream = LaunchSink*;  // null: launches run at once (the emulation alone)
inline constexpr int kEmulationFailed = -1;
inline constexpr int kNoKernel = -2;  // weight_layout() refuses such types

// ---- weights ----------------------------------------------------------------------------------
//
// A matrix is two planes, rows of codes and rows of the blocks' other fields ("meta": scales,
// minima), so that codes are read in whole 8 and 16 byte words whatever the block's size in files:
//
//   codes [rows][code_stride] | meta [rows][meta_stride] | f32 scales per 128 x 128 (block_scaled)
struct WeightView {
  DType dtype;
  bool block_scaled;
  int64_t rows, cols, count, matrix_bytes;
  int64_t code_stride, meta_stride;
  int64_t meta_at, scales_at;  // bytes from the start of the matrix
  const uint8_t* data;
};

// ---- products ---------------------------------------------------------------------------------

// Which rows of x a matrix is multiplied with.  All null: every matrix with all n_rows rows.
struct RowGroups {
  const int32_t* n_active = nullptr;  // [1] groups that have rows
  const int32_t* active = nullptr;    // [n_active] matrix of each group
  const int32_t* first = nullptr;     // [count + 1] first sorted row of each matrix
  const int32_t* tokens = nullptr;    // [sorted rows] row of x; null: the sorted row itself
};

// out[i, r] (+)= sum_c x[token(i), c] * w[r, c] for the rows i of each group.
struct ProductParams {
  WeightView w;
  WeightView up;  // data not null: out = silu(w x) * (up x); of w's dtype and shape
  const float* x;
  int64_t x_stride, x_matrix_stride;  // values; matrix stride: where all matrices take all rows
  float* out;
  int64_t out_stride, out_matrix_stride;
  int64_t n_rows;  // all groups together
  bool add;
  RowGroups groups;
};
// For few rows: every weight is read once per eight rows, f32 arithmetic throughout.
int product_few_rows(Stream, const ProductParams&);
// Rows of x as signed bytes: each 16 values have a scale, x = d * code; sum is d times the sum of
// the codes.
struct alignas(8) Int8Scale {
  float d, sum;
};
struct Int8Rows {
  uint8_t* codes;     // [n_rows, cols]
  Int8Scale* scales;  // [n_rows, cols / 16]
};
// n_cols: a multiple of 32.
int round_to_int8(Stream, const float* x, int64_t x_stride, int64_t n_rows, int64_t n_cols,
                  const Int8Rows& out);
// As product_few_rows, with rounded rows instead of p.x: integer products, f32 sums of segments.
int product_int8(Stream, const ProductParams&, const Int8Rows& x);
bool has_int8_product(DType) noexcept;
// Tensor cores: weights and x rounded to bf16 tile by tile, f32 sums.
int product_tiles(Stream, const ProductParams&);
// out[i, c] = sum_r x[i, r] * w[r, c]: the other way through the same matrix.  No groups, no add.
int product_transposed(Stream, const ProductParams&);

// Rows [first_row, first_row + n_rows) of `n_matrices` matrices from first_matrix on as dense
// values [n_matrices, n_rows, cols], f32 or bf16.
struct DequantizeParams {
  WeightView w;
  int64_t first_matrix, n_matrices, first_row, n_rows;
  void* out;
  bool bf16;
};
int dequantize_rows(Stream, const DequantizeParams&);

// x [n_rows, n_cols] as dense bf16.
int round_to_bf16(Stream, const float* x, int64_t x_stride, int64_t n_rows, int64_t n_cols,
                  uint16_t* out);
// gate = silu(gate) * up, n values.
int swiglu(Stream, float* gate, const float* up, int64_t n);
int add(Stream, const AddParams&);

// ---- sampling ---------------------------------------------------------------------------------

// Slices of a row that find their likeliest tokens by themselves: found [n_rows, slices, k],
// broken [n_rows, slices].
int64_t top_k_slices(int64_t n_cols) noexcept;
int top_k(Stream, const TopKParams&, TokenLogit* found, TokenLogit* broken);

// ---- rows -------------------------------------------------------------------------------------

int embed(Stream, const WeightView& table,
          const EmbedParams&);  // tokens: host memory, read at once
int rms_norm(Stream, const RmsNormParams&);
int rope_table(Stream, const RopeTableParams&);  // inv_freq: host memory, read at once
int rope(Stream, const RopeParams&);

// ---- the cache --------------------------------------------------------------------------------

// Neighbouring pages of one type at equal distances, which is what a cache mostly is: a few of
// these describe the rows of any context, and travel as a kernel's parameter.
struct KvSegment {
  uint8_t* latent;  // row 0 of the layer in the segment's first page
  int64_t page_stride;
  int32_t first_page, n_pages;
  int32_t rope_at;  // bytes from latent row 0 to rope row 0 of a page
  int32_t latent_bytes, rope_bytes;
  KvType type;
};
struct KvTable {
  static constexpr int kMaxSegments = 32;
  KvSegment segments[kMaxSegments];
  int32_t n_segments;
  int32_t page_tokens, rank, rope;
};
// Rows of one text.
struct KvView : KvTable {
  int64_t first_row, end_row;
};

struct AppendParams {
  const float* kv;
  int64_t kv_stride;
  const float* norm_weight;
  float eps;
  const float* cos_sin;
  KvView rows;
};
int kv_append(Stream, const AppendParams&);
int kv_convert(Stream, const KvConvertParams&);

// Rows [first_row, end_row) decoded: latents [n, rank] and rope columns [n, rope], f32 or bf16.
struct DecodeRowsParams {
  KvView rows;
  void* latent;
  void* rope;
  bool bf16;
};
int decode_rows(Stream, const DecodeRowsParams&);

// ---- attention --------------------------------------------------------------------------------

// Rows of the cache that one block attends; partial results are merged at multiples of it.
inline constexpr int64_t kPartialRows = 256;
static_assert(kKvSplitRows % kPartialRows == 0);

// Rows of one text and the queries that attend to them; column = token * n_heads + head.  Several
// texts go in one launch: their splits follow each other as blocks, their results as parts.
struct AttendPiece {
  const float *q_latent, *q_rope;  // of the first token
  int64_t first_position;
  int32_t first_row, end_row;  // first_row is a multiple of kPartialRows
  int32_t first_split;         // its blocks in the launch begin there
  int32_t first_part;          // of split s and column c: first_part + s * n_columns + c
  int32_t n_columns;
  int16_t first_segment, end_segment;  // of the table
};
inline constexpr int kMaxPieces = 16;

struct PartialParams {
  int64_t q_latent_token_stride, q_latent_head_stride;
  int64_t q_rope_token_stride, q_rope_head_stride;
  int64_t n_heads;
  float scale;
  int32_t n_pieces, n_splits, most_columns;  // splits of all pieces, columns of the widest
  AttendPiece pieces[kMaxPieces];
  KvTable rows;
  float *max, *sum, *out;    // [n_parts], out [n_parts, rank]
  int64_t max_shared_bytes;  // that a block of this device can have
};
// Attention over each split by itself: one partial result per split and column.  Of the two for
// tensor cores one takes the splits whose pages are all f16 and the other one all others, so that
// a split's bits depend on its own rows alone.
int attend_partial_exact(Stream, const PartialParams&);
int attend_partial_f16(Stream, const PartialParams&);
int attend_partial_mma(Stream, const PartialParams&);
bool attend_partial_mma_fits(int64_t rank, int64_t rope) noexcept;

// The running state of a text's columns, and the parts to merge into it.
struct MergePiece {
  float *max, *sum, *out;  // [n_columns], out [n_columns, rank]
  int32_t first_part, n_splits, n_columns;
  bool begin, finish;
};
struct MergeParams {
  int64_t rank;
  const float *part_max, *part_sum, *part_out;
  int32_t n_pieces, most_columns;
  MergePiece pieces[kMaxPieces];
};
int attend_merge(Stream, const MergeParams&);

// A tile of keys and values, expanded for n_heads heads from first_head on.
struct ExpandedTileParams {
  const float* q;
  int64_t q_token_stride, q_head_stride;
  int64_t n_tokens, n_heads_all, first_head, n_heads;
  int64_t nope, rope, value;
  int64_t first_position, first_row, n_rows;
  float scale;
  const void* keys;        // [n_heads, n_rows, nope]
  const void* rope_keys;   // [n_rows, rope]
  const void* values;      // [n_heads, n_rows, value]
  float *max, *sum, *out;  // running state; out [n_tokens, n_heads_all, value]
  bool begin, finish;
};
int attend_tile_exact(Stream, const ExpandedTileParams&);  // f32 keys and values
int attend_tile_mma(Stream, const ExpandedTileParams&);    // bf16
bool attend_tile_mma_fits(int64_t nope, int64_t rope, int64_t value) noexcept;

// ---- experts ----------------------------------------------------------------------------------

inline constexpr int64_t kMaxExperts = 1024;
int route(Stream, const RouteParams&);

// Sorts the (token, k) pairs by expert; equal experts keep their order.
struct SortParams {
  const int32_t* ids;  // [n_pairs]
  int64_t n_pairs, num_experts_per_tok;
  int64_t first_expert, n_experts;  // those that are here
  int32_t* first;                   // [n_experts + 1]
  int32_t* active;                  // [n_experts]
  int32_t* n_active;                // [1]
  int32_t* tokens;                  // [n_pairs] token of each sorted pair
  int32_t* places;  // [n_pairs] where each pair went; -1: an expert that is not here
};
int sort_by_expert(Stream, const SortParams&);

// out[t, first_col + c] (+)= sum over the token's pairs, by ascending expert, of weight *
// rows[place, c].
struct CombineParams {
  const float* rows;  // [n_pairs, n_cols]
  const int32_t* places;
  const float* weights;  // [n_tokens, num_experts_per_tok]
  int64_t n_tokens, num_experts_per_tok;
  int64_t n_cols, first_col, out_stride;
  float* out;
  bool add;  // to what out holds
};
int combine_experts(Stream, const CombineParams&);

// out[pair, first_col + c] = rows[place, c] for the pairs whose expert is here.
struct KeepRowsParams {
  const float* rows;      // [n_pairs, n_cols]
  const int32_t* places;  // [n_pairs]
  int64_t n_pairs;
  int64_t n_cols, first_col, out_stride;
  float* out;
};
int keep_expert_rows(Stream, const KeepRowsParams&);
int sum_experts(Stream, const SumExpertsParams&);

}  // namespace fathom::cuda
