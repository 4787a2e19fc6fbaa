// One slice of a product with stored weights, computed by one worker: what matmul, heads_matmul,
// ffn and experts cut their work into.  Cuts depend on shapes alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/cpu_context.h"
#include "cpu/matmul_kernels.h"
#include "cpu/weight_layout.h"
#include "cpu/workspace.h"
#include "fathom/backend.hpp"

namespace fathom::cpu {

// How a product is computed.
//   kInt8   packed weights times activations in int8 (fast numerics)
//   kPairs  activations rounded to bf16 times rows of E4M3 as they lie, for very few rows (fast
//           numerics, where the context has f8_pairs)
//   kDot    f32 activations times rows of weights as they lie, for very few rows
//   kPanel  f32 activations times dequantised panels of 256 columns by 16 rows
enum class Method : uint8_t { kInt8, kPairs, kDot, kPanel };

Method choose_method(const CpuContext&, const Weight&, int64_t n_rows, bool exact) noexcept;
// Whether some number of rows in [1, n_rows] is computed with `method`.
bool uses_method(const CpuContext&, const Weight&, int64_t n_rows, bool exact,
                 Method method) noexcept;

// The rows that are multiplied: row i is row (rows ? rows[i] : i) of x, of blocks, or of both.
struct Activations {
  const float* x = nullptr;  // for all methods but kInt8
  int64_t x_stride = 0;
  const XBlock* blocks = nullptr;  // for kInt8
  int64_t block_stride = 0;        // in blocks
  const int32_t* rows = nullptr;
  int64_t n_rows = 0;
};
// Rows first .. first + n - 1 of `a`.
Activations sub_rows(const Activations& a, int64_t first, int64_t n) noexcept;

inline constexpr int64_t kDotRowsF32 = 64;  // rows up to which f32 weights take kDot
inline constexpr int64_t kRowBlock = 128;   // rows of activations per task: what stays in L2
inline constexpr int64_t kPanelCols = 256;
inline constexpr int64_t kPanelGroups = 4;  // panels that are filled before they are used
inline constexpr int64_t kPanelFloats = kPanelGroups * kPanelCols * kGroupRows;
inline constexpr int64_t kMaxSliceGroups = 16;

// The part of scratch[workers, floats] that belongs to a worker; null when there is none.
inline float* worker_part(float* scratch, int worker, int64_t floats) noexcept {
  return scratch == nullptr ? nullptr : scratch + worker * floats;
}

inline int64_t row_blocks(int64_t n_rows) noexcept {
  return (n_rows + kRowBlock - 1) / kRowBlock;
}

// Row groups per task, an even number: about 32 KB of weights for few rows, so that tasks are
// worth handing out; kPanelGroups for many.
int64_t slice_groups(const Weight&, int64_t n_rows) noexcept;
// Floats of a tile that holds the outputs of a slice for up to n_rows rows, or for a part of them
// where slices of many groups meet many rows.  At least min(n_rows, 16) rows fit.
int64_t slice_floats(int64_t n_rows) noexcept;

// Rows [16 * group0, 16 * (group0 + n_groups)) of a matrix, those that exist.
struct Slice {
  int64_t group0, n_groups;
  int64_t row0, n_rows;
};
inline int64_t slice_count(const Weight& w, int64_t groups) noexcept {
  return (row_groups(w) + groups - 1) / groups;
}
Slice slice_at(const Weight&, int64_t groups, int64_t index) noexcept;

// Which node's rows each slice of `groups` row groups begins with; n_nodes() of them.
NodeCut slice_cut(const NodeShares&, int64_t n_row_groups, int64_t groups) noexcept;

// How tasks that multiply so many rows with a slice each are handed out.  With few, all time goes
// into reading weights, and the processor looks ahead best in a run of slices.  With many, rows may
// be shared out unevenly among experts.
inline Hand slice_hand(int64_t n_rows) noexcept {
  return n_rows <= kGroupRows ? Hand::kRuns : Hand::kOneByOne;
}

// fn(task, worker) for tasks [0, n_outer * slice_count(w, groups)); task % slice_count() is a slice
// of rows of w, which threads of the node that has these rows take first.
template <class F>
void for_slices(const CpuContext& ctx, const Weight& w, int64_t groups, int64_t n_outer, Hand hand,
                F&& fn) noexcept {
  const int64_t n_tasks = n_outer * slice_count(w, groups);
  if (ctx.nodes == nullptr)
    ctx.threads->parallel_for(n_tasks, fn, hand);
  else
    ctx.threads->parallel_for(n_tasks, slice_cut(*ctx.nodes, row_groups(w), groups), fn, hand);
}

// out[i, c] (+)= a[i] . row (slice.row0 + c) of matrix `index`, c < slice.n_rows.
//   panels  [kPanelFloats] scratch of this worker, for kPanel
// a.n_rows is at most kRowBlock.
void multiply_slice(const CpuContext&, Method, const Weight&, int64_t index, const Slice&,
                    const Activations&, float* panels, float* out, int64_t out_stride,
                    bool add) noexcept;

// Rounds n_rows rows of `cols` values (a multiple of 32) to out[n_rows, cols / 32], on all threads
// when that is worth it.
void quantize_rows(const CpuContext&, const float* x, int64_t x_stride, int64_t n_rows,
                   int64_t cols, XBlock* out) noexcept;

}  // namespace fathom::cpu
