// The descent of the placement solver: a placement as it sees it, what it costs, and the moves that
// make it better (placement_moves.cc).  Which starts are tried is in placement_solver.cc.
#pragma once

#include <random>

#include "placement_solver.h"

namespace fathom::run {

// A placement as the descent sees it: how many experts of a layer lie on each device, in spans by
// ascending device.
struct PlacementState {
  std::vector<int> layer;                     // [layer]
  std::vector<std::vector<int64_t>> experts;  // [layer][device]; empty: dense
  int embed = 0, head = 0;
};

// Placements looked at, at most: a bound on time that does not depend on a clock.
constexpr int64_t kMostScored = 100000, kScoredPerPart = 4000;
constexpr int64_t kEvenScored = 1;  // a part of the placements looked at: one of so many more

class Descent {
 public:
  explicit Descent(const SolverProblem& p)
      : p_(p),
        n_layers_(p.own_bytes.size()),
        n_devices_(static_cast<size_t>(p.n_devices)),
        most_scored_(std::min(kMostScored, kScoredPerPart * static_cast<int64_t>(n_layers_) *
                                               static_cast<int64_t>(n_devices_))) {}

  PlacementCost cost(const PlacementState& s) const;
  double score(const PlacementState& s) const;
  void improve(PlacementState& s) const;
  PlacementState from_shares(const std::vector<double>& shares,
                             const std::vector<int>& order) const;
  // Cards become evenly full, to less than an expert, where a host holds experts of their layers.
  void even_out(PlacementState& s, double most_seconds) const;
  // Changes a few things at random, within the pins.
  void disturb(PlacementState& s, std::mt19937& rng) const;
  bool ended() const { return n_scored_ >= most_scored_; }
  // From now on evenness of the cards' work counts, for some more placements.
  void make_even() {
    even_ = true;
    most_scored_ = n_scored_ + most_scored_ / kEvenScored;
  }
  Placement placement(const PlacementState& s) const;
  PlacementState state(const Placement& placement) const;

 private:
  bool moe(size_t l) const { return p_.expert_bytes[l][0] > 0; }
  bool try_boundaries(PlacementState& s, double& best) const;
  bool try_layers(PlacementState& s, double& best) const;
  bool try_swaps(PlacementState& s, double& best) const;
  bool try_exchanges(PlacementState& s, double& best) const;
  bool try_experts(PlacementState& s, double& best) const;
  bool try_ends(PlacementState& s, double& best) const;
  // Moves a layer; its experts on the old device go along where they are not pinned.
  void move_layer(PlacementState& s, size_t l, int to) const;
  bool keep_if_better(PlacementState& s, PlacementState&& changed, double& best) const;
  int64_t pinned_experts(size_t l, size_t device) const;

  const SolverProblem& p_;
  const size_t n_layers_, n_devices_;
  int64_t most_scored_;
  bool even_ = false;
  mutable int64_t n_scored_ = 0;
};

}  // namespace fathom::run
