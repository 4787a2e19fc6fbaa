#include "cpu/pair_pages.h"

#include <algorithm>

#include "cpu/page_codec.h"
#include "cpu/rows_kernels.h"

namespace fathom::cpu {
namespace {

constexpr int64_t kStageRows = 4;  // decoded to f32 at a time: what stays in L1
// Rows whose bytes are fetched ahead of the ones at hand.  Far enough for memory to answer, and few
// enough to wait in L2 while a tile is multiplied.
constexpr int64_t kFetchRows = 32;
constexpr int64_t kLineBytes = 64;

void fetch(const std::byte* p, int64_t bytes) noexcept {
  for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(p + at, 0, 2);
}

void fetch_rows(const KvRows& rows, int64_t first, int64_t end) noexcept {
  while (first < end) {
    const PageRun run = page_run(rows, first, end - first);
    fetch(run.latent, run.n_rows * rows.layout.latent_row_bytes(run.type));
    fetch(run.rope, run.n_rows * rows.layout.rope_row_bytes(run.type));
    first += run.n_rows;
  }
}

bool is_plain(RowType type) noexcept {
  return type == kRowF32 || type == kRowF16 || type == kRowBF16;
}

}  // namespace

int64_t pair_stage_floats(const KvLayout& layout) noexcept {
  return kStageRows * layout.kv_lora_rank;
}

void pack_pages(const CpuContext& context, const KvRows& rows, int64_t first_row, int64_t n_rows,
                int64_t end, float* stage, const PairRows& out) noexcept {
  const KvLayout& layout = rows.layout;
  const PairKernels& kernels = *context.pairs;
  for (int64_t done = 0; done < n_rows;) {
    const int64_t row = first_row + done;
    const PageRun run = page_run(rows, row, std::min(kStageRows, n_rows - done));
    fetch_rows(rows, std::min(end, row + kFetchRows), std::min(end, row + kFetchRows + run.n_rows));
    PackRows latent{.type = latent_row_type(run.type),
                    .x = run.latent,
                    .x_bytes = layout.latent_row_bytes(run.type),
                    .n_rows = run.n_rows,
                    .n_cols = layout.kv_lora_rank,
                    .rows = out.latent == nullptr ? nullptr : out.latent + done * out.latent_stride,
                    .row_stride = out.latent_stride,
                    .pairs = out.pairs == nullptr ? nullptr : out.pairs + done / 2 * kPairUnit,
                    .panel_stride = out.panel_stride};
    if (!is_plain(latent.type)) {
      context.rows->decode({.type = latent.type,
                            .rows = run.latent,
                            .row_bytes = latent.x_bytes,
                            .n_rows = run.n_rows,
                            .n_cols = layout.kv_lora_rank,
                            .out = stage,
                            .out_stride = layout.kv_lora_rank});
      latent.type = kRowF32;
      latent.x = stage;
      latent.x_bytes = layout.kv_lora_rank * int64_t{sizeof(float)};
    }
    kernels.pack_rows(latent);
    kernels.pack_rows({.type = rope_row_type(run.type),
                       .x = run.rope,
                       .x_bytes = layout.rope_row_bytes(run.type),
                       .n_rows = run.n_rows,
                       .n_cols = layout.qk_rope_head_dim,
                       .rows = out.rope + done * out.rope_stride,
                       .row_stride = out.rope_stride,
                       .pairs = nullptr,
                       .panel_stride = 0});
    done += run.n_rows;
  }
}

void fetch_ahead(const KvRows& rows, int64_t first_row, int64_t n_rows,
                 FetchAhead (&out)[kFetches]) noexcept {
  static_assert(kFetches % 2 == 0);
  for (int i = 0; i < kFetches; i += 2) {
    out[i] = out[i + 1] = {};
    if (n_rows <= 0) continue;
    const PageRun run = page_run(rows, first_row, n_rows);
    out[i] = {run.latent, run.n_rows * rows.layout.latent_row_bytes(run.type)};
    out[i + 1] = {run.rope, run.n_rows * rows.layout.rope_row_bytes(run.type)};
    first_row += run.n_rows;
    n_rows -= run.n_rows;
  }
}

}  // namespace fathom::cpu
