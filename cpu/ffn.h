// The parts of a feed-forward network that the dense one (ffn.cc) and the routed experts
// (experts.cc) share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/product.h"

namespace fathom::cpu {

// Bytes of one row of hidden values, silu(gate) . up, for up to n_rows rows: int8 blocks where
// `down` is computed in int8 whatever the number of rows, else room for f32.
int64_t hidden_row_bytes(const CpuContext&, const Weight& down, int64_t n_rows) noexcept;

// Rows whose hidden values lie in the workspace at a time: whole blocks of kRowBlock in
// kHiddenBytes, one at least, and at most n_rows.  Wide networks and many experts are gone through
// in such parts, which costs two barriers each.
inline constexpr int64_t kHiddenBytes = int64_t{16} << 20;
int64_t hidden_rows_at_once(int64_t row_bytes, int64_t n_rows) noexcept;

// Scratch of each worker.
struct FfnTiles {
  int64_t floats;  // of one tile
  float* gate;     // [workers, floats]
  float* up;       // [workers, floats]
  float* panels;   // [workers, kPanelFloats], when a product needs panels
};
FfnTiles carve_tiles(Workspace&, const CpuContext&, int64_t n_rows, const Weight& gate,
                     const Weight& up, const Weight& down) noexcept;

// A slice of the hidden values of network `index`.
struct HiddenSlice {
  const Weight *gate, *up;
  int64_t index = 0;
  Method gate_method, up_method, down_method;
  int64_t hidden_row_bytes;
  Slice slice{};  // of the rows of gate and up, a multiple of 32 but for the last
};

// Computes the slice for the rows of x into hidden[x.n_rows, hidden_row_bytes], as int8 blocks or
// f32 as down_method wants.
void hidden_slice(const CpuContext&, const HiddenSlice&, const Activations& x, const FfnTiles&,
                  int worker, std::byte* hidden) noexcept;

// Rows written by hidden_slice() as the input of the product with `down`.
Activations hidden_rows(Method down_method, const std::byte* hidden, int64_t row_bytes,
                        int64_t n_rows) noexcept;

}  // namespace fathom::cpu
