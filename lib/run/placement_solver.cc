#include "placement_descent.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fathom::run {
namespace {

// Beyond any time: a byte too many counts this many seconds.
constexpr double kSecondsPerByteOver = 1e-3;
// Small against what a user could notice: among placements of like speed those with even work are
// taken - by squares, as the slowest stage does not change before all that are as slow gave a part
// away - and cards that are evenly full (at most a hundredth of the time for it).
constexpr double kEvenTie = 1e-3, kMemoryTie = 0.05, kMostUneven = 0.2;
// Says which is the evener of two.
constexpr double kCardTie = 0.03;
// A byte too many where prices are shares of the fastest time.
constexpr double kPricePerByteOver = 1;
// Of the placements looked at for the fastest, how many more for evenness and for its bounds.
constexpr double kEvenPart = 0.75, kBoundsPart = 0.5;

// Seconds that a layer adds to one pass, and to its devices' busy time.
double layer_time(const SolverProblem& p, const SolverPass& pass, const PlacementState& s, size_t l,
                  std::vector<double>& busy) {
  const auto home = static_cast<size_t>(s.layer[l]);
  const double own = pass.own[l][home], network = pass.network[l][home];
  busy[home] += own + network;
  if (s.experts[l].empty()) return own + network;
  // That the dense part runs while rows are away is not counted: it is little, and it would draw
  // attention and experts apart for its own sake.
  double chain = 0;
  for (size_t d = 0; d < s.experts[l].size(); ++d) {
    if (s.experts[l][d] == 0) continue;
    const double share = static_cast<double>(s.experts[l][d]) / static_cast<double>(p.n_experts);
    const double seconds = share * pass.experts[l][d];
    busy[d] += seconds;
    chain += seconds;
    if (d != home) chain += pass.round_trip[home][d];
  }
  return own + network + chain;
}

// Whether passes of one session can overlap on these devices.
bool separate(const PlacementState& s) {
  for (size_t l = 0; l < s.layer.size(); ++l) {
    const auto home = static_cast<size_t>(s.layer[l]);
    for (size_t d = 0; d < s.experts[l].size(); ++d)
      if (d != home && s.experts[l][d] > 0) return false;
    if (l > 0 && s.layer[l] != s.layer[l - 1] &&
        std::find(s.layer.begin(), s.layer.begin() + static_cast<std::ptrdiff_t>(l), s.layer[l]) !=
            s.layer.begin() + static_cast<std::ptrdiff_t>(l))
      return false;
  }
  return s.embed == s.layer.front() ||
         std::find(s.layer.begin(), s.layer.end(), s.embed) == s.layer.end();
}

}  // namespace

PlacementCost Descent::cost(const PlacementState& s) const {
  PlacementCost out;
  out.bytes.assign(n_devices_, 0);
  std::vector<size_t> n_here(n_devices_, 0);
  std::vector<char> has_guests(n_devices_, 0);
  for (size_t l = 0; l < n_layers_; ++l) {
    const auto home = static_cast<size_t>(s.layer[l]);
    ++n_here[home];
    out.bytes[home] += p_.own_bytes[l][home];
    for (size_t d = 0; d < s.experts[l].size(); ++d) {
      if (s.experts[l][d] == 0) continue;
      if (d != home) has_guests[d] = 1;
      out.bytes[d] += s.experts[l][d] * p_.expert_bytes[l][d];
    }
  }
  const auto embed = static_cast<size_t>(s.embed), head = static_cast<size_t>(s.head);
  out.bytes[head] += p_.head_bytes[head];
  if (embed != head || !p_.tied_embedding) out.bytes[embed] += p_.embed_bytes[embed];
  int64_t host = 0;
  for (size_t d = 0; d < n_devices_; ++d) {
    if (!p_.page_rest.empty()) out.bytes[d] += p_.page_rest[d][n_here[d]];
    if (n_here[d] > 0)
      out.bytes[d] += p_.layers_scratch[d];
    else if (has_guests[d])
      out.bytes[d] += p_.guests_scratch[d];
    else if (embed == d || head == d)
      out.bytes[d] += p_.ends_scratch[d];
    out.bytes_over += std::max<int64_t>(0, out.bytes[d] - p_.budget[d]);
    if (p_.is_host[d]) host += out.bytes[d];
  }
  out.bytes_over += std::max<int64_t>(0, host - p_.host_budget);

  for (const SolverPass& pass : p_.passes) {
    std::vector<double> busy(n_devices_, 0);
    double latency = pass.embed[embed] + pass.head[head];
    busy[embed] += pass.embed[embed];
    busy[head] += pass.head[head];
    size_t at = embed;
    for (size_t l = 0; l < n_layers_; ++l) {
      const auto home = static_cast<size_t>(s.layer[l]);
      latency += pass.hand_over[at][home] + layer_time(p_, pass, s, l, busy);
      at = home;
    }
    latency += pass.hand_over[at][head];
    const double slowest = *std::max_element(busy.begin(), busy.end());
    const double next =
        pass.one_session && !separate(s) ? std::max(slowest, latency * pass.in_turns) : slowest;
    out.makespan += pass.weight * (latency + static_cast<double>(pass.in_flight - 1) * next);
    if (&pass == &p_.passes.front()) {
      out.busy = std::move(busy);
      out.latency = latency;
    }
  }
  return out;
}

double Descent::score(const PlacementState& s) const {
  ++n_scored_;
  const PlacementCost c = cost(s);
  if (aim_ == Aim::kBounds)
    return c.makespan / fastest_makespan_ + c.latency / fastest_latency_ +
           miss_weight_ * balance_of(p_, c).miss +
           kPricePerByteOver * static_cast<double>(c.bytes_over);
  const bool even = aim_ == Aim::kEven;
  double busy = 0, squares = 1e-30;
  for (const double b : c.busy) busy += b, squares += b * b;
  double fullest = 0, sum = 0, n = 0, busiest = 0, works = 1e-30, works_squares = 0;
  for (size_t d = 0; d < n_devices_; ++d) {
    if (p_.is_host[d] || p_.budget[d] <= 0) continue;
    const double share = static_cast<double>(c.bytes[d]) / static_cast<double>(p_.budget[d]);
    fullest = std::max(fullest, share);
    sum += share;
    ++n;
    works += c.busy[d];
    busiest = std::max(busiest, c.busy[d]);
    works_squares += c.busy[d] * c.busy[d];
  }
  // 0: all cards work alike.  The first falls with every part that goes from a busy card to
  // another, the second counts where they are nearly alike.
  const double one_sided = std::log1p(std::max(n * works_squares / (works * works) - 1, 0.0)) +
                           std::max(busiest * n / works - 1, 0.0);
  const double uneven = sum > 0 ? std::min(fullest * n / sum - 1, even ? 1.0 : kMostUneven) : 0;
  return c.makespan + kEvenTie * squares / (busy + 1e-30) +
         (kMemoryTie * uneven + (even ? kCardTie * one_sided : 0)) * c.latency +
         kSecondsPerByteOver * static_cast<double>(c.bytes_over);
}

// Contiguous layers in the order of `order`, each device its share; experts with their layers while
// the device has room, the rest where there is most room.
PlacementState Descent::from_shares(const std::vector<double>& shares,
                                    const std::vector<int>& order) const {
  PlacementState s;
  s.layer.assign(n_layers_, order.back());
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  double share = 0;
  size_t first = 0;
  for (const int d : order) {
    share += sum > 0 ? shares[static_cast<size_t>(d)] / sum : 1.0 / p_.n_devices;
    const auto end = static_cast<size_t>(std::lround(share * static_cast<double>(n_layers_)));
    for (; first < std::min(end, n_layers_); ++first) s.layer[first] = d;
  }
  for (size_t l = 0; l < n_layers_; ++l) {
    if (p_.pins.layers[l] >= 0) s.layer[l] = p_.pins.layers[l];
    s.experts.add_layer(moe(l) ? n_devices_ : 0);
    if (moe(l)) {
      for (const int pinned : p_.pins.experts[l])
        ++s.experts[l][static_cast<size_t>(pinned >= 0 ? pinned : s.layer[l])];
    }
  }
  s.embed = p_.pins.embed_device >= 0 ? p_.pins.embed_device : s.layer.front();
  s.head = p_.pins.head_device >= 0 ? p_.pins.head_device : s.layer.back();

  // Devices over budget hand experts, layer by layer from the end, to the roomiest.
  PlacementCost now = cost(s);
  for (size_t l = n_layers_; l-- > 0;) {
    if (s.experts[l].empty()) continue;
    for (size_t d = 0; d < n_devices_; ++d) {
      const int64_t over = now.bytes[d] - p_.budget[d];
      if (over <= 0) continue;
      size_t to = d;
      int64_t room = 0;
      for (size_t other = 0; other < n_devices_; ++other)
        if (const int64_t free = p_.budget[other] - now.bytes[other]; free > room)
          room = free, to = other;
      if (to == d) continue;
      const int64_t n = std::min({s.experts[l][d] - pinned_experts(l, d),
                                  (over + p_.expert_bytes[l][d] - 1) / p_.expert_bytes[l][d],
                                  std::max<int64_t>(1, room / p_.expert_bytes[l][to])});
      if (n <= 0) continue;
      s.experts[l][d] -= n;
      s.experts[l][to] += n;
      now.bytes[d] -= n * p_.expert_bytes[l][d];
      now.bytes[to] += n * p_.expert_bytes[l][to];
    }
  }
  return s;
}

Placement Descent::placement(const PlacementState& s) const {
  Placement out;
  out.embed_device = s.embed;
  out.head_device = s.head;
  for (size_t l = 0; l < n_layers_; ++l) {
    LayerPlacement layer{.device = s.layer[l], .slot = 0, .experts = {}};
    if (!s.experts[l].empty()) {
      // Pinned experts keep their place; the others fill the counts by ascending device.
      const std::span<const int64_t> counts = s.experts[l];
      std::vector<int64_t> left(counts.begin(), counts.end());
      for (const int pinned : p_.pins.experts[l])
        if (pinned >= 0) --left[static_cast<size_t>(pinned)];
      size_t next = 0;
      for (int64_t e = 0; e < p_.n_experts; ++e) {
        int device = p_.pins.experts[l][static_cast<size_t>(e)];
        if (device < 0) {
          while (left[next] == 0) ++next;
          --left[next];
          device = static_cast<int>(next);
        }
        if (!layer.experts.empty() && layer.experts.back().device == device)
          ++layer.experts.back().count;
        else
          layer.experts.push_back({device, e, 1});
      }
    }
    out.layers.push_back(std::move(layer));
  }
  out.number_slots();
  return out;
}

PlacementState Descent::state(const Placement& placement) const {
  PlacementState s;
  s.embed = placement.embed_device;
  s.head = placement.head_device;
  for (size_t l = 0; l < placement.layers.size(); ++l) {
    const LayerPlacement& layer = placement.layers[l];
    s.layer.push_back(layer.device);
    s.experts.add_layer(layer.experts.empty() ? 0 : n_devices_);
    for (const ExpertSpan& span : layer.experts)
      s.experts[l][static_cast<size_t>(span.device)] += span.count;
  }
  return s;
}

namespace {

// Whether the parts are more than all budgets together, wherever they lie.
bool hopeless(const SolverProblem& p) {
  const auto least = [](const std::vector<int64_t>& by_device) {
    return *std::min_element(by_device.begin(), by_device.end());
  };
  int64_t needed = p.tied_embedding ? 0 : least(p.embed_bytes);
  needed += least(p.head_bytes);
  for (size_t l = 0; l < p.own_bytes.size(); ++l)
    needed += least(p.own_bytes[l]) + p.n_experts * least(p.expert_bytes[l]);
  int64_t room = 0, host = 0;
  for (size_t d = 0; d < p.budget.size(); ++d)
    (p.is_host[d] ? host : room) += std::max<int64_t>(p.budget[d], 0);
  return needed > room + std::min(host, std::max<int64_t>(p.host_budget, 0));
}

}  // namespace

PlacementCost cost_of(const SolverProblem& problem, const Placement& placement) {
  const Descent descent(problem);
  return descent.cost(descent.state(placement));
}

Solution solve_placement(const SolverProblem& p) {
  Descent descent(p);
  const auto n = static_cast<size_t>(p.n_devices);
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);

  if (hopeless(p)) {
    std::vector<double> shares;
    for (const int64_t budget : p.budget)
      shares.push_back(static_cast<double>(std::max<int64_t>(budget, 1)));
    return {.placement = descent.placement(descent.from_shares(shares, order)),
            .fastest = {},
            .even = {}};
  }

  // Seconds of everything on one device alone, to know who is fast.
  std::vector<double> alone(n, 0), memory(n), speed(n);
  int64_t all_bytes = 1;
  for (size_t l = 0; l < p.own_bytes.size(); ++l)
    all_bytes += p.own_bytes[l][0] + p.n_experts * p.expert_bytes[l][0];
  for (size_t d = 0; d < n; ++d) {
    for (size_t l = 0; l < p.own_bytes.size(); ++l)
      alone[d] += p.passes.front().own[l][d] + p.passes.front().network[l][d] +
                  p.passes.front().experts[l][d];
    memory[d] = static_cast<double>(std::max<int64_t>(p.budget[d], 0));
    speed[d] = 1 / std::max(alone[d], 1e-12);
  }
  std::vector<int> by_speed = order;
  std::stable_sort(by_speed.begin(), by_speed.end(), [&](int a, int b) {
    return speed[static_cast<size_t>(a)] > speed[static_cast<size_t>(b)] * (1 + 1e-9);
  });
  // The fastest first, as full as they get; and likewise with each of them holding what it can of
  // the layers' own parts alone, their experts going to the others.
  std::vector<double> filled(n, 0), own_only(n, 0);
  int64_t own_bytes = 1;
  for (size_t l = 0; l < p.own_bytes.size(); ++l) own_bytes += p.own_bytes[l][0];
  double left = static_cast<double>(all_bytes), own_left = static_cast<double>(own_bytes);
  for (const int d : by_speed) {
    const auto i = static_cast<size_t>(d);
    filled[i] = std::min(left, memory[i]);
    left -= filled[i];
    own_only[i] = std::min(own_left, memory[i] / 2);
    own_left -= own_only[i];
  }
  std::vector<std::vector<double>> starts = {memory, speed, filled, own_only};
  for (const double weight : {0.25, 0.5, 0.75}) {  // between memory and speed
    std::vector<double> between(n);
    for (size_t d = 0; d < n; ++d)
      between[d] = std::pow(memory[d], weight) * std::pow(speed[d], 1 - weight);
    starts.push_back(between);
  }
  // The fast ones alone hold layers, in even shares: cards with a slow host behind them.
  for (size_t count = 1; count < n; ++count) {
    std::vector<double> even(n, 0);
    for (size_t i = 0; i < count; ++i) even[static_cast<size_t>(by_speed[i])] = 1;
    starts.push_back(even);
  }

  PlacementState best;
  double best_score = -1;
  // Returns the score of what `s` became.
  const auto consider = [&](PlacementState& s) {
    descent.improve(s);
    const double score = descent.score(s);
    if (best_score < 0 || score < best_score * (1 - 1e-9)) best_score = score, best = s;
    return score;
  };
  for (const std::vector<double>& shares : starts)
    if (std::accumulate(shares.begin(), shares.end(), 0.0) > 0) {
      PlacementState s = descent.from_shares(shares, order);
      consider(s);
    }
  // A walk from the best over its neighbours, back when it gets too far off; where few parts leave
  // little room between good and bad packings, also from anywhere.  The same numbers each time.
  constexpr double kTooFar = 1.15;
  const bool few_parts = p.own_bytes.size() * n <= 64;
  std::mt19937 rng(1);
  PlacementState walk = best;
  for (int64_t round = 1; !descent.ended(); ++round) {
    PlacementState s = walk;
    const int times = few_parts && round % 3 == 0 ? 8 : 1;
    for (int i = 0; i < times; ++i) descent.disturb(s, rng);
    walk = consider(s) <= best_score * kTooFar ? std::move(s) : best;
  }

  // The evenest of those that are nearly as fast, from the best and from all starts.
  const PlacementState fastest_state = best;
  const PlacementCost fastest = descent.cost(best);
  descent.aim_at(Aim::kEven, kEvenPart, fastest);
  const auto dear = [&](const PlacementCost& c) {
    return c.bytes_over > fastest.bytes_over || c.makespan > kMostForEven * fastest.makespan ||
           c.latency > kMostForEven * fastest.latency;
  };
  double even_score = descent.score(best);
  std::vector<PlacementState> from = {best};
  for (const std::vector<double>& shares : starts)
    if (std::accumulate(shares.begin(), shares.end(), 0.0) > 0)
      from.push_back(descent.from_shares(shares, order));
  for (PlacementState& s : from) {
    if (descent.ended()) break;
    descent.improve(s);
    const double score = descent.score(s);
    if (score < even_score && !dear(descent.cost(s))) even_score = score, best = s;
  }
  descent.even_out(best, kMostForEven * fastest.makespan);
  descent.polish(best, fastest);

  Solution out{
      .placement = {}, .fastest = {.step = fastest.latency, .goal = fastest.makespan}, .even = {}};
  if (const CardBalance balance = balance_of(p, descent.cost(best)); balance.miss > 0) {
    // The cheapest within the bounds, from the evenest found so far; what is not too dear is taken.
    std::optional<PlacementState> even;
    double even_miss = 0, even_price = 0;
    const auto consider_even = [&](PlacementState& s) {
      descent.polish(s, fastest);
      const PlacementCost c = descent.cost(s);
      if (c.bytes_over > fastest.bytes_over) return;
      const double miss = balance_of(p, c).miss;
      const double price = std::max(c.makespan / fastest.makespan, c.latency / fastest.latency);
      if (!even || miss < even_miss || (miss == even_miss && price < even_price))
        even = s, even_miss = miss, even_price = price;
    };
    for (const PlacementState& start : {best, fastest_state}) {
      PlacementState s = start;
      descent.approach_bounds(s);
      consider_even(s);
    }
    from.insert(from.begin(), best);
    descent.aim_at(Aim::kBounds, kBoundsPart, fastest);
    for (PlacementState& s : from) {
      if (descent.ended()) break;
      for (const double weight : {1, 4, 16}) {
        descent.set_miss_weight(weight);
        descent.improve(s);
        if (balance_of(p, descent.cost(s)).miss == 0) break;
      }
      consider_even(s);
    }
    if (even && even_miss == 0 && !dear(descent.cost(*even)))
      best = *even;
    else if (even)
      out.even = descent.placement(*even);
  }
  out.placement = descent.placement(best);
  return out;
}

int64_t least_bytes_over(const SolverProblem& p) {
  const auto least = [](const std::vector<int64_t>& by_device) {
    return *std::min_element(by_device.begin(), by_device.end());
  };
  int64_t over = 0, room = 0, host_room = 0;
  for (size_t d = 0; d < p.budget.size(); ++d) {
    over += std::max<int64_t>(-p.budget[d], 0);
    (p.is_host[d] ? host_room : room) += std::max<int64_t>(p.budget[d], 0);
  }
  room += std::clamp<int64_t>(p.host_budget, 0, host_room);
  int64_t parts = least(p.head_bytes) + (p.tied_embedding ? 0 : least(p.embed_bytes));
  for (size_t l = 0; l < p.own_bytes.size(); ++l)
    parts += least(p.own_bytes[l]) + p.n_experts * least(p.expert_bytes[l]);
  return over + std::max<int64_t>(parts - room, 0);
}

}  // namespace fathom::run
