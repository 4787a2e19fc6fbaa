#include "simulated_routing.h"

#include <algorithm>
#include <cmath>

namespace fathom::run {
namespace {

constexpr size_t kDrawn = 1 << 14;
constexpr int kMostDraws = 64;      // before the next free expert is taken
constexpr int64_t kScatter = 7919;  // coprime to any number of experts that a model has

}  // namespace

void SimulatedRouting::begin(int64_t n_experts, double skew) {
  std::vector<double> up_to;  // sums of weights by rank
  double sum = 0;
  for (int64_t rank = 1; rank <= n_experts; ++rank)
    up_to.push_back(sum += std::pow(static_cast<double>(rank), -skew));
  std::vector<int32_t> drawn(kDrawn);
  size_t rank = 0;
  for (size_t i = 0; i < kDrawn; ++i) {
    const double at = sum * (static_cast<double>(i) + 0.5) / static_cast<double>(kDrawn);
    while (rank + 1 < up_to.size() && up_to[rank] < at) ++rank;
    drawn[i] = static_cast<int32_t>(static_cast<int64_t>(rank) * kScatter % n_experts);
  }
  std::lock_guard lock(mutex_);
  n_experts_ = n_experts;
  drawn_ = std::move(drawn);
}

void SimulatedRouting::choose(int64_t n_tokens, int64_t k, int32_t* ids) noexcept {
  std::lock_guard lock(mutex_);
  for (int64_t token = 0; token < n_tokens; ++token, ids += k)
    for (int64_t i = 0; i < k; ++i) {
      int32_t expert = 0;
      const auto taken = [&] { return std::find(ids, ids + i, expert) != ids + i; };
      for (int draw = 0; draw < kMostDraws; ++draw) {
        // xorshift64* (Vigna 2016)
        state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
        expert = drawn_[state_ * 0x2545F4914F6CDD1Dull >> 50];
        if (!taken()) break;
      }
      while (taken()) expert = static_cast<int32_t>((expert + 1) % n_experts_);
      ids[i] = expert;
    }
}

}  // namespace fathom::run
