// The choice of experts.  Contract: fathom/backend.hpp.
#pragma once

#include "cpu/cpu_context.h"

namespace fathom::cpu {

// n_experts is at most this; num_experts_per_tok <= n_experts, and the experts of topk_group groups
// are at least num_experts_per_tok.
inline constexpr int64_t kMaxExperts = 4096;

void route(const CpuContext&, const RouteParams&) noexcept;

}  // namespace fathom::cpu
