// Attention over typed pages in its two forms.  Contracts: fathom/backend.hpp.
//
// Both read the cache in place: a tile of kAttendTileRows rows at a time is decoded into the
// worker's part of the workspace, used by all columns at hand, and forgotten.  Tiles begin at
// absolute multiples, and what a (token, head) gets never depends on the tokens and heads beside
// it; so page size, thread count, and the cut of rows into calls do not change a bit, and work may
// be scheduled as the machine likes.
#pragma once

#include "cpu/cpu_context.h"

namespace fathom::cpu {

// From shapes alone; the same for every context length.
int64_t workspace_bytes(const CpuContext&, const AttendAbsorbedParams&) noexcept;
int64_t workspace_bytes(const CpuContext&, const AttendExpandedParams&) noexcept;

void attend_absorbed(const CpuContext&, const OpContext&, const AttendAbsorbedParams&) noexcept;
void merge_attention(const CpuContext&, const MergeAttentionParams&) noexcept;
void attend_expanded(const CpuContext&, const OpContext&, const AttendExpandedParams&) noexcept;

}  // namespace fathom::cpu
