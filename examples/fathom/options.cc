#include "options.h"

#include <algorithm>
#include <cctype>
#include <map>

#include <fmt/format.h>

#include "exit.h"
#include "input.h"
#include "terminal.h"

namespace cli {
namespace {

// Splits "key=value"; leaves with a message that names the flag.
std::pair<std::string, std::string> key_value(const std::string& text, const char* flag) {
  const size_t equals = text.find('=');
  if (equals == 0 || equals == std::string::npos)
    usage_error(fmt::format("{} {}: expected key=value", flag, text));
  return {text.substr(0, equals), text.substr(equals + 1)};
}

}  // namespace

void add_output_flags(CLI::App& app, OutputFlags& flags) {
  app.add_flag("--json", flags.json, "one JSON object on standard output");
  CLI::Option* quiet = app.add_flag("-q,--quiet", flags.quiet, "only the answer, and errors");
  app.add_flag("-v,--verbose", flags.verbose, "say more: load report, plan, log")->excludes(quiet);
}

void apply(const OutputFlags& flags) {
  set_verbosity(flags.quiet         ? Verbosity::kQuiet
                : flags.verbose > 0 ? Verbosity::kVerbose
                                    : Verbosity::kNormal);
}

void add_config_flags(CLI::App& app, ConfigFlags& flags, bool with_context) {
  const char* group = "Configuration";
  if (with_context)
    app.add_option("-c,--ctx-size", flags.ctx_size,
                   "tokens a session may hold (context.max); default: what fits; 0: what the "
                   "model was trained for")
        ->check(CLI::NonNegativeNumber)
        ->group(group);
  app.add_option("-t,--threads", flags.threads, "CPU threads; 0: all this process may use")
      ->group(group);
  app.add_option("-b,--batch-size,--chunk", flags.batch_size,
                 "tokens per prefill pass (prefill.chunk)")
      ->group(group);
  app.add_option("--kv-type", flags.kv_type, "type of the cache: f32 bf16 f16 fp8 q8_0 q4_0")
      ->group(group);
  app.add_option("--mem-budget", flags.mem_budget, "budgets: cpu=24G,cuda:0=20G")->group(group);
  app.add_option("--isa", flags.isa, "instruction set: auto scalar avx2 avx512 amx")->group(group);
  app.add_option("--n-gpu-layers,--ngl", flags.gpu_layers,
                 "a hint (also -ngl): the plan places the layers, and says where")
      ->group(group);
  app.add_option("--config", flags.config_file, "a JSON file of configuration keys")->group(group);
  app.add_option("--set", flags.set, "key=value for any configuration key (fathom config --schema)")
      ->allow_extra_args(false)
      ->group(group);
}

fathom::Config make_config(const ConfigFlags& flags, const fathom::Config& base) {
  fathom::Config config = base;
  if (!flags.config_file.empty()) {
    fathom::Status status = config.merge_json(read_text(flags.config_file));
    if (!status.ok()) fail(std::move(status).in(flags.config_file));
  }
  // key -> flag that set it.
  std::map<std::string, std::string> by_flag;
  const auto set = [&](const char* flag, const std::string& key, const std::string& value) {
    must(config.set(key, value));
    by_flag[key] = flag;
  };
  if (flags.ctx_size && *flags.ctx_size > 0)
    set("-c", "context.max", std::to_string(*flags.ctx_size));
  if (flags.threads) set("-t", "threads", std::to_string(*flags.threads));
  if (flags.batch_size) set("-b", "prefill.chunk", std::to_string(*flags.batch_size));
  if (!flags.kv_type.empty()) set("--kv-type", "kv.type", flags.kv_type);
  if (!flags.isa.empty()) set("--isa", "isa", flags.isa);
  for (size_t begin = 0; begin < flags.mem_budget.size();) {
    const size_t end = std::min(flags.mem_budget.find(',', begin), flags.mem_budget.size());
    const auto [device, bytes] =
        key_value(flags.mem_budget.substr(begin, end - begin), "--mem-budget");
    set("--mem-budget", "budget." + device, bytes);
    begin = end + 1;
  }
  for (const std::string& text : flags.set) {
    const auto [key, value] = key_value(text, "--set");
    const fathom::Result<std::string> before = config.get(key);
    must(config.set(key, value));
    const auto flag = by_flag.find(key);
    if (flag != by_flag.end() && must(config.get(key)) != before.value())
      usage_error(fmt::format("{} sets {} to {}, --set to {}: give one of them", flag->second, key,
                              before.value(), value));
  }
  return config;
}

void add_model_flag(CLI::App& app, std::string& model) {
  app.add_option("-m,--model", model,
                 "a .gguf file (of a split one the first), or a Hugging Face folder; to plan and "
                 "simulate, a config.json too")
      ->required();
}

void add_machine_flag(CLI::App& app, std::string& machine) {
  app.add_option("--machine", machine,
                 "a JSON file that describes another machine: {\"devices\": [{\"name\": \"cpu\", "
                 "\"bytes\": \"256G\"}, {\"name\": \"cuda:0\", \"bytes\": \"24G\"}]}");
}

void add_prompt_flags(CLI::App& app, PromptFlags& flags) {
  CLI::Option* prompt = app.add_option_function<std::string>(
      "-p,--prompt",
      [&flags](const std::string& text) {
        flags.prompt = text;
        flags.has_prompt = true;
      },
      "the prompt");
  CLI::Option* file = app.add_option("-f,--file", flags.file, "a file with the prompt; -: stdin");
  CLI::Option* tokens =
      app.add_option("--tokens", flags.tokens, "a file with a JSON array of token ids; -: stdin");
  prompt->excludes(file)->excludes(tokens);
  file->excludes(tokens);
}

void add_chat_flags(CLI::App& app, ChatFlags& flags) {
  app.add_flag("--chat", flags.chat,
               "the prompt is what a user says (or a JSON array of {role, content}): put it into "
               "the model's chat form");
  app.add_option("--chat-format", flags.format,
                 "deepseek-v2, deepseek-v3 or deepseek-r1; default: the model's own")
      ->check(CLI::IsMember({"deepseek-v2", "deepseek-v3", "deepseek-r1"}));
}

fathom::ChatFormat chat_format(const ChatFlags& flags) {
  if (flags.format == "deepseek-v2") return fathom::ChatFormat::kDeepSeekV2;
  if (flags.format == "deepseek-v3") return fathom::ChatFormat::kDeepSeekV3;
  if (flags.format == "deepseek-r1") return fathom::ChatFormat::kDeepSeekR1;
  return fathom::ChatFormat::kNone;
}

void add_sampling_flags(CLI::App& app, fathom::SamplingOptions& options) {
  const char* group = "Sampling";
  app.add_option("--temp", options.temperature, "temperature; 0: the most likely token")
      ->capture_default_str()
      ->group(group);
  app.add_option("--top-k", options.top_k, "keep the k most likely; 0: off")
      ->capture_default_str()
      ->group(group);
  app.add_option("--top-p", options.top_p, "keep the smallest set with this probability; 1: off")
      ->capture_default_str()
      ->group(group);
  app.add_option("--min-p", options.min_p, "drop what is below this share of the best; 0: off")
      ->capture_default_str()
      ->group(group);
  app.add_option("--repeat-penalty", options.repeat_penalty, "1: off")
      ->capture_default_str()
      ->group(group);
  app.add_option("--repeat-last-n", options.repeat_window, "tokens that the penalty looks at")
      ->capture_default_str()
      ->group(group);
  app.add_option("-s,--seed", options.seed, "same seed, same text")
      ->capture_default_str()
      ->group(group);
}

void name_environment(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty()) continue;
    std::string name = option->get_lnames().front();
    if (name == "help" || name == "version") continue;
    for (char& c : name) c = c == '-' ? '_' : static_cast<char>(std::toupper(c));
    option->envname("FATHOM_ARG_" + name);
  }
}

}  // namespace cli
