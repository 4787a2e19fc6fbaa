// cuda_long_run MODEL PREFILL NEW SECONDS [key=value... short=BYTES]: reads a text of PREFILL
// random tokens and generates NEW more, in at most so many seconds, and says what came of the
// promises: the prefill peak does not depend on the context, the cache grows with the text, the
// ledger holds what was planned and the device's own count agrees with it.  With short=, the first
// device's budget is so much less than the plan wants (0: as it is), and the ladder must be
// climbed.  For `cmake/dev test cuda`; runs on any devices.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/fathom.hpp"
#include "report.h"

using namespace fathom;
using test::must;
using test::report;

namespace {

constexpr double kMemoryTolerance = 0.03;  // of what the ledger holds
constexpr int64_t kFirstTokens = 4096;     // the short context that peaks are compared with

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
std::string mib(int64_t bytes) {
  return fmt::format("{:.1f} MiB", double(bytes) / (1 << 20));
}
int64_t number(const char* text) {
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (*text == 0 || *end != 0 || value < 1) test::fail(fmt::format("\"{}\" is no count", text));
  return value;
}

// Bytes of device 0 that a pass needs beyond weights and cache.
int64_t pass_bytes(const MemorySnapshot& memory) {
  int64_t bytes = 0;
  for (const Purpose purpose : {Purpose::kActivations, Purpose::kWorkspace, Purpose::kStaging})
    bytes += memory.item(0, purpose).bytes_now;
  return bytes;
}

class LongRun {
 public:
  LongRun(const std::string& path, int64_t prefill, int64_t fresh, int64_t seconds, int64_t missing,
          Config config)
      : prefill_(prefill), fresh_(fresh), end_(now() + double(seconds)) {
    config.context_max = prefill + fresh;
    if (missing > 0) {
      const Engine engine = must(Engine::create(config));
      const PlanDevice device = must(engine.plan(path)).devices[0];
      config.budget[device.name] =
          std::max(device.total(Phase::kPrefill), device.total(Phase::kDecode)) - missing;
    }
    must_climb_ = missing >= 0;
    engine_.emplace(must(Engine::create(config)));
    before_ = {engine_->device(0).memory().free_bytes, held(engine_->memory())};
    plan_.emplace(must(engine_->plan(path)));
    must(plan_->feasible ? Status() : Status(Code::kBudget, plan_->describe()));
    const PlanDevice& device = plan_->devices[0];
    report("plan", fmt::format("{}: {} in prefill, {} in decode, budget {}, chunk {}, {} tokens",
                               device.name, mib(device.total(Phase::kPrefill)),
                               mib(device.total(Phase::kDecode)), mib(device.budget_bytes),
                               plan_->prefill_chunk, plan_->max_context));
    const double start = now();
    model_.emplace(must(Model::load(*engine_, *plan_)));
    report("load", fmt::format("{} in {:.1f} s", mib(model_->weight_bytes()), now() - start));
    session_.emplace(must(Session::create(*model_)));
  }

  void read() {
    std::mt19937 random(7);
    std::vector<int32_t> tokens(static_cast<size_t>(prefill_));
    for (int32_t& id : tokens)
      id = static_cast<int32_t>(random() % static_cast<uint64_t>(model_->config().vocab_size));
    const int64_t first = std::min(kFirstTokens, prefill_ / 2);
    int64_t early = 0, late = 0;
    const double start = now();
    Status status = session_->prefill(tokens, options([&](const StepReport& step) {
                                        int64_t& peak = step.n_tokens <= first ? early : late;
                                        peak = std::max(peak, pass_bytes(step.memory));
                                      }));
    const double seconds = now() - start;
    const int64_t done = session_->n_tokens();
    report("prefill",
           fmt::format("{} of {} tokens in {:.1f} s, {:.0f} a second{}", done, prefill_, seconds,
                       double(done) / seconds, reason(status)),
           status.ok());
    report("prefill peak",
           fmt::format("activations, workspace and staging {} to {} tokens, {} beyond", mib(early),
                       first, mib(late)),
           late > 0 && late <= early);
  }

  void generate() {
    const int64_t first = session_->n_tokens();
    int64_t grown = 0, least = session_->cache().size_bytes(), last = least;
    GenerateOptions how{.max_new_tokens = fresh_, .stop_at_eos = false};
    how.run = options([&](const StepReport& step) {
      grown += step.kv_bytes > last;
      last = step.kv_bytes;
    });
    const double start = now();
    const Result<GenerateResult> result = session_->generate(how);
    const double seconds = now() - start;
    const int64_t done = session_->n_tokens() - first;
    const std::string why = !result.ok() ? reason(result.status())
                            : done == fresh_
                                ? ""
                                : fmt::format(", ended by {}{}", stop_reason_name(result->reason),
                                              reason(result->status));
    report("generate",
           fmt::format("{} of {} tokens at depth {} in {:.1f} s, {:.1f} a second{}", done, fresh_,
                       first, seconds, double(done) / seconds, why),
           result.ok() && done == fresh_);
    report("cache",
           fmt::format("grew {} times while generating, {} to {}", grown, mib(least), mib(last)),
           grown > 0 || fresh_ < plan_->kv_page_tokens);
    if (must_climb_)
      report("steps of the ladder", fmt::format("{}", session_->events().size()),
             plan_->by_ladder && !session_->events().empty());
    for (const Event& event : session_->events())
      report("ladder", fmt::format("at {} tokens: {}", event.position, event.text));
  }

  void compare() {
    const MemorySnapshot memory = engine_->memory();
    bool equal = true;
    std::string off;
    for (const Purpose purpose : {Purpose::kWeights, Purpose::kExperts, Purpose::kKv,
                                  Purpose::kActivations, Purpose::kWorkspace, Purpose::kRuntime}) {
      const MemoryItem& item = memory.item(0, purpose);
      // The ladder holds less than a full cache and pass; else everything is there at the end.
      const bool less = plan_->by_ladder || session_->n_tokens() < plan_->max_context;
      if (item.bytes_now == item.bytes_planned || (less && item.bytes_now < item.bytes_planned))
        continue;
      equal = false;
      off +=
          fmt::format("; {} {} of {}", purpose_name(purpose), item.bytes_now, item.bytes_planned);
    }
    const int64_t ledger = held(memory);
    report("ledger",
           fmt::format("{} holds {}, planned at most {}{}", memory.devices[0].name, mib(ledger),
                       mib(memory.devices[0].bytes_planned), off),
           equal);
    const int64_t taken = before_.free_bytes - engine_->device(0).memory().free_bytes;
    const int64_t booked = ledger - before_.held;
    report("device's own count",
           fmt::format("free memory fell by {}, the ledger says {}: {:+.2f} % of {}; the context "
                       "and what belongs to it were {} before",
                       mib(taken), mib(booked), 100 * double(taken - booked) / double(ledger),
                       mib(ledger), mib(engine_->device(0).runtime_bytes())),
           std::fabs(double(taken - booked)) <= kMemoryTolerance * double(ledger));
  }

 private:
  static int64_t held(const MemorySnapshot& memory) { return memory.devices[0].bytes_now; }
  static std::string reason(const Status& status) {
    return status.ok() ? "" : fmt::format(": {}", status.message());
  }
  template <class Look>
  RunOptions options(Look&& look) const {
    RunOptions run;
    run.deadline_ms = std::max<int64_t>(1, static_cast<int64_t>((end_ - now()) * 1000));
    run.on_step = [look](const StepReport& step) mutable {
      look(step);
      return true;
    };
    return run;
  }

  struct Before {
    int64_t free_bytes, held;
  };
  const int64_t prefill_, fresh_;
  const double end_;
  bool must_climb_ = false;
  std::optional<Engine> engine_;
  Before before_{};
  std::optional<Plan> plan_;
  std::optional<Model> model_;
  std::optional<Session> session_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) test::fail("usage: cuda_long_run MODEL PREFILL NEW SECONDS [key=value...]");
  Config config;
  int64_t missing = -1;
  for (int i = 5; i < argc; ++i) {
    const char* equals = std::strchr(argv[i], '=');
    if (equals == nullptr) test::fail(fmt::format("{} is not key=value", argv[i]));
    if (std::strncmp(argv[i], "short=", 6) == 0) {
      missing = std::atoll(equals + 1);
      continue;
    }
    must(config.set(std::string_view(argv[i], static_cast<size_t>(equals - argv[i])), equals + 1));
  }
  LongRun run(argv[1], number(argv[2]), number(argv[3]), number(argv[4]), missing,
              std::move(config));
  run.read();
  run.generate();
  run.compare();
  return 0;
}
