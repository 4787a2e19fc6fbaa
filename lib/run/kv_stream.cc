// Attention over pages that are not on the device: rows of one layer come through the staging
// buffer, stream_rows() at a time, while the system fetches what is next.
#include <algorithm>

#include "kv_pages.h"

namespace fathom::run {

// Where pages were moved, and around them to multiples of stream_rows(), attention is shown a view:
// a table with the same indices whose entries point at the layer itself, on the device or in the
// staging buffer.  Everything else is attended in place.
KvRows KvPages::piece(int device, int64_t layer_slot, const OpContext& op, int64_t first_row,
                      int64_t end_row) noexcept {
  Device& d = devices_[static_cast<size_t>(device)];
  const int64_t page_tokens = options_.layout.page_tokens, step = stream_rows(page_tokens);
  const int64_t moved_from = first_moved() * page_tokens / step * step;
  const int64_t moved_end = (d.host_end * page_tokens + step - 1) / step * step;
  const bool any = d.host_end > first_moved();
  if (!any || first_row >= moved_end)
    return rows(device, layer_slot, first_row, end_row - first_row);
  if (first_row < moved_from)
    return rows(device, layer_slot, first_row, std::min(end_row, moved_from) - first_row);

  const int64_t end = std::min(end_row, first_row / step * step + step);
  const int64_t first_page = first_row / page_tokens;
  const int64_t end_page = (end + page_tokens - 1) / page_tokens;
  // The operation before may still read the staging buffer.
  Status status = d.backend->sync(op);
  if (status.ok()) {
    try {
      if (!stream_in(d, layer_slot, first_page, end_page)) return {};
    } catch (...) {
      status = Status(Code::kMemory, "no memory for the library's own bookkeeping");
    }
  }
  if (!status.ok()) {
    stream_status_ = std::move(status);
    return {};
  }
  // What is asked for next: the rows behind, else the beginning of the next layer, or of the first
  // one, which the next token begins with.
  if (end < std::min(end_row, moved_end))
    read_ahead(d, layer_slot, end_page, end_page + step / page_tokens);
  else
    read_ahead(d, (layer_slot + 1) % d.n_layers, moved_from / page_tokens,
               (moved_from + step) / page_tokens);
  return {d.view, options_.layout, 0, first_row, end - first_row};
}

bool KvPages::stream_in(Device& d, int64_t layer_slot, int64_t first_page, int64_t end_page) {
  const int64_t file_first = std::max(first_page, first_moved());
  const int64_t file_end = std::min(end_page, d.file_end);
  const auto staged = [&](int64_t page) {
    return d.staging.data() + (page - first_page) * layer_stride_;
  };
  // Pages of the largest type lie in the file as in the buffer: one read for all of them.
  bool dense = d.backend->host_accessible();
  for (int64_t page = file_first; page < file_end && dense; ++page)
    dense = options_.layout.layer_bytes(d.table[page].type) == layer_stride_;
  Status status;
  if (dense && file_first < file_end)
    status = file_read(file_offset(d, layer_slot, file_first), staged(file_first),
                       (file_end - file_first) * layer_stride_);
  for (int64_t page = first_page; page < end_page && status.ok(); ++page) {
    const KvPage& entry = d.table[page];
    const int64_t layer_bytes = options_.layout.layer_bytes(entry.type);
    std::byte* data = staged(page);
    if (entry.data != nullptr)
      data = static_cast<std::byte*>(entry.data) + layer_slot * layer_bytes;
    else if (page >= d.file_end)
      status = d.backend->upload(data, host_page(d, page) + layer_slot * layer_bytes, layer_bytes);
    else if (!dense)
      status = read_layer(d, layer_slot, page, data, layer_bytes);
    d.view[page] = {data, entry.type};
  }
  if (status.ok()) return true;
  stream_status_ = std::move(status);
  return false;
}

void KvPages::read_ahead(const Device& d, int64_t layer_slot, int64_t first_page,
                         int64_t end_page) noexcept {
  const int64_t first = std::max(first_page, first_moved()), end = std::min(end_page, d.file_end);
  if (first < end && file_.is_open())
    file_.read_ahead(file_offset(d, layer_slot, first), (end - first) * layer_stride_);
}

}  // namespace fathom::run
