// cuda_hybrid MODEL PLUGIN TRACED_PLUGIN TOKENS TRACE.json [key=value...]: decodes with attention
// and shared experts on cuda:0 and the routed experts on the CPU, and shows in a timeline that the
// two work at once.  For `cmake/dev test cuda`.
//
// A GPU's queue does not tell when an operation ran, but this does: the shared expert is queued
// before the CPU begins, takes D alone (measured with every operation waited for), and the first
// call that waits for it, when the CPU has finished, waits W.  Of D at least D - W ran meanwhile.
//
// Copies of experts in the card's idle memory (experts.cache) are left out of that, and measured by
// themselves behind it: how many choices find one, and what a token takes then.
//
// The timeline is in the format of chrome://tracing and ui.perfetto.dev.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "fathom/fathom.hpp"
#include "report.h"
#include "support/traced_calls.h"

using namespace fathom;
using test::must;
using test::TracedCall;

namespace {

constexpr double kHiddenShare = 0.5;  // of the shared expert's time

Config config_of(const std::vector<std::string>& settings, const std::string& plugin,
                 const char* copies = "0") {
  Config config;
  must(config.set("experts.cache", copies));
  for (const std::string& setting : settings) {
    const size_t equals = setting.find('=');
    if (equals == setting.npos) test::fail(setting + " is not key=value");
    must(config.set(setting.substr(0, equals), setting.substr(equals + 1)));
  }
  must(config.set("devices", "cuda:0,cpu"));
  must(config.set("cuda.plugin", plugin));
  must(config.set("placement.layers", "cuda:0=*"));
  must(config.set("placement.experts", "cpu=*"));
  return config;
}

// Decodes n tokens behind a short text, and calls `begin` before the first of them and `end` behind
// the last.
template <class Begin, class End>
double decode(const std::string& path, const Config& config, const HostHooks& hooks, int64_t n,
              Begin&& begin, End&& end) {
  const Engine engine = must(Engine::create(config, hooks));
  const Plan plan = must(engine.plan(path));
  must(plan.feasible ? Status() : Status(Code::kBudget, plan.describe()));
  const Model model = must(Model::load(engine, plan));
  Session session = must(Session::create(model));
  must(session.prefill(std::vector<int32_t>(8, 5)));
  must(session.step(6));
  begin();
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < n; ++i)
    must(session.step(static_cast<int32_t>((i * 37 + 11) % model.config().vocab_size)));
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  end(model);
  return seconds;
}
constexpr auto kNothing = [](const Model&) {};

// Mean seconds of the shared expert on the GPU and of the experts on the CPU, each by itself.
struct Alone {
  double shared = 0, experts = 0;
};
Alone measure_alone(const std::string& path, const Config& config, int64_t n) {
  Alone alone;
  int64_t n_shared = 0, n_experts = 0;
  bool counts = false;
  HostHooks hooks;
  hooks.op = [&](const OpTime& op) {
    if (!counts) return;
    if (op.device == 0 && op.op == "ffn") alone.shared += op.seconds, ++n_shared;
    if (op.device == 1 && op.op == "experts") alone.experts += op.seconds, ++n_experts;
  };
  decode(
      path, config, hooks, n, [&] { counts = true; }, kNothing);
  if (n_shared == 0 || n_experts == 0) test::fail("the model has no shared or no routed experts");
  // Dense layers have a network of their own as well; their time is near that of a shared expert's.
  return {alone.shared / double(n_shared), alone.experts / double(n_experts)};
}

class Trace {
 public:
  explicit Trace(TracedCall::Clock::time_point zero) : zero_(zero) {
    name(0, "calls to cuda:0");
    name(1, "cuda:0: shared expert, as long as it takes alone");
    name(2, "cpu: routed experts");
  }
  void add(int row, const std::string& name, TracedCall::Clock::time_point begin, double seconds) {
    events_ += fmt::format(
        ",\n{{\"ph\":\"X\",\"pid\":0,\"tid\":{},\"name\":\"{}\",\"ts\":{:.3f},\"dur\":{:.3f}}}",
        row, name, std::chrono::duration<double>(begin - zero_).count() * 1e6, seconds * 1e6);
  }
  void write(const std::string& path) const {
    std::ofstream file(path);
    file << "{\"traceEvents\":[" << events_.substr(1) << "\n]}\n";
    if (!file.flush()) test::fail(path + " could not be written");
  }

 private:
  void name(int row, const char* text) {
    events_ += fmt::format(
        ",\n{{\"ph\":\"M\",\"pid\":0,\"tid\":{},\"name\":\"thread_name\",\"args\":{{\"name\":\"{}"
        "\"}}}}",
        row, text);
  }
  const TracedCall::Clock::time_point zero_;
  std::string events_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6)
    test::fail("usage: cuda_hybrid MODEL PLUGIN TRACED_PLUGIN TOKENS TRACE.json [key=value...]");
  const std::string path = argv[1], plugin = argv[2], traced = argv[3];
  const int64_t n = std::atoll(argv[4]);
  const std::vector<std::string> settings(argv + 6, argv + argc);

  const Alone alone = measure_alone(path, config_of(settings, plugin), n);

  setenv("FATHOM_TEST_TRACED_PLUGIN", plugin.c_str(), 1);
  void* library = dlopen(traced.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* entry = library != nullptr ? dlsym(library, test::kTracedCallsEntry) : nullptr;
  if (entry == nullptr) test::fail(dlerror());
  const auto take = reinterpret_cast<test::TracedCallsFunction>(entry);
  std::vector<TracedCall> calls;
  const double seconds = decode(
      path, config_of(settings, traced), {}, n, [&] { take(calls); }, kNothing);
  take(calls);

  Trace timeline(calls.front().begin());
  double hidden = 0, on_cpu = 0, waited = 0;
  int64_t n_layers = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    timeline.add(0, calls[i].name, calls[i].begin(), calls[i].seconds);
    // The shared expert is queued, then the CPU computes, then the sum is brought up.
    if (calls[i].name != "ffn" || i + 1 == calls.size() || calls[i + 1].name != "upload") continue;
    const double cpu = std::chrono::duration<double>(calls[i + 1].begin() - calls[i].end).count();
    timeline.add(1, "ffn", calls[i].begin(), alone.shared);
    timeline.add(2, "experts", calls[i].end, cpu);
    hidden += std::clamp(alone.shared - calls[i + 1].seconds, 0.0, alone.shared);
    waited += calls[i + 1].seconds;
    on_cpu += cpu;
    ++n_layers;
  }
  if (n_layers == 0) test::fail("no layer had its experts on the CPU");
  timeline.write(argv[5]);
  const double share = hidden / (alone.shared * double(n_layers));
  test::report("decode", fmt::format("{} tokens, {:.1f} a second", n, double(n) / seconds));
  test::report(
      "overlap",
      fmt::format(
          "per layer: shared expert {:.0f} us on the GPU, queued before {:.0f} us of experts "
          "on the CPU; {:.0f} us waited for it then, {:.0f} % ran meanwhile",
          alone.shared * 1e6, on_cpu / double(n_layers) * 1e6, waited / double(n_layers) * 1e6,
          100 * share),
      share >= kHiddenShare);
  test::report("timeline", argv[5]);

  // A short text's idle memory: all experts that were used twice come to lie there.
  ExpertCacheStats stats;
  const double with = decode(
      path, config_of(settings, plugin, "auto"), {}, 2 * n, [] {},
      [&](const Model& model) { stats = model.expert_cache(); });
  test::report(
      "copies of experts on the card",
      fmt::format(
          "{} tokens, {:.1f} a second: {} experts copied, {:.1f} MiB held, {} of {} choices "
          "found there",
          2 * n, double(2 * n) / with, stats.copied, double(stats.bytes) / (1 << 20), stats.hits,
          stats.choices),
      stats.copied > 0 && stats.hits > 0 && stats.hits <= stats.choices);
  return 0;
}
