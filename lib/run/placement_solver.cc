#include "placement_solver.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace fathom::run {
namespace {

// A placement as the descent sees it: how many experts of a layer lie on each device, in spans by
// ascending device.
struct State {
  std::vector<int> layer;                     // [layer]
  std::vector<std::vector<int64_t>> experts;  // [layer][device]; empty: dense
  int embed = 0, head = 0;
};

// Beyond any time: a byte too many counts this many seconds.
constexpr double kSecondsPerByteOver = 1e-3;
// Placements looked at, at most: a bound on time that does not depend on a clock.
constexpr int64_t kMostScored = 100000, kScoredPerPart = 4000;
// Small against what a user could notice: among placements of like speed those with even work are
// taken - by squares, as the slowest stage does not change before all that are as slow gave a part
// away - and cards that are evenly full (at most a hundredth of the time for it).
constexpr double kEvenTie = 1e-3, kMemoryTie = 0.05, kMostUneven = 0.2;
// When the fastest is found, cards are made to work alike where that costs at most so much of its
// time; kCardTie only says which is the evener of two.
constexpr double kMostForEven = 1.01, kCardTie = 0.03;
constexpr int64_t kEvenScored = 1;  // a part of the placements looked at: one of so many more

class Descent {
 public:
  explicit Descent(const SolverProblem& p)
      : p_(p),
        n_layers_(p.own_bytes.size()),
        n_devices_(static_cast<size_t>(p.n_devices)),
        most_scored_(std::min(kMostScored, kScoredPerPart * static_cast<int64_t>(n_layers_) *
                                               static_cast<int64_t>(n_devices_))) {}

  PlacementCost cost(const State& s) const;
  double score(const State& s) const;
  void improve(State& s) const;
  State from_shares(const std::vector<double>& shares, const std::vector<int>& order) const;
  // Cards become evenly full, to less than an expert, where a host holds experts of their layers.
  void even_out(State& s, double most_seconds) const;
  // Changes a few things at random, within the pins.
  void disturb(State& s, std::mt19937& rng) const;
  bool ended() const { return n_scored_ >= most_scored_; }
  // From now on evenness of the cards' work counts, for some more placements.
  void make_even() {
    even_ = true;
    most_scored_ = n_scored_ + most_scored_ / kEvenScored;
  }
  Placement placement(const State& s) const;
  State state(const Placement& placement) const;

 private:
  bool moe(size_t l) const { return p_.expert_bytes[l][0] > 0; }
  bool try_boundaries(State& s, double& best) const;
  bool try_layers(State& s, double& best) const;
  bool try_swaps(State& s, double& best) const;
  bool try_exchanges(State& s, double& best) const;
  bool try_experts(State& s, double& best) const;
  bool try_ends(State& s, double& best) const;
  // Moves a layer; its experts on the old device go along where they are not pinned.
  void move_layer(State& s, size_t l, int to) const;
  bool keep_if_better(State& s, State&& changed, double& best) const;
  int64_t pinned_experts(size_t l, size_t device) const;

  const SolverProblem& p_;
  const size_t n_layers_, n_devices_;
  int64_t most_scored_;
  bool even_ = false;
  mutable int64_t n_scored_ = 0;
};

// Seconds that a layer adds to one pass, and to its devices' busy time.
double layer_time(const SolverProblem& p, const SolverPass& pass, const State& s, size_t l,
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
bool separate(const State& s) {
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

PlacementCost Descent::cost(const State& s) const {
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
    const double next = pass.one_session && !separate(s) ? latency : slowest;
    out.makespan += pass.weight * (latency + static_cast<double>(pass.in_flight - 1) * next);
    if (&pass == &p_.passes.front()) {
      out.busy = std::move(busy);
      out.latency = latency;
    }
  }
  return out;
}

double Descent::score(const State& s) const {
  ++n_scored_;
  const PlacementCost c = cost(s);
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
  const double uneven = sum > 0 ? std::min(fullest * n / sum - 1, even_ ? 1.0 : kMostUneven) : 0;
  return c.makespan + kEvenTie * squares / (busy + 1e-30) +
         (kMemoryTie * uneven + (even_ ? kCardTie * one_sided : 0)) * c.latency +
         kSecondsPerByteOver * static_cast<double>(c.bytes_over);
}

int64_t Descent::pinned_experts(size_t l, size_t device) const {
  const auto& pins = p_.pins.experts[l];
  return std::count(pins.begin(), pins.end(), static_cast<int>(device));
}

void Descent::move_layer(State& s, size_t l, int to) const {
  const auto from = static_cast<size_t>(s.layer[l]), target = static_cast<size_t>(to);
  s.layer[l] = to;
  if (s.experts[l].empty()) return;
  const int64_t moved = s.experts[l][from] - pinned_experts(l, from);
  s.experts[l][from] -= moved;
  s.experts[l][target] += moved;
}

bool Descent::keep_if_better(State& s, State&& changed, double& best) const {
  const double now = score(changed);
  if (now >= best * (1 - 1e-9)) return false;
  best = now;
  s = std::move(changed);
  return true;
}

// The layers on both sides of a boundary between runs go over, one or several at a time; and whole
// runs go to another device.
bool Descent::try_boundaries(State& s, double& best) const {
  bool any = false;
  for (size_t l = 0; l + 1 < n_layers_; ++l) {
    if (s.layer[l] == s.layer[l + 1]) continue;
    for (const size_t step : {1, 3}) {
      for (const bool up : {false, true}) {
        State changed = s;
        for (size_t i = 0; i < step; ++i) {
          const size_t at = up ? l + 1 + i : l - i;
          if (at >= n_layers_ || changed.layer[at] != (up ? s.layer[l + 1] : s.layer[l])) break;
          if (p_.pins.layers[at] < 0) move_layer(changed, at, up ? s.layer[l] : s.layer[l + 1]);
        }
        any |= keep_if_better(s, std::move(changed), best);
        if (s.layer[l] == s.layer[l + 1]) break;
      }
      if (s.layer[l] == s.layer[l + 1]) break;
    }
  }
  for (size_t first = 0; first < n_layers_;) {
    size_t end = first;
    while (end < n_layers_ && s.layer[end] == s.layer[first]) ++end;
    for (int d = 0; d < p_.n_devices; ++d) {
      // The whole run, its beginning, its end.
      for (const auto& [from, to] :
           {std::pair(first, end), std::pair(first, first + 1), std::pair(end - 1, end)}) {
        if (s.layer[from] == d) continue;
        State changed = s;
        for (size_t l = from; l < to; ++l)
          if (p_.pins.layers[l] < 0) move_layer(changed, l, d);
        any |= keep_if_better(s, std::move(changed), best);
      }
    }
    first = end;
  }
  return any;
}

// A layer goes elsewhere, with its experts and without.
bool Descent::try_layers(State& s, double& best) const {
  bool any = false;
  for (size_t l = 0; l < n_layers_; ++l)
    for (int d = 0; d < p_.n_devices && p_.pins.layers[l] < 0; ++d)
      for (const bool with_experts : {true, false}) {
        if (s.layer[l] == d) continue;
        State changed = s;
        if (with_experts)
          move_layer(changed, l, d);
        else
          changed.layer[l] = d;
        any |= keep_if_better(s, std::move(changed), best);
      }
  return any;
}

// Two layers change places: where they live, their experts, or both.
bool Descent::try_swaps(State& s, double& best) const {
  bool any = false;
  for (size_t a = 0; a < n_layers_; ++a)
    for (size_t b = a + 1; b < n_layers_; ++b)
      for (const int what : {1, 2, 3}) {
        const bool layers = (what & 1) != 0 && s.layer[a] != s.layer[b] && p_.pins.layers[a] < 0 &&
                            p_.pins.layers[b] < 0;
        const bool experts = (what & 2) != 0 && !s.experts[a].empty() && !s.experts[b].empty() &&
                             s.experts[a] != s.experts[b] && !p_.pins.any_expert(a) &&
                             !p_.pins.any_expert(b);
        if (!layers && !experts) continue;
        State changed = s;
        if (layers) std::swap(changed.layer[a], changed.layer[b]);
        if (experts) std::swap(changed.experts[a], changed.experts[b]);
        any |= keep_if_better(s, std::move(changed), best);
      }
  return any;
}

// A layer goes to another device, which gives experts of as many bytes in return, to the layer's
// old device or by way of a third: what full devices can still do for each other.
bool Descent::try_exchanges(State& s, double& best) const {
  bool any = false;
  for (size_t l = 0; l < n_layers_; ++l)
    for (size_t to = 0; to < n_devices_; ++to)
      for (size_t by = 0; by < n_devices_; ++by)
        for (const bool with_experts : {true, false}) {
          const auto from = static_cast<size_t>(s.layer[l]);
          // Only hosts have room to pass things on.
          if (from == to || by == to || (by != from && !p_.is_host[by]) || p_.pins.layers[l] >= 0)
            continue;
          State changed = s;
          int64_t owed = p_.own_bytes[l][to];
          if (with_experts) {
            move_layer(changed, l, static_cast<int>(to));
            if (!s.experts[l].empty())
              owed += (changed.experts[l][to] - s.experts[l][to]) * p_.expert_bytes[l][to];
          } else {
            changed.layer[l] = static_cast<int>(to);
          }
          // Of layers that live where they go; by a third, of its own layers to it, and from it to
          // those of the old device.  Then of any.
          const bool third = by != from;
          const auto give = [&](size_t giver, size_t taker, size_t home, int64_t bytes, bool up) {
            for (const bool at_home : {true, false})
              for (size_t e = 0; e < n_layers_ && bytes > 0; ++e) {
                if (e == l || changed.experts[e].empty() ||
                    (static_cast<size_t>(changed.layer[e]) == home) != at_home)
                  continue;
                const int64_t each = p_.expert_bytes[e][giver];
                const int64_t n = std::min(changed.experts[e][giver] - pinned_experts(e, giver),
                                           (bytes + (up ? each - 1 : 0)) / each);
                if (n <= 0) continue;
                changed.experts[e][giver] -= n;
                changed.experts[e][taker] += n;
                bytes -= n * each;
              }
          };
          give(to, by, third ? to : from, owed, /*up=*/true);
          if (third) {
            int64_t freed = p_.own_bytes[l][from];
            if (with_experts && !s.experts[l].empty())
              freed += (s.experts[l][from] - changed.experts[l][from]) * p_.expert_bytes[l][from];
            give(by, from, from, freed, /*up=*/false);
          }
          any |= keep_if_better(s, std::move(changed), best);
        }
  return any;
}

// The fullest card gives an expert of its own layers to a host that has others of that layer, and the
// emptiest takes one of its layers from there: no pass goes another way than before.
void Descent::even_out(State& s, double most_seconds) const {
  struct Fill {
    size_t fullest, emptiest;
    double spread;
  };
  const auto fill = [&](const PlacementCost& c) {
    Fill out{n_devices_, n_devices_, 0};
    double most = 0, least = 0;
    for (size_t d = 0; d < n_devices_; ++d) {
      if (p_.is_host[d] || p_.budget[d] <= 0) continue;
      const double share = static_cast<double>(c.bytes[d]) / static_cast<double>(p_.budget[d]);
      if (out.fullest == n_devices_ || share > most) most = share, out.fullest = d;
      if (out.emptiest == n_devices_ || share < least) least = share, out.emptiest = d;
    }
    out.spread = most - least;
    return out;
  };
  // The last layer of a card with experts on the host, where one more of `giver` may go.
  const auto layer_of = [&](size_t card, size_t host, size_t giver) -> size_t {
    for (size_t l = n_layers_; l-- > 0;) {
      if (s.experts[l].empty() || static_cast<size_t>(s.layer[l]) != card) continue;
      if (s.experts[l][host] > 0 &&
          s.experts[l][giver] > std::max<int64_t>(1, pinned_experts(l, giver)))
        return l;
    }
    return n_layers_;
  };
  PlacementCost now = cost(s);
  const auto trade = [&](const Fill& before, size_t host) {
    const size_t gives = layer_of(before.fullest, host, before.fullest);
    const size_t takes = layer_of(before.emptiest, host, host);
    if (gives == n_layers_ || takes == n_layers_) return false;
    State changed = s;
    --changed.experts[gives][before.fullest], ++changed.experts[gives][host];
    --changed.experts[takes][host], ++changed.experts[takes][before.emptiest];
    PlacementCost after = cost(changed);
    if (after.bytes_over > now.bytes_over || after.makespan > most_seconds ||
        fill(after).spread >= before.spread)
      return false;
    s = std::move(changed);
    now = std::move(after);
    return true;
  };
  constexpr int kMostTrades = 256;
  bool traded = true;
  for (int i = 0; i < kMostTrades && traded; ++i) {
    const Fill before = fill(now);
    if (before.fullest == before.emptiest) return;
    traded = false;
    for (size_t host = 0; host < n_devices_ && !traded; ++host)
      traded = p_.is_host[host] && trade(before, host);
  }
}

void Descent::disturb(State& s, std::mt19937& rng) const {
  const auto below = [&](size_t n) { return static_cast<size_t>(rng() % n); };
  const size_t changes = 1 + below(std::max<size_t>(2, n_layers_ / 8));
  for (size_t i = 0; i < changes; ++i) {
    const size_t l = below(n_layers_);
    const auto d = static_cast<int>(below(n_devices_));
    const size_t what = below(5);
    if (what < 2 && p_.pins.layers[l] < 0) move_layer(s, l, d);
    if (what == 2 && p_.pins.layers[l] < 0) s.layer[l] = d;
    if (what == 3 && p_.pins.embed_device < 0) s.embed = d;
    if (what == 4 && p_.pins.head_device < 0) s.head = d;
    if (s.experts[l].empty()) continue;
    const size_t from = below(n_devices_);
    const int64_t movable = s.experts[l][from] - pinned_experts(l, from);
    if (movable <= 0) continue;
    const int64_t moved = 1 + static_cast<int64_t>(below(static_cast<size_t>(movable)));
    s.experts[l][from] -= moved;
    s.experts[l][static_cast<size_t>(d)] += moved;
  }
}

// Experts of a layer go from one device to another: all, an eighth, one.
bool Descent::try_experts(State& s, double& best) const {
  bool any = false;
  const int64_t eighth = std::max<int64_t>(1, p_.n_experts / 8);
  for (size_t l = 0; l < n_layers_; ++l) {
    if (s.experts[l].empty()) continue;
    for (size_t from = 0; from < n_devices_; ++from)
      for (size_t to = 0; to < n_devices_; ++to)
        for (const int64_t n : {p_.n_experts, eighth, int64_t{1}}) {
          if (to == from) continue;
          const int64_t movable = s.experts[l][from] - pinned_experts(l, from);
          const int64_t moved = std::min(n, movable);
          if (moved <= 0 || (n != 1 && moved == 1)) continue;
          s.experts[l][from] -= moved;
          s.experts[l][to] += moved;
          const double now = score(s);
          if (now < best * (1 - 1e-9)) {
            best = now;
            any = true;
          } else {
            s.experts[l][from] += moved;
            s.experts[l][to] -= moved;
          }
        }
  }
  return any;
}

bool Descent::try_ends(State& s, double& best) const {
  bool any = false;
  for (int d = 0; d < p_.n_devices; ++d) {
    for (int which = 0; which < 3; ++which) {
      State changed = s;
      if (which != 1 && p_.pins.embed_device < 0) changed.embed = d;
      if (which != 0 && p_.pins.head_device < 0) changed.head = d;
      any |= keep_if_better(s, std::move(changed), best);
    }
  }
  return any;
}

void Descent::improve(State& s) const {
  double best = score(s);
  constexpr int kMostRounds = 200;
  for (int round = 0; round < kMostRounds; ++round) {
    bool any = even_ && try_exchanges(s, best);
    any |= try_boundaries(s, best);
    any |= try_experts(s, best);
    any |= try_ends(s, best);
    // The dearer ones when the others have ended.
    if (!any) any = try_layers(s, best) || try_swaps(s, best);
    if (!any || ended()) return;
  }
}

// Contiguous layers in the order of `order`, each device its share; experts with their layers while
// the device has room, the rest where there is most room.
State Descent::from_shares(const std::vector<double>& shares, const std::vector<int>& order) const {
  State s;
  s.layer.assign(n_layers_, order.back());
  s.experts.resize(n_layers_);
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
    if (moe(l)) {
      s.experts[l].assign(n_devices_, 0);
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

Placement Descent::placement(const State& s) const {
  Placement out;
  out.embed_device = s.embed;
  out.head_device = s.head;
  for (size_t l = 0; l < n_layers_; ++l) {
    LayerPlacement layer{.device = s.layer[l], .slot = 0, .experts = {}};
    if (!s.experts[l].empty()) {
      // Pinned experts keep their place; the others fill the counts by ascending device.
      std::vector<int64_t> left = s.experts[l];
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

State Descent::state(const Placement& placement) const {
  State s;
  s.embed = placement.embed_device;
  s.head = placement.head_device;
  for (const LayerPlacement& layer : placement.layers) {
    s.layer.push_back(layer.device);
    std::vector<int64_t> experts;
    if (!layer.experts.empty()) experts.assign(n_devices_, 0);
    for (const ExpertSpan& span : layer.experts)
      experts[static_cast<size_t>(span.device)] += span.count;
    s.experts.push_back(std::move(experts));
  }
  return s;
}

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

Placement solve_placement(const SolverProblem& p) {
  Descent descent(p);
  const auto n = static_cast<size_t>(p.n_devices);
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);

  if (hopeless(p)) {
    std::vector<double> shares;
    for (const int64_t budget : p.budget)
      shares.push_back(static_cast<double>(std::max<int64_t>(budget, 1)));
    return descent.placement(descent.from_shares(shares, order));
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
  std::vector<int> fastest = order;
  std::stable_sort(fastest.begin(), fastest.end(), [&](int a, int b) {
    return speed[static_cast<size_t>(a)] > speed[static_cast<size_t>(b)] * (1 + 1e-9);
  });
  // The fastest first, as full as they get; and likewise with each of them holding what it can of
  // the layers' own parts alone, their experts going to the others.
  std::vector<double> filled(n, 0), own_only(n, 0);
  int64_t own_bytes = 1;
  for (size_t l = 0; l < p.own_bytes.size(); ++l) own_bytes += p.own_bytes[l][0];
  double left = static_cast<double>(all_bytes), own_left = static_cast<double>(own_bytes);
  for (const int d : fastest) {
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
    for (size_t i = 0; i < count; ++i) even[static_cast<size_t>(fastest[i])] = 1;
    starts.push_back(even);
  }

  State best;
  double best_score = -1;
  // Returns the score of what `s` became.
  const auto consider = [&](State& s) {
    descent.improve(s);
    const double score = descent.score(s);
    if (best_score < 0 || score < best_score * (1 - 1e-9)) best_score = score, best = s;
    return score;
  };
  for (const std::vector<double>& shares : starts)
    if (std::accumulate(shares.begin(), shares.end(), 0.0) > 0) {
      State s = descent.from_shares(shares, order);
      consider(s);
    }
  // A walk from the best over its neighbours, back when it gets too far off; where few parts leave
  // little room between good and bad packings, also from anywhere.  The same numbers each time.
  constexpr double kTooFar = 1.15;
  const bool few_parts = p.own_bytes.size() * n <= 64;
  std::mt19937 rng(1);
  State walk = best;
  for (int64_t round = 1; !descent.ended(); ++round) {
    State s = walk;
    const int times = few_parts && round % 3 == 0 ? 8 : 1;
    for (int i = 0; i < times; ++i) descent.disturb(s, rng);
    walk = consider(s) <= best_score * kTooFar ? std::move(s) : best;
  }

  // The evenest of those that are nearly as fast, from the best and from all starts.
  descent.make_even();
  const PlacementCost fastest_cost = descent.cost(best);
  double even_score = descent.score(best);
  std::vector<State> from = {best};
  for (const std::vector<double>& shares : starts)
    if (std::accumulate(shares.begin(), shares.end(), 0.0) > 0)
      from.push_back(descent.from_shares(shares, order));
  for (State& s : from) {
    if (descent.ended()) break;
    descent.improve(s);
    const PlacementCost c = descent.cost(s);
    const double score = descent.score(s);
    if (c.bytes_over <= fastest_cost.bytes_over && score < even_score &&
        c.makespan <= kMostForEven * fastest_cost.makespan &&
        c.latency <= kMostForEven * fastest_cost.latency)
      even_score = score, best = s;
  }
  descent.even_out(best, kMostForEven * fastest_cost.makespan);
  return descent.placement(best);
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
