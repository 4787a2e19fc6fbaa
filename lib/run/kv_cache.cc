// KVCache: pages in a reserved address range per device, mapped as rows arrive, rewritten in a
// smaller type when the policy calls them cold.
#include "fathom/kv_cache.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "engine_state.h"
#include "planner.h"

namespace fathom {

struct KVCache::State {
  std::shared_ptr<run::EngineState> engine;  // outlives the ranges below
  KVCacheOptions options;
  struct Device {
    Backend* backend = nullptr;
    run::MemoryRange pages;
    int64_t n_layers = 0;
    int64_t slot_bytes = 0;   // from page to page: the largest page in whole commits
    KvPage* table = nullptr;  // [max_pages]
  };
  std::vector<Device> devices;
  run::MemoryRange tables;
  int64_t n_tokens = 0;
  int64_t n_pages = 0;    // mapped on every device
  int64_t n_settled = 0;  // pages below are in their final type

  // Committed bytes of a page of this type.
  int64_t page_bytes(const Device& device, KvType type) const noexcept {
    return run::committed_bytes(options.layout.page_bytes(type, device.n_layers),
                                device.backend->granularity());
  }
  Status map_page(Device& device, KvType type) {
    const int64_t at = n_pages * device.slot_bytes;
    FATHOM_TRY(device.pages.commit(at, page_bytes(device, type)));
    device.table[n_pages] = {device.pages.data() + at, type};
    return {};
  }
  // The next page on every device, or nothing.
  Status add_page(KvType type) {
    for (size_t d = 0; d < devices.size(); ++d)
      if (Status status = map_page(devices[d], type); !status.ok()) {
        for (size_t undo = 0; undo < d; ++undo) unmap_page(devices[undo], n_pages);
        return status;
      }
    ++n_pages;
    return {};
  }
  void unmap_page(Device& device, int64_t page) noexcept {
    device.pages.decommit(page * device.slot_bytes, page_bytes(device, device.table[page].type));
    device.table[page] = {};
  }
  // Rewrites a page in `type` and gives back what it no longer needs.
  void convert_page(Device& device, int64_t page, KvType type) noexcept {
    KvPage& entry = device.table[page];
    const int64_t before = page_bytes(device, entry.type), after = page_bytes(device, type);
    if (entry.type == type || after > before) return;
    device.backend->kv_convert({}, {entry.data, options.layout, device.n_layers, entry.type, type});
    entry.type = type;
    if (before > after) device.pages.decommit(page * device.slot_bytes + after, before - after);
  }
  // Rewrites the written pages that are cold once the session holds n_tokens_then tokens.
  void settle(int64_t n_tokens_then) noexcept {
    const int64_t written = n_tokens / options.layout.page_tokens;
    const int64_t end = std::min(options.policy.cold_end(n_tokens_then), written);
    for (int64_t page = std::max(n_settled, options.policy.first_cold_page()); page < end; ++page)
      for (Device& device : devices) convert_page(device, page, options.policy.type);
    n_settled = std::max(n_settled, end);
  }
};

KVCache::KVCache(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}
KVCache::KVCache(KVCache&&) noexcept = default;
KVCache& KVCache::operator=(KVCache&&) noexcept = default;
KVCache::~KVCache() = default;

Result<KVCache> KVCache::create(std::shared_ptr<run::EngineState> engine,
                                const KVCacheOptions& options) {
  return run::guarded([&]() -> Result<KVCache> {
    auto state = std::make_unique<State>();
    state->engine = std::move(engine);
    state->options = options;
    const int64_t max_pages = options.policy.pages_for(options.max_tokens);
    const auto n_devices = static_cast<int64_t>(options.layers_on_device.size());
    FATHOM_TRY_ASSIGN(
        state->tables,
        state->engine->allocate(
            state->engine->host_device, Purpose::kRuntime,
            run::page_table_bytes(options.max_tokens, options.layout.page_tokens, n_devices)));
    auto* table = reinterpret_cast<KvPage*>(state->tables.data());
    for (int d = 0; d < n_devices; ++d) {
      State::Device device;
      device.backend = state->engine->devices[static_cast<size_t>(d)].get();
      device.n_layers = options.layers_on_device[static_cast<size_t>(d)];
      device.slot_bytes = std::max(state->page_bytes(device, options.policy.type),
                                   state->page_bytes(device, options.policy.hot_type));
      FATHOM_TRY_ASSIGN(device.pages,
                        state->engine->reserve(d, Purpose::kKv, max_pages * device.slot_bytes));
      device.table = table + d * max_pages;
      state->devices.push_back(std::move(device));
    }
    return KVCache(std::move(state));
  });
}

int64_t KVCache::n_tokens() const noexcept {
  return state_->n_tokens;
}
int64_t KVCache::capacity_tokens() const noexcept {
  return std::min(state_->n_pages * page_tokens(), max_tokens());
}
int64_t KVCache::max_tokens() const noexcept {
  return state_->options.max_tokens;
}
int64_t KVCache::page_tokens() const noexcept {
  return state_->options.layout.page_tokens;
}
int64_t KVCache::size_bytes() const noexcept {
  int64_t bytes = 0;
  for (const State::Device& device : state_->devices) bytes += device.pages.size_bytes();
  return bytes;
}

Status KVCache::reserve(int64_t n_tokens) {
  State& s = *state_;
  if (n_tokens > max_tokens())
    return Status(Code::kContextFull, fmt::format("{} tokens do not fit a context of at most {}",
                                                  n_tokens, max_tokens()));
  const int64_t before = s.n_pages, wanted = s.options.policy.pages_for(n_tokens);
  s.settle(n_tokens);
  while (s.n_pages < wanted)
    if (Status status = s.add_page(s.options.policy.new_page_type(s.n_pages)); !status.ok()) {
      while (s.n_pages > before) {
        --s.n_pages;
        for (State::Device& device : s.devices) s.unmap_page(device, s.n_pages);
      }
      return status;
    }
  return {};
}

Status KVCache::add_page(KvType type) {
  State& s = *state_;
  const KvPolicy& policy = s.options.policy;
  const bool mixed = policy.first_tokens > 0 || policy.recent_tokens > 0;
  if (type != policy.type && !(mixed && type == policy.hot_type))
    return Status(Code::kMismatch,
                  fmt::format("the rows are {}, this session's cache takes {}{} (kv.type)",
                              kv_type_name(type), kv_type_name(policy.type),
                              mixed ? fmt::format(" and {}", kv_type_name(policy.hot_type)) : ""))
        .about("kv.type");
  if (s.n_pages == policy.pages_for(max_tokens()))
    return Status(Code::kContextFull, fmt::format("a context of at most {} tokens has {} pages",
                                                  max_tokens(), s.n_pages));
  return s.add_page(type);
}

void KVCache::commit_rows(int64_t n_tokens) noexcept {
  state_->n_tokens = n_tokens;
}

void KVCache::truncate(int64_t n_tokens, int64_t keep_tokens) noexcept {
  State& s = *state_;
  s.n_tokens = std::min(s.n_tokens, n_tokens);
  const int64_t keep = s.options.policy.pages_for(std::max(s.n_tokens, keep_tokens));
  while (s.n_pages > keep) {
    --s.n_pages;
    for (State::Device& device : s.devices) s.unmap_page(device, s.n_pages);
  }
  s.n_settled = std::min(s.n_settled, s.n_pages);
}

KvRows KVCache::rows(int device, int64_t layer_slot, int64_t first_row,
                     int64_t n_rows) const noexcept {
  return {state_->devices[static_cast<size_t>(device)].table, state_->options.layout, layer_slot,
          first_row, n_rows};
}

}  // namespace fathom
