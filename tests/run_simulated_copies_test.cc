// Copies of experts at true shapes: simulated cards keep them while the text is short, and give
// them back page by page as it grows, before anything else suffers.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdio>

#include "lib/run/simulated_routing.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

TEST_CASE("simulated tokens choose different experts, the likely ones more often",
          "[simulation][expert_cache]") {
  for (const double skew : {0.0, 1.0}) {
    run::SimulatedRouting routing, again;
    routing.begin(160, skew);
    again.begin(160, skew);
    std::vector<int32_t> ids(6 * 20000), same(ids.size());
    routing.choose(20000, 6, ids.data());
    again.choose(20000, 6, same.data());
    CHECK(ids == same);
    std::vector<int64_t> uses(160);
    bool different = true;
    for (size_t i = 0; i < ids.size(); ++i) {
      REQUIRE(ids[i] >= 0);
      REQUIRE(ids[i] < 160);
      ++uses[static_cast<size_t>(ids[i])];
      for (size_t j = i / 6 * 6; j < i; ++j) different = different && ids[j] != ids[i];
    }
    CHECK(different);
    std::sort(uses.begin(), uses.end());
    CHECK(uses.front() > 0);
    if (skew == 0)
      CHECK(uses.back() < 2 * uses.front());
    else
      CHECK(uses.back() > 30 * uses.front());
  }
  // As many as there are, however unlikely some of them.
  run::SimulatedRouting few;
  few.begin(8, 4);
  std::vector<int32_t> ids(8);
  few.choose(1, 8, ids.data());
  std::sort(ids.begin(), ids.end());
  CHECK(ids == std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7});
}

struct Shape {
  const char *model, *weights;
  int n_cards, host_gib;
  const char *context, *skew;
};

MachineDescription machine_of(const Shape& shape) {
  std::string json = std::string(R"({"expert_skew": )") + shape.skew +
                     R"(, "devices": [{"name": "cpu", "like": "ddr5-8ch", "bytes": ")" +
                     std::to_string(shape.host_gib) + "G\"}";
  for (int i = 0; i < shape.n_cards; ++i)
    json +=
        R"(, {"name": "cuda:)" + std::to_string(i) + R"(", "kind": "cuda", "like": "rtx-4090"})";
  auto machine = MachineDescription::parse(json + "]}");
  INFO(machine.status().message());
  REQUIRE(machine.ok());
  return std::move(machine).value();
}

// What one run shows, for RESULTS.md: printed with -s.
void check_copies(const Shape& shape) {
  INFO(shape.model << " " << shape.weights << ", " << shape.n_cards << " cards, skew "
                   << shape.skew);
  const Config config =
      test::config_of({{"weights.type", shape.weights}, {"context.max", shape.context}});
  bool within = true;
  std::vector<int64_t> budgets(static_cast<size_t>(shape.n_cards) + 1, INT64_MAX);
  HostHooks hooks;
  hooks.memory = [&](int device, Purpose, int64_t, int64_t total) {
    within = within && total <= budgets[static_cast<size_t>(device)];
    return true;
  };
  auto engine = Engine::simulate(machine_of(shape), config, hooks);
  REQUIRE(engine.ok());
  const std::string path =
      std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/" + shape.model + ".json";
  auto plan = engine->plan(path);
  REQUIRE(plan.ok());
  REQUIRE(plan->feasible);
  for (size_t d = 0; d < budgets.size(); ++d) budgets[d] = plan->devices[d].budget_bytes;
  auto model = Model::load(*engine, *plan);
  INFO(model.status().message());
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  const auto steps = [&](int n) {
    const double start = engine->seconds();
    for (int i = 0; i < n; ++i) test::require_ok(session.step(1));
    return (engine->seconds() - start) / n;
  };
  const auto hit_rate = [&](const ExpertCacheStats& before) {
    const ExpertCacheStats now = model->expert_cache();
    return static_cast<double>(now.hits - before.hits) /
           static_cast<double>(now.choices - before.choices);
  };

  // A short text: cards fill with copies, and steps become shorter.
  test::require_ok(session.prefill(std::vector<int32_t>(100, 1)));
  const double cold = 1 / plan->speed.decode_first;
  steps(400);
  const ExpertCacheStats warm = model->expert_cache();
  CHECK(warm.n_experts > 0);
  const double step = steps(100), hits = hit_rate(warm);
  CHECK(hits > 0);
  for (int d = 1; d <= shape.n_cards; ++d) {
    const PlanDevice& card = plan->devices[static_cast<size_t>(d)];
    const int64_t copies = engine->memory().item(d, Purpose::kExpertCache).bytes_now;
    CHECK(copies <= card.expert_cache_bytes);
    CHECK((copies > 0) == (card.expert_cache_bytes > 0));
  }

  // The text grows to the end: copies go as the pages come, and nothing else has happened.
  int64_t last = warm.bytes;
  const int64_t end = plan->max_context;
  std::string course;
  for (int part = 1; part <= 4; ++part) {
    const int64_t to = 900 + (end - 900) * part / 4;
    test::require_ok(session.prefill(
        std::vector<int32_t>(static_cast<size_t>(to - session.n_tokens() - 50), 1)));
    const ExpertCacheStats before = model->expert_cache();
    const double each = steps(50);
    const ExpertCacheStats now = model->expert_cache();
    char line[128];
    std::snprintf(line, sizeof line, "%lld tokens: %lld copies, hits %.1f %%, step %.1f ms\n",
                  static_cast<long long>(session.n_tokens()), static_cast<long long>(now.n_experts),
                  100 * hit_rate(before), each * 1e3);
    course += line;
    // No more room than before; what an old page leaves of an expert's place may be found later.
    CHECK(now.bytes <= last + last / 16);
    last = now.bytes;
  }
  INFO("cold step " << cold * 1e3 << " ms, warm " << step * 1e3 << " ms, hits " << hits * 100
                    << " %, " << warm.n_experts << " copies\n"
                    << course);
  CHECK(step < cold);
  CHECK(session.n_tokens() == end);
  CHECK(session.events().empty());
  CHECK(within);
  CHECK(model->expert_cache().dropped > 0);
  CHECK(last < warm.bytes);
  // Everything but the copies is what the plan has said, and they take no more than it leaves them.
  const MemorySnapshot now = engine->memory();
  for (size_t d = 0; d < plan->devices.size(); ++d) {
    const PlanDevice& device = plan->devices[d];
    INFO(device.name);
    const auto index = static_cast<int>(d);
    CHECK(now.devices[d].bytes_now - now.item(index, Purpose::kExpertCache).bytes_now ==
          device.total(Phase::kDecode) - device.bytes[static_cast<size_t>(Phase::kDecode)]
                                                     [static_cast<size_t>(Purpose::kExpertCache)]);
    CHECK(now.item(index, Purpose::kExpertCache).bytes_now <=
          device.bytes[static_cast<size_t>(Phase::kDecode)]
                      [static_cast<size_t>(Purpose::kExpertCache)]);
  }
}

TEST_CASE("copies of 236 B on two simulated cards go as the text grows",
          "[simulation][expert_cache]") {
  check_copies({"v2", "q4_k", 2, 256, "32768", "0.8"});
}

TEST_CASE("copies of 236 B and 671 B on simulated cards go as the text grows, more shapes",
          "[simulation][expert_cache][slow]") {
  for (const char* skew : {"0", "0.5", "1"}) {
    check_copies({"v2", "q8_0", 1, 384, "65536", skew});
    check_copies({"v2", "q4_k", 4, 256, "163840", skew});
    check_copies({"v3", "q4_k", 8, 1024, "163840", skew});
    check_copies({"v3", "q4_k", 1, 512, "65536", skew});
  }
}

}  // namespace
}  // namespace fathom
