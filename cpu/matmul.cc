// embed, matmul and heads_matmul: work cut by shape, slices computed by product.h.
#include "cpu/matmul.h"

#include <algorithm>
#include <atomic>

#include "cpu/gemm_onednn.h"
#include "cpu/product.h"

namespace fathom::cpu {
namespace {

struct MatmulScratch {
  XBlock* blocks;  // [n_rows, cols / 32] when some number of rows is computed in int8
  float* panels;   // [workers, kPanelFloats] when some is computed with panels
};

// n_products independent products of n_rows rows each (heads), or one.
MatmulScratch carve(Workspace& space, const CpuContext& ctx, const Weight& w, int64_t n_rows,
                    int64_t n_products, bool exact) noexcept {
  MatmulScratch s{};
  if (uses_method(ctx, w, n_rows, exact, Method::kInt8))
    s.blocks = space.take<XBlock>(n_products * n_rows * (w.cols / 32));
  if (uses_method(ctx, w, n_rows, exact, Method::kPanel))
    s.panels = space.take<float>(ctx.threads->size() * kPanelFloats);
  return s;
}

// ---- bf16 weights, many rows: oneDNN ----
//
// Only bf16: its f32 products reach what our panels do (95-100 of 113 GF on one Zen 4 core against
// 170-190 in bf16, at 128 rows of 2048), so f32 stays here.  Tiles of 128 rows by 256 columns are
// tasks; a tile is dense because the product that takes the caller's scratch wants it so.  A last
// block of fewer rows is filled up with zeros, so that oneDNN, which keeps what it generates for a
// shape, sees two shapes per number of columns of a weight and no more; below kDenseRows rows,
// panels are as fast.

constexpr int64_t kDenseRows = 64;
constexpr int64_t kDenseCols = 256;

bool is_dense_bf16(const CpuContext& ctx, const Weight& w, int64_t n_rows, bool exact) noexcept {
  return w.dtype == DType::kBF16 && ctx.numerics == Numerics::kFast && !exact &&
         ctx.isa >= Isa::kAvx512 && n_rows >= kDenseRows;
}

struct DenseScratch {
  uint16_t* x;      // [n_rows in whole blocks, cols]
  float* tiles;     // [workers, kRowBlock, kDenseCols]
  std::byte* gemm;  // [workers, gemm_bytes]
  int64_t gemm_bytes = 0;
};

DenseScratch carve_dense(Workspace& space, const CpuContext& ctx, const Weight& w,
                         int64_t n_rows) noexcept {
  DenseScratch s{};
  for (const int64_t n_cols : {std::min(kDenseCols, w.rows), w.rows % kDenseCols})
    s.gemm_bytes = std::max(s.gemm_bytes, Bf16Gemm::scratch_bytes(kRowBlock, n_cols, w.cols));
  s.gemm_bytes =
      (s.gemm_bytes + Workspace::kAlignment - 1) / Workspace::kAlignment * Workspace::kAlignment;
  s.x = space.take<uint16_t>(row_blocks(n_rows) * kRowBlock * w.cols);
  s.tiles = space.take<float>(ctx.threads->size() * kRowBlock * kDenseCols);
  s.gemm = space.take<std::byte>(ctx.threads->size() * s.gemm_bytes);
  // Booked and never touched: oneDNN has as much on the heap.
  if (s.gemm_bytes > 0) space.take<std::byte>(Bf16Gemm::kKeptBytes);
  return s;
}

// False when the heap refused oneDNN's small objects: the output is undefined.
bool matmul_dense(const CpuContext& ctx, const MatmulParams& p, const DenseScratch& s,
                  float* panels) noexcept {
  const Weight& w = *p.w;
  const int64_t n_blocks = row_blocks(p.n_rows);
  const int64_t n_slices = (w.rows + kDenseCols - 1) / kDenseCols;
  const int64_t last_cols = w.rows - (n_slices - 1) * kDenseCols;
  // By whether the columns are those of the last slice.
  const Bf16Gemm gemms[2] = {Bf16Gemm(kRowBlock, n_slices > 1 ? kDenseCols : 0, w.cols),
                             Bf16Gemm(kRowBlock, last_cols, w.cols)};
  for (const Bf16Gemm& gemm : gemms)
    if (gemm.refused() || gemm.scratch_bytes() > s.gemm_bytes) return false;
  std::atomic<bool> failed = false;

  ctx.threads->parallel_for(n_blocks * kRowBlock, [&](int64_t row, int) {
    if (row < p.n_rows)
      ctx.matmul->to_bf16(p.x + row * p.x_stride, w.cols, s.x + row * w.cols);
    else
      std::fill_n(s.x + row * w.cols, w.cols, uint16_t{0});
  });
  const auto* weights = reinterpret_cast<const uint16_t*>(w.matrix(0));
  constexpr int64_t kGroups = kDenseCols / kGroupRows;
  for_slices(ctx, w, kGroups, n_blocks, Hand::kOneByOne, [&](int64_t task, int worker) {
    const int64_t block = task / n_slices, slice = task % n_slices;
    const bool last_slice = slice == n_slices - 1;
    const int64_t n_rows = std::min(kRowBlock, p.n_rows - block * kRowBlock);
    const int64_t n_cols = last_slice ? last_cols : kDenseCols;
    float* tile = worker_part(s.tiles, worker, kRowBlock * kDenseCols);
    if (n_rows >= kDenseRows) {
      if (!gemms[last_slice].run(s.x + block * kRowBlock * w.cols,
                                 weights + slice * kDenseCols * w.cols, tile,
                                 s.gemm + worker * s.gemm_bytes))
        failed.store(true, std::memory_order_relaxed);
    } else {
      multiply_slice(
          ctx, Method::kPanel, w, 0, slice_at(w, kGroups, slice),
          {.x = p.x + block * kRowBlock * p.x_stride, .x_stride = p.x_stride, .n_rows = n_rows},
          worker_part(panels, worker, kPanelFloats), tile, n_cols, false);
    }
    for (int64_t i = 0; i < n_rows; ++i) {
      float* out = p.out + (block * kRowBlock + i) * p.out_stride + slice * kDenseCols;
      if (p.add)
        ctx.matmul->add_scaled(1.0f, tile + i * n_cols, n_cols, out);
      else
        std::copy_n(tile + i * n_cols, n_cols, out);
    }
  });
  return !failed.load(std::memory_order_relaxed);
}

// ---- heads, transposed ----

// Transposed products go through tiles of dequantised weights [in rows, out columns]: as many
// columns as a block of the type holds, as many rows as fit kPanelFloats.
int64_t tile_columns(const Weight& w) noexcept {
  return std::max<int64_t>(64, dtype_info(w.dtype).block_elements);
}
int64_t tile_rows(const Weight& w) noexcept {
  return kPanelFloats / tile_columns(w);
}

struct TransposedScratch {
  float* tiles;  // [workers, kPanelFloats]
};
TransposedScratch carve_transposed(Workspace& space, const CpuContext& ctx) noexcept {
  return {space.take<float>(ctx.threads->size() * kPanelFloats)};
}

void heads_matmul_transposed(const CpuContext& ctx, const OpContext& op,
                             const HeadsMatmulParams& p) noexcept {
  Workspace space(op);
  const TransposedScratch scratch = carve_transposed(space, ctx);
  const Weight& w = *p.w;
  const int64_t columns = tile_columns(w), rows = tile_rows(w);
  const int64_t n_tiles = (w.cols + columns - 1) / columns;
  const int64_t n_blocks = row_blocks(p.n_tokens);
  ctx.threads->parallel_for(w.count * n_tiles * n_blocks, [&](int64_t task, int worker) {
    const int64_t block = task % n_blocks;
    const int64_t col0 = task / n_blocks % n_tiles * columns;
    const int64_t head = task / n_blocks / n_tiles;
    const int64_t n_cols = std::min(columns, w.cols - col0);
    const int64_t token0 = block * kRowBlock;
    float* tile = scratch.tiles + worker * kPanelFloats;
    for (int64_t row0 = 0; row0 < w.rows; row0 += rows) {
      const int64_t n_rows = std::min(rows, w.rows - row0);
      unpack_tile(ctx, w, head, row0, n_rows, col0, n_cols, tile, columns);
      for (int64_t c = 0; c < n_cols; c += kGroupRows) {
        ctx.matmul->panel_product({
            .x = p.x + token0 * p.x_token_stride + head * p.x_head_stride + row0,
            .x_stride = p.x_token_stride,
            .rows = nullptr,
            .n_rows = std::min(kRowBlock, p.n_tokens - token0),
            .panel = tile + c,
            .panel_stride = columns,
            .k = n_rows,
            .out = p.out + token0 * p.out_token_stride + head * p.out_head_stride + col0 + c,
            .out_stride = p.out_token_stride,
            .n_cols = static_cast<int>(std::min<int64_t>(kGroupRows, n_cols - c)),
            .add = row0 > 0,
        });
      }
    }
  });
}

}  // namespace

const MatmulKernels& matmul_kernels(Isa isa) noexcept {
#ifdef __x86_64__
  if (isa == Isa::kAvx2) return matmul_kernels_avx2();
  if (isa == Isa::kAvx512) return matmul_kernels_avx512();
  if (isa == Isa::kAmx) return matmul_kernels_amx();
#endif
  static_cast<void>(isa);
  return matmul_kernels_scalar();
}

const F8PairKernels* f8_pair_kernels(Isa isa, Numerics numerics) noexcept {
#ifdef __x86_64__
  const CpuFeatures& features = cpu_features();
  if (numerics == Numerics::kFast && isa >= Isa::kAvx512 && features.avx512_bf16 &&
      features.avx512_vbmi)
    return &f8_pair_kernels_avx512vbmi();
#endif
  static_cast<void>(isa), static_cast<void>(numerics);
  return nullptr;
}

void embed(const CpuContext& ctx, const OpContext&, const EmbedParams& p) noexcept {
  const Weight& table = *p.table;
  ctx.threads->parallel_for(p.n_tokens, [&](int64_t t, int) {
    const int64_t row = p.tokens[t];
    float* out = p.out + t * table.cols;
    if (!is_packed(table)) {
      unpack_tile(ctx, table, 0, row, 1, 0, table.cols, out, table.cols);
      return;
    }
    alignas(64) float panel[kPanelCols * kGroupRows];
    for (int64_t k = 0; k < table.cols; k += kPanelCols) {
      const int64_t n = std::min(kPanelCols, table.cols - k);
      unpack_rows16(ctx, table, 0, row / kGroupRows, k, n, panel);
      for (int64_t i = 0; i < n; ++i) out[k + i] = panel[i * kGroupRows + row % kGroupRows];
    }
  });
}

int64_t workspace_bytes(const CpuContext& ctx, const MatmulParams& p) noexcept {
  Workspace space;
  carve(space, ctx, *p.w, p.n_rows, 1, p.exact);
  if (is_dense_bf16(ctx, *p.w, p.n_rows, p.exact)) carve_dense(space, ctx, *p.w, p.n_rows);
  return space.used_bytes();
}

bool matmul(const CpuContext& ctx, const OpContext& op, const MatmulParams& p) noexcept {
  if (p.n_rows == 0) return true;
  const Weight& w = *p.w;
  const Method method = choose_method(ctx, w, p.n_rows, p.exact);
  Workspace space(op);
  const MatmulScratch scratch = carve(space, ctx, w, p.n_rows, 1, p.exact);
  // A workspace that was measured while the heap was too short to ask oneDNN has no room for it,
  // and its session stays with panels.
  if (is_dense_bf16(ctx, w, p.n_rows, p.exact) && workspace_bytes(ctx, p) <= op.workspace_bytes) {
    const DenseScratch dense = carve_dense(space, ctx, w, p.n_rows);
    if (dense.gemm_bytes > 0) return matmul_dense(ctx, p, dense, scratch.panels);
  }
  Activations x{.x = p.x, .x_stride = p.x_stride, .n_rows = p.n_rows};
  if (method == Method::kInt8) {
    quantize_rows(ctx, p.x, p.x_stride, p.n_rows, w.cols, scratch.blocks);
    x.blocks = scratch.blocks;
    x.block_stride = w.cols / 32;
  }
  const int64_t groups = slice_groups(w, p.n_rows);
  const int64_t n_slices = slice_count(w, groups);
  const Hand hand = slice_hand(p.n_rows);
  for_slices(ctx, w, groups, row_blocks(p.n_rows), hand, [&](int64_t task, int worker) {
    const int64_t row0 = task / n_slices * kRowBlock;
    const Slice slice = slice_at(w, groups, task % n_slices);
    multiply_slice(ctx, method, w, 0, slice,
                   sub_rows(x, row0, std::min(kRowBlock, p.n_rows - row0)),
                   worker_part(scratch.panels, worker, kPanelFloats),
                   p.out + row0 * p.out_stride + slice.row0, p.out_stride, p.add);
  });
  return true;
}

int64_t workspace_bytes(const CpuContext& ctx, const HeadsMatmulParams& p) noexcept {
  Workspace space;
  if (p.transposed)
    carve_transposed(space, ctx);
  else
    carve(space, ctx, *p.w, p.n_tokens, p.w->count, false);
  return space.used_bytes();
}

void heads_matmul(const CpuContext& ctx, const OpContext& op, const HeadsMatmulParams& p) noexcept {
  if (p.n_tokens == 0) return;
  if (p.transposed) {
    heads_matmul_transposed(ctx, op, p);
    return;
  }
  const Weight& w = *p.w;
  const Method method = choose_method(ctx, w, p.n_tokens, false);
  Workspace space(op);
  const MatmulScratch scratch = carve(space, ctx, w, p.n_tokens, w.count, false);
  const int64_t blocks_per_row = w.cols / 32;
  if (method == Method::kInt8) {
    ctx.threads->parallel_for(p.n_tokens, [&](int64_t t, int) {
      for (int64_t head = 0; head < w.count; ++head)
        ctx.matmul->quantize(p.x + t * p.x_token_stride + head * p.x_head_stride, w.cols,
                             scratch.blocks + (t * w.count + head) * blocks_per_row);
    });
  }
  const int64_t groups = slice_groups(w, p.n_tokens);
  const int64_t n_slices = slice_count(w, groups), n_blocks = row_blocks(p.n_tokens);
  const Hand hand = slice_hand(p.n_tokens);
  for_slices(ctx, w, groups, w.count * n_blocks, hand, [&](int64_t task, int worker) {
    const Slice slice = slice_at(w, groups, task % n_slices);
    const int64_t token0 = task / n_slices % n_blocks * kRowBlock;
    const int64_t head = task / n_slices / n_blocks;
    Activations x{
        .x = p.x + head * p.x_head_stride, .x_stride = p.x_token_stride, .n_rows = p.n_tokens};
    if (method == Method::kInt8) {
      x.blocks = scratch.blocks + head * blocks_per_row;
      x.block_stride = w.count * blocks_per_row;
    }
    multiply_slice(ctx, method, w, head, slice,
                   sub_rows(x, token0, std::min(kRowBlock, p.n_tokens - token0)),
                   worker_part(scratch.panels, worker, kPanelFloats),
                   p.out + token0 * p.out_token_stride + head * p.out_head_stride + slice.row0,
                   p.out_token_stride, false);
  });
}

}  // namespace fathom::cpu
