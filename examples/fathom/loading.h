// From a path and a configuration to a loaded model, with the plan made first and shown when it
// does not fit; and how memory is reported afterwards.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "fathom/engine.hpp"
#include "fathom/model.hpp"
#include "fathom/session.hpp"
#include "options.h"
#include "watching.h"

namespace cli {

using Json = nlohmann::ordered_json;

struct Loaded {
  fathom::Engine engine;
  fathom::Plan plan;
  fathom::Model model;
  double load_seconds = 0;  // weights read and packed; planning is not in it
};

// An engine whose log goes to stderr.  A machine that lacks what was asked for is kExitDevice.
fathom::Engine make_engine(const fathom::Config&, fathom::OpObserver op = {});

// The same, of simulated devices when a machine file is named.
fathom::Engine make_engine(const fathom::Config&, const std::string& machine_file);

// The same with this machine's own rates for predictions: measured now when `measure`, else those
// of an earlier measurement with the same devices and threads, else documented ones.  They are kept
// in $XDG_CACHE_HOME/fathom (~/.cache/fathom).
fathom::Engine make_engine_with_rates(const fathom::Config&, bool measure);

// Plans; `flags` tells when the context is to be the model's own (-c 0).
fathom::Plan make_plan(const fathom::Engine&, const std::string& model_path, const fathom::Config&,
                       const ConfigFlags& flags);

// Plans and loads, with progress.  An infeasible plan is shown and leaves with kExitInfeasible.
// `timeline`, when given, is started before the plan is made; `op` is told the time of each
// operation.
Loaded load_model(const std::string& model_path, const fathom::Config&, const ConfigFlags& flags,
                  TimelineFile* timeline = nullptr, fathom::OpObserver op = {});

// Prefills with cancellation, and with progress when there are at least `bar_from` tokens;
// `deadline_ms` as in RunOptions.
fathom::Status prefill(fathom::Session&, std::span<const int32_t> tokens, int64_t deadline_ms = 0,
                       size_t bar_from = 0);

// {planned_peak_bytes, ledger_peak_bytes, rss_peak_bytes, purposes{name: {peak, planned}}}
Json memory_json(const fathom::Engine&);
// The same as a table, with what is held now.
std::string memory_table(const fathom::Engine&);

Json events_json(const fathom::Session&);

// Tokens per second; 0 when nothing was timed.
double rate(int64_t tokens, double seconds);

// Prints a JSON object as the answer.  Text that is not UTF-8 is shown with replacements.
void put_json(const Json&);

}  // namespace cli
