#include "placement_problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "../nn/forward.h"
#include "cost_model.h"
#include "pipeline.h"
#include "planner.h"

namespace fathom::run {
namespace {

// A usual text, for the goal `mix`.
constexpr int64_t kMixRead = 2048, kMixWritten = 512;
// Of a pass's time, what lies between two that take turns: steps are of unlike length and copies
// add up.  0.6 with experts on a host, 0.8 where layers go back and forth between two cards
// (run_in_flight_test, run_placement_test).
constexpr double kInTurns = 0.8;
// Chunks of a prompt that follow each other through the devices, for the goal `prefill`.
constexpr int64_t kChunksInFlight = 8;

int64_t stored_bytes(const Weight& w) {
  if (w.rows == 0) return 0;
  return (w.count * w.matrix_bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
}

int64_t own_weight_bytes(const ModelConfig& c, const nn::LayerWeights& w) {
  int64_t bytes = 0;
  for (const Weight* weight :
       {&w.q, &w.q_a, &w.q_b, &w.kv_a, &w.k_b, &w.v_b, &w.o, &w.gate, &w.up, &w.down, &w.router})
    bytes += stored_bytes(*weight);
  const int64_t floats = 2 * c.hidden_size + c.q_lora_rank + c.kv_lora_rank + c.n_routed_experts;
  return bytes + floats * static_cast<int64_t>(sizeof(float)) + 5 * Arena::kAlignment;
}

class Builder {
 public:
  explicit Builder(const PlacementInputs& in) : in_(in), c_(in.plan.model) {}

  Result<SolverProblem> run() {
    p_.n_devices = static_cast<int>(in_.engine.devices.size());
    p_.n_experts = c_.n_routed_experts;
    p_.pins = in_.pins;
    p_.tied_embedding = c_.tie_word_embeddings;
    p_.host_budget = in_.host_available;
    const auto n_layers = static_cast<size_t>(c_.num_hidden_layers);
    const auto n = static_cast<size_t>(p_.n_devices);
    p_.own_bytes.assign(n_layers, std::vector<int64_t>(n, 0));
    p_.expert_bytes.assign(n_layers, std::vector<int64_t>(n, 0));
    add_passes(n_layers, n);
    for (int d = 0; d < p_.n_devices; ++d) FATHOM_TRY(device(d));
    return std::move(p_);
  }

 private:
  const MachineDevice& machine(int d) const {
    return in_.engine.machine.devices[static_cast<size_t>(d)];
  }

  // The weights as this device's kind of backend lays them out, all on one device.
  Result<const nn::WeightMap*> layout_on(int d) {
    const DeviceKind kind = in_.engine.devices[static_cast<size_t>(d)]->kind();
    if (const auto found = layouts_.find(kind); found != layouts_.end()) return &found->second;
    const Placement all =
        Placement::by_layer(c_, std::vector<int>(static_cast<size_t>(c_.num_hidden_layers), d));
    FATHOM_TRY_ASSIGN(nn::WeightMap map, nn::WeightMap::create(in_.file, all, in_.engine.devices));
    return &layouts_.emplace(kind, std::move(map)).first->second;
  }

  void add_passes(size_t n_layers, size_t n) {
    const PlacementGoal goal = in_.plan.config.placement_goal;
    const auto add = [&](int64_t n_tokens, int64_t in_flight, double weight) {
      SolverPass pass;
      pass.weight = weight;
      pass.in_flight = in_flight;
      pass.one_session = n_tokens > 1;
      if (chunks_may_overlap(in_.plan))
        pass.in_turns = in_.plan.config.prefill_in_flight == 1 ? 1 : kInTurns;
      pass.own.assign(n_layers, std::vector<double>(n));
      pass.network = pass.experts = pass.own;
      pass.embed.resize(n);
      pass.head.resize(n);
      pass.hand_over.assign(n, std::vector<double>(n));
      pass.round_trip = pass.hand_over;
      const int64_t rows = residual_bytes(c_, n_tokens);
      const int64_t choices = n_tokens * c_.num_experts_per_tok * 4;
      for (int a = 0; a < p_.n_devices; ++a)
        for (int b = 0; b < p_.n_devices; ++b) {
          if (a == b) continue;
          const MachineLink& link = in_.engine.machine.link(a, b);
          const auto i = static_cast<size_t>(a), j = static_cast<size_t>(b);
          pass.hand_over[i][j] = seconds(link, rows);
          pass.round_trip[i][j] = 2 * seconds(link, rows) + 2 * seconds(link, choices);
        }
      p_.passes.push_back(std::move(pass));
      n_tokens_.push_back(n_tokens);
    };
    // At least as many as fill the pipeline: with fewer, leaving a device idle would look as good
    // as giving it its part.
    const int64_t sessions = std::max<int64_t>(in_.plan.config.sessions_max, p_.n_devices);
    if (goal == PlacementGoal::kDecode) add(1, sessions, 1);
    if (goal == PlacementGoal::kPrefill) add(in_.chunk, kChunksInFlight, 1);
    if (goal == PlacementGoal::kMix) {
      const int64_t chunks = std::max<int64_t>(1, kMixRead / in_.chunk);
      add(1, sessions, static_cast<double>(kMixWritten));
      add(in_.chunk, chunks, 1);
    }
  }

  // Cache bytes of one layer and session that placement.kv puts on a device; -1: on the layer's
  // own, with all that it does not name.
  int64_t pinned_kv_bytes(const KvLayout& kv, int device) const {
    const Plan& plan = in_.plan;
    int64_t bytes = 0, page = 0;
    const auto add = [&](int where, int64_t end) {
      if (where == device)
        bytes += plan.kv_policy.bytes(plan.kv_policy.last_page_begun(in_.context, end),
                                      kv.page_bytes(plan.kv_type, 1),
                                      kv.page_bytes(plan.kv_policy.hot_type, 1), page, end);
      page = end;
    };
    for (const PlacementPins::Rows& pin : in_.pins.kv)
      add(pin.device, pin.n_rows == kKvNoEnd ? kKvNoEnd : page + pin.n_rows / plan.kv_page_tokens);
    if (page != kKvNoEnd) add(-1, kKvNoEnd);
    return bytes;
  }

  // By number of layers on a device: what its pages take beyond their rows.
  std::vector<int64_t> page_rest(const KvLayout& kv, int64_t sessions, int64_t granularity) const {
    const Plan& plan = in_.plan;
    std::vector<int64_t> rest = {0};
    for (int64_t n = 1; n <= c_.num_hidden_layers; ++n) {
      const auto bytes = [&](int64_t unit) {
        const auto page = [&](KvType type) {
          return committed_bytes(kv.page_bytes(type, n), unit);
        };
        return plan.kv_policy.bytes(plan.kv_policy.last_page_begun(in_.context), page(plan.kv_type),
                                    page(plan.kv_policy.hot_type));
      };
      rest.push_back(sessions * (bytes(granularity) - bytes(1)));
    }
    return rest;
  }

  Status device(int d) {
    const auto i = static_cast<size_t>(d);
    const Backend& backend = *in_.engine.devices[i];
    FATHOM_TRY_ASSIGN(const nn::WeightMap* map, layout_on(d));
    const nn::Weights& w = map->weights();
    const Plan& plan = in_.plan;
    const int64_t sessions = plan.config.sessions_max, granularity = backend.granularity();
    const bool host = d == in_.engine.host_device;

    // What the device holds in any case.
    int64_t fixed = backend.runtime_bytes() + 4 * granularity;  // a purpose ends within a unit
    if (host) {
      fixed += in_.tokenizer_bytes + map->staging_bytes() +
               sessions * session_runtime_bytes(in_.context, plan.kv_page_tokens, p_.n_devices,
                                                granularity);
      if (!backend.host_accessible() || p_.n_devices > 2)
        fixed += sessions * residual_bytes(c_, in_.chunk);
    }
    const KvLayout kv{plan.kv_page_tokens, c_.kv_lora_rank, c_.qk_rope_head_dim};
    if (const int64_t rows = pinned_kv_bytes(kv, d); rows > 0) {  // whatever holds their layers
      Arena arena;
      nn::Scratch::carve(arena, c_, in_.chunk, {.rows = true});
      fixed += sessions * (c_.num_hidden_layers * rows + arena.peak_bytes());
    }
    // A device that cannot hold even that (it was lost, say) holds nothing of the model.
    p_.budget.push_back(host ? in_.available[i] - fixed
                             : std::max<int64_t>(in_.available[i] - fixed, 0));
    p_.held.push_back(fixed);
    p_.is_host.push_back(plan.devices[i].kind == DeviceKind::kCpu);
    if (p_.is_host.back() && p_.host_budget < INT64_MAX) p_.host_budget -= fixed;

    // Scratch, by what lives there.
    const Placement all_here =
        Placement::by_layer(c_, std::vector<int>(static_cast<size_t>(c_.num_hidden_layers), d));
    const int64_t workspace = nn::measure_workspace(backend, d, c_, w, all_here, in_.chunk,
                                                    plan.kv_type, plan.kv_page_tokens);
    const auto carved = [&](const nn::DeviceRoles& roles) {
      Arena arena;
      nn::Scratch::carve(arena, c_, in_.chunk, roles);
      return arena.peak_bytes();
    };
    p_.layers_scratch.push_back(sessions * (carved(nn::DeviceRoles::all()) + workspace));
    p_.guests_scratch.push_back(sessions * (carved({.guests = true}) + workspace));
    p_.ends_scratch.push_back(sessions * (carved({.embed = true, .head = true}) + workspace));

    p_.embed_bytes.push_back(stored_bytes(w.embed));
    p_.head_bytes.push_back(c_.tie_word_embeddings ? stored_bytes(w.embed) : stored_bytes(w.head));
    const int64_t kv_bytes = sessions * pinned_kv_bytes(kv, -1);
    p_.page_rest.push_back(page_rest(kv, sessions, granularity));
    for (size_t l = 0; l < w.layers.size(); ++l) {
      const nn::LayerWeights& layer = w.layers[l];
      p_.own_bytes[l][i] = own_weight_bytes(c_, layer) + kv_bytes;
      if (layer.experts.empty()) continue;
      const nn::ExpertWeights& e = layer.experts.front();
      p_.expert_bytes[l][i] = e.gate.matrix_bytes + e.up.matrix_bytes + e.down.matrix_bytes;
    }
    if (d >= in_.engine.n_computing()) keep_off(i);
    for (size_t k = 0; k < p_.passes.size(); ++k) times(d, w, n_tokens_[k], p_.passes[k]);
    return {};
  }

  // Nothing may live there: whatever does would exceed its room by more than it could anywhere
  // else.
  void keep_off(size_t i) {
    constexpr int64_t kFactor = 4096;
    p_.budget[i] = 0;
    p_.embed_bytes[i] *= kFactor;
    p_.head_bytes[i] *= kFactor;
    for (size_t l = 0; l < p_.own_bytes.size(); ++l) {
      p_.own_bytes[l][i] *= kFactor;
      p_.expert_bytes[l][i] *= kFactor;
    }
  }

  void times(int d, const nn::Weights& w, int64_t n_tokens, SolverPass& pass) {
    const auto i = static_cast<size_t>(d);
    const PassShape shape{.n_tokens = n_tokens,
                          .first_position = in_.context / 2,
                          .form = n_tokens >= nn::expanded_crossover_rows(c_)
                                      ? AttentionForm::kExpanded
                                      : AttentionForm::kAbsorbed,
                          .kv_type = in_.plan.kv_type,
                          .page_tokens = in_.plan.kv_page_tokens};
    pass.embed[i] = embed_seconds(machine(d), c_, w, shape);
    pass.head[i] = head_seconds(machine(d), c_, w);
    for (size_t l = 0; l < w.layers.size(); ++l) {
      const LayerSeconds s = layer_seconds(machine(d), c_, w.layers[l],
                                           c_.is_moe_layer(static_cast<int64_t>(l)), shape);
      pass.own[l][i] = s.attention;
      pass.network[l][i] = s.shared;
      pass.experts[l][i] = s.experts;
    }
  }

  const PlacementInputs& in_;
  const ModelConfig& c_;
  SolverProblem p_;
  std::vector<int64_t> n_tokens_;
  std::map<DeviceKind, nn::WeightMap> layouts_;
};

}  // namespace

Result<SolverProblem> placement_problem(const PlacementInputs& inputs) {
  return Builder(inputs).run();
}

}  // namespace fathom::run
