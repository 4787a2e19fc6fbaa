#include "cuda/weights.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstring>
#include <new>

#include "fathom/quant.hpp"

namespace fathom::cuda {
namespace {

constexpr int64_t kPlaneAlignment = 256;  // matrices and planes
constexpr int64_t kRowAlignment = 16;
constexpr int64_t kGroup = 8;  // values that a kernel reads at once
constexpr int64_t kRowGroup = 16;

int64_t round_up(int64_t n, int64_t multiple) noexcept {
  return (n + multiple - 1) / multiple * multiple;
}

template <class Block>
constexpr BlockShape shape_of(size_t code_at, size_t code_bytes) {
  return {Block::kElements, static_cast<int32_t>(sizeof(Block)), static_cast<int32_t>(code_at),
          static_cast<int32_t>(code_bytes)};
}

struct Row {
  DType dtype;
  BlockShape shape;
};
constexpr Row kShapes[] = {
    {DType::kF32, {1, 4, 0, 4}},
    {DType::kF16, {1, 2, 0, 2}},
    {DType::kBF16, {1, 2, 0, 2}},
    {DType::kF8E4M3, {1, 1, 0, 1}},
    {DType::kQ4_0, shape_of<BlockQ4_0>(2, 16)},
    {DType::kQ4_1, shape_of<BlockQ4_1>(4, 16)},
    {DType::kQ5_0, shape_of<BlockQ5_0>(6, 16)},
    {DType::kQ5_1, shape_of<BlockQ5_1>(8, 16)},
    {DType::kQ8_0, shape_of<BlockQ8_0>(2, 32)},
    {DType::kIQ4_NL, shape_of<BlockIQ4_NL>(2, 16)},
    {DType::kMXFP4, shape_of<BlockMXFP4>(1, 16)},
    {DType::kQ2_K, shape_of<BlockQ2_K>(16, 64)},
    {DType::kQ3_K, shape_of<BlockQ3_K>(0, 96)},  // hmask, qs
    {DType::kQ4_K, shape_of<BlockQ4_K>(16, 128)},
    {DType::kQ5_K, shape_of<BlockQ5_K>(16, 160)},  // qh, qs
    {DType::kQ6_K, shape_of<BlockQ6_K>(0, 192)},   // ql, qh
    {DType::kIQ4_XS, shape_of<BlockIQ4_XS>(8, 128)},
};

int64_t scale_blocks(int64_t n) noexcept {
  return (n + kF8ScaleBlock - 1) / kF8ScaleBlock;
}

}  // namespace

const BlockShape* block_shape(DType dtype) noexcept {
  for (const Row& row : kShapes)
    if (row.dtype == dtype) return &row.shape;
  return nullptr;
}

WeightView view_of(const Weight& w) noexcept {
  const BlockShape& block = *block_shape(w.dtype);
  WeightView v{.dtype = w.dtype,
               .block_scaled = w.block_scaled,
               .rows = w.rows,
               .cols = w.cols,
               .count = w.count,
               .matrix_bytes = w.matrix_bytes,
               .code_stride = 0,
               .meta_stride = 0,
               .meta_at = 0,
               .scales_at = 0,
               .data = static_cast<const uint8_t*>(w.data)};
  const int64_t n_blocks = block.elements == 1 ? round_up(w.cols, kGroup) : w.cols / block.elements;
  v.code_stride = round_up(n_blocks * block.code_bytes, kRowAlignment);
  v.meta_stride = round_up(n_blocks * block.meta_bytes(), 4);
  v.meta_at = round_up(w.rows * v.code_stride, kPlaneAlignment);
  v.scales_at = v.meta_at + round_up(w.rows * v.meta_stride, kPlaneAlignment);
  return v;
}

Status weight_layout(Weight& weight) noexcept try {
  const DTypeInfo& info = dtype_info(weight.dtype);
  if (block_shape(weight.dtype) == nullptr)
    return Status(Code::kUnsupported,
                  fmt::format("the CUDA backend has no kernels for {} weights", info.name));
  if (weight.block_scaled && weight.dtype != DType::kF8E4M3)
    return Status(Code::kUnsupported,
                  fmt::format("block scales belong to F8_E4M3 weights, not to {}", info.name));
  if (weight.rows < 1 || weight.cols < 1 || weight.cols % info.block_elements != 0)
    return Status(Code::kInvalidArgument,
                  fmt::format("a {} matrix of {} x {}: columns must be a positive multiple of {}",
                              info.name, weight.rows, weight.cols, info.block_elements));
  weight.layout = 1;
  const WeightView v = view_of(weight);
  int64_t bytes = v.scales_at;
  if (weight.block_scaled) bytes += scale_blocks(weight.rows) * scale_blocks(weight.cols) * 4;
  weight.matrix_bytes = round_up(bytes, kPlaneAlignment);
  return {};
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for a message");
}

void split_rows(const WeightView& v, int64_t n_rows, const void* file_rows, uint8_t* codes,
                uint8_t* meta) noexcept {
  const BlockShape& block = *block_shape(v.dtype);
  const int64_t n_blocks = v.cols / block.elements;
  const int64_t code_bytes = n_blocks * block.code_bytes,
                meta_bytes = n_blocks * block.meta_bytes();
  const auto* src = static_cast<const uint8_t*>(file_rows);
  const auto code_size = static_cast<size_t>(block.code_bytes);
  const auto before = static_cast<size_t>(block.code_at);
  const auto after = static_cast<size_t>(block.meta_bytes()) - before;
  for (int64_t r = 0; r < n_rows; ++r, codes += v.code_stride, meta += v.meta_stride) {
    if (block.meta_bytes() == 0) {
      std::memcpy(codes, src, static_cast<size_t>(code_bytes));
      src += code_bytes;
    } else {
      uint8_t *c = codes, *m = meta;
      for (int64_t b = 0; b < n_blocks; ++b, src += block.bytes) {
        std::memcpy(c, src + before, code_size);
        std::memcpy(m, src, before);
        std::memcpy(m + before, src + before + code_size, after);
        c += code_size;
        m += before + after;
      }
    }
    std::memset(codes + code_bytes, 0, static_cast<size_t>(v.code_stride - code_bytes));
    std::memset(meta + meta_bytes, 0, static_cast<size_t>(v.meta_stride - meta_bytes));
  }
}

}  // namespace fathom::cuda
