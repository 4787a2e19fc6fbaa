// Placements of true shapes on described machines: every case that can fit is planned, cards carry
// equal shares, or the plan says what binds.  With FATHOM_PLACEMENT_TABLE set to a file name the
// table is written there as Markdown (RESULTS.md has it).
#include <fmt/format.h>
#include <algorithm>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <map>
#include <numeric>

#include "lib/io/tensor_listing.h"
#include "lib/run/engine_state.h"
#include "lib/run/placement_problem.h"
#include "support/loaded_model.h"
#include "support/placement_checks.h"

namespace fathom {
namespace {

struct Card {
  const char* like;
  int count;
};
struct Machine {
  const char* name;
  std::vector<Card> cards;
  const char* host;  // kind of memory
  int host_gib;
};
const Machine kMachines[] = {
    {"1x 3060 12G, 64G", {{"rtx-3060", 1}}, "ddr4-2ch", 64},
    {"1x 4060Ti 16G, 96G", {{"rtx-4060ti-16g", 1}}, "ddr5-2ch", 96},
    {"1x 3090, 128G", {{"rtx-3090", 1}}, "ddr4-8ch", 128},
    {"1x 4090, 256G", {{"rtx-4090", 1}}, "ddr4-8ch", 256},
    {"1x 4090, 512G", {{"rtx-4090", 1}}, "ddr5-8ch", 512},
    {"1x 4090, 1024G", {{"rtx-4090", 1}}, "ddr5-12ch", 1024},
    {"1x 5090, 768G", {{"rtx-5090", 1}}, "ddr5-12ch", 768},
    {"2x 3090, 256G", {{"rtx-3090", 2}}, "ddr4-8ch", 256},
    {"2x 4090, 192G", {{"rtx-4090", 2}}, "ddr5-2ch", 192},
    {"4090 + 3060, 256G", {{"rtx-4090", 1}, {"rtx-3060", 1}}, "ddr4-8ch", 256},
    {"A6000 + 3090, 128G", {{"rtx-a6000", 1}, {"rtx-3090", 1}}, "ddr4-8ch", 128},
    {"4x 3090, 256G", {{"rtx-3090", 4}}, "ddr4-8ch", 256},
    {"4x 4090, 512G", {{"rtx-4090", 4}}, "ddr5-8ch", 512},
    {"2x A6000, 16G", {{"rtx-a6000", 2}}, "ddr4-2ch", 16},
    {"4x L40S, 64G", {{"l40s", 4}}, "ddr5-8ch", 64},
    {"8x 4090, 1024G", {{"rtx-4090", 8}}, "ddr5-12ch", 1024},
    {"8x V100 32G, 32G", {{"v100-32g", 8}}, "ddr4-8ch", 32},
    {"8x A100 40G, 512G", {{"a100-40g", 8}}, "ddr4-8ch", 512},
    {"8x A100 80G, 64G", {{"a100-80g", 8}}, "ddr4-8ch", 64},
    {"8x H100, 2048G", {{"h100-80g", 8}}, "ddr5-8ch", 2048},
    {"4x A100 80G + 4x 40G", {{"a100-80g", 4}, {"a100-40g", 4}}, "ddr4-8ch", 128},
    {"2x H100 + 2x 4090", {{"h100-80g", 2}, {"rtx-4090", 2}}, "ddr5-8ch", 512},
    {"1x T4, 48G", {{"t4", 1}}, "ddr4-8ch", 48},
    {"no card, 768G", {}, "ddr5-12ch", 768},
};

MachineDescription describe(const Machine& machine) {
  std::string json = fmt::format(R"({{"devices": [{{"name": "cpu", "like": "{}", "bytes": "{}G"}})",
                                 machine.host, machine.host_gib);
  int index = 0;
  for (const Card& card : machine.cards)
    for (int i = 0; i < card.count; ++i)
      json += fmt::format(R"(, {{"name": "cuda:{}", "kind": "cuda", "like": "{}"}})", index++,
                          card.like);
  auto parsed = MachineDescription::parse(json + "]}");
  INFO(json << ": " << parsed.status().message());
  REQUIRE(parsed.ok());
  return std::move(parsed).value();
}

// Proportional splitting, as other engines do it: layers in contiguous pieces in proportion to the
// cards' memory, whole layers; where that is too much, the routed experts of the first layers go to
// the host, as many layers as bring the sum down to what the cards hold.
Placement proportional(const run::SolverProblem& p, const ModelConfig& c) {
  std::vector<int> cards;
  double memory = 0;
  for (int d = 0; d < p.n_devices; ++d)
    if (!p.is_host[static_cast<size_t>(d)]) {
      cards.push_back(d);
      memory += static_cast<double>(p.budget[static_cast<size_t>(d)]);
    }
  const auto n_layers = static_cast<size_t>(c.num_hidden_layers);
  std::vector<int> layer_device(n_layers, 0);
  if (cards.empty()) return Placement::by_layer(c, layer_device);
  double share = 0;
  size_t at = 0;
  for (int d : cards) {
    share += static_cast<double>(p.budget[static_cast<size_t>(d)]) / memory;
    for (; at < n_layers && static_cast<double>(at) + 0.5 < share * static_cast<double>(n_layers);
         ++at)
      layer_device[at] = d;
  }
  for (; at < n_layers; ++at) layer_device[at] = cards.back();
  Placement placement = Placement::by_layer(c, layer_device);
  double total = 0;
  const run::PlacementCost all = cost_of(p, placement);
  for (int64_t b : all.bytes) total += static_cast<double>(b);
  for (size_t l = 0; l < n_layers && total > memory; ++l) {
    if (placement.layers[l].experts.empty()) continue;
    placement.layers[l].experts = {{0, 0, c.n_routed_experts}};
    total -= static_cast<double>(p.expert_bytes[l][0] * c.n_routed_experts);
  }
  return placement;
}

double max_over_mean(const std::vector<double>& values) {
  if (values.empty()) return 1;
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return sum > 0 ? *std::max_element(values.begin(), values.end()) *
                       static_cast<double>(values.size()) / sum
                 : 1;
}

struct Row {
  bool feasible = false, needed_fits = false, balanced = false;
  UnevenCause cause = UnevenCause::kNone;
  std::string text, why, json;
  std::vector<std::string> refuted;
  double seconds = 0;
};

Row plan_case(const Machine& machine, const char* model, const char* type,
              const std::string& pinned_layers = "auto") {
  Row row;
  const std::string path = std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/" + model + ".json";
  const Config config = test::config_of(
      {{"weights.type", type}, {"context.max", "16384"}, {"placement.layers", pinned_layers}});
  auto engine = Engine::simulate(describe(machine), config);
  INFO(engine.status().message());
  REQUIRE(engine.ok());
  const auto start = std::chrono::steady_clock::now();
  auto planned = engine->plan(path, config);
  row.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  INFO(planned.status().message());
  REQUIRE(planned.ok());
  const Plan& plan = *planned;
  row.feasible = plan.feasible;

  // What no placement can do without: all weights and the cache once, and the smallest scratch.
  auto file = io::list_tensors(path, config.weights_type);
  REQUIRE(file.ok());
  std::vector<std::string> names;
  for (const PlanDevice& device : plan.devices) names.push_back(device.name);
  const auto pins = run::read_pins(config, plan.model, names);
  REQUIRE(pins.ok());
  run::PlacementInputs inputs{
      .engine = *engine->state(), .file = *file, .plan = plan, .pins = *pins, .available = {}};
  for (const PlanDevice& device : plan.devices) inputs.available.push_back(device.budget_bytes);
  inputs.host_available = plan.devices[0].budget_bytes;
  inputs.context = 16384;
  inputs.chunk =
      plan.devices.size() > 1 && plan.feasible ? plan.balance.chunk_tokens : plan.prefill_chunk;
  if (plan.feasible && plan.devices.size() > 1) CHECK(plan.balance.context_tokens == 16384);
  auto problem = run::placement_problem(inputs);
  REQUIRE(problem.ok());
  double needed = static_cast<double>(problem->embed_bytes[0] + problem->head_bytes[0]), room = 0;
  for (size_t l = 0; l < problem->own_bytes.size(); ++l)
    needed += static_cast<double>(problem->own_bytes[l][0] +
                                  problem->n_experts * problem->expert_bytes[l][0]);
  for (int64_t b : problem->budget) room += static_cast<double>(std::max<int64_t>(b, 0));
  row.needed_fits = needed < 0.98 * room;
  if (!plan.feasible) {
    row.text = fmt::format("does not fit: {:.0f} of {:.0f} GiB | | | | |",
                           needed / (int64_t{1} << 30), room / (int64_t{1} << 30));
    return row;
  }

  std::vector<double> memory, time;
  double worst_share = 0;
  for (const PlanDevice& device : plan.devices) {
    const double share =
        static_cast<double>(device.peak_bytes()) / static_cast<double>(device.budget_bytes);
    worst_share = std::max(worst_share, share);
    if (device.kind == DeviceKind::kCpu) continue;
    // Copies of experts take what nothing else needs, and give it back.
    int64_t peak = 0;
    for (const auto& bytes : device.bytes)
      peak = std::max(peak, std::accumulate(bytes.begin(), bytes.end(), int64_t{0}) -
                                bytes[static_cast<size_t>(Purpose::kExpertCache)]);
    memory.push_back(static_cast<double>(peak) / static_cast<double>(device.budget_bytes));
    time.push_back(device.decode_seconds);
  }
  const double memory_balance = max_over_mean(memory), time_balance = max_over_mean(time);
  row.balanced = memory_balance <= 1.05 && time_balance <= 1.10;
  if (!memory.empty()) CHECK(memory_balance == Approx(plan.balance.memory));
  if (!memory.empty()) CHECK(time_balance == Approx(plan.balance.time));
  row.cause = plan.balance.cause;
  row.json = plan.to_json();
  for (const std::string& remark : plan.remarks)
    if (remark.starts_with("placement: of the cards' mean"))
      row.why = remark.substr(remark.find(" works") + 1);
  if (problem->n_devices > 1) row.refuted = test::refute(*problem, plan);

  const run::PlacementCost ours = cost_of(*problem, plan.placement);
  const Placement other = proportional(*problem, plan.model);
  const run::PlacementCost theirs = cost_of(*problem, other);
  double worst_card = 0;
  for (size_t d = 0; d < theirs.bytes.size(); ++d)
    worst_card =
        std::max(worst_card, static_cast<double>(theirs.bytes[d]) /
                                 static_cast<double>(std::max<int64_t>(problem->budget[d], 1)));
  row.text =
      fmt::format("{:.2f} | {:.2f} | {:.1f} | {:.0f} % | {:.1f} | {:.0f} %{}", memory_balance,
                  time_balance, ours.latency * 1e3, worst_share * 100, theirs.latency * 1e3,
                  worst_card * 100, theirs.bytes_over > 0 ? " (does not fit)" : "");
  return row;
}

void check_table(std::span<const Machine> machines, std::span<const char* const> models,
                 std::span<const char* const> types, std::FILE* table) {
  int planned = 0, balanced = 0;
  std::map<std::string_view, int> causes;
  double slowest = 0;
  if (table)
    std::fprintf(
        table,
        "| machine | model | memory max/mean | time max/mean | ms per token | fullest | "
        "proportional: ms | its fullest | what binds |\n|---|---|---|---|---|---|---|---|---|\n");
  for (const Machine& machine : machines)
    for (const char* model : models)
      for (const char* type : types) {
        const Row row = plan_case(machine, model, type);
        INFO(machine.name << " " << model << " " << type << ": " << row.text << " " << row.why);
        CHECK((row.feasible || !row.needed_fits));
        if (row.feasible) {
          ++planned;
          if (row.balanced) ++balanced;
          CHECK(row.balanced == (row.cause == UnevenCause::kNone));
          CHECK(row.balanced == row.why.empty());
          ++causes[uneven_cause_name(row.cause)];
          for (const std::string& text : row.refuted) {
            INFO(text);
            CHECK(row.refuted.empty());
          }
        }
        slowest = std::max(slowest, row.seconds);
        if (table)
          std::fprintf(table, "| %s | %s %s | %s | %s |\n", machine.name, model, type,
                       row.text.c_str(), row.feasible && row.balanced ? "" : row.why.c_str());
        if (table) std::fflush(table);
      }
  if (table) {
    std::fprintf(table, "\n%d planned, %d balanced; slowest plan %.2f s\n", planned, balanced,
                 slowest);
    for (const auto& [cause, n] : causes)
      std::fprintf(table, "%s: %d\n", std::string(cause).c_str(), n);
  }
  CHECK(planned > 0);
}

TEST_CASE("a few machines and models", "[placement][machines]") {
  const char* const models[] = {"v2"};
  const char* const types[] = {"q4_k"};
  check_table(std::span(kMachines).subspan(3, 1), models, types, nullptr);
  check_table(std::span(kMachines).subspan(12, 1), models, types, nullptr);
}

TEST_CASE("pins that make cards uneven are told as the cause", "[placement][machines]") {
  const Machine machine{"4x L40S, 64G", {{"l40s", 4}}, "ddr5-8ch", 64};
  const Row even = plan_case(machine, "v2", "q4_k");
  CHECK(even.cause == UnevenCause::kNone);
  const Row row = plan_case(machine, "v2", "q4_k", "cuda:0=0-17");
  INFO(row.text << " " << row.why);
  CHECK(row.feasible);
  CHECK(row.cause == UnevenCause::kPins);
  CHECK(row.refuted == std::vector<std::string>{});
  CHECK(row.why.find("pins: without them") != std::string::npos);
  CHECK(row.json.find("\"cause\": \"pins\"") != std::string::npos);
}

TEST_CASE("671 B parameters on eight devices are planned within a second",
          "[placement][machines]") {
  const Machine* machine =
      std::find_if(std::begin(kMachines), std::end(kMachines),
                   [](const Machine& m) { return std::string_view(m.name) == "8x 4090, 1024G"; });
  REQUIRE(machine != std::end(kMachines));
  const std::string path = std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v3.json";
  const Config config = test::config_of({{"weights.type", "q4_k"}});
  auto engine = Engine::simulate(describe(*machine), config);
  REQUIRE(engine.ok());
  // Processor time, the best of three: others have their share of the machine.
  double seconds = 1e9;
  for (int i = 0; i < 3; ++i) {
    const std::clock_t start = std::clock();
    auto plan = engine->plan(path, config);
    seconds = std::min(seconds, static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    REQUIRE(plan.ok());
    CHECK(plan->feasible);
  }
  INFO(seconds << " s");
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  CHECK(seconds <= 1);
#endif
}

TEST_CASE("all machines, models and types", "[placement][machines][slow]") {
  const char* const models[] = {"v2-lite", "v2", "v3", "kimi-k2"};
  const char* const types[] = {"q4_k", "q8_0", "fp8"};
  const char* path = std::getenv("FATHOM_PLACEMENT_TABLE");
  std::FILE* table = path ? std::fopen(path, "w") : nullptr;
  check_table(kMachines, models, types, table);
  if (table) std::fclose(table);
}

}  // namespace
}  // namespace fathom
