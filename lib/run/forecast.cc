// Forecast: the token at which each budget ends, from the pages that are there and the policy by
// which more of them come - the arithmetic of KvPages::reserve, without taking anything.
#include <fmt/format.h>

#include <algorithm>

#include "fathom/session.hpp"
#include "session_state.h"

namespace fathom {
namespace run {

// Page by page: what leaves the window is rewritten, then the next page is mapped.
int64_t KvPages::tokens_within(std::span<const int> devices, int64_t available) const noexcept {
  const KvPolicy& policy = options_.policy;
  const auto bytes = [&](int64_t page, KvType type) {
    int64_t sum = 0;
    for (const int d : devices) sum += page_bytes_on(d, page, type);
    return sum;
  };
  int64_t growth = 0;
  if (n_tokens_ < n_pages_ * policy.page_tokens)
    for (const int d : devices) growth += growth_bytes(d, n_tokens_ + 1);
  if (growth > available) return n_tokens_;  // the page to be written next lies elsewhere
  int64_t settled = std::max(n_settled_, policy.first_cold_page());
  for (int64_t page = n_pages_; page < max_pages_; ++page) {
    const int64_t end = std::min(policy.cold_end(page * policy.page_tokens + 1), page);
    for (; settled < end; ++settled) {
      const KvType type = settled < n_pages_ ? type_of(settled) : policy.new_page_type(settled);
      if (settled < n_pages_ && !is_resident(settled)) continue;
      growth -= std::max<int64_t>(bytes(settled, type) - bytes(settled, policy.type), 0);
    }
    growth += bytes(page, policy.new_page_type(page));
    if (growth > available) return page * policy.page_tokens;
  }
  return options_.max_tokens;
}

namespace {

const char* what_it_does(LadderStep step) {
  switch (step) {
    case LadderStep::kChunk:
      return "prefill passes become shorter";
    case LadderStep::kSpill:
      return "cold pages move to host memory";
    case LadderStep::kRequantise:
      return "cold pages are rewritten in a smaller type";
    case LadderStep::kFile:
      return "cold pages move to the spill file";
  }
  return "";
}

// What each step could free on a device when the session holds n_tokens and asks for one more.
LadderGains gains_at(const SessionState& s, int device, int64_t n_tokens) {
  const KvPages& pages = s.cache.pages();
  const KVCacheOptions& options = pages.options();
  const int64_t resident = pages.movable_bytes_at(device, n_tokens);
  const auto tier = [&](KvTier t) {
    return std::find(options.tiers.begin(), options.tiers.end(), t) != options.tiers.end();
  };
  EngineState& engine = *s.model.engine().state();
  LadderGains gains;
  gains[LadderStep::kChunk] = s.chunk_gain(device, n_tokens + 1);
  if (pages.has_host_tier(device))
    gains[LadderStep::kSpill] = std::min(resident, engine.ledger.available(engine.host_device));
  if (tier(KvTier::kFile)) gains[LadderStep::kFile] = resident;
  if (options.floor_type)
    gains[LadderStep::kRequantise] =
        pages.rewriting_saves_at(device, n_tokens, *options.floor_type);
  return gains;
}

void tell_then(const SessionState& s, std::span<const int> devices, BudgetForecast& forecast) {
  if (forecast.n_tokens_end == s.cache.max_tokens()) {
    forecast.text = fmt::format("{}: holds all {} tokens of the context", forecast.budget,
                                forecast.n_tokens_end);
    return;
  }
  for (const int device : devices) {
    forecast.then =
        next_step(s.model.plan().config.kv_ladder, gains_at(s, device, forecast.n_tokens_end));
    if (forecast.then) break;
  }
  forecast.text =
      fmt::format("{}: ends at {} tokens; then {}", forecast.budget, forecast.n_tokens_end,
                  forecast.then ? what_it_does(*forecast.then) : "the session is full");
}

}  // namespace
}  // namespace run

Forecast Session::forecast() const {
  const run::SessionState& s = *state_;
  const run::EngineState& engine = *s.model.engine().state();
  const MemorySnapshot memory = engine.ledger.snapshot();
  Forecast forecast{.n_tokens = s.n_tokens, .max_tokens = s.cache.max_tokens(), .budgets = {}};
  std::vector<int> host;
  for (int d = 0; d < s.cache.pages().n_devices(); ++d) {
    if (engine.ledger.is_host(d)) host.push_back(d);
    const DeviceMemory& device = memory.devices[static_cast<size_t>(d)];
    BudgetForecast& budget = forecast.budgets.emplace_back();
    budget = {.budget = device.name,
              .device = d,
              .budget_bytes = device.budget_bytes,
              .bytes_now = device.bytes_now};
    budget.n_tokens_end = s.cache.pages().tokens_within(
        std::span(&d, 1),
        device.budget_bytes - device.bytes_now + memory.item(d, Purpose::kExpertCache).bytes_now);
    run::tell_then(s, std::span(&d, 1), budget);
  }
  if (!host.empty()) {
    BudgetForecast& budget = forecast.budgets.emplace_back();
    budget = {.budget = "host",
              .device = -1,
              .budget_bytes = memory.host_budget_bytes,
              .bytes_now = memory.host_bytes_now};
    int64_t lent = 0;  // copies of experts make room
    for (const int d : host) lent += memory.item(d, Purpose::kExpertCache).bytes_now;
    budget.n_tokens_end = s.cache.pages().tokens_within(
        host, memory.host_budget_bytes - memory.host_bytes_now + lent);
    run::tell_then(s, host, budget);
  }
  forecast.n_tokens_end = forecast.max_tokens;
  for (const BudgetForecast& budget : forecast.budgets)
    forecast.n_tokens_end = std::min(forecast.n_tokens_end, budget.n_tokens_end);
  return forecast;
}

}  // namespace fathom
