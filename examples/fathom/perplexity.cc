// fathom perplexity: how well a model predicts a text.
//
// The text is cut into windows of N tokens that do not overlap; each is read into an empty session
// with nothing put before it, so its first token is not predicted.  nll is the mean over the
// windows of each one's mean negative log-likelihood, perplexity its exponential.
#include <algorithm>
#include <cmath>
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "input.h"
#include "loading.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

constexpr int64_t kDefaultWindow = 512;

struct PerplexityArgs {
  std::string model;
  PromptFlags prompt;
  ConfigFlags config;
  OutputFlags output;
  int64_t window = kDefaultWindow;
};

// -log softmax(logits)[token], in double.
double negative_log_likelihood(std::span<const float> logits, int32_t token) {
  const double best = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(logit - best);
  return best + std::log(sum) - logits[static_cast<size_t>(token)];
}

std::vector<int32_t> text_tokens(const PerplexityArgs& args, const fathom::Tokenizer* tokenizer) {
  if (!args.prompt.tokens.empty()) return read_tokens(args.prompt.tokens);
  if (tokenizer == nullptr)
    fail(kExitBadModel, "the model has no tokenizer: give the text as ids, with --tokens");
  std::vector<int32_t> tokens;
  const std::string text =
      args.prompt.has_prompt ? args.prompt.prompt : read_text(args.prompt.file);
  must(tokenizer->encode(text, {}, tokens));
  return tokens;
}

// Mean over positions 1.. of one window.
double window_nll(fathom::Session& session, std::span<const int32_t> window,
                  const std::function<void(int64_t)>& on_position) {
  double sum = 0;
  fathom::RunOptions options;
  options.cancel = &cancel_token();
  options.on_logits = [&](int64_t position, std::span<const float> logits) {
    const size_t next = static_cast<size_t>(position) + 1;
    if (next < window.size()) sum += negative_log_likelihood(logits, window[next]);
    on_position(position);
    return true;
  };
  must(session.truncate(0));
  must(session.prefill(window, options));
  return sum / static_cast<double>(window.size() - 1);
}

int run(const PerplexityArgs& args) {
  apply(args.output);
  if (!args.prompt.given()) usage_error("perplexity needs -f, --tokens or -p");
  fathom::Config config = make_config(args.config);
  if (!config.context_max) config.context_max = args.window;
  const Loaded loaded = load_model(args.model, config, args.config);
  const std::vector<int32_t> tokens = text_tokens(args, loaded.model.tokenizer());
  if (tokens.size() < 2) usage_error("the text has fewer than two tokens");

  const int64_t n_tokens = static_cast<int64_t>(tokens.size());
  const int64_t window = std::min(args.window, n_tokens);
  const int64_t n_windows = n_tokens / window;
  if (n_tokens % window != 0)
    note(fmt::format("note: the last {} tokens do not fill a window and are left out",
                     n_tokens % window));
  fathom::Session session = must(fathom::Session::create(loaded.model));
  Progress bar("perplexity", Progress::Unit::kTokens);
  const double start = now_seconds();
  std::vector<double> nlls;
  for (int64_t w = 0; w < n_windows; ++w) {
    const auto part =
        std::span(tokens).subspan(static_cast<size_t>(w * window), static_cast<size_t>(window));
    nlls.push_back(window_nll(session, part, [&](int64_t position) {
      bar.update(w * window + position + 1, n_windows * window);
    }));
    detail(fmt::format("window {} of {}: nll {:.6f}", w + 1, n_windows, nlls.back()));
  }
  const double seconds = now_seconds() - start;
  double nll = 0;
  for (double value : nlls) nll += value / static_cast<double>(n_windows);

  if (args.output.json)
    put_json({{"perplexity", std::exp(nll)},
              {"nll", nll},
              {"window_tokens", window},
              {"windows", nlls},
              {"tokens", n_windows * window},
              {"tokens_per_second", rate(n_windows * window, seconds)},
              {"memory", memory_json(loaded.engine, loaded.plan)}});
  else
    put(fmt::format("perplexity {:.4f}  nll {:.6f}  {} windows of {} tokens  {:.1f} tok/s\n",
                    std::exp(nll), nll, n_windows, window, rate(n_windows * window, seconds)));
  return kExitOk;
}

}  // namespace

void add_perplexity(CLI::App& app, Action& action) {
  auto args = std::make_shared<PerplexityArgs>();
  CLI::App* command = app.add_subcommand(
      "perplexity", "Perplexity of a text, over windows that do not overlap, nothing prepended");
  add_model_flag(*command, args->model);
  add_prompt_flags(*command, args->prompt);
  command->add_option("-c,--ctx-size", args->window, "tokens of a window")
      ->capture_default_str()
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 30));
  add_config_flags(*command, args->config, false);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
