// Tuning: what is tried and taken given injected measurements, profiles as text, and one search on
// this machine.
#include <catch2/catch.hpp>

#include <functional>
#include <map>

#include "lib/run/tune.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

using run::TuneAxis;

// Answers from functions of the settings; time passes by one second with each measurement.
class Injected final : public run::TuneRunner {
 public:
  using Values = std::map<std::string, std::string>;
  std::function<bool(const Values&)> fits = [](const Values&) { return true; };
  std::function<TuneRates(const Values&)> rates;
  std::function<Status(const Values&)> fails = [](const Values&) { return Status(); };
  int n_plans = 0, n_measured = 0;

  Status plan(TuneTrial& trial) override {
    ++n_plans;
    trial.feasible = fits(values(trial));
    if (!trial.feasible) trial.why_not = "too large";
    return {};
  }
  Result<TuneRates> measure(const TuneTrial& trial) override {
    ++n_measured;
    FATHOM_TRY(fails(values(trial)));
    return rates(values(trial));
  }
  double seconds() override { return n_measured; }

 private:
  static Values values(const TuneTrial& trial) {
    return {trial.settings.begin(), trial.settings.end()};
  }
};

// Decode is best with two threads, q8_0 is a little faster; prefill is best at 256.
TuneRates usual(const Injected::Values& v) {
  const double threads = v.at("threads") == "2" ? 1.5 : 1;
  const double kv = v.at("kv.type") == "q8_0" ? 1.02 : 1;
  const double chunk = v.at("prefill.chunk") == "256" ? 2 : 1;
  return {100 * threads * chunk, 10 * threads * kv};
}

TuneResult search(Injected& runner, const TuneOptions& options = {}, const Config& config = {}) {
  auto result = run::tune_search(run::tune_axes(config, options, 4), options, runner);
  INFO(result.status().message());
  REQUIRE(result.ok());
  return std::move(result).value();
}

std::string value(const TuneTrial& trial, const std::string& key) {
  for (const auto& [k, v] : trial.settings)
    if (k == key) return v;
  return "";
}

TEST_CASE("each axis is tried with the best of those before", "[tune]") {
  Injected runner;
  runner.rates = usual;
  const TuneResult result = search(runner, {.seconds = 1000});
  const TuneTrial& best = result.trials[static_cast<size_t>(result.best)];
  CHECK(result.complete);
  CHECK(value(best, "threads") == "2");
  CHECK(value(best, "prefill.chunk") == "256");
  CHECK(value(best, "attention.form") == "auto");
  CHECK(value(best, "kv.type") == "auto");  // two percent are noise: the preferred one stays
  // 4 numbers of threads, then 2 types, 2 forms and 4 chunks more; none is measured twice.
  CHECK(runner.n_measured == 4 + 2 + 2 + 4);
  CHECK(runner.n_plans == runner.n_measured);
  CHECK(best.rates.prefill_tps == 300);
}

TEST_CASE("a clear gain is taken", "[tune]") {
  Injected runner;
  runner.rates = [](const Injected::Values& v) {
    TuneRates rates = usual(v);
    if (v.at("kv.type") == "q8_0") rates.decode_tps *= 1.1;
    return rates;
  };
  const TuneResult result = search(runner, {.seconds = 1000});
  CHECK(value(result.trials[static_cast<size_t>(result.best)], "kv.type") == "q8_0");
}

TEST_CASE("what the user has set is not tried otherwise", "[tune]") {
  Injected runner;
  runner.rates = [](const Injected::Values& v) {
    CHECK(v.count("threads") + v.count("kv.type") + v.count("prefill.chunk") == 0);
    return TuneRates{1, 1};
  };
  const TuneResult result =
      search(runner, {.seconds = 1000},
             test::config_of({{"threads", "3"}, {"kv.type", "q4_0"}, {"prefill.chunk", "77"}}));
  CHECK(result.trials.size() == 3);  // the forms of attention
  // And with everything set there is one trial.
  Injected one;
  one.rates = [](const Injected::Values&) { return TuneRates{1, 1}; };
  CHECK(search(one, {},
               test::config_of({{"threads", "3"},
                                {"kv.type", "q4_0"},
                                {"prefill.chunk", "77"},
                                {"attention.form", "absorbed"}}))
            .trials.size() == 1);
}

TEST_CASE("what does not fit is not measured", "[tune]") {
  Injected runner;
  runner.rates = usual;
  runner.fits = [](const Injected::Values& v) {
    const bool small = v.at("kv.type") != "auto";
    return small && (v.at("prefill.chunk") == "128" || v.at("prefill.chunk") == "64");
  };
  const TuneResult result = search(runner, {.seconds = 1000});
  const TuneTrial& best = result.trials[static_cast<size_t>(result.best)];
  CHECK(best.feasible);
  CHECK(value(best, "kv.type") == "q8_0");
  CHECK(value(best, "prefill.chunk") == "128");
  int n_fit = 0;
  for (const TuneTrial& trial : result.trials) {
    CHECK(trial.measured == trial.feasible);
    CHECK(trial.why_not.empty() == trial.feasible);
    n_fit += trial.feasible;
  }
  CHECK(n_fit == runner.n_measured);

  Injected none;
  none.fits = [](const Injected::Values&) { return false; };
  const TuneOptions options;
  const auto refused = run::tune_search(run::tune_axes({}, options, 4), options, none);
  CHECK(refused.status().code() == Code::kBudget);
  CHECK(none.n_measured == 0);
}

TEST_CASE("the smallest type of the cache is for contexts that nothing else holds", "[tune]") {
  const TuneOptions options{.goal = TuneGoal::kContext, .context = 1000, .seconds = 1000};
  Injected runner;
  runner.rates = [](const Injected::Values& v) {
    CHECK(v.at("kv.type") != "q4_0");
    return usual(v);
  };
  search(runner, options);
  runner = {};
  runner.fits = [](const Injected::Values& v) { return v.at("kv.type") == "q4_0"; };
  runner.rates = usual;
  const TuneResult result = search(runner, options);
  CHECK(value(result.trials[static_cast<size_t>(result.best)], "kv.type") == "q4_0");
}

TEST_CASE("time bounds the search, and the first measurement is always made", "[tune]") {
  for (const double seconds : {0.0, 1.0, 5.0}) {
    Injected runner;
    runner.rates = usual;
    const TuneResult result = search(runner, {.seconds = seconds});
    CHECK_FALSE(result.complete);
    CHECK(runner.n_measured == std::max(1, static_cast<int>(seconds)));
    CHECK(result.trials[static_cast<size_t>(result.best)].measured);
  }
}

TEST_CASE("a measurement that fails is told and passed over; a cancelled one ends it", "[tune]") {
  Injected runner;
  runner.rates = usual;
  runner.fails = [](const Injected::Values& v) {
    return v.at("threads") == "4" ? Status(Code::kMemory, "no memory") : Status();
  };
  // The first choice cannot be measured: smaller ones are tried, which fail as well.
  const TuneOptions options{.seconds = 1000};
  auto failed = run::tune_search(run::tune_axes({}, options, 4), options, runner);
  CHECK(failed.status().code() == Code::kBudget);
  runner.fails = [](const Injected::Values& v) {
    return v.at("threads") == "3" ? Status(Code::kMemory, "no memory") : Status();
  };
  const TuneResult result = search(runner, {.seconds = 1e9});
  CHECK(value(result.trials[static_cast<size_t>(result.best)], "threads") == "2");
  runner.fails = [](const Injected::Values&) { return Status(Code::kCancelled, "stop"); };
  CHECK(run::tune_search(run::tune_axes({}, options, 4), options, runner).status().code() ==
        Code::kCancelled);
}

TEST_CASE("a profile survives being text, and is refused where it does not belong", "[tune]") {
  auto engine = Engine::create(test::config_of({{"threads", "1"}}));
  REQUIRE(engine.ok());
  auto file = inspect_file(FATHOM_EXAMPLE_MODEL);
  REQUIRE(file.ok());
  const Profile profile{.model = model_fingerprint(*file),
                        .machine = machine_fingerprint(*engine),
                        .goal = "decode",
                        .settings = {{"threads", "2"}, {"kv.type", "q8_0"}},
                        .rates = {123.5, 4.25}};
  CHECK(profile.model.size() == 32);
  auto again = Profile::parse(profile.to_json());
  INFO(again.status().message());
  REQUIRE(again.ok());
  CHECK(again->to_json() == profile.to_json());
  CHECK(again->check(*file, *engine).ok());
  Config config;
  test::require_ok(again->apply(config));
  CHECK(config.threads == 2);
  CHECK(config.kv_type == KvType::kQ8_0);

  // The machine's fingerprint does not depend on how the engine was made.
  auto other = Engine::create(test::config_of({{"threads", "2"}, {"budget.cpu", "1G"}}));
  CHECK(machine_fingerprint(*other) == profile.machine);
  Profile elsewhere = profile;
  elsewhere.machine[0] = elsewhere.machine[0] == '0' ? '1' : '0';
  CHECK(elsewhere.check(*file, *engine).code() == Code::kMismatch);
  elsewhere = profile;
  elsewhere.model.clear();
  CHECK(elsewhere.check(*file, *engine).code() == Code::kMismatch);

  const std::string text = profile.to_json();
  for (size_t n = 0; n + 2 < text.size(); ++n)
    CHECK(Profile::parse(std::string_view(text).substr(0, n)).status().code() == Code::kFormat);
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string changed = text;
    changed.replace(changed.find(from), from.size(), to);
    return Profile::parse(changed).status().code();
  };
  CHECK(replaced("\"fathom_profile\": 1", "\"fathom_profile\": 2") == Code::kVersion);
  CHECK(replaced("\"threads\": \"2\"", "\"threads\": \"many\"") == Code::kFormat);
  CHECK(replaced("\"threads\": \"2\"", "\"no.such.key\": \"2\"") == Code::kFormat);
  CHECK(replaced("\"2\"", "2") == Code::kFormat);
}

TEST_CASE("a search on this machine", "[tune]") {
  std::vector<std::string> seen;
  TuneOptions options{.seconds = 0.4};
  options.on_trial = [&](const TuneTrial& trial) { seen.push_back(value(trial, "threads")); };
  const auto result =
      tune(FATHOM_EXAMPLE_MODEL, test::config_of({{"context.max", "2000"}}), options);
  INFO(result.status().message());
  REQUIRE(result.ok());
  REQUIRE(seen.size() == result->trials.size());
  const TuneTrial& best = result->trials[static_cast<size_t>(result->best)];
  CHECK(best.measured);
  CHECK(best.rates.prefill_tps > 0);
  CHECK(best.rates.decode_tps > 0);
  CHECK(best.max_context == 2000);
  CHECK(best.peak_bytes > 1'000'000);
  CHECK(result->profile.settings == best.settings);

  CancelToken cancel;
  cancel.request();
  CHECK(tune(FATHOM_EXAMPLE_MODEL, {}, {.cancel = &cancel}).status().code() == Code::kCancelled);
  CHECK(tune("/no/such.gguf", {}).status().code() == Code::kNotFound);
  CHECK(tune(FATHOM_EXAMPLE_MODEL, test::config_of({{"budget.cpu", "1M"}, {"context.max", "100"}}))
            .status()
            .code() == Code::kBudget);
}

}  // namespace
}  // namespace fathom
