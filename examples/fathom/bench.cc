// fathom bench: prefill, decode and batch rates at given depths of context, and what they are
// measured against - bytes moved and operations done, the read bandwidth and the rate of f32
// multiply-adds of this machine, measured in the same run with the same number of threads.
//
// The text before each measurement is made of random tokens, prefilled once and extended from
// depth to depth.  Every figure is the best of --repeat runs, with the worst beside it.
#include <algorithm>
#include <cmath>
#include <map>
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
  std::vector<int64_t> prompts{512}, depths{0}, batches{};
  int64_t n_predict = 32;
  int repeat = 3;
  bool profile = false;
  uint64_t seed = 0;
  ConfigFlags config;
  OutputFlags output;
};

// Calls and seconds of each operation.
struct OpTotal {
  int64_t calls = 0;
  double seconds = 0;
};
using Profile = std::map<std::string, OpTotal, std::less<>>;

struct Measured {
  std::string kind;  // "prefill", "decode" or "batch": decode of `sessions` texts at once
  int64_t depth = 0, tokens = 0, sessions = 1;
  double best_seconds = 0, worst_seconds = 0;
  double bytes_per_token = 0;  // weights and cache read, divided by the tokens that share them
  double flops_per_token = 0;  // of the products with active weights
  double busy = 0;             // processor time of the best run, of what the threads could have had
  Profile profile;             // of the best run

  int64_t n_tokens() const { return tokens * sessions; }
  double best_tps() const { return rate(n_tokens(), best_seconds); }
  double worst_tps() const { return rate(n_tokens(), worst_seconds); }
};

// What the rates are measured against.
struct Limits {
  ReadBandwidth bandwidth;
  double flops = 0;  // f32, all threads; 0: not known
  int threads = 1;

  // The better of what was found and what is found now: others may use the machine.
  void measure() {
    const ReadBandwidth now = measure_read_bandwidth(threads);
    if (now.best > bandwidth.best) bandwidth = now;
    flops = std::max(flops, measure_multiply_rate(threads));
  }
};

// Weights of a model by how they are read.
struct WeightBytes {
  double dense = 0;    // all but the embedding table, of which a token reads one row
  double experts = 0;  // all routed experts
  double used_experts(const fathom::ModelConfig& c, int64_t n_tokens) const {
    if (c.n_routed_experts == 0) return 0;
    // Experts that at least one of n tokens chooses, if all are chosen alike.
    const double share =
        static_cast<double>(c.num_experts_per_tok) / static_cast<double>(c.n_routed_experts);
    return experts * (1 - std::pow(1 - share, static_cast<double>(n_tokens)));
  }
};

WeightBytes weight_bytes(const Loaded& loaded, const fathom::FileInfo& info) {
  WeightBytes bytes;
  for (const fathom::PlanDevice& device : loaded.plan.devices) {
    bytes.dense += static_cast<double>(device.planned(fathom::Purpose::kWeights));
    bytes.experts += static_cast<double>(device.planned(fathom::Purpose::kExperts));
  }
  if (loaded.model.config().tie_word_embeddings) return bytes;
  for (const fathom::TensorEntry& tensor : info.tensors)
    if (tensor.name == "token_embd.weight" || tensor.name == "model.embed_tokens.weight")
      bytes.dense -= static_cast<double>(tensor.bytes);
  return bytes;
}

class Bench {
 public:
  Bench(const BenchArgs& args, const Loaded& loaded, const WeightBytes& weights, int threads,
        Profile& profile)
      : args_(args),
        loaded_(loaded),
        weights_(weights),
        threads_(threads),
        profile_(profile),
        random_(args.seed),
        session_(must(fathom::Session::create(loaded.model))) {
    options_.cancel = &cancel_token();
  }

  std::vector<Measured> run() {
    for (const int64_t depth : args_.depths) {
      if (depth > session_.n_tokens())
        must(prefill(session_, random_tokens(depth - session_.n_tokens())));
      for (const int64_t n : args_.prompts) results_.push_back(measure_prefill(depth, n));
      if (args_.n_predict > 0) results_.push_back(measure_decode(depth));
    }
    for (const int64_t n : args_.batches) results_.push_back(measure_batch(n));
    return std::move(results_);
  }

 private:
  const fathom::ModelConfig& config() const { return loaded_.model.config(); }
  double row_bytes() const { return static_cast<double>(loaded_.plan.kv_bytes_per_token); }

  std::vector<int32_t> random_tokens(int64_t n) {
    std::vector<int32_t> tokens(static_cast<size_t>(n));
    for (int32_t& id : tokens)
      id = static_cast<int32_t>(random_() % static_cast<uint64_t>(config().vocab_size));
    return tokens;
  }

  Measured begin(std::string kind, int64_t depth, int64_t tokens, int64_t sessions = 1) const {
    Measured m;
    m.kind = std::move(kind);
    m.depth = depth;
    m.tokens = tokens;
    m.sessions = sessions;
    m.flops_per_token = 2.0 * static_cast<double>(loaded_.model.n_params_active());
    return m;
  }

  // Best and worst time of `work` over the repeats; `before` is not timed.
  template <class Before, class Work>
  void time_runs(Measured& m, const Before& before, const Work& work) {
    for (int run = 0; run < args_.repeat; ++run) {
      before();
      profile_.clear();
      const double start = now_seconds(), used = process_seconds();
      work();
      const double seconds = now_seconds() - start;
      m.worst_seconds = std::max(m.worst_seconds, seconds);
      if (run > 0 && seconds >= m.best_seconds) continue;
      m.best_seconds = seconds;
      m.busy = (process_seconds() - used) / seconds / threads_;
      m.profile = profile_;
    }
    detail(fmt::format("{} {} at depth {}: {:.1f} tok/s", m.kind, m.tokens, m.depth, m.best_tps()));
  }

  Measured measure_prefill(int64_t depth, int64_t n) {
    Measured m = begin("prefill", depth, n);
    const int64_t chunk = loaded_.plan.prefill_chunk;
    double bytes = 0;
    for (int64_t first = 0; first < n; first += chunk) {
      const int64_t rows = std::min(chunk, n - first);
      bytes += weights_.dense + weights_.used_experts(config(), rows) +
               row_bytes() * static_cast<double>(depth + first + rows);
    }
    m.bytes_per_token = bytes / static_cast<double>(n);
    const std::vector<int32_t> tokens = random_tokens(n);
    time_runs(
        m, [&] { must(session_.truncate(depth)); },
        [&] { must(session_.prefill(tokens, options_)); });
    must(session_.truncate(depth));
    return m;
  }

  Measured measure_decode(int64_t depth) {
    Measured m = begin("decode", depth, args_.n_predict);
    // The mean row count over the steps, times the bytes of a row in all layers.
    m.bytes_per_token =
        weights_.dense + weights_.used_experts(config(), 1) +
        row_bytes() * (static_cast<double>(depth) + static_cast<double>(args_.n_predict + 1) / 2);
    const std::vector<int32_t> tokens = random_tokens(args_.n_predict);
    time_runs(
        m, [&] { must(session_.truncate(depth)); },
        [&] {
          for (int32_t id : tokens) {
            check_cancelled();
            must(session_.step(id));
          }
        });
    must(session_.truncate(depth));
    return m;
  }

  // n texts that begin with one token each.
  Measured measure_batch(int64_t n) {
    const int64_t steps = std::max<int64_t>(args_.n_predict, 1);
    Measured m = begin("batch", 0, steps, n);
    m.bytes_per_token =
        (weights_.dense + weights_.used_experts(config(), n)) / static_cast<double>(n) +
        row_bytes() * static_cast<double>(steps + 1) / 2;
    std::vector<fathom::Session> sessions;
    std::vector<fathom::Session*> batch;
    for (int64_t i = 0; i < n; ++i)
      sessions.push_back(must(fathom::Session::create(loaded_.model, {.max_tokens = steps + 1})));
    for (fathom::Session& session : sessions) batch.push_back(&session);
    const std::vector<int32_t> tokens = random_tokens(n);
    time_runs(
        m,
        [&] {
          for (fathom::Session& session : sessions) must(session.truncate(0));
          must(fathom::Session::step_batch(batch, tokens));
        },
        [&] {
          for (int64_t step = 0; step < steps; ++step) {
            check_cancelled();
            must(fathom::Session::step_batch(batch, random_tokens(n)));
          }
        });
    return m;
  }

  static void check_cancelled() {
    if (cancel_token().requested()) throw Exit{signal_exit_code()};
  }

  const BenchArgs& args_;
  const Loaded& loaded_;
  const WeightBytes weights_;
  const int threads_;
  Profile& profile_;
  std::mt19937_64 random_;
  fathom::Session session_;
  fathom::RunOptions options_;
  std::vector<Measured> results_;
};

Json profile_json(const Measured& m) {
  Json ops = Json::object();
  for (const auto& [op, total] : m.profile)
    ops[op] = {{"calls", total.calls}, {"seconds", total.seconds}};
  return ops;
}

Json to_json(const BenchArgs& args, const Loaded& loaded, const Limits& limits, double active_bytes,
             const std::vector<Measured>& results, const Json& memory) {
  Json list = Json::array();
  const auto share = [](double value, double of) {
    return of > 0 ? Json(value / of) : Json(nullptr);
  };
  for (const Measured& m : results) {
    const double flops = m.best_tps() * m.flops_per_token, bytes = m.best_tps() * m.bytes_per_token;
    Json row = {{"kind", m.kind},
                {"depth", m.depth},
                {"tokens", m.tokens},
                {"tps", m.best_tps()},
                {"tps_worst", m.worst_tps()},
                {"gflops", flops / 1e9},
                {"f32_peak_share", share(flops, limits.flops)},
                {"bytes_per_token", static_cast<int64_t>(m.bytes_per_token)},
                {"bytes_per_second", bytes},
                {"bandwidth_share", share(bytes, limits.bandwidth.best)},
                {"busy", m.busy}};
    if (m.kind == "batch") row["sessions"] = m.sessions;
    if (args.profile) row["operations"] = profile_json(m);
    list.push_back(row);
  }
  return {{"model", args.model},
          {"device", loaded.engine.device(0).describe()},
          {"threads", limits.threads},
          {"repeat", args.repeat},
          {"active_weight_bytes", static_cast<int64_t>(active_bytes)},
          {"kv_bytes_per_token", loaded.plan.kv_bytes_per_token},
          {"read_bandwidth",
           {{"bytes_per_second", limits.bandwidth.best},
            {"worst", limits.bandwidth.worst},
            {"buffer_bytes", limits.bandwidth.buffer_bytes}}},
          {"f32_peak_gflops", limits.flops / 1e9},
          {"timings", {{"load_s", loaded.load_seconds}}},
          {"results", list},
          {"memory", memory}};
}

// Shares of the time of one run, the largest first.
std::string profile_text(const Measured& m) {
  std::vector<std::pair<std::string, OpTotal>> ops(m.profile.begin(), m.profile.end());
  std::sort(ops.begin(), ops.end(),
            [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  std::string text =
      fmt::format("{} {} at depth {}, {:.2f} ms:", m.kind, m.tokens, m.depth, m.best_seconds * 1e3);
  double rest = m.best_seconds;
  for (const auto& [op, total] : ops) {
    text += fmt::format("  {} {:.1f}% ({} x {:.1f} us)", op, 100 * total.seconds / m.best_seconds,
                        total.calls, total.seconds / static_cast<double>(total.calls) * 1e6);
    rest -= total.seconds;
  }
  return text + fmt::format("  outside {:.1f}%\n", 100 * rest / m.best_seconds);
}

std::string to_table(const BenchArgs& args, const Loaded& loaded, const Limits& limits,
                     double active_bytes, const std::vector<Measured>& results) {
  std::string text = fmt::format(
      "{}\nmachine: {:.2f} GB/s read by {} threads over {}, {:.1f} GFLOP/s of f32 multiply-adds\n"
      "a token reads {} of weights and {} bytes per cached token; {:.2f} s to load, {:.0f} MB/s\n"
      "{:<8} {:>8} {:>7} {:>10} {:>10} {:>9} {:>9} {:>9} {:>7} {:>6}\n",
      loaded.engine.device(0).describe(), limits.bandwidth.best / 1e9, limits.threads,
      human_bytes(limits.bandwidth.buffer_bytes), limits.flops / 1e9,
      human_bytes(static_cast<int64_t>(active_bytes)), with_commas(loaded.plan.kv_bytes_per_token),
      loaded.load_seconds,
      static_cast<double>(loaded.model.weight_bytes()) / loaded.load_seconds / 1e6, "what", "depth",
      "tokens", "tok/s", "worst", "GFLOP/s", "f32 peak", "GB/s", "share", "busy");
  bool cached = false;
  for (const Measured& m : results) {
    const double flops = m.best_tps() * m.flops_per_token, bytes = m.best_tps() * m.bytes_per_token;
    const std::string tokens = m.sessions > 1 || m.kind == "batch"
                                   ? fmt::format("{}x{}", m.sessions, m.tokens)
                                   : fmt::format("{}", m.tokens);
    text += fmt::format(
        "{:<8} {:>8} {:>7} {:>10.2f} {:>10.2f} {:>9.1f} {:>8.1f}% {:>9.2f} "
        "{:>6.1f}% {:>5.0f}%\n",
        m.kind, m.depth, tokens, m.best_tps(), m.worst_tps(), flops / 1e9,
        limits.flops > 0 ? 100 * flops / limits.flops : 0, bytes / 1e9,
        limits.bandwidth.best > 0 ? 100 * bytes / limits.bandwidth.best : 0, 100 * m.busy);
    cached = cached || (m.kind == "decode" && bytes > limits.bandwidth.best);
  }
  text +=
      "share: of the read bandwidth; f32 peak: integer and bf16 kernels can pass it; busy: "
      "processor time had, of all threads\n";
  if (cached) text += "a share above 100%: what a token reads stays in the processor's caches\n";
  if (args.profile)
    for (const Measured& m : results) text += profile_text(m);
  return text;
}

int run(BenchArgs args) {
  apply(args.output);
  std::sort(args.depths.begin(), args.depths.end());
  fathom::Config config = make_config(args.config);
  if (!config.context_max && !args.config.context_of_model()) {
    const int64_t longest = *std::max_element(args.prompts.begin(), args.prompts.end());
    config.context_max = args.depths.back() + std::max({longest, args.n_predict + 1, int64_t{1}});
  }
  for (const int64_t n : args.batches)  // one more: the texts of the other measurements
    config.sessions_max = std::max(config.sessions_max, n + 1);
  Limits limits;
  limits.threads = config.threads > 0 ? static_cast<int>(config.threads) : usable_processors();
  limits.flops = measure_multiply_rate(limits.threads);
  Profile profile;
  fathom::OpObserver observer;
  if (args.profile)
    observer = [&profile](const fathom::OpTime& time) {
      auto at = profile.find(time.op);
      if (at == profile.end()) at = profile.emplace(time.op, OpTotal{}).first;
      ++at->second.calls;
      at->second.seconds += time.seconds;
    };
  const fathom::FileInfo info = must(fathom::inspect_file(args.model));
  const Loaded loaded = load_model(args.model, config, args.config, nullptr, std::move(observer));
  const WeightBytes weights = weight_bytes(loaded, info);
  const double active = weights.dense + weights.used_experts(loaded.model.config(), 1);
  const std::vector<Measured> results = Bench(args, loaded, weights, limits.threads, profile).run();
  const Json memory = memory_json(loaded.engine);  // without the loop's buffer
  limits.measure();
  if (args.output.json)
    put_json(to_json(args, loaded, limits, active, results, memory));
  else
    put(to_table(args, loaded, limits, active, results));
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
  command
      ->add_option("--batch", args->batches,
                   "texts to decode at once, at depth 0: 1,2,4,8; rates are of all together")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024));
  command->add_option("-r,--repeat", args->repeat, "runs of each measurement")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_flag("--profile", args->profile, "the time of each operation");
  command->add_option("-s,--seed", args->seed, "of the random tokens")->capture_default_str();
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
