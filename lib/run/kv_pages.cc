// KvPages: growth, tiers and types.
#include "kv_pages.h"

#include <fmt/format.h>

#include <algorithm>

#include "planner.h"

namespace fathom::run {
namespace {

// Types that requantise goes through, in this order, as far as the floor.
constexpr KvType kRungs[] = {KvType::kF8, KvType::kQ8_0, KvType::kQ4_0};

KvType largest_type(const KvPolicy& policy, const KvLayout& layout) noexcept {
  return layout.layer_bytes(policy.hot_type) > layout.layer_bytes(policy.type) ? policy.hot_type
                                                                               : policy.type;
}

}  // namespace

TierBytes tier_bytes(const std::vector<KvTier>& tiers, const KvPolicy& policy,
                     const KvLayout& layout, bool all_devices_host) noexcept {
  if (tiers.size() < 2) return {};
  const int64_t layer = layout.layer_bytes(largest_type(policy, layout));
  const bool file = std::find(tiers.begin(), tiers.end(), KvTier::kFile) != tiers.end();
  return {.staging = stream_rows(layout.page_tokens) / layout.page_tokens * layer,
          .bounce = file && !all_devices_host ? layer : 0};
}

Result<std::unique_ptr<KvPages>> KvPages::create(std::shared_ptr<EngineState> engine,
                                                 const KVCacheOptions& options) {
  auto made = std::make_unique<KvPages>();
  KvPages& p = *made;
  p.engine_ = std::move(engine);
  p.options_ = options;
  p.max_pages_ = options.policy.pages_for(options.max_tokens);
  p.layer_stride_ = options.layout.layer_bytes(largest_type(options.policy, options.layout));
  const auto n_devices = static_cast<int64_t>(options.layers_on_device.size());
  const int64_t n_tables = n_devices * tables_per_device(options.tiers);
  FATHOM_TRY_ASSIGN(
      p.tables_, p.engine_->allocate(
                     p.engine_->host_device, Purpose::kRuntime,
                     page_table_bytes(options.max_tokens, options.layout.page_tokens, n_tables)));
  auto* table = reinterpret_cast<KvPage*>(p.tables_.data());
  bool all_host = true;
  int64_t first_layer = 0;
  for (int d = 0; d < n_devices; ++d) {
    Device device;
    device.index = d;
    device.backend = p.engine_->devices[static_cast<size_t>(d)].get();
    device.n_layers = options.layers_on_device[static_cast<size_t>(d)];
    device.first_layer = first_layer;
    first_layer += device.n_layers;
    device.slot_bytes = std::max(p.page_bytes(device, options.policy.type),
                                 p.page_bytes(device, options.policy.hot_type));
    FATHOM_TRY_ASSIGN(device.pages,
                      p.engine_->reserve(d, Purpose::kKv, p.max_pages_ * device.slot_bytes));
    const bool on_host = device.backend->host_accessible();
    all_host &= on_host;
    if (!on_host && p.has_tier(KvTier::kHost)) {
      device.host_slot_bytes = std::max(p.host_page_bytes(device, options.policy.type),
                                        p.host_page_bytes(device, options.policy.hot_type));
      FATHOM_TRY_ASSIGN(device.host_pages,
                        p.engine_->reserve(p.engine_->host_device, Purpose::kKv,
                                           p.max_pages_ * device.host_slot_bytes));
    }
    device.table = table + d * p.max_pages_;
    if (tables_per_device(options.tiers) > 1) device.view = table + (n_devices + d) * p.max_pages_;
    device.file_end = device.host_end = p.first_moved();
    p.devices_.push_back(std::move(device));
  }
  const TierBytes bytes = tier_bytes(options.tiers, options.policy, options.layout, all_host);
  for (Device& device : p.devices_) {
    FATHOM_TRY_ASSIGN(device.staging,
                      p.engine_->allocate(device.index, Purpose::kStaging,
                                          device.n_layers > 0 ? bytes.staging : 0));
  }
  FATHOM_TRY_ASSIGN(p.bounce_,
                    p.engine_->allocate(p.engine_->host_device, Purpose::kStaging, bytes.bounce));
  return made;
}

// ---- sizes and places -------------------------------------------------------------------------

bool KvPages::has_tier(KvTier tier) const noexcept {
  return std::find(options_.tiers.begin(), options_.tiers.end(), tier) != options_.tiers.end();
}

int64_t KvPages::page_bytes(const Device& device, KvType type) const noexcept {
  return committed_bytes(options_.layout.page_bytes(type, device.n_layers),
                         device.backend->granularity());
}

int64_t KvPages::host_page_bytes(const Device& device, KvType type) const noexcept {
  const Backend& host = *engine_->devices[static_cast<size_t>(engine_->host_device)];
  return committed_bytes(options_.layout.page_bytes(type, device.n_layers), host.granularity());
}

// Pages of a layer lie side by side, so that a piece of a layer is read at once.
int64_t KvPages::file_offset(const Device& device, int64_t layer_slot,
                             int64_t page) const noexcept {
  return ((device.first_layer + layer_slot) * max_pages_ + page) * layer_stride_;
}

int64_t KvPages::size_bytes() const noexcept {
  int64_t bytes = 0;
  for (const Device& device : devices_)
    bytes += device.pages.size_bytes() + device.host_pages.size_bytes();
  return bytes;
}

int64_t KvPages::bytes_on(int device) const noexcept {
  int64_t bytes = tables_.bytes_on(device) + bounce_.bytes_on(device);
  for (const Device& d : devices_)
    bytes += d.pages.bytes_on(device) + d.host_pages.bytes_on(device) + d.staging.bytes_on(device);
  return bytes;
}

int64_t KvPages::pages_in(int device, KvTier tier) const noexcept {
  const Device& d = devices_[static_cast<size_t>(device)];
  switch (tier) {
    case KvTier::kDevice:
      return n_pages_ - (d.host_end - first_moved());
    case KvTier::kHost:
      return d.host_end - d.file_end;
    case KvTier::kFile:
      return d.file_end - first_moved();
  }
  return 0;
}

int64_t KvPages::held_bytes(int device) const noexcept {
  int64_t bytes = devices_[static_cast<size_t>(device)].pages.size_bytes();
  if (device == engine_->host_device)
    for (const Device& d : devices_) bytes += d.host_pages.size_bytes();
  return bytes;
}

int64_t KvPages::bytes_in(KvTier tier) const noexcept {
  int64_t bytes = 0;
  for (const Device& d : devices_) {
    if (tier == KvTier::kDevice) bytes += d.pages.size_bytes();
    if (tier == KvTier::kHost) bytes += d.host_pages.size_bytes();
    if (tier == KvTier::kFile)
      for (int64_t page = first_moved(); page < d.file_end; ++page)
        bytes += options_.layout.page_bytes(d.table[page].type, d.n_layers);
  }
  return bytes;
}

// ---- growth -----------------------------------------------------------------------------------

Status KvPages::map_page(Device& device, int64_t page, KvType type) {
  const int64_t at = page * device.slot_bytes;
  FATHOM_TRY(device.pages.commit(at, page_bytes(device, type)));
  device.table[page] = {device.pages.data(at), type};
  return {};
}

Status KvPages::map_next(KvType type) {
  for (size_t d = 0; d < devices_.size(); ++d)
    if (Status status = map_page(devices_[d], n_pages_, type); !status.ok()) {
      for (size_t undo = 0; undo < d; ++undo) {
        unmap_page(devices_[undo], n_pages_);
        devices_[undo].table[n_pages_] = {};
      }
      return status;
    }
  ++n_pages_;
  return {};
}

// The entry keeps its type.
void KvPages::unmap_page(Device& device, int64_t page) noexcept {
  device.pages.decommit(page * device.slot_bytes, page_bytes(device, device.table[page].type));
  device.table[page].data = nullptr;
}

void KvPages::drop_page(Device& device, int64_t page) noexcept {
  if (page < first_moved() || page >= device.host_end) {
    unmap_page(device, page);
  } else if (page >= device.file_end) {
    device.host_pages.decommit(page * device.host_slot_bytes,
                               host_page_bytes(device, device.table[page].type));
  } else {
    for (int64_t slot = 0; slot < device.n_layers && file_.is_open(); ++slot)
      file_.discard(file_offset(device, slot, page), layer_stride_);
  }
  device.table[page] = {};
}

// Rewrites a page in `type` and gives back what it no longer needs.
void KvPages::convert_page(Device& device, int64_t page, KvType type) noexcept {
  KvPage& entry = device.table[page];
  const int64_t before = page_bytes(device, entry.type), after = page_bytes(device, type);
  if (entry.data == nullptr || entry.type == type || after > before) return;
  device.backend->kv_convert({}, {entry.data, options_.layout, device.n_layers, entry.type, type});
  entry.type = type;
  if (before == after) return;
  const int64_t at = page * device.slot_bytes;
  device.pages.decommit(at + after, before - after);
  entry.data = device.pages.data(at);
}

// Rewrites the written pages that are cold once the session holds n_tokens_then tokens.
void KvPages::settle(int64_t n_tokens_then) noexcept {
  const int64_t end =
      std::min(options_.policy.cold_end(n_tokens_then), n_tokens_ / options_.policy.page_tokens);
  for (int64_t page = std::max(n_settled_, first_moved()); page < end; ++page)
    for (Device& device : devices_)
      if (options_.layout.page_bytes(device.table[page].type, 1) >
          options_.layout.page_bytes(options_.policy.type, 1))
        convert_page(device, page, options_.policy.type);
  n_settled_ = std::max(n_settled_, end);
}

// The page that the next row goes to may have been moved before the text was shortened.
Status KvPages::make_writable() {
  const int64_t page = n_tokens_ / options_.policy.page_tokens;
  for (Device& device : devices_)
    if (device.host_end > first_moved() && page < device.host_end && page < n_pages_)
      FATHOM_TRY(bring_back(device, page));
  return {};
}

// The last page that was moved comes back.
Status KvPages::bring_back(Device& device, int64_t page) {
  FATHOM_TRY(map_page(device, page, device.table[page].type));
  std::byte* data = static_cast<std::byte*>(device.table[page].data);
  const KvType type = device.table[page].type;
  const int64_t layer_bytes = options_.layout.layer_bytes(type);
  Status read;
  if (page >= device.file_end) {
    read = device.backend->upload(data, host_page(device, page), layer_bytes * device.n_layers);
  } else {
    for (int64_t slot = 0; slot < device.n_layers && read.ok(); ++slot)
      read = read_layer(device, slot, page, data + slot * layer_bytes, layer_bytes);
  }
  if (!read.ok()) {
    unmap_page(device, page);
    return read;
  }
  if (page >= device.file_end)
    device.host_pages.decommit(page * device.host_slot_bytes, host_page_bytes(device, type));
  device.host_end = page;
  device.file_end = std::min(device.file_end, page);
  return {};
}

Status KvPages::map(int64_t n_tokens) {
  if (n_tokens > options_.max_tokens)
    return Status(Code::kContextFull, fmt::format("{} tokens do not fit a context of at most {}",
                                                  n_tokens, options_.max_tokens));
  const int64_t before = n_pages_, wanted = options_.policy.pages_for(n_tokens);
  while (n_pages_ < wanted)
    if (Status status = map_next(options_.policy.new_page_type(n_pages_)); !status.ok()) {
      while (n_pages_ > before) {
        --n_pages_;
        for (Device& device : devices_) drop_page(device, n_pages_);
      }
      return status;
    }
  return {};
}

Status KvPages::reserve(int64_t n_tokens) {
  if (n_tokens <= options_.max_tokens) {
    settle(n_tokens);
    if (n_tokens > n_tokens_) FATHOM_TRY(make_writable());
  }
  return map(n_tokens);
}

Status KvPages::add_page(KvType type) {
  const KvPolicy& policy = options_.policy;
  const KvLayout& layout = options_.layout;
  const bool mixed = policy.first_tokens > 0 || policy.recent_tokens > 0;
  const bool rung = options_.floor_type &&
                    std::find(std::begin(kRungs), std::end(kRungs), type) != std::end(kRungs) &&
                    layout.layer_bytes(type) < layout.layer_bytes(policy.type) &&
                    layout.layer_bytes(type) >= layout.layer_bytes(*options_.floor_type);
  if (type != policy.type && !(mixed && type == policy.hot_type) && !rung)
    return Status(Code::kMismatch,
                  fmt::format("the rows are {}, this session's cache takes {}{}{} (kv.type)",
                              kv_type_name(type), kv_type_name(policy.type),
                              mixed ? fmt::format(" and {}", kv_type_name(policy.hot_type)) : "",
                              options_.floor_type ? fmt::format(" and by its ladder {} at least",
                                                                kv_type_name(*options_.floor_type))
                                                  : ""))
        .about("kv.type");
  if (n_pages_ == max_pages_)
    return Status(Code::kContextFull, fmt::format("a context of at most {} tokens has {} pages",
                                                  options_.max_tokens, n_pages_));
  return map_next(type);
}

void KvPages::truncate(int64_t n_tokens, int64_t keep_tokens) noexcept {
  n_tokens_ = std::min(n_tokens_, n_tokens);
  const int64_t keep = options_.policy.pages_for(std::max(n_tokens_, keep_tokens));
  while (n_pages_ > keep) {
    --n_pages_;
    for (Device& device : devices_) drop_page(device, n_pages_);
  }
  for (Device& device : devices_) {
    device.host_end = std::clamp(device.host_end, first_moved(), std::max(first_moved(), n_pages_));
    device.file_end = std::min(device.file_end, device.host_end);
  }
  n_settled_ = std::min(n_settled_, n_pages_);
}

// ---- what the ladder can do -------------------------------------------------------------------

int64_t KvPages::growth_bytes(int device, int64_t n_then) const noexcept {
  const Device& d = devices_[static_cast<size_t>(device)];
  int64_t bytes = 0;
  for (int64_t page = n_pages_; page < options_.policy.pages_for(n_then); ++page)
    bytes += page_bytes(d, options_.policy.new_page_type(page));
  const int64_t next = n_tokens_ / options_.policy.page_tokens;
  if (n_then > n_tokens_ && d.host_end > first_moved() && next < d.host_end && next < n_pages_)
    bytes += page_bytes(d, d.table[next].type);
  return bytes;
}

int64_t KvPages::first_resident() const noexcept {
  int64_t first = first_moved();
  for (const Device& device : devices_) first = std::max(first, device.host_end);
  return first;
}

std::optional<KvType> KvPages::next_type(int64_t n_then) const noexcept {
  if (!options_.floor_type) return std::nullopt;
  const KvLayout& layout = options_.layout;
  const int64_t floor = layout.layer_bytes(*options_.floor_type);
  for (const KvType rung : kRungs) {
    if (layout.layer_bytes(rung) < floor) continue;
    // fp8 and q8_0 are one rung: which of them, the floor says.
    if (rung == KvType::kF8 && *options_.floor_type != KvType::kF8) continue;
    for (int64_t page = first_resident(); page < std::min(movable(n_then), n_pages_); ++page)
      if (layout.layer_bytes(type_of(page)) > layout.layer_bytes(rung)) return rung;
  }
  return std::nullopt;
}

int64_t KvPages::movable_bytes(int device, int64_t n_then) const noexcept {
  const Device& d = devices_[static_cast<size_t>(device)];
  int64_t bytes = 0;
  for (int64_t page = d.host_end; page < std::min(movable(n_then), n_pages_); ++page)
    bytes += page_bytes(d, d.table[page].type);
  return bytes;
}

int64_t KvPages::tokens_freeing(int device, int64_t bytes) const noexcept {
  const Device& d = devices_[static_cast<size_t>(device)];
  int64_t page = n_pages_;
  for (int64_t freed = 0; page > 0 && freed < bytes;)
    if (d.table[--page].data != nullptr) freed += page_bytes(d, d.table[page].type);
  return std::min(page * options_.policy.page_tokens, n_tokens_);
}

LadderGains KvPages::gains(int device, int64_t n_then) const noexcept {
  const Device& d = devices_[static_cast<size_t>(device)];
  LadderGains gains;
  const int64_t resident = movable_bytes(device, n_then);
  const int64_t end = std::min(movable(n_then), n_pages_);
  if (d.has_host_tier())
    gains[LadderStep::kSpill] = std::min(resident, engine_->ledger.available(engine_->host_device));
  if (has_tier(KvTier::kFile)) gains[LadderStep::kFile] = resident;
  if (const std::optional<KvType> type = next_type(n_then))
    for (int64_t page = first_resident(); page < end; ++page)
      gains[LadderStep::kRequantise] +=
          std::max<int64_t>(page_bytes(d, d.table[page].type) - page_bytes(d, *type), 0);
  // A page of the host tier that does not fit there any more is no gain.
  if (gains[LadderStep::kSpill] < (end > d.host_end ? page_bytes(d, d.table[d.host_end].type) : 1))
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
  if (engine_->simulation) return {};
  return file_.read(offset, {out, static_cast<size_t>(bytes)});
}

Status KvPages::write_layer(Device& device, int64_t slot, int64_t page,
                            const std::byte* device_data, int64_t bytes) {
  const std::byte* data = device_data;
  if (!device.backend->host_accessible()) {
    FATHOM_TRY(device.backend->download(bounce_.data(), device_data, bytes));
    data = bounce_.data();
  }
  return file_write(file_offset(device, slot, page), data, bytes);
}

Status KvPages::read_layer(Device& device, int64_t slot, int64_t page, std::byte* device_data,
                           int64_t bytes) {
  const int64_t offset = file_offset(device, slot, page);
  if (device.backend->host_accessible()) return file_read(offset, device_data, bytes);
  FATHOM_TRY(file_read(offset, bounce_.data(), bytes));
  return device.backend->upload(device_data, bounce_.data(), bytes);
}

Status KvPages::device_to_host(Device& device, int64_t page) {
  const KvType type = device.table[page].type;
  const int64_t bytes = host_page_bytes(device, type), at = page * device.host_slot_bytes;
  FATHOM_TRY(device.host_pages.commit(at, bytes));
  if (Status status = device.backend->download(host_page(device, page), device.table[page].data,
                                               options_.layout.page_bytes(type, device.n_layers));
      !status.ok()) {
    device.host_pages.decommit(at, bytes);
    return status;
  }
  unmap_page(device, page);
  ++device.host_end;
  return {};
}

Status KvPages::device_to_file(Device& device, int64_t page) {
  FATHOM_TRY(open_file());
  const int64_t bytes = options_.layout.layer_bytes(device.table[page].type);
  const auto* data = static_cast<const std::byte*>(device.table[page].data);
  for (int64_t slot = 0; slot < device.n_layers; ++slot)
    FATHOM_TRY(write_layer(device, slot, page, data + slot * bytes, bytes));
  unmap_page(device, page);
  ++device.host_end;
  ++device.file_end;
  return {};
}

Status KvPages::host_to_file(Device& device, int64_t page) {
  FATHOM_TRY(open_file());
  const KvType type = device.table[page].type;
  const int64_t bytes = options_.layout.layer_bytes(type);
  for (int64_t slot = 0; slot < device.n_layers; ++slot)
    FATHOM_TRY(
        file_write(file_offset(device, slot, page), host_page(device, page) + slot * bytes, bytes));
  device.host_pages.decommit(page * device.host_slot_bytes, host_page_bytes(device, type));
  ++device.file_end;
  return {};
}

Status KvPages::spill(int device, int64_t n_then, int64_t bytes, Moved& moved) {
  Device& d = devices_[static_cast<size_t>(device)];
  while (moved.freed < bytes && d.host_end < std::min(movable(n_then), n_pages_)) {
    const int64_t size = page_bytes(d, d.table[d.host_end].type);
    FATHOM_TRY(device_to_host(d, d.host_end));
    ++moved.pages;
    moved.freed += size;
  }
  return {};
}

Status KvPages::to_file(int device, int64_t n_then, int64_t bytes, Moved& moved) {
  Device& d = devices_[static_cast<size_t>(device)];
  while (moved.freed < bytes && d.host_end < std::min(movable(n_then), n_pages_)) {
    const int64_t size = page_bytes(d, d.table[d.host_end].type);
    if (d.file_end < d.host_end) {
      // The oldest of the host's pages makes room there for the oldest of the device's.
      FATHOM_TRY(host_to_file(d, d.file_end));
      if (Status status = device_to_host(d, d.host_end); !status.ok()) {
        if (status.code() == Code::kBudget || status.code() == Code::kMemory) continue;
        return status;
      }
    } else {
      FATHOM_TRY(device_to_file(d, d.host_end));
    }
    ++moved.pages;
    moved.freed += size;
  }
  return {};
}

void KvPages::requantise(int device, int64_t n_then, int64_t bytes, Moved& moved) noexcept {
  const Device& d = devices_[static_cast<size_t>(device)];
  while (moved.freed < bytes) {
    const std::optional<KvType> type = next_type(n_then);
    if (!type) return;
    const int64_t end = std::min(movable(n_then), n_pages_);
    for (int64_t page = first_resident(); page < end && moved.freed < bytes; ++page) {
      const int64_t before = page_bytes(d, d.table[page].type);
      if (options_.layout.layer_bytes(type_of(page)) <= options_.layout.layer_bytes(*type))
        continue;
      for (Device& each : devices_) convert_page(each, page, *type);
      ++moved.pages;
      moved.type = *type;
      moved.freed += before - page_bytes(d, d.table[page].type);
    }
  }
}

Status KvPages::read(int device, int64_t page, int64_t offset, std::byte* out,
                     int64_t bytes) const {
  const Device& d = devices_[static_cast<size_t>(device)];
  const KvPage& entry = d.table[page];
  if (entry.data != nullptr)
    return d.backend->download(out, static_cast<const std::byte*>(entry.data) + offset, bytes);
  if (page >= d.file_end) {
    std::copy_n(host_page(d, page) + offset, bytes, out);
    return {};
  }
  const int64_t layer_bytes = options_.layout.layer_bytes(entry.type);
  const int64_t slot = offset / layer_bytes;
  return file_read(file_offset(d, slot, page) + offset % layer_bytes, out, bytes);
}

}  // namespace fathom::run
