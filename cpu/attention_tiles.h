// Pieces that both forms of attention share: the carving of a worker's scratch, columns of queries,
// and causal limits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/rows_kernels.h"
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

// Hands out parts of a buffer in cache lines; with null it only counts.
class ScratchCarver {
 public:
  explicit ScratchCarver(void* base) noexcept : base_(static_cast<std::byte*>(base)) {}
  template <class T>
  T* take(int64_t count) noexcept {
    T* part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
  int64_t used_bytes() const noexcept { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
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

// Rows of the tile at `tile_row` that a query at `position` sees, at most kAttendTileRows.
inline int32_t seen_rows(int64_t position, int64_t tile_row) noexcept {
  return static_cast<int32_t>(std::clamp<int64_t>(position + 1 - tile_row, 0, kAttendTileRows));
}

}  // namespace fathom::cpu
