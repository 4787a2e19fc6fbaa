// The sub-commands: each adds itself to the command line and sets `action` when it is chosen.
#pragma once

#include "options.h"

namespace cli {

void add_run(CLI::App& app, Action& action);         // run.cc, chat.cc
void add_plan(CLI::App& app, Action& action);        // plan.cc
void add_simulate(CLI::App& app, Action& action);    // simulate.cc
void add_inspect(CLI::App& app, Action& action);     // inspect.cc
void add_eval(CLI::App& app, Action& action);        // eval.cc
void add_tokenize(CLI::App& app, Action& action);    // tokenize.cc
void add_detokenize(CLI::App& app, Action& action);  // tokenize.cc
void add_perplexity(CLI::App& app, Action& action);  // perplexity.cc
void add_retrieval(CLI::App& app, Action& action);   // retrieval.cc
void add_bench(CLI::App& app, Action& action);       // bench.cc
void add_tune(CLI::App& app, Action& action);        // tune.cc, profile_file.cc
void add_config(CLI::App& app, Action& action);      // config.cc
void add_version(CLI::App& app, Action& action);     // config.cc
void add_devices(CLI::App& app, Action& action);     // devices.cc
void add_demo(CLI::App& app, Action& action);        // demo.cc, demo_text.cc

}  // namespace cli
