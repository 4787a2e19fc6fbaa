// fathom eval: logits of given tokens, as a file of float32, for comparing with other programs.
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "f32_file.h"
#include "input.h"
#include "loading.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

struct EvalArgs {
  std::string model, logits;
  PromptFlags prompt;
  ChatFlags chat;
  ConfigFlags config;
  OutputFlags output;
  bool all = false;
};

int run(const EvalArgs& args) {
  apply(args.output);
  if (!args.prompt.given()) usage_error("eval needs --tokens, -f or -p");
  const Loaded loaded = load_model(args.model, make_config(args.config), args.config);
  const std::vector<int32_t> tokens =
      prompt_tokens(args.prompt, args.chat, loaded.model.tokenizer());
  if (tokens.empty()) usage_error("there are no tokens to evaluate");
  fathom::Session session = must(fathom::Session::create(loaded.model));

  F32File out(args.logits);
  if (args.all) {
    Progress bar("eval", Progress::Unit::kTokens);
    fathom::RunOptions options;
    options.cancel = &cancel_token();
    options.on_logits = [&](int64_t position, std::span<const float> logits) {
      bar.update(position + 1, static_cast<int64_t>(tokens.size()));
      return out.append(logits);
    };
    fathom::Status status = session.prefill(tokens, options);
    if (out.failed()) out.close();
    must(std::move(status));
  } else {
    must(prefill(session, tokens));
    if (!out.append(session.logits())) out.close();
  }
  out.close();

  const fathom::SessionTimes& times = session.times();
  const int64_t vocab_size = loaded.model.config().vocab_size;
  if (args.output.json)
    put_json({{"tokens", tokens.size()},
              {"rows", out.n_values() / vocab_size},
              {"vocab_size", vocab_size},
              {"logits", args.logits},
              {"timings",
               {{"prefill_tps", rate(times.prefill_tokens, times.prefill_seconds)},
                {"load_s", loaded.load_seconds}}},
              {"memory", memory_json(loaded.engine)}});
  else
    note(fmt::format("{}: [{}, {}] float32, {:.1f} tok/s", args.logits, out.n_values() / vocab_size,
                     vocab_size, rate(times.prefill_tokens, times.prefill_seconds)));
  return kExitOk;
}

}  // namespace

void add_eval(CLI::App& app, Action& action) {
  auto args = std::make_shared<EvalArgs>();
  CLI::App* command =
      app.add_subcommand("eval", "Write the logits of given tokens to a float32 file");
  add_model_flag(*command, args->model);
  add_prompt_flags(*command, args->prompt);
  add_chat_flags(*command, args->chat);
  command->add_option("--logits", args->logits, "the file: float32 [1 or n, vocab]")->required();
  command->add_flag("--all", args->all, "logits of every position, not of the last alone");
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
