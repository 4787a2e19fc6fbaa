// Flags that several sub-commands share, each group added by one function.  The flags are names
// that users of other programs know (CONVENTIONS: -m -p -f -n -c -t -b ...) for keys of
// fathom::Config; --set reaches every key.  Each flag can come from the environment instead, as
// FATHOM_ARG_<LONG NAME>.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "fathom/config.hpp"
#include "fathom/sampling.hpp"
#include "fathom/tokenizer.hpp"

namespace cli {

// What main() runs once the command line is understood.  Answers the exit code.
using Action = std::function<int()>;

struct OutputFlags {
  bool json = false;
  bool quiet = false;
  int verbose = 0;
};
void add_output_flags(CLI::App&, OutputFlags&);
// Call first in each command.
void apply(const OutputFlags&);

struct ConfigFlags {
  std::optional<int64_t> ctx_size;  // absent with ContextFlag::kNone
  std::optional<int64_t> threads, batch_size;
  std::optional<int64_t> gpu_layers;
  std::string kv_type, mem_budget, isa, config_file;
  std::vector<std::string> set;

  bool context_of_model() const { return ctx_size.has_value() && *ctx_size == 0; }
};
// `with_context`: -c is the context; false where -c means something else or nothing.
void add_config_flags(CLI::App&, ConfigFlags&, bool with_context = true);
// The configuration: --config file, then flags, then --set.  Leaves with kExitUsage for what
// Config refuses, and when a flag and --set say different things about one key.
// `base` is what holds where neither says anything.
fathom::Config make_config(const ConfigFlags&, const fathom::Config& base = {});

void add_model_flag(CLI::App&, std::string& model);
void add_machine_flag(CLI::App&, std::string& machine);

struct PromptFlags {
  std::string prompt, file, tokens;
  bool given() const { return has_prompt || !file.empty() || !tokens.empty(); }
  bool has_prompt = false;  // -p '' is a prompt
};
void add_prompt_flags(CLI::App&, PromptFlags&);

struct ChatFlags {
  bool chat = false;
  std::string format;  // empty: the model's
};
void add_chat_flags(CLI::App&, ChatFlags&);
fathom::ChatFormat chat_format(const ChatFlags&);

void add_sampling_flags(CLI::App&, fathom::SamplingOptions&);

// Gives every option of `app` its environment variable.  Last, when all are added.
void name_environment(CLI::App& app);

}  // namespace cli
