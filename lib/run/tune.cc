#include "tune.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

namespace fathom::run {
namespace {

class Search {
 public:
  Search(const std::vector<TuneAxis>& axes, const TuneOptions& options, TuneRunner& runner)
      : axes_(axes), options_(options), runner_(runner) {}

  Result<TuneResult> run() {
    FATHOM_TRY(find_start());
    result_.complete = true;
    for (size_t a = 0; a < axes_.size() && result_.complete; ++a) FATHOM_TRY(along(a));
    result_.best = best_;
    return std::move(result_);
  }

 private:
  using Choice = std::vector<size_t>;  // an index into the values of each axis

  TuneSettings settings_of(const Choice& choice) const {
    TuneSettings settings;
    for (size_t a = 0; a < axes_.size(); ++a)
      settings.emplace_back(axes_[a].key, axes_[a].values[choice[a]]);
    return settings;
  }

  // Plans and measures a choice once; its index.
  Result<int> trial(const Choice& choice) {
    if (const auto known = known_.find(choice); known != known_.end()) return known->second;
    TuneTrial trial;
    trial.settings = settings_of(choice);
    FATHOM_TRY(runner_.plan(trial));
    if (trial.feasible) {
      Result<TuneRates> rates = runner_.measure(trial);
      if (rates.ok()) {
        trial.rates = *rates;
        trial.measured = true;
      } else if (rates.status().code() == Code::kCancelled) {
        return std::move(rates).status();
      } else {
        trial.why_not = rates.status().message();
      }
    }
    if (options_.on_trial) options_.on_trial(trial);
    result_.trials.push_back(std::move(trial));
    const int index = static_cast<int>(result_.trials.size()) - 1;
    known_.emplace(choice, index);
    return index;
  }

  // How far an axis may be moved from its first value for the sake of memory.
  static size_t steps_of(const TuneAxis& axis) {
    return axis.frees_memory ? axis.values.size() - 1 : 0;
  }
  // The most preferred choice that can be measured.  Choices are visited by how many steps of
  // preference they give up in all, at the last axis first.
  Status find_start() {
    Choice choice(axes_.size(), 0);
    size_t most = 0;
    for (const TuneAxis& axis : axes_) most += steps_of(axis);
    for (size_t steps = 0; steps <= most; ++steps) {
      FATHOM_TRY_ASSIGN(const bool found, find_with(choice, 0, steps));
      if (found) return {};
    }
    return Status(Code::kBudget,
                  fmt::format("no settings fit: {}", result_.trials.front().why_not));
  }
  Result<bool> find_with(Choice& choice, size_t axis, size_t steps) {
    if (axis == axes_.size()) {
      if (steps > 0) return false;
      FATHOM_TRY_ASSIGN(best_, trial(choice));
      if (!result_.trials[static_cast<size_t>(best_)].measured) return false;
      start_ = choice;
      return true;
    }
    for (size_t take = 0; take <= std::min(steps, steps_of(axes_[axis])); ++take) {
      choice[axis] = take;
      FATHOM_TRY_ASSIGN(const bool found, find_with(choice, axis + 1, steps - take));
      if (found) return true;
    }
    choice[axis] = 0;
    return false;
  }

  Status along(size_t a) {
    const TuneGoal goal = axes_[a].prefill_only ? TuneGoal::kPrefill : options_.goal;
    Choice best = start_;
    for (size_t v = 0; v < axes_[a].values.size(); ++v) {
      Choice choice = start_;
      choice[a] = v;
      const bool last_resort = v >= axes_[a].values.size() - axes_[a].n_last_resorts;
      if (last_resort && v != start_[a]) continue;
      if (known_.find(choice) == known_.end() && runner_.seconds() >= options_.seconds) {
        result_.complete = false;
        break;
      }
      FATHOM_TRY_ASSIGN(const int index, trial(choice));
      const TuneTrial& other = result_.trials[static_cast<size_t>(index)];
      if (!other.measured) continue;
      const TuneTrial& so_far = result_.trials[static_cast<size_t>(best_)];
      // A less preferred value must win clearly; a more preferred one must only not lose clearly.
      const double score = tune_score(goal, other.rates), beat = tune_score(goal, so_far.rates);
      const bool better =
          choice[a] > best[a] ? score > beat * (1 + kTuneNoise) : score * (1 + kTuneNoise) >= beat;
      if (!better) continue;
      best = choice;
      best_ = index;
    }
    start_ = best;
    return {};
  }

  const std::vector<TuneAxis>& axes_;
  const TuneOptions& options_;
  TuneRunner& runner_;
  TuneResult result_;
  std::map<Choice, int> known_;
  Choice start_;  // the best so far
  int best_ = 0;
};

}  // namespace

std::vector<TuneAxis> tune_axes(const Config& config, const TuneOptions& options, int64_t threads) {
  std::vector<TuneAxis> axes;
  // Fewer threads can be faster where memory is the bound or processors are shared.
  if (config.threads == 0) {
    TuneAxis axis{.key = "threads", .values = {}};
    for (int64_t t = threads; t >= 1; t = t > 4 ? t * 3 / 4 : t - 1) {
      axis.values.push_back(std::to_string(t));
      if (axis.values.size() == 4) break;
    }
    axes.push_back(std::move(axis));
  }
  if (!config.kv_type) {
    TuneAxis axis{.key = "kv.type", .values = {"auto", "q8_0", "fp8"}, .frees_memory = true};
    if (options.goal == TuneGoal::kContext) {
      axis.values.push_back("q4_0");
      axis.n_last_resorts = 1;
    }
    axes.push_back(std::move(axis));
  }
  if (!config.attention_form)
    axes.push_back({.key = "attention.form",
                    .values = {"auto", "absorbed", "expanded"},
                    .prefill_only = true});
  if (!config.prefill_chunk)
    axes.push_back({.key = "prefill.chunk",
                    .values = {"auto", "256", "128", "64", "1024"},
                    .prefill_only = true,
                    .frees_memory = true});
  return axes;
}

double tune_score(TuneGoal goal, const TuneRates& rates) noexcept {
  switch (goal) {
    case TuneGoal::kDecode:
      return rates.decode_tps;
    case TuneGoal::kPrefill:
      return rates.prefill_tps;
    case TuneGoal::kContext:
      return rates.prefill_tps > 0 && rates.decode_tps > 0
                 ? 1 / (0.9 / rates.prefill_tps + 0.1 / rates.decode_tps)
                 : 0;
  }
  return 0;
}

Result<TuneResult> tune_search(const std::vector<TuneAxis>& axes, const TuneOptions& options,
                               TuneRunner& runner) {
  return Search(axes, options, runner).run();
}

}  // namespace fathom::run
