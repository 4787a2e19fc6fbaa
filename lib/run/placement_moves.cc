// Moves of the placement descent: each is kept where the score falls.
#include <algorithm>

#include "placement_descent.h"

namespace fathom::run {

int64_t Descent::pinned_experts(size_t l, size_t device) const {
  const auto& pins = p_.pins.experts[l];
  return std::count(pins.begin(), pins.end(), static_cast<int>(device));
}

void Descent::move_layer(PlacementState& s, size_t l, int to) const {
  const auto from = static_cast<size_t>(s.layer[l]), target = static_cast<size_t>(to);
  s.layer[l] = to;
  if (s.experts[l].empty()) return;
  const int64_t moved = s.experts[l][from] - pinned_experts(l, from);
  s.experts[l][from] -= moved;
  s.experts[l][target] += moved;
}

bool Descent::keep_if_better(PlacementState& s, PlacementState&& changed, double& best) const {
  const double now = score(changed);
  if (now >= best * (1 - 1e-9)) return false;
  best = now;
  s = std::move(changed);
  return true;
}

// The layers on both sides of a boundary between runs go over, one or several at a time; and whole
// runs go to another device.
bool Descent::try_boundaries(PlacementState& s, double& best) const {
  bool any = false;
  for (size_t l = 0; l + 1 < n_layers_; ++l) {
    if (s.layer[l] == s.layer[l + 1]) continue;
    for (const size_t step : {1, 3}) {
      for (const bool up : {false, true}) {
        PlacementState changed = s;
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
        PlacementState changed = s;
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
bool Descent::try_layers(PlacementState& s, double& best) const {
  bool any = false;
  for (size_t l = 0; l < n_layers_; ++l)
    for (int d = 0; d < p_.n_devices && p_.pins.layers[l] < 0; ++d)
      for (const bool with_experts : {true, false}) {
        if (s.layer[l] == d) continue;
        PlacementState changed = s;
        if (with_experts)
          move_layer(changed, l, d);
        else
          changed.layer[l] = d;
        any |= keep_if_better(s, std::move(changed), best);
      }
  return any;
}

// Two layers change places: where they live, their experts, or both.
bool Descent::try_swaps(PlacementState& s, double& best) const {
  bool any = false;
  for (size_t a = 0; a < n_layers_; ++a)
    for (size_t b = a + 1; b < n_layers_; ++b)
      for (const int what : {1, 2, 3}) {
        const bool layers = (what & 1) != 0 && s.layer[a] != s.layer[b] && p_.pins.layers[a] < 0 &&
                            p_.pins.layers[b] < 0;
        const bool experts = (what & 2) != 0 && !s.experts[a].empty() && !s.experts[b].empty() &&
                             !std::ranges::equal(s.experts[a], s.experts[b]) &&
                             !p_.pins.any_expert(a) && !p_.pins.any_expert(b);
        if (!layers && !experts) continue;
        PlacementState changed = s;
        if (layers) std::swap(changed.layer[a], changed.layer[b]);
        if (experts) std::ranges::swap_ranges(changed.experts[a], changed.experts[b]);
        any |= keep_if_better(s, std::move(changed), best);
      }
  return any;
}

// A layer goes to another device, which gives experts of as many bytes in return, to the layer's
// old device or by way of a third: what full devices can still do for each other.
bool Descent::try_exchanges(PlacementState& s, double& best) const {
  bool any = false;
  for (size_t l = 0; l < n_layers_; ++l)
    for (size_t to = 0; to < n_devices_; ++to)
      for (size_t by = 0; by < n_devices_; ++by)
        for (const bool with_experts : {true, false}) {
          const auto from = static_cast<size_t>(s.layer[l]);
          // Only hosts have room to pass things on.
          if (from == to || by == to || (by != from && !p_.is_host[by]) || p_.pins.layers[l] >= 0)
            continue;
          PlacementState changed = s;
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

// The fullest card gives an expert of its own layers to a host that has others of that layer, and
// the emptiest takes one of its layers from there: no pass goes another way than before.
void Descent::even_out(PlacementState& s, double most_seconds) const {
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
    PlacementState changed = s;
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

void Descent::disturb(PlacementState& s, std::mt19937& rng) const {
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

// Experts of a layer go from one device to another: all, an eighth, one; for the bounds, where what
// the way costs must be won by one move, also a half and a quarter.
bool Descent::try_experts(PlacementState& s, double& best) const {
  bool any = false;
  const auto part = [&](int64_t of) { return std::max<int64_t>(1, p_.n_experts / of); };
  const int64_t parts[] = {part(2), part(4), p_.n_experts, part(8), 1};
  const std::span<const int64_t> tried = std::span(parts).subspan(aim_ == Aim::kBounds ? 0 : 2);
  for (size_t l = 0; l < n_layers_; ++l) {
    if (s.experts[l].empty()) continue;
    for (size_t from = 0; from < n_devices_; ++from)
      for (size_t to = 0; to < n_devices_; ++to)
        for (const int64_t n : tried) {
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

bool Descent::try_ends(PlacementState& s, double& best) const {
  bool any = false;
  for (int d = 0; d < p_.n_devices; ++d) {
    for (int which = 0; which < 3; ++which) {
      PlacementState changed = s;
      if (which != 1 && p_.pins.embed_device < 0) changed.embed = d;
      if (which != 0 && p_.pins.head_device < 0) changed.head = d;
      any |= keep_if_better(s, std::move(changed), best);
    }
  }
  return any;
}

void Descent::improve(PlacementState& s) const {
  double best = score(s);
  constexpr int kMostRounds = 200;
  for (int round = 0; round < kMostRounds; ++round) {
    bool any = aim_ != Aim::kFast && try_exchanges(s, best);
    any |= try_boundaries(s, best);
    any |= try_experts(s, best);
    any |= try_ends(s, best);
    // The dearer ones when the others have ended.
    if (!any) any = try_layers(s, best) || try_swaps(s, best);
    if (!any || ended()) return;
  }
}

}  // namespace fathom::run
