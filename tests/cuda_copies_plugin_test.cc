// Copies of experts in idle memory of a CUDA device (experts.cache), whose experts live on the CPU.
#include <catch2/catch.hpp>

#include <string>

#include "cuda_test_plugin.h"
#include "support/golden.h"
#include "support/loaded_model.h"

using namespace fathom;

namespace {

// Attention and shared experts on the card, routed experts on the CPU.
test::Settings settings(const std::string& device, const test::Settings& more = {}) {
  test::Settings all{{"devices", device + ",cpu"},
                     {"cuda.plugin", cuda_test::plugin_path()},
                     {"placement.layers", device + "=*"},
                     {"placement.experts", "cpu=*"},
                     {"budget." + device, "1G"},
                     {"budget.cpu", "400M"},
                     {"context.max", "128"},
                     {"prefill.chunk", "16"}};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

// A chunk, a short one, steps: the logits behind each.
constexpr int kSteps = 10;
std::vector<float> run_text(const Model& model, int n_steps = kSteps) {
  Session session = test::new_session(model);
  std::vector<float> all;
  const auto keep = [&] {
    all.insert(all.end(), session.logits().begin(), session.logits().end());
  };
  test::require_ok(session.prefill(std::vector<int32_t>{3, 1, 4, 1, 5, 9, 2}));
  keep();
  test::require_ok(session.prefill(std::vector<int32_t>{9, 7, 9}));
  keep();
  for (int32_t i = 0; i < n_steps; ++i) {
    test::require_ok(session.step(i * 31 % 7));
    keep();
  }
  return all;
}

void check_within_plan(const Model& model) {
  const MemorySnapshot now = model.engine().memory();
  for (int d = 0; d < 2; ++d) {
    const PlanDevice& device = model.plan().devices[static_cast<size_t>(d)];
    INFO(device.name);
    CHECK(now.devices[static_cast<size_t>(d)].bytes_peak <= device.peak_bytes());
    CHECK(now.item(d, Purpose::kExpertCache).bytes_peak <= device.expert_cache_bytes);
    CHECK(now.item(d, Purpose::kActivations).bytes_peak == device.planned(Purpose::kActivations));
    CHECK(now.item(d, Purpose::kWorkspace).bytes_peak == device.planned(Purpose::kWorkspace));
  }
}

}  // namespace

namespace {

void check_copies(const char* name) {
  const std::string path = test::test_data(name);
  const test::Settings exact{{"numerics", "exact"}};
  test::Settings off = exact;
  off.emplace_back("experts.cache", "0");
  const Model plain = test::load_model(path, settings("cuda:0", off));
  CHECK(plain.plan().devices[0].expert_cache_bytes == 0);
  const std::vector<float> expected = run_text(plain);
  const Model model = test::load_model(path, settings("cuda:0", exact));  // a card keeps copies
  CHECK(model.plan().devices[0].expert_cache_bytes > 0);
  const std::vector<float> got = run_text(model);
  INFO(name);
  // Two devices' f32 sums: as far apart as a card and a CPU are.
  const auto diff = test::max_abs_diff(expected, got);
  INFO(test::describe(diff));
  CHECK(diff.value <= 2e-4);
  const ExpertCacheStats stats = model.expert_cache();
  const ModelConfig& c = model.config();
  int64_t n_moe = 0;
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) n_moe += c.is_moe_layer(l);
  INFO(stats.hits << " of " << stats.choices << ", " << stats.copied << " copied");
  CHECK(stats.copied > 0);
  CHECK(stats.hits > 0);
  CHECK(stats.choices == (7 + 3 + kSteps) * n_moe * c.num_experts_per_tok);
  CHECK(stats.hits <= stats.choices);
  CHECK(stats.n_experts == stats.copied - stats.dropped);
  CHECK(stats.bytes == model.engine().memory().item(0, Purpose::kExpertCache).bytes_now);
  check_within_plan(model);
}

}  // namespace

TEST_CASE("idle memory of a card holds copies of the CPU's experts, and gives the result of none",
          "[cuda][plugin][copies]") {
  check_copies("models/tiny-v2-lite");
}
TEST_CASE("copies of FP8 and Q4_K experts on a card", "[cuda][plugin][copies][slow]") {
  check_copies("models/tiny-v3-fp8");
  check_copies("quant/quant.Q4_K_M.gguf");
}

TEST_CASE("a batch looks up a card's copies for all its rows", "[cuda][plugin][copies]") {
  const std::string path = test::test_data("models/tiny-v2-lite");
  const auto run_batch = [](const Model& model) {
    std::vector<Session> sessions;
    for (int32_t i = 0; i < 3; ++i) {
      sessions.push_back(test::new_session(model));
      test::require_ok(
          sessions.back().prefill(std::vector<int32_t>(static_cast<size_t>(4 + i), i)));
    }
    std::vector<Session*> all;
    for (Session& session : sessions) all.push_back(&session);
    std::vector<float> logits;
    for (int32_t i = 0; i < 4; ++i) {
      test::require_ok(Session::step_batch(all, std::vector<int32_t>{i, i + 7, 3}));
      for (Session& session : sessions)
        logits.insert(logits.end(), session.logits().begin(), session.logits().end());
    }
    return logits;
  };
  const test::Settings common{{"numerics", "exact"}, {"sessions.max", "3"}};
  test::Settings off = common;
  off.emplace_back("experts.cache", "0");
  const auto expected = run_batch(test::load_model(path, settings("cuda:0", off)));
  const Model model = test::load_model(path, settings("cuda:0", common));
  CHECK(test::max_abs_diff(expected, run_batch(model)).value <= 2e-4);
  CHECK(model.expert_cache().hits > 0);
  check_within_plan(model);
}

TEST_CASE("a card that gets less memory drops copies before anything else",
          "[cuda][plugin][copies]") {
  const Model model = test::load_model(test::test_data("models/tiny-v2-lite"), settings("cuda:0"));
  Session session = test::new_session(model);
  for (int32_t i = 0; i < 8; ++i) test::require_ok(session.step(i % 3));
  Engine engine = model.engine();
  const int64_t held = engine.memory().item(0, Purpose::kExpertCache).bytes_now;
  REQUIRE(held > 0);
  const int64_t free_before = engine.device(0).memory().free_bytes;
  test::require_ok(engine.set_budget(0, engine.memory().devices[0].bytes_now - held));
  CHECK(engine.memory().item(0, Purpose::kExpertCache).bytes_now == 0);
  CHECK(engine.device(0).memory().free_bytes >= free_before + held);  // the driver has it back
  for (int32_t i = 0; i < 4; ++i) test::require_ok(session.step(i % 3));
  CHECK(session.events().empty());
  test::require_ok(engine.set_budget(0, int64_t{1} << 30));
  for (int32_t i = 0; i < 4; ++i) test::require_ok(session.step(i % 3));
  CHECK(engine.memory().item(0, Purpose::kExpertCache).bytes_now > 0);
}

TEST_CASE("a copy that the device has no memory for ends nothing", "[cuda][plugin][copies]") {
  int asked = 0;
  HostHooks hooks;
  hooks.memory = [&](int, Purpose purpose, int64_t delta, int64_t) {
    return purpose != Purpose::kExpertCache || delta < 0 || ++asked % 2 != 0;
  };
  const auto engine =
      Engine::create(test::config_of(settings("cuda:0", {{"numerics", "exact"}})), hooks);
  REQUIRE(engine.ok());
  const std::string path = test::test_data("models/tiny-v2-lite");
  const auto model = Model::load(*engine, std::move(engine->plan(path)).value());
  REQUIRE(model.ok());
  const Model plain =
      test::load_model(path, settings("cuda:0", {{"numerics", "exact"}, {"experts.cache", "0"}}));
  CHECK(test::max_abs_diff(run_text(plain, 6), run_text(*model, 6)).value <= 2e-4);
  CHECK(asked > 1);
  CHECK(model->expert_cache().copied > 0);
}

TEST_CASE("a driver that cannot map memory into addresses keeps no copies, and computes as ever",
          "[cuda][plugin][copies]") {
  if (cuda_test::real_gpu()) return;  // real drivers can
  const std::string path = test::test_data("models/tiny-v2-lite");
  const Model model = test::load_model(path, settings("cuda:10"));
  CHECK(model.plan().devices[0].expert_cache_bytes == 0);
  const Model plain = test::load_model(path, settings("cuda:0", {{"experts.cache", "0"}}));
  CHECK(test::first_bit_difference(run_text(plain, 3), run_text(model, 3)).index == -1);
  CHECK(model.expert_cache().choices == 0);
}
