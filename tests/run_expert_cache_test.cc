// Copies of experts in idle memory: they do not show in the logits, they are given back before
// anything else suffers, and what goes wrong with them ends nothing.
#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <thread>

#include "support/spill.h"

namespace fathom {
namespace {

using test::count_events;
using test::long_text;

const std::string kTrained = FATHOM_EXAMPLE_MODEL;

// Attention on cpu:0, routed experts on cpu:1.
const test::Settings kApart{
    {"devices", "cpu:0,cpu:1"}, {"placement.layers", "cpu:0=*"}, {"placement.experts", "cpu:1=*"}};

test::Settings with(test::Settings settings, const test::Settings& more) {
  settings.insert(settings.end(), more.begin(), more.end());
  return settings;
}

using test::some_tokens;

// A prompt in chunks, a short prompt, steps: all logits.
std::vector<float> run(const Model& model) {
  const auto tokens = some_tokens(60, model.config().vocab_size);
  Session session = test::new_session(model);
  std::vector<float> all;
  const auto keep = [&] {
    all.insert(all.end(), session.logits().begin(), session.logits().end());
  };
  test::require_ok(session.prefill(std::span(tokens).first(50)));
  keep();
  test::require_ok(session.prefill(std::span(tokens).subspan(50)));
  keep();
  for (int32_t i = 0; i < 24; ++i) {
    test::require_ok(session.step(i * 31 % 40));
    keep();
  }
  return all;
}

void check_within_plan(const Model& model) {
  const MemorySnapshot now = model.engine().memory();
  for (int d = 0; d < static_cast<int>(now.devices.size()); ++d) {
    const PlanDevice& device = model.plan().devices[static_cast<size_t>(d)];
    INFO(device.name);
    CHECK(now.devices[static_cast<size_t>(d)].bytes_peak <= device.peak_bytes());
    CHECK(now.item(d, Purpose::kExpertCache).bytes_peak <= device.expert_cache_bytes);
    CHECK(now.item(d, Purpose::kActivations).bytes_peak == device.planned(Purpose::kActivations));
    CHECK(now.item(d, Purpose::kWorkspace).bytes_peak == device.planned(Purpose::kWorkspace));
  }
}

TEST_CASE("copies of experts do not show in the logits", "[expert_cache]") {
  const char* const models[] = {
      "models/tiny-v2",        "models/tiny-v2-lite",       "models/tiny-v3",
      "models/tiny-v3-fp8",    "gguf/tiny-v2.old.F16.gguf", "gguf/tiny-v3.new.BF16.gguf",
      "quant/quant.Q8_0.gguf", "quant/quant.Q4_K_M.gguf"};
  const test::Settings placements[] = {
      kApart,
      // The layer's own experts in the middle, others on two devices.
      {{"devices", "cpu:0,cpu:1,cpu:2"},
       {"placement.layers", "cpu:1=*"},
       {"placement.experts", "cpu:0=*:0,cpu:1=*:1,cpu:2=*:2-3"}},
      // Layers on two devices, each with experts on the other.
      {{"devices", "cpu:0,cpu:1"},
       {"placement.layers", "cpu:0=0-1,cpu:1=*"},
       {"placement.experts", "cpu:1=1,cpu:0=*"}},
  };
  for (const char* name : models) {
    const std::string path = test::test_data(name);
    for (const char* numerics : {"fast", "exact"}) {
      const test::Settings common{{"context.max", "128"},
                                  {"prefill.chunk", "33"},
                                  {"threads", "2"},
                                  {"numerics", numerics}};
      const std::vector<float> expected = run(test::load_model(path, common));
      for (const test::Settings& placement : placements) {
        if (std::string(numerics) == "exact" && &placement != placements) continue;
        const bool layers_apart = &placement == &placements[2];
        if (layers_apart && std::string(name).find("quant") != std::string::npos) continue;
        const Model model =
            test::load_model(path, with(with(placement, common), {{"experts.cache", "16M"}}));
        INFO(name << " " << numerics << ", placement " << &placement - placements);
        CHECK(test::first_bit_difference(expected, run(model)).index == -1);
        const ExpertCacheStats stats = model.expert_cache();
        CHECK(stats.copied > 0);
        CHECK(stats.hits > 0);
        CHECK(stats.hits <= stats.choices);
        CHECK(stats.n_experts == stats.copied - stats.dropped);
        check_within_plan(model);
        // Off by default where memory is the host's, and where it is set to nothing.
        for (const char* off : {"auto", "0"}) {
          const Model plain =
              test::load_model(path, with(with(placement, common), {{"experts.cache", off}}));
          CHECK(plain.plan().devices[0].expert_cache_bytes == 0);
        }
      }
    }
  }
}

TEST_CASE("the same tokens give the same copies; a small cache keeps the most used",
          "[expert_cache]") {
  const auto tokens = long_text(700);
  ExpertCacheStats first;
  for (int times = 0; times < 2; ++times) {
    const Model model =
        test::load_model(kTrained, with(kApart, {{"context.max", "1024"},
                                                 {"threads", times == 0 ? "1" : "2"},
                                                 {"experts.cache", "512K"},
                                                 {"experts.cache_window", "128"}}));
    Session session = test::new_session(model);
    test::require_ok(session.prefill(std::span(tokens).first(400)));
    CHECK(model.expert_cache().choices == 0);  // long passes are counted, but do not look
    CHECK(model.expert_cache().copied > 0);
    for (size_t i = 400; i < tokens.size(); ++i) test::require_ok(session.step(tokens[i]));
    const ExpertCacheStats stats = model.expert_cache();
    INFO(stats.hits << " of " << stats.choices << ", " << stats.copied << " copied, "
                    << stats.dropped << " dropped, " << stats.n_experts << " held");
    CHECK(stats.bytes <= 512 << 10);
    CHECK(stats.bytes == model.engine().memory().item(0, Purpose::kExpertCache).bytes_now);
    const ModelConfig& c = model.config();
    int64_t n_moe = 0;
    for (int64_t l = 0; l < c.num_hidden_layers; ++l) n_moe += c.is_moe_layer(l);
    CHECK(stats.choices == 300 * n_moe * c.num_experts_per_tok);
    // More hits than as many experts chosen blindly would have.
    const double blind =
        static_cast<double>(stats.n_experts) / static_cast<double>(n_moe * c.n_routed_experts);
    CHECK(static_cast<double>(stats.hits) > 1.1 * blind * static_cast<double>(stats.choices));
    if (times == 0) first = stats;
    CHECK(stats.hits == first.hits);
    CHECK(stats.copied == first.copied);
    CHECK(stats.dropped == first.dropped);
  }
}

TEST_CASE("a batch looks copies up for all its rows", "[expert_cache]") {
  const test::Settings common{{"context.max", "128"}, {"sessions.max", "4"}, {"threads", "2"}};
  const auto run_batch = [&](const Model& model) {
    std::vector<Session> sessions;
    for (int i = 0; i < 4; ++i) {
      sessions.push_back(test::new_session(model));
      test::require_ok(sessions.back().prefill(some_tokens(5 + i, model.config().vocab_size)));
    }
    std::vector<Session*> all;
    for (Session& session : sessions) all.push_back(&session);
    std::vector<float> logits;
    for (int32_t i = 0; i < 20; ++i) {
      const std::vector<int32_t> tokens{i, i + 7, 2 * i, 3};
      test::require_ok(Session::step_batch(all, tokens));
      for (Session& session : sessions)
        logits.insert(logits.end(), session.logits().begin(), session.logits().end());
    }
    return logits;
  };
  const std::string path = test::test_data("quant/quant.Q8_0.gguf");
  const auto expected = run_batch(test::load_model(path, common));
  const Model model = test::load_model(path, with(with(kApart, common), {{"experts.cache", "8M"}}));
  CHECK(test::first_bit_difference(expected, run_batch(model)).index == -1);
  CHECK(model.expert_cache().hits > 0);
  check_within_plan(model);
}

TEST_CASE("copies make room for the growing text, before anything else suffers", "[expert_cache]") {
  const int64_t n = 2000;
  const auto tokens = long_text(n);
  const test::Settings common =
      with(kApart, {{"context.max", std::to_string(n)}, {"prefill.chunk", "64"}, {"threads", "2"}});
  // Exactly what the plan needs without copies: they live on what the text has not taken yet.
  const Model plain = test::load_model(kTrained, common);
  const int64_t budget = plain.plan().devices[0].peak_bytes() + (64 << 10);
  const Model model =
      test::load_model(kTrained, with(common, {{"experts.cache", "1G"},
                                               {"budget.cpu:0", std::to_string(budget + (1 << 20))},
                                               {"kv.tiers", "device,file"}}));
  INFO(model.plan().describe());
  Session session = test::new_session(model), other = test::new_session(plain);
  const int64_t stays = model.plan().devices[0].bytes[static_cast<size_t>(Phase::kDecode)]
                                                     [static_cast<size_t>(Purpose::kExpertCache)];
  CHECK(model.plan().devices[0].expert_cache_bytes > stays);
  int64_t most = 0, at_most_text = 0;
  const Forecast forecast = session.forecast();
  for (int64_t done = 0; done < n;) {
    const int64_t count = done % 192 == 0 && done + 64 <= n ? 64 : 1;
    const auto part =
        std::span(tokens).subspan(static_cast<size_t>(done), static_cast<size_t>(count));
    test::require_ok(session.prefill(part));
    test::require_ok(other.prefill(part));
    done += count;
    const MemorySnapshot memory = model.engine().memory();
    most = std::max(most, memory.item(0, Purpose::kExpertCache).bytes_now);
    at_most_text = memory.item(0, Purpose::kExpertCache).bytes_now;
    REQUIRE(memory.devices[0].bytes_now <= model.plan().devices[0].peak_bytes());
    REQUIRE(test::first_bit_difference(other.logits(), session.logits()).index == -1);
  }
  CHECK(session.events().empty());  // no step of the ladder
  CHECK(session.cache().bytes_in(KvTier::kFile) == 0);
  CHECK(most > at_most_text);
  CHECK(at_most_text <= stays);
  CHECK(model.expert_cache().dropped > 0);
  CHECK(model.expert_cache().hits > 0);
  CHECK(forecast.n_tokens_end == n);  // copies are no obstacle
  check_within_plan(model);
  // A text cut short makes room for copies again.
  test::require_ok(session.truncate(100));
  for (int i = 0; i < 40; ++i) test::require_ok(session.step(tokens[static_cast<size_t>(i)]));
  CHECK(model.engine().memory().item(0, Purpose::kExpertCache).bytes_now > at_most_text);
}

TEST_CASE("a budget lowered while text is generated takes copies first, then climbs the ladder",
          "[expert_cache]") {
  test::TemporaryFolder folder("lowered");
  for (const char* ladder : {"file", "requantise"}) {
    const auto tokens = long_text(1800);
    const test::Settings common = with(kApart, {{"context.max", "2048"},
                                                {"prefill.chunk", "64"},
                                                {"kv.page_tokens", "64"},
                                                {"threads", "2"}});
    const Model plain = test::load_model(kTrained, common);
    const Model model =
        test::load_model(kTrained, with(common, {{"experts.cache", "1G"},
                                                 {"kv.tiers", "device,file"},
                                                 {"kv.ladder", ladder},
                                                 {"kv.spill_folder", folder.path()}}));
    Session session = test::new_session(model), other = test::new_session(plain);
    Engine engine = model.engine();
    const auto held = [&] { return engine.memory().item(0, Purpose::kExpertCache).bytes_now; };
    const auto both = [&](auto&& act) {
      act(session);
      act(other);
    };
    both([&](Session& s) { test::require_ok(s.prefill(std::span(tokens).first(900))); });
    size_t at = 900;
    const auto step = [&] {
      both([&](Session& s) { test::require_ok(s.step(tokens[at])); });
      ++at;
      return test::first_bit_difference(other.logits(), session.logits()).index == -1;
    };
    for (int i = 0; i < 100; ++i) REQUIRE(step());
    INFO(ladder << ": " << held() << " bytes of copies");
    REQUIRE(held() > 0);

    // Half of the copies: gone at once, and nothing else.
    const int64_t half = held() / 2;
    test::require_ok(engine.set_budget(0, engine.memory().devices[0].bytes_now - half));
    CHECK(held() <= half);
    CHECK(engine.memory().devices[0].bytes_now <= engine.memory().devices[0].budget_bytes);
    for (int i = 0; i < 50; ++i) REQUIRE(step());
    CHECK(session.events().empty());

    // Less than the text holds: all copies, then the ladder.
    const int64_t kv = engine.memory().item(0, Purpose::kKv).bytes_now;
    test::require_ok(engine.set_budget(0, engine.memory().devices[0].bytes_now - held() - kv / 4));
    CHECK(held() == 0);
    CHECK(session.events().empty());  // nobody has grown yet
    bool same = true;
    const char* kind = std::string(ladder) == "file" ? "spilled_to_file" : "requantised";
    while (at < 1400) {
      same = step();
      // The same bits, until a page is requantised.
      if (!same) CHECK(count_events(session, "requantised") == 1);
      if (!same) break;
    }
    CHECK(count_events(session, kind) == 1);
    CHECK(same == (std::string(ladder) == "file"));
    CHECK(held() == 0);
    const MemorySnapshot memory = engine.memory();
    CHECK(memory.devices[0].bytes_now <= memory.devices[0].budget_bytes);
    if (!same) continue;

    // Room that comes in small pieces is the pages' before it is the copies'.
    REQUIRE(session.cache().bytes_in(KvTier::kFile) > 0);
    const int64_t piece = model.plan().devices[0].kv_page_bytes / 4;
    while (at < tokens.size() && session.cache().bytes_in(KvTier::kFile) > 0) {
      test::require_ok(engine.set_budget(0, engine.memory().devices[0].budget_bytes + piece));
      REQUIRE(step());
      CHECK(engine.memory().devices[0].bytes_now <= engine.memory().devices[0].budget_bytes);
    }
    CHECK(session.cache().bytes_in(KvTier::kFile) == 0);
    CHECK(count_events(session, "returned") == 1);
  }
}

TEST_CASE("copies that cannot be made end nothing", "[expert_cache]") {
  test::TemporaryFolder folder("broken");
  const std::string path = folder.path() + "/model.gguf";
  std::filesystem::copy_file(test::test_data("quant/quant.Q8_0.gguf"), path);
  const test::Settings settings = with(kApart, {{"context.max", "128"}, {"experts.cache", "8M"}});
  const auto expected = run(test::load_model(path, {{"context.max", "128"}}));

  SECTION("the file is cut off") {
    std::vector<std::string> log;
    HostHooks hooks;
    hooks.log = [&](LogLevel level, std::string_view text) {
      if (level == LogLevel::kWarn) log.emplace_back(text);
    };
    auto engine = Engine::create(test::config_of(settings), hooks);
    REQUIRE(engine.ok());
    auto plan = engine->plan(path);
    REQUIRE(plan.ok());
    auto model = Model::load(*engine, *plan);
    REQUIRE(model.ok());
    std::filesystem::resize_file(path, 4096);
    CHECK(test::first_bit_difference(expected, run(*model)).index == -1);
    CHECK(model->expert_cache().copied == 0);
    CHECK(engine->memory().item(0, Purpose::kExpertCache).bytes_now == 0);
    REQUIRE(log.size() == 1);
    CHECK(log[0].find("experts.cache") != std::string::npos);
  }
  SECTION("the host refuses, now and then or always") {
    for (const int every : {1, 2}) {
      int asked = 0;
      HostHooks hooks;
      hooks.memory = [&](int, Purpose purpose, int64_t delta, int64_t) {
        return purpose != Purpose::kExpertCache || delta < 0 || ++asked % every != 0;
      };
      auto engine = Engine::create(test::config_of(settings), hooks);
      REQUIRE(engine.ok());
      auto plan = engine->plan(path);
      REQUIRE(plan.ok());
      auto model = Model::load(*engine, *plan);
      REQUIRE(model.ok());
      CHECK(test::first_bit_difference(expected, run(*model)).index == -1);
      CHECK(asked > 0);
      CHECK((model->expert_cache().copied == 0) == (every == 1));
    }
  }
}

TEST_CASE("sessions on several threads share the copies, while a budget moves", "[expert_cache]") {
  const test::Settings common{{"context.max", "256"}, {"sessions.max", "3"}, {"threads", "1"}};
  const Model plain = test::load_model(kTrained, common);
  const Model model =
      test::load_model(kTrained, with(with(kApart, common), {{"experts.cache", "1G"}}));
  const auto text = long_text(400);
  const auto run_one = [&](const Model& m, size_t first) {
    Session session = test::new_session(m);
    std::vector<float> all;
    for (size_t i = 0; i < 120; ++i) {
      const Status stepped = session.step(text[first + i]);
      if (!stepped.ok()) return std::vector<float>();
      all.insert(all.end(), session.logits().begin(), session.logits().end());
    }
    return all;
  };
  std::vector<std::vector<float>> expected, got(3);
  for (size_t i = 0; i < got.size(); ++i) expected.push_back(run_one(plain, 100 * i));
  std::atomic<int> running{3};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < got.size(); ++i)
    threads.emplace_back([&, i] {
      got[i] = run_one(model, 100 * i);
      --running;
    });
  Engine engine = model.engine();
  const int64_t budget = engine.memory().devices[0].budget_bytes;
  const int64_t tight = model.plan().devices[0].peak_bytes() -
                        model.plan().devices[0].planned(Purpose::kExpertCache) / 2;
  int rounds = 0;
  for (; running > 0; ++rounds) {
    (void)engine.set_budget(0, rounds % 2 == 0 ? tight : budget);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < got.size(); ++i) {
    INFO("session " << i << ", " << rounds << " changes of the budget");
    REQUIRE(got[i].size() == expected[i].size());
    CHECK(test::first_bit_difference(expected[i], got[i]).index == -1);
  }
  CHECK(model.expert_cache().hits > 0);
}

TEST_CASE("other memory of the device takes copies' place", "[expert_cache]") {
  const test::Settings settings = with(kApart, {{"context.max", "512"},
                                                {"prefill.chunk", "64"},
                                                {"experts.cache", "1G"},
                                                {"sessions.max", "2"}});
  const Model model = test::load_model(kTrained, settings);
  Session session = test::new_session(model);
  const auto tokens = long_text(200);
  test::require_ok(session.prefill(tokens));
  for (int i = 0; i < 50; ++i) test::require_ok(session.step(tokens[static_cast<size_t>(i)]));
  const int64_t held = model.expert_cache().bytes;
  REQUIRE(held > 0);
  // No byte is free, and yet a second session finds its scratch.
  test::leave(model, 0);
  Session second = test::new_session(model);
  CHECK(model.expert_cache().bytes < held);
  test::require_ok(second.prefill(std::span(tokens).first(50)));
  const MemorySnapshot memory = model.engine().memory();
  CHECK(memory.devices[0].bytes_now <= memory.devices[0].budget_bytes);
}

}  // namespace
}  // namespace fathom
