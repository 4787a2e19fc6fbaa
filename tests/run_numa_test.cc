// Models on machines with several memory nodes, which are pretended: two or three nodes over the
// processors that are here, calls of the system written down.  The same bits, the same bytes.
#include <catch2/catch.hpp>
#include <cerrno>
#include <map>

#include "cpu/cpu_backend.h"
#include "cpu/host_memory.h"
#include "cpu/weight_layout.h"
#include "lib/run/engine_state.h"
#include "lib/run/model_state.h"
#include "support/fake_machine.h"
#include "support/golden.h"
#include "support/golden_models.h"
#include "support/loaded_model.h"
#include "support/recorded_numa.h"

namespace fathom {
namespace {

using Policy = cpu::NumaSystem::Policy;

// Nodes 0, 1, ... with a processor each; the third is one that is not here.
class Machine {
 public:
  explicit Machine(int n_nodes, int64_t free_mib = 900) {
    for (int node = 0; node < n_nodes; ++node)
      files.node(node, std::to_string(node), 1000, free_mib);
    files.write("/proc/meminfo", "MemTotal: 4096000 kB\nMemAvailable: 3072000 kB\n");
  }
  Engine engine(const test::Settings& settings, const HostHooks& hooks = {}) {
    run::CpuDevices cpus;
    cpus.nodes = [this] { return numa_nodes(files.path()); };
    cpus.memory = [this] { return host_memory(files.path()); };
    cpus.make = [this](const CpuOptions& options) -> Result<std::unique_ptr<Backend>> {
      auto made = cpu::CpuBackend::create(options, {files.path(), &system});
      if (!made.ok()) return std::move(made).status();
      return std::unique_ptr<Backend>(std::move(made).value());
    };
    auto engine = run::create_engine(test::config_of(settings), hooks, nullptr, {}, cpus);
    INFO(engine.status().message());
    REQUIRE(engine.ok());
    return std::move(engine).value();
  }
  test::FakeMachine files;
  test::RecordedNuma system;
};

Model load(const Engine& engine, const std::string& path) {
  auto plan = engine.plan(path);
  INFO(plan.status().message());
  REQUIRE(plan.ok());
  INFO(plan->describe());
  auto model = Model::load(engine, *plan);
  INFO(model.status().message());
  REQUIRE(model.ok());
  return std::move(model).value();
}

// Every device holds what the plan says, to the byte, and never held more.
void check_ledger(const Model& model) {
  const Plan& plan = model.plan();
  const MemorySnapshot now = model.engine().memory();
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d) {
    const PlanDevice& device = plan.devices[static_cast<size_t>(d)];
    INFO(device.name);
    CHECK(now.devices[static_cast<size_t>(d)].bytes_peak <= device.peak_bytes());
    for (const Purpose purpose :
         {Purpose::kWeights, Purpose::kExperts, Purpose::kTokenizer, Purpose::kRuntime}) {
      INFO(purpose_name(purpose));
      CHECK(now.item(d, purpose).bytes_peak == device.planned(purpose));
    }
  }
}

const test::Settings kCommon = {{"context.max", "100"}, {"prefill.chunk", "33"}};

test::Settings with(test::Settings settings, const test::Settings& more) {
  settings.insert(settings.end(), more.begin(), more.end());
  return settings;
}

void check_model(const char* name) {
  const std::string path = test::test_data(name);
  const std::vector<float> expected =
      test::logits_and_steps(test::load_model(path, with(kCommon, {{"threads", "1"}})));
  for (const int n_nodes : {1, 2, 3})
    for (const bool devices : {false, true}) {
      INFO(name << " on " << n_nodes << " nodes as " << (devices ? "devices" : "rows"));
      Machine machine(n_nodes);
      const Engine engine = machine.engine(
          with(kCommon, devices ? test::Settings{{"devices", "numa"}, {"threads", "2"}}
                                : test::Settings{{"numa", "rows"}, {"threads", "3"}}));
      CHECK(engine.n_devices() == (devices ? n_nodes : 1));
      const Model model = load(engine, path);
      const auto diff = test::first_bit_difference(expected, test::logits_and_steps(model));
      CHECK(diff.index == -1);
      check_ledger(model);
      CHECK(model.load_report() == model.plan().remarks);  // nothing was refused
    }
}

TEST_CASE("logits have the same bits on any number of nodes", "[numa]") {
  for (const char* name : test::kGoldenModels) check_model(name);
}

TEST_CASE("logits have the same bits on any number of nodes: all other golden models",
          "[numa][slow]") {
  for (const char* name : test::kMoreGoldenModels) check_model(name);
}

TEST_CASE("rows: one copy, each matrix on all nodes, everything else spread", "[numa]") {
  Machine machine(2);
  const std::string path = test::test_data("quant/quant.Q8_0.gguf");
  const Engine engine = machine.engine(with(kCommon, {{"threads", "2"}}));  // rows by itself
  machine.system.take_calls();
  const Model model = load(engine, path);
  const test::Settings off = with(kCommon, {{"threads", "2"}, {"numa", "off"}});
  CHECK(model.weight_bytes() == test::load_model(path, off).weight_bytes());

  const auto page = static_cast<uintptr_t>(cpu::host_page_bytes());
  std::map<uintptr_t, int> node_of;     // of pages that were asked for from one node
  std::map<uintptr_t, Policy> at_last;  // policy of a page when all was done
  for (const auto& call : machine.system.take_calls())
    for (uintptr_t at = call.begin; at < call.begin + uintptr_t(call.bytes); at += page) {
      at_last[at] = call.policy;
      if (call.policy == Policy::kPrefer) {
        REQUIRE(call.nodes.size() == 1);
        // Two copies would lie on both nodes.
        REQUIRE(node_of.emplace(at, call.nodes[0]).second);
      }
    }
  for (const auto& [at, policy] : at_last) REQUIRE(policy == Policy::kSpread);

  // Of each matrix: its pages, half on each node, up to the row group in the middle.
  int64_t n_matrices = 0, n_pages = 0;
  nn::for_each_weight(*model.state()->weights, [&](const auto& weight) {
    if constexpr (std::is_same_v<std::decay_t<decltype(weight)>, Weight>) {
      if (weight.data == nullptr) return;
      for (int64_t i = 0; i < weight.count; ++i, ++n_matrices) {
        const int64_t groups = cpu::row_groups(weight);
        const auto begin = reinterpret_cast<uintptr_t>(weight.matrix(i));
        const auto middle = begin + uintptr_t(groups / 2 * cpu::group_bytes(weight));
        const int64_t bytes = cpu::is_packed(weight)
                                  ? groups * cpu::group_bytes(weight)
                                  : weight.rows * row_bytes(weight.dtype, weight.cols);
        for (uintptr_t at = (begin + page - 1) / page * page; at < begin + uintptr_t(bytes);
             at += page, ++n_pages) {
          REQUIRE(node_of.count(at) == 1);
          CHECK(node_of[at] == (at < middle ? 0 : 1));
        }
      }
    }
  });
  CHECK(n_matrices > 20);
  // All pages that were bound are those of rows; a tied head is the embedding.
  CHECK(n_pages >= static_cast<int64_t>(node_of.size()));
  CHECK(node_of.size() > 50);
}

TEST_CASE("nodes as devices: each with its threads, its memory and its free bytes", "[numa]") {
  Machine machine(2, /*free_mib=*/300);
  machine.files.node(1, "", 500, 400);  // memory alone: no device
  machine.files.node(4, "1", 1000, 200, "32 28 10");
  machine.files.node(0, "0", 1000, 300, "10 15 32");
  const Engine engine = machine.engine(with(kCommon, {{"devices", "numa"}}));
  REQUIRE(engine.n_devices() == 2);
  const MachineDescription& described = engine.machine();
  CHECK(described.devices[0].name == "cpu:0");
  CHECK(described.devices[1].name == "cpu:4");
  CHECK(described.devices[0].bytes == int64_t{1000} << 20);
  CHECK(described.devices[0].budget_bytes == int64_t{301} << 20);
  CHECK(described.devices[1].budget_bytes == int64_t{201} << 20);
  CHECK(described.devices[0].threads == 1);
  // Further than sockets are: 32 instead of 20.
  CHECK(described.link(0, 1).bytes_per_s == Approx(40e9 * 20 / 32));
  const Model model = load(engine, test::test_data("models/tiny-v3"));
  test::logits_and_steps(model);
  // A thread of the library for each device, on its node.
  for (const auto& cpus : machine.system.bound())
    CHECK((cpus == std::vector<int>{0} || cpus == std::vector<int>{1}));
  CHECK(machine.system.bound().size() == 2);
  std::map<std::vector<int>, int64_t> bytes;
  for (const auto& call : machine.system.take_calls()) {
    CHECK(call.policy == Policy::kPrefer);
    bytes[call.nodes] += call.bytes;
  }
  REQUIRE(bytes.size() == 2);
  CHECK(bytes[{0}] > 0);
  CHECK(bytes[{4}] > 0);
  // No layer is on both.
  const Plan& plan = model.plan();
  CHECK(plan.devices[0].planned(Purpose::kWeights) > 0);
  CHECK(plan.devices[1].planned(Purpose::kWeights) > 0);
  check_ledger(model);
}

TEST_CASE("the link between nodes is measured like any other", "[numa][slow]") {
  Machine machine(2);
  const Engine engine = machine.engine({{"devices", "numa"}});
  CHECK(engine.machine().link(0, 1).source == RateSource::kDocumented);
  CHECK(engine.machine().link(0, 1).bytes_per_s == Approx(40e9));  // sockets: a distance of 20
  auto measured = engine.measure(0.02);
  INFO(measured.status().message());
  REQUIRE(measured.ok());
  CHECK(measured->link(0, 1).source == RateSource::kMeasured);
  CHECK(measured->link(0, 1).bytes_per_s > 0);
  // The memory that was copied between was each node's own.
  std::map<std::vector<int>, int64_t> most;
  for (const auto& call : machine.system.take_calls())
    most[call.nodes] = std::max(most[call.nodes], call.bytes);
  CHECK(most[{0}] >= int64_t{64} << 20);
  CHECK(most[{1}] >= int64_t{64} << 20);
}

TEST_CASE("budgets and pins name the devices of nodes", "[numa]") {
  Machine machine(2);
  const Engine engine = machine.engine(with(
      kCommon, {{"devices", "numa"}, {"budget.cpu:1", "100M"}, {"placement.layers", "cpu:1=*"}}));
  CHECK(engine.memory().devices[1].budget_bytes == int64_t{100} << 20);
  const Model model = load(engine, test::test_data("models/tiny-v2"));
  for (const auto& layer : model.plan().placement.layers) CHECK(layer.device == 1);
}

TEST_CASE("names that are no nodes are refused", "[numa]") {
  Machine machine(2);
  run::CpuDevices cpus;
  cpus.nodes = [&] { return numa_nodes(machine.files.path()); };
  const auto complaint = [&](const test::Settings& settings) {
    auto engine = run::create_engine(test::config_of(settings), {}, nullptr, {}, cpus);
    REQUIRE_FALSE(engine.ok());
    CHECK(engine.status().code() == Code::kConfig);
    return std::string(engine.status().message());
  };
  CHECK_THAT(complaint({{"devices", "numa"}, {"budget.cpu:2", "1G"}}),
             Catch::Contains("budget.cpu:2") && Catch::Contains("no node of this number"));
  CHECK_THAT(complaint({{"devices", "numa,cpu:1"}}), Catch::Contains("cpu:1 is a node"));
  CHECK_THAT(complaint({{"devices", "numa"}, {"numa", "off"}}), Catch::Contains("numa = off"));
  CHECK_THAT(complaint({{"devices", "cpu"}, {"budget.cpu:0", "1G"}}),
             Catch::Contains("no device of this name"));
}

TEST_CASE("what is refused is logged, reported and marked, and the model runs", "[numa]") {
  const std::string path = test::test_data("quant/quant.Q8_0.gguf");
  const std::vector<float> expected =
      test::logits_and_steps(test::load_model(path, with(kCommon, {{"threads", "1"}})));
  for (const bool devices : {false, true}) {
    Machine machine(2);
    machine.system.memory_error = EPERM;
    machine.system.thread_error = EPERM;
    std::vector<std::string> warnings;
    HostHooks hooks;
    hooks.log = [&](LogLevel level, std::string_view text) {
      if (level == LogLevel::kWarn) warnings.emplace_back(text);
    };
    Engine engine = machine.engine(
        with(kCommon, {{"devices", devices ? "numa" : "cpu"}, {"threads", "2"}}), hooks);
    const size_t n = devices ? 4 : 2;
    REQUIRE(warnings.size() == n);
    CHECK_THAT(warnings[0], Catch::Contains("does not let memory be bound to nodes"));
    CHECK_THAT(warnings[1], Catch::Contains("does not let threads be bound"));
    test::require_ok(engine.start_timeline());
    const Model model = load(engine, path);
    for (const std::string& warning : warnings)
      CHECK(std::count(model.load_report().begin(), model.load_report().end(), warning) == 1);
    const Timeline timeline = *engine.timeline();
    int64_t marks = 0;
    for (const TimelineMark& mark : timeline.marks) marks += mark.kind == "numa" ? mark.count : 0;
    CHECK(marks == static_cast<int64_t>(n));
    test::require_ok(engine.stop_timeline());
    engine.reset_peaks();
    const auto diff = test::first_bit_difference(expected, test::logits_and_steps(model));
    CHECK(diff.index == -1);
    check_ledger(model);
  }
}

TEST_CASE("without a node in the files a device is what it was", "[numa]") {
  test::FakeMachine machine;
  test::RecordedNuma system;
  auto cpu =
      cpu::CpuBackend::create({.threads = 2, .numa = NumaMode::kRows}, {machine.path(), &system});
  REQUIRE(cpu.ok());
  CHECK((*cpu)->remarks().empty());
  CHECK(system.take_calls().empty());
}

}  // namespace
}  // namespace fathom
