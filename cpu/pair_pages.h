// Rows of the cache as bf16 pairs: pages of 16 bits are read as they lie, others row by row through
// f32.
#pragma once

#include "cpu/cpu_context.h"
#include "cpu/pair_kernels.h"
#include "cpu/workspace.h"
#include "fathom/kv_page.hpp"

namespace fathom::cpu {

// Where rows of the cache go: forms of PackRows, the RoPE columns as rows only.
struct PairRows {
  uint16_t* latent;  // null: not wanted
  int64_t latent_stride;
  uint32_t* pairs;  // of the latent columns; null: not wanted
  int64_t panel_stride;
  uint16_t* rope;
  int64_t rope_stride;
};

// Floats of `stage`, for pack_pages().
int64_t pair_stage_floats(const KvLayout&) noexcept;
// Rows [first_row, first_row + n_rows) of the session; first_row is even.  Rows up to `end` will be
// wanted next, and those close behind are fetched ahead.
void pack_pages(const CpuContext&, const KvRows& rows, int64_t first_row, int64_t n_rows,
                int64_t end, float* stage, const PairRows& out) noexcept;
// The planes of rows [first_row, first_row + n_rows), page by page, of the first pages.
void fetch_ahead(const KvRows& rows, int64_t first_row, int64_t n_rows,
                 FetchAhead (&out)[kFetches]) noexcept;

}  // namespace fathom::cpu
