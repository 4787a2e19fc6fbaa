// ffn: out (+)= down * (silu(gate * x) . (up * x)).  A task computes the same slice of gate and up,
// joins them, and leaves the hidden values in the form that the product with `down` reads.
#include <algorithm>

#include "cpu/ffn.h"
#include "cpu/matmul.h"

namespace fathom::cpu {
namespace {

struct FfnScratch {
  XBlock* x_blocks;   // [n_tokens, hidden_size / 32], when gate or up is computed in int8
  int64_t rows;       // of a part
  std::byte* hidden;  // [rows, hidden_row_bytes()]
  FfnTiles tiles;
};

FfnScratch carve(Workspace& space, const CpuContext& ctx, const FfnParams& p) noexcept {
  FfnScratch s{};
  const auto int8 = [&](const Weight* w) {
    return uses_method(ctx, *w, p.n_tokens, false, Method::kInt8);
  };
  if (int8(p.gate) || int8(p.up)) s.x_blocks = space.take<XBlock>(p.n_tokens * (p.gate->cols / 32));
  const int64_t row_bytes = hidden_row_bytes(ctx, *p.down, p.n_tokens);
  s.rows = hidden_rows_at_once(row_bytes, p.n_tokens);
  s.hidden = space.take<std::byte>(s.rows * row_bytes);
  s.tiles = carve_tiles(space, ctx, p.n_tokens, *p.gate, *p.up, *p.down);
  return s;
}

}  // namespace

int64_t hidden_row_bytes(const CpuContext& ctx, const Weight& down, int64_t n_rows) noexcept {
  const bool only_int8 = choose_method(ctx, down, n_rows, false) == Method::kInt8;
  const int64_t bytes =
      only_int8 ? down.cols / 32 * int64_t{sizeof(XBlock)} : down.cols * int64_t{sizeof(float)};
  constexpr int64_t kUnit = 192;  // rows begin on cache lines and on whole XBlocks
  static_assert(kUnit % Workspace::kAlignment == 0 && kUnit % sizeof(XBlock) == 0);
  return (bytes + kUnit - 1) / kUnit * kUnit;
}

int64_t hidden_rows_at_once(int64_t row_bytes, int64_t n_rows) noexcept {
  return std::min(std::max<int64_t>(kHiddenBytes / row_bytes / kRowBlock, 1) * kRowBlock, n_rows);
}

FfnTiles carve_tiles(Workspace& space, const CpuContext& ctx, int64_t n_rows, const Weight& gate,
                     const Weight& up, const Weight& down) noexcept {
  FfnTiles tiles{};
  const int64_t n_workers = ctx.threads->size();
  tiles.floats = slice_floats(n_rows);
  tiles.gate = space.take<float>(n_workers * tiles.floats);
  tiles.up = space.take<float>(n_workers * tiles.floats);
  const auto panel = [&](const Weight& w) {
    return uses_method(ctx, w, n_rows, false, Method::kPanel);
  };
  if (panel(gate) || panel(up) || panel(down))
    tiles.panels = space.take<float>(n_workers * kPanelFloats);
  return tiles;
}

Activations hidden_rows(Method down_method, const std::byte* hidden, int64_t row_bytes,
                        int64_t n_rows) noexcept {
  Activations rows{.n_rows = n_rows};
  if (down_method == Method::kInt8) {
    rows.blocks = reinterpret_cast<const XBlock*>(hidden);
    rows.block_stride = row_bytes / int64_t{sizeof(XBlock)};
  } else {
    rows.x = reinterpret_cast<const float*>(hidden);
    rows.x_stride = row_bytes / int64_t{sizeof(float)};
  }
  return rows;
}

void hidden_slice(const CpuContext& ctx, const HiddenSlice& s, const Activations& x,
                  const FfnTiles& tiles, int worker, std::byte* hidden) noexcept {
  const int64_t width = s.slice.n_rows;
  float* gate = tiles.gate + worker * tiles.floats;
  float* up = tiles.up + worker * tiles.floats;
  float* panels = worker_part(tiles.panels, worker, kPanelFloats);
  const int64_t block_rows = std::min(kRowBlock, tiles.floats / width);
  for (int64_t row = 0; row < x.n_rows; row += block_rows) {
    const Activations block = sub_rows(x, row, std::min(block_rows, x.n_rows - row));
    multiply_slice(ctx, s.gate_method, *s.gate, s.index, s.slice, block, panels, gate, width,
                   false);
    multiply_slice(ctx, s.up_method, *s.up, s.index, s.slice, block, panels, up, width, false);
    ctx.matmul->swiglu(gate, up, block.n_rows * width, gate);
    for (int64_t i = 0; i < block.n_rows; ++i) {
      std::byte* to = hidden + (row + i) * s.hidden_row_bytes;
      if (s.down_method == Method::kInt8)
        ctx.matmul->quantize(gate + i * width, width,
                             reinterpret_cast<XBlock*>(to) + s.slice.row0 / 32);
      else
        std::copy_n(gate + i * width, width, reinterpret_cast<float*>(to) + s.slice.row0);
    }
  }
}

int64_t workspace_bytes(const CpuContext& ctx, const FfnParams& p) noexcept {
  Workspace space;
  carve(space, ctx, p);
  return space.used_bytes();
}

void ffn(const CpuContext& ctx, const OpContext& op, const FfnParams& p) noexcept {
  if (p.n_tokens == 0) return;
  Workspace space(op);
  const FfnScratch scratch = carve(space, ctx, p);
  HiddenSlice hidden{.gate = p.gate,
                     .up = p.up,
                     .gate_method = choose_method(ctx, *p.gate, p.n_tokens, false),
                     .up_method = choose_method(ctx, *p.up, p.n_tokens, false),
                     .down_method = choose_method(ctx, *p.down, p.n_tokens, false),
                     .hidden_row_bytes = hidden_row_bytes(ctx, *p.down, p.n_tokens)};
  const int64_t hidden_size = p.gate->cols;
  Activations x{.x = p.x, .x_stride = hidden_size, .n_rows = p.n_tokens};
  if (hidden.gate_method == Method::kInt8 || hidden.up_method == Method::kInt8) {
    quantize_rows(ctx, p.x, hidden_size, p.n_tokens, hidden_size, scratch.x_blocks);
    x.blocks = scratch.x_blocks;
    x.block_stride = hidden_size / 32;
  }

  // Rows [first, first + n_rows) of the chunk.
  const auto part = [&](int64_t first, int64_t n_rows) {
    const Activations in = sub_rows(x, first, n_rows);
    const int64_t n_blocks = row_blocks(n_rows);
    const auto block_rows = [&](int64_t block) {
      return std::min(kRowBlock, n_rows - block * kRowBlock);
    };
    int64_t groups = slice_groups(*p.gate, p.n_tokens);
    int64_t n_slices = slice_count(*p.gate, groups);
    const Hand hand = slice_hand(p.n_tokens);
    for_slices(ctx, *p.gate, groups, n_blocks, hand, [&](int64_t task, int worker) {
      const int64_t block = task / n_slices;
      HiddenSlice slice = hidden;
      slice.slice = slice_at(*p.gate, groups, task % n_slices);
      hidden_slice(ctx, slice, sub_rows(in, block * kRowBlock, block_rows(block)), scratch.tiles,
                   worker, scratch.hidden + block * kRowBlock * hidden.hidden_row_bytes);
    });

    const Activations h =
        hidden_rows(hidden.down_method, scratch.hidden, hidden.hidden_row_bytes, n_rows);
    groups = slice_groups(*p.down, p.n_tokens);
    n_slices = slice_count(*p.down, groups);
    for_slices(ctx, *p.down, groups, n_blocks, hand, [&](int64_t task, int worker) {
      const int64_t block = task / n_slices;
      const Slice slice = slice_at(*p.down, groups, task % n_slices);
      multiply_slice(ctx, hidden.down_method, *p.down, 0, slice,
                     sub_rows(h, block * kRowBlock, block_rows(block)),
                     worker_part(scratch.tiles.panels, worker, kPanelFloats),
                     p.out + (first + block * kRowBlock) * p.down->rows + slice.row0, p.down->rows,
                     p.add);
    });
  };
  for (int64_t first = 0; first < p.n_tokens; first += scratch.rows)
    part(first, std::min(scratch.rows, p.n_tokens - first));
}

}  // namespace fathom::cpu
