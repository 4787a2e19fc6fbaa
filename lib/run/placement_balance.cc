// Evenness of the cards, and the last step of the solver: single parts that are better elsewhere.
#include <algorithm>

#include "placement_descent.h"

namespace fathom::run {
namespace {

// The solver stays that far within the bounds, for what its figures and the plan's differ.
constexpr double kMargin = 0.003;
// Less than that is rounding.
constexpr double kShorter = 1e-6, kSame = 1e-9;

// Layers that are alike in bytes, times and pins have the same number.
std::vector<size_t> kinds_of_layers(const SolverProblem& p) {
  const auto alike = [&](size_t a, size_t b) {
    if (p.own_bytes[a] != p.own_bytes[b] || p.expert_bytes[a] != p.expert_bytes[b] ||
        p.pins.experts[a] != p.pins.experts[b])
      return false;
    return std::ranges::all_of(p.passes, [&](const SolverPass& pass) {
      return pass.own[a] == pass.own[b] && pass.network[a] == pass.network[b] &&
             pass.experts[a] == pass.experts[b];
    });
  };
  std::vector<size_t> kinds;
  for (size_t l = 0; l < p.own_bytes.size(); ++l) {
    size_t same = 0;
    while (same < l && !alike(same, l)) ++same;
    kinds.push_back(same < l ? kinds[same] : l);
  }
  return kinds;
}

}  // namespace

CardBalance balance_of(const SolverProblem& p, const PlacementCost& cost) {
  CardBalance out;
  const auto over_mean = [&](double bound, auto&& value_of) {
    double sum = 0, most = 0, n = 0;
    const auto each = [&](auto&& visit) {
      for (size_t d = 0; d < p.budget.size(); ++d)
        if (!p.is_host[d] && p.budget[d] > 0) visit(value_of(d));
    };
    each([&](double value) { sum += value, most = std::max(most, value), ++n; });
    if (n < 2 || sum <= 0) return 1.0;
    each([&](double value) { out.miss += std::max(value * n / sum - (bound - kMargin), 0.0); });
    return most * n / sum;
  };
  out.memory = over_mean(kEvenMemory, [&](size_t d) {
    const int64_t held = p.held.empty() ? 0 : p.held[d];
    return static_cast<double>(cost.bytes[d] + held) / static_cast<double>(p.budget[d] + held);
  });
  out.time = over_mean(kEvenTime, [&](size_t d) { return cost.busy[d]; });
  return out;
}

bool Descent::has_twin(const PlacementState& s, const std::vector<size_t>& kinds, size_t l) const {
  for (size_t m = 0; m < l; ++m)
    if (kinds[m] == kinds[l] && s.layer[m] == s.layer[l] &&
        std::ranges::equal(s.experts[m], s.experts[l]))
      return true;
  return false;
}

void Descent::approach_bounds(PlacementState& s) const {
  const std::vector<size_t> kinds = kinds_of_layers(p_);
  PlacementCost now = cost(s);
  double miss = balance_of(p_, now).miss;
  constexpr int kMostSteps = 64;
  for (int step = 0; step < kMostSteps && miss > 0; ++step) {
    PlacementState best;
    double best_rate = 0;
    const auto consider = [&](const PlacementState& changed) {
      const PlacementCost c = cost(changed);
      if (c.bytes_over > now.bytes_over) return;
      constexpr double kNothing = 1e-5;  // what costs less counts as that
      const double gain = miss - balance_of(p_, c).miss;
      const double price =
          std::max({c.makespan / now.makespan - 1, c.latency / now.latency - 1, kNothing});
      if (gain > kShorter && gain / price > best_rate) best_rate = gain / price, best = changed;
    };
    PlacementState changed = s;
    for (size_t l = 0; l < n_layers_; ++l) {
      const auto home = static_cast<size_t>(s.layer[l]);
      for (int d = 0; d < p_.n_devices && !p_.is_host[home] && p_.pins.layers[l] < 0; ++d) {
        if (d == s.layer[l]) continue;
        changed.layer[l] = d;
        consider(changed);
        changed.layer[l] = s.layer[l];
        move_layer(changed, l, d);
        consider(changed);
        changed.layer[l] = s.layer[l];
        std::ranges::copy(s.experts[l], changed.experts[l].begin());
      }
      if (s.experts[l].empty() || has_twin(s, kinds, l)) continue;
      for (size_t from = 0; from < n_devices_; ++from) {
        const int64_t movable = s.experts[l][from] - pinned_experts(l, from);
        for (size_t to = 0; to < n_devices_ && !p_.is_host[from]; ++to) {
          if (to == from) continue;
          const int64_t room = (p_.budget[to] - now.bytes[to]) / p_.expert_bytes[l][to];
          for (int64_t n = std::min(movable, std::max<int64_t>(room, 0)); n > 0; n /= 2) {
            changed.experts[l][from] -= n, changed.experts[l][to] += n;
            consider(changed);
            changed.experts[l][from] += n, changed.experts[l][to] -= n;
          }
        }
      }
    }
    for (int d = 0; d < p_.n_devices; ++d) {
      if (p_.pins.embed_device < 0) changed.embed = d, consider(changed), changed.embed = s.embed;
      if (p_.pins.head_device < 0) changed.head = d, consider(changed), changed.head = s.head;
    }
    if (best_rate == 0) return;
    s = std::move(best);
    now = cost(s);
    miss = balance_of(p_, now).miss;
  }
}

void Descent::polish(PlacementState& s, const PlacementCost& fastest) const {
  const std::vector<size_t> kinds = kinds_of_layers(p_);
  PlacementCost now = cost(s);
  CardBalance balance = balance_of(p_, now);
  const auto missed = [](double value, double bound) { return std::max(value - bound, 0.0); };
  // Keeps the change where it is a gain in one thing and a loss in none.
  const auto keep = [&]() {
    PlacementCost c = cost(s);
    if (c.bytes_over > now.bytes_over || c.makespan > now.makespan * (1 + kSame) ||
        c.latency > std::max(now.latency, kMostForEven * fastest.latency))
      return false;
    const CardBalance b = balance_of(p_, c);
    const double memory = missed(b.memory, kEvenMemory - kMargin),
                 time = missed(b.time, kEvenTime - kMargin);
    const double memory_now = missed(balance.memory, kEvenMemory - kMargin),
                 time_now = missed(balance.time, kEvenTime - kMargin);
    if (memory > memory_now + kSame || time > time_now + kSame) return false;
    if (c.makespan >= now.makespan * (1 - kShorter) &&
        memory + time >= memory_now + time_now - kShorter)
      return false;
    now = std::move(c);
    balance = b;
    return true;
  };

  // Experts of a layer: as many as fit, half of that, and so on.
  const auto experts = [&](size_t l, size_t from, size_t to) {
    const auto counts = s.experts[l];
    const int64_t movable = counts[from] - pinned_experts(l, from);
    const int64_t room = (p_.budget[to] - now.bytes[to]) / p_.expert_bytes[l][to];
    for (int64_t n = std::min(movable, std::max<int64_t>(room, 0)); n > 0; n /= 2) {
      counts[from] -= n, counts[to] += n;
      if (keep()) return true;
      counts[from] += n, counts[to] -= n;
    }
    return false;
  };
  const auto whole = [&](auto&& change) {
    const PlacementState before = s;
    change();
    if (keep()) return true;
    s = before;
    return false;
  };
  const auto all_experts = [&] {
    bool any = false;
    for (size_t l = 0; l < n_layers_; ++l) {
      if (s.experts[l].empty()) continue;
      if (has_twin(s, kinds, l)) continue;  // it was tried, and nothing came of it
      for (size_t from = 0; from < n_devices_; ++from)
        for (size_t to = 0; to < n_devices_; ++to)
          if (to != from && s.experts[l][from] > 0) any |= experts(l, from, to);
    }
    return any;
  };
  const auto layers_and_ends = [&] {
    bool any = false;
    for (int d = 0; d < p_.n_devices; ++d) {
      for (size_t l = 0; l < n_layers_; ++l) {
        if (s.layer[l] == d || p_.pins.layers[l] >= 0) continue;
        any |= whole([&] { s.layer[l] = d; }) || whole([&] { move_layer(s, l, d); });
      }
      if (p_.pins.embed_device < 0 && s.embed != d) any |= whole([&] { s.embed = d; });
      if (p_.pins.head_device < 0 && s.head != d) any |= whole([&] { s.head = d; });
    }
    return any;
  };
  constexpr int kMostRounds = 64;
  for (int round = 0; round < kMostRounds; ++round)
    if (!all_experts() && !layers_and_ends()) return;
}

}  // namespace fathom::run
