#include "placement_checks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace fathom::test {
namespace {

using run::PlacementCost;
using run::SolverProblem;

// What lies where, as numbers that are easy to change.
struct Parts {
  std::vector<int> layer;
  std::vector<std::vector<int64_t>> experts;  // [layer][device]; empty: dense
  int embed = 0, head = 0;
};

Parts parts_of(const Placement& placement, int n_devices) {
  Parts parts{
      .layer = {}, .experts = {}, .embed = placement.embed_device, .head = placement.head_device};
  for (const LayerPlacement& layer : placement.layers) {
    parts.layer.push_back(layer.device);
    parts.experts.emplace_back(layer.experts.empty() ? 0 : static_cast<size_t>(n_devices));
    for (const ExpertSpan& span : layer.experts)
      parts.experts.back()[static_cast<size_t>(span.device)] += span.count;
  }
  return parts;
}

Placement placement_of(const Parts& parts) {
  Placement placement;
  placement.embed_device = parts.embed;
  placement.head_device = parts.head;
  for (size_t l = 0; l < parts.layer.size(); ++l) {
    LayerPlacement layer{.device = parts.layer[l], .slot = 0, .experts = {}};
    int64_t first = 0;
    for (size_t d = 0; d < parts.experts[l].size(); ++d) {
      const int64_t n = parts.experts[l][d];
      if (n > 0) layer.experts.push_back({static_cast<int>(d), first, n});
      first += n;
    }
    placement.layers.push_back(std::move(layer));
  }
  return placement;
}

// A placement with its price.
struct Priced {
  PlacementCost cost;
  std::vector<double> share;  // of the memory, by card
  std::vector<double> busy;   // by card
  double memory = 1, time = 1;
};

double over_mean(const std::vector<double>& values) {
  double sum = 0, most = 0;
  for (const double v : values) sum += v, most = std::max(most, v);
  return values.size() > 1 && sum > 0 ? most * static_cast<double>(values.size()) / sum : 1;
}

class Refuter {
 public:
  Refuter(const SolverProblem& p, const Plan& plan) : p_(p), plan_(plan), b_(plan.balance) {
    for (int d = 0; d < p.n_devices; ++d)
      if (!p.is_host[static_cast<size_t>(d)]) cards_.push_back(d);
  }

  std::vector<std::string> run() {
    parts_ = parts_of(plan_.placement, p_.n_devices);
    now_ = price(parts_);
    if (now_.cost.bytes_over > 0) say("does not fit");
    single_moves();
    one_for_every_card();
    figures();
    if (b_.cause != UnevenCause::kNone && b_.cause != UnevenCause::kGrown) {
      cause();
      search();
    }
    if (b_.cause == UnevenCause::kGrown && (now_.memory > kEvenMemory || now_.time > kEvenTime))
      say(fmt::format("is uneven where it was made: {:.3f}, {:.3f}", now_.memory, now_.time));
    return std::move(said_);
  }

 private:
  // What is nearer to a bound than that counts as at it: rounding, and the solver's own margin.
  static constexpr double kNear = 0.006;

  std::string name(int d) const { return plan_.devices[static_cast<size_t>(d)].name; }
  void say(std::string text) {
    if (said_.size() < 8) said_.push_back(std::move(text));
  }

  Priced price(const Parts& parts) const {
    Priced out;
    out.cost = cost_of(p_, placement_of(parts));
    for (const int card : cards_) {
      const auto d = static_cast<size_t>(card);
      out.share.push_back(static_cast<double>(out.cost.bytes[d] + p_.held[d]) /
                          static_cast<double>(p_.budget[d] + p_.held[d]));
      out.busy.push_back(out.cost.busy[d]);
    }
    out.memory = over_mean(out.share);
    out.time = over_mean(out.busy);
    return out;
  }

  // Whether an earlier layer is like this one in all that its experts' places depend on.
  bool has_twin(const Parts& parts, size_t l) const {
    for (size_t m = 0; m < l; ++m) {
      bool twin = parts.layer[m] == parts.layer[l] && parts.experts[m] == parts.experts[l] &&
                  !p_.pins.any_expert(m) && p_.expert_bytes[m] == p_.expert_bytes[l];
      for (const run::SolverPass& pass : p_.passes)
        twin = twin && pass.experts[m] == pass.experts[l];
      if (twin) return true;
    }
    return false;
  }

  // visit(changed, from, to, what)
  template <class Visit>
  void each_move(const Parts& parts, const PlacementCost& cost, Visit&& visit) const {
    Parts changed = parts;
    for (size_t l = 0; l < parts.layer.size(); ++l) {
      for (int to = 0; to < p_.n_devices; ++to) {
        const auto at = static_cast<size_t>(to);
        const int home = parts.layer[l];
        if (p_.pins.layers[l] < 0 && to != home) {
          changed.layer[l] = to;
          visit(changed, home, to, fmt::format("layer {} without experts", l));
          if (!parts.experts[l].empty()) {
            std::swap(changed.experts[l][static_cast<size_t>(home)], changed.experts[l][at]);
            changed.experts[l][at] += changed.experts[l][static_cast<size_t>(home)];
            changed.experts[l][static_cast<size_t>(home)] = 0;
            if (!p_.pins.any_expert(l)) visit(changed, home, to, fmt::format("layer {}", l));
            changed.experts[l] = parts.experts[l];
          }
          changed.layer[l] = home;
        }
        if (parts.experts[l].empty() || p_.pins.any_expert(l) || has_twin(parts, l)) continue;
        for (size_t from = 0; from < parts.experts[l].size(); ++from) {
          const int64_t here = parts.experts[l][from];
          if (from == at || here == 0) continue;
          const int64_t fit = std::clamp<int64_t>(
              (p_.budget[at] - cost.bytes[at]) / p_.expert_bytes[l][at], 1, here);
          for (int64_t n = fit; n > 0; n /= 2) {
            changed.experts[l][from] -= n, changed.experts[l][at] += n;
            visit(changed, static_cast<int>(from), to, fmt::format("{} experts of layer {}", n, l));
            changed.experts[l] = parts.experts[l];
          }
        }
      }
    }
    for (int to = 0; to < p_.n_devices; ++to) {
      if (to != parts.embed && p_.pins.embed_device < 0) {
        changed.embed = to;
        visit(changed, parts.embed, to, std::string("the embedding"));
        changed.embed = parts.embed;
      }
      if (to != parts.head && p_.pins.head_device < 0) {
        changed.head = to;
        visit(changed, parts.head, to, std::string("the output head"));
        changed.head = parts.head;
      }
    }
  }

  // Within the bounds, or not further beyond them than now.
  bool no_less_even(const Priced& other) const {
    return other.memory <= std::max(now_.memory, kEvenMemory - kNear) + 1e-9 &&
           other.time <= std::max(now_.time, kEvenTime - kNear) + 1e-9;
  }
  // A gain without a loss.
  bool better(const Priced& other) const {
    if (other.cost.bytes_over > 0 || other.cost.makespan > now_.cost.makespan ||
        other.cost.latency > now_.cost.latency || !no_less_even(other))
      return false;
    const auto missed = [](const Priced& x) {
      return std::max(x.memory - kEvenMemory, 0.0) + std::max(x.time - kEvenTime, 0.0);
    };
    return other.cost.makespan < now_.cost.makespan * (1 - 1e-5) ||
           missed(other) < missed(now_) - 1e-4;
  }

  bool faster(int a, int b) const {
    const std::vector<double>& experts = p_.passes.front().experts.back();
    return experts[static_cast<size_t>(a)] < experts[static_cast<size_t>(b)];
  }

  void single_moves() {
    std::vector<bool> fits(static_cast<size_t>(p_.n_devices), false);
    each_move(
        parts_, now_.cost, [&](const Parts& changed, int from, int to, const std::string& what) {
          const Priced then = price(changed);
          if (from == b_.slowest && then.cost.bytes_over == 0) fits[static_cast<size_t>(to)] = true;
          if (better(then))
            say(fmt::format(
                "{} from {} to {}: {:.6f} ms instead of {:.6f}, memory {:.4f} "
                "instead of {:.4f}, time {:.4f} instead of {:.4f}",
                what, name(from), name(to), then.cost.makespan * 1e3, now_.cost.makespan * 1e3,
                then.memory, now_.memory, then.time, now_.time));
          else if (then.cost.bytes_over == 0 && faster(to, from) &&
                   then.cost.latency <= now_.cost.latency &&
                   then.cost.makespan * kMostForEven < now_.cost.makespan)
            say(fmt::format(
                "{} from {} to {} saves more than evenness may cost: {:.4f} ms "
                "instead of {:.4f}",
                what, name(from), name(to), then.cost.makespan * 1e3, now_.cost.makespan * 1e3));
        });
    for (int d = 0; d < p_.n_devices; ++d) {
      const bool full = std::ranges::find(b_.full, d) != b_.full.end();
      if (d != b_.slowest && full == fits[static_cast<size_t>(d)])
        say(fmt::format("a part of {} {} on {}, which counts as {}", name(b_.slowest),
                        full ? "fits" : "does not fit", name(d), full ? "full" : "not full"));
    }
  }

  // Experts that lie on a slower device, as many for every card as all have room for.
  void one_for_every_card() {
    for (int from = 0; from < p_.n_devices; ++from)
      for (const int64_t n : {1, 4, 16}) {
        Parts changed = parts_;
        int moved = 0;
        for (const int card : cards_)
          for (size_t l = 0; l < changed.layer.size(); ++l) {
            if (changed.experts[l].empty() || p_.pins.any_expert(l) || changed.layer[l] != card ||
                !faster(card, from) || changed.experts[l][static_cast<size_t>(from)] < n)
              continue;
            changed.experts[l][static_cast<size_t>(from)] -= n;
            changed.experts[l][static_cast<size_t>(card)] += n;
            ++moved;
            break;
          }
        if (moved > 0 && better(price(changed)))
          say(fmt::format("{} experts for each of {} cards from {} would be better", n, moved,
                          name(from)));
      }
  }

  static bool same(double a, double b) { return std::abs(a - b) <= 1e-9 + 1e-6 * std::abs(b); }
  bool too_dear(const PlacementSeconds& s) const {
    return s.step > kMostForEven * b_.fastest.step || s.goal > kMostForEven * b_.fastest.goal;
  }

  void figures() {
    if (!same(b_.seconds.step, now_.cost.latency) || !same(b_.seconds.goal, now_.cost.makespan))
      say("its seconds are not those of the placement");
    if (too_dear({b_.seconds.step * (1 - 1e-6), b_.seconds.goal * (1 - 1e-6)}))
      say("it costs more above the fastest than evenness may");
    const auto most = std::ranges::max_element(now_.cost.busy) - now_.cost.busy.begin();
    if (now_.cost.busy[static_cast<size_t>(b_.slowest)] < now_.cost.busy[static_cast<size_t>(most)])
      say(fmt::format("{} is slower than {}", name(static_cast<int>(most)), name(b_.slowest)));
  }

  bool cards_alike() const {
    const auto differ = [](double a, double b) { return std::abs(a - b) > 0.01 * std::max(a, b); };
    const auto first = static_cast<size_t>(cards_.front());
    const run::SolverPass& pass = p_.passes.front();
    return std::ranges::none_of(cards_, [&](int card) {
      const auto d = static_cast<size_t>(card);
      bool other =
          differ(static_cast<double>(p_.budget[d]), static_cast<double>(p_.budget[first])) ||
          differ(pass.head[d], pass.head[first]);
      for (size_t l = 0; l < pass.own.size(); ++l)
        other = other || differ(pass.own[l][d], pass.own[l][first]) ||
                differ(pass.experts[l][d], pass.experts[l][first]);
      return other;
    });
  }

  int64_t on_hosts(const Parts& parts) const {
    int64_t sum = 0;
    for (const std::vector<int64_t>& counts : parts.experts)
      for (size_t d = 0; d < counts.size(); ++d)
        if (p_.is_host[d]) sum += counts[d];
    return sum;
  }

  void cause() {
    const Parts even = parts_of(b_.even, p_.n_devices);
    const Priced then = price(even);
    if (then.cost.bytes_over > 0) say("the evener placement does not fit");
    if (!same(b_.even_seconds.step, then.cost.latency) ||
        !same(b_.even_seconds.goal, then.cost.makespan) || !same(b_.even_memory, then.memory) ||
        !same(b_.even_time, then.time))
      say("the figures of the evener placement are not its own");
    if (b_.even_meets ? then.memory > kEvenMemory || then.time > kEvenTime
                      : then.memory <= kEvenMemory - kNear && then.time <= kEvenTime - kNear)
      say("the evener placement's evenness is not as told");
    if (b_.cause != UnevenCause::kPins && b_.even_meets && !too_dear(b_.even_seconds))
      say("the evener placement is cheap enough");

    const auto load = [&](int card) {
      const auto i = static_cast<size_t>(std::ranges::find(cards_, card) - cards_.begin());
      return now_.time - kEvenTime > now_.memory - kEvenMemory ? now_.busy[i] : now_.share[i];
    };
    for (const int card : cards_)
      if (load(card) > load(b_.giver))
        say(fmt::format("{} carries more than {}", name(card), name(b_.giver)));
    bool fits = false;
    each_move(parts_, now_.cost, [&](const Parts& changed, int from, int to, const std::string&) {
      if (from == b_.giver && !p_.is_host[static_cast<size_t>(to)] && load(to) < load(from))
        fits = fits || cost_of(p_, placement_of(changed)).bytes_over == 0;
    });
    switch (b_.cause) {
      case UnevenCause::kMemory: {
        if (fits) say("memory: a part does fit");
        if (!cards_alike()) say("memory: the cards differ");
        break;
      }
      case UnevenCause::kTransfers: {
        if (!fits) say("transfers: no part fits");
        if (!cards_alike()) say("transfers: the cards differ");
        // What makes the evener placement longer are its ways, or experts on slower devices.
        SolverProblem free = p_;
        for (run::SolverPass& pass : free.passes)
          for (auto* ways : {&pass.hand_over, &pass.round_trip})
            for (std::vector<double>& row : *ways) std::ranges::fill(row, 0.0);
        const PlacementCost even_free = cost_of(free, b_.even);
        const PlacementCost now_free = cost_of(free, plan_.placement);
        // One of the two limits that it breaks must be one that it would keep without them.
        const bool by_step = b_.even_seconds.step > kMostForEven * b_.fastest.step &&
                             even_free.latency <= kMostForEven * now_free.latency;
        const bool by_goal = b_.even_seconds.goal > kMostForEven * b_.fastest.goal &&
                             even_free.makespan <= kMostForEven * now_free.makespan;
        if (!by_step && !by_goal && on_hosts(even) <= on_hosts(parts_))
          say(fmt::format("transfers: without any it would still take {:.4f} ms instead of {:.4f}",
                          even_free.latency * 1e3, now_free.latency * 1e3));
        break;
      }
      case UnevenCause::kUnlike:
        if (cards_alike()) say("unlike: the cards are alike");
        break;
      case UnevenCause::kPins: {
        bool broken = false;
        for (size_t l = 0; l < even.layer.size(); ++l)
          broken = broken || (p_.pins.layers[l] >= 0 && p_.pins.layers[l] != even.layer[l]);
        if (!broken) say("pins: the evener placement keeps them");
        if (!b_.even_meets) say("pins: without them the cards are no evener");
        break;
      }
      default:
        break;
    }
  }

  // From the plan's placement: what takes a card that carries too much nearest to its bound for its
  // price, again and again.
  void search() {
    Parts parts = parts_;
    Priced now = now_;
    const auto beyond = [&](const Priced& x) {
      double sum = 0;
      const auto add = [&](const std::vector<double>& values, double bound) {
        double mean = 0;
        for (const double v : values) mean += v / static_cast<double>(values.size());
        for (const double v : values) sum += std::max(0.0, v / mean - (bound - kNear));
      };
      add(x.share, kEvenMemory);
      add(x.busy, kEvenTime);
      return sum;
    };
    constexpr int kMostSteps = 48;
    for (int step = 0; step < kMostSteps && beyond(now) > 0; ++step) {
      Parts best;
      Priced best_price;
      double best_rate = 0;
      each_move(parts, now.cost, [&](const Parts& changed, int from, int, const std::string&) {
        const auto i = static_cast<size_t>(std::ranges::find(cards_, from) - cards_.begin());
        if (i >= cards_.size()) return;
        if (now.share[i] < 1.02 * mean(now.share) && now.busy[i] < 1.05 * mean(now.busy)) return;
        Priced then = price(changed);
        if (then.cost.bytes_over > 0) return;
        const double gain = beyond(now) - beyond(then);
        const double cost = std::max({then.cost.makespan / now.cost.makespan,
                                      then.cost.latency / now.cost.latency, 1 + 1e-5}) -
                            1;
        if (gain > 1e-6 && gain / cost > best_rate)
          best_rate = gain / cost, best = changed, best_price = std::move(then);
      });
      if (best_rate == 0) return;
      parts = std::move(best);
      now = std::move(best_price);
      if (too_dear({now.cost.latency, now.cost.makespan})) return;
    }
    if (beyond(now) == 0)
      say(
          fmt::format("there is one within the bounds that costs little: {:.4f} ms, {:.4f} ms in "
                      "all, memory {:.3f}, time {:.3f}",
                      now.cost.latency * 1e3, now.cost.makespan * 1e3, now.memory, now.time));
  }
  static double mean(const std::vector<double>& values) {
    double sum = 0;
    for (const double v : values) sum += v;
    return sum / static_cast<double>(values.size());
  }

  const SolverProblem& p_;
  const Plan& plan_;
  const PlacementBalance& b_;
  std::vector<int> cards_;
  Parts parts_;
  Priced now_;
  std::vector<std::string> said_;
};

}  // namespace

std::vector<std::string> refute(const SolverProblem& problem, const Plan& plan) {
  return Refuter(problem, plan).run();
}

}  // namespace fathom::test
