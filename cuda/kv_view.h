// The host's side of the cache's rows: page tables as a few segments (kernels.h).
#pragma once

#include "cuda/kernels.h"

namespace fathom::cuda {

// Describes rows [first, end) in `view`, or as many of them as kMaxSegments can, cut at a multiple
// of `unit` from the session's beginning; returns the end.  A unit never needs more segments than
// there are: unit / kKvTileRows <= kMaxSegments.
int64_t make_view(const KvRows& rows, int64_t first, int64_t end, int64_t unit,
                  KvView& view) noexcept;

}  // namespace fathom::cuda
