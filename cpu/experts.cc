// experts: rows of a chunk grouped by expert, so that each expert's weights are read once.
//
//   1. group   counting sort of the (token, k) pairs by expert id
//   2. hidden  tasks (expert, slice of gate and up): hidden values of the expert's rows
//   3. down    tasks (slice of the output columns), each passing over all experts in ascending id:
//              no two tasks write the same value, and the order of the sum is fixed
//
// 2 and 3 for as many pairs at a time as have hidden values in the workspace.
#include <algorithm>
#include <utility>

#include "cpu/ffn.h"
#include "cpu/matmul.h"

namespace fathom::cpu {
namespace {

struct ExpertsScratch {
  int32_t* first;     // [n_experts + 1] first pair of each expert in the sorted order
  int32_t* active;    // [n_experts] experts that have rows, ascending
  int32_t* tokens;    // [n_pairs] token of each sorted pair
  int32_t* pairs;     // [n_pairs] its place in ids and weights
  XBlock* x_blocks;   // [n_tokens, hidden_size / 32], when gate or up is computed in int8
  int64_t rows;       // pairs of a part
  std::byte* hidden;  // [rows, hidden_row_bytes()]
  FfnTiles tiles;
};

ExpertsScratch carve(Workspace& space, const CpuContext& ctx, const ExpertsParams& p) noexcept {
  const int64_t n_pairs = p.n_tokens * p.num_experts_per_tok;
  ExpertsScratch s{};
  s.first = space.take<int32_t>(p.gate->count + 1);
  s.active = space.take<int32_t>(p.gate->count);
  s.tokens = space.take<int32_t>(n_pairs);
  s.pairs = space.take<int32_t>(n_pairs);
  const auto int8 = [&](const Weight* w) {
    return uses_method(ctx, *w, p.n_tokens, false, Method::kInt8);
  };
  if (int8(p.gate) || int8(p.up)) s.x_blocks = space.take<XBlock>(p.n_tokens * (p.gate->cols / 32));
  const int64_t row_bytes = hidden_row_bytes(ctx, *p.down, n_pairs);
  s.rows = hidden_rows_at_once(row_bytes, n_pairs);
  s.hidden = space.take<std::byte>(s.rows * row_bytes);
  s.tiles = carve_tiles(space, ctx, n_pairs, *p.gate, *p.up, *p.down);
  return s;
}

// Fills first, active, tokens and pairs; returns the number of active experts.
int64_t group_pairs(const ExpertsParams& p, const ExpertsScratch& s) noexcept {
  const int64_t n_experts = p.gate->count;
  const int64_t n_pairs = p.n_tokens * p.num_experts_per_tok;
  // Index of pair i's expert among ours; outside [0, n_experts) for those of others.
  const auto expert_of = [&](int64_t i) { return p.ids[i] - p.first_expert; };
  const auto ours = [&](int64_t e) { return e >= 0 && e < n_experts; };
  std::fill_n(s.first, n_experts + 1, 0);
  for (int64_t i = 0; i < n_pairs; ++i)
    if (ours(expert_of(i))) ++s.first[expert_of(i) + 1];
  int64_t n_active = 0;
  for (int64_t e = 0; e < n_experts; ++e) {
    if (s.first[e + 1] > 0) s.active[n_active++] = static_cast<int32_t>(e);
    s.first[e + 1] += s.first[e];
  }
  // Placing moves each start to the next one; the second pass moves them back.
  for (int64_t i = 0; i < n_pairs; ++i) {
    if (!ours(expert_of(i))) continue;
    const int32_t at = s.first[expert_of(i)]++;
    s.tokens[at] = static_cast<int32_t>(i / p.num_experts_per_tok);
    s.pairs[at] = static_cast<int32_t>(i);
  }
  for (int64_t e = n_experts; e > 0; --e) s.first[e] = s.first[e - 1];
  s.first[0] = 0;
  return n_active;
}

}  // namespace

int64_t workspace_bytes(const CpuContext& ctx, const ExpertsParams& p) noexcept {
  Workspace space;
  carve(space, ctx, p);
  return space.used_bytes();
}

void experts(const CpuContext& ctx, const OpContext& op, const ExpertsParams& p) noexcept {
  if (p.n_tokens == 0) return;
  Workspace space(op);
  const ExpertsScratch s = carve(space, ctx, p);
  const int64_t n_active = group_pairs(p, s);
  const int64_t hidden_size = p.gate->cols;
  const int64_t n_pairs = p.n_tokens * p.num_experts_per_tok;
  const int64_t row_bytes = hidden_row_bytes(ctx, *p.down, n_pairs);

  Activations x{.x = p.x, .x_stride = hidden_size};
  if (s.x_blocks != nullptr) {
    quantize_rows(ctx, p.x, hidden_size, p.n_tokens, hidden_size, s.x_blocks);
    x.blocks = s.x_blocks;
    x.block_stride = hidden_size / 32;
  }

  // Slices by the average, methods by all rows of an expert: they do not depend on the parts.
  const int64_t n_experts = p.n_experts > 0 ? p.n_experts : p.gate->count;
  const int64_t average_rows = (n_pairs + n_experts - 1) / n_experts;
  const int64_t up_groups = slice_groups(*p.gate, average_rows);
  const int64_t down_groups = slice_groups(*p.down, average_rows);
  const int64_t n_up = slice_count(*p.gate, up_groups);
  const Hand hand = slice_hand(p.n_tokens);
  const auto method = [&](const Weight& w, int64_t e) {
    return choose_method(ctx, w, s.first[e + 1] - s.first[e], false);
  };

  int64_t first_active = 0, begin = 0;
  const int64_t n_ours = s.first[p.gate->count];
  do {  // pairs [begin, end), of the active experts [first_active, end_active)
    const int64_t end = std::min(begin + s.rows, n_ours);
    while (first_active < n_active && s.first[s.active[first_active] + 1] <= begin) ++first_active;
    int64_t end_active = first_active;
    while (end_active < n_active && s.first[s.active[end_active]] < end) ++end_active;
    const auto pairs_of = [&](int64_t e) {
      return std::pair(std::max<int64_t>(s.first[e], begin),
                       std::min<int64_t>(s.first[e + 1], end));
    };
    const auto hidden_of = [&](int64_t pair) { return s.hidden + (pair - begin) * row_bytes; };

    const int64_t n_here = end_active - first_active;
    for_slices(ctx, *p.gate, up_groups, n_here, hand, [&](int64_t task, int worker) {
      const int64_t e = s.active[first_active + task / n_up];
      const auto [first, last] = pairs_of(e);
      Activations rows = x;
      rows.rows = s.tokens + first;
      rows.n_rows = last - first;
      hidden_slice(ctx,
                   {.gate = p.gate,
                    .up = p.up,
                    .index = e,
                    .gate_method = method(*p.gate, e),
                    .up_method = method(*p.up, e),
                    .down_method = method(*p.down, e),
                    .hidden_row_bytes = row_bytes,
                    .slice = slice_at(*p.gate, up_groups, task % n_up)},
                   rows, s.tiles, worker, hidden_of(first));
    });

    for_slices(ctx, *p.down, down_groups, 1, hand, [&](int64_t task, int worker) {
      const Slice slice = slice_at(*p.down, down_groups, task);
      float* tile = worker_part(s.tiles.gate, worker, s.tiles.floats);
      const int64_t block_rows = std::min(kRowBlock, s.tiles.floats / slice.n_rows);
      float* panels = worker_part(s.tiles.panels, worker, kPanelFloats);
      for (int64_t t = 0; t < p.n_tokens && begin == 0 && !p.add && p.rows == nullptr; ++t)
        std::fill_n(p.out + t * p.down->rows + slice.row0, slice.n_rows, 0.0f);
      for (int64_t a = first_active; a < end_active; ++a) {
        const int64_t e = s.active[a];
        const auto [first, last] = pairs_of(e);
        const Activations h =
            hidden_rows(method(*p.down, e), hidden_of(first), row_bytes, last - first);
        for (int64_t row = 0; row < h.n_rows; row += block_rows) {
          const int64_t n = std::min(block_rows, h.n_rows - row);
          multiply_slice(ctx, method(*p.down, e), *p.down, e, slice, sub_rows(h, row, n), panels,
                         tile, slice.n_rows, false);
          for (int64_t i = 0; i < n; ++i) {
            const int64_t at = first + row + i, pair = s.pairs[at];
            const float* result = tile + i * slice.n_rows;
            if (p.rows != nullptr)
              std::copy_n(result, slice.n_rows, p.rows + pair * p.down->rows + slice.row0);
            else
              ctx.matmul->add_scaled(p.weights[pair], result, slice.n_rows,
                                     p.out + s.tokens[at] * p.down->rows + slice.row0);
          }
        }
      }
    });
    begin = end;
  } while (begin < n_ours);
}

void sum_experts(const CpuContext& ctx, const SumExpertsParams& p) noexcept {
  constexpr int64_t kColumns = 1024;
  const int64_t k = p.num_experts_per_tok, hidden = p.hidden_size;
  const int64_t n_slices = (hidden + kColumns - 1) / kColumns;
  ctx.threads->parallel_for(p.n_tokens * n_slices, [&](int64_t task, int) {
    const int64_t t = task / n_slices, column = task % n_slices * kColumns;
    const int64_t n = std::min(kColumns, hidden - column);
    const int32_t* ids = p.ids + t * k;
    float* out = p.out + t * hidden + column;
    std::fill_n(out, n, 0.0f);
    int32_t last = -1;
    for (int64_t i = 0; i < k; ++i) {
      int64_t next = -1;  // the lowest id above the last one
      for (int64_t j = 0; j < k; ++j)
        if (ids[j] > last && (next < 0 || ids[j] < ids[next])) next = j;
      if (next < 0) break;
      last = ids[next];
      ctx.matmul->add_scaled(p.weights[t * k + next], p.rows + (t * k + next) * hidden + column, n,
                             out);
    }
  });
}

}  // namespace fathom::cpu
