// Chunks of a prompt that take turns on devices which share the layers: attention here, routed
// experts there.  The same bits and the same memory as one chunk after the other, also cancelled
// and failing; that the devices work side by side is shown on simulated ones, by their clocks.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <thread>
#include <utility>

#include "lib/run/engine_state.h"
#include "lib/run/forwarding_backend.h"
#include "lib/run/observed_backend.h"
#include "lib/run/pipeline.h"
#include "lib/run/session_state.h"
#include "support/golden.h"
#include "support/golden_models.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

using test::some_tokens;

// Logits after a prompt, cut into the plan's chunks, and after a step behind it.
std::vector<float> run(const Model& model, int64_t n) {
  Session session = test::new_session(model);
  test::require_ok(session.prefill(some_tokens(n, model.config().vocab_size)));
  std::vector<float> all(session.logits().begin(), session.logits().end());
  test::require_ok(session.step(3));
  all.insert(all.end(), session.logits().begin(), session.logits().end());
  return all;
}

const test::Settings kSettings{{"context.max", "100"}, {"prefill.chunk", "16"}, {"threads", "1"}};

test::Settings with(test::Settings settings, const test::Settings& more) {
  settings.insert(settings.end(), more.begin(), more.end());
  return settings;
}

// The golden models have two or three layers, the first of them dense, and eight experts or,
// quantised, four.
const test::Settings kLayouts[] = {
    {{"devices", "cpu:0,cpu:1"}, {"placement.layers", "cpu:0=*"}, {"placement.experts", "cpu:1=*"}},
    // The sum begins at home, ends there, passes it, and comes to one device twice.
    {{"devices", "cpu:0,cpu:1"},
     {"placement.layers", "cpu:0=*"},
     {"placement.experts", "cpu:0=*:0,cpu:1=*:1-3"}},
    {{"devices", "cpu:0,cpu:1"},
     {"placement.layers", "cpu:1=*"},
     {"placement.experts", "cpu:0=*:0-1+3,cpu:1=*:2"}},
    {{"devices", "cpu:0,cpu:1,cpu:2"},
     {"placement.layers", "cpu:1=*"},
     {"placement.experts", "cpu:0=*:0,cpu:1=*:1,cpu:2=*:2-3"}},
    // Everything on another device.
    {{"devices", "cpu:0,cpu:1,cpu:2,cpu:3"},
     {"placement.layers", "cpu:2=*"},
     {"placement.experts", "cpu:3=*"},
     {"placement.embed", "cpu:1"},
     {"placement.head", "cpu:0"}},
    // Layers that go back and forth with their experts.
    {{"devices", "cpu:0,cpu:1"},
     {"placement.layers", "cpu:0=*,cpu:1=1"},
     {"placement.experts", "cpu:0=*,cpu:1=1"},
     {"placement.embed", "cpu:1"}},
    // Layers on two devices, each other's experts.
    {{"devices", "cpu:0,cpu:1"},
     {"placement.layers", "cpu:0=0,cpu:1=*"},
     {"placement.experts", "cpu:0=*"},
     {"placement.embed", "cpu:1"},
     {"placement.head", "cpu:0"}},
};

void check_layouts(const char* name) {
  const std::string path = test::test_data(name);
  const Model one = test::load_model(path, kSettings);
  // The last chunk of one row, two chunks, more than are in flight.
  const std::vector<int64_t> lengths = {17, 32, 90};
  std::vector<std::vector<float>> expected;
  for (const int64_t n : lengths) expected.push_back(run(one, n));
  int64_t which = 0;
  for (const test::Settings& layout : kLayouts) {
    // Two, three and four of them, in turn.
    const std::string in_flight = std::to_string(2 + which++ % 3);
    std::string text;
    for (const auto& [key, value] : layout) text += key + "=" + value + " ";
    INFO(name << " with " << text << ", in flight " << in_flight);
    const Model model =
        test::load_model(path, with(with(kSettings, layout), {{"prefill.in_flight", in_flight}}));
    const Plan& plan = model.plan();
    REQUIRE(run::chunk_flow(plan) == run::ChunkFlow::kTurns);
    CHECK(plan.prefill_in_flight == std::stoll(in_flight));
    for (size_t i = 0; i < lengths.size(); ++i) {
      INFO(lengths[i] << " tokens");
      CHECK(test::first_bit_difference(expected[i], run(model, lengths[i])).index == -1);
    }
    Session session = test::new_session(model);
    test::require_ok(session.prefill(some_tokens(99, model.config().vocab_size)));
    test::require_ok(session.step(1));
    const MemorySnapshot now = model.engine().memory();
    for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d)
      for (Purpose purpose : {Purpose::kActivations, Purpose::kWorkspace, Purpose::kKv}) {
        INFO(plan.devices[static_cast<size_t>(d)].name << " " << purpose_name(purpose));
        CHECK(now.item(d, purpose).bytes_now ==
              plan.devices[static_cast<size_t>(d)].planned(purpose));
      }
  }
}

TEST_CASE("chunks that take turns on devices have the bits of one device", "[in_flight]") {
  for (const char* name : test::kGoldenModels) check_layouts(name);
}

TEST_CASE("chunks that take turns have the bits of one device: all other golden models",
          "[in_flight][slow]") {
  for (const char* name : test::kMoreGoldenModels) check_layouts(name);
}

TEST_CASE("a session in which chunks do not take turns has no buffers for it", "[in_flight]") {
  const std::string path = test::test_data("models/tiny-v3");
  const auto activations = [&](const test::Settings& more) {
    const Model model = test::load_model(path, with(kSettings, more));
    int64_t bytes = 0;
    for (const PlanDevice& device : model.plan().devices)
      bytes += device.planned(Purpose::kActivations);
    return std::pair(model.plan().prefill_in_flight, bytes);
  };
  const test::Settings apart{{"devices", "cpu:0,cpu:1"},
                             {"placement.layers", "cpu:0=*"},
                             {"placement.experts", "cpu:1=*"}};
  const auto [one, bytes_of_one] = activations(with(apart, {{"prefill.in_flight", "1"}}));
  const auto [three, bytes_of_three] = activations(with(apart, {{"prefill.in_flight", "3"}}));
  CHECK(one == 1);
  CHECK(three == 3);
  CHECK(bytes_of_three > bytes_of_one);
  // Waves have one buffer per device; pages in other tiers and mixed types want one chunk at a
  // time.
  const test::Settings wanted{{"prefill.in_flight", "3"}};
  CHECK(activations(wanted).first == 1);
  CHECK(activations(with(wanted, {{"devices", "cpu:0,cpu:1"},
                                  {"placement.layers", "cpu:0=0-1,cpu:1=2"},
                                  {"placement.experts", "cpu:0=1,cpu:1=2"},
                                  {"placement.embed", "cpu:0"}}))
            .first == 1);
  CHECK(activations(with(with(apart, wanted), {{"kv.tiers", "device,file"}})).first == 1);
  CHECK(activations(with(with(apart, wanted), {{"kv.type", "q8_0"}, {"kv.recent_16bit", "64"}}))
            .first == 1);
}

TEST_CASE("chunks that take turns stop between chunks, and go on", "[in_flight]") {
  const std::string path = test::test_data("models/tiny-v3");
  const Model one = test::load_model(path, kSettings);
  const Model several = test::load_model(path, with(kSettings, {{"devices", "cpu:0,cpu:1"},
                                                                {"placement.layers", "cpu:0=*"},
                                                                {"placement.experts", "cpu:1=*"},
                                                                {"prefill.in_flight", "3"}}));
  const auto tokens = some_tokens(90, one.config().vocab_size);
  const auto expected = test::last_logits(one, tokens);
  for (const int64_t most : {16, 48, 64}) {
    Session session = test::new_session(several);
    std::vector<int64_t> seen;
    RunOptions options;
    options.progress = [&](ProgressPhase, int64_t done, int64_t) {
      seen.push_back(done);
      return done < most;
    };
    CHECK(session.prefill(tokens, options).code() == Code::kCancelled);
    CHECK(session.n_tokens() == most);
    for (size_t i = 0; i < seen.size(); ++i) CHECK(seen[i] == static_cast<int64_t>(16 * i));
    CHECK(session.cache().size_bytes() ==
          several.plan().kv_bytes(0, most) + several.plan().kv_bytes(1, most));
    test::require_ok(session.prefill(std::span(tokens).subspan(static_cast<size_t>(most))));
    CHECK(test::first_bit_difference(expected, session.logits()).index == -1);
  }
}

// A device whose sync() fails once, when `syncs` comes to zero.
class Failing final : public run::ForwardingBackend {
 public:
  Failing(std::unique_ptr<Backend> real, std::atomic<int>& syncs)
      : ForwardingBackend(std::move(real)), syncs_(syncs) {}
  Status sync(const OpContext& o) noexcept override {
    Status status = real_->sync(o);
    if (syncs_.fetch_sub(1) == 1) return Status(Code::kDevice, "the device failed");
    return status;
  }

 private:
  std::atomic<int>& syncs_;
};

TEST_CASE("a device that fails while chunks take turns leaves whole chunks", "[in_flight]") {
  const std::string path = test::test_data("models/tiny-v3");
  const Model one = test::load_model(path, kSettings);
  const auto tokens = some_tokens(90, one.config().vocab_size);
  const auto expected = test::last_logits(one, tokens);
  std::atomic<int> syncs[2] = {0, 0};
  auto engine = run::create_engine(
      test::config_of(with(kSettings, {{"devices", "cpu:0,cpu:1"},
                                       {"placement.layers", "cpu:0=*"},
                                       {"placement.experts", "cpu:1=*"},
                                       {"prefill.in_flight", "3"}})),
      {}, nullptr, [&](std::unique_ptr<Backend> backend, int device) -> std::unique_ptr<Backend> {
        return std::make_unique<Failing>(std::move(backend), syncs[device]);
      });
  REQUIRE(engine.ok());
  auto plan = engine->plan(path);
  REQUIRE(plan.ok());
  auto model = Model::load(*engine, *plan);
  REQUIRE(model.ok());
  std::vector<int64_t> kept;
  for (const int device : {0, 1})
    for (const int at : {1, 2, 5, 9, 11}) {
      Session session = test::new_session(*model);
      syncs[device] = at;
      const Status status = session.prefill(tokens);
      INFO("device " << device << ", sync " << at << ": " << status.message());
      CHECK(status.code() == Code::kDevice);
      syncs[device] = 0;
      const int64_t n = session.n_tokens();
      kept.push_back(n);
      CHECK(n % 16 == 0);
      CHECK(session.cache().size_bytes() == plan->kv_bytes(0, n) + plan->kv_bytes(1, n));
      test::require_ok(session.prefill(std::span(tokens).subspan(static_cast<size_t>(n))));
      CHECK(test::first_bit_difference(expected, session.logits()).index == -1);
    }
  CHECK(*std::max_element(kept.begin(), kept.end()) > 0);  // some in the middle
  CHECK(*std::min_element(kept.begin(), kept.end()) == 0);
}

TEST_CASE("attention of the next chunk runs while another device has a chunk's experts",
          "[in_flight]") {
  const std::string path = test::test_data("models/tiny-v3");
  std::atomic<int> appended{0}, experts{0};
  std::atomic<bool> armed{false}, met{false};
  // The expert device stands in its first chunk until the other one has written rows of the same
  // layer for the next: of layers 0 and 1 for two chunks.
  const auto seen = [&](const OpTime& op) {
    if (op.device == 0 && op.op == "kv_append") ++appended;
    if (op.device != 1 || op.op != "experts" || !armed.exchange(false)) return;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (appended < 4 && std::chrono::steady_clock::now() < end)
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    met = appended >= 4;
  };
  auto engine =
      run::create_engine(test::config_of(with(kSettings, {{"devices", "cpu:0,cpu:1"},
                                                          {"placement.layers", "cpu:0=*"},
                                                          {"placement.experts", "cpu:1=*"},
                                                          {"prefill.in_flight", "2"}})),
                         {}, nullptr, [&](std::unique_ptr<Backend> backend, int device) {
                           return run::observed(std::move(backend), device, seen);
                         });
  REQUIRE(engine.ok());
  auto plan = engine->plan(path);
  REQUIRE(plan.ok());
  auto model = Model::load(*engine, *plan);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  armed = true;
  test::require_ok(session.prefill(some_tokens(60, model->config().vocab_size)));
  CHECK(met);
}

TEST_CASE("groups of a batch that take turns have the bits of one session", "[in_flight]") {
  // Rows of quantised weights have the same bits in a batch of any size.
  for (const char* name :
       {"quant/quant.Q4_K_M.gguf", "quant/quant.Q8_0.gguf", "trained/trained.Q8_0.gguf"}) {
    const std::string path = test::test_data(name);
    const test::Settings settings = with(kSettings, {{"sessions.max", "5"}});
    const Model one = test::load_model(path, settings);
    const Model several = test::load_model(path, with(settings, {{"devices", "cpu:0,cpu:1"},
                                                                 {"placement.layers", "cpu:0=*"},
                                                                 {"placement.experts", "cpu:1=*"},
                                                                 {"placement.head", "cpu:0"},
                                                                 {"placement.embed", "cpu:1"}}));
    std::vector<Session> sessions;
    std::vector<Session*> batch;
    std::vector<std::vector<float>> expected;
    const std::vector<int32_t> tokens = {5, 1, 4, 2, 3};
    for (int64_t i = 0; i < 5; ++i) {
      const auto text = some_tokens(20 + 7 * i, one.config().vocab_size);
      Session alone = test::new_session(one);
      test::require_ok(alone.prefill(text));
      for (int step = 0; step < 2; ++step)
        test::require_ok(alone.step(tokens[static_cast<size_t>(i)]));
      expected.emplace_back(alone.logits().begin(), alone.logits().end());
      sessions.push_back(test::new_session(several));
      test::require_ok(sessions.back().prefill(text));
    }
    for (Session& session : sessions) batch.push_back(&session);
    for (const int64_t groups : {2, 3}) {
      sessions[0].state().batch_groups(5);
      sessions[0].state().groups_of_batch[5] = groups;
      test::require_ok(Session::step_batch(batch, tokens));
    }
    for (size_t i = 0; i < 5; ++i) {
      INFO(name << ", session " << i);
      CHECK(test::first_bit_difference(expected[i], sessions[i].logits()).index == -1);
    }
  }
}

// ---- simulated devices ------------------------------------------------------------------------

struct Measured {
  double elapsed = 0;
  std::vector<double> busy;  // by device
  // Where chunks go one by one: what the busier device of each chunk does.  Attention grows with
  // the text, so that the busier one may be another at its end.
  double by_chunk = 0;
  double bound() const { return *std::max_element(busy.begin(), busy.end()); }
};

Measured prefill_of_236b(const std::string& machine, const test::Settings& settings, int64_t n,
                         Plan& plan) {
  auto parsed = MachineDescription::parse(machine);
  INFO(parsed.status().message());
  REQUIRE(parsed.ok());
  auto engine = Engine::simulate(*parsed, test::config_of(settings));
  REQUIRE(engine.ok());
  auto made = engine->plan(std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2.json");
  INFO(made.status().message());
  REQUIRE(made.ok());
  INFO(made->describe());
  REQUIRE(made->feasible);
  auto model = Model::load(*engine, *made);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  Measured out;
  const auto n_devices = static_cast<int>(made->devices.size());
  for (int d = 0; d < n_devices; ++d) out.busy.push_back(-engine->busy_seconds(d));
  const double start = engine->seconds();
  std::vector<double> seen(static_cast<size_t>(n_devices));
  RunOptions options;
  options.on_step = [&](const StepReport&) {
    double most = 0;
    for (int d = 0; d < n_devices; ++d) {
      const double busy = engine->busy_seconds(d) + out.busy[static_cast<size_t>(d)];
      most = std::max(most, busy - std::exchange(seen[static_cast<size_t>(d)], busy));
    }
    out.by_chunk += most;
    return true;
  };
  test::require_ok(session.prefill(some_tokens(n, made->model.vocab_size), options));
  out.elapsed = engine->seconds() - start;
  for (int d = 0; d < n_devices; ++d) out.busy[static_cast<size_t>(d)] += engine->busy_seconds(d);
  plan = std::move(*made);
  // Nothing beyond the plan.
  const MemorySnapshot memory = engine->memory();
  for (int d = 0; d < n_devices; ++d)
    CHECK(memory.devices[static_cast<size_t>(d)].bytes_peak <=
          plan.devices[static_cast<size_t>(d)].peak_bytes());
  return out;
}

TEST_CASE("chunks of a 236 B prompt work on two devices at once, within 10 % of the busier one",
          "[in_flight][simulation][slow]") {
  const struct {
    const char* name;
    const char* devices;
    const char *layers, *experts;
    bool one_is_busier;  // the same device at the beginning of the text and at its end
  } cases[] = {
      {"a card, experts on a host of 12 channels",
       R"({"name": "cpu", "like": "ddr5-12ch", "bytes": "256G"},
          {"name": "cuda:0", "kind": "cuda", "like": "rtx-4090"})",
       "cuda:0=*", "cpu=*", false},
      {"a card, experts on a slow host",
       R"({"name": "cpu", "like": "ddr4-8ch", "bytes": "256G"},
          {"name": "cuda:0", "kind": "cuda", "like": "rtx-3090"})",
       "cuda:0=*", "cpu=*", true},
      {"a card of 24 GB, experts on one of 192 GB",
       R"({"name": "cpu", "bytes": "64G"},
          {"name": "cuda:0", "kind": "cuda", "like": "rtx-4090"},
          {"name": "cuda:1", "kind": "cuda", "like": "h100-80g", "bytes": "192G"})",
       "cuda:0=*", "cuda:1=*", true},
  };
  for (const auto& c : cases) {
    const auto measure = [&](const char* in_flight, const char* link, Plan& plan) {
      return prefill_of_236b(std::string(R"({"devices": [)") + c.devices + "]" + link + "}",
                             {{"weights.type", "q4_k"},
                              {"context.max", "16384"},
                              {"experts.cache", "0"},
                              {"placement.layers", c.layers},
                              {"placement.experts", c.experts},
                              {"placement.embed", std::string(c.layers).substr(0, 6)},
                              {"placement.head", std::string(c.layers).substr(0, 6)},
                              {"prefill.in_flight", in_flight}},
                             12 * 512, plan);
    };
    Plan plan, other;
    const Measured at_once = measure("auto", "", plan), alone = measure("1", "", other);
    std::string busy;
    for (const double s : at_once.busy) busy += std::to_string(s) + " ";
    INFO(c.name << ": " << at_once.elapsed << " s with " << plan.prefill_in_flight
                << " in flight, one by one " << alone.elapsed
                << " s; by the busier device of each chunk " << alone.by_chunk
                << " s, work by device " << busy);
    CHECK(plan.prefill_in_flight == 3);
    CHECK(at_once.elapsed <= 1.10 * alone.by_chunk);
    if (c.one_is_busier) CHECK(at_once.elapsed <= 1.10 * at_once.bound());
    CHECK(at_once.elapsed >= 0.999 * at_once.bound());
    CHECK(at_once.elapsed < 0.9 * alone.elapsed);
    if (&c == cases) {
      // Copies are hidden: with three in flight, and the more of them with two.
      const Measured no_copies = measure(
          "3",
          R"(, "links": [{"from": "cpu", "to": "cuda:0", "bytes_per_s": 1e15, "latency_s": 0}])",
          other);
      const Measured two = measure("2", "", other);
      INFO("copies in no time " << no_copies.elapsed << " s, two in flight " << two.elapsed);
      CHECK(at_once.elapsed <= 1.01 * no_copies.elapsed);
      CHECK(two.elapsed <= 1.05 * no_copies.elapsed);
    }
    // Three in flight read no weight more often.
    CHECK(at_once.bound() <= 1.001 * alone.bound());
    // And the plan knew: its rates are those at both ends of the context, of which this is part.
    const double rate = 12 * 512 / at_once.elapsed;
    CHECK(rate <= 1.02 * plan.speed.prefill_first);
    CHECK(rate >= 0.98 * plan.speed.prefill_last);
  }
}

TEST_CASE("groups of a batch take turns where that pays", "[in_flight][simulation]") {
  auto machine = MachineDescription::parse(
      R"({"devices": [{"name": "cpu", "like": "ddr5-12ch", "bytes": "256G"},
                      {"name": "cuda:0", "kind": "cuda", "like": "rtx-a6000"}]})");
  REQUIRE(machine.ok());
  auto engine = Engine::simulate(*machine, test::config_of({{"weights.type", "q4_k"},
                                                            {"context.max", "40960"},
                                                            {"prefill.chunk", "4096"},
                                                            {"sessions.max", "8"},
                                                            {"kv.type", "q8_0"},
                                                            {"experts.cache", "0"},
                                                            {"placement.layers", "cuda:0=*"},
                                                            {"placement.experts", "cpu=*"},
                                                            {"placement.embed", "cuda:0"},
                                                            {"placement.head", "cuda:0"}}));
  REQUIRE(engine.ok());
  auto plan = engine->plan(std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2.json");
  REQUIRE(plan.ok());
  INFO(plan->describe());
  REQUIRE(plan->feasible);
  auto model = Model::load(*engine, *plan);
  REQUIRE(model.ok());
  std::vector<Session> sessions;
  std::vector<Session*> batch;
  for (int i = 0; i < 8; ++i) {
    sessions.push_back(test::new_session(*model));
    test::require_ok(sessions.back().prefill(some_tokens(36000, model->config().vocab_size)));
  }
  for (Session& session : sessions) batch.push_back(&session);
  const std::vector<int32_t> tokens(8, 1);
  const auto step = [&] {
    const double before = engine->seconds();
    test::require_ok(Session::step_batch(batch, tokens));
    return engine->seconds() - before;
  };
  const double at_once = step();
  run::SessionState& first = sessions[0].state();
  const int64_t groups = first.batch_groups(8);
  first.groups_of_batch[8] = 1;
  const double alone = step();
  INFO(groups << " groups " << at_once * 1e3 << " ms, one " << alone * 1e3 << " ms");
  CHECK(groups > 1);
  CHECK(at_once < 0.97 * alone);
}

}  // namespace
}  // namespace fathom
