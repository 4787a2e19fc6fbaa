// Trace: an optional observer of a forward pass, for tests and for finding where two runs part.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

namespace fathom::nn {

struct TracePoint {
  std::string_view
      name;          // "embed", "layer" (residual stream after it), "route_ids", "route_weights"
  int64_t layer;     // -1 for embed
  const void* data;  // host-accessible devices only: f32 or i32 [n_rows, n_cols], after a sync
  int64_t n_rows, n_cols;
  int64_t first_position;
};
using Trace = std::function<void(const TracePoint&)>;

}  // namespace fathom::nn
