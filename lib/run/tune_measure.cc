// Tuning on the machine itself: plans, loads, measures.  What is tried next is decided in tune.cc.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <random>
#include <thread>

#include "engine_state.h"
#include "fathom/session.hpp"
#include "tune.h"

namespace fathom {
namespace run {
namespace {

// Full prefill passes and decoded tokens of a measurement.  The fastest of each counts: what other
// programs do to the machine meanwhile only makes them slower.
constexpr int64_t kPasses = 3;
constexpr int64_t kDecodeSteps = 24;

class MachineRunner final : public TuneRunner {
 public:
  MachineRunner(const std::string& path, const Config& config, const TuneOptions& options)
      : path_(path), config_(config), options_(options) {
    if (options.goal == TuneGoal::kContext && options.context > 0)
      config_.context_max = options.context;
  }

  double seconds() override {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

  Status plan(TuneTrial& trial) override {
    FATHOM_TRY_ASSIGN(const Config config, config_of(trial));
    FATHOM_TRY(have_engine(config));
    FATHOM_TRY_ASSIGN(const Plan plan, engine_->plan(path_, config));
    trial.feasible = plan.feasible;
    trial.max_context = plan.feasible ? plan.max_context : plan.max_context_feasible;
    for (const PlanDevice& device : plan.devices) trial.peak_bytes += device.peak_bytes();
    if (!plan.feasible)
      trial.why_not = fmt::format("short by {} bytes on {}", plan.bytes_short,
                                  plan.devices[static_cast<size_t>(plan.binding_device)].name);
    return {};
  }

  Result<TuneRates> measure(const TuneTrial& trial) override {
    FATHOM_TRY_ASSIGN(const Config config, config_of(trial));
    FATHOM_TRY_ASSIGN(const Plan plan, engine_->plan(path_, config));
    FATHOM_TRY_ASSIGN(Model model, Model::load(*engine_, plan, run_options()));
    FATHOM_TRY_ASSIGN(Session session, Session::create(model));
    return rates_of(session, plan.prefill_chunk);
  }

 private:
  Result<Config> config_of(const TuneTrial& trial) const {
    Config config = config_;
    for (const auto& [key, value] : trial.settings) FATHOM_TRY(config.set(key, value));
    return config;
  }

  // Threads belong to an engine; nothing is loaded on the old one any more.
  Status have_engine(const Config& config) {
    if (engine_ && engine_->config().threads == config.threads) return {};
    engine_.reset();
    FATHOM_TRY_ASSIGN(engine_, Engine::create(config));
    return {};
  }

  RunOptions run_options() const {
    RunOptions options;
    options.cancel = options_.cancel;
    return options;
  }

  Result<TuneRates> rates_of(Session& session, int64_t chunk) {
    const double share = std::max(options_.seconds / 8, 0.05);
    const int64_t vocab_size = session.model().config().vocab_size;
    std::mt19937_64 random(1);
    const auto token = [&] {
      return static_cast<int32_t>(random() % static_cast<uint64_t>(vocab_size));
    };
    const int64_t room = session.max_tokens() - kDecodeSteps;
    if (room < 1)
      return Status(
          Code::kContextFull,
          fmt::format("a context of {} tokens is too short to measure", session.max_tokens()));
    std::vector<int32_t> text(static_cast<size_t>(std::min(kPasses * chunk, room)));
    for (int32_t& id : text) id = token();

    TuneRates rates;
    double begin = seconds();
    RunOptions options = run_options();
    bool enough = false;
    options.on_step = [&](const StepReport& report) {
      // A last pass that is shorter says little.
      if (report.n_new == chunk || rates.prefill_tps == 0)
        rates.prefill_tps =
            std::max(rates.prefill_tps, static_cast<double>(report.n_new) / report.seconds);
      enough = seconds() - begin > share;
      return !enough;
    };
    // The time for it is up: what was read until then is measured.
    if (Status status = session.prefill(text, options); !status.ok() && !enough) return status;

    std::vector<double> steps;
    begin = seconds();
    while (static_cast<int64_t>(steps.size()) < kDecodeSteps) {
      if (options_.cancel && options_.cancel->requested())
        return Status(Code::kCancelled, "cancelled by the host");
      const double before = session.times().decode_seconds;
      FATHOM_TRY(session.step(token()));
      steps.push_back(session.times().decode_seconds - before);
      if (seconds() - begin > share && steps.size() >= 2) break;
    }
    rates.decode_tps = 1 / *std::min_element(steps.begin(), steps.end());
    return rates;
  }

  const std::string path_;
  Config config_;
  const TuneOptions& options_;
  std::optional<Engine> engine_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

Result<TuneResult> tune_here(const std::string& path, const Config& config,
                             const TuneOptions& options) {
  if (options.context < 0 || options.seconds < 0)
    return Status(Code::kInvalidArgument, fmt::format("context {} or seconds {} is negative",
                                                      options.context, options.seconds));
  FATHOM_TRY(config.validate());
  FATHOM_TRY_ASSIGN(const FileInfo file, inspect_file(path));
  MachineRunner runner(path, config, options);
  const auto threads = static_cast<int64_t>(std::max(1u, std::thread::hardware_concurrency()));
  const std::vector<TuneAxis> axes = tune_axes(config, options, threads);
  FATHOM_TRY_ASSIGN(TuneResult result, tune_search(axes, options, runner));
  const TuneTrial& best = result.trials[static_cast<size_t>(result.best)];
  FATHOM_TRY_ASSIGN(const Engine engine, Engine::create(config));
  result.profile = {.model = model_fingerprint(file),
                    .machine = machine_fingerprint(engine),
                    .goal = std::string(tune_goal_name(options.goal)),
                    .settings = best.settings,
                    .rates = best.rates};
  return result;
}

}  // namespace
}  // namespace run

Result<TuneResult> tune(const std::string& model_path, const Config& config,
                        const TuneOptions& options) {
  return run::guarded([&] { return run::tune_here(model_path, config, options); });
}

}  // namespace fathom
