// The host's side of the cache's rows: page tables as a few segments (kernels.h).
#pragma once

#include "cuda/kernels.h"

namespace fathom::cuda {

// Adds segments for rows [first, end) of a text to the table, or for as many of them as it has room
// for, cut at a multiple of `unit` from the text's beginning; returns the end: `first` where there
// is no room, and the table as it was.
int64_t add_segments(const KvRows& rows, int64_t first, int64_t end, int64_t unit,
                     KvTable& table) noexcept;

// Describes rows [first, end) in `view`, or as many of them as kMaxSegments can, cut at a multiple
// of `unit` from the session's beginning; returns the end.  A unit never needs more segments than
// there are: unit / kKvTileRows <= kMaxSegments.
int64_t make_view(const KvRows& rows, int64_t first, int64_t end, int64_t unit,
                  KvView& view) noexcept;

}  // namespace fathom::cuda
