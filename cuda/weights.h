// How weights lie in device memory: codes and the blocks' other fields in two planes (kernels.h).
#pragma once

#include <cstdint>

#include "cuda/kernels.h"
#include "fathom/backend.hpp"

namespace fathom::cuda {

// A block of a type as files have it: codes are bytes [code_at, code_at + code_bytes), everything
// before and after them is meta, in its order.
struct BlockShape {
  int32_t elements, bytes, code_at, code_bytes;
  constexpr int32_t meta_bytes() const noexcept { return bytes - code_bytes; }
};
// Null for types without kernels here.
const BlockShape* block_shape(DType) noexcept;

// Errors: kUnsupported, kInvalidArgument.
Status weight_layout(Weight&) noexcept;
WeightView view_of(const Weight&) noexcept;

// Splits file rows into the two planes: codes [n_rows][code_stride], meta [n_rows][meta_stride],
// padding zeroed.  Host memory throughout.
void split_rows(const WeightView&, int64_t n_rows, const void* file_rows, uint8_t* codes,
                uint8_t* meta) noexcept;

}  // namespace fathom::cuda
