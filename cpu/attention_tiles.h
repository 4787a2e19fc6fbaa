// Pieces that both forms of attention share: scratch of the workers, columns of queries, causal
// limits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/rows_kernels.h"
#include "cpu/workspace.h"
#include "fathom/kv_page.hpp"

namespace fathom::cpu {

static_assert(kKvSplitRows % kAttendTileRows == 0);

constexpr int64_t round_up(int64_t value, int64_t multiple) noexcept {
  return (value + multiple - 1) / multiple * multiple;
}

// Floats from row to row of a tile with rows of n values: whole units, and an odd number of cache
// lines, so that the rows of a narrow panel do not fall into the same few sets of the cache.
constexpr int64_t tile_stride(int64_t n) noexcept {
  const int64_t padded = round_up(n, kRowUnit);
  return padded / kRowUnit % 2 == 1 ? padded : padded + kRowUnit;
}

// A part of the workspace for each worker, all of the same size.
class WorkerParts {
 public:
  WorkerParts(Workspace& workspace, int64_t n_workers, int64_t part_bytes) noexcept
      : base_(workspace.take<std::byte>(n_workers * part_bytes)), part_bytes_(part_bytes) {}
  Workspace part(int worker) const noexcept {
    return Workspace(OpContext{base_ + worker * part_bytes_, part_bytes_});
  }

 private:
  std::byte* base_;
  int64_t part_bytes_;
};

// Zeros in columns [from, to) of the rows of a tile: they take part in products as padding.
inline void clear_columns(float* tile, int64_t stride, int64_t n_rows, int64_t from,
                          int64_t to) noexcept {
  for (int64_t row = 0; row < n_rows; ++row)
    std::fill(tile + row * stride + from, tile + row * stride + to, 0.0f);
}

// out[k * n_cols + col] = scale * q[k] for k in [first, first + n), where q = query(col) for
// col < n_used, and zero for the columns behind.  In pieces, so that the lines written stay in the
// cache until every column has been.
template <class Query>
inline void gather_columns(int64_t n, int64_t n_cols, int64_t n_used, float scale, Query&& query,
                           float* out) noexcept {
  constexpr int64_t kPiece = 64;
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t end = std::min(first + kPiece, n);
    for (int64_t col = 0; col < n_cols; ++col) {
      float* column = out + col;
      if (col < n_used) {
        const float* q = query(col);
        for (int64_t k = first; k < end; ++k) column[k * n_cols] = q[k] * scale;
      } else {
        for (int64_t k = first; k < end; ++k) column[k * n_cols] = 0;
      }
    }
  }
}

// Rows of the tile at `tile_row` that a query at `position` sees, at most tile_rows.
inline int32_t seen_rows(int64_t position, int64_t tile_row, int64_t tile_rows) noexcept {
  return static_cast<int32_t>(std::clamp<int64_t>(position + 1 - tile_row, 0, tile_rows));
}

}  // namespace fathom::cpu
