// KvPages: what stands behind KVCache.  Pages of one session, mapped as rows arrive; moved to host
// memory or to the spill file and rewritten in smaller types when the ladder asks for it (ladder.h
// decides, session_grow.cc climbs).
//
// The layers of a device (their home) have pages of their own.  Runs of these pages, the parts, lie
// on one device each, mostly home itself (kv_parts.h); a part has a reserved address range there.
//
//   pages of a part:   | first window | in the file | in host memory | on the device |
//                    first_page    begin         file_end        host_end         end_page
//
// The oldest cold page of a part is always the next one to go down, so two numbers say where every
// page is.  A page keeps its place in every tier, so moving needs no bookkeeping beyond them; in
// the table its data is null while it is on no device.  Attention takes moved pages through a
// staging buffer of home, and goes to those of parts elsewhere, or takes these through the buffer,
// too (kv_stream.cc).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../io/spill_file.h"
#include "../nn/layers.h"
#include "engine_state.h"
#include "fathom/kv_cache.hpp"
#include "ladder.h"

namespace fathom::run {

// Rows of one layer that attention takes at a time from moved pages: large enough to keep a device
// busy, small enough for a staging buffer.
inline constexpr int64_t kStreamRows = 1024;
static_assert(kStreamRows % kKvSplitRows == 0);

constexpr int64_t stream_rows(int64_t page_tokens) noexcept {
  return page_tokens > kStreamRows ? page_tokens : kStreamRows;
}

// What pages that attention cannot read in place cost a session, for plan and allocation alike.
struct TierBytes {
  int64_t staging = 0;  // on each device with layers
  int64_t bounce = 0;   // on the host, once: for devices that the file or others cannot write into
};
// `spread`: rows lie on other devices than their layers.
TierBytes tier_bytes(const std::vector<KvTier>& tiers, bool spread, const KvPolicy& policy,
                     const KvLayout& layout, bool all_devices_host) noexcept;
// Tables of pages per device: a second one for what attention is shown of pages in the buffer.
constexpr int64_t tables_per_device(const std::vector<KvTier>& tiers, bool spread) noexcept {
  return tiers.size() > 1 || spread ? 2 : 1;
}

class KvPages {
 public:
  // Reserves addresses, takes tables and staging.  Errors: kBudget, kMemory.
  static Result<std::unique_ptr<KvPages>> create(std::shared_ptr<EngineState> engine,
                                                 const KVCacheOptions& options);

  // As the calls of KVCache.
  Status reserve(int64_t n_tokens);
  Status add_page(KvType type);
  void truncate(int64_t n_tokens, int64_t keep_tokens) noexcept;
  void commit_rows(int64_t n_tokens) noexcept { n_tokens_ = n_tokens; }
  KvRows rows(int device, int64_t layer_slot, int64_t first_row, int64_t n_rows) const noexcept {
    return {devices_[static_cast<size_t>(device)].table, options_.layout, layer_slot, first_row,
            n_rows};
  }
  // reserve() without rewriting what leaves the window: for a session that is being restored.
  Status map(int64_t n_tokens);

  const KVCacheOptions& options() const noexcept { return options_; }
  int n_devices() const noexcept { return static_cast<int>(devices_.size()); }
  int64_t n_tokens() const noexcept { return n_tokens_; }
  int64_t n_pages() const noexcept { return n_pages_; }
  int64_t size_bytes() const noexcept;          // memory of all devices and the host, not the file
  int64_t bytes_on(int device) const noexcept;  // the same of one device, tables and staging too
  // Bytes of pages in a tier, all devices.
  int64_t bytes_in(KvTier tier) const noexcept;
  int64_t host_bytes_of(int device) const noexcept;  // that the device's own pages were moved to
  int64_t pages_in(int device, KvTier tier) const noexcept;
  // Bytes held on a device: its own pages, and on the host also those of the host tier.
  int64_t held_bytes(int device) const noexcept;
  KvType type_of(int64_t page) const noexcept { return devices_.front().table[page].type; }

  // ---- for the ladder; n_then as in movable_end() ----
  // Bytes that reserve(n_then) has still to take on a device.
  int64_t growth_bytes(int device, int64_t n_then) const noexcept;
  // What kSpill, kRequantise and kFile could free on a device.
  LadderGains gains(int device, int64_t n_then) const noexcept;
  // Moves or rewrites the oldest movable pages until `bytes` are free on the device or no page is
  // left; what was moved before an error stays moved.  `freed` counts what is free now.
  // Errors: kBudget (the host's), kMemory, kIo, kNotFound, kDevice.
  struct Moved {
    int64_t pages = 0, freed = 0;
    KvType type = KvType::kF16;  // of the last requantised page
  };
  Status spill(int device, int64_t n_then, int64_t bytes, Moved& moved);
  Status to_file(int device, int64_t n_then, int64_t bytes, Moved& moved);
  // On all devices at once, one type at a time, so that all rows of a page have one type.
  void requantise(int device, int64_t n_then, int64_t bytes, Moved& moved) noexcept;
  // What was moved comes back where there is room beside the pages of n_ahead tokens: the youngest
  // pages of a device first, then those in the file to the host (kv_return.cc).  `freed` counts
  // what was taken.
  Moved come_back(int64_t n_ahead);
  bool any_moved() const noexcept;
  // The type that the next page requantised for a device will have; none: there is no such page.
  std::optional<KvType> next_type(int device, int64_t n_then) const noexcept;
  // Bytes of pages on a device that may move.
  int64_t movable_bytes(int device, int64_t n_then) const noexcept;
  // The most tokens to truncate to so that `bytes` become free on a device; 0: even none is not
  // enough.
  int64_t tokens_freeing(int device, int64_t bytes) const noexcept;

  // ---- for the forecast: forecast.cc ----
  // The most tokens that fit `available` bytes beyond what is held, over some devices together,
  // when the session grows token by token and climbs no ladder; at most max_tokens.
  int64_t tokens_within(std::span<const int> devices, int64_t available) const noexcept;
  // Bytes on a device that could move, or be saved by rewriting in `type`, if n_tokens were written
  // and mapped.
  int64_t movable_bytes_at(int device, int64_t n_tokens) const noexcept;
  int64_t rewriting_saves_at(int device, int64_t n_tokens, KvType type) const noexcept;
  bool has_host_tier(int device) const noexcept;

  // ---- wherever a page is ----
  // Bytes [offset, offset + bytes) of a page of a home's layers as it would be on a device, inside
  // one layer slot.
  Status read(int home, int64_t page, int64_t offset, std::byte* out, int64_t bytes) const;
  // The device on which a page lies, or would if it were resident.
  int holder(int home, int64_t page) const noexcept {
    return part_of(devices_[static_cast<size_t>(home)], page).device;
  }

  // ---- for attention, as nn::RowSourceOf: kv_stream.cc ----
  nn::RowPiece piece(int home, int64_t layer_slot, const OpContext& op, int64_t first_row,
                     int64_t end_row, nn::Where where) noexcept;
  KvRows resident(int home, int64_t layer_slot, int64_t end_row) const noexcept;
  int lies_on(int home, int64_t first_row, int64_t end_row) const noexcept;
  KvRows room(int home, int64_t layer_slot, const OpContext& op, int64_t first_row,
              int64_t end_row) noexcept;
  void written(int home, int64_t layer_slot, const OpContext& op, const KvRows& rows) noexcept;
  void begin_pass() noexcept { stream_status_ = Status(); }
  Status stream_status() const noexcept { return stream_status_.clone(); }

 private:
  // A run of a home's pages on one device.
  struct Part {
    int device = 0;
    Backend* backend = nullptr;
    int64_t first_page = 0, end_page = 0;
    int64_t begin = 0;  // pages before are in the first window and stay
    MemoryRange pages;
    MemoryRange host_pages;       // reserved where the host tier is another memory
    int64_t slot_bytes = 0;       // from page to page: the largest page in whole commits
    int64_t host_slot_bytes = 0;  // the same on the host
    int64_t file_end = 0, host_end = 0;
    bool has_host_tier() const noexcept { return host_pages.reserved_bytes() > 0; }
    bool is_moved(int64_t page) const noexcept { return page >= begin && page < host_end; }
  };
  struct Device {  // as a home
    int index = 0;
    Backend* backend = nullptr;
    MemoryRange staging;
    int64_t n_layers = 0, first_layer = 0;  // the latter in the file
    KvPage* table = nullptr;                // [max_pages]
    KvPage* view = nullptr;  // [max_pages]: what attention sees of a piece in the staging buffer
    std::vector<Part> parts;
  };

  static const Part& part_of(const Device& device, int64_t page) noexcept;
  static Part& part_of(Device& device, int64_t page) noexcept {
    return const_cast<Part&>(part_of(std::as_const(device), page));
  }
  // Calls visit(home, part) for the parts that lie on a device.
  template <class Visit>
  void each_part(int device, Visit&& visit) const {
    for (const Device& home : devices_)
      for (const Part& part : home.parts)
        if (part.device == device) visit(home, part);
  }
  // The part on a device with the oldest page that may move; null: there is none.
  std::pair<Device*, Part*> oldest_movable(int device, int64_t n_then) noexcept;
  bool has_tier(KvTier tier) const noexcept;
  int64_t page_bytes(const Device&, const Part&, KvType) const noexcept;
  int64_t host_page_bytes(const Device&, KvType) const noexcept;
  // Bytes of page number `page` on a device if it were of `type`.
  int64_t page_bytes_on(int device, int64_t page, KvType type) const noexcept;
  int64_t first_moved() const noexcept { return options_.policy.first_cold_page(); }
  static int64_t place(const Part& part, int64_t page) noexcept {
    return (page - part.first_page) * part.slot_bytes;
  }
  static int64_t host_place(const Part& part, int64_t page) noexcept {
    return (page - part.first_page) * part.host_slot_bytes;
  }
  int64_t file_offset(const Device&, int64_t layer_slot, int64_t page) const noexcept;

  Status map_page(Device&, int64_t page, KvType);
  Status map_next(KvType type);
  void unmap_page(Device&, int64_t page) noexcept;
  void drop_page(Device&, int64_t page) noexcept;  // wherever it is
  void convert_page(Device&, int64_t page, KvType) noexcept;
  void settle(int64_t n_tokens_then) noexcept;
  Status bring_back(Device&, int64_t page);
  Status make_writable();
  int64_t movable(int64_t n_then) const noexcept {
    return std::min(movable_end(options_.policy, n_tokens_, n_then), n_pages_);
  }
  bool is_resident(int64_t page) const noexcept;  // of all homes
  // The spill file; on simulated devices nothing is in it and nothing is moved.
  Status open_file();
  Status file_write(int64_t offset, const std::byte* data, int64_t bytes) const noexcept;
  Status file_read(int64_t offset, std::byte* out, int64_t bytes) const noexcept;
  Status device_to_host(Device&, Part&, int64_t page);
  Status device_to_file(Device&, Part&, int64_t page);
  Status host_to_file(Device&, Part&, int64_t page);
  Status file_to_host(Device&, Part&, int64_t page);
  void forget_in_file(const Device&, int64_t page) noexcept;
  int64_t room_for_return(int device) const noexcept;
  bool may_take_back(int device, int64_t bytes, int64_t n_ahead) const noexcept;
  // Layer by layer between the file and a device, through the bounce buffer where it must.
  Status write_layer(const Device&, const Part&, int64_t slot, int64_t page,
                     const std::byte* device_data, int64_t bytes);
  Status read_layer(const Device&, Backend& to, int64_t slot, int64_t page, std::byte* device_data,
                    int64_t bytes);
  Status stream_in(Device&, const Part&, int64_t layer_slot, int64_t first_page, int64_t end_page);
  void read_ahead(const Device&, const Part&, int64_t layer_slot, int64_t first_page,
                  int64_t end_page) noexcept;
  KvRows failed(Status status) noexcept;  // no rows, and stream_status() says why

  std::shared_ptr<EngineState> engine_;  // outlives the ranges below
  KVCacheOptions options_;
  int64_t max_pages_ = 0;
  int64_t layer_stride_ = 0;  // bytes of a layer slot in the file and in the staging buffer
  std::vector<Device> devices_;
  std::vector<int64_t> refused_;  // [devices] what was free when a page could not come back
  MemoryRange tables_, bounce_;
  io::SpillFile file_;
  Status stream_status_;
  int64_t n_tokens_ = 0;
  int64_t n_pages_ = 0;    // in some tier on every device
  int64_t n_settled_ = 0;  // pages below are in their final type
};

}  // namespace fathom::run
