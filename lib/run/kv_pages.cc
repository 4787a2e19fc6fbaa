// KvPages: growth and types.  Tiers: kv_tiers.cc; attention: kv_stream.cc.
#include "kv_pages.h"

#include <fmt/format.h>

#include <algorithm>

#include "kv_parts.h"
#include "planner.h"

namespace fathom::run {
namespace {

KvType largest_type(const KvPolicy& policy, const KvLayout& layout) noexcept {
  return layout.layer_bytes(policy.hot_type) > layout.layer_bytes(policy.type) ? policy.hot_type
                                                                               : policy.type;
}

}  // namespace

TierBytes tier_bytes(const std::vector<KvTier>& tiers, bool spread, const KvPolicy& policy,
                     const KvLayout& layout, bool all_devices_host) noexcept {
  if (tiers.size() < 2 && !spread) return {};
  const int64_t layer = layout.layer_bytes(largest_type(policy, layout));
  const bool file = std::find(tiers.begin(), tiers.end(), KvTier::kFile) != tiers.end();
  return {.staging = stream_rows(layout.page_tokens) / layout.page_tokens * layer,
          .bounce = (file || spread) && !all_devices_host ? layer : 0};
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
  const bool spread = !options.spans.empty();
  const int64_t tables = tables_per_device(options.tiers, spread);
  FATHOM_TRY_ASSIGN(p.tables_, p.engine_->allocate(
                                   p.engine_->host_device, Purpose::kRuntime,
                                   page_table_bytes(options.max_tokens, options.layout.page_tokens,
                                                    n_devices * tables)));
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
    all_host &= device.backend->host_accessible();
    device.table = table + d * p.max_pages_;
    if (tables > 1) device.view = table + (n_devices + d) * p.max_pages_;
    p.devices_.push_back(std::move(device));
  }
  for (const KvPart& where : kv_parts(options.spans, options.layers_on_device,
                                      options.layout.page_tokens, p.max_pages_)) {
    Device& home = p.devices_[static_cast<size_t>(where.home)];
    Part part;
    part.device = where.device;
    part.backend = p.engine_->devices[static_cast<size_t>(where.device)].get();
    part.first_page = where.first_page;
    part.end_page = where.end_page;
    part.begin = std::clamp(p.first_moved(), part.first_page, part.end_page);
    part.file_end = part.host_end = part.begin;
    const int64_t n_pages = part.end_page - part.first_page;
    part.slot_bytes = std::max(p.page_bytes(home, part, options.policy.type),
                               p.page_bytes(home, part, options.policy.hot_type));
    FATHOM_TRY_ASSIGN(part.pages,
                      p.engine_->reserve(part.device, Purpose::kKv, n_pages * part.slot_bytes));
    if (!part.backend->host_accessible() && p.has_tier(KvTier::kHost)) {
      part.host_slot_bytes = std::max(p.host_page_bytes(home, options.policy.type),
                                      p.host_page_bytes(home, options.policy.hot_type));
      FATHOM_TRY_ASSIGN(part.host_pages, p.engine_->reserve(p.engine_->host_device, Purpose::kKv,
                                                            n_pages * part.host_slot_bytes));
      part.host_pages.pin_for(*part.backend);
    }
    home.parts.push_back(std::move(part));
  }
  p.refused_.assign(p.devices_.size(), -1);
  const TierBytes bytes =
      tier_bytes(options.tiers, spread, options.policy, options.layout, all_host);
  for (Device& device : p.devices_) {
    FATHOM_TRY_ASSIGN(device.staging, p.engine_->allocate(device.index, Purpose::kStaging,
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

const KvPages::Part& KvPages::part_of(const Device& device, int64_t page) noexcept {
  size_t i = 0;
  while (i + 1 < device.parts.size() && page >= device.parts[i].end_page) ++i;
  return device.parts[i];
}

int64_t KvPages::page_bytes(const Device& home, const Part& part, KvType type) const noexcept {
  return kv_page_bytes(options_.layout, type, home.n_layers, part.backend->granularity());
}

int64_t KvPages::page_bytes_on(int device, int64_t page, KvType type) const noexcept {
  int64_t bytes = 0;
  for (const Device& home : devices_)
    if (const Part& part = part_of(home, page); part.device == device)
      bytes += page_bytes(home, part, type);
  return bytes;
}

int64_t KvPages::host_page_bytes(const Device& home, KvType type) const noexcept {
  const Backend& host = *engine_->devices[static_cast<size_t>(engine_->host_device)];
  return kv_page_bytes(options_.layout, type, home.n_layers, host.granularity());
}

bool KvPages::has_host_tier(int device) const noexcept {
  bool any = false;
  each_part(device, [&](const Device&, const Part& part) { any = any || part.has_host_tier(); });
  return any;
}

// Pages of a layer lie side by side, so that a piece of a layer is read at once.
int64_t KvPages::file_offset(const Device& device, int64_t layer_slot,
                             int64_t page) const noexcept {
  return ((device.first_layer + layer_slot) * max_pages_ + page) * layer_stride_;
}

int64_t KvPages::size_bytes() const noexcept {
  return bytes_in(KvTier::kDevice) + bytes_in(KvTier::kHost);
}

int64_t KvPages::bytes_on(int device) const noexcept {
  int64_t bytes = tables_.bytes_on(device) + bounce_.bytes_on(device);
  for (const Device& home : devices_) {
    bytes += home.staging.bytes_on(device);
    for (const Part& part : home.parts)
      bytes += part.pages.bytes_on(device) + part.host_pages.bytes_on(device);
  }
  return bytes;
}

// Of the home with the most of them: those of several homes are of the same tokens.
int64_t KvPages::pages_in(int device, KvTier tier) const noexcept {
  int64_t most = 0;
  for (const Device& home : devices_) {
    int64_t pages = 0;
    for (const Part& part : home.parts) {
      if (part.device != device) continue;
      if (tier == KvTier::kDevice)
        pages += std::max<int64_t>(std::min(part.end_page, n_pages_) - part.first_page, 0) -
                 (part.host_end - part.begin);
      if (tier == KvTier::kHost) pages += part.host_end - part.file_end;
      if (tier == KvTier::kFile) pages += part.file_end - part.begin;
    }
    most = std::max(most, pages);
  }
  return most;
}

int64_t KvPages::held_bytes(int device) const noexcept {
  int64_t bytes = 0;
  for (const Device& home : devices_)
    for (const Part& part : home.parts) {
      if (part.device == device) bytes += part.pages.size_bytes();
      if (device == engine_->host_device) bytes += part.host_pages.size_bytes();
    }
  return bytes;
}

int64_t KvPages::host_bytes_of(int device) const noexcept {
  int64_t bytes = 0;
  for (const Device& home : devices_)
    for (const Part& part : home.parts)
      if (part.device == device) bytes += part.host_pages.size_bytes();
  return bytes;
}

int64_t KvPages::bytes_in(KvTier tier) const noexcept {
  int64_t bytes = 0;
  for (const Device& home : devices_)
    for (const Part& part : home.parts) {
      if (tier == KvTier::kDevice) bytes += part.pages.size_bytes();
      if (tier == KvTier::kHost) bytes += part.host_pages.size_bytes();
      if (tier == KvTier::kFile)
        for (int64_t page = part.begin; page < part.file_end; ++page)
          bytes += options_.layout.page_bytes(home.table[page].type, home.n_layers);
    }
  return bytes;
}

// ---- growth -----------------------------------------------------------------------------------

Status KvPages::map_page(Device& home, int64_t page, KvType type) {
  Part& part = part_of(home, page);
  const int64_t at = place(part, page);
  FATHOM_TRY(part.pages.commit(at, page_bytes(home, part, type)));
  home.table[page] = {part.pages.data(at), type};
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
void KvPages::unmap_page(Device& home, int64_t page) noexcept {
  Part& part = part_of(home, page);
  part.pages.decommit(place(part, page), page_bytes(home, part, home.table[page].type));
  home.table[page].data = nullptr;
}

void KvPages::drop_page(Device& home, int64_t page) noexcept {
  Part& part = part_of(home, page);
  if (!part.is_moved(page)) {
    unmap_page(home, page);
  } else if (page >= part.file_end) {
    part.host_pages.decommit(host_place(part, page), host_page_bytes(home, home.table[page].type));
  } else {
    forget_in_file(home, page);
  }
  home.table[page] = {};
}

void KvPages::forget_in_file(const Device& home, int64_t page) noexcept {
  for (int64_t slot = 0; slot < home.n_layers && file_.is_open(); ++slot)
    file_.discard(file_offset(home, slot, page), layer_stride_);
}

// Rewrites a page in `type` and gives back what it no longer needs.
void KvPages::convert_page(Device& home, int64_t page, KvType type) noexcept {
  KvPage& entry = home.table[page];
  Part& part = part_of(home, page);
  const int64_t before = page_bytes(home, part, entry.type), after = page_bytes(home, part, type);
  if (entry.data == nullptr || entry.type == type || after > before) return;
  part.backend->kv_convert({}, {entry.data, options_.layout, home.n_layers, entry.type, type});
  entry.type = type;
  if (before == after) return;
  const int64_t at = place(part, page);
  part.pages.decommit(at + after, before - after);
  entry.data = part.pages.data(at);
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
  for (Device& home : devices_)
    if (page < n_pages_ && part_of(home, page).is_moved(page)) FATHOM_TRY(bring_back(home, page));
  return {};
}

// The last page of its part that was moved comes back.
Status KvPages::bring_back(Device& home, int64_t page) {
  Part& part = part_of(home, page);
  FATHOM_TRY(map_page(home, page, home.table[page].type));
  std::byte* data = static_cast<std::byte*>(home.table[page].data);
  const KvType type = home.table[page].type;
  const int64_t layer_bytes = options_.layout.layer_bytes(type);
  Status read;
  if (page >= part.file_end) {
    read = part.backend->upload(data, part.host_pages.data(host_place(part, page)),
                                layer_bytes * home.n_layers);
  } else {
    for (int64_t slot = 0; slot < home.n_layers && read.ok(); ++slot)
      read = read_layer(home, *part.backend, slot, page, data + slot * layer_bytes, layer_bytes);
  }
  if (!read.ok()) {
    unmap_page(home, page);
    return read;
  }
  if (page >= part.file_end)
    part.host_pages.decommit(host_place(part, page), host_page_bytes(home, type));
  else
    forget_in_file(home, page);
  part.host_end = page;
  part.file_end = std::min(part.file_end, page);
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
  for (Device& home : devices_)
    for (Part& part : home.parts) {
      part.host_end = std::clamp(part.host_end, part.begin, std::max(part.begin, n_pages_));
      part.file_end = std::min(part.file_end, part.host_end);
    }
  n_settled_ = std::min(n_settled_, n_pages_);
}

}  // namespace fathom::run
