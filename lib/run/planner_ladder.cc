// How the ladder enters a plan: what of the cache stays where the budgets end, and where the rest
// goes.
#include <fmt/format.h>

#include <algorithm>

#include "kv_parts.h"
#include "ladder.h"
#include "planner.h"

namespace fathom::run {

// The cache in full; by the ladder, what the budgets leave for it, but no less than the ladder's
// floor.
void Planner::set_cache(Plan& plan, int64_t n_tokens) const {
  const auto set = [&](size_t d, int64_t bytes) {
    for (Phase phase : {Phase::kPrefill, Phase::kDecode})
      plan.devices[d].bytes[index(phase)][index(Purpose::kKv)] = bytes;
  };
  const Config& config = plan.config;
  const LadderReach reach = ladder_reach(config);
  const std::vector<KvPart> parts = kv_parts(plan);
  std::vector<int64_t> full(plan.devices.size()), floor(plan.devices.size());
  std::vector<int64_t> savings(plan.devices.size());  // of pages rewritten in the smallest type
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    PlanDevice& device = plan.devices[d];
    device.kv_moved_bytes = device.kv_host_bytes = device.kv_file_bytes = 0;
    full[d] = config.sessions_max * plan.kv_bytes(static_cast<int>(d), n_tokens);
    const bool leaves = reach.file || (reach.host && device.kind != DeviceKind::kCpu);
    floor[d] = full[d];
    if (plan.by_ladder) floor[d] = 0;
    for (const KvPart& part : parts) {
      if (!plan.by_ladder || part.device != static_cast<int>(d)) continue;
      const int64_t page = run::kv_page_bytes(plan, part, plan.kv_type);
      const int64_t rewritten =
          reach.floor_type ? run::kv_page_bytes(plan, part, *reach.floor_type) : page;
      const auto least = [&](int64_t movable_page) {
        return config.sessions_max *
               floor_bytes(plan.kv_policy, n_tokens, plan.prefill_chunk, movable_page, page,
                           run::kv_page_bytes(plan, part, plan.kv_policy.hot_type), part.first_page,
                           part.end_page);
      };
      floor[d] += least(leaves ? 0 : rewritten);
      savings[d] += least(page) - least(rewritten);
    }
    set(d, floor[d]);
  }
  if (!plan.by_ladder) return;
  int64_t to_host = 0;
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    PlanDevice& device = plan.devices[d];
    int64_t left = budget(plan, static_cast<int>(d)) - device.total(Phase::kPrefill) + floor[d];
    if (device.kind == DeviceKind::kCpu) {
      int64_t host = 0;
      for (const PlanDevice& other : plan.devices)
        if (other.kind == DeviceKind::kCpu) host += other.peak_bytes();
      left = std::min(left, host_limit(plan) - host + floor[d]);
    }
    const int64_t held = std::clamp(left / device.granularity * device.granularity, floor[d],
                                    std::max(full[d], floor[d]));
    set(d, held);
    device.kv_moved_bytes = full[d] - held;
    if (device.kind != DeviceKind::kCpu && reach.host) to_host += device.kv_moved_bytes;
  }
  // Without a file, all that leaves other devices must find room on the host.
  int64_t host_room = 0;
  if (to_host > 0) {
    const auto h = static_cast<size_t>(engine_->host_device);
    PlanDevice& host = plan.devices[h];
    const int64_t held = host.bytes[index(Phase::kPrefill)][index(Purpose::kKv)];
    const int64_t left =
        std::max<int64_t>(budget(plan, engine_->host_device) - host.total(Phase::kPrefill), 0);
    host_room =
        reach.file ? std::min(to_host, left / host.granularity * host.granularity) : to_host;
    set(h, held + host_room);
  }
  // The steps take what is moved in their order.  A page on its way has no rounding to what its
  // device commits.
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    PlanDevice& device = plan.devices[d];
    int64_t need = device.kv_moved_bytes;
    if (need == 0) continue;
    int64_t committed = 0, payload = 0;
    for (const KvPart& part : parts)
      if (part.device == static_cast<int>(d)) {
        committed += run::kv_page_bytes(plan, part, plan.kv_type);
        payload += kv_payload_bytes(plan, part, plan.kv_type);
      }
    const double ratio = static_cast<double>(payload) / static_cast<double>(committed);
    const auto fetched = [&](int64_t bytes) {
      return static_cast<int64_t>(static_cast<double>(bytes) * ratio) / config.sessions_max;
    };
    const auto take = [&](int64_t most) {
      const int64_t bytes = std::clamp<int64_t>(most, 0, need);
      need -= bytes;
      return bytes;
    };
    for (const LadderStep step : config.kv_ladder) {
      if (step == LadderStep::kSpill && reach.host && device.kind != DeviceKind::kCpu) {
        const int64_t bytes = take(static_cast<int64_t>(static_cast<double>(host_room) / ratio));
        host_room -= static_cast<int64_t>(static_cast<double>(bytes) * ratio);
        device.kv_host_bytes = fetched(bytes);
      } else if (step == LadderStep::kRequantise) {
        take(savings[d]);
      } else if (step == LadderStep::kFile && reach.file) {
        device.kv_file_bytes = fetched(take(need));
      }
    }
  }
}

// What is where when the context is full.
void Planner::tell_ladder(Plan& plan) const {
  const LadderReach reach = ladder_reach(plan.config);
  plan.remarks.push_back(fmt::format("kv.ladder: {} tokens fit as they are, {} by the ladder ({})",
                                     plan.max_context_resident, plan.max_context,
                                     *plan.config.get("kv.ladder")));
  for (const PlanDevice& device : plan.devices) {
    if (device.kv_moved_bytes == 0) continue;
    std::string where;
    const auto add = [&](bool applies, std::string text) {
      if (applies) where += (where.empty() ? "" : ", ") + text;
    };
    add(reach.host && device.kind != DeviceKind::kCpu, "to host memory");
    add(reach.floor_type.has_value(),
        fmt::format("saved by {} pages", kv_type_name(reach.floor_type.value_or(KvType::kQ8_0))));
    add(reach.file, fmt::format("to a file in {}", plan.config.kv_spill_folder));
    plan.remarks.push_back(fmt::format(
        "{}: at {} tokens {} bytes of the cache stay, {} go {}", device.name, plan.max_context,
        device.bytes[index(Phase::kDecode)][index(Purpose::kKv)], device.kv_moved_bytes, where));
  }
}

}  // namespace fathom::run
