// KvPages::come_back: what the ladder moved returns when memory does.
#include "kv_pages.h"

#include <algorithm>

namespace fathom::run {

bool KvPages::any_moved() const noexcept {
  return std::any_of(devices_.begin(), devices_.end(), [](const Device& home) {
    return std::any_of(home.parts.begin(), home.parts.end(),
                       [](const Part& part) { return part.host_end > part.begin; });
  });
}

// Beside the growth to come, so that no page comes back only to be moved again; copies of experts
// make room.  Where the system or the host refused what the ledger would have given, it is asked
// again once the ledger has more.
int64_t KvPages::room_for_return(int device) const noexcept {
  return engine_->ledger.available(device) + engine_->ledger.lent(device);
}

bool KvPages::may_take_back(int device, int64_t bytes, int64_t n_ahead) const noexcept {
  const int64_t available = room_for_return(device);
  return available > refused_[static_cast<size_t>(device)] &&
         available - growth_bytes(device, n_ahead) >= bytes;
}

KvPages::Moved KvPages::come_back(int64_t n_ahead) {
  Moved back;
  const auto taken = [&](const Status& status, int device, int64_t bytes) {
    if (status.ok()) {
      ++back.pages;
      back.freed += bytes;
    } else {
      refused_[static_cast<size_t>(device)] = room_for_return(device);
    }
    return status.ok();
  };
  for (Device& home : devices_)
    for (Part& part : home.parts) {
      for (bool more = true; more && part.host_end > part.begin;) {
        const int64_t page = part.host_end - 1;
        const int64_t bytes = page_bytes(home, part, home.table[page].type);
        more = may_take_back(part.device, bytes, n_ahead) &&
               taken(bring_back(home, page), part.device, bytes);
      }
      // What the host has room for then need not be read from the file.
      for (bool more = part.has_host_tier(); more && part.file_end > part.begin;) {
        const int64_t page = part.file_end - 1;
        const int64_t bytes = host_page_bytes(home, home.table[page].type);
        more = may_take_back(engine_->host_device, bytes, n_ahead) &&
               taken(file_to_host(home, part, page), engine_->host_device, bytes);
      }
    }
  return back;
}

Status KvPages::file_to_host(Device& home, Part& part, int64_t page) {
  const KvType type = home.table[page].type;
  const int64_t bytes = host_page_bytes(home, type), at = host_place(part, page);
  const int64_t layer_bytes = options_.layout.layer_bytes(type);
  FATHOM_TRY(part.host_pages.commit(at, bytes));
  Status read;
  for (int64_t slot = 0; slot < home.n_layers && read.ok(); ++slot)
    read = file_read(file_offset(home, slot, page), part.host_pages.data(at) + slot * layer_bytes,
                     layer_bytes);
  if (!read.ok()) {
    part.host_pages.decommit(at, bytes);
    return read;
  }
  forget_in_file(home, page);
  part.file_end = page;
  return {};
}

}  // namespace fathom::run
