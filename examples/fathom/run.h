// What one-shot runs and the chat share.
#pragma once

#include "loading.h"
#include "options.h"

namespace cli {

struct RunArgs {
  std::string model;
  PromptFlags prompt;
  ChatFlags chat;
  ConfigFlags config;
  OutputFlags output;
  int64_t n_predict = -1;
  fathom::GenerateOptions generate;
  bool ignore_eos = false, no_profile = false;
  double deadline_seconds = 0;
  std::string timeline, load_state, save_state;
};

// Milliseconds left of the deadline that began at `start`; at least 1; 0 when there is none.
int64_t deadline_left_ms(const RunArgs&, double start);

// Streams the answer to stdout.  Sets `stdout_failed` when stdout went away.
fathom::Result<fathom::GenerateResult> stream_answer(fathom::Session&, const RunArgs&, double start,
                                                     bool& stdout_failed);

// --save-state: writes the session there and says so.  Nothing for an empty path.
void save_state(const fathom::Session&, const std::string& path);

// A chat on the terminal: one conversation, one session, the common part of which is kept from
// turn to turn.  Answers the exit code.
int run_chat(const RunArgs&, Loaded&);

// Rates and memory in three lines on stderr.
void print_statistics(const Loaded&, const fathom::Session&);

}  // namespace cli
