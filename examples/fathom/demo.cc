// fathom demo: the whole of the library in one minute.  Plans for a text of 18,000 tokens, shows
// the plan, loads, prefills the text, asks for a code planted more than 16,384 tokens back, streams
// the answer, checks it, has a story told in the same session, and sets planned against used
// memory.
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "demo_text.h"
#include "exit.h"
#include "loading.h"
#include "machine.h"
#include "run.h"
#include "terminal.h"

namespace cli {
namespace {

struct DemoArgs {
  std::string model;
  ConfigFlags config;
  OutputFlags output;
  int64_t tokens = 18000;
  double depth = 0.05;
  uint64_t seed = 1;
};

constexpr int64_t kAnswerTokens = 32;
constexpr int64_t kStoryTokens = 400;
constexpr const char* kStoryPrompt = "Tell me a story about a fisherman.";
constexpr fathom::SamplingOptions kStorySampling = {.temperature = 0.8f, .seed = 1};

struct DemoPrompt {
  DemoText demo;
  std::vector<int32_t> ids;
  int64_t distance = 0;  // tokens between the code and the question, about
};

// What a user says, as the model's chat form has it.
std::vector<int32_t> user_turn(const fathom::Tokenizer& tokenizer, std::string says) {
  const fathom::ChatMessage message{"user", std::move(says)};
  const std::string text = must(tokenizer.render_chat(
      {&message, 1}, true,
      tokenizer.chat_format() == fathom::ChatFormat::kNone ? fathom::ChatFormat::kDeepSeekV2
                                                           : fathom::ChatFormat::kNone));
  std::vector<int32_t> ids;
  must(tokenizer.encode(text, {}, ids));
  return ids;
}

// The longest demo text whose prompt has at most args.tokens tokens.
DemoPrompt make_prompt(const fathom::Tokenizer& tokenizer, const DemoArgs& args) {
  size_t n_chars = static_cast<size_t>(args.tokens) * 4;
  for (;;) {
    DemoPrompt prompt;
    prompt.demo = make_demo_text(args.seed, n_chars, args.depth);
    prompt.ids = user_turn(tokenizer, prompt.demo.text + "\n\n" + prompt.demo.question);
    const int64_t n = static_cast<int64_t>(prompt.ids.size());
    if (n <= args.tokens) {
      prompt.distance = n - n * static_cast<int64_t>(prompt.demo.code_offset) /
                                static_cast<int64_t>(prompt.demo.text.size());
      return prompt;
    }
    n_chars = n_chars * static_cast<size_t>(args.tokens) / static_cast<size_t>(n) - 50;
  }
}

// Streams at most `max_tokens` tokens of answer.
fathom::GenerateResult answer(fathom::Session& session, const DemoArgs& args, int64_t max_tokens,
                              const fathom::SamplingOptions& sampling = {}) {
  RunArgs run_args;
  run_args.generate.sampling = sampling;
  run_args.n_predict = max_tokens;
  run_args.output = args.output;
  bool stdout_failed = false;
  fathom::GenerateResult result =
      must(stream_answer(session, run_args, now_seconds(), stdout_failed));
  if (stdout_failed) fail(kExitIo, "cannot write to standard output");
  if (!args.output.json) put("\n");
  return result;
}

int run(const DemoArgs& args) {
  apply(args.output);
  const DemoPrompt prompt = make_prompt(must(fathom::Tokenizer::open(args.model)), args);
  fathom::Config config = make_config(args.config);
  if (!config.context_max && !args.config.context_of_model())
    config.context_max = static_cast<int64_t>(prompt.ids.size()) + kAnswerTokens;

  note(fmt::format("1. The plan for {} tokens, from the file's header alone:",
                   with_commas(static_cast<int64_t>(prompt.ids.size()) + kAnswerTokens)));
  const double plan_start = now_seconds();
  const fathom::Engine engine = make_engine(config);
  const fathom::Plan plan = make_plan(engine, args.model, config, args.config);
  const double plan_seconds = now_seconds() - plan_start;
  note(plan.describe());
  note(fmt::format("   planned in {:.1f} ms", plan_seconds * 1000));
  if (!plan.feasible) fail(kExitInfeasible, "the plan does not fit the budget");

  note("\n2. Loading, and reading the text:");
  const int64_t resident_before = rss_bytes();
  Loaded loaded = load_model(args.model, config, {});
  fathom::Session session = must(fathom::Session::create(loaded.model));
  note(fmt::format("   The code stands {} tokens before the question.",
                   with_commas(prompt.distance)));
  must(prefill(session, prompt.ids));

  note("\n3. " + prompt.demo.question);
  const fathom::GenerateResult result = answer(session, args, kAnswerTokens);
  const bool right = result.text.find(prompt.demo.code) != std::string::npos;
  note(right ? fmt::format("   Right: it is {}.", prompt.demo.code)
             : fmt::format("   Wrong: it is {}.", prompt.demo.code));

  note(std::string("\n4. ") + kStoryPrompt);
  must(session.truncate(0));
  must(session.prefill(user_turn(*loaded.model.tokenizer(), kStoryPrompt)));
  const fathom::GenerateResult story = answer(session, args, kStoryTokens, kStorySampling);

  note("\n5. Planned against used, in bytes:");
  note(memory_table(loaded.engine));
  note(fmt::format("   resident memory grew by {} since the plan",
                   human_bytes(rss_peak_bytes() - resident_before)));
  print_statistics(loaded, session);
  if (args.output.json)
    put_json({{"question", prompt.demo.question},
              {"code", prompt.demo.code},
              {"text", result.text},
              {"right", right},
              {"story", story.text},
              {"story_stop_reason", fathom::stop_reason_name(story.reason)},
              {"prompt_tokens", prompt.ids.size()},
              {"distance_tokens", prompt.distance},
              {"memory", memory_json(loaded.engine)}});
  return right ? kExitOk : kExitInternal;
}

}  // namespace

void add_demo(CLI::App& app, Action& action) {
  auto args = std::make_shared<DemoArgs>();
  CLI::App* command = app.add_subcommand(
      "demo", "Plan, read a long text, find a code planted far back, compare memory with the plan");
  add_model_flag(*command, args->model);
  command->add_option("--length", args->tokens, "tokens of the prompt")
      ->check(CLI::Range(int64_t{200}, int64_t{1} << 20))
      ->capture_default_str();
  command
      ->add_option("--depth", args->depth, "where the code stands: 0 at the beginning, 1 the end")
      ->check(CLI::Range(0.0, 0.9))
      ->capture_default_str();
  command->add_option("-s,--seed", args->seed, "of the text")->capture_default_str();
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
