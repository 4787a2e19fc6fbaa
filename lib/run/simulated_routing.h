// Which experts the tokens of a simulated model choose: at random, the r-th most used of a layer
// with a weight of 1 / r^skew, so that a simulation with copies of experts has something to find.
// The same in every run.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace fathom::run {

// Thread-safe once begun.
class SimulatedRouting {
 public:
  // From now on tokens choose among `n_experts`, all layers alike; the most used ones are scattered
  // over the ids.
  void begin(int64_t n_experts, double skew);
  bool begun() const noexcept { return !drawn_.empty(); }
  // ids [n_tokens, k], those of a token different; k at most n_experts.
  void choose(int64_t n_tokens, int64_t k, int32_t* ids) noexcept;

 private:
  std::mutex mutex_;
  int64_t n_experts_ = 0;
  std::vector<int32_t> drawn_;  // each expert as often as it is likely
  uint64_t state_ = 1;
};

}  // namespace fathom::run
