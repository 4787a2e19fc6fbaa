// What the plan chooses where the configuration says auto: how much text, in which passes, and how
// many of them at once.
#include <fmt/format.h>

#include <algorithm>

#include "engine_state.h"
#include "ladder.h"
#include "pipeline.h"
#include "planner.h"
#include "predict.h"

namespace fathom::run {

int64_t Planner::default_chunk(const Config& config, int64_t context) {
  constexpr int64_t kDefaultChunk = 512;
  const int64_t window = config.kv_recent_16bit > 0 ? config.kv_recent_16bit : kDefaultChunk;
  return std::min({kDefaultChunk, context, window});
}

int64_t Planner::longest_context(Plan plan, int64_t limit) const {
  int64_t low = 0, high = limit;  // low fits or is 0, above high does not matter
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    set_context(plan, middle);
    if (fits(plan))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

int64_t Planner::choose_chunk(Plan& plan, const nn::WeightMap& map, int64_t limit, int64_t wanted,
                              int64_t shortest) const {
  const Config& config = plan.config;
  const int64_t most = default_chunk(config, limit);
  int64_t chunk = config.prefill_chunk.value_or(most);
  int64_t context = 0;
  for (;;) {
    set_scratch(plan, map, chunk);
    context = longest_context(plan, limit);
    if (context >= wanted || config.prefill_chunk || chunk <= shortest) break;
    chunk = std::max<int64_t>(1, chunk / 2);
  }
  // Where not a token fits it is not the chunk's fault.
  if (context == 0 && chunk < most && !config.prefill_chunk) {
    set_scratch(plan, map, most);
    return 0;
  }
  if (config.prefill_chunk || context >= wanted || config.context_max) return context;
  // Even the smallest chunk leaves less than was hoped for: take the largest chunk that keeps
  // nearly all of it.
  const int64_t best = context;
  for (int64_t larger = most; larger > chunk; larger /= 2) {
    set_scratch(plan, map, larger);
    context = longest_context(plan, limit);
    if (context >= best - best / 8) return context;
  }
  set_scratch(plan, map, chunk);
  return best;
}

void Planner::choose_chunk_and_context(Plan& plan, const nn::WeightMap& map) const {
  const Config& config = plan.config;
  const int64_t trained = plan.model.max_position_embeddings;
  const int64_t limit = config.context_max.value_or(trained);
  // A context that is asked for must fit; a free one should hold at least this much before the
  // chunk, which only costs speed, is made smaller for its sake.
  const int64_t wanted = config.context_max.value_or(std::min(trained, kHopedContext));

  // Shorter passes only cost speed, but below this the steps of the ladder cost less.
  constexpr int64_t kShortestBeforeLadder = 64;
  const LadderReach reach = ladder_reach(config);
  const bool ladder = reach.file || reach.floor_type ||
                      (reach.host && std::any_of(plan.devices.begin(), plan.devices.end(),
                                                 [](const PlanDevice& device) {
                                                   return device.kind != DeviceKind::kCpu;
                                                 }));
  int64_t context = choose_chunk(plan, map, limit, wanted, ladder ? kShortestBeforeLadder : 1);
  // Before the ladder is climbed, other devices' room is used, unless a card is faster with its
  // rows on the host.
  if (context < wanted && plan.devices.size() > 1 && config.placement_kv == "auto") {
    Plan spread = plan;
    std::string remark;
    if (spread_cache(spread, map, wanted, default_chunk(config, limit)) &&
        !streams_faster(plan, spread, map, wanted, remark)) {
      plan = std::move(spread);
      context = longest_context(plan, limit);
    }
    if (!remark.empty()) plan.remarks.push_back(std::move(remark));
  }
  plan.max_context_resident = context;
  if (ladder && context < limit) {
    const Plan without = plan;
    plan.by_ladder = true;
    const int64_t longer = choose_chunk(plan, map, limit, wanted, 1);
    if (longer > context)
      context = longer;
    else
      plan = without;
  }
  const int64_t most = default_chunk(config, limit), chunk = plan.prefill_chunk;
  plan.max_context_feasible = context;
  plan.feasible = config.context_max ? context >= limit : context > 0;
  set_context(plan, config.context_max.value_or(plan.feasible ? context : 1));
  if (!plan.feasible) name_what_binds(plan);
  tell_cache(plan);
  if (plan.feasible && plan.by_ladder) tell_ladder(plan);

  if (!config.prefill_chunk)
    plan.remarks.push_back(fmt::format("prefill.chunk: {} chosen{}", chunk,
                                       chunk < most ? " (smaller, so that the context fits)" : ""));
  if (!config.context_max)
    plan.remarks.push_back(
        context == trained
            ? fmt::format("context.max: {}, what the model was trained for", context)
            : fmt::format("context.max: {}, what fits (the model was trained for {})", context,
                          trained));
}

void Planner::choose_in_flight(Plan& plan, const nn::WeightMap& map) const {
  const Config& config = plan.config;
  // The ladder's context lives on what the scratch leaves.
  if (config.prefill_in_flight || !plan.feasible || plan.by_ladder ||
      chunk_flow(plan) != ChunkFlow::kTurns || plan.max_context <= plan.prefill_chunk)
    return;
  // More than the prediction can be trusted to tell apart; and the context that may be given for
  // it, where that is what fits.
  constexpr double kTellApart = 1.03;
  const int64_t least =
      config.context_max ? plan.max_context : plan.max_context - plan.max_context / 16;
  constexpr int64_t kShortest = 64;
  const double alone = prefill_rate(plan, engine_->machine, map.weights());
  double best = kTellApart * alone;
  Plan chosen = plan;
  for (int64_t chunk = plan.prefill_chunk; chunk >= std::min(kShortest, plan.prefill_chunk);
       chunk /= 2) {
    bool all_fit = true;
    for (const int64_t in_flight : {kChunksInTurns, int64_t{2}}) {
      Plan other = plan;
      other.prefill_in_flight = in_flight;
      set_scratch(other, map, chunk);
      if (!config.context_max) other.max_context = longest_context(other, plan.max_context);
      set_context(other, other.max_context);
      const bool fit = other.max_context >= least && fits(other);
      all_fit = all_fit && fit;
      const double rate = fit ? prefill_rate(other, engine_->machine, map.weights()) : 0;
      if (rate <= best) continue;
      best = rate * kTellApart;
      chosen = std::move(other);
    }
    // Shorter chunks read the weights more often: only for the sake of room.
    if (all_fit || config.prefill_chunk) break;
  }
  if (chosen.prefill_in_flight == 1) return;
  plan = std::move(chosen);
  plan.max_context_feasible = std::min(plan.max_context_feasible, plan.max_context);
  plan.max_context_resident = std::min(plan.max_context_resident, plan.max_context);
  plan.remarks.push_back(fmt::format(
      "prefill.in_flight: {} chunks of {} tokens at once, so that devices with layers and those "
      "with their experts work side by side: {:.4g} tokens/s predicted instead of {:.4g}",
      plan.prefill_in_flight, plan.prefill_chunk,
      prefill_rate(plan, engine_->machine, map.weights()), alone));
}

}  // namespace fathom::run
