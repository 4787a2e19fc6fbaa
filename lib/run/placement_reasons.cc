#include "placement_reasons.h"

#include <fmt/format.h>

#include <algorithm>

#include "placement_descent.h"

namespace fathom::run {
namespace {

double gib(int64_t bytes) {
  return static_cast<double>(bytes) / static_cast<double>(int64_t{1} << 30);
}

// "0-12, 20" of the layers for which `here` is true.
template <class Here>
std::string layer_list(const Placement& placement, Here&& here) {
  std::string text;
  const size_t n = placement.layers.size();
  for (size_t l = 0; l < n;) {
    if (!here(placement.layers[l])) {
      ++l;
      continue;
    }
    size_t end = l + 1;
    while (end < n && here(placement.layers[end])) ++end;
    text += fmt::format("{}{}", text.empty() ? "" : ", ", l);
    if (end > l + 1) text += fmt::format("-{}", end - 1);
    l = end;
  }
  return text;
}

// Every part of `from` that is not pinned, alone on `to`: an expert of each layer, what a layer has
// of its own, embedding, head.  visit(changed state, bytes of the part on `from`).
template <class Visit>
void for_each_part(const SolverProblem& p, const PlacementState& s, size_t from, size_t to,
                   Visit&& visit) {
  PlacementState changed = s;
  for (size_t l = 0; l < s.layer.size(); ++l) {
    if (static_cast<size_t>(s.layer[l]) == from && p.pins.layers[l] < 0) {
      changed.layer[l] = static_cast<int>(to);
      visit(changed, p.own_bytes[l][from]);
      changed.layer[l] = s.layer[l];
    }
    if (s.experts[l].empty()) continue;
    const auto& pins = p.pins.experts[l];
    if (s.experts[l][from] <= std::count(pins.begin(), pins.end(), static_cast<int>(from)))
      continue;
    --changed.experts[l][from], ++changed.experts[l][to];
    visit(changed, p.expert_bytes[l][from]);
    ++changed.experts[l][from], --changed.experts[l][to];
  }
  if (static_cast<size_t>(s.embed) == from && p.pins.embed_device < 0) {
    changed.embed = static_cast<int>(to);
    visit(changed, p.embed_bytes[from]);
    changed.embed = s.embed;
  }
  if (static_cast<size_t>(s.head) == from && p.pins.head_device < 0) {
    changed.head = static_cast<int>(to);
    visit(changed, p.head_bytes[from]);
  }
}

bool any_part_fits(const SolverProblem& p, const Descent& descent, const PlacementState& s,
                   size_t from, size_t to) {
  const int64_t over = descent.cost(s).bytes_over;
  bool fits = false;
  for_each_part(p, s, from, to, [&](const PlacementState& changed, int64_t) {
    fits = fits || descent.cost(changed).bytes_over <= over;
  });
  return fits;
}

// Whether two cards have the same memory and the same times, to 1 %.
bool alike(const SolverProblem& p, size_t a, size_t b) {
  const auto same = [](double x, double y) { return std::abs(x - y) <= 0.01 * std::max(x, y); };
  const SolverPass& pass = p.passes.front();
  return same(static_cast<double>(p.budget[a]), static_cast<double>(p.budget[b])) &&
         same(pass.own.back()[a], pass.own.back()[b]) &&
         same(pass.network.back()[a], pass.network.back()[b]) &&
         same(pass.experts.back()[a], pass.experts.back()[b]) && same(pass.head[a], pass.head[b]);
}

bool has_pins(const PlacementPins& pins) {
  const auto pinned = [](int d) { return d >= 0; };
  if (pins.embed_device >= 0 || pins.head_device >= 0 || std::ranges::any_of(pins.layers, pinned))
    return true;
  for (size_t l = 0; l < pins.experts.size(); ++l)
    if (pins.any_expert(l)) return true;
  return false;
}

PlacementSeconds seconds_of(const PlacementCost& cost) {
  return {.step = cost.latency, .goal = cost.makespan};
}

void set_even(const SolverProblem& p, const Placement& even, PlacementBalance& out) {
  const PlacementCost cost = cost_of(p, even);
  const CardBalance balance = balance_of(p, cost);
  out.even = even;
  out.even_memory = balance.memory;
  out.even_time = balance.time;
  out.even_meets = balance.miss <= 0;
  out.even_seconds = seconds_of(cost);
}

// How much longer than the fastest, in the one or the other measure.
double longer(const PlacementSeconds& seconds, const PlacementSeconds& fastest) {
  return std::max(seconds.step / fastest.step, seconds.goal / fastest.goal) - 1;
}

// Copies of experts are held in what nothing else needs.
int64_t peak_without_copies(const PlanDevice& device) {
  int64_t peak = 0;
  for (int p = 0; p < kPhaseCount; ++p) {
    const auto& bytes = device.bytes[static_cast<size_t>(p)];
    peak = std::max(peak, device.total(static_cast<Phase>(p)) -
                              bytes[static_cast<size_t>(Purpose::kExpertCache)]);
  }
  return peak;
}

std::string cause_text(const Plan& plan) {
  const PlacementBalance& b = plan.balance;
  const auto mib = [](int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  if (b.cause == UnevenCause::kGrown)
    return "they are alike at the context and chunk that the placement was made for";
  const std::string instead =
      b.even_meets
          ? fmt::format("the nearest placement within {} and {} takes {:.2f} ms", kEvenMemory,
                        kEvenTime, b.even_seconds.step * 1e3)
          : fmt::format(
                "none is within {} and {}, the nearest ({:.2f} and {:.2f}) takes "
                "{:.2f} ms",
                kEvenMemory, kEvenTime, b.even_memory, b.even_time, b.even_seconds.step * 1e3);
  const std::string price =
      fmt::format("{} for a step instead of {:.2f}, {:.1f} % above the fastest", instead,
                  b.seconds.step * 1e3, longer(b.even_seconds, b.fastest) * 100);
  const std::string& giver = plan.devices[static_cast<size_t>(b.giver)].name;
  switch (b.cause) {
    case UnevenCause::kMemory:
      return fmt::format(
          "the cards with less work than {} are full: its smallest part takes {:.1f} MiB, they "
          "have {:.1f} MiB left; by trading parts {}",
          giver, mib(b.part_bytes), mib(b.room_bytes), price);
    case UnevenCause::kTransfers:
      return fmt::format(
          "a layer is too large a part, and experts of one on another device cost transfers or its "
          "slower work: {}",
          price);
    case UnevenCause::kUnlike:
      return fmt::format("the cards differ in memory or speed: {}", price);
    default:
      return fmt::format("pins: without them {}", price);
  }
}

}  // namespace

PlacementBalance weigh(const SolverProblem& p, const Solution& solution) {
  const Descent descent(p);
  const PlacementState s = descent.state(solution.placement);
  const PlacementCost cost = descent.cost(s);
  const CardBalance balance = balance_of(p, cost);
  PlacementBalance out;
  out.memory = balance.memory;
  out.time = balance.time;
  out.seconds = seconds_of(cost);
  out.fastest = solution.fastest;
  out.slowest =
      static_cast<int>(std::max_element(cost.busy.begin(), cost.busy.end()) - cost.busy.begin());
  for (int d = 0; d < p.n_devices; ++d)
    if (d != out.slowest &&
        !any_part_fits(p, descent, s, static_cast<size_t>(out.slowest), static_cast<size_t>(d)))
      out.full.push_back(d);
  if (!solution.even || balance.miss <= 0) return out;

  set_even(p, *solution.even, out);
  std::vector<size_t> cards;
  for (size_t d = 0; d < p.budget.size(); ++d)
    if (!p.is_host[d] && p.budget[d] > 0) cards.push_back(d);
  const auto share = [&](size_t d) {
    const int64_t held = p.held.empty() ? 0 : p.held[d];
    return static_cast<double>(cost.bytes[d] + held) / static_cast<double>(p.budget[d] + held);
  };
  const bool by_time = balance.time - kEvenTime > balance.memory - kEvenMemory;
  const auto load = [&](size_t d) { return by_time ? cost.busy[d] : share(d); };
  const size_t giver =
      *std::ranges::max_element(cards, [&](size_t a, size_t b) { return load(a) < load(b); });
  out.giver = static_cast<int>(giver);
  out.part_bytes = INT64_MAX;
  for_each_part(p, s, giver, giver, [&](const PlacementState&, int64_t bytes) {
    out.part_bytes = std::min(out.part_bytes, bytes);
  });
  bool fits = false, same = true;
  for (const size_t d : cards) {
    same = same && alike(p, giver, d);
    if (load(d) >= load(giver)) continue;
    out.room_bytes = std::max(out.room_bytes, p.budget[d] - cost.bytes[d]);
    fits = fits || any_part_fits(p, descent, s, giver, d);
  }

  out.cause = !same ? UnevenCause::kUnlike : !fits ? UnevenCause::kMemory : UnevenCause::kTransfers;
  if (!has_pins(p.pins)) return out;
  SolverProblem free = p;
  free.pins.embed_device = free.pins.head_device = -1;
  std::ranges::fill(free.pins.layers, -1);
  for (std::vector<int>& experts : free.pins.experts) std::ranges::fill(experts, -1);
  const Solution without = solve_placement(free);
  const PlacementCost free_cost = cost_of(free, without.placement);
  if (without.even || free_cost.bytes_over > 0) return out;
  out.cause = UnevenCause::kPins;
  set_even(free, without.placement, out);
  return out;
}

std::vector<std::string> explain_placement(const SolverProblem& p, const Plan& plan) {
  const PlacementCost cost = cost_of(p, plan.placement);
  const Placement& placement = plan.placement;
  std::vector<std::string> lines;
  for (int d = 0; d < p.n_devices; ++d) {
    const auto i = static_cast<size_t>(d);
    std::string what;
    const auto add = [&](const std::string& text) { what += (what.empty() ? "" : "; ") + text; };
    if (placement.embed_device == d) add("embedding");
    if (const auto text = layer_list(placement, [&](const auto& l) { return l.device == d; });
        !text.empty())
      add("layers " + text);
    const auto holds = [&](const LayerPlacement& l) {
      return std::any_of(l.experts.begin(), l.experts.end(),
                         [&](const ExpertSpan& s) { return s.device == d; });
    };
    if (const int64_t n = placement.experts_on(d); n > 0)
      add(fmt::format("{} routed experts of layers {}", n, layer_list(placement, holds)));
    if (placement.head_device == d) add("output head");
    if (what.empty()) what = "nothing";
    const double share =
        static_cast<double>(cost.bytes[i]) / static_cast<double>(std::max<int64_t>(p.budget[i], 1));
    lines.push_back(
        fmt::format("placement: {}: {} ({:.2f} GiB, {:.0f} % of its room; busy {:.2f} "
                    "of {:.2f} ms)",
                    plan.devices[i].name, what, gib(cost.bytes[i]), share * 100, cost.busy[i] * 1e3,
                    cost.latency * 1e3));
  }

  const PlacementBalance& balance = plan.balance;
  std::string why =
      fmt::format("placement: made for {}: ", placement_goal_name(plan.config.placement_goal));
  if (cost.bytes_over > 0) {
    why +=
        fmt::format("memory binds: {:.2f} GiB too little over all devices", gib(cost.bytes_over));
  } else {
    why += fmt::format("{} is the slowest stage",
                       plan.devices[static_cast<size_t>(balance.slowest)].name);
    for (size_t i = 0; i < balance.full.size(); ++i)
      why += fmt::format("{}{}", i == 0 ? "; no part of it fits on " : ", ",
                         plan.devices[static_cast<size_t>(balance.full[i])].name);
    if (balance.full.size() + 1 < plan.devices.size())
      why += fmt::format("; {} each of its parts would make passes longer or the cards less even",
                         balance.full.empty() ? "elsewhere" : "on others");
  }
  lines.push_back(std::move(why));
  return lines;
}

void tell_balance(Plan& plan) {
  PlacementBalance& balance = plan.balance;
  const bool cards = std::ranges::any_of(
      plan.devices, [](const PlanDevice& d) { return d.kind != DeviceKind::kCpu; });
  const auto over_mean = [&](auto&& value_of) {
    double sum = 0, most = 0, n = 0;
    for (const PlanDevice& device : plan.devices) {
      if (cards && device.kind == DeviceKind::kCpu) continue;
      const double value = value_of(device);
      sum += value, most = std::max(most, value), ++n;
    }
    return sum > 0 ? most * n / sum : 1.0;
  };
  balance.memory = over_mean([](const PlanDevice& device) {
    return static_cast<double>(peak_without_copies(device)) /
           static_cast<double>(std::max<int64_t>(device.budget_bytes, 1));
  });
  balance.time = over_mean([](const PlanDevice& device) { return device.decode_seconds; });
  if (!cards || !plan.feasible || (balance.memory <= kEvenMemory && balance.time <= kEvenTime)) {
    balance.cause = UnevenCause::kNone;
    return;
  }
  if (balance.cause == UnevenCause::kNone) balance.cause = UnevenCause::kGrown;
  plan.remarks.push_back(
      fmt::format("placement: of the cards' mean, the fullest holds {:.2f} and the busiest works "
                  "{:.2f}: {}",
                  balance.memory, balance.time, cause_text(plan)));
}

}  // namespace fathom::run
