// fathom retrieval: how reliably a model finds what was planted in long texts.
//
// The file has one JSON object a line: {"kind": text, "tokens": [ids], "answer": [ids]}.  Each
// prompt is read into an empty session; it is found when greedy decoding gives the whole answer.
// The loss is the mean over the answer's tokens with the ones before them given, so it tells
// settings apart that all find the answer.
#include <algorithm>
#include <map>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "exit.h"
#include "input.h"
#include "loading.h"
#include "logits.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

struct RetrievalArgs {
  std::string model, file;
  std::vector<int64_t> lengths;
  std::vector<std::string> kinds;
  ConfigFlags config;
  OutputFlags output;
};

struct Needle {
  std::string kind;
  std::vector<int32_t> tokens, answer;
  bool found = false;
  double nll = 0;

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
};

std::vector<int32_t> ids_of(const nlohmann::json& json) {
  std::vector<int32_t> ids;
  for (const nlohmann::json& value : json) {
    if (!value.is_number_integer() || value < INT32_MIN || value > INT32_MAX)
      throw std::invalid_argument("not a token id");
    ids.push_back(value.get<int32_t>());
  }
  return ids;
}

Needle parse_needle(std::string_view line, const std::string& where) {
  try {
    const nlohmann::json json = nlohmann::json::parse(line);
    Needle needle{json.at("kind"), ids_of(json.at("tokens")), ids_of(json.at("answer"))};
    if (!needle.tokens.empty() && !needle.answer.empty()) return needle;
  } catch (const std::exception&) {
    // Said below, with the place.
  }
  usage_error(where + R"(: expected {"kind": text, "tokens": [ids], "answer": [ids]})");
}

// The prompts of the file whose kind and length are wanted.
std::vector<Needle> read_needles(const RetrievalArgs& args) {
  const auto wanted = [](const auto& list, const auto& value) {
    return list.empty() || std::find(list.begin(), list.end(), value) != list.end();
  };
  const std::string text = read_text(args.file);
  std::vector<Needle> needles;
  int64_t line = 1;
  for (size_t begin = 0; begin < text.size(); ++line) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view part = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    if (part.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    Needle needle = parse_needle(part, fmt::format("{}, line {}", args.file, line));
    if (wanted(args.kinds, needle.kind) && wanted(args.lengths, needle.length()))
      needles.push_back(std::move(needle));
  }
  if (needles.empty()) usage_error(args.file + " has no such prompts");
  // By length, so that progress is even and a budget that is too small shows last.
  std::stable_sort(needles.begin(), needles.end(),
                   [](const Needle& a, const Needle& b) { return a.length() < b.length(); });
  return needles;
}

// Reads the prompt, then the answer token by token.
void ask(fathom::Session& session, Needle& needle,
         const std::function<void(int64_t)>& on_progress) {
  fathom::RunOptions options;
  options.cancel = &cancel_token();
  options.progress = [&](fathom::ProgressPhase, int64_t done, int64_t) {
    on_progress(done);
    return true;
  };
  must(session.truncate(0));
  must(session.prefill(needle.tokens, options));
  needle.found = true;
  for (size_t i = 0; i < needle.answer.size(); ++i) {
    if (i > 0) must(session.step(needle.answer[i - 1]));
    const std::span<const float> logits = session.logits();
    needle.found = needle.found && first_token(logits) == needle.answer[i];
    needle.nll += negative_log_likelihood(logits, needle.answer[i]) /
                  static_cast<double>(needle.answer.size());
  }
}

// Found, asked and mean loss of some prompts.
struct Score {
  int64_t found = 0, asked = 0;
  double nll_sum = 0;

  void add(const Needle& needle) {
    found += needle.found ? 1 : 0;
    ++asked;
    nll_sum += needle.nll;
  }
  double accuracy() const { return static_cast<double>(found) / static_cast<double>(asked); }
  double nll() const { return nll_sum / static_cast<double>(asked); }
  std::string text() const { return asked == 0 ? "-" : fmt::format("{}/{}", found, asked); }
  Json json() const {
    return {{"found", found}, {"asked", asked}, {"accuracy", accuracy()}, {"nll", nll()}};
  }
};

struct Scores {
  std::map<int64_t, Score> by_length;
  std::map<std::string, std::map<int64_t, Score>> by_kind;
  Score all;

  void add(const Needle& needle) {
    by_length[needle.length()].add(needle);
    by_kind[needle.kind][needle.length()].add(needle);
    all.add(needle);
  }
};

std::string table(const Scores& scores) {
  std::string out = fmt::format("{:<12}", "tokens");
  for (const auto& [length, score] : scores.by_length) out += fmt::format("{:>10}", length);
  out += '\n';
  for (const auto& [kind, by_length] : scores.by_kind) {
    out += fmt::format("{:<12}", kind);
    for (const auto& [length, ignored] : scores.by_length) {
      const auto found = by_length.find(length);
      out += fmt::format("{:>10}", found == by_length.end() ? "-" : found->second.text());
    }
    out += '\n';
  }
  out += fmt::format("{:<12}", "all");
  for (const auto& [length, score] : scores.by_length) out += fmt::format("{:>10}", score.text());
  out += fmt::format("\n{:<12}", "loss");
  for (const auto& [length, score] : scores.by_length) out += fmt::format("{:>10.4f}", score.nll());
  return out + '\n';
}

Json scores_json(const Scores& scores, const std::vector<Needle>& needles) {
  Json lengths = Json::object(), kinds = Json::object(), prompts = Json::array();
  for (const auto& [length, score] : scores.by_length)
    lengths[std::to_string(length)] = score.json();
  for (const auto& [kind, by_length] : scores.by_kind)
    for (const auto& [length, score] : by_length)
      kinds[kind][std::to_string(length)] = score.json();
  for (const Needle& needle : needles)
    prompts.push_back({{"kind", needle.kind},
                       {"length", needle.length()},
                       {"found", needle.found},
                       {"nll", needle.nll}});
  return {
      {"all", scores.all.json()}, {"by_length", lengths}, {"by_kind", kinds}, {"prompts", prompts}};
}

int run(const RetrievalArgs& args) {
  apply(args.output);
  std::vector<Needle> needles = read_needles(args);
  fathom::Config config = make_config(args.config);
  int64_t longest = 0, total = 0;
  for (const Needle& needle : needles) {
    const int64_t n = needle.length() + static_cast<int64_t>(needle.answer.size());
    longest = std::max(longest, n);
    total += needle.length();
  }
  if (!config.context_max && !args.config.context_of_model()) config.context_max = longest;
  const Loaded loaded = load_model(args.model, config, args.config);
  fathom::Session session = must(fathom::Session::create(loaded.model));

  Scores scores;
  Progress bar("retrieval", Progress::Unit::kTokens);
  const double start = now_seconds();
  int64_t done = 0;
  for (Needle& needle : needles) {
    ask(session, needle, [&](int64_t tokens) { bar.update(done + tokens, total); });
    done += needle.length();
    scores.add(needle);
    detail(fmt::format("{} at {}: {}, loss {:.4f}", needle.kind, needle.length(),
                       needle.found ? "found" : "missed", needle.nll));
  }
  bar.update(total, total);
  const double seconds = now_seconds() - start;

  if (args.output.json) {
    Json json = scores_json(scores, needles);
    json["tokens_per_second"] = rate(total, seconds);
    json["memory"] = memory_json(loaded.engine);
    put_json(json);
  } else {
    put(table(scores));
  }
  return kExitOk;
}

}  // namespace

void add_retrieval(CLI::App& app, Action& action) {
  auto args = std::make_shared<RetrievalArgs>();
  CLI::App* command = app.add_subcommand(
      "retrieval", "How often a model finds facts planted in long prompts, by kind and length");
  add_model_flag(*command, args->model);
  command
      ->add_option(
          "-f,--file", args->file,
          R"(prompts, a line each: {"kind": text, "tokens": [ids], "answer": [ids]}; -: stdin)")
      ->required();
  command->add_option("--lengths", args->lengths, "only prompts of so many tokens, as 8192,16384")
      ->delimiter(',');
  command->add_option("--kinds", args->kinds, "only these kinds, as code,who")->delimiter(',');
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
