// fathom bench: prefill and decode rates at given depths of context, and what they are measured
// against - the bytes that a token moves, and the read bandwidth of this machine, measured in the
// same run with the same number of threads.
//
// The text before each measurement is made of random tokens, prefilled once and extended from
// depth to depth.  Every figure is the best of --repeat runs, with the spread beside it.
#include <algorithm>
#include <memory>
#include <random>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "fathom/inspect.hpp"
#include "loading.h"
#include "machine.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

struct BenchArgs {
  std::string model;
  std::vector<int64_t> prompts{512}, depths{0};
  int64_t n_predict = 32;
  int repeat = 3;
  uint64_t seed = 0;
  ConfigFlags config;
  OutputFlags output;
};

struct Measured {
  std::string kind;  // "prefill" or "decode"
  int64_t depth = 0, tokens = 0;
  double best_seconds = 0, worst_seconds = 0;
  double bytes_per_token = 0;  // decode: weights and cache read for one token
  double flops_per_token = 0;  // of the products with active weights

  double best_tps() const { return rate(tokens, best_seconds); }
  double worst_tps() const { return rate(tokens, worst_seconds); }
};

// Bytes of weights that one token reads: all but the embedding table, of which it is one row, and
// of the routed experts those that are chosen.
int64_t active_weight_bytes(const Loaded& loaded, const fathom::FileInfo& info) {
  const fathom::ModelConfig& c = loaded.model.config();
  int64_t bytes = 0, embedding = 0;
  for (const fathom::PlanDevice& device : loaded.plan.devices) {
    bytes += device.planned(fathom::Purpose::kWeights);
    if (c.n_routed_experts > 0)
      bytes +=
          device.planned(fathom::Purpose::kExperts) * c.num_experts_per_tok / c.n_routed_experts;
  }
  for (const fathom::TensorEntry& tensor : info.tensors)
    if (tensor.name == "token_embd.weight" || tensor.name == "model.embed_tokens.weight")
      embedding = tensor.bytes;
  return bytes - (c.tie_word_embeddings ? 0 : embedding);
}

std::vector<int32_t> random_tokens(std::mt19937_64& random, int64_t n, int64_t vocab_size) {
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  for (int32_t& id : tokens)
    id = static_cast<int32_t>(random() % static_cast<uint64_t>(vocab_size));
  return tokens;
}

// Best and worst time of `work` over the repeats; `before` is not timed.
template <class Before, class Work>
void time_runs(int repeat, Measured& m, const Before& before, const Work& work) {
  for (int run = 0; run < repeat; ++run) {
    before();
    const double start = now_seconds();
    work();
    const double seconds = now_seconds() - start;
    m.best_seconds = run == 0 ? seconds : std::min(m.best_seconds, seconds);
    m.worst_seconds = std::max(m.worst_seconds, seconds);
  }
}

std::vector<Measured> measure(const BenchArgs& args, const Loaded& loaded, int64_t weight_bytes) {
  std::mt19937_64 random(args.seed);
  const int64_t vocab_size = loaded.model.config().vocab_size;
  const double flops = 2.0 * static_cast<double>(loaded.model.n_params_active());
  fathom::RunOptions options;
  options.cancel = &cancel_token();
  fathom::Session session = must(fathom::Session::create(loaded.model));
  std::vector<Measured> results;
  for (const int64_t depth : args.depths) {
    if (depth > session.n_tokens())
      must(prefill(session, random_tokens(random, depth - session.n_tokens(), vocab_size)));
    for (const int64_t n : args.prompts) {
      const std::vector<int32_t> tokens = random_tokens(random, n, vocab_size);
      Measured m{.kind = "prefill", .depth = depth, .tokens = n, .flops_per_token = flops};
      time_runs(
          args.repeat, m, [&] { must(session.truncate(depth)); },
          [&] { must(session.prefill(tokens, options)); });
      must(session.truncate(depth));
      results.push_back(m);
      detail(fmt::format("prefill {} at depth {}: {:.1f} tok/s", n, depth, m.best_tps()));
    }
    if (args.n_predict > 0) {
      const std::vector<int32_t> tokens = random_tokens(random, args.n_predict, vocab_size);
      Measured m{
          .kind = "decode", .depth = depth, .tokens = args.n_predict, .flops_per_token = flops};
      // The mean row count over the steps, times the bytes of a row in all layers.
      m.bytes_per_token =
          static_cast<double>(weight_bytes) +
          static_cast<double>(loaded.plan.kv_bytes_per_token) *
              (static_cast<double>(depth) + static_cast<double>(args.n_predict + 1) / 2);
      time_runs(
          args.repeat, m, [&] { must(session.truncate(depth)); },
          [&] {
            for (int32_t id : tokens) {
              if (cancel_token().requested()) throw Exit{signal_exit_code()};
              must(session.step(id));
            }
          });
      must(session.truncate(depth));
      results.push_back(m);
      detail(
          fmt::format("decode {} at depth {}: {:.1f} tok/s", args.n_predict, depth, m.best_tps()));
    }
  }
  return results;
}

Json to_json(const BenchArgs& args, const Loaded& loaded, const ReadBandwidth& bandwidth,
             int64_t weight_bytes, const std::vector<Measured>& results, const Json& memory) {
  Json list = Json::array();
  for (const Measured& m : results) {
    Json row = {{"kind", m.kind},
                {"depth", m.depth},
                {"tokens", m.tokens},
                {"tps", m.best_tps()},
                {"tps_worst", m.worst_tps()},
                {"gflops", m.best_tps() * m.flops_per_token / 1e9}};
    if (m.kind == "decode") {
      row["bytes_per_token"] = static_cast<int64_t>(m.bytes_per_token);
      row["bytes_per_second"] = m.best_tps() * m.bytes_per_token;
      row["bandwidth_share"] =
          bandwidth.best > 0 ? Json(m.best_tps() * m.bytes_per_token / bandwidth.best) : nullptr;
    }
    list.push_back(row);
  }
  return {{"model", args.model},
          {"device", loaded.engine.device(0).describe()},
          {"threads", bandwidth.threads},
          {"repeat", args.repeat},
          {"active_weight_bytes", weight_bytes},
          {"kv_bytes_per_token", loaded.plan.kv_bytes_per_token},
          {"read_bandwidth",
           {{"bytes_per_second", bandwidth.best},
            {"worst", bandwidth.worst},
            {"buffer_bytes", bandwidth.buffer_bytes}}},
          {"timings", {{"load_s", loaded.load_seconds}}},
          {"results", list},
          {"memory", memory}};
}

std::string to_table(const Loaded& loaded, const ReadBandwidth& bandwidth, int64_t weight_bytes,
                     const std::vector<Measured>& results) {
  std::string text = fmt::format(
      "{}\nmachine: {:.2f} GB/s read by {} threads over {}\n"
      "a token reads {} of weights and {} bytes per cached token; {:.2f} s to load\n"
      "{:<8} {:>8} {:>7} {:>10} {:>10} {:>10} {:>9} {:>7}\n",
      loaded.engine.device(0).describe(), bandwidth.best / 1e9, bandwidth.threads,
      human_bytes(bandwidth.buffer_bytes), human_bytes(weight_bytes),
      with_commas(loaded.plan.kv_bytes_per_token), loaded.load_seconds, "what", "depth", "tokens",
      "tok/s", "worst", "GFLOP/s", "GB/s", "share");
  for (const Measured& m : results) {
    text +=
        fmt::format("{:<8} {:>8} {:>7} {:>10.2f} {:>10.2f} {:>10.1f}", m.kind, m.depth, m.tokens,
                    m.best_tps(), m.worst_tps(), m.best_tps() * m.flops_per_token / 1e9);
    if (m.kind == "decode" && bandwidth.best > 0)
      text += fmt::format(" {:>9.2f} {:>6.1f}%", m.best_tps() * m.bytes_per_token / 1e9,
                          100 * m.best_tps() * m.bytes_per_token / bandwidth.best);
    text += "\n";
  }
  if (std::any_of(results.begin(), results.end(), [&bandwidth](const Measured& m) {
        return m.best_tps() * m.bytes_per_token > bandwidth.best;
      }))
    text += "a share above 100%: what a token reads stays in the processor's caches\n";
  return text;
}

int run(BenchArgs args) {
  apply(args.output);
  std::sort(args.depths.begin(), args.depths.end());
  fathom::Config config = make_config(args.config);
  if (!config.context_max && !args.config.context_of_model()) {
    const int64_t longest = *std::max_element(args.prompts.begin(), args.prompts.end());
    config.context_max = args.depths.back() + std::max({longest, args.n_predict, int64_t{1}});
  }
  const fathom::FileInfo info = must(fathom::inspect_file(args.model));
  const Loaded loaded = load_model(args.model, config, args.config);
  const int64_t weight_bytes = active_weight_bytes(loaded, info);
  const int threads = config.threads > 0 ? static_cast<int>(config.threads) : usable_processors();
  const std::vector<Measured> results = measure(args, loaded, weight_bytes);
  const Json memory = memory_json(loaded.engine, loaded.plan);  // without the loop's buffer
  const ReadBandwidth bandwidth = measure_read_bandwidth(threads);
  if (args.output.json)
    put_json(to_json(args, loaded, bandwidth, weight_bytes, results, memory));
  else
    put(to_table(loaded, bandwidth, weight_bytes, results));
  return kExitOk;
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  auto args = std::make_shared<BenchArgs>();
  CLI::App* command = app.add_subcommand(
      "bench", "Prefill and decode rates at given depths, against the machine's read bandwidth");
  add_model_flag(*command, args->model);
  command->add_option("-p,--prompt-tokens", args->prompts, "prefill lengths: 512,2048")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("-n,--predict", args->n_predict, "tokens to decode; 0: none")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("-d,--depth", args->depths, "tokens in the cache before: 0,4096,16384")
      ->delimiter(',')
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("-r,--repeat", args->repeat, "runs of each measurement")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("-s,--seed", args->seed, "of the random tokens")->capture_default_str();
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
