// How stored weights lie in memory: which types are packed (packed_blocks.h), which stay as the
// file has them, and the way from the file's rows into either.  The same on every machine, so
// weights never depend on the instruction set.
//
//   kRows    rows * row_bytes(), dense; then, when block_scaled, f32 scales
//            [ceil(rows / 128), ceil(cols / 128)] on the next cache line
//   kPacked  ceil(rows / 16) row groups; rows that do not exist are zero
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/packed_blocks.h"
#include "cpu/threads.h"
#include "fathom/backend.hpp"

namespace fathom::cpu {

enum class WeightLayout : uint8_t { kRows = 0, kPacked = 1 };

// The packed type for a dtype, or kPackedTypes when it has none.
PackedType packed_type(DType dtype) noexcept;

inline bool is_packed(const Weight& w) noexcept {
  return w.layout == static_cast<uint8_t>(WeightLayout::kPacked);
}
inline int64_t row_groups(const Weight& w) noexcept {
  return (w.rows + kGroupRows - 1) / kGroupRows;
}
// Bytes that 16 rows take, in either layout.
int64_t group_bytes(const Weight& w) noexcept;
// Offset of the scales in a block-scaled matrix.
int64_t scales_offset(const Weight& w) noexcept;
// One scale per 128 x 128 weights; null when the weight has none.
const float* block_scales(const Weight& w, int64_t index) noexcept;

// The three functions of the same name in Backend; contracts there.  `memory`: rows lie on the
// nodes that it says.
Status weight_layout(Weight& weight) noexcept;
Status store_rows(ThreadPool& threads, const Weight& weight, int64_t index, int64_t first_row,
                  int64_t n_rows, const void* rows, NodeMemory* memory = nullptr) noexcept;
Status store_scales(const Weight& weight, int64_t index, const float* scales) noexcept;

}  // namespace fathom::cpu
