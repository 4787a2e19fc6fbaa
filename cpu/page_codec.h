// Rows of KV pages in each of their types (fathom/kv_page.hpp): where they lie, how f32 values are
// written into them, and the plain definition of reading them back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/rows_kernels.h"
#include "fathom/backend.hpp"
#include "fathom/kv_page.hpp"

namespace fathom::cpu {

RowType latent_row_type(KvType) noexcept;
// The RoPE columns of a page: f32, bf16 or f16.
RowType rope_row_type(KvType) noexcept;

// The longest run of rows from `row` on, at most max_rows, that lies in one page.
struct PageRun {
  KvType type;
  std::byte* latent;  // first row; the next ones follow at latent_row_bytes(type)
  std::byte* rope;    // at rope_row_bytes(type)
  int64_t n_rows;
};
PageRun page_run(const KvRows& rows, int64_t row, int64_t max_rows) noexcept;

// Values of a row are written in pieces of this many, or the rest at its end: whole blocks of
// every type.
inline constexpr int64_t kEncodeColumns = 128;

// Writes values [first, first + n) of a row of n_cols: first a multiple of kEncodeColumns, n
// kEncodeColumns or what is left.  Values are rounded to nearest even; f8: scale = largest
// magnitude / 448; q8_0 and q4_0: as quantize_q8_0 and quantize_q4_0, the last block padded with
// zeros.  A NaN or infinity makes its scale group NaN, so that damage stays visible.
void encode_columns(const RowKernels& kernels, RowType type, const float* values, int64_t first,
                    int64_t n, int64_t n_cols, std::byte* row) noexcept;

// out[c] = value c of a stored row, c < n_cols.  The definition that all decode kernels follow
// bit by bit.
void decode_row(RowType type, const std::byte* row, int64_t n_cols, float* out) noexcept;

// Rows [first_row, first_row + n_rows) of the session as f32: latent columns to latent[i *
// latent_stride], RoPE columns to rope[i * rope_stride].
void decode_pages(const RowKernels& kernels, const KvRows& rows, int64_t first_row, int64_t n_rows,
                  float* latent, int64_t latent_stride, float* rope, int64_t rope_stride) noexcept;

// Rewrites a page in place in a smaller type.
void convert_page(const RowKernels& kernels, const KvConvertParams&) noexcept;

}  // namespace fathom::cpu
