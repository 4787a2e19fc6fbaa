// The plan is the truth: the ledger's bytes equal the planned ones, in every phase; a plan that
// does not fit says what would; plans of true shapes come from the header alone.
#include <unistd.h>

#include <catch2/catch.hpp>
#include <ctime>
#include <filesystem>
#include <fstream>

#include "support/golden.h"
#include "support/loaded_model.h"
#include "support/model_shapes.h"
#include "support/random_model.h"

namespace fathom {
namespace {

// A file that is removed at the end of the test.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& name)
      : path_(std::filesystem::temp_directory_path() /
              ("fathom_" + std::to_string(getpid()) + "_" + name)) {}
  ~TemporaryFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

void check_phase(const Model& model, Phase phase, std::string_view moment) {
  const Plan& plan = model.plan();
  const MemorySnapshot now = model.engine().memory();
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d)
    for (int p = 0; p < kPurposeCount; ++p) {
      const auto purpose = static_cast<Purpose>(p);
      if (purpose == Purpose::kStaging) continue;  // held during the load only
      INFO(moment << ", device " << d << ", " << purpose_name(purpose));
      CHECK(now.item(d, purpose).bytes_now ==
            plan.devices[static_cast<size_t>(d)]
                .bytes[static_cast<size_t>(phase)][static_cast<size_t>(p)]);
    }
}

// Peak of the process's resident memory since the last reset, in bytes; -1 where unknown.
int64_t resident_peak() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
  return -1;
}
bool reset_resident_peak() {
  std::ofstream clear("/proc/self/clear_refs");
  clear << "5";
  return clear.good();
}

// What the process may grow by over a plan: 3 % and 16 MiB for everything that is not counted.
// Sanitizers keep shadow memory and freed blocks of their own.
int64_t allowed_growth(const Plan& plan) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr int64_t kSanitizer = int64_t{1} << 30;
#else
  constexpr int64_t kSanitizer = 0;
#endif
  const int64_t planned = plan.devices[0].peak_bytes();
  return planned + planned * 3 / 100 + (int64_t{16} << 20) + kSanitizer;
}

using test::some_tokens;

TEST_CASE("planned bytes equal the ledger's bytes after load, prefill and decode", "[plan]") {
  const std::string trained = FATHOM_EXAMPLE_MODEL;
  for (const std::string& path :
       {test::test_data("models/tiny-v2"), test::test_data("models/tiny-v2-lite"),
        test::test_data("models/tiny-v3"), test::test_data("models/tiny-v3-fp8"),
        test::test_data("models/tiny-v2-lite-sharded"),
        test::test_data("gguf/tiny-v2.old.F16.gguf"), test::test_data("gguf/tiny-v2.new.BF16.gguf"),
        test::test_data("gguf/tiny-v2-lite.old.F16.gguf"),
        test::test_data("gguf/tiny-v2-lite.split-00001-of-00003.gguf"),
        test::test_data("gguf/tiny-v2-lite.mid.F16.gguf"),
        test::test_data("gguf/tiny-v3.new.BF16.gguf"), test::test_data("quant/quant.Q8_0.gguf"),
        test::test_data("quant/quant.Q4_K_M.gguf"), test::test_data("quant/quant.IQ4_NL.gguf"),
        trained})
    for (const char* chunk : {"1", "48", "300"})
      for (const char* context : {"65", "130", "300"}) {
        if (std::string(chunk) == "1" && std::string(context) != "65") continue;  // slow, no news
        const int64_t before = reset_resident_peak() ? resident_peak() : -1;
        const Model model =
            test::load_model(path, {{"prefill.chunk", chunk}, {"context.max", context}});
        INFO(path << " chunk " << chunk << " context " << context);
        check_phase(model, Phase::kLoad, "after load");
        const Plan& plan = model.plan();
        CHECK(model.engine().memory().item(0, Purpose::kStaging).bytes_peak ==
              plan.devices[0].bytes[static_cast<size_t>(Phase::kLoad)]
                                   [static_cast<size_t>(Purpose::kStaging)]);
        Session session = test::new_session(model);
        const int64_t n = plan.max_context;
        test::require_ok(session.prefill(some_tokens(n - 2, model.config().vocab_size)));
        CHECK(session.cache().size_bytes() == plan.kv_bytes(0, n - 2));
        test::require_ok(session.step(1));
        test::require_ok(session.step(2));
        check_phase(model, Phase::kDecode, "after decode");
        const MemorySnapshot memory = model.engine().memory();
        CHECK(memory.devices[0].bytes_peak == plan.devices[0].peak_bytes());
        if (before >= 0) CHECK(resident_peak() - before <= allowed_growth(plan));
        CHECK(session.step(3).code() == Code::kContextFull);
      }
}

TEST_CASE("everything is given back", "[plan]") {
  const Engine engine = [] {
    auto made = Engine::create();
    REQUIRE(made.ok());
    return std::move(made).value();
  }();
  const int64_t before = engine.memory().devices[0].bytes_now;
  {
    auto plan = engine.plan(FATHOM_EXAMPLE_MODEL);
    REQUIRE(plan.ok());
    auto model = Model::load(engine, *plan);
    REQUIRE(model.ok());
    Session session = test::new_session(*model);
    test::require_ok(session.prefill(some_tokens(100, 2048)));
    CHECK(engine.memory().devices[0].bytes_now > before);
  }
  const MemorySnapshot after = engine.memory();
  CHECK(after.devices[0].bytes_now == before);
  for (const MemoryItem& item : after.items) {
    CHECK(item.bytes_planned == 0);
    if (item.purpose != Purpose::kRuntime) CHECK(item.bytes_now == 0);
  }
}

TEST_CASE("the process grows by what was planned", "[plan]") {
  if (!reset_resident_peak()) {
    WARN("skipped: this kernel does not reset VmHWM");
    return;
  }
  const int64_t before = resident_peak();
  const Model model =
      test::load_model(FATHOM_EXAMPLE_MODEL, {{"context.max", "8192"}, {"kv.type", "f32"}});
  Session session = test::new_session(model);
  test::require_ok(session.prefill(some_tokens(8192, 2048)));
  const int64_t grown = resident_peak() - before;
  INFO("grown " << grown << ", planned " << model.plan().devices[0].peak_bytes());
  CHECK(grown <= allowed_growth(model.plan()));
}

TEST_CASE("the prefill peak does not depend on the context", "[plan]") {
  const Model short_text = test::load_model(FATHOM_EXAMPLE_MODEL, {{"context.max", "4096"}});
  const Model long_text = test::load_model(FATHOM_EXAMPLE_MODEL, {{"context.max", "160000"}});
  for (Purpose purpose : {Purpose::kActivations, Purpose::kWorkspace})
    CHECK(short_text.plan().devices[0].planned(purpose) ==
          long_text.plan().devices[0].planned(purpose));
}

TEST_CASE("plans of the published shapes, from the header alone", "[plan]") {
  struct Shape {
    const char* name;
    int64_t kv_bytes_per_token;  // 576 values x layers x 2 bytes
  };
  for (const Shape& shape : {Shape{"v2-lite", 31104}, Shape{"v2", 69120}, Shape{"v3", 70272}}) {
    TemporaryFile file(std::string(shape.name) + ".gguf");
    test::GgufOptions options;
    options.type = "Q4_K_M";
    options.contents = test::Contents::kHoles;
    test::write_gguf_model(file.path(), test::named_shape(shape.name), options);

    auto engine = Engine::create(test::config_of({{"budget.cpu", "2000G"}}));
    REQUIRE(engine.ok());
    auto first = engine->plan(file.path());
    INFO(first.status().message());
    REQUIRE(first.ok());
    CHECK(first->feasible);
    CHECK(first->kv_bytes_per_token == shape.kv_bytes_per_token);

    // The two terms that other engines let grow with the context do not exist here.
    auto other = engine->plan(file.path(),
                              test::config_of({{"budget.cpu", "2000G"}, {"context.max", "4096"}}));
    REQUIRE(other.ok());
    for (Purpose purpose : {Purpose::kActivations, Purpose::kWorkspace})
      CHECK(first->devices[0].planned(purpose) == other->devices[0].planned(purpose));

    // One GiB: far too little; the plan says so, and where.
    auto small = engine->plan(file.path(), test::config_of({{"budget.cpu", "1G"}}));
    REQUIRE(small.ok());
    CHECK_FALSE(small->feasible);
    CHECK(small->bytes_short > 0);
    REQUIRE_FALSE(small->alternatives.empty());
    CHECK(small->alternatives.back().changes[0].first == "budget.cpu");
    CHECK_FALSE(Model::load(*engine, *small).ok());
  }
}

TEST_CASE("planning 671 B parameters from a file's header takes less than 100 ms", "[plan]") {
  TemporaryFile file("v3-time.gguf");
  test::GgufOptions options;
  options.type = "Q4_K_M";
  options.contents = test::Contents::kHoles;
  test::write_gguf_model(file.path(), test::named_shape("v3"), options);
  auto engine = Engine::create(test::config_of({{"budget.cpu", "2000G"}}));
  REQUIRE(engine.ok());
  double best = 1e9;  // of several, in processor time: the machine may be busy
  for (int i = 0; i < 5; ++i) {
    const std::clock_t start = std::clock();
    auto plan = engine->plan(file.path());
    best = std::min(best, static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    REQUIRE(plan.ok());
    CHECK(plan->feasible);
  }
  INFO("best of 5: " << best * 1e3 << " ms");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(best < 0.1);
#endif
}

TEST_CASE("a short budget lowers the chunk before it gives up", "[plan]") {
  const std::string path = FATHOM_EXAMPLE_MODEL;
  const Model model = test::load_model(path, {{"context.max", "8192"}});
  const int64_t needed = model.plan().devices[0].peak_bytes();
  auto engine = Engine::create();
  REQUIRE(engine.ok());
  const auto with = [&](int64_t budget, test::Settings more = {}) {
    more.push_back({"budget.cpu", std::to_string(budget)});
    more.push_back({"context.max", "8192"});
    auto plan = engine->plan(path, test::config_of(more));
    REQUIRE(plan.ok());
    return std::move(plan).value();
  };
  CHECK(with(needed).feasible);
  CHECK(with(needed).prefill_chunk == model.plan().prefill_chunk);

  const Plan lower = with(needed - 1);
  CHECK(lower.feasible);
  CHECK(lower.prefill_chunk < model.plan().prefill_chunk);

  // Pinned, it is a constraint: refused, and giving it back is the first remedy.
  const Plan pinned = with(needed - 1, {{"prefill.chunk", "512"}});
  CHECK_FALSE(pinned.feasible);
  CHECK(pinned.bytes_short == 1);
  REQUIRE_FALSE(pinned.alternatives.empty());
  CHECK(pinned.alternatives[0].changes[0] ==
        std::pair<std::string, std::string>("prefill.chunk", "auto"));
  for (const PlanAlternative& alternative : pinned.alternatives) {
    test::Settings settings{{"prefill.chunk", "512"}};
    for (const auto& change : alternative.changes) settings.push_back(change);
    Config config = test::config_of({{"budget.cpu", std::to_string(needed - 1)},
                                     {"context.max", "8192"},
                                     {"prefill.chunk", "512"}});
    for (const auto& [key, value] : alternative.changes) test::require_ok(config.set(key, value));
    auto plan = engine->plan(path, config);
    REQUIRE(plan.ok());
    INFO(alternative.text);
    CHECK(plan->feasible);
  }
}

TEST_CASE("a planned budget is enough, and one byte less is refused before anything is taken",
          "[plan]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{{"context.max", "200"}, {"prefill.chunk", "64"}};
  const int64_t needed = test::load_model(path, settings).plan().devices[0].peak_bytes();

  test::Settings enough = settings;
  enough.push_back({"budget.cpu", std::to_string(needed)});
  const Model model = test::load_model(path, enough);
  Session session = test::new_session(model);
  test::require_ok(session.prefill(some_tokens(200, 500)));
  CHECK(model.engine().memory().devices[0].bytes_now == needed);

  test::Settings less = settings;
  less.push_back({"budget.cpu", std::to_string(needed - 1)});
  const auto refused = Model::load(path, test::config_of(less));
  REQUIRE_FALSE(refused.ok());
  CHECK(refused.status().code() == Code::kBudget);
  CHECK(refused.status().bytes_needed() == needed);
  CHECK(refused.status().bytes_available() == needed - 1);
  CHECK(refused.status().message().find("Would fit") != std::string_view::npos);
}

TEST_CASE("several CPU devices hold the layers, give the same bits, and keep their plans",
          "[plan]") {
  for (const char* name : {"tiny-v2", "tiny-v2-lite", "tiny-v3"}) {
    const std::string path = test::test_data(std::string("models/") + name);
    const auto tokens = some_tokens(150, 500);
    const Model one = test::load_model(path, {{"context.max", "300"}});
    const auto expected = test::last_logits(one, tokens);
    for (const char* devices : {"cpu:0,cpu:1", "cpu:0,cpu:1,cpu:2"}) {
      const Model model = test::load_model(path, {{"devices", devices}, {"context.max", "150"}});
      check_phase(model, Phase::kLoad, devices);
      Session session = test::new_session(model);
      test::require_ok(session.prefill(tokens));
      check_phase(model, Phase::kPrefill, devices);
      INFO(name << " on " << devices);
      const auto diff = test::first_bit_difference(expected, session.logits());
      CHECK(diff.index == -1);
    }
  }
}

TEST_CASE("a plan prints itself", "[plan]") {
  auto engine = Engine::create();
  REQUIRE(engine.ok());
  auto plan = engine->plan(FATHOM_EXAMPLE_MODEL, test::config_of({{"context.max", "1000"}}));
  REQUIRE(plan.ok());
  const std::string json = plan->to_json(), text = plan->describe();
  CHECK(json.find("\"kv_bytes_per_token\": 1280") != std::string::npos);  // 5 layers x 128 x 2
  CHECK(text.find("1,000 tokens") != std::string::npos);
  CHECK(text.find("FITS") != std::string::npos);
  auto again = engine->plan(FATHOM_EXAMPLE_MODEL, test::config_of({{"context.max", "1000"}}));
  REQUIRE(again.ok());
  CHECK(again->to_json() == json);
}

TEST_CASE("settings that only a new engine can change are refused by name", "[plan]") {
  auto engine = Engine::create(test::config_of({{"threads", "1"}}));
  REQUIRE(engine.ok());
  const auto plan = engine->plan(FATHOM_EXAMPLE_MODEL, test::config_of({{"threads", "2"}}));
  REQUIRE_FALSE(plan.ok());
  CHECK(plan.status().code() == Code::kConfig);
  CHECK(plan.status().key() == "threads");
}

}  // namespace
}  // namespace fathom
