#include "expert_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <new>

namespace fathom::run {
namespace {

// An expert that was used once is no sign of a next time.
constexpr uint32_t kLeastUses = 2;
// Between two passes at most so many are read, so that no token waits long.
constexpr int64_t kMostCopies = 16;
constexpr int kMostMissed = 8;

// How a layer's copies lie within an expert's place.
struct ExpertParts {
  int64_t up = 0, down = 0, bytes = 0;  // offsets; gate is first
};
ExpertParts parts_of(const nn::ExpertWeights& w, int64_t granularity) {
  Arena arena;
  ExpertParts parts;
  arena.take_bytes(w.gate.matrix_bytes);
  parts.up = arena.mark();
  arena.take_bytes(w.up.matrix_bytes);
  parts.down = arena.mark();
  arena.take_bytes(w.down.matrix_bytes);
  parts.bytes = committed_bytes(arena.mark(), granularity);
  return parts;
}

int64_t n_elsewhere(const LayerPlacement& layer) {
  int64_t n = 0;
  for (const ExpertSpan& span : layer.experts)
    if (span.device != layer.device) n += span.count;
  return n;
}

// Layers of devices that keep copies, with experts elsewhere.
template <class Body>
void for_copied_layers(const Placement& placement, Body&& body) {
  for (size_t l = 0; l < placement.layers.size(); ++l)
    if (placement.has_copies(placement.layers[l].device) && n_elsewhere(placement.layers[l]) > 0)
      body(l, placement.layers[l]);
}

// The tables: counts, then flags, layer by layer.
struct Tables {
  std::atomic<uint32_t>* counts;
  bool* held;
};
Tables carve_tables(Arena& arena, int64_t n_experts) {
  return {arena.take<std::atomic<uint32_t>>(n_experts), arena.take<bool>(n_experts)};
}

}  // namespace

CopyLayout copy_layout(const Backend& device, int index, const Placement& placement,
                       const ModelConfig& config, const nn::Weights& weights) {
  CopyLayout out;
  for_copied_layers(placement, [&](size_t l, const LayerPlacement& place) {
    if (place.device != index) return;
    auto experts = nn::experts_on(device, weights.layers[l], config.n_routed_experts);
    if (!experts.ok()) return;  // keeps_copies() has asked
    CopyLayout::Layer layer{.layer = l,
                            .offset = out.address_bytes,
                            .expert_bytes = parts_of(*experts, device.granularity()).bytes,
                            .weights = *experts,
                            .n_elsewhere = n_elsewhere(place)};
    out.address_bytes += config.n_routed_experts * layer.expert_bytes;
    out.most_bytes += layer.n_elsewhere * layer.expert_bytes;
    out.layers.push_back(layer);
  });
  return out;
}

std::vector<bool> keeps_copies(const EngineState& engine, const Plan& plan,
                               const nn::Weights& weights) {
  const std::optional<int64_t> asked = plan.config.experts_cache;
  std::vector<bool> keeps(plan.devices.size(), false);
  if (asked == 0 || plan.model.num_experts_per_tok > nn::kCopyPairs) return {};
  const auto backend = [&](int d) -> const Backend& {
    return *engine.devices[static_cast<size_t>(d)];
  };
  for (int d = 0; d < static_cast<int>(keeps.size()); ++d) {
    const bool own_memory = plan.devices[static_cast<size_t>(d)].kind != DeviceKind::kCpu;
    if ((!asked && !own_memory) || !backend(d).keeps_expert_rows()) continue;
    bool any = false, able = true;
    for (size_t l = 0; l < plan.placement.layers.size(); ++l) {
      const LayerPlacement& layer = plan.placement.layers[l];
      if (layer.device != d || n_elsewhere(layer) == 0) continue;
      any = true;
      able &= nn::experts_on(backend(d), weights.layers[l], plan.model.n_routed_experts).ok();
      for (const ExpertSpan& span : layer.experts) able &= backend(span.device).keeps_expert_rows();
    }
    keeps[static_cast<size_t>(d)] = any && able;
  }
  if (std::find(keeps.begin(), keeps.end(), true) == keeps.end()) return {};
  return keeps;
}

CopyTables copy_tables(const Placement& placement, const ModelConfig& config,
                       const nn::WeightMap& map) {
  CopyTables tables;
  Arena arena;
  bool any = false;
  for_copied_layers(placement, [&](size_t, const LayerPlacement&) {
    carve_tables(arena, config.n_routed_experts);
    any = true;
  });
  tables.runtime_bytes = arena.peak_bytes();
  for (const nn::WeightItem& item : map.items())
    if (any && item.purpose == Purpose::kExperts)
      tables.staging_bytes = std::max(tables.staging_bytes, nn::staging_bytes(item));
  return tables;
}

bool keeps_any_copies(const Plan& plan) noexcept {
  return std::any_of(plan.devices.begin(), plan.devices.end(),
                     [](const PlanDevice& device) { return device.expert_cache_bytes > 0; });
}

Result<std::unique_ptr<ExpertCache>> ExpertCache::create(EngineState& engine, PassGate& gate,
                                                         const Plan& plan,
                                                         std::unique_ptr<io::TensorFile> file,
                                                         const nn::WeightMap& map) {
  std::unique_ptr<ExpertCache> made(new ExpertCache(engine, gate));
  ExpertCache& cache = *made;
  cache.file_ = std::move(file);
  cache.n_experts_ = plan.model.n_routed_experts;
  cache.window_ = plan.config.experts_cache_window;
  const CopyTables bytes = copy_tables(plan.placement, plan.model, map);
  FATHOM_TRY_ASSIGN(cache.tables_,
                    engine.allocate(engine.host_device, Purpose::kRuntime, bytes.runtime_bytes));
  FATHOM_TRY_ASSIGN(cache.staging_,
                    engine.allocate(engine.host_device, Purpose::kStaging, bytes.staging_bytes));
  Arena tables(cache.tables_.data(), cache.tables_.size_bytes());

  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d) {
    if (!plan.placement.has_copies(d)) continue;
    const PlanDevice& planned = plan.devices[static_cast<size_t>(d)];
    Device device;
    device.index = d;
    device.backend = engine.devices[static_cast<size_t>(d)].get();
    device.most_bytes = planned.expert_cache_bytes;
    device.page_bytes =
        plan.config.sessions_max * std::max(planned.kv_page_bytes, planned.kv_hot_page_bytes);
    const CopyLayout layout =
        copy_layout(*device.backend, d, plan.placement, plan.model, map.weights());
    FATHOM_TRY_ASSIGN(device.range, engine.reserve(d, Purpose::kExpertCache, layout.address_bytes));
    for (const CopyLayout::Layer& at : layout.layers) {
      Layer layer;
      layer.layer = at.layer;
      layer.offset = at.offset;
      layer.expert_bytes = at.expert_bytes;
      layer.weights = at.weights;
      const ExpertParts parts = parts_of(at.weights, device.backend->granularity());
      const auto lay = [&](Weight& w, int64_t offset) {
        w.data = device.range.data() + at.offset + offset;
        w.matrix_bytes = at.expert_bytes;
      };
      lay(layer.weights.gate, 0);
      lay(layer.weights.up, parts.up);
      lay(layer.weights.down, parts.down);

      const nn::LayerWeights& weights = map.weights().layers[at.layer];
      const LayerPlacement& place = plan.placement.layers[at.layer];
      for (size_t i = 0; i < place.experts.size(); ++i) {
        if (place.experts[i].device == d) continue;
        Layer::Source source{.first = place.experts[i].first, .items = {}};
        const Weight* parts_there[] = {&weights.experts[i].gate, &weights.experts[i].up,
                                       &weights.experts[i].down};
        for (const nn::WeightItem& item : map.items())
          for (size_t part = 0; part < source.items.size(); ++part)
            if (item.target == parts_there[part]) source.items[part] = item;
        layer.sources.push_back(std::move(source));
      }
      const Tables t = carve_tables(tables, cache.n_experts_);
      for (int64_t e = 0; e < cache.n_experts_; ++e)
        new (t.counts + e) std::atomic<uint32_t>(0), new (t.held + e) bool(false);
      layer.counts = t.counts;
      layer.held = t.held;
      device.layers.push_back(std::move(layer));
    }
    cache.devices_.push_back(std::move(device));
  }
  cache.by_layer_.assign(plan.placement.layers.size(), nullptr);
  for (const Device& device : cache.devices_)
    for (const Layer& layer : device.layers) cache.by_layer_[layer.layer] = &layer;
  if (engine.simulation)
    engine.simulation->routing().begin(cache.n_experts_, engine.machine.expert_skew);
  engine.ledger.add_lender(made.get());
  return made;
}

ExpertCache::~ExpertCache() {
  engine_.ledger.remove_lender(this);
}

// ---- what passes ask ----

const ExpertCache::Layer* ExpertCache::find(size_t layer) const noexcept {
  return layer < by_layer_.size() ? by_layer_[layer] : nullptr;
}

const nn::ExpertWeights* ExpertCache::copies(size_t layer) const noexcept {
  const Layer* found = find(layer);
  return found != nullptr ? &found->weights : nullptr;
}

bool ExpertCache::has(size_t layer, int32_t expert) const noexcept {
  return find(layer)->held[expert];
}

bool ExpertCache::Layer::may_copy(int64_t expert) const noexcept {
  return std::any_of(sources.begin(), sources.end(), [&](const Source& source) {
    return expert >= source.first && expert < source.first + source.items[0].weight.count;
  });
}

void ExpertCache::used(size_t layer, std::span<const int32_t> ids, bool looked,
                       int64_t n_found) noexcept {
  const Layer& at = *find(layer);
  for (const int32_t id : ids)
    if (id >= 0 && id < n_experts_) at.counts[id].fetch_add(1, std::memory_order_relaxed);
  if (!looked) return;
  choices_.fetch_add(static_cast<int64_t>(ids.size()), std::memory_order_relaxed);
  hits_.fetch_add(n_found, std::memory_order_relaxed);
}

ExpertCacheStats ExpertCache::stats() const noexcept {
  return {.n_experts = n_held_.load(),
          .bytes = held_bytes_.load(),
          .choices = choices_.load(),
          .hits = hits_.load(),
          .copied = copied_.load(),
          .dropped = dropped_.load()};
}

// ---- between passes ----

void ExpertCache::age() noexcept {
  for (; tokens_.load() - aged_ >= window_; aged_ += window_)
    for (Device& device : devices_)
      for (Layer& layer : device.layers)
        for (int64_t e = 0; e < n_experts_; ++e)
          layer.counts[e].store(layer.counts[e].load() / 2, std::memory_order_relaxed);
}

void ExpertCache::after_pass(int64_t n_tokens) {
  tokens_.fetch_add(n_tokens);
  // Among sessions that are always busy, somebody must wait for the others now and then.
  const bool wait = n_missed_.load(std::memory_order_relaxed) >= kMostMissed;
  const bool changed = gate_.change(wait, [&] {
    age();
    for (Device& device : devices_)
      for (int64_t n = std::min(n_tokens, kMostCopies); n > 0 && copy_one(device);) --n;
  });
  n_missed_.store(changed ? 0 : n_missed_.load(std::memory_order_relaxed) + 1,
                  std::memory_order_relaxed);
}

ExpertCache::Place ExpertCache::most_wanted(Device& device) noexcept {
  Place best;
  for (Layer& layer : device.layers)
    for (int64_t e = 0; e < n_experts_; ++e) {
      const uint32_t count = layer.counts[e].load(std::memory_order_relaxed);
      if (count > best.count && !layer.held[e] && layer.may_copy(e)) best = {&layer, e, count};
    }
  return best;
}

ExpertCache::Place ExpertCache::least_used(Device& device) noexcept {
  Place best;
  for (Layer& layer : device.layers)
    for (int64_t e = 0; e < n_experts_; ++e) {
      if (!layer.held[e]) continue;
      const uint32_t count = layer.counts[e].load(std::memory_order_relaxed);
      if (best.layer == nullptr || count <= best.count) best = {&layer, e, count};
    }
  return best;
}

// Makes a copy of the most used expert that has none, in free memory or in the place of a copy that
// is used less than half as much: else two experts would take turns.
bool ExpertCache::copy_one(Device& device) {
  if (failed_) return false;
  const Place wanted = most_wanted(device);
  if (wanted.count < kLeastUses) return false;
  const auto room = [&] {
    // Copies that the next page would drop are not worth making.
    const int64_t next =
        std::min(device.page_bytes, engine_.ledger.still_planned(device.index, Purpose::kKv));
    return std::min(device.most_bytes - device.held_bytes,
                    engine_.ledger.room(device.index) - next);
  };
  while (room() < wanted.layer->expert_bytes) {
    const Place victim = least_used(device);
    if (victim.layer == nullptr || victim.count >= wanted.count / 2) return false;
    drop(device, victim);
  }
  Status status = copy(device, *wanted.layer, wanted.expert);
  if (status.ok()) return true;
  if (status.code() == Code::kBudget || status.code() == Code::kMemory ||
      status.code() == Code::kCallback)
    return false;
  failed_ = true;
  engine_.log(LogLevel::kWarn,
              fmt::format("experts.cache: no more copies are made: {}", status.message()));
  return false;
}

Status ExpertCache::copy(Device& device, Layer& layer, int64_t expert) {
  const int64_t at = layer.offset + expert * layer.expert_bytes;
  FATHOM_TRY(device.range.commit(at, layer.expert_bytes));
  const auto source = std::find_if(layer.sources.rbegin(), layer.sources.rend(),
                                   [&](const Layer::Source& s) { return s.first <= expert; });
  const Weight* targets[] = {&layer.weights.gate, &layer.weights.up, &layer.weights.down};
  Status status;
  if (engine_.simulation)  // what the way takes; there is nothing to read
    status = device.backend->upload(device.range.data() + at, staging_.data(), layer.expert_bytes);
  for (size_t part = 0; part < source->items.size() && status.ok() && !engine_.simulation; ++part)
    status = nn::load_matrix(
        *file_, source->items[part], static_cast<size_t>(expert - source->first), *targets[part],
        expert, *device.backend, {staging_.data(), static_cast<size_t>(staging_.size_bytes())}, {});
  if (!status.ok()) {
    device.range.decommit(at, layer.expert_bytes);
    return status;
  }
  layer.held[expert] = true;
  device.held_bytes += layer.expert_bytes;
  held_bytes_ += layer.expert_bytes;
  ++n_held_;
  ++copied_;
  return {};
}

void ExpertCache::drop(Device& device, const Place& place) noexcept {
  Layer& layer = *place.layer;
  layer.held[place.expert] = false;
  device.range.decommit(layer.offset + place.expert * layer.expert_bytes, layer.expert_bytes);
  device.held_bytes -= layer.expert_bytes;
  held_bytes_ -= layer.expert_bytes;
  --n_held_;
  ++dropped_;
}

template <class Done>
int64_t ExpertCache::drop_until(Device& device, Done&& done) noexcept {
  const int64_t before = device.held_bytes;
  while (device.held_bytes > 0 && !done()) drop(device, least_used(device));
  return before - device.held_bytes;
}

void ExpertCache::make_room(int device, int64_t bytes) noexcept {
  if (engine_.ledger.room(device) < bytes) (void)give_back(device, bytes, /*wait=*/true);
}

void ExpertCache::drop_all() noexcept {
  gate_.change(/*wait=*/true, [&] {
    for (Device& device : devices_) drop_until(device, [] { return false; });
  });
}

int64_t ExpertCache::bytes_on(int device) const noexcept {
  return tables_.bytes_on(device) + staging_.bytes_on(device);
}

int64_t ExpertCache::give_back(int device, int64_t bytes, bool wait) noexcept {
  if (held_bytes_.load() == 0) return 0;
  int64_t released = 0;
  gate_.change(wait, [&] {
    const auto from = [&](Device& d) {
      released += drop_until(d, [&] { return engine_.ledger.room(device) >= bytes; });
    };
    for (Device& d : devices_)
      if (d.index == device) from(d);
    if (engine_.ledger.is_host(device))
      for (Device& d : devices_)
        if (d.index != device && engine_.ledger.is_host(d.index)) from(d);
  });
  return released;
}

}  // namespace fathom::run
