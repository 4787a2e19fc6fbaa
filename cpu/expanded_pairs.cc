// One task of expanded attention over bf16 pairs.
//
//   strip  kStripRows rows: decode -> latents in bf16 -> keys [rows, nope + rope], pairs of values
//   tile   kPairExpandedRows rows: what one step of the online softmax goes over
//   block  kPairMaxCols queries of the task
#include "cpu/expanded_pairs.h"

#include <algorithm>

#include "cpu/attention_tiles.h"
#include "cpu/matmul.h"
#include "cpu/pair_kernels.h"
#include "cpu/pair_pages.h"

namespace fathom::cpu {
namespace {

constexpr int64_t kStripRows = 64;  // expanded at a time
static_assert(kKvSplitRows % kPairExpandedRows == 0 && kPairExpandedRows % kStripRows == 0);
// Pairs of a panel of values; an odd number of cache lines, as in tile_stride().
constexpr int64_t kValuePanel = (kPairExpandedRows / 2 + 1) * kPairUnit;
static_assert(kPairUnit == kGroupRows);

// Everything that follows from the shapes, and the parts of one worker's scratch.
struct Expanded {
  int64_t latent, latent_padded, rope, nope, nope_padded, value, value_padded;
  int64_t key_dim;  // of queries and keys: nope, zeros, rope
  int64_t latent_stride, key_stride;
  int64_t panel;         // pairs of a panel of 16 outputs
  int64_t query_stride;  // pairs of a unit of 16 queries

  float* stage;              // for pack_pages()
  float* unpacked;           // [max(latent, nope panels * 16)][16]: weights on their way to panels
  float* turned;             // [nope][16]: a group of rows of a k_b that is stored the other way
  uint32_t* key_panels;      // [nope_padded / 16][panel]
  uint32_t* value_panels;    // [value_padded / 16][panel]
  uint32_t* queries;         // [units][query_stride]
  uint16_t* latents;         // [kStripRows][latent_stride]
  uint16_t* keys;            // [kPairExpandedRows][key_stride]
  uint32_t* values;          // [value_padded / 16][kValuePanel]
  float* scores;             // [kPairExpandedRows][kPairMaxCols]
  uint32_t* weights;         // [kPairExpandedRows / 2][kPairMaxCols]
  float *max, *sum, *decay;  // [kPairMaxCols]
  int32_t* limits;           // [kPairMaxCols]
  float* out;                // [kPairMaxCols][value_padded], when rows of out are not whole units

  Expanded(const AttendExpandedParams& p, Workspace& workspace) noexcept {
    latent = p.rows.layout.kv_lora_rank;
    latent_padded = round_up(latent, kPairUnit);
    rope = p.rows.layout.qk_rope_head_dim;
    nope = p.qk_nope_head_dim;
    nope_padded = round_up(nope, kPairUnit);
    value = p.v_head_dim;
    value_padded = round_up(value, kPairUnit);
    key_dim = nope_padded + rope;
    latent_stride = tile_stride(latent_padded);
    key_stride = tile_stride(key_dim);
    panel = latent_padded / 2 * kPairUnit;
    query_stride = key_dim / 2 * kPairUnit;
    const int64_t task_tokens = round_up(std::min(p.n_tokens, kMaxTaskTokens), kPairUnit);

    stage = workspace.take<float>(pair_stage_floats(p.rows.layout));
    unpacked = workspace.take<float>(std::max(latent, nope_padded) * kPairUnit);
    turned = workspace.take<float>(nope * kPairUnit);
    key_panels = workspace.take<uint32_t>(nope_padded / kPairUnit * panel);
    value_panels = workspace.take<uint32_t>(value_padded / kPairUnit * panel);
    queries = workspace.take<uint32_t>(task_tokens / kPairUnit * query_stride);
    latents = workspace.take<uint16_t>(kStripRows * latent_stride);
    keys = workspace.take<uint16_t>(kPairExpandedRows * key_stride);
    values = workspace.take<uint32_t>(value_padded / kPairUnit * kValuePanel);
    scores = workspace.take<float>(kPairExpandedRows * kPairMaxCols);
    weights = workspace.take<uint32_t>(kPairExpandedRows / 2 * kPairMaxCols);
    max = workspace.take<float>(kPairMaxCols);
    sum = workspace.take<float>(kPairMaxCols);
    decay = workspace.take<float>(kPairMaxCols);
    limits = workspace.take<int32_t>(kPairMaxCols);
    out = workspace.take<float>(value == value_padded ? 0 : kPairMaxCols * value_padded);
  }
};

// f32 [n_rows][16] -> pairs along the rows.
void pack_panel(const PairKernels& kernels, const float* x, int64_t n_rows,
                uint32_t* out) noexcept {
  kernels.pack_rows({.type = kRowF32,
                     .x = x,
                     .x_bytes = kPairUnit * int64_t{sizeof(float)},
                     .n_rows = n_rows,
                     .n_cols = kPairUnit,
                     .rows = nullptr,
                     .row_stride = 0,
                     .pairs = out,
                     .panel_stride = 0});
}

// Panels of the rows of a weight [outputs, latent].
void pack_outputs(const CpuContext& context, const Expanded& s, const Weight& w, int64_t head,
                  int64_t n_panels, uint32_t* panels) noexcept {
  for (int64_t i = 0; i < n_panels; ++i) {
    unpack_rows16(context, w, head, i, 0, s.latent, s.unpacked);
    pack_panel(*context.pairs, s.unpacked, s.latent, panels + i * s.panel);
  }
}

void unpack_head(const CpuContext& context, const AttendExpandedParams& p, const Expanded& s,
                 int64_t head) noexcept {
  std::fill_n(s.key_panels, s.nope_padded / kPairUnit * s.panel, 0u);
  std::fill_n(s.value_panels, s.value_padded / kPairUnit * s.panel, 0u);
  pack_outputs(context, s, *p.v_b, head, s.value_padded / kPairUnit, s.value_panels);
  if (p.k_b_transposed) {
    pack_outputs(context, s, *p.k_b, head, s.nope_padded / kPairUnit, s.key_panels);
    return;
  }
  // Rows are latent columns: sixteen of them are a strip of every panel.
  for (int64_t first = 0; first < s.latent; first += kPairUnit) {
    const int64_t n = std::min<int64_t>(kPairUnit, s.latent - first);
    unpack_rows16(context, *p.k_b, head, first / kPairUnit, 0, s.nope, s.turned);
    std::fill_n(s.unpacked, s.nope_padded * kPairUnit, 0.0f);
    for (int64_t i = 0; i < s.nope; ++i) {
      float* column = s.unpacked + i / kPairUnit * kPairUnit * kPairUnit + i % kPairUnit;
      for (int64_t j = 0; j < n; ++j) column[j * kPairUnit] = s.turned[i * kPairUnit + j];
    }
    for (int64_t panel = 0; panel < s.nope_padded / kPairUnit; ++panel)
      pack_panel(*context.pairs, s.unpacked + panel * kPairUnit * kPairUnit, n,
                 s.key_panels + panel * s.panel + first / 2 * kPairUnit);
  }
}

void gather_queries(const CpuContext& context, const AttendExpandedParams& p, const Expanded& s,
                    const ExpandedTask& task) noexcept {
  for (int64_t first = task.first; first < task.end; first += kPairMaxCols) {
    const float* columns[kPairMaxCols];
    const int64_t n = std::min<int64_t>(kPairMaxCols, task.end - first);
    for (int64_t i = 0; i < n; ++i)
      columns[i] = p.q + (first + i) * p.q_token_stride + task.head * p.q_head_stride;
    uint32_t* queries = s.queries + (first - task.first) / kPairUnit * s.query_stride;
    for (int64_t unit = 0; unit * kPairUnit < n; ++unit)  // nope may be odd, or short of a unit
      std::fill(queries + unit * s.query_stride + s.nope / 2 * kPairUnit,
                queries + unit * s.query_stride + s.nope_padded / 2 * kPairUnit, 0u);
    PackColumns pack{.columns = columns,
                     .n_columns = n,
                     .n = s.nope,
                     .scale = p.scale,
                     .out = queries,
                     .unit_stride = s.query_stride};
    context.pairs->pack_columns(pack);
    for (int64_t i = 0; i < n; ++i) columns[i] += s.nope;
    pack.n = s.rope;
    pack.out = queries + s.nope_padded / 2 * kPairUnit;
    context.pairs->pack_columns(pack);
  }
}

// Keys and values of rows [row, row + n_rows) into the tile.
void expand_tile(const CpuContext& context, const AttendExpandedParams& p, const Expanded& s,
                 int64_t row, int64_t n_rows, int64_t end_row) noexcept {
  const PairKernels& kernels = *context.pairs;
  for (int64_t strip = 0; strip < n_rows; strip += kStripRows) {
    const int64_t n = std::min(kStripRows, n_rows - strip);
    uint16_t* keys = s.keys + strip * s.key_stride;
    pack_pages(context, p.rows, row + strip, n, end_row, s.stage,
               {.latent = s.latents,
                .latent_stride = s.latent_stride,
                .pairs = nullptr,
                .panel_stride = 0,
                .rope = keys + s.nope_padded,
                .rope_stride = s.key_stride});
    ExpandPairs expand{.x = s.latents,
                       .x_stride = s.latent_stride,
                       .n_rows = n,
                       .k = s.latent_padded,
                       .weights = s.key_panels,
                       .weight_stride = s.panel,
                       .n_panels = s.nope_padded / kPairUnit,
                       .rows = keys,
                       .row_stride = s.key_stride,
                       .pairs = nullptr,
                       .panel_stride = 0};
    kernels.expand(expand);
    expand.weights = s.value_panels;
    expand.n_panels = s.value_padded / kPairUnit;
    expand.rows = nullptr;
    expand.pairs = s.values + strip / 2 * kPairUnit;
    expand.panel_stride = kValuePanel;
    kernels.expand(expand);
  }
}

// One step of the online softmax for queries [block, block + n) over the tile at `row`.
void attend_block(const CpuContext& context, const AttendExpandedParams& p, const Expanded& s,
                  const ExpandedTask& task, int64_t block, int64_t row, int64_t n_rows) noexcept {
  const int64_t n = std::min<int64_t>(kPairMaxCols, task.end - block);
  const int64_t n_padded = round_up(n, kPairUnit);
  const bool all_seen = p.first_position + block + 1 >= row + n_rows;
  for (int64_t col = 0; col < n_padded; ++col) {
    const int64_t token = block + std::min(col, n - 1);
    const int64_t state = token * p.n_heads + task.head;
    s.max[col] = p.state.max[state];
    s.sum[col] = p.state.sum[state];
    s.limits[col] = seen_rows(p.first_position + token, row, kPairExpandedRows);
  }
  const bool in_place = s.value == s.value_padded;
  float* out = p.out + (block * p.n_heads + task.head) * s.value;
  const int64_t out_stride = p.n_heads * s.value;
  if (!in_place)
    for (int64_t col = 0; col < n; ++col)
      std::copy_n(out + col * out_stride, s.value, s.out + col * s.value_padded);
  context.pairs->attend({.queries = s.queries + (block - task.first) / kPairUnit * s.query_stride,
                         .query_stride = s.query_stride,
                         .n_cols = n_padded,
                         .n_used = n,
                         .keys = s.keys,
                         .key_stride = s.key_stride,
                         .k = s.key_dim,
                         .values = s.values,
                         .value_stride = kValuePanel,
                         .n_values = s.value_padded,
                         .n_rows = n_rows,
                         .limits = all_seen ? nullptr : s.limits,
                         .max = s.max,
                         .sum = s.sum,
                         .out = in_place ? out : s.out,
                         .out_stride = in_place ? out_stride : s.value_padded,
                         .scores = s.scores,
                         .weights = s.weights,
                         .decay = s.decay});
  for (int64_t col = 0; col < n; ++col) {
    const int64_t state = (block + col) * p.n_heads + task.head;
    p.state.max[state] = s.max[col];
    p.state.sum[state] = s.sum[col];
    if (!in_place) std::copy_n(s.out + col * s.value_padded, s.value, out + col * out_stride);
  }
}

}  // namespace

int64_t expanded_pairs_bytes(const AttendExpandedParams& p) noexcept {
  Workspace counting;
  const Expanded shape(p, counting);
  return counting.used_bytes();
}

void attend_expanded_pairs(const CpuContext& context, const AttendExpandedParams& p,
                           const ExpandedTask& task, Workspace part) noexcept {
  const Expanded s(p, part);
  const int64_t end_row = std::min(p.rows.first_row + p.rows.n_rows, p.first_position + task.end);
  if (p.rows.first_row >= end_row) return;
  unpack_head(context, p, s, task.head);
  gather_queries(context, p, s, task);
  if (s.value != s.value_padded) std::fill_n(s.out, kPairMaxCols * s.value_padded, 0.0f);
  for (int64_t row = p.rows.first_row; row < end_row;) {
    const int64_t tile_end = std::min(end_row, (row / kPairExpandedRows + 1) * kPairExpandedRows);
    expand_tile(context, p, s, row, tile_end - row, end_row);
    for (int64_t block = task.first; block < task.end; block += kPairMaxCols) {
      // Rows behind the block's last query would be masked.
      const int64_t last_token = std::min<int64_t>(block + kPairMaxCols, task.end) - 1;
      const int64_t seen_end = std::min(tile_end, p.first_position + last_token + 1);
      if (seen_end > row) attend_block(context, p, s, task, block, row, seen_end - row);
    }
    row = tile_end;
  }
}

}  // namespace fathom::cpu
