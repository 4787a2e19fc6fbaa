// The methods by which a slice of a product is computed, and the choice among them.
#include "cpu/product.h"

#include <cassert>

#include "cpu/matmul.h"
#include "fathom/quant.hpp"

namespace fathom::cpu {
namespace {

static_assert(kScaleColumns == kF8ScaleBlock);

// Index into the tables of plain types, or kPlainTypes.
PlainType plain_type(DType dtype) noexcept {
  switch (dtype) {
    case DType::kF32:
      return kPlainF32;
    case DType::kF16:
      return kPlainF16;
    case DType::kBF16:
      return kPlainBF16;
    case DType::kF8E4M3:
      return kPlainF8;
    default:
      return kPlainTypes;
  }
}

int64_t scale_columns(const Weight& w) noexcept {
  return (w.cols + kF8ScaleBlock - 1) / kF8ScaleBlock;
}

// Values of a row of the kRows layout, columns [col0, col0 + n).
void widen_row(const MatmulKernels& kernels, const Weight& w, int64_t index, int64_t row,
               int64_t col0, int64_t n, float* out) noexcept {
  const std::byte* src = w.matrix(index) + row * row_bytes(w.dtype, w.cols);
  const PlainType type = plain_type(w.dtype);
  if (type == kPlainTypes) {
    // Whole blocks only; the odd ends of a request go through a buffer.
    const int64_t block = dtype_info(w.dtype).block_elements;
    const int64_t bytes = dtype_info(w.dtype).block_bytes;
    float values[kSuperBlock];
    for (const int64_t end = col0 + n; col0 < end;) {
      const int64_t skip = col0 % block;
      const std::byte* at = src + col0 / block * bytes;
      const int64_t whole = (end - col0) / block * block;
      if (skip == 0 && whole > 0) {
        dequantize(w.dtype, at, whole, out);
        out += whole;
        col0 += whole;
      } else {
        const int64_t part = std::min(block - skip, end - col0);
        dequantize(w.dtype, at, block, values);
        out = std::copy_n(values + skip, part, out);
        col0 += part;
      }
    }
    return;
  }
  const int64_t element = dtype_info(w.dtype).block_bytes;
  const float* scales = block_scales(w, index);
  if (scales == nullptr) {
    kernels.widen[type](src + col0 * element, n, 1.0f, out);
    return;
  }
  scales += row / kF8ScaleBlock * scale_columns(w);
  for (const int64_t end = col0 + n; col0 < end;) {
    const int64_t part = std::min(end, (col0 / kF8ScaleBlock + 1) * int64_t{kF8ScaleBlock}) - col0;
    kernels.widen[type](src + col0 * element, part, scales[col0 / kF8ScaleBlock], out);
    col0 += part;
    out += part;
  }
}

void multiply_int8(const MatmulKernels& kernels, const Weight& w, int64_t index, const Slice& slice,
                   const Activations& a, float* out, int64_t out_stride, bool add) noexcept {
  const PackedType type = packed_type(w.dtype);
  kernels.int8_product[type]({
      .weights = reinterpret_cast<const uint8_t*>(w.matrix(index)) + slice.group0 * group_bytes(w),
      .n_groups = slice.n_groups,
      .n_blocks = w.cols / kPackedBlocks[type].cols,
      .x = a.blocks,
      .x_stride = a.block_stride,
      .rows = a.rows,
      .n_rows = a.n_rows,
      .out = out,
      .out_stride = out_stride,
      .n_cols = slice.n_rows,
      .add = add,
  });
}

// Types without a vector reader: a row is widened piece by piece.
void multiply_widened(const MatmulKernels& kernels, const Weight& w, int64_t index,
                      const Slice& slice, const Activations& a, float* out, int64_t out_stride,
                      bool add) noexcept {
  constexpr int64_t kChunk = 8 * kSuperBlock;
  alignas(64) float values[kChunk];
  for (int64_t c = 0; c < slice.n_rows; ++c) {
    float sums[kDotRows] = {};
    for (int64_t k = 0; k < w.cols; k += kChunk) {
      const int64_t n = std::min(kChunk, w.cols - k);
      widen_row(kernels, w, index, slice.row0 + c, k, n, values);
      kernels.plain_dot[kPlainF32]({.weights = values,
                                    .weight_bytes = 0,
                                    .n_outputs = 1,
                                    .n = n,
                                    .scales = nullptr,
                                    .x = a.x + k,
                                    .x_stride = a.x_stride,
                                    .rows = a.rows,
                                    .n_rows = a.n_rows,
                                    .out = sums,
                                    .out_stride = 1,
                                    .add = k > 0});
    }
    for (int64_t i = 0; i < a.n_rows; ++i) {
      float& to = out[i * out_stride + c];
      to = add ? to + sums[i] : sums[i];
    }
  }
}

void multiply_rows(void (*dot)(const PlainDot&), const Weight& w, int64_t index, const Slice& slice,
                   const Activations& a, float* out, int64_t out_stride, bool add) noexcept {
  assert(a.n_rows <= kDotRows);
  const int64_t bytes_per_row = row_bytes(w.dtype, w.cols);
  const float* scales = block_scales(w, index);
  // All rows, or those that share their scales.
  for (int64_t c = 0, n = 0; c < slice.n_rows; c += n) {
    const int64_t row = slice.row0 + c;
    n = slice.n_rows - c;
    if (scales != nullptr) n = std::min(n, kF8ScaleBlock - row % kF8ScaleBlock);
    dot({.weights = w.matrix(index) + row * bytes_per_row,
         .weight_bytes = bytes_per_row,
         .n_outputs = n,
         .n = w.cols,
         .scales = scales == nullptr ? nullptr : scales + row / kF8ScaleBlock * scale_columns(w),
         .x = a.x,
         .x_stride = a.x_stride,
         .rows = a.rows,
         .n_rows = a.n_rows,
         .out = out + c,
         .out_stride = out_stride,
         .add = add});
  }
}

void multiply_panel(const CpuContext& ctx, const Weight& w, int64_t index, const Slice& slice,
                    const Activations& a, float* panels, float* out, int64_t out_stride,
                    bool add) noexcept {
  // Rows whose activations stay in L1 while all panels pass over them.
  const int64_t tile_rows = 2 * ctx.matmul->panel_rows;
  for (int64_t g0 = 0; g0 < slice.n_groups; g0 += kPanelGroups) {
    const int64_t n_groups = std::min(kPanelGroups, slice.n_groups - g0);
    for (int64_t k = 0; k < w.cols; k += kPanelCols) {
      const int64_t n = std::min(kPanelCols, w.cols - k);
      for (int64_t g = 0; g < n_groups; ++g)
        unpack_rows16(ctx, w, index, slice.group0 + g0 + g, k, n,
                      panels + g * kPanelCols * kGroupRows);
      for (int64_t row = 0; row < a.n_rows; row += tile_rows) {
        const Activations tile = sub_rows(a, row, std::min(tile_rows, a.n_rows - row));
        for (int64_t g = 0; g < n_groups; ++g) {
          const int64_t c = (g0 + g) * kGroupRows;
          ctx.matmul->panel_product({
              .x = tile.x + k,
              .x_stride = tile.x_stride,
              .rows = tile.rows,
              .n_rows = tile.n_rows,
              .panel = panels + g * kPanelCols * kGroupRows,
              .panel_stride = kGroupRows,
              .k = n,
              .out = out + row * out_stride + c,
              .out_stride = out_stride,
              .n_cols = static_cast<int>(std::min<int64_t>(kGroupRows, slice.n_rows - c)),
              .add = add || k > 0,
          });
        }
      }
    }
  }
}

}  // namespace

Method choose_method(const CpuContext& ctx, const Weight& w, int64_t n_rows, bool exact) noexcept {
  if (is_packed(w)) {
    const bool fast = ctx.numerics == Numerics::kFast && !exact;
    return fast && n_rows <= ctx.matmul->int8_max_rows ? Method::kInt8 : Method::kPanel;
  }
  if (w.dtype == DType::kF8E4M3 && ctx.f8_pairs != nullptr && !exact && n_rows <= kDotRows)
    return Method::kPairs;
  // The router is f32: a batch of texts must not choose other experts than each text alone.
  const int64_t most = w.dtype == DType::kF32 ? kDotRowsF32 : kDotRows;
  return n_rows <= most ? Method::kDot : Method::kPanel;
}

bool uses_method(const CpuContext& ctx, const Weight& w, int64_t n_rows, bool exact,
                 Method method) noexcept {
  // The method changes once, from few rows to many.
  return n_rows > 0 && (choose_method(ctx, w, 1, exact) == method ||
                        choose_method(ctx, w, n_rows, exact) == method);
}

Activations sub_rows(const Activations& a, int64_t first, int64_t n) noexcept {
  Activations part = a;
  part.n_rows = n;
  if (a.rows != nullptr) {
    part.rows = a.rows + first;
  } else {
    if (a.x != nullptr) part.x = a.x + first * a.x_stride;
    if (a.blocks != nullptr) part.blocks = a.blocks + first * a.block_stride;
  }
  return part;
}

int64_t slice_groups(const Weight& w, int64_t n_rows) noexcept {
  if (n_rows > kGroupRows) return kPanelGroups;
  constexpr int64_t kTaskBytes = 32 * 1024;
  const int64_t groups = kTaskBytes / std::max<int64_t>(1, group_bytes(w));
  return std::clamp<int64_t>(groups / 2 * 2, 2, kMaxSliceGroups);
}

int64_t slice_floats(int64_t n_rows) noexcept {
  const int64_t few = std::min<int64_t>(n_rows, kGroupRows) * kMaxSliceGroups * kGroupRows;
  const int64_t many = std::min(n_rows, kRowBlock) * kPanelGroups * kGroupRows;
  return std::max(few, many);
}

Slice slice_at(const Weight& w, int64_t groups, int64_t index) noexcept {
  const int64_t group0 = index * groups;
  const int64_t n_groups = std::min(groups, row_groups(w) - group0);
  const int64_t row0 = group0 * kGroupRows;
  return {group0, n_groups, row0, std::min(n_groups * kGroupRows, w.rows - row0)};
}

NodeCut slice_cut(const NodeShares& nodes, int64_t n_row_groups, int64_t groups) noexcept {
  NodeCut cut;
  cut.n_slices = (n_row_groups + groups - 1) / groups;
  for (int node = 0; node <= nodes.n_nodes(); ++node)
    cut.first[node] = (nodes.begin(n_row_groups, node) + groups - 1) / groups;
  return cut;
}

void multiply_slice(const CpuContext& ctx, Method method, const Weight& w, int64_t index,
                    const Slice& slice, const Activations& a, float* panels, float* out,
                    int64_t out_stride, bool add) noexcept {
  switch (method) {
    case Method::kInt8:
      multiply_int8(*ctx.matmul, w, index, slice, a, out, out_stride, add);
      break;
    case Method::kPairs:
      multiply_rows(ctx.f8_pairs->dot, w, index, slice, a, out, out_stride, add);
      break;
    case Method::kDot:
      for (int64_t row = 0; row < a.n_rows; row += kDotRows) {
        const Activations part = sub_rows(a, row, std::min<int64_t>(kDotRows, a.n_rows - row));
        float* to = out + row * out_stride;
        if (const PlainType type = plain_type(w.dtype); type == kPlainTypes)
          multiply_widened(*ctx.matmul, w, index, slice, part, to, out_stride, add);
        else
          multiply_rows(ctx.matmul->plain_dot[type], w, index, slice, part, to, out_stride, add);
      }
      break;
    case Method::kPanel:
      multiply_panel(ctx, w, index, slice, a, panels, out, out_stride, add);
      break;
  }
}

void quantize_rows(const CpuContext& ctx, const float* x, int64_t x_stride, int64_t n_rows,
                   int64_t cols, XBlock* out) noexcept {
  const auto one = [&](int64_t row) {
    ctx.matmul->quantize(x + row * x_stride, cols, out + row * (cols / 32));
  };
  // Handing out a task costs about as much as rounding a few thousand values.
  constexpr int64_t kWorthSharing = 16 * 1024, kTaskValues = 8 * 1024;
  if (n_rows * cols < kWorthSharing) {
    for (int64_t row = 0; row < n_rows; ++row) one(row);
    return;
  }
  const int64_t task_rows = std::max<int64_t>(1, kTaskValues / cols);
  ctx.threads->parallel_for((n_rows + task_rows - 1) / task_rows, [&](int64_t task, int) {
    const int64_t end = std::min(n_rows, (task + 1) * task_rows);
    for (int64_t row = task * task_rows; row < end; ++row) one(row);
  });
}

void unpack_rows16(const CpuContext& ctx, const Weight& w, int64_t index, int64_t row_group,
                   int64_t col0, int64_t n_cols, float* panel) noexcept {
  const MatmulKernels& kernels = *ctx.matmul;
  if (is_packed(w)) {
    const auto* matrix = reinterpret_cast<const uint8_t*>(w.matrix(index));
    kernels.unpack[packed_type(w.dtype)](matrix + row_group * group_bytes(w), col0, n_cols, panel);
    return;
  }
  const int64_t row0 = row_group * kGroupRows;
  const int64_t n_rows = std::min<int64_t>(kGroupRows, w.rows - row0);
  alignas(64) float rows[kGroupRows * kPanelCols];
  for (int64_t at = 0; at < n_cols; at += kPanelCols) {
    const int64_t n = std::min(kPanelCols, n_cols - at);
    for (int64_t r = 0; r < n_rows; ++r)
      widen_row(kernels, w, index, row0 + r, col0 + at, n, rows + r * kPanelCols);
    for (int64_t r = n_rows; r < kGroupRows; ++r) std::fill_n(rows + r * kPanelCols, n, 0.0f);
    kernels.transpose16(rows, kPanelCols, n, panel + at * kGroupRows);
  }
}

void unpack_tile(const CpuContext& ctx, const Weight& w, int64_t index, int64_t row0,
                 int64_t n_rows, int64_t col0, int64_t n_cols, float* tile,
                 int64_t stride) noexcept {
  const MatmulKernels& kernels = *ctx.matmul;
  if (!is_packed(w)) {
    for (int64_t r = 0; r < n_rows; ++r)
      widen_row(kernels, w, index, row0 + r, col0, n_cols, tile + r * stride);
    return;
  }
  alignas(64) float panel[kPanelCols * kGroupRows];
  for (int64_t r = 0; r < n_rows; r += kGroupRows) {
    for (int64_t at = 0; at < n_cols; at += kPanelCols) {
      const int64_t n = std::min(kPanelCols, n_cols - at);
      unpack_rows16(ctx, w, index, (row0 + r) / kGroupRows, col0 + at, n, panel);
      kernels.untranspose16(panel, n, tile + r * stride + at, stride);
    }
  }
}

}  // namespace fathom::cpu
