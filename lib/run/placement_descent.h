// The descent of the placement solver: a placement as it sees it, what it costs, and the moves that
// make it better (placement_moves.cc).  Which starts are tried is in placement_solver.cc.
#pragma once

#include <random>
#include <span>

#include "placement_solver.h"

namespace fathom::run {

// Experts by layer and device, empty for dense layers; in one piece, since states are copied for
// every move.
class ExpertCounts {
 public:
  void add_layer(size_t n_devices) {
    counts_.resize(counts_.size() + n_devices);
    ends_.push_back(counts_.size());
  }
  std::span<int64_t> operator[](size_t l) noexcept {
    const size_t begin = l == 0 ? 0 : ends_[l - 1];
    return {counts_.data() + begin, ends_[l] - begin};
  }
  std::span<const int64_t> operator[](size_t l) const noexcept {
    const size_t begin = l == 0 ? 0 : ends_[l - 1];
    return {counts_.data() + begin, ends_[l] - begin};
  }

 private:
  std::vector<int64_t> counts_;
  std::vector<size_t> ends_;  // [layer]
};

// A placement as the descent sees it: how many experts of a layer lie on each device, in spans by
// ascending device.
struct PlacementState {
  std::vector<int> layer;  // [layer]
  ExpertCounts experts;    // [layer][device]
  int embed = 0, head = 0;
};

// Placements looked at, at most: a bound on time that does not depend on a clock.
constexpr int64_t kMostScored = 100000, kScoredPerPart = 4000;

// What a descent is after.
enum class Aim : uint8_t {
  kFast,    // the least makespan
  kEven,    // cards that work alike count as well
  kBounds,  // cards within the bounds of evenness first, at the least price
};

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
  // Brings cards within the bounds of evenness: again and again the move of one part that leads
  // nearest to them for its price (placement_balance.cc).
  void approach_bounds(PlacementState& s) const;
  // Takes every move of one part that makes passes shorter and cards no less even, or cards evener
  // and passes no longer, until none does (placement_balance.cc).  No pass gets longer than `most`.
  void polish(PlacementState& s, const PlacementCost& most) const;
  // Changes a few things at random, within the pins.
  void disturb(PlacementState& s, std::mt19937& rng) const;
  bool ended() const { return n_scored_ >= most_scored_; }
  // From now on for something else, for `part` of the placements that the first aim had; `fastest`
  // is what prices are compared with.
  void aim_at(Aim aim, double part, const PlacementCost& fastest) {
    aim_ = aim;
    fastest_makespan_ = fastest.makespan;
    fastest_latency_ = fastest.latency;
    const int64_t first = std::min(kMostScored, kScoredPerPart * static_cast<int64_t>(n_layers_) *
                                                    static_cast<int64_t>(n_devices_));
    most_scored_ = n_scored_ + static_cast<int64_t>(part * static_cast<double>(first));
  }
  // How much a miss of the bounds counts against the price of meeting them.
  void set_miss_weight(double weight) { miss_weight_ = weight; }
  Placement placement(const PlacementState& s) const;
  PlacementState state(const Placement& placement) const;

 private:
  bool moe(size_t l) const { return p_.expert_bytes[l][0] > 0; }
  // Whether an earlier layer is like this one in all that its experts' places depend on.
  bool has_twin(const PlacementState& s, const std::vector<size_t>& kinds, size_t l) const;
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
  Aim aim_ = Aim::kFast;
  double fastest_makespan_ = 1, fastest_latency_ = 1, miss_weight_ = 1;
  mutable int64_t n_scored_ = 0;
};

}  // namespace fathom::run
