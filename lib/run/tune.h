// The decision part of tuning: which settings are tried next and which of them is best, from what a
// runner measures.  Nothing here looks at a clock, a file or a device.
#pragma once

#include <string>
#include <vector>

#include "fathom/tune.hpp"

namespace fathom::run {

// One key and the values to try, in order of preference: a later one must be better by more than
// kTuneNoise to be taken.  The first is where the search begins.
struct TuneAxis {
  std::string key;
  std::vector<std::string> values;
  bool prefill_only = false;  // does not touch decoding: judged by prefill whatever the goal
  bool frees_memory = false;  // later values may fit where the first does not
  size_t n_last_resorts = 0;  // values at the end that are tried for memory only
};
inline constexpr double kTuneNoise = 0.03;

class TuneRunner {
 public:
  virtual ~TuneRunner() = default;
  // Fills in feasible, why_not, peak_bytes and max_context.
  virtual Status plan(TuneTrial& trial) = 0;
  // Errors: kCancelled ends the search; any other is told in the trial.
  virtual Result<TuneRates> measure(const TuneTrial& trial) = 0;
  virtual double seconds() = 0;  // since the search began
};

// The axes for a model whose configuration is `config`; keys that it sets have no axis.
std::vector<TuneAxis> tune_axes(const Config& config, const TuneOptions& options, int64_t threads);

// What is to be made large.
double tune_score(TuneGoal goal, const TuneRates& rates) noexcept;

// One axis after the other from the first values of all, each with the best of those before.  Where
// the first values do not fit, those of axes that free memory give way until something does.
Result<TuneResult> tune_search(const std::vector<TuneAxis>& axes, const TuneOptions& options,
                               TuneRunner& runner);

}  // namespace fathom::run
