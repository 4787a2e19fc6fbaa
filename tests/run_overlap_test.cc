// Several devices work at once: shown by the order of what happens - a device stands in an
// operation until another one has done one - and, on simulated devices, by their clocks.
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <thread>

#include "lib/run/engine_state.h"
#include "lib/run/observed_backend.h"
#include "lib/run/queued_backend.h"
#include "lib/run/session_state.h"
#include "support/golden.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

using test::some_tokens;

// Waits until `done`, for 20 seconds or so long at most; whether it was.
template <class Done>
bool wait_until(Done&& done, std::chrono::milliseconds most = std::chrono::seconds(20)) {
  const auto end = std::chrono::steady_clock::now() + most;
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
}

// An engine whose devices tell `seen` of each operation, on the thread that did it and before the
// next one begins.
Engine watched_engine(const test::Settings& settings, const OpObserver& seen) {
  auto engine = run::create_engine(test::config_of(settings), {}, nullptr,
                                   [&](std::unique_ptr<Backend> backend, int device) {
                                     return run::observed(std::move(backend), device, seen);
                                   });
  INFO(engine.status().message());
  REQUIRE(engine.ok());
  return std::move(engine).value();
}

Model load(const Engine& engine, const std::string& path) {
  auto plan = engine.plan(path);
  REQUIRE(plan.ok());
  INFO(plan->describe());
  auto model = Model::load(engine, *plan);
  INFO(model.status().message());
  REQUIRE(model.ok());
  return std::move(model).value();
}

TEST_CASE("a queued backend does everything, in order, before sync returns", "[overlap]") {
  CpuOptions options;
  options.threads = 1;
  auto cpu = make_cpu_backend(options);
  REQUIRE(cpu.ok());
  const int64_t own = (*cpu)->runtime_bytes();
  auto made = run::queued(std::move(*cpu));
  REQUIRE(made.ok());
  Backend& queued = **made;
  CHECK(queued.runtime_bytes() > own);
  std::vector<float> one(100, 1.0f), sum(100, 0.0f), twice(100, 0.0f);
  // Far more than are held at once; each adds what the one before left.
  for (int i = 0; i < 3000; ++i) {
    queued.add({}, {one.data(), 100, sum.data()});
    queued.add({}, {sum.data(), 100, twice.data()});
  }
  test::require_ok(queued.sync({}));
  CHECK(sum[99] == 3000.0f);
  CHECK(twice[0] == 3000.0f * 3001 / 2);

  // From several threads, each with rows of its own.
  std::vector<std::thread> threads;
  std::vector<std::vector<float>> sums(4, std::vector<float>(100));
  for (auto& mine : sums)
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        queued.add({}, {one.data(), 100, mine.data()});
        if (i % 50 == 0) (void)queued.sync({});
      }
      (void)queued.sync({});
      mine[0] += mine[1];
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& mine : sums) CHECK(mine[0] == 1000.0f);
}

TEST_CASE("a device reads the next chunk while another one is in the one before", "[overlap]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{{"context.max", "300"}, {"prefill.chunk", "16"}, {"threads", "1"}};
  std::atomic<int> chunks_at_0{0};
  std::atomic<bool> armed{false}, met{false};
  test::Settings three = settings;
  three.insert(three.end(), {{"devices", "cpu:0,cpu:1,cpu:2"},
                             {"placement.layers", "cpu:0=0,cpu:1=1,cpu:2=2"},
                             {"placement.experts", "cpu:1=1,cpu:2=2"},
                             {"placement.embed", "cpu:0"},
                             {"placement.head", "cpu:2"}});
  const Engine engine = watched_engine(three, [&](const OpTime& op) {
    if (op.device == 0 && op.op == "embed") ++chunks_at_0;
    // Device 1, in its first operation on the first chunk: not further before device 0 has begun
    // the second.  One thread for both would do that behind all of device 1's operations.
    if (op.device == 1 && armed.exchange(false)) met = wait_until([&] { return chunks_at_0 > 1; });
  });
  const Model one = test::load_model(path, settings), several = load(engine, path);
  const auto tokens = some_tokens(250, one.config().vocab_size);
  armed = true;
  const auto got = test::last_logits(several, tokens);
  CHECK(met);
  CHECK(test::first_bit_difference(test::last_logits(one, tokens), got).index == -1);
}

TEST_CASE("an expert device works while the shared expert runs", "[overlap]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{{"context.max", "100"}, {"prefill.chunk", "16"}, {"threads", "1"}};
  std::atomic<int> routed{0}, experts{0};
  std::atomic<bool> armed{false}, met{false};
  test::Settings two = settings;
  two.insert(two.end(), {{"devices", "cpu:0,cpu:1"},
                         {"placement.layers", "cpu:0=*"},
                         {"placement.experts", "cpu:1=*"}});
  const Engine engine = watched_engine(two, [&](const OpTime& op) {
    if (op.device == 0 && op.op == "route") ++routed;
    if (op.device == 1 && op.op == "experts") ++experts;
    // The shared expert of the first MoE layer does not end before the routed ones have.
    if (op.device == 0 && op.op == "ffn" && routed > 0 && armed.exchange(false)) {
      const int before = routed - 1;
      met = wait_until([&] { return experts > before; });
    }
  });
  const Model one = test::load_model(path, settings), several = load(engine, path);
  const auto tokens = some_tokens(60, one.config().vocab_size);
  armed = true;
  const auto got = test::last_logits(several, tokens);
  CHECK(met);
  CHECK(test::first_bit_difference(test::last_logits(one, tokens), got).index == -1);
}

TEST_CASE("sessions on threads of their own share devices", "[overlap]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{
      {"context.max", "200"}, {"prefill.chunk", "32"}, {"threads", "1"}, {"sessions.max", "3"}};
  test::Settings two = settings;
  two.insert(two.end(), {{"devices", "cpu:0,cpu:1"}, {"placement.layers", "cpu:0=0-1,cpu:1=2"}});
  // A session stands in device 1 until another one has done something on device 0: sometimes all
  // others wait behind it, but not every time.
  std::atomic<int> at_0{0};
  std::atomic<bool> met{false};
  const Engine engine = watched_engine(two, [&](const OpTime& op) {
    if (op.device == 0) ++at_0;
    if (op.device == 1 && op.op == "route" && !met) {
      const int before = at_0;
      met = wait_until([&] { return at_0 > before; }, std::chrono::milliseconds(100));
    }
  });
  const Model one = test::load_model(path, settings), several = load(engine, path);
  // Nothing of Catch here, which is for one thread; an error is no logits.
  const auto text = [](const Model& model, int64_t seed) -> std::vector<float> {
    auto session = Session::create(model);
    if (!session.ok()) return {};
    bool ok = session->prefill(some_tokens(70, model.config().vocab_size, seed)).ok();
    for (int i = 0; i < 40; ++i) ok = ok && session->step(static_cast<int32_t>(i + seed)).ok();
    if (!ok) return {};
    return {session->logits().begin(), session->logits().end()};
  };
  std::vector<std::vector<float>> got(3);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < 3; ++i)
    threads.emplace_back([&, i] { got[static_cast<size_t>(i)] = text(several, i); });
  for (std::thread& thread : threads) thread.join();
  CHECK(met);
  for (int64_t i = 0; i < 3; ++i) CHECK_FALSE(got[static_cast<size_t>(i)].empty());
  for (int64_t i = 0; i < 3; ++i)
    CHECK(test::first_bit_difference(text(one, i), got[static_cast<size_t>(i)]).index == -1);
}

// ---- simulated devices ------------------------------------------------------------------------

Engine simulate(const std::string& machine, const test::Settings& settings) {
  auto parsed = MachineDescription::parse(machine);
  INFO(parsed.status().message());
  REQUIRE(parsed.ok());
  auto engine = Engine::simulate(*parsed, test::config_of(settings));
  INFO(engine.status().message());
  REQUIRE(engine.ok());
  return std::move(engine).value();
}

const std::string kV2Lite = std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2-lite.json";

TEST_CASE("groups of a batch follow each other through simulated cards", "[overlap][simulation]") {
  const Engine engine = simulate(
      R"({"devices": [{"name": "cpu", "bytes": "32G"},
                      {"name": "cuda:0", "kind": "cuda", "bytes": "12G"},
                      {"name": "cuda:1", "kind": "cuda", "bytes": "12G"},
                      {"name": "cuda:2", "kind": "cuda", "bytes": "12G"},
                      {"name": "cuda:3", "kind": "cuda", "bytes": "12G"}]})",
      {{"weights.type", "q8_0"},
       {"context.max", "2048"},
       {"sessions.max", "8"},
       {"placement.embed", "cuda:0"},
       {"placement.head", "cuda:3"},
       {"placement.layers", "cuda:0=0-6,cuda:1=7-13,cuda:2=14-20,cuda:3=21-26"},
       {"placement.experts", "cuda:0=0-6,cuda:1=7-13,cuda:2=14-20,cuda:3=21-26"}});
  const Model model = load(engine, kV2Lite);
  std::vector<Session> sessions;
  std::vector<Session*> batch;
  for (int i = 0; i < 8; ++i) {
    sessions.push_back(test::new_session(model));
    test::require_ok(sessions.back().prefill(some_tokens(500, model.config().vocab_size, i)));
  }
  for (Session& session : sessions) batch.push_back(&session);
  const std::vector<int32_t> tokens(8, 1);
  std::vector<double> busy;
  for (int d = 1; d < 5; ++d) busy.push_back(-engine.busy_seconds(d));
  const double start = engine.seconds();
  test::require_ok(Session::step_batch(batch, tokens));
  const double elapsed = engine.seconds() - start;
  double all = 0, most = 0;
  for (int d = 1; d < 5; ++d) {
    busy[static_cast<size_t>(d - 1)] += engine.busy_seconds(d);
    all += busy[static_cast<size_t>(d - 1)];
    most = std::max(most, busy[static_cast<size_t>(d - 1)]);
  }
  const auto groups = static_cast<double>(batch[0]->state().batch_groups(8));
  CHECK(groups > 1);
  // G groups: the slowest card does G parts, and a part of each other one stands before or behind.
  const double bound = most + (all - most) / groups;
  INFO("elapsed " << elapsed << ", work " << all << ", bound " << bound << ", groups " << groups);
  CHECK(elapsed < 0.75 * all);
  CHECK(elapsed <= 1.10 * bound);
  // One after the other would be slower, although it reads the weights once.
  run::SessionState& first = batch[0]->state();
  first.groups_of_batch[8] = 1;
  const double before = engine.seconds();
  test::require_ok(Session::step_batch(batch, tokens));
  CHECK(elapsed < 0.97 * (engine.seconds() - before));
}

TEST_CASE("copies to and from an expert device hide behind the shared expert",
          "[overlap][simulation]") {
  // The shared expert on a slow card, routed experts on a fast host behind a link whose time the
  // shared expert covers: then they cost nothing.
  const auto elapsed_and_busy = [](const char* link_bytes) {
    const Engine engine = simulate(
        std::string(R"({"devices": [{"name": "cpu", "bytes": "64G", "read_bytes_per_s": 2e12,
                        "quantised_flops_per_s": 4e14, "dense_flops_per_s": 4e14},
                       {"name": "cuda:0", "kind": "cuda", "bytes": "24G", "read_bytes_per_s": 1e11,
                        "quantised_flops_per_s": 2e13, "dense_flops_per_s": 2e13}],
          "links": [{"from": "cpu", "to": "cuda:0", "bytes_per_s": )") +
            link_bytes + R"(, "latency_s": 1e-6}]})",
        {{"weights.type", "q8_0"},
         {"context.max", "2048"},
         {"experts.cache", "0"},
         {"placement.layers", "cuda:0=*"},
         {"placement.experts", "cpu=*"},
         {"placement.embed", "cuda:0"},
         {"placement.head", "cuda:0"}});
    const Model model = load(engine, kV2Lite);
    Session session = test::new_session(model);
    test::require_ok(session.prefill(some_tokens(512, model.config().vocab_size)));
    const double start = engine.seconds(), busy = engine.busy_seconds(1);
    for (int i = 0; i < 5; ++i) test::require_ok(session.step(1));
    return std::pair(engine.seconds() - start, engine.busy_seconds(1) - busy);
  };
  const auto [fast, fast_busy] = elapsed_and_busy("5e10");
  INFO(fast << " s, of which the card works " << fast_busy);
  CHECK(fast <= 1.02 * fast_busy);
  // And a link that is too slow for it shows.
  const auto [slow, slow_busy] = elapsed_and_busy("1e7");
  CHECK(slow > 1.2 * slow_busy);
}

}  // namespace
}  // namespace fathom
