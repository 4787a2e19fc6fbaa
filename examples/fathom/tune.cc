// fathom tune: measures which settings are fastest for a model on this machine and keeps the answer
// where `fathom run` finds it.
#include <algorithm>
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "loading.h"
#include "profile_file.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

struct TuneArgs {
  std::string model, goal = "decode", output;
  double seconds = 120;
  ConfigFlags config;
  OutputFlags flags;
};

// "context=16384", "decode", "prefill".
void read_goal(const std::string& text, fathom::TuneOptions& options) {
  if (text == "decode") {
    options.goal = fathom::TuneGoal::kDecode;
  } else if (text == "prefill") {
    options.goal = fathom::TuneGoal::kPrefill;
  } else if (text.compare(0, 8, "context=") == 0 && text.size() > 8 &&
             text.find_first_not_of("0123456789", 8) == std::string::npos && text.size() < 18) {
    options.goal = fathom::TuneGoal::kContext;
    options.context = std::stoll(text.substr(8));
  } else {
    usage_error(fmt::format("--goal {}: expected decode, prefill or context=TOKENS", text));
  }
}

std::string settings_text(const fathom::TuneSettings& settings) {
  std::string text;
  for (const auto& [key, value] : settings)
    text += fmt::format("{}{}={}", text.empty() ? "" : " ", key, value);
  return text;
}

std::string row(const fathom::TuneTrial& trial) {
  const std::string what = settings_text(trial.settings);
  if (!trial.measured)
    return fmt::format("{:>10} {:>10} {:>12}  {}: {}", "-", "-", human_bytes(trial.peak_bytes),
                       what, trial.why_not);
  return fmt::format("{:>10.1f} {:>10.1f} {:>12}  {}", trial.rates.prefill_tps,
                     trial.rates.decode_tps, human_bytes(trial.peak_bytes), what);
}

Json to_json(const fathom::TuneResult& result, const std::string& file) {
  Json trials = Json::array();
  for (const fathom::TuneTrial& trial : result.trials) {
    Json settings = Json::object();
    for (const auto& [key, value] : trial.settings) settings[key] = value;
    Json item = {{"settings", settings},
                 {"feasible", trial.feasible},
                 {"peak_bytes", trial.peak_bytes},
                 {"max_context", trial.max_context}};
    if (trial.measured) {
      item["prefill_tps"] = trial.rates.prefill_tps;
      item["decode_tps"] = trial.rates.decode_tps;
    } else {
      item["why_not"] = trial.why_not;
    }
    trials.push_back(item);
  }
  return {{"trials", trials},
          {"best", result.best},
          {"complete", result.complete},
          {"profile", Json::parse(result.profile.to_json())},
          {"file", file}};
}

int run(const TuneArgs& args) {
  apply(args.flags);
  fathom::TuneOptions options;
  read_goal(args.goal, options);
  options.seconds = args.seconds;
  options.cancel = &cancel_token();
  const std::string head =
      fmt::format("{:>10} {:>10} {:>12}  {}", "prefill/s", "decode/s", "planned peak", "settings");
  note(head);
  options.on_trial = [](const fathom::TuneTrial& trial) { note(row(trial)); };
  const fathom::TuneResult result =
      must(fathom::tune(args.model, make_config(args.config), options));
  const std::string file = args.output.empty()
                               ? profile_path(result.profile.model, result.profile.machine)
                               : args.output;
  write_profile(file, result.profile);
  const fathom::TuneTrial& best = result.trials[static_cast<size_t>(result.best)];
  if (args.flags.json) {
    put_json(to_json(result, file));
  } else {
    std::string table = head + "\n";
    std::vector<const fathom::TuneTrial*> sorted;
    for (const fathom::TuneTrial& trial : result.trials) sorted.push_back(&trial);
    std::stable_sort(sorted.begin(), sorted.end(), [&](const auto* a, const auto* b) {
      return options.goal == fathom::TuneGoal::kPrefill
                 ? a->rates.prefill_tps > b->rates.prefill_tps
                 : a->rates.decode_tps > b->rates.decode_tps;
    });
    for (const fathom::TuneTrial* trial : sorted)
      table += row(*trial) + (trial == &best ? "  <- best" : "") + "\n";
    put(table);
  }
  if (!result.complete)
    note(fmt::format("not everything was tried in {:.0f} s; --seconds gives it more time",
                     args.seconds));
  note(fmt::format("{}: `fathom run` uses it from now on: {}", file, settings_text(best.settings)));
  return kExitOk;
}

}  // namespace

void add_tune(CLI::App& app, Action& action) {
  auto args = std::make_shared<TuneArgs>();
  CLI::App* command = app.add_subcommand(
      "tune", "Measure which settings are fastest on this machine, for `run` to use");
  add_model_flag(*command, args->model);
  command
      ->add_option("--goal", args->goal,
                   "decode, prefill, or context=TOKENS to hold and work through")
      ->capture_default_str();
  command->add_option("--seconds", args->seconds, "no measurement begins later")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("-o,--output", args->output,
                      "write the profile there; default: the cache folder, where `run` looks");
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->flags);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
