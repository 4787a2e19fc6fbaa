// Simulated devices: true shapes through the real plan, ledger, scheduler and cache; memory is
// counted and not touched, time is the cost model's.
#include <catch2/catch.hpp>
#include <fstream>

#include "lib/run/cost_model.h"
#include "lib/run/model_state.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

std::string published_config(const std::string& name) {
  return std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/" + name + ".json";
}

MachineDescription machine_of(std::string_view text) {
  auto machine = MachineDescription::parse(text);
  INFO(machine.status().message());
  REQUIRE(machine.ok());
  return std::move(machine).value();
}

Engine simulate(std::string_view machine, const test::Settings& settings = {}) {
  auto engine = Engine::simulate(machine_of(machine), test::config_of(settings));
  INFO(engine.status().message());
  REQUIRE(engine.ok());
  return std::move(engine).value();
}

Model load(const Engine& engine, const std::string& path) {
  auto plan = engine.plan(path);
  INFO(plan.status().message());
  REQUIRE(plan.ok());
  INFO(plan->describe());
  REQUIRE(plan->feasible);
  auto model = Model::load(engine, *plan);
  INFO(model.status().message());
  REQUIRE(model.ok());
  return std::move(model).value();
}

int64_t resident_bytes(const char* key) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind(key, 0) == 0) return std::stoll(line.substr(line.find(':') + 1)) * 1024;
  return -1;
}

std::vector<int32_t> some_tokens(int64_t n) {
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) tokens[static_cast<size_t>(i)] = static_cast<int32_t>(i % 1000);
  return tokens;
}

void check_used_is_planned(const Model& model) {
  const MemorySnapshot memory = model.engine().memory();
  for (size_t d = 0; d < model.plan().devices.size(); ++d) {
    INFO(memory.devices[d].name);
    const PlanDevice& device = model.plan().devices[d];
    // Copies of experts fill what is left, but for a part of one.
    const ModelConfig& c = model.config();
    const int64_t part =
        device.expert_cache_bytes > 0 ? 3 * c.hidden_size * c.moe_intermediate_size * 2 : 0;
    CHECK(memory.devices[d].bytes_peak <= device.peak_bytes());
    CHECK(memory.devices[d].bytes_peak >= device.peak_bytes() - part);
    CHECK(memory.devices[d].bytes_peak <= memory.devices[d].budget_bytes);
  }
}

TEST_CASE("236 B parameters load and run without their memory", "[simulation]") {
  const int64_t before = resident_bytes("VmRSS");
  const Engine engine = simulate(R"({"devices": [{"name": "cpu", "bytes": "300G"}]})",
                                 {{"weights.type", "q8_0"}, {"context.max", "2048"}});
  CHECK(engine.simulated());
  CHECK(engine.device(0).kind() == DeviceKind::kSimulated);
  const Model model = load(engine, published_config("v2"));
  CHECK(model.plan().devices[0].kind == DeviceKind::kCpu);
  CHECK(model.weight_bytes() > int64_t{230} << 30);
  Session session = test::new_session(model);
  test::require_ok(session.prefill(some_tokens(1948)));
  auto result = session.generate({.max_new_tokens = 100, .stop_at_eos = false});
  REQUIRE(result.ok());
  CHECK(result->tokens.size() == 100);
  check_used_is_planned(model);
  CHECK(resident_bytes("VmRSS") - before < int64_t{96} << 20);

  // Time: that of the machine, and all of it is the device's work.
  const SessionTimes& times = session.times();
  CHECK(times.prefill_seconds > 0);
  CHECK(times.decode_seconds > 0);
  CHECK(engine.seconds() == Approx(times.prefill_seconds + times.decode_seconds));
  CHECK(engine.busy_seconds(0) == Approx(engine.seconds()));

  // A decode step takes what the cost model says of its layers.
  const double before_step = engine.seconds();
  test::require_ok(session.truncate(1000));
  test::require_ok(session.step(1));
  double expected = 0;
  const ModelConfig& c = model.config();
  const run::PassShape pass{.n_tokens = 1, .first_position = 1000, .page_tokens = 64};
  const MachineDevice& device = engine.machine().devices[0];
  const nn::Weights& weights = *model.state()->weights;
  for (int64_t l = 0; l < c.num_hidden_layers; ++l)
    expected += run::layer_seconds(device, c, weights.layers[static_cast<size_t>(l)],
                                   c.is_moe_layer(l), pass)
                    .total();
  expected += run::embed_seconds(device, c, weights, pass) + run::head_seconds(device, c, weights);
  CHECK(engine.seconds() - before_step == Approx(expected));
}

TEST_CASE("several simulated devices hold their layers and pass the text on", "[simulation]") {
  const Engine engine = simulate(R"({"devices": [{"name": "cpu", "bytes": "20G"},
      {"name": "cuda:0", "bytes": "8G"}, {"name": "cuda:1", "bytes": "6G"}]})",
                                 {{"weights.type", "q8_0"}, {"context.max", "4096"}});
  const Model model = load(engine, published_config("v2-lite"));
  Session session = test::new_session(model);
  test::require_ok(session.prefill(some_tokens(4090)));
  for (int i = 0; i < 6; ++i) test::require_ok(session.step(5));
  CHECK(session.step(5).code() == Code::kContextFull);
  check_used_is_planned(model);
  // One text: devices take turns but where routed and shared experts work side by side; transfers
  // take the rest.
  double busy = 0, most = 0;
  for (int d = 0; d < 3; ++d) {
    // The placement may leave a device without weights.
    const PlanDevice& device = model.plan().devices[static_cast<size_t>(d)];
    CHECK((engine.busy_seconds(d) > 0) ==
          (device.planned(Purpose::kWeights) + device.planned(Purpose::kExperts) > 0));
    busy += engine.busy_seconds(d);
    most = std::max(most, engine.busy_seconds(d));
  }
  CHECK(engine.seconds() > most);
  CHECK(engine.seconds() < busy * 1.5);
}

TEST_CASE("simulated devices obey budgets and give everything back", "[simulation]") {
  const Engine engine =
      simulate(R"({"devices": [{"name": "cpu", "bytes": "64G"}]})",
               {{"weights.type", "q8_0"}, {"context.max", "8192"}, {"kv.ladder", "none"}});
  const int64_t idle = engine.memory().devices[0].bytes_now;
  {
    const Model model = load(engine, published_config("v2-lite"));
    Session session = test::new_session(model);
    test::require_ok(session.prefill(some_tokens(1000)));
    Engine same = engine;
    test::require_ok(same.set_budget(0, engine.memory().devices[0].bytes_now));
    CHECK(session.prefill(some_tokens(1000)).code() == Code::kBudget);
    CHECK(session.n_tokens() == 1000);
    CHECK(engine.device(0).memory().free_bytes < int64_t{64} << 30);
  }
  CHECK(engine.memory().devices[0].bytes_now == idle);

  // More than the device has, whatever the budget says.
  const Engine small = simulate(R"({"devices": [{"name": "cpu", "bytes": "4G"}]})",
                                {{"weights.type", "q8_0"}, {"budget.cpu", "64G"}});
  auto plan = small.plan(published_config("v2-lite"));
  REQUIRE(plan.ok());
  const auto model = Model::load(small, *plan);
  REQUIRE_FALSE(model.ok());
  CHECK(model.status().code() == Code::kMemory);
}

// Fetching moved pages is part of what a plan predicts, of what a step of the simulated session
// takes, and of what its events say.
TEST_CASE("a cache in host memory and in the file is as slow as was planned", "[simulation]") {
  struct Case {
    const char* machine;
    const char* ladder;
    bool host, file;
  };
  const char* const alone = R"({"devices": [{"name": "cpu", "bytes": "17G"}],
                                "file": {"bytes_per_s": 1e9}})";
  const char* const card = R"({"devices": [{"name": "cuda:0", "bytes": "17G"},
      {"name": "cpu", "bytes": "8G"}], "file": {"bytes_per_s": 1e9}})";
  const char* const small_host = R"({"devices": [{"name": "cuda:0", "bytes": "17G"},
      {"name": "cpu", "bytes": "1000M"}], "file": {"bytes_per_s": 1e9}})";
  for (const Case& c :
       {Case{alone, "file", false, true}, Case{alone, "requantise", false, false},
        Case{card, "spill", true, false}, Case{small_host, "spill,file", true, true}}) {
    INFO(c.machine << " " << c.ladder);
    const Engine engine = simulate(c.machine, {{"weights.type", "q8_0"},
                                               {"context.max", "65536"},
                                               {"prefill.chunk", "512"},
                                               {"placement.layers", c.host ? "cuda:0=*" : "cpu=*"},
                                               {"placement.experts", c.host ? "cuda:0=*" : "cpu=*"},
                                               {"placement.kv", "home=*"},
                                               {"kv.tiers", "device,host,file"},
                                               {"kv.ladder", c.ladder}});
    const Model model = load(engine, published_config("v2-lite"));
    const Plan& plan = model.plan();
    REQUIRE(plan.by_ladder);
    CHECK((plan.devices[0].kv_host_bytes > 0) == c.host);
    CHECK((plan.devices[0].kv_file_bytes > 0) == c.file);
    Session session = test::new_session(model);
    test::require_ok(session.prefill(some_tokens(65535)));
    const auto near = [](double bytes) { return Approx(bytes).epsilon(0.03); };
    CHECK(static_cast<double>(session.cache().bytes_in(KvTier::kFile)) ==
          near(static_cast<double>(plan.devices[0].kv_file_bytes)));
    CHECK(static_cast<double>(session.cache().bytes_in(KvTier::kHost)) ==
          near(static_cast<double>(plan.devices[0].kv_host_bytes)));
    const double before = engine.seconds();
    test::require_ok(session.step(5));
    const double step = engine.seconds() - before;
    INFO(session.cache().bytes_in(KvTier::kFile)
         << " in the file, planned " << plan.devices[0].kv_file_bytes);
    CHECK(step == Approx(1 / plan.speed.decode_last).epsilon(0.02));
    if (!c.host && !c.file) continue;
    const Event& last = session.events().back();
    INFO(last.text);
    CHECK(last.text.find(" ms") != std::string::npos);
    CHECK(last.pass_seconds > 0);
    CHECK(last.pass_seconds < step);
    CHECK(1 / plan.speed.decode_last > 1 / plan.speed.decode_first + 0.8 * last.pass_seconds);
  }
}

TEST_CASE("a machine without the devices that are asked for is refused", "[simulation]") {
  const MachineDescription cards =
      machine_of(R"({"devices": [{"name": "cuda:0", "bytes": "9G"}]})");
  const auto no_host = Engine::simulate(cards);
  REQUIRE_FALSE(no_host.ok());
  CHECK(no_host.status().code() == Code::kConfig);
  const MachineDescription both = machine_of(
      R"({"devices": [{"name": "cuda:0", "bytes": "9G"}, {"name": "cpu", "bytes": "9G"}]})");
  const auto unknown = Engine::simulate(both, test::config_of({{"devices", "cpu,cuda:1"}}));
  REQUIRE_FALSE(unknown.ok());
  CHECK(unknown.status().message().find("cuda:1") != std::string_view::npos);
  auto some = Engine::simulate(both, test::config_of({{"devices", "cpu,cuda:0"}}));
  REQUIRE(some.ok());
  CHECK(some->machine().devices[0].name == "cpu");
  CHECK(some->machine().link(0, 1).bytes_per_s == both.link(0, 1).bytes_per_s);
}

TEST_CASE("the true V3 shape: the prefill peak is the same at 4 K, 64 K and 160 K, to the byte",
          "[simulation]") {
  int64_t scratch[3] = {};
  const char* contexts[] = {"4096", "65536", "163840"};
  for (int i = 0; i < 3; ++i) {
    const Engine engine = simulate(R"({"devices": [{"name": "cpu", "bytes": "1500G"}]})",
                                   {{"weights.type", "q4_k"},
                                    {"threads", "16"},
                                    {"context.max", contexts[i]},
                                    {"prefill.chunk", "512"}});
    const Model model = load(engine, published_config("v3"));
    Session session = test::new_session(model);
    test::require_ok(session.prefill(some_tokens(model.plan().max_context)));
    check_used_is_planned(model);
    const MemorySnapshot memory = engine.memory();
    scratch[i] = memory.item(0, Purpose::kActivations).bytes_peak +
                 memory.item(0, Purpose::kWorkspace).bytes_peak;
    CHECK(memory.item(0, Purpose::kKv).bytes_peak ==
          model.plan().max_context * model.plan().kv_bytes_per_token);
  }
  CHECK(scratch[0] == scratch[1]);
  CHECK(scratch[0] == scratch[2]);
  INFO("activations and workspace " << scratch[0]);
  CHECK(scratch[0] <= int64_t{160} << 20);
}

TEST_CASE(
    "the scratch of a V3 chunk of 512 stays below 160 MiB for all weights, threads and kernels",
    "[simulation]") {
  for (const std::string& isa : test::runnable_isas())
    for (const char* threads : {"1", "8", "32"}) {
      auto engine =
          Engine::simulate(machine_of(R"({"devices": [{"name": "cpu", "bytes": "3000G"}]})"),
                           test::config_of({{"threads", threads}, {"isa", isa}}));
      INFO(engine.status().message());
      REQUIRE(engine.ok());
      for (const char* type : {"q4_k", "q8_0", "fp8", "bf16", "f16"})
        for (const char* context : {"600", "163840"}) {
          auto plan =
              engine->plan(published_config("v3"), test::config_of({{"weights.type", type},
                                                                    {"threads", threads},
                                                                    {"isa", isa},
                                                                    {"prefill.chunk", "512"},
                                                                    {"context.max", context}}));
          INFO(plan.status().message());
          REQUIRE(plan.ok());
          const int64_t scratch = plan->devices[0].planned(Purpose::kActivations) +
                                  plan->devices[0].planned(Purpose::kWorkspace);
          INFO(isa << ", " << threads << " threads, " << type << ", " << context
                   << " tokens: " << static_cast<double>(scratch) / (1 << 20) << " MiB");
          CHECK(scratch <= int64_t{160} << 20);
        }
    }
}

}  // namespace
}  // namespace fathom
