#include "cuda/kv_view.h"

#include <algorithm>

namespace fathom::cuda {

static_assert(kPartialRows / kKvTileRows <= KvView::kMaxSegments);

int64_t add_segments(const KvRows& rows, int64_t first, int64_t end, int64_t unit,
                     KvTable& table) noexcept {
  const KvLayout& layout = rows.layout;
  const int32_t own = table.n_segments;  // the text's first
  table.page_tokens = static_cast<int32_t>(layout.page_tokens);
  table.rank = static_cast<int32_t>(layout.kv_lora_rank);
  table.rope = static_cast<int32_t>(layout.qk_rope_head_dim);
  const int64_t end_page = (end + layout.page_tokens - 1) / layout.page_tokens;
  for (int64_t i = first / layout.page_tokens; i < end_page; ++i) {
    const KvPage& page = rows.pages[i];
    uint8_t* latent =
        static_cast<uint8_t*>(page.data) + rows.layer_slot * layout.layer_bytes(page.type);
    if (table.n_segments > own) {
      KvSegment& last = table.segments[table.n_segments - 1];
      // The second page of a segment says how far apart its pages are.
      if (last.n_pages == 1 && last.type == page.type) last.page_stride = latent - last.latent;
      if (last.type == page.type && latent == last.latent + last.n_pages * last.page_stride) {
        ++last.n_pages;
        continue;
      }
    }
    if (table.n_segments == KvTable::kMaxSegments) {
      end = i * layout.page_tokens / unit * unit;
      if (end > first) return end;
      table.n_segments = own;
      return first;
    }
    table.segments[table.n_segments++] = {
        .latent = latent,
        .page_stride = 0,
        .first_page = static_cast<int32_t>(i),
        .n_pages = 1,
        .rope_at = static_cast<int32_t>(layout.rope_plane_offset(page.type)),
        .latent_bytes = static_cast<int32_t>(layout.latent_row_bytes(page.type)),
        .rope_bytes = static_cast<int32_t>(layout.rope_row_bytes(page.type)),
        .type = page.type};
  }
  return end;
}

int64_t make_view(const KvRows& rows, int64_t first, int64_t end, int64_t unit,
                  KvView& view) noexcept {
  view.n_segments = 0;
  view.first_row = first;
  return view.end_row = add_segments(rows, first, end, unit, view);
}

}  // namespace fathom::cuda
