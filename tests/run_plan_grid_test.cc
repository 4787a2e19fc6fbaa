// The memory contract over a grid of model x cache type x chunk x context x sessions x budget: in
// every phase the ledger's peak is the planned number to the byte, and the process grows by no more
// than that, 3 % and 16 MiB.
#include <catch2/catch.hpp>
#include <fstream>

#include "support/golden.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

int64_t status_bytes(const char* key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind(key, 0) == 0) return std::stoll(line.substr(line.find(':') + 1)) * 1024;
  return -1;
}
// Starts VmHWM anew; false where the kernel cannot.
bool reset_resident_peak() {
  std::ofstream clear("/proc/self/clear_refs");
  clear << "5";
  clear.flush();
  return clear.good();
}

struct GridCase {
  std::string path;
  const char* kv_type;
  int64_t chunk, context, sessions;
  bool exact_budget;  // the plan's peak and not a byte more
};

test::Settings settings_of(const GridCase& c) {
  return {{"kv.type", c.kv_type},
          {"prefill.chunk", std::to_string(c.chunk)},
          {"context.max", std::to_string(c.context)},
          {"sessions.max", std::to_string(c.sessions)},
          {"threads", "2"}};
}

// Every purpose's peak since the last reset is the phase's planned number, and the process holds at
// most the phase's bytes more than before the model.
void check_phase(const Model& model, Phase phase, [[maybe_unused]] int64_t resident_before) {
  const PlanDevice& planned = model.plan().devices[0];
  const MemorySnapshot memory = model.engine().memory();
  INFO(phase_name(phase));
  CHECK(memory.devices[0].bytes_peak == planned.total(phase));
  for (int p = 0; p < kPurposeCount; ++p) {
    INFO(purpose_name(static_cast<Purpose>(p)));
    // Staging of the load is gone when the next phase begins.
    CHECK(memory.item(0, static_cast<Purpose>(p)).bytes_peak ==
          planned.bytes[static_cast<size_t>(phase)][static_cast<size_t>(p)]);
  }
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  if (resident_before >= 0) {
    const int64_t allowed = planned.total(phase) + planned.total(phase) * 3 / 100 + 16 * kMiB;
    CHECK(status_bytes("VmHWM:") - resident_before <= allowed);
  }
#endif
}

void run_case(const GridCase& c) {
  test::Settings settings = settings_of(c);
  if (c.exact_budget) {
    auto engine = Engine::create(test::config_of(settings));
    REQUIRE(engine.ok());
    auto plan = engine->plan(c.path);
    REQUIRE(plan.ok());
    settings.push_back({"budget.cpu", std::to_string(plan->devices[0].peak_bytes())});
  }
  const int64_t before = reset_resident_peak() ? status_bytes("VmRSS:") : -1;
  const Model model = test::load_model(c.path, settings);
  CHECK(model.plan().prefill_chunk == c.chunk);
  check_phase(model, Phase::kLoad, before);

  Engine engine = model.engine();
  const bool resets = reset_resident_peak();
  engine.reset_peaks();
  std::vector<int32_t> tokens(static_cast<size_t>(c.context));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>(static_cast<int64_t>(i) * 7919 % model.config().vocab_size);
  std::vector<Session> sessions;
  for (int64_t i = 0; i < c.sessions; ++i) {
    sessions.push_back(test::new_session(model));
    test::require_ok(sessions.back().prefill(tokens));
  }
  check_phase(model, Phase::kPrefill, resets ? before : -1);

  for (Session& session : sessions) test::require_ok(session.truncate(c.context - 2));
  engine.reset_peaks();
  const bool resets_again = reset_resident_peak();
  for (Session& session : sessions)
    for (int i = 0; i < 2; ++i) test::require_ok(session.step(1));
  check_phase(model, Phase::kDecode, resets_again ? before : -1);
  CHECK(sessions.back().step(1).code() == Code::kContextFull);
}

int run_grid(const std::vector<std::string>& models, const std::vector<const char*>& types,
             const std::vector<int64_t>& chunks, const std::vector<int64_t>& contexts,
             const std::vector<int64_t>& sessions) {
  int n = 0;
  for (const std::string& path : models)
    for (const char* type : types)
      for (const int64_t chunk : chunks)
        for (const int64_t context : contexts)
          for (const int64_t count : sessions)
            for (const bool exact : {false, true}) {
              INFO(path << " kv.type " << type << " chunk " << chunk << " context " << context
                        << " sessions " << count << (exact ? " exact budget" : ""));
              run_case({path, type, std::min(chunk, context), context, count, exact});
              ++n;
            }
  return n;
}

TEST_CASE("planned is used, in a corner of the grid", "[plan-grid]") {
  CHECK(run_grid({test::test_data("models/tiny-v2-lite")}, {"f16", "q4_0"}, {32}, {65, 200},
                 {1, 2}) == 16);
}

TEST_CASE("planned is used, over the whole grid", "[plan-grid][slow]") {
  CHECK(run_grid({test::test_data("models/tiny-v2"), test::test_data("models/tiny-v3-fp8"),
                  test::test_data("quant/quant.Q4_K_M.gguf"), FATHOM_EXAMPLE_MODEL},
                 {"f32", "bf16", "f16", "fp8", "q8_0", "q4_0"}, {33, 300}, {130, 700},
                 {1, 3}) == 384);
}

TEST_CASE("windows of 16-bit pages and reserved room: the planned cache is the peak, to the byte",
          "[plan-grid]") {
  struct Case {
    const char *recent, *first, *reserve;
  };
  for (const char* type : {"q8_0", "q4_0"})
    for (const char* context : {"97", "300", "301"})
      for (const Case& c : {Case{"48", "0", "0"}, Case{"70", "40", "0"}, Case{"0", "33", "0"},
                            Case{"70", "40", "90"}}) {
        INFO(type << ", " << context << " tokens, windows " << c.recent << " and " << c.first
                  << ", reserved " << c.reserve);
        const test::Settings settings{{"kv.type", type},
                                      {"kv.page_tokens", "16"},
                                      {"context.max", context},
                                      {"kv.recent_16bit", c.recent},
                                      {"kv.first_16bit", c.first},
                                      {"context.reserve", c.reserve},
                                      {"threads", "1"}};
        const Model model = test::load_model(test::test_data("models/tiny-v2-lite"), settings);
        const PlanDevice& planned = model.plan().devices[0];
        Engine engine = model.engine();
        for (const int64_t chunk : {1, 0}) {  // token by token, and in passes of the plan
          engine.reset_peaks();
          {
            Session session = test::new_session(model);
            const std::vector<int32_t> tokens(static_cast<size_t>(model.plan().max_context), 5);
            RunOptions options;
            options.chunk = chunk;
            test::require_ok(session.prefill(tokens, options));
          }
          const int64_t peak = engine.memory().item(0, Purpose::kKv).bytes_peak;
          INFO((chunk == 1 ? "token by token" : "in passes"));
          if (chunk == 1) CHECK(peak == planned.planned(Purpose::kKv));
          CHECK(peak <= planned.planned(Purpose::kKv));
        }
      }
}

}  // namespace
}  // namespace fathom
