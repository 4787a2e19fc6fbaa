// Planner: rows of the cache on other devices than their layers, as pinned or because a layer's own
// device cannot hold them.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "kv_parts.h"
#include "ladder.h"
#include "planner.h"
#include "predict.h"

namespace fathom::run {
namespace {

int64_t without_cache(const PlanDevice& device) {
  int64_t most = 0;
  for (int p = 0; p < kPhaseCount; ++p)
    most =
        std::max(most, device.total(static_cast<Phase>(p)) -
                           device.bytes[static_cast<size_t>(p)][static_cast<size_t>(Purpose::kKv)]);
  return most;
}

// Every device as a holder of rows of every other one's layers: what the scratch for it takes.
std::vector<KvSpan> all_spans(const Plan& plan) {
  const int64_t rows = kv_span_rows(plan.kv_page_tokens);
  std::vector<KvSpan> spans;
  for (int home = 0; home < static_cast<int>(plan.devices.size()); ++home) {
    int64_t row = 0;
    for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d, row += rows)
      if (d != home) spans.push_back({home, d, row, row + rows});
  }
  return spans;
}

}  // namespace

Status Planner::pin_cache(const PlacementPins& pins, Plan& plan) const {
  const int64_t unit = kv_span_rows(plan.kv_page_tokens);
  for (int home = 0; home < static_cast<int>(plan.devices.size()); ++home) {
    int64_t row = 0;
    for (const PlacementPins::Rows& pin : pins.kv) {
      if (pin.n_rows != kKvNoEnd && pin.n_rows % unit != 0)
        return Status(Code::kConfig,
                      fmt::format("placement.kv: {} tokens are no multiple of {}, the rows that "
                                  "pages (kv.page_tokens={}) and partial results share",
                                  pin.n_rows, unit, plan.kv_page_tokens))
            .about("placement.kv");
      const int64_t end = pin.n_rows > kKvNoEnd - row ? kKvNoEnd : row + pin.n_rows;
      const int device = pin.device < 0 ? home : pin.device;
      if (device != home && plan.placement.layers_on(home) > 0)
        plan.placement.kv.push_back({home, device, row, end});
      row = end;
    }
  }
  return {};
}

// Each home keeps what it has room for; the others take the rest, the fastest first, among equals
// the roomiest.
bool Planner::share_rows(Plan& plan, int64_t n_tokens) const {
  const int64_t unit = kv_span_rows(plan.kv_page_tokens);
  const auto n_devices = static_cast<int>(plan.devices.size());
  std::vector<int64_t> left;
  int64_t host_left = host_limit(plan);
  for (int d = 0; d < n_devices; ++d) {
    const PlanDevice& device = plan.devices[static_cast<size_t>(d)];
    left.push_back(budget(plan, d) - without_cache(device));
    if (device.kind == DeviceKind::kCpu) host_left -= without_cache(device);
  }
  // Takes as many of `wanted` units of a home's rows as a device has room for.
  const auto take = [&](int home, int device, int64_t wanted) {
    const KvPart part{home, device, 0, 1};
    const int64_t bytes = plan.config.sessions_max * (unit / plan.kv_page_tokens) *
                          std::max(kv_page_bytes(plan, part, plan.kv_type),
                                   kv_page_bytes(plan, part, plan.kv_policy.hot_type));
    const bool host = plan.devices[static_cast<size_t>(device)].kind == DeviceKind::kCpu;
    int64_t& room = left[static_cast<size_t>(device)];
    const int64_t most = host ? std::min(room, host_left) : room;
    const int64_t n = std::clamp<int64_t>(most / bytes, 0, wanted);
    room -= n * bytes;
    if (host) host_left -= n * bytes;
    return n;
  };

  const auto by_preference = [&](const std::vector<int64_t>& room) {
    std::vector<int> order(room.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      const double rate_a = engine_->machine.devices[static_cast<size_t>(a)].read_bytes_per_s;
      const double rate_b = engine_->machine.devices[static_cast<size_t>(b)].read_bytes_per_s;
      return rate_a != rate_b ? rate_a > rate_b
                              : room[static_cast<size_t>(a)] > room[static_cast<size_t>(b)];
    });
    return order;
  };

  const int64_t units = (n_tokens + unit - 1) / unit;
  std::vector<int64_t> kept(left.size());
  for (int home = 0; home < n_devices; ++home)
    if (plan.placement.layers_on(home) > 0)
      kept[static_cast<size_t>(home)] = take(home, home, units);
  plan.placement.kv.clear();
  for (int home = 0; home < n_devices; ++home) {
    if (plan.placement.layers_on(home) == 0) continue;
    int64_t at = kept[static_cast<size_t>(home)];
    while (at < units) {
      int64_t n = 0;
      for (const int d : by_preference(left)) {
        if (std::find(closed_.begin(), closed_.end(), d) == closed_.end())
          n = take(home, d, units - at);
        if (n == 0) continue;
        plan.placement.kv.push_back({home, d, at * unit, (at + n) * unit});
        break;
      }
      if (n == 0) return false;
      at += n;
    }
  }
  return true;
}

bool Planner::spread_cache(Plan& plan, const nn::WeightMap& map, int64_t n_tokens,
                           int64_t longest_chunk) const {
  const Config& config = plan.config;
  for (int64_t chunk = config.prefill_chunk.value_or(longest_chunk);; chunk /= 2) {
    plan.placement.kv = all_spans(plan);
    set_scratch(plan, map, chunk);
    set_context(plan, n_tokens);
    if (share_rows(plan, n_tokens)) {
      set_scratch(plan, map, chunk);
      set_context(plan, n_tokens);
      if (fits(plan)) return true;
    }
    if (config.prefill_chunk || chunk < 2) return false;
  }
}

bool Planner::streams_faster(const Plan& plan, const Plan& spread, const nn::WeightMap& map,
                             int64_t n_tokens, std::string& remark) const {
  if (!ladder_reach(plan.config).host) return false;
  Plan streamed = plan;
  streamed.by_ladder = true;
  if (choose_chunk(streamed, map, n_tokens, n_tokens, 1) < n_tokens) return false;
  set_context(streamed, n_tokens);
  const double there = step_seconds(spread, engine_->machine, map.weights(), n_tokens);
  const double here = step_seconds(streamed, engine_->machine, map.weights(), n_tokens);
  std::string names;
  for (const KvSpan& span : spread.placement.kv) {
    const std::string& name = plan.devices[static_cast<size_t>(span.device)].name;
    if (names.find(name) == names.npos) names += (names.empty() ? "" : ", ") + name;
  }
  remark = fmt::format(
      "placement.kv: a step at {} tokens takes {:.2f} ms with cold rows attended on {}, {:.2f} ms "
      "with them streamed from the host: {}",
      n_tokens, 1e3 * there, names, 1e3 * here, here < there ? "streamed" : "attended there");
  return here < there;
}

void Planner::tell_cache(Plan& plan) const {
  for (const KvPart& part : kv_parts(plan)) {
    const auto name = [&](int d) { return plan.devices[static_cast<size_t>(d)].name; };
    const int64_t first = part.first_page * plan.kv_page_tokens;
    if (part.device == part.home || first >= plan.max_context) continue;
    const int64_t end = part.end_page > plan.max_context / plan.kv_page_tokens
                            ? plan.max_context
                            : part.end_page * plan.kv_page_tokens;
    plan.remarks.push_back(fmt::format(
        "placement.kv: {}: cache rows {}-{} of the {} layers of {}{}", name(part.device), first,
        end - 1, plan.devices[static_cast<size_t>(part.home)].n_layers, name(part.home),
        plan.config.placement_kv == "auto" ? ", which cannot hold them" : ""));
  }
}

}  // namespace fathom::run
