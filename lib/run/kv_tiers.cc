// KvPages: what the ladder can free on a device, and moving and rewriting pages for it.
#include <algorithm>

#include "kv_pages.h"

namespace fathom::run {

// ---- what the ladder can do -------------------------------------------------------------------

int64_t KvPages::growth_bytes(int device, int64_t n_then) const noexcept {
  int64_t bytes = 0;
  for (int64_t page = n_pages_; page < options_.policy.pages_for(n_then); ++page)
    bytes += page_bytes_on(device, page, options_.policy.new_page_type(page));
  const int64_t next = n_tokens_ / options_.policy.page_tokens;
  if (n_then > n_tokens_ && next < n_pages_)
    each_part(device, [&](const Device& home, const Part& part) {
      if (part.is_moved(next)) bytes += page_bytes(home, part, home.table[next].type);
    });
  return bytes;
}

bool KvPages::is_resident(int64_t page) const noexcept {
  return std::none_of(devices_.begin(), devices_.end(),
                      [&](const Device& home) { return part_of(home, page).is_moved(page); });
}

std::optional<KvType> KvPages::next_type(int device, int64_t n_then) const noexcept {
  if (!options_.floor_type) return std::nullopt;
  const KvLayout& layout = options_.layout;
  const int64_t floor = layout.layer_bytes(*options_.floor_type);
  for (const KvType rung : kRungs) {
    if (layout.layer_bytes(rung) < floor) continue;
    // fp8 and q8_0 are one rung: which of them, the floor says.
    if (rung == KvType::kF8 && *options_.floor_type != KvType::kF8) continue;
    for (int64_t page = first_moved(); page < movable(n_then); ++page)
      if (layout.layer_bytes(type_of(page)) > layout.layer_bytes(rung) && is_resident(page) &&
          page_bytes_on(device, page, rung) > 0)
        return rung;
  }
  return std::nullopt;
}

int64_t KvPages::movable_bytes(int device, int64_t n_then) const noexcept {
  int64_t bytes = 0;
  each_part(device, [&](const Device& home, const Part& part) {
    for (int64_t page = part.host_end; page < std::min(movable(n_then), part.end_page); ++page)
      bytes += page_bytes(home, part, home.table[page].type);
  });
  return bytes;
}

int64_t KvPages::movable_bytes_at(int device, int64_t n_tokens) const noexcept {
  const int64_t end = movable_end(options_.policy, n_tokens, n_tokens + 1);
  int64_t bytes = 0;
  each_part(device, [&](const Device& home, const Part& part) {
    bytes += std::max<int64_t>(std::min(end, part.end_page) - part.host_end, 0) *
             page_bytes(home, part, options_.policy.type);
  });
  return bytes;
}

int64_t KvPages::rewriting_saves_at(int device, int64_t n_tokens, KvType type) const noexcept {
  const int64_t end = movable_end(options_.policy, n_tokens, n_tokens + 1);
  int64_t bytes = 0;
  each_part(device, [&](const Device& home, const Part& part) {
    const int64_t saved =
        page_bytes(home, part, options_.policy.type) - page_bytes(home, part, type);
    bytes += std::max<int64_t>(std::min(end, part.end_page) - part.host_end, 0) *
             std::max<int64_t>(saved, 0);
  });
  return bytes;
}

int64_t KvPages::tokens_freeing(int device, int64_t bytes) const noexcept {
  int64_t page = n_pages_;
  for (int64_t freed = 0; page > 0 && freed < bytes;) {
    --page;
    each_part(device, [&](const Device& home, const Part& part) {
      if (&part == &part_of(home, page) && home.table[page].data != nullptr)
        freed += page_bytes(home, part, home.table[page].type);
    });
  }
  return std::min(page * options_.policy.page_tokens, n_tokens_);
}

std::pair<KvPages::Device*, KvPages::Part*> KvPages::oldest_movable(int device,
                                                                    int64_t n_then) noexcept {
  std::pair<Device*, Part*> oldest{nullptr, nullptr};
  for (Device& home : devices_)
    for (Part& part : home.parts)
      if (part.device == device && home.n_layers > 0 &&
          part.host_end < std::min(movable(n_then), part.end_page) &&
          (oldest.second == nullptr || part.host_end < oldest.second->host_end))
        oldest = {&home, &part};
  return oldest;
}

LadderGains KvPages::gains(int device, int64_t n_then) const noexcept {
  LadderGains gains;
  const int64_t resident = movable_bytes(device, n_then);
  if (has_host_tier(device))
    gains[LadderStep::kSpill] = std::min(resident, engine_->ledger.available(engine_->host_device));
  if (has_tier(KvTier::kFile)) gains[LadderStep::kFile] = resident;
  if (const std::optional<KvType> type = next_type(device, n_then))
    for (int64_t page = first_moved(); page < movable(n_then); ++page)
      if (is_resident(page))
        gains[LadderStep::kRequantise] += std::max<int64_t>(
            page_bytes_on(device, page, type_of(page)) - page_bytes_on(device, page, *type), 0);
  // A page of the host tier that does not fit there any more is no gain.
  const auto [home, part] = const_cast<KvPages*>(this)->oldest_movable(device, n_then);
  if (part == nullptr ||
      gains[LadderStep::kSpill] < page_bytes(*home, *part, home->table[part->host_end].type))
    gains[LadderStep::kSpill] = 0;
  return gains;
}

// ---- moving -----------------------------------------------------------------------------------

Status KvPages::open_file() {
  if (file_.is_open() || engine_->simulation) return {};
  FATHOM_TRY_ASSIGN(file_, io::SpillFile::create(options_.spill_folder, options_.spill_to_memory));
  return {};
}

Status KvPages::file_write(int64_t offset, const std::byte* data, int64_t bytes) const noexcept {
  if (engine_->simulation) return {};
  return file_.write(offset, {data, static_cast<size_t>(bytes)});
}

Status KvPages::file_read(int64_t offset, std::byte* out, int64_t bytes) const noexcept {
  if (engine_->simulation) {
    engine_->simulation->read_file(bytes, stream_rows(options_.layout.page_tokens) /
                                              options_.layout.page_tokens * layer_stride_);
    return {};
  }
  return file_.read(offset, {out, static_cast<size_t>(bytes)});
}

Status KvPages::write_layer(const Device& home, const Part& part, int64_t slot, int64_t page,
                            const std::byte* device_data, int64_t bytes) {
  const std::byte* data = device_data;
  if (!part.backend->host_accessible()) {
    FATHOM_TRY(part.backend->download(bounce_.data(), device_data, bytes));
    data = bounce_.data();
  }
  return file_write(file_offset(home, slot, page), data, bytes);
}

Status KvPages::read_layer(const Device& home, Backend& to, int64_t slot, int64_t page,
                           std::byte* device_data, int64_t bytes) {
  const int64_t offset = file_offset(home, slot, page);
  if (to.host_accessible()) return file_read(offset, device_data, bytes);
  FATHOM_TRY(file_read(offset, bounce_.data(), bytes));
  return to.upload(device_data, bounce_.data(), bytes);
}

Status KvPages::device_to_host(Device& home, Part& part, int64_t page) {
  const KvType type = home.table[page].type;
  const int64_t bytes = host_page_bytes(home, type), at = host_place(part, page);
  FATHOM_TRY(part.host_pages.commit(at, bytes));
  if (Status status = part.backend->download(part.host_pages.data(at), home.table[page].data,
                                             options_.layout.page_bytes(type, home.n_layers));
      !status.ok()) {
    part.host_pages.decommit(at, bytes);
    return status;
  }
  unmap_page(home, page);
  ++part.host_end;
  return {};
}

Status KvPages::device_to_file(Device& home, Part& part, int64_t page) {
  FATHOM_TRY(open_file());
  const int64_t bytes = options_.layout.layer_bytes(home.table[page].type);
  const auto* data = static_cast<const std::byte*>(home.table[page].data);
  for (int64_t slot = 0; slot < home.n_layers; ++slot)
    FATHOM_TRY(write_layer(home, part, slot, page, data + slot * bytes, bytes));
  unmap_page(home, page);
  ++part.host_end;
  ++part.file_end;
  return {};
}

Status KvPages::host_to_file(Device& home, Part& part, int64_t page) {
  FATHOM_TRY(open_file());
  const KvType type = home.table[page].type;
  const int64_t bytes = options_.layout.layer_bytes(type), at = host_place(part, page);
  for (int64_t slot = 0; slot < home.n_layers; ++slot)
    FATHOM_TRY(
        file_write(file_offset(home, slot, page), part.host_pages.data(at) + slot * bytes, bytes));
  part.host_pages.decommit(at, host_page_bytes(home, type));
  ++part.file_end;
  return {};
}

Status KvPages::spill(int device, int64_t n_then, int64_t bytes, Moved& moved) {
  while (moved.freed < bytes) {
    const auto [home, part] = oldest_movable(device, n_then);
    if (part == nullptr) return {};
    const int64_t size = page_bytes(*home, *part, home->table[part->host_end].type);
    FATHOM_TRY(device_to_host(*home, *part, part->host_end));
    ++moved.pages;
    moved.freed += size;
  }
  return {};
}

Status KvPages::to_file(int device, int64_t n_then, int64_t bytes, Moved& moved) {
  while (moved.freed < bytes) {
    const auto [home, part] = oldest_movable(device, n_then);
    if (part == nullptr) return {};
    const int64_t size = page_bytes(*home, *part, home->table[part->host_end].type);
    if (part->file_end < part->host_end) {
      // The oldest of the host's pages makes room there for the oldest of the device's.
      FATHOM_TRY(host_to_file(*home, *part, part->file_end));
      if (Status status = device_to_host(*home, *part, part->host_end); !status.ok()) {
        if (status.code() == Code::kBudget || status.code() == Code::kMemory) continue;
        return status;
      }
    } else {
      FATHOM_TRY(device_to_file(*home, *part, part->host_end));
    }
    ++moved.pages;
    moved.freed += size;
  }
  return {};
}

void KvPages::requantise(int device, int64_t n_then, int64_t bytes, Moved& moved) noexcept {
  while (moved.freed < bytes) {
    const std::optional<KvType> type = next_type(device, n_then);
    if (!type) return;
    for (int64_t page = first_moved(); page < movable(n_then) && moved.freed < bytes; ++page) {
      const int64_t before = page_bytes_on(device, page, type_of(page));
      if (before == 0 || !is_resident(page) ||
          options_.layout.layer_bytes(type_of(page)) <= options_.layout.layer_bytes(*type))
        continue;
      for (Device& each : devices_) convert_page(each, page, *type);
      ++moved.pages;
      moved.type = *type;
      moved.freed += before - page_bytes_on(device, page, *type);
    }
  }
}

Status KvPages::read(int home, int64_t page, int64_t offset, std::byte* out, int64_t bytes) const {
  const Device& d = devices_[static_cast<size_t>(home)];
  const Part& part = part_of(d, page);
  const KvPage& entry = d.table[page];
  if (entry.data != nullptr)
    return part.backend->download(out, static_cast<const std::byte*>(entry.data) + offset, bytes);
  if (page >= part.file_end) {
    std::copy_n(part.host_pages.data(host_place(part, page)) + offset, bytes, out);
    return {};
  }
  const int64_t layer_bytes = options_.layout.layer_bytes(entry.type);
  const int64_t slot = offset / layer_bytes;
  return file_read(file_offset(d, slot, page) + offset % layer_bytes, out, bytes);
}

}  // namespace fathom::run
