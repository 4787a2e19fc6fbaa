// Attention over pages that are not on the layer's device: rows of one layer come through the
// staging buffer, stream_rows() at a time, while the system fetches what is next; or attention goes
// to the device where they lie.  Rows that are written to another device take the buffer, too.
#include <algorithm>

#include "../nn/transfer.h"
#include "kv_pages.h"

namespace fathom::run {

KvRows KvPages::failed(Status status) noexcept {
  stream_status_ = std::move(status);
  return {};
}

// Where pages were moved, and around them to multiples of stream_rows(), attention is shown a view:
// a table with the same indices whose entries point at the layer itself, on the device or in the
// staging buffer.  Everything else is attended in place, wherever that is; where it must be here,
// the rows of another device are shown in the view, too.
nn::RowPiece KvPages::piece(int home, int64_t layer_slot, const OpContext& op, int64_t first_row,
                            int64_t end_row, nn::Where where) noexcept {
  Device& d = devices_[static_cast<size_t>(home)];
  const int64_t page_tokens = options_.layout.page_tokens, step = stream_rows(page_tokens);
  const Part& part = part_of(d, first_row / page_tokens);
  const bool last = &part == &d.parts.back();
  end_row = last ? end_row : std::min(end_row, part.end_page * page_tokens);
  const auto in_place = [&](int64_t end) -> nn::RowPiece {
    return {rows(home, layer_slot, first_row, end - first_row), part.device};
  };
  int64_t from = part.first_page * page_tokens, to = end_row;
  if (where == nn::Where::kAnywhere || part.device == home) {
    if (part.host_end == part.begin) return in_place(end_row);
    from = std::max(from, part.begin * page_tokens / step * step);
    to = (part.host_end * page_tokens + step - 1) / step * step;
    if (first_row >= to) return in_place(end_row);
    if (first_row < from) return in_place(std::min(end_row, from));
  }

  const int64_t end = std::min(end_row, first_row / step * step + step);
  const int64_t first_page = first_row / page_tokens;
  const int64_t end_page = (end + page_tokens - 1) / page_tokens;
  // The operation before may still read the staging buffer.
  Status status = d.backend->sync(op);
  if (status.ok()) {
    try {
      status = stream_in(d, part, layer_slot, first_page, end_page);
    } catch (...) {
      status = Status(Code::kMemory, "no memory for the library's own bookkeeping");
    }
  }
  if (!status.ok()) return {failed(std::move(status)), home};
  // What is asked for next: the rows behind, else the beginning of the next layer, or of the first
  // one, which the next token begins with.
  if (end < std::min(end_row, to))
    read_ahead(d, part, layer_slot, end_page, end_page + step / page_tokens);
  else
    read_ahead(d, part, (layer_slot + 1) % d.n_layers, from / page_tokens,
               (from + step) / page_tokens);
  return {{d.view, options_.layout, 0, first_row, end - first_row}, home};
}

int KvPages::lies_on(int home, int64_t first_row, int64_t end_row) const noexcept {
  const Device& d = devices_[static_cast<size_t>(home)];
  const int64_t page_tokens = options_.layout.page_tokens, step = stream_rows(page_tokens);
  const Part& part = part_of(d, first_row / page_tokens);
  if (&part != &d.parts.back() && end_row > part.end_page * page_tokens) return -1;
  const bool moved = part.host_end != part.begin;
  if (moved && first_row < (part.host_end * page_tokens + step - 1) / step * step) return -1;
  return part.device;
}

Status KvPages::stream_in(Device& d, const Part& part, int64_t layer_slot, int64_t first_page,
                          int64_t end_page) {
  const int64_t file_first = std::max(first_page, part.begin);
  const int64_t file_end = std::min(end_page, part.file_end);
  const auto staged = [&](int64_t page) {
    return d.staging.data() + (page - first_page) * layer_stride_;
  };
  // Pages of the largest type lie in the file as in the buffer: one read for all of them.
  bool dense = d.backend->host_accessible();
  for (int64_t page = file_first; page < file_end && dense; ++page)
    dense = options_.layout.layer_bytes(d.table[page].type) == layer_stride_;
  if (dense && file_first < file_end)
    FATHOM_TRY(file_read(file_offset(d, layer_slot, file_first), staged(file_first),
                         (file_end - file_first) * layer_stride_));
  for (int64_t page = first_page; page < end_page; ++page) {
    const KvPage& entry = d.table[page];
    const int64_t layer_bytes = options_.layout.layer_bytes(entry.type);
    auto* resident = static_cast<std::byte*>(entry.data);
    std::byte* data = staged(page);
    if (resident != nullptr && part.device == d.index)
      data = resident + layer_slot * layer_bytes;
    else if (resident != nullptr)
      FATHOM_TRY(nn::transfer(*part.backend, resident + layer_slot * layer_bytes, *d.backend, data,
                              layer_bytes, bounce_.data()));
    else if (page >= part.file_end)
      FATHOM_TRY(d.backend->upload(
          data, part.host_pages.data(host_place(part, page)) + layer_slot * layer_bytes,
          layer_bytes));
    else if (!dense)
      FATHOM_TRY(read_layer(d, *d.backend, layer_slot, page, data, layer_bytes));
    d.view[page] = {data, entry.type};
  }
  return {};
}

void KvPages::read_ahead(const Device& d, const Part& part, int64_t layer_slot, int64_t first_page,
                         int64_t end_page) noexcept {
  const int64_t first = std::max(first_page, part.begin), end = std::min(end_page, part.file_end);
  if (first < end && file_.is_open())
    file_.read_ahead(file_offset(d, layer_slot, first), (end - first) * layer_stride_);
}

KvRows KvPages::resident(int home, int64_t layer_slot, int64_t end_row) const noexcept {
  const Device& d = devices_[static_cast<size_t>(home)];
  const Part& part = part_of(d, 0);
  const bool whole =
      &part == &d.parts.back() || end_row <= part.end_page * options_.layout.page_tokens;
  if (!whole || part.device != home || part.host_end > part.begin) return {};
  return rows(home, layer_slot, 0, end_row);
}

KvRows KvPages::room(int home, int64_t layer_slot, const OpContext& op, int64_t first_row,
                     int64_t end_row) noexcept {
  Device& d = devices_[static_cast<size_t>(home)];
  const int64_t page_tokens = options_.layout.page_tokens, first_page = first_row / page_tokens;
  const Part& part = part_of(d, first_page);
  if (&part != &d.parts.back()) end_row = std::min(end_row, part.end_page * page_tokens);
  if (part.device == home) return rows(home, layer_slot, first_row, end_row - first_row);
  end_row = std::min(end_row, first_page * page_tokens + stream_rows(page_tokens));
  if (Status status = d.backend->sync(op); !status.ok()) return failed(std::move(status));
  for (int64_t page = first_page; page * page_tokens < end_row; ++page)
    d.view[page] = {d.staging.data() + (page - first_page) * layer_stride_, d.table[page].type};
  return {d.view, options_.layout, 0, first_row, end_row - first_row};
}

void KvPages::written(int home, int64_t layer_slot, const OpContext& op,
                      const KvRows& rows) noexcept {
  Device& d = devices_[static_cast<size_t>(home)];
  if (rows.pages != d.view || d.view == nullptr) return;
  const KvLayout& layout = options_.layout;
  const int64_t page_tokens = layout.page_tokens, end_row = rows.first_row + rows.n_rows;
  const Part& part = part_of(d, rows.first_row / page_tokens);
  Status status = d.backend->sync(op);
  const auto copy = [&](int64_t page, int64_t offset, int64_t bytes) {
    const KvPage& to = d.table[page];
    if (status.ok() && bytes > 0)
      status = nn::transfer(
          *d.backend, static_cast<std::byte*>(d.view[page].data) + offset, *part.backend,
          static_cast<std::byte*>(to.data) + layer_slot * layout.layer_bytes(to.type) + offset,
          bytes, bounce_.data());
  };
  for (int64_t row = rows.first_row; row < end_row;) {
    const int64_t page = row / page_tokens, in_page = row % page_tokens;
    const int64_t n = std::min(end_row - row, page_tokens - in_page);
    const KvType type = d.table[page].type;
    copy(page, in_page * layout.latent_row_bytes(type), n * layout.latent_row_bytes(type));
    copy(page, layout.rope_plane_offset(type) + in_page * layout.rope_row_bytes(type),
         n * layout.rope_row_bytes(type));
    row += n;
  }
  if (!status.ok()) stream_status_ = std::move(status);
}

}  // namespace fathom::run
