// Expanded attention over bf16 pairs: the same task as in attention_expanded.cc, where fast
// numerics have kernels for it.
#pragma once

#include "cpu/cpu_context.h"
#include "cpu/workspace.h"
#include "fathom/backend.hpp"

namespace fathom::cpu {

// Bounds the queries that a worker keeps transposed; the tile is expanded once per so many.
inline constexpr int64_t kMaxTaskTokens = 1024;

// A task's queries: tokens [first, end) of one head.
struct ExpandedTask {
  int64_t head, first, end;
};

// A worker's part of the workspace.
int64_t expanded_pairs_bytes(const AttendExpandedParams&) noexcept;
// The rows of the call for the queries of one task, whose running state has begun; context.pairs is
// not null.
void attend_expanded_pairs(const CpuContext&, const AttendExpandedParams&, const ExpandedTask&,
                           Workspace part) noexcept;

}  // namespace fathom::cpu
