// Expanded attention: a tile of cached rows is multiplied out to the keys and values of one head,
// used by all queries of the task, and dropped.  For chunks of more than about 170 tokens this
// costs less arithmetic than the absorbed form, and the expanded cache never exists.
//
//   task   one head, its k_b and v_b as f32 panels, up to kMaxTaskTokens queries
//   tile   kAttendTileRows rows: decode -> keys [rows, nope + rope], values [rows, v]
//   block  kAttendMaxCols queries: one step of their online softmax
//
// A query goes through the tiles in ascending order and carries its running state in the caller's
// arrays from tile to tile, so calls may be cut anywhere a tile begins.
#include <algorithm>
#include <limits>

#include "cpu/attention.h"
#include "cpu/attention_tiles.h"
#include "cpu/expanded_pairs.h"
#include "cpu/matmul.h"
#include "cpu/page_codec.h"

namespace fathom::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Everything that follows from the shapes, and the parts of one worker's scratch.
struct Expanded {
  int64_t latent, rope, nope, nope_padded, value, value_padded;
  int64_t key_dim;                                     // of queries and keys: nope, zeros, rope
  int64_t latent_stride, key_stride, value_stride;     // tiles
  int64_t latent_panel, n_key_panels, n_value_panels;  // panels of 16 outputs

  float* key_panels;         // [n_key_panels][latent][16]
  float* value_panels;       // [n_value_panels][latent][16]
  float* turned;             // [nope][16]: a group of rows of a k_b that is stored the other way
  float* queries;            // [blocks][key_dim][kAttendMaxCols]
  float* latents;            // [kAttendTileRows][latent_stride]
  float* keys;               // [kAttendTileRows][key_stride]
  float* values;             // [kAttendTileRows][value_stride]
  float* scores;             // [kAttendTileRows][kAttendMaxCols]
  float *max, *sum, *decay;  // [kAttendMaxCols]
  int32_t* limits;           // [kAttendMaxCols]
  float* out;                // [kAttendMaxCols][value_padded]

  Expanded(const AttendExpandedParams& p, Workspace& workspace) noexcept {
    latent = p.rows.layout.kv_lora_rank;
    rope = p.rows.layout.qk_rope_head_dim;
    nope = p.qk_nope_head_dim;
    value = p.v_head_dim;
    nope_padded = round_up(nope, kRowUnit);
    value_padded = round_up(value, kRowUnit);
    key_dim = nope_padded + rope;
    latent_stride = tile_stride(latent);
    key_stride = tile_stride(key_dim);
    value_stride = tile_stride(value);
    latent_panel = latent * kRowUnit;
    n_key_panels = nope_padded / kRowUnit;
    n_value_panels = value_padded / kRowUnit;
    const int64_t task_tokens = round_up(std::min(p.n_tokens, kMaxTaskTokens), kAttendMaxCols);

    key_panels = workspace.take<float>(n_key_panels * latent_panel);
    value_panels = workspace.take<float>(n_value_panels * latent_panel);
    turned = workspace.take<float>(nope * kRowUnit);
    queries = workspace.take<float>(task_tokens * key_dim);
    latents = workspace.take<float>(kAttendTileRows * latent_stride);
    keys = workspace.take<float>(kAttendTileRows * key_stride);
    values = workspace.take<float>(kAttendTileRows * value_stride);
    scores = workspace.take<float>(kAttendTileRows * kAttendMaxCols);
    max = workspace.take<float>(kAttendMaxCols);
    sum = workspace.take<float>(kAttendMaxCols);
    decay = workspace.take<float>(kAttendMaxCols);
    limits = workspace.take<int32_t>(kAttendMaxCols);
    out = workspace.take<float>(kAttendMaxCols * value_padded);
  }
};

// The head's k_b and v_b as panels[latent column][16 outputs].
void unpack_head(const CpuContext& context, const AttendExpandedParams& p, const Expanded& s,
                 int64_t head) noexcept {
  for (int64_t panel = 0; panel < s.n_value_panels; ++panel)
    unpack_rows16(context, *p.v_b, head, panel, 0, s.latent,
                  s.value_panels + panel * s.latent_panel);
  if (p.k_b_transposed) {
    for (int64_t panel = 0; panel < s.n_key_panels; ++panel)
      unpack_rows16(context, *p.k_b, head, panel, 0, s.latent,
                    s.key_panels + panel * s.latent_panel);
    return;
  }
  std::fill_n(s.key_panels, s.n_key_panels * s.latent_panel, 0.0f);
  for (int64_t first = 0; first < s.latent; first += kRowUnit) {  // rows are latent columns
    unpack_rows16(context, *p.k_b, head, first / kRowUnit, 0, s.nope, s.turned);
    const int64_t n = std::min<int64_t>(kRowUnit, s.latent - first);
    for (int64_t i = 0; i < s.nope; ++i) {
      float* column =
          s.key_panels + i / kRowUnit * s.latent_panel + first * kRowUnit + i % kRowUnit;
      for (int64_t j = 0; j < n; ++j) column[j * kRowUnit] = s.turned[i * kRowUnit + j];
    }
  }
}

// queries[block][k][col] = scale * query; zeros as padding.
void gather_queries(const AttendExpandedParams& p, const Expanded& s,
                    const ExpandedTask& task) noexcept {
  constexpr int64_t kCols = kAttendMaxCols;
  for (int64_t block = task.first; block < task.end; block += kCols) {
    float* queries = s.queries + (block - task.first) * s.key_dim;
    const int64_t n = std::min(kCols, task.end - block);
    const auto query = [&](int64_t col) {
      return p.q + (block + col) * p.q_token_stride + task.head * p.q_head_stride;
    };
    gather_columns(s.nope, kCols, n, p.scale, query, queries);
    std::fill(queries + s.nope * kCols, queries + s.nope_padded * kCols, 0.0f);
    gather_columns(
        s.rope, kCols, n, p.scale, [&](int64_t col) { return query(col) + s.nope; },
        queries + s.nope_padded * kCols);
  }
}

// One step of the online softmax for queries [block, block + n) over the tile at `row`.
void attend_block(const CpuContext& context, const AttendExpandedParams& p, const Expanded& s,
                  const ExpandedTask& task, int64_t block, int64_t row, int64_t n_rows) noexcept {
  const int64_t n = std::min<int64_t>(kAttendMaxCols, task.end - block);
  const bool all_seen = p.first_position + block + 1 >= row + n_rows;
  for (int64_t col = 0; col < kAttendMaxCols; ++col) {
    const int64_t token = block + std::min(col, n - 1);
    const int64_t state = token * p.n_heads + task.head;
    s.max[col] = p.state.max[state];
    s.sum[col] = p.state.sum[state];
    s.limits[col] = seen_rows(p.first_position + token, row, kAttendTileRows);
    if (col < n) std::copy_n(p.out + state * s.value, s.value, s.out + col * s.value_padded);
  }
  context.rows->attend_tile({.queries = s.queries + (block - task.first) * s.key_dim,
                             .n_cols = kAttendMaxCols,
                             .n_used = n,
                             .keys = s.keys,
                             .key_stride = s.key_stride,
                             .k = s.key_dim,
                             .values = s.values,
                             .value_stride = s.value_stride,
                             .n_values = s.value_padded,
                             .n_rows = n_rows,
                             .limits = all_seen ? nullptr : s.limits,
                             .max = s.max,
                             .sum = s.sum,
                             .out = s.out,
                             .out_stride = s.value_padded,
                             .scores = s.scores,
                             .decay = s.decay});
  for (int64_t col = 0; col < n; ++col) {
    const int64_t state = (block + col) * p.n_heads + task.head;
    p.state.max[state] = s.max[col];
    p.state.sum[state] = s.sum[col];
    std::copy_n(s.out + col * s.value_padded, s.value, p.out + state * s.value);
  }
}

void begin_queries(const AttendExpandedParams& p, const ExpandedTask& task) noexcept {
  for (int64_t token = task.first; token < task.end; ++token) {
    const int64_t state = token * p.n_heads + task.head;
    p.state.max[state] = kLowest;
    p.state.sum[state] = 0;
    std::fill_n(p.out + state * p.v_head_dim, p.v_head_dim, 0.0f);
  }
}

void finish_queries(const AttendExpandedParams& p, const ExpandedTask& task) noexcept {
  for (int64_t token = task.first; token < task.end; ++token) {
    const int64_t state = token * p.n_heads + task.head;
    const float sum = p.state.sum[state];
    const float factor = sum == 0 ? 0.0f : 1 / sum;
    float* out = p.out + state * p.v_head_dim;
    for (int64_t i = 0; i < p.v_head_dim; ++i) out[i] *= factor;
  }
}

// The rows of the call for the queries of one task, in f32.
void attend_floats(const CpuContext& context, const AttendExpandedParams& p, const Expanded& s,
                   const ExpandedTask& task) noexcept {
  const int64_t end_row = std::min(p.rows.first_row + p.rows.n_rows, p.first_position + task.end);
  if (p.rows.first_row < end_row) {
    unpack_head(context, p, s, task.head);
    gather_queries(p, s, task);
    clear_columns(s.keys, s.key_stride, kAttendTileRows, 0, s.key_dim);
    std::fill_n(s.out, kAttendMaxCols * s.value_padded, 0.0f);
  }
  for (int64_t row = p.rows.first_row; row < end_row;) {
    const int64_t tile_end = std::min(end_row, (row / kAttendTileRows + 1) * kAttendTileRows);
    const int64_t n_rows = tile_end - row;
    decode_pages(*context.rows, p.rows, row, n_rows, s.latents, s.latent_stride,
                 s.keys + s.nope_padded, s.key_stride);
    ExpandRows product{.x = s.latents,
                       .x_stride = s.latent_stride,
                       .n_rows = n_rows,
                       .k = s.latent,
                       .panels = s.key_panels,
                       .panel_stride = s.latent_panel,
                       .n_panels = s.n_key_panels,
                       .out = s.keys,
                       .out_stride = s.key_stride};
    context.rows->expand(product);
    product.panels = s.value_panels;
    product.n_panels = s.n_value_panels;
    product.out = s.values;
    product.out_stride = s.value_stride;
    context.rows->expand(product);
    for (int64_t block = task.first; block < task.end; block += kAttendMaxCols) {
      const int64_t last_token = std::min(block + kAttendMaxCols, task.end) - 1;
      if (p.first_position + last_token >= row)
        attend_block(context, p, s, task, block, row, n_rows);
    }
    row = tile_end;
  }
}

WorkerParts carve(Workspace& workspace, const CpuContext& context,
                  const AttendExpandedParams& p) noexcept {
  int64_t bytes = 0;
  if (context.pairs != nullptr) {
    bytes = expanded_pairs_bytes(p);
  } else {
    Workspace counting;
    const Expanded part(p, counting);
    bytes = counting.used_bytes();
  }
  return WorkerParts(workspace, context.threads->size(), bytes);
}

}  // namespace

int64_t workspace_bytes(const CpuContext& context, const AttendExpandedParams& p) noexcept {
  Workspace counting;
  carve(counting, context, p);
  return counting.used_bytes();
}

void attend_expanded(const CpuContext& context, const OpContext& op,
                     const AttendExpandedParams& p) noexcept {
  if (p.n_tokens == 0 || p.n_heads == 0) return;
  Workspace workspace(op);
  const WorkerParts workers = carve(workspace, context, p);
  // Every group of tokens expands the tiles for itself: more groups than needed only when there
  // are fewer heads than threads.
  const int64_t n_threads = context.threads->size();
  const int64_t wanted = std::max((p.n_tokens + kMaxTaskTokens - 1) / kMaxTaskTokens,
                                  (n_threads + p.n_heads - 1) / p.n_heads);
  const int64_t group = round_up((p.n_tokens + wanted - 1) / wanted, kAttendMaxCols);
  const int64_t n_groups = (p.n_tokens + group - 1) / group;
  context.threads->parallel_for(p.n_heads * n_groups, [&](int64_t index, int worker) {
    Workspace part = workers.part(worker);
    const int64_t first = index % n_groups * group;
    const ExpandedTask task{index / n_groups, first, std::min(first + group, p.n_tokens)};
    if (p.begin) begin_queries(p, task);
    if (context.pairs != nullptr)
      attend_expanded_pairs(context, p, task, part);
    else
      attend_floats(context, p, Expanded(p, part), task);
    if (p.finish) finish_queries(p, task);
  });
}

}  // namespace fathom::cpu
