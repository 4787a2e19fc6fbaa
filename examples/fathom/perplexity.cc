// fathom perplexity: how well a model predicts a text.
//
// The text is cut into windows of N tokens that do not overlap; each is read into an empty session
// with nothing put before it, so its first token is not predicted.  nll is the mean over the
// windows of each one's mean negative log-likelihood, perplexity its exponential.
//
// --save-logits keeps the logits of all positions; a second run with --kl-base compares itself with
// them: the mean over all positions of the divergence KL(base || this run), and how often both
// put the same token first.
#include <algorithm>
#include <cmath>
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "f32_file.h"
#include "input.h"
#include "loading.h"
#include "logits.h"
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
  std::string save_logits, kl_base;
};

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

// Where logits go besides the loss; each may be absent.
struct LogitsFiles {
  std::unique_ptr<F32File> save;
  std::unique_ptr<F32Reader> base;
  std::vector<float> base_row;          // [vocab_size]
  std::vector<double> divergence = {};  // of every position so far, with a base
  int64_t same_first = 0;               // positions at which both put the same token first

  bool take(std::span<const float> logits) {
    if (save && !save->append(logits)) return false;
    if (!base) return true;
    if (!base->next(base_row)) return false;
    divergence.push_back(kl_divergence(base_row, logits));
    same_first += first_token(base_row) == first_token(logits) ? 1 : 0;
    return true;
  }
  void check() {
    if (save && save->failed()) save->close();
    if (base) base->check();
  }
};

// Mean over positions 1.. of one window.
double window_nll(fathom::Session& session, std::span<const int32_t> window, LogitsFiles& files,
                  const std::function<void(int64_t)>& on_position) {
  double sum = 0;
  fathom::RunOptions options;
  options.cancel = &cancel_token();
  options.on_logits = [&](int64_t position, std::span<const float> logits) {
    const size_t next = static_cast<size_t>(position) + 1;
    if (next < window.size()) sum += negative_log_likelihood(logits, window[next]);
    on_position(position);
    return files.take(logits);
  };
  must(session.truncate(0));
  fathom::Status status = session.prefill(window, options);
  files.check();
  must(std::move(status));
  return sum / static_cast<double>(window.size() - 1);
}

// What comparing with the base gave.
struct Divergence {
  double mean, deviation, p99, worst;  // deviation: of the mean, one standard error
  double same_first;                   // share of the positions
};

Divergence divergence_of(LogitsFiles& files) {
  std::vector<double>& all = files.divergence;
  const double n = static_cast<double>(all.size());
  Divergence d{};
  for (double value : all) d.mean += value / n;
  for (double value : all) d.deviation += (value - d.mean) * (value - d.mean) / n;
  d.deviation = std::sqrt(d.deviation / n);
  std::sort(all.begin(), all.end());
  d.p99 = all[static_cast<size_t>(0.99 * (n - 1))];
  d.worst = all.back();
  d.same_first = static_cast<double>(files.same_first) / n;
  return d;
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
  const int64_t vocab_size = loaded.model.config().vocab_size;
  LogitsFiles files;
  if (!args.kl_base.empty()) {
    files.base = std::make_unique<F32Reader>(args.kl_base, n_windows * window * vocab_size);
    files.base_row.resize(static_cast<size_t>(vocab_size));
  }
  if (!args.save_logits.empty()) files.save = std::make_unique<F32File>(args.save_logits);
  fathom::Session session = must(fathom::Session::create(loaded.model));
  Progress bar("perplexity", Progress::Unit::kTokens);
  const double start = now_seconds();
  std::vector<double> nlls;
  for (int64_t w = 0; w < n_windows; ++w) {
    const auto part =
        std::span(tokens).subspan(static_cast<size_t>(w * window), static_cast<size_t>(window));
    nlls.push_back(window_nll(session, part, files, [&](int64_t position) {
      bar.update(w * window + position + 1, n_windows * window);
    }));
    detail(fmt::format("window {} of {}: nll {:.6f}", w + 1, n_windows, nlls.back()));
  }
  const double seconds = now_seconds() - start;
  double nll = 0;
  for (double value : nlls) nll += value / static_cast<double>(n_windows);

  if (files.save) files.save->close();

  Json json = {{"perplexity", std::exp(nll)},
               {"nll", nll},
               {"window_tokens", window},
               {"windows", nlls},
               {"tokens", n_windows * window},
               {"tokens_per_second", rate(n_windows * window, seconds)},
               {"memory", memory_json(loaded.engine)}};
  std::string text =
      fmt::format("perplexity {:.4f}  nll {:.6f}  {} windows of {} tokens  {:.1f} tok/s\n",
                  std::exp(nll), nll, n_windows, window, rate(n_windows * window, seconds));
  if (files.base) {
    const Divergence d = divergence_of(files);
    json["kl"] = {{"mean", d.mean},
                  {"standard_error", d.deviation},
                  {"p99", d.p99},
                  {"max", d.worst},
                  {"same_first", d.same_first}};
    text += fmt::format(
        "KL against {}: mean {:.6f} +- {:.6f}  99 % {:.6f}  max {:.6f}  same first token {:.3f} "
        "%\n",
        args.kl_base, d.mean, d.deviation, d.p99, d.worst, d.same_first * 100);
  }
  if (args.output.json)
    put_json(json);
  else
    put(text);
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
  command->add_option("--save-logits", args->save_logits,
                      "keep the logits of all positions: float32 [n, vocab], for --kl-base");
  command->add_option("--kl-base", args->kl_base,
                      "logits that an earlier run over the same text saved: report the divergence "
                      "KL(base || this run)");
  add_config_flags(*command, args->config, false);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
