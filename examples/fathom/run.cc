// fathom run: a prompt in, the answer out; without a prompt, a chat.
#include "run.h"

#include <algorithm>
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "input.h"
#include "machine.h"
#include "profile_file.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

int exit_code_of(const fathom::GenerateResult& result) {
  using fathom::StopReason;
  switch (result.reason) {
    case StopReason::kEos:
    case StopReason::kStop:
    case StopReason::kLength:
    case StopReason::kCallback:
    case StopReason::kContextFull:
      return kExitOk;
    case StopReason::kCancelled:
      return signal_exit_code() != 0 ? signal_exit_code() : kExitOk;
    case StopReason::kDeadline:
      return kExitDeadline;
    case StopReason::kBudget:
      return kExitMemory;
  }
  return kExitInternal;
}

Json result_json(const RunArgs& args, const Loaded& loaded, const fathom::Session& session,
                 size_t n_prompt, const fathom::GenerateResult& result) {
  const fathom::SessionTimes& times = session.times();
  Json json = {
      {"model", args.model},
      {"tokens", result.tokens},
      {"text", result.text},
      {"prompt_tokens", n_prompt},
      {"stop_reason", fathom::stop_reason_name(result.reason)},
      {"timings",
       {{"prefill_tps", rate(times.prefill_tokens, times.prefill_seconds)},
        {"decode_tps", rate(times.decode_tokens, times.decode_seconds)},
        {"load_s", loaded.load_seconds},
        {"prefill_s", times.prefill_seconds},
        {"decode_s", times.decode_seconds}}},
      {"memory", memory_json(loaded.engine)},
      {"events", events_json(session)},
  };
  if (!result.status.ok()) json["message"] = result.status.message();
  const fathom::ExpertCacheStats cache = loaded.model.expert_cache();
  json["expert_cache"] = {{"experts", cache.n_experts}, {"bytes", cache.bytes},
                          {"choices", cache.choices},   {"hits", cache.hits},
                          {"copied", cache.copied},     {"dropped", cache.dropped}};
  return json;
}

// The session that --load-state names, or a new one.
fathom::Session open_session(const RunArgs& args, const Loaded& loaded) {
  if (args.load_state.empty()) return must(fathom::Session::create(loaded.model));
  Progress bar("restore", Progress::Unit::kBytes);
  fathom::RunOptions options;
  options.cancel = &cancel_token();
  options.progress = [&bar](fathom::ProgressPhase, int64_t done, int64_t total) {
    bar.update(done, total);
    return true;
  };
  fathom::Session session =
      must(fathom::Session::restore(loaded.model, args.load_state, {}, options));
  end_progress_line();
  note(fmt::format("{}: {} tokens", args.load_state, with_commas(session.n_tokens())));
  return session;
}

// What is to be read: the prompt; after a saved text it is a continuation, so that it does not
// begin with bos.  Without a prompt the last token once more where the saved session has no logits.
std::vector<int32_t> text_to_read(const RunArgs& args, const Loaded& loaded,
                                  fathom::Session& session) {
  std::vector<int32_t> tokens;
  if (args.prompt.given()) tokens = prompt_tokens(args.prompt, args.chat, loaded.model.tokenizer());
  if (session.n_tokens() == 0) {
    if (tokens.empty()) usage_error("the prompt is empty");
    return tokens;
  }
  const fathom::Tokenizer* tokenizer = loaded.model.tokenizer();
  if (args.prompt.tokens.empty() && tokenizer && !tokens.empty() &&
      tokens.front() == tokenizer->bos())
    tokens.erase(tokens.begin());
  if (tokens.empty() && session.logits().empty()) {
    tokens = {session.tokens().back()};
    must(session.truncate(session.n_tokens() - 1));
  }
  return tokens;
}

int run(const RunArgs& args) {
  apply(args.output);
  const double start = now_seconds();
  if (!args.prompt.given() && args.load_state.empty() && args.output.json)
    usage_error("--json needs a prompt: give -p, -f or --tokens");
  TimelineFile timeline(args.timeline);
  const fathom::Config config =
      args.no_profile ? make_config(args.config) : config_with_profile(args.model, args.config);
  Loaded loaded = load_model(args.model, config, args.config, &timeline);
  if (!args.prompt.given() && args.load_state.empty()) {
    const int code = run_chat(args, loaded);
    timeline.finish();
    return code;
  }

  fathom::Session session = open_session(args, loaded);
  const std::vector<int32_t> prompt = text_to_read(args, loaded, session);
  if (fathom::Status status = prompt.empty()
                                  ? fathom::Status()
                                  : prefill(session, prompt, deadline_left_ms(args, start));
      !status.ok()) {
    if (status.code() == fathom::Code::kCancelled) print_statistics(loaded, session);
    save_state(session, args.save_state);  // what was read is not lost
    fail(status);
  }
  bool stdout_failed = false;
  const fathom::GenerateResult result = must(stream_answer(session, args, start, stdout_failed));
  save_state(session, args.save_state);
  if (stdout_failed) fail(kExitIo, "cannot write to standard output");
  if (args.output.json)
    put_json(result_json(args, loaded, session, prompt.size(), result));
  else if (result.text.empty() || result.text.back() != '\n')
    put("\n");
  for (const fathom::Event& event : session.events()) note("event: " + event.text);
  if (!result.status.ok()) note(result.status.message());
  note(fmt::format("stopped: {} after {} tokens", fathom::stop_reason_name(result.reason),
                   result.tokens.size()));
  print_statistics(loaded, session);
  timeline.finish();
  return exit_code_of(result);
}

}  // namespace

int64_t deadline_left_ms(const RunArgs& args, double start) {
  if (args.deadline_seconds <= 0) return 0;
  const double left = args.deadline_seconds - (now_seconds() - start);
  return std::max<int64_t>(1, static_cast<int64_t>(left * 1000));
}

fathom::Result<fathom::GenerateResult> stream_answer(fathom::Session& session, const RunArgs& args,
                                                     double start, bool& stdout_failed) {
  fathom::GenerateOptions options = args.generate;
  options.max_new_tokens = args.n_predict;
  options.stop_at_eos = !args.ignore_eos;
  options.run.cancel = &cancel_token();
  options.run.deadline_ms = deadline_left_ms(args, start);
  const bool silent = args.output.json;
  LiveLine live(session);
  return session.generate(options, [&](const fathom::GeneratedToken& token) {
    live.token();
    stdout_failed = !silent && !token.text.empty() && !try_put(token.text);
    return !stdout_failed;
  });
}

void save_state(const fathom::Session& session, const std::string& path) {
  if (path.empty() || session.n_tokens() == 0) return;
  // Not cancelled by the signal that ended the answer: it is what the user asked to keep.
  must(session.save(path));
  note(fmt::format("{}: saved {} tokens", path, with_commas(session.n_tokens())));
}

void print_statistics(const Loaded& loaded, const fathom::Session& session) {
  const fathom::SessionTimes& times = session.times();
  note(fmt::format("load {:.2f} s; prefill {} tokens, {:.1f} tok/s; decode {} tokens, {:.1f} tok/s",
                   loaded.load_seconds, with_commas(times.prefill_tokens),
                   rate(times.prefill_tokens, times.prefill_seconds),
                   with_commas(times.decode_tokens),
                   rate(times.decode_tokens, times.decode_seconds)));
  if (const fathom::ExpertCacheStats cache = loaded.model.expert_cache();
      cache.copied > 0 || cache.choices > 0)
    note(fmt::format(
        "expert cache: {} of {} choices from copies ({:.1f} %); holds {} experts, {}; "
        "{} copied, {} dropped",
        with_commas(cache.hits), with_commas(cache.choices),
        100.0 * rate(cache.hits, static_cast<double>(cache.choices)), with_commas(cache.n_experts),
        human_bytes(cache.bytes), with_commas(cache.copied), with_commas(cache.dropped)));
  int64_t planned = 0, peak = 0;  // the timeline's recorder is in both
  for (const fathom::DeviceMemory& device : loaded.engine.memory().devices) {
    planned += device.bytes_planned;
    peak += device.bytes_peak;
  }
  note(
      fmt::format("memory: planned peak {} for {} tokens, ledger peak {} at {} tokens (KV {}), "
                  "resident peak {}",
                  human_bytes(planned), with_commas(loaded.plan.max_context), human_bytes(peak),
                  with_commas(session.n_tokens()), human_bytes(session.cache().size_bytes()),
                  human_bytes(rss_peak_bytes())));
  if (verbosity() == Verbosity::kVerbose) note(memory_table(loaded.engine));
}

void add_run(CLI::App& app, Action& action) {
  auto args = std::make_shared<RunArgs>();
  CLI::App* command =
      app.add_subcommand("run", "Generate text; without a prompt, chat on the terminal");
  add_model_flag(*command, args->model);
  add_prompt_flags(*command, args->prompt);
  command->add_option("-n,--predict", args->n_predict, "new tokens; -1: until the model stops")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 31));
  add_chat_flags(*command, args->chat);
  command->add_option("--stop", args->generate.stop_strings, "text at which to stop; repeatable")
      ->allow_extra_args(false);
  command->add_flag("--ignore-eos", args->ignore_eos, "do not stop at the end-of-text token");
  command->add_option("--deadline", args->deadline_seconds, "stop after so many seconds")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--load-state", args->load_state,
                      "go on where the session saved in FILE was; a prompt is appended to it");
  command->add_option("--save-state", args->save_state,
                      "save the session to FILE at the end, also after ^C");
  add_timeline_flag(*command, args->timeline);
  command->add_flag("--no-profile", args->no_profile, "do not use what `fathom tune` has measured");
  add_sampling_flags(*command, args->generate.sampling);
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
