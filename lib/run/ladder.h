// The ladder: what a session does when memory ends.  Decisions from numbers alone, so that growth
// (session_grow.cc), the plan (planner.cc) and the forecast use one formula.  What a step does to
// pages is in kv_pages.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "fathom/config.hpp"
#include "fathom/kv_page.hpp"

namespace fathom::run {

inline bool ladder_has(const Config& config, LadderStep step) noexcept {
  return std::find(config.kv_ladder.begin(), config.kv_ladder.end(), step) !=
         config.kv_ladder.end();
}

// Types that requantise goes through, in this order, as far as kv.ladder_type.
inline constexpr KvType kRungs[] = {KvType::kF8, KvType::kQ8_0, KvType::kQ4_0};

// Where the steps of a configuration's ladder lead.
struct LadderReach {
  bool host = false;  // devices that are not the host
  bool file = false;
  std::optional<KvType> floor_type;  // cold pages are rewritten down to it
};
inline LadderReach ladder_reach(const Config& config) noexcept {
  const auto tier = [&](KvTier t) {
    return std::find(config.kv_tiers.begin(), config.kv_tiers.end(), t) != config.kv_tiers.end();
  };
  LadderReach reach;
  reach.host = ladder_has(config, LadderStep::kSpill) && tier(KvTier::kHost);
  reach.file = ladder_has(config, LadderStep::kFile) && tier(KvTier::kFile);
  if (ladder_has(config, LadderStep::kRequantise)) reach.floor_type = config.kv_ladder_type;
  return reach;
}

// Bytes that each step could free on one device now; 0: the step does not apply, or has done all it
// can.
struct LadderGains {
  std::array<int64_t, kLadderStepCount> bytes{};
  int64_t& operator[](LadderStep step) noexcept { return bytes[static_cast<size_t>(step)]; }
  int64_t operator[](LadderStep step) const noexcept { return bytes[static_cast<size_t>(step)]; }
};

// The step to climb: the first of the ladder that frees anything.  None: the ladder has ended.
inline std::optional<LadderStep> next_step(std::span<const LadderStep> ladder,
                                           const LadderGains& gains) noexcept {
  for (const LadderStep step : ladder)
    if (gains[step] > 0) return step;
  return std::nullopt;
}

// Pages [first_cold_page(), movable_end) are cold and whole when `n_written` tokens are written and
// room is made for `n_then`: only they are spilled or requantised.
inline int64_t movable_end(const KvPolicy& policy, int64_t n_written, int64_t n_then) noexcept {
  return std::max(policy.first_cold_page(),
                  std::min(policy.cold_end(n_then), n_written / policy.page_tokens));
}

// The fewest bytes that the ladder can bring a session's pages on a device to on the way to
// n_tokens in passes of `chunk` tokens, however they are cut: pages that may not move, and the
// movable ones with `movable_page_bytes` each: 0 where they can leave the device, else those of the
// smallest type.  Of pages [first_page, end_page) where others lie elsewhere.
inline int64_t floor_bytes(const KvPolicy& policy, int64_t n_tokens, int64_t chunk,
                           int64_t movable_page_bytes, int64_t cold_page_bytes,
                           int64_t hot_page_bytes, int64_t first_page = 0,
                           int64_t end_page = INT64_MAX) noexcept {
  const int64_t at = policy.last_page_begun(n_tokens, end_page);
  const int64_t written = std::max<int64_t>(at - chunk, 0);
  const int64_t end = std::min(movable_end(policy, written, at), end_page);
  const int64_t movable =
      std::max<int64_t>(end - std::max(policy.first_cold_page(), first_page), 0);
  return policy.bytes(at, cold_page_bytes, hot_page_bytes, first_page, end_page) -
         movable * std::max<int64_t>(cold_page_bytes - movable_page_bytes, 0);
}

}  // namespace fathom::run
