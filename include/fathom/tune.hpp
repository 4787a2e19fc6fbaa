// Tuning: which settings are fastest for a model on this machine, measured - and a profile that
// keeps the answer.
//
//   auto tuned = tune("model.gguf", config, {.goal = TuneGoal::kDecode, .seconds = 120});
//   for (auto& trial : tuned->trials) print(trial.settings, trial.rates.decode_tps);
//   save(tuned->profile.to_json());
//
//   auto profile = Profile::parse(text);                      // later, in another process
//   if (profile->check(info, engine).ok()) profile->apply(config);
//
// Only settings of which a plan says that they fit are measured.  What `config` sets is a
// constraint: it is not tried otherwise.  The cache's types that are tried cost at most half a
// percent of perplexity; smaller ones only where nothing else holds the asked-for context.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fathom/engine.hpp"
#include "fathom/inspect.hpp"
#include "fathom/status.hpp"

namespace fathom {

enum class TuneGoal : uint8_t {
  kDecode,   // tokens per second while generating
  kPrefill,  // tokens per second while reading
  kContext,  // a text of that length, nine tenths of which are read and one tenth generated
};
constexpr std::string_view tune_goal_name(TuneGoal goal) noexcept {
  constexpr std::string_view kNames[] = {"decode", "prefill", "context"};
  return kNames[static_cast<int>(goal)];
}

// Configuration keys and values as Config::set takes them.
using TuneSettings = std::vector<std::pair<std::string, std::string>>;

struct TuneRates {
  double prefill_tps = 0, decode_tps = 0;
};

struct TuneTrial {
  TuneSettings settings;
  bool feasible = false;   // by its plan
  std::string why_not;     // when it is not, or could not be measured
  int64_t peak_bytes = 0;  // planned, all devices
  int64_t max_context = 0;
  bool measured = false;
  TuneRates rates;
};

struct TuneOptions {
  TuneGoal goal = TuneGoal::kDecode;
  int64_t context = 0;  // kContext: tokens; then it is the plan's context.max
  // No measurement begins later; the first is always made.  What one takes is bounded by an eighth
  // of it, loading apart.
  double seconds = 120;
  const CancelToken* cancel = nullptr;                  // kCancelled; must outlive the call
  std::function<void(const TuneTrial&)> on_trial = {};  // after each, in order
};

// The best settings for a model on a machine.  A value; as text it is a JSON object.
struct Profile {
  std::string model, machine;  // fingerprints
  std::string goal;
  TuneSettings settings;
  TuneRates rates;

  std::string to_json() const;
  // Errors: kFormat (not a profile; a key that Config does not take), kVersion (of a newer
  // library).
  static Result<Profile> parse(std::string_view json);
  // Whether it is for this model file and the machine of this engine.  Errors: kMismatch.
  Status check(const FileInfo& file, const Engine& engine) const;
  // Sets its keys.  Errors: as Config::set.
  Status apply(Config& config) const;
};

struct TuneResult {
  std::vector<TuneTrial> trials;  // in the order in which they were made
  int best = 0;                   // index
  bool complete = false;          // false: time ended before everything was tried
  Profile profile;                // of the best
};

// Loads the model once per number of threads, type of the cache and form of attention that is
// tried.  Deterministic given what is measured.  Errors: those of planning and loading; kBudget
// when nothing is feasible (the first plan says what would be); kCancelled.
Result<TuneResult> tune(const std::string& model_path, const Config& config,
                        const TuneOptions& options = {});

// 32 hexadecimal digits each: of the file's headers, and of devices, processor and its usable
// number.
std::string model_fingerprint(const FileInfo& file);
std::string machine_fingerprint(const Engine& engine);

}  // namespace fathom
