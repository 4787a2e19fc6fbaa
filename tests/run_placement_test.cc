// Placement over several devices: the same bits wherever layers, experts, embedding and head live;
// what is pinned stays pinned; every device keeps its plan and its budget.
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <numeric>

#include "lib/run/engine_state.h"
#include "support/golden.h"
#include "support/golden_models.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

using test::some_tokens;

// What every device holds now is what the plan says of decoding, and never was over its budget.
void check_ledger(const Model& model) {
  const Plan& plan = model.plan();
  const MemorySnapshot now = model.engine().memory();
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d) {
    const PlanDevice& device = plan.devices[static_cast<size_t>(d)];
    INFO(device.name);
    CHECK(now.devices[static_cast<size_t>(d)].bytes_peak <= device.peak_bytes());
    CHECK(device.peak_bytes() <= device.budget_bytes);
    for (Purpose purpose : {Purpose::kWeights, Purpose::kExperts}) {
      INFO(purpose_name(purpose));
      CHECK(now.item(d, purpose).bytes_now == device.planned(purpose));
    }
  }
}

// The golden models have two or three layers, the first of them dense, and eight experts or,
// quantised, four.
const test::Settings kPlacements[] = {
    {{"devices", "cpu:0,cpu:1"}},
    {{"devices", "cpu:0,cpu:1,cpu:2"}},
    {{"devices", "cpu:0,cpu:1,cpu:2,cpu:3"}},
    // All routed experts elsewhere, as with one card and a host.
    {{"devices", "cpu:0,cpu:1"}, {"placement.layers", "cpu:0=*"}, {"placement.experts", "cpu:1=*"}},
    // Experts of a layer on three devices, the layer's own in the middle, first, last and not at
    // all.
    {{"devices", "cpu:0,cpu:1,cpu:2"},
     {"placement.layers", "cpu:1=*"},
     {"placement.experts", "cpu:0=*:0-1,cpu:1=*:2-4,cpu:2=*:5-7"}},
    {{"devices", "cpu:0,cpu:1,cpu:2"},
     {"placement.layers", "cpu:0=*"},
     {"placement.experts", "cpu:0=1:0-1+6-7,cpu:1=1:2-3,cpu:2=1:4-5,cpu:2=2:0-3,cpu:1=2:4-7"}},
    // Four experts named, where there are more the plan places them.
    {{"devices", "cpu:0,cpu:1,cpu:2"},
     {"placement.layers", "cpu:1=*"},
     {"placement.experts", "cpu:2=*:0,cpu:1=*:1-2,cpu:0=*:3"}},
    // Layers that go back and forth, embedding and head on devices of their own.
    {{"devices", "cpu:0,cpu:1,cpu:2,cpu:3"},
     {"placement.layers", "cpu:1=*,cpu:2=1"},
     {"placement.embed", "cpu:0"},
     {"placement.head", "cpu:3"}},
    {{"devices", "cpu:0,cpu:1,cpu:2,cpu:3"},
     {"placement.layers", "cpu:2=*"},
     {"placement.experts", "cpu:3=*"},
     {"placement.embed", "cpu:1"},
     {"placement.head", "cpu:0"}},
};

void check_placements(const char* name) {
  const std::string path = test::test_data(name);
  const Model one =
      test::load_model(path, {{"context.max", "100"}, {"prefill.chunk", "33"}, {"threads", "1"}});
  const std::vector<float> expected = test::logits_and_steps(one);
  for (const test::Settings& placement : kPlacements) {
    test::Settings settings = placement;
    settings.insert(settings.end(),
                    {{"context.max", "100"}, {"prefill.chunk", "33"}, {"threads", "1"}});
    std::string text;
    for (const auto& [key, value] : placement) text += key + "=" + value + " ";
    if (text.find("-7") != std::string::npos && one.config().n_routed_experts < 8) continue;
    INFO(name << " with " << text);
    const Model model = test::load_model(path, settings);
    const auto diff = test::first_bit_difference(expected, test::logits_and_steps(model));
    CHECK(diff.index == -1);
    check_ledger(model);
  }
}

TEST_CASE("logits have the same bits wherever the parts of a model live", "[placement]") {
  for (const char* name : test::kGoldenModels) check_placements(name);
}

TEST_CASE("logits have the same bits wherever the parts live: all other golden models",
          "[placement][slow]") {
  for (const char* name : test::kMoreGoldenModels) check_placements(name);
}

TEST_CASE("what is pinned lives where it is pinned", "[placement]") {
  const Model model = test::load_model(test::test_data("models/tiny-v3"),
                                       {{"devices", "cpu:0,cpu:1,cpu:2"},
                                        {"context.max", "64"},
                                        {"placement.layers", "cpu:1=0,cpu:0=*"},
                                        {"placement.experts", "cpu:2=*,cpu:0=2,cpu:1=2:3-5"},
                                        {"placement.embed", "cpu:2"},
                                        {"placement.head", "cpu:1"}});
  const Placement& p = model.plan().placement;
  const int64_t n = model.config().n_routed_experts;
  CHECK(p.embed_device == 2);
  CHECK(p.head_device == 1);
  CHECK(p.layers[0] == LayerPlacement{1, 0, {}});
  CHECK(p.layers[1] == LayerPlacement{0, 0, {{2, 0, n}}});
  CHECK(p.layers[2] == LayerPlacement{0, 1, {{0, 0, 3}, {1, 3, 3}, {0, 6, n - 6}}});
  CHECK(model.plan().devices[2].n_layers == 0);
  CHECK(model.plan().devices[2].n_experts == n);
  CHECK(model.plan().devices[2].planned(Purpose::kKv) == 0);
}

TEST_CASE("pins that cannot be are refused by name", "[placement]") {
  const Engine engine = [] {
    auto made = Engine::create(test::config_of({{"devices", "cpu:0,cpu:1"}}));
    REQUIRE(made.ok());
    return std::move(made).value();
  }();
  const auto refusal = [&](const char* key, const char* value) {
    Config config = test::config_of({{"devices", "cpu:0,cpu:1"}});
    Status set = config.set(key, value);
    if (!set.ok()) return set;
    return engine.plan(test::test_data("models/tiny-v3"), config).status();
  };
  const struct {
    const char *key, *value, *says;
  } cases[] = {
      {"placement.layers", "cpu:0", "must be device=layers"},
      {"placement.layers", "cpu:0=3-1", "numbers or ranges"},
      {"placement.layers", "cpu:0=1-2+", "numbers or ranges"},
      {"placement.layers", "cpu:7=0", "has no device"},
      {"placement.layers", "cpu:0=0-9", "layers 0 to 2"},
      {"placement.layers", "cpu:0=0-1,cpu:1=1", "layer 1 is pinned to another device"},
      {"placement.experts", "cpu:0=0", "no layer there has routed experts"},
      {"placement.experts", "cpu:0=1:0-999", "experts 0 to"},
      {"placement.experts", "cpu:0=1:0-3,cpu:1=1:3", "expert 3 of layer 1"},
      {"placement.embed", "cpu:0,cpu:1", "one device"},
      {"placement.head", "cpu:9", "has no device"},
  };
  for (const auto& c : cases) {
    const Status status = refusal(c.key, c.value);
    INFO(c.key << " = " << c.value << ": " << status.message());
    CHECK(status.code() == Code::kConfig);
    CHECK(status.key() == c.key);
    CHECK(status.message().find(c.says) != std::string_view::npos);
  }
}

TEST_CASE("two devices of 60 % of a model run it, each under its budget at all times",
          "[placement]") {
  for (const std::string& path :
       {std::string(FATHOM_EXAMPLE_MODEL), test::test_data("models/tiny-v3")}) {
    const test::Settings settings{
        {"context.max", "600"}, {"prefill.chunk", "32"}, {"threads", "1"}};
    const Model one = test::load_model(path, settings);
    const int64_t whole = one.plan().devices[0].peak_bytes();
    // A device among several has a thread of its own, whose stack is no part of the model.
    auto two = Engine::create(test::config_of({{"devices", "cpu:0,cpu:1"}, {"threads", "1"}}));
    REQUIRE(two.ok());
    const int64_t thread = two->device(0).runtime_bytes() - one.engine().device(0).runtime_bytes();
    const auto with_share = [&](int percent) {
      test::Settings more = settings;
      const std::string budget = std::to_string(whole * percent / 100 + thread);
      more.insert(more.end(),
                  {{"devices", "cpu:0,cpu:1"}, {"budget.cpu:0", budget}, {"budget.cpu:1", budget}});
      return more;
    };
    INFO(path << ", " << whole << " bytes on one device");

    // The observer sees every change before it is made.
    int64_t most[2] = {0, 0};
    HostHooks hooks;
    hooks.memory = [&](int device, Purpose, int64_t, int64_t total) {
      most[device] = std::max(most[device], total);
      return true;
    };
    const Config config = test::config_of(with_share(60));
    auto engine = Engine::create(config, hooks);
    REQUIRE(engine.ok());
    auto plan = engine->plan(path);
    REQUIRE(plan.ok());
    INFO(plan->describe());
    REQUIRE(plan->feasible);
    auto model = Model::load(*engine, *plan);
    INFO(model.status().message());
    REQUIRE(model.ok());
    const auto diff =
        test::first_bit_difference(test::logits_and_steps(one), test::logits_and_steps(*model));
    CHECK(diff.index == -1);
    Session session = test::new_session(*model);
    test::require_ok(session.prefill(some_tokens(599, one.config().vocab_size)));
    test::require_ok(session.step(1));
    for (int d = 0; d < 2; ++d) {
      CHECK(most[d] > whole / 4);
      CHECK(most[d] <= whole * 60 / 100 + thread);
    }

    // Less than the model in all: refused, with what would help, best first, each of it true.
    auto small = Engine::create(test::config_of(with_share(45)));
    REQUIRE(small.ok());
    auto refused = small->plan(path);
    REQUIRE(refused.ok());
    CHECK_FALSE(refused->feasible);
    CHECK(refused->bytes_short > 0);
    CHECK_FALSE(refused->alternatives.empty());
    for (const PlanAlternative& alternative : refused->alternatives) {
      Config changed = test::config_of(with_share(45));
      for (const auto& [key, value] : alternative.changes)
        test::require_ok(changed.set(key, value));
      auto again = small->plan(path, changed);
      REQUIRE(again.ok());
      INFO(alternative.text);
      CHECK(again->feasible);
    }
    CHECK(Model::load(*small, *refused).status().code() == Code::kBudget);
  }
}

TEST_CASE("chunks of a prompt overlap on two simulated cards", "[placement][pipeline]") {
  auto machine = MachineDescription::parse(
      R"({"devices": [{"name": "cpu", "bytes": "32G"},
                      {"name": "cuda:0", "kind": "cuda", "bytes": "24G"},
                      {"name": "cuda:1", "kind": "cuda", "bytes": "24G"}]})");
  REQUIRE(machine.ok());
  const Config config = test::config_of({{"weights.type", "q8_0"},
                                         {"context.max", "16384"},
                                         {"placement.goal", "prefill"},
                                         {"placement.embed", "cuda:0"}});
  auto engine = Engine::simulate(*machine, config);
  REQUIRE(engine.ok());
  const std::string path = std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2-lite.json";
  auto plan = engine->plan(path);
  REQUIRE(plan.ok());
  INFO(plan->describe());
  REQUIRE(plan->feasible);
  auto model = Model::load(*engine, *plan);
  INFO(model.status().message());
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  const int64_t n_chunks = 24, n = n_chunks * plan->prefill_chunk;
  const double start = engine->state()->seconds();
  std::vector<double> busy;
  for (int d : {1, 2}) busy.push_back(-engine->busy_seconds(d));
  test::require_ok(session.prefill(some_tokens(n, model->config().vocab_size)));
  const double elapsed = engine->state()->seconds() - start;
  for (int d : {1, 2}) busy[static_cast<size_t>(d - 1)] += engine->busy_seconds(d);
  // The busier device works all the time; the other one's first or last chunk stands alone.
  const double most = std::max(busy[0], busy[1]), other = std::min(busy[0], busy[1]);
  const double bound = most + other / static_cast<double>(n_chunks);
  INFO("elapsed " << elapsed << ", busy " << busy[0] << " and " << busy[1] << ", bound " << bound);
  CHECK(elapsed <= 1.10 * bound);
  CHECK(elapsed >= bound * 0.999);
  CHECK(other >= 0.8 * most);
}

TEST_CASE("a prompt that overlaps is the one that does not, also cancelled halfway",
          "[placement][pipeline]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{{"context.max", "300"}, {"prefill.chunk", "16"}, {"threads", "1"}};
  test::Settings two = settings;
  two.insert(two.end(),
             {{"devices", "cpu:0,cpu:1,cpu:2"}, {"placement.layers", "cpu:0=0,cpu:1=1,cpu:2=2"}});
  const Model one = test::load_model(path, settings), several = test::load_model(path, two);
  const auto tokens = some_tokens(250, one.config().vocab_size);
  CHECK(
      test::first_bit_difference(test::last_logits(one, tokens), test::last_logits(several, tokens))
          .index == -1);

  Session session = test::new_session(several);
  RunOptions options;
  options.progress = [&](ProgressPhase, int64_t done, int64_t) { return done < 96; };
  CHECK(session.prefill(tokens, options).code() == Code::kCancelled);
  CHECK(session.n_tokens() == 96);
  CHECK(session.cache().size_bytes() == several.plan().kv_bytes(0, 96) +
                                            several.plan().kv_bytes(1, 96) +
                                            several.plan().kv_bytes(2, 96));
  test::require_ok(session.prefill(std::span(tokens).subspan(96)));
  const auto expected = test::last_logits(one, tokens);
  CHECK(test::first_bit_difference(expected, session.logits()).index == -1);
}

// The user's case: Coder-V2 236B, 16,384 tokens, cards of 24 GB (or one of 12 beside), the rest on
// the host.
struct SharedCase {
  const char* name;
  std::vector<const char*> cards;
  const char* weights;
};

void check_shares(const SharedCase& c) {
  std::string json = R"({"devices": [{"name": "cpu", "like": "ddr4-8ch", "bytes": "256G"})";
  const size_t n_cards = c.cards.size();
  for (size_t i = 0; i < n_cards; ++i)
    json += R"(, {"name": "cuda:)" + std::to_string(i) + R"(", "kind": "cuda", "like": ")" +
            c.cards[i] + "\"}";
  auto machine = MachineDescription::parse(json + "]}");
  REQUIRE(machine.ok());
  // The most that a device held in a phase: the hook sees every change before it is made.
  std::array<std::vector<int64_t>, kPhaseCount> most;
  for (auto& phase : most) phase.resize(n_cards + 1);
  std::vector<int64_t> held(n_cards + 1);
  auto phase = Phase::kLoad;
  int64_t changes = 0;
  HostHooks hooks;
  hooks.memory = [&](int device, Purpose, int64_t, int64_t total) {
    const auto d = static_cast<size_t>(device);
    held[d] = total;
    int64_t& highest = most[static_cast<size_t>(phase)][d];
    highest = std::max(highest, total);
    ++changes;
    return true;
  };
  const auto begin = [&](Phase next) {
    phase = next;
    most[static_cast<size_t>(phase)] = held;
  };
  const Config config = test::config_of({{"weights.type", c.weights}, {"context.max", "16384"}});
  auto engine = Engine::simulate(*machine, config, hooks);
  REQUIRE(engine.ok());
  auto plan = engine->plan(std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2.json");
  REQUIRE(plan.ok());
  INFO(plan->describe());
  REQUIRE(plan->feasible);
  test::require_ok(engine->start_timeline());
  auto model = Model::load(*engine, *plan);
  INFO(model.status().message());
  REQUIRE(model.ok());
  begin(Phase::kPrefill);
  Session session = test::new_session(*model);
  // A prompt of half the context, so that both phases grow the cache.
  test::require_ok(session.prefill(some_tokens(8192, model->config().vocab_size)));
  begin(Phase::kDecode);
  for (int i = 0; i < 8192; ++i) test::require_ok(session.step(1));
  CHECK(changes > 40);

  int64_t capacity = 0, page = 0;
  for (size_t d = 1; d <= n_cards; ++d) {
    capacity += plan->devices[d].budget_bytes;
    page = std::max(page, plan->devices[d].kv_page_bytes);
  }
  const int64_t expert = plan->devices[1].planned(Purpose::kExperts) / plan->devices[1].n_experts;
  // Of the most that all cards hold in a phase, or in the whole run, a card's part by capacity.
  const auto beyond_share = [&](size_t d, size_t share_of, size_t in_phase) {
    const std::vector<int64_t>& peaks = most[share_of];
    const int64_t sum = std::accumulate(peaks.begin() + 1, peaks.end(), int64_t{0});
    return static_cast<double>(most[in_phase][d]) -
           static_cast<double>(sum) * static_cast<double>(plan->devices[d].budget_bytes) /
               static_cast<double>(capacity);
  };
  const auto full = static_cast<size_t>(Phase::kDecode);
  for (size_t p = 0; p < kPhaseCount; ++p) {
    INFO(c.name << ", " << phase_name(static_cast<Phase>(p)));
    CHECK(beyond_share(1, p, p) <= static_cast<double>(plan->devices[1].kv_page_bytes));
    // All cards alike, but that those with fewer layers stand for the cache that is still to come
    // to the others, so that their share is that of the whole; and an expert, which is not divided,
    // may be more than a page.
    for (size_t d = 1; d <= n_cards; ++d) {
      INFO(plan->devices[d].name);
      CHECK(beyond_share(d, full, p) <= static_cast<double>(std::max(page, expert)));
    }
  }
  // The timeline has seen the same, and the plan has said it.
  auto timeline = engine->timeline();
  REQUIRE(timeline.ok());
  for (size_t d = 1; d <= n_cards; ++d) {
    const int64_t peak = std::max({most[0][d], most[1][d], most[2][d]});
    const PlanDevice& card = plan->devices[d];
    CHECK(timeline->devices[d].peak_bytes == peak);
    CHECK(peak <= card.peak_bytes());
    // Copies of experts take what they find; without them it is the plan to the byte.
    CHECK(peak >= card.peak_bytes() - card.bytes[full][static_cast<size_t>(Purpose::kExpertCache)]);
  }
  // Attention, its cache and the shared experts are on cards; no expert is kept twice.
  for (const LayerPlacement& layer : plan->placement.layers) CHECK(layer.device > 0);
  int64_t experts = 0;
  for (const PlanDevice& device : plan->devices) experts += device.n_experts;
  CHECK(experts == 59 * plan->model.n_routed_experts);
  CHECK(plan->devices[0].n_experts > 0);
  CHECK(plan->devices[1].n_experts > 0);
}

TEST_CASE("no card carries more than its share and a page, in any phase",
          "[placement][simulation]") {
  check_shares({"four cards, Q8_0", std::vector<const char*>(4, "rtx-4090"), "q8_0"});
  check_shares({"24 and 12 GB, Q4_K", {"rtx-4090", "rtx-3060"}, "q4_k"});
}

TEST_CASE("no card carries more than its share and a page: more cards and types",
          "[placement][simulation][slow]") {
  for (const char* weights : {"q4_k", "q8_0", "fp8"})
    for (const size_t n : {2, 3, 4})
      for (const char* card : {"rtx-4090", "rtx-3090"})
        check_shares({weights, std::vector<const char*>(n, card), weights});
}

}  // namespace
}  // namespace fathom
