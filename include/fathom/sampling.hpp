// Sampling: from logits to a token.  One Sampler per stream; not shared between threads.
// Same seed, logits and history: same tokens, on every machine.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "fathom/status.hpp"

namespace fathom {

struct TokenLogit {
  float logit;
  int32_t id;
};

// Order of application: repetition penalty, temperature, top-k, top-p, min-p, draw.
struct SamplingOptions {
  float temperature = 0;  // 0: greedy (the others but the penalty are ignored).  [0, 100]
  int32_t top_k = 0;      // keep the k most likely; 0: off
  float top_p = 1;        // keep the smallest set with this probability.  (0, 1]; 1: off
  float min_p = 0;        // drop tokens below min_p x the best probability.  [0, 1]; 0: off
  // CTRL (Keskar et al. 2019): logit / p if positive, else x p.  (0, 100]; 1: off
  float repeat_penalty = 1;
  int32_t repeat_window = 64;  // last tokens of the text that are penalised.  [0, 2^20]
  uint64_t seed = 0;
};

class Sampler {
 public:
  // Errors: kInvalidArgument naming the option, its value and range (NaN included).
  static Result<Sampler> create(const SamplingOptions& options);

  // Picks a token.  logits [vocab_size] are not changed; `history` is the text so far (its last
  // repeat_window tokens count).  Greedy ties: the lowest id.  Errors: kNumeric when a logit is NaN
  // or +infinity, or all are -infinity; kInvalidArgument when logits is empty.
  Result<int32_t> pick(std::span<const float> logits, std::span<const int32_t> history);

  // How many of the likeliest tokens decide a pick whatever the others are; 0: all are needed.
  int32_t n_deciding() const noexcept;
  // The same pick from these alone: the min(n_deciding(), vocab_size) likeliest, by descending
  // logit, equal ones by ascending id.  `broken` is the first token whose logit is NaN or
  // +infinity; its id is -1 where there is none.  Errors: as pick().
  Result<int32_t> pick_from(std::span<const TokenLogit> likeliest, int64_t vocab_size,
                            TokenLogit broken = {0, -1});
  void reset(uint64_t seed) noexcept;
  const SamplingOptions& options() const noexcept { return options_; }

 private:
  explicit Sampler(const SamplingOptions&);
  SamplingOptions options_;
  // `each` calls its argument with the tokens that may be picked, by ascending id.
  template <class Each>
  int32_t draw(TokenLogit best, size_t vocab_size, const Each& each);

  uint64_t state_[4];                               // xoshiro256**
  std::vector<TokenLogit> candidates_, likeliest_;  // reused between picks
  std::vector<int32_t> penalised_;
};

}  // namespace fathom
