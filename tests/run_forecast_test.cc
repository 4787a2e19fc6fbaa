// The forecast: growth token by token is refused exactly where it said, over types, page sizes,
// windows, devices and neighbours; and the ladder does then what it said.
#include <catch2/catch.hpp>

#include "support/loaded_model.h"

namespace fathom {
namespace {

Status grow(Session& session, int64_t n_tokens) {
  while (session.n_tokens() < n_tokens) FATHOM_TRY(session.step(7));
  return {};
}

Model load(test::Settings settings) {
  for (const auto& [key, value] : test::Settings{{"threads", "1"}, {"prefill.chunk", "32"}})
    settings.push_back({key, value});
  return test::load_model(FATHOM_EXAMPLE_MODEL, settings);
}

const BudgetForecast& budget(const Forecast& forecast, const std::string& name) {
  for (const BudgetForecast& b : forecast.budgets)
    if (b.budget == name) return b;
  FAIL("no budget " << name);
  return forecast.budgets.front();
}

TEST_CASE("growth is refused at the token that was forecast", "[forecast]") {
  for (const char* type : {"f16", "f32", "q8_0", "q4_0"})
    for (const char* page : {"16", "64"})
      for (const auto& [recent, first] : {std::pair{"0", "0"}, std::pair{"48", "0"},
                                          std::pair{"70", "40"}, std::pair{"0", "20"}}) {
        const bool mixed = std::string(type)[0] == 'q';
        if (!mixed && (std::string(recent) != "0" || std::string(first) != "0")) continue;
        const Model model = load({{"kv.type", type},
                                  {"kv.page_tokens", page},
                                  {"kv.recent_16bit", recent},
                                  {"kv.first_16bit", first},
                                  {"kv.ladder", "none"},
                                  {"context.max", "500"}});
        Engine engine = model.engine();
        for (const double pages : {0.0, 0.99, 1.0, 2.5, 4.0, 5.7, 100.0}) {
          Session session = test::new_session(model);
          test::require_ok(session.prefill(std::vector<int32_t>(37, 7)));
          const int64_t page_bytes = model.plan().devices[0].kv_page_bytes;
          test::require_ok(engine.set_budget(
              0, engine.memory().devices[0].bytes_now +
                     static_cast<int64_t>(pages * static_cast<double>(page_bytes))));
          const Forecast forecast = session.forecast();
          const Status status = grow(session, 500);
          INFO(type << ", pages of " << page << ", windows " << recent << " and " << first << ", "
                    << pages << " pages free: " << status.message());
          CHECK(forecast.n_tokens == 37);
          CHECK(forecast.n_tokens_end == session.n_tokens());
          CHECK(status.ok() == (forecast.n_tokens_end == 500));
          CHECK_FALSE(budget(forecast, "cpu").then.has_value());
          // The same from where it stands now.
          CHECK(session.forecast().n_tokens_end == session.n_tokens());
          test::require_ok(engine.set_budget(0, int64_t{1} << 40));
        }
      }
}

TEST_CASE("a forecast knows its neighbours, reserved and truncated pages", "[forecast]") {
  const Model model = load({{"kv.type", "q8_0"},
                            {"kv.page_tokens", "16"},
                            {"kv.recent_16bit", "48"},
                            {"kv.ladder", "none"},
                            {"sessions.max", "3"},
                            {"context.max", "400"}});
  Engine engine = model.engine();
  Session a = test::new_session(model), b = test::new_session(model),
          c = test::new_session(model, {.reserve_tokens = 100});
  test::require_ok(a.prefill(std::vector<int32_t>(90, 7)));
  test::require_ok(b.prefill(std::vector<int32_t>(200, 7)));
  test::require_ok(b.truncate(150));
  test::require_ok(c.prefill(std::vector<int32_t>(10, 7)));
  const int64_t room = 9 * model.plan().devices[0].kv_page_bytes;
  test::require_ok(engine.set_budget(0, engine.memory().devices[0].bytes_now + room));
  for (Session* session : {&b, &c, &a}) {
    // Each takes half of what is left.
    const Forecast before = session->forecast();
    CHECK(before.n_tokens_end > session->n_tokens());
    const int64_t half = (session->n_tokens() + before.n_tokens_end) / 2;
    test::require_ok(grow(*session, half));
    CHECK(session->forecast().n_tokens_end == before.n_tokens_end);
  }
  for (Session* session : {&a, &b, &c}) {
    const Forecast forecast = session->forecast();
    CHECK_FALSE(grow(*session, 400).ok());
    CHECK(session->n_tokens() == forecast.n_tokens_end);
  }
  // What one gives back the others can have.
  test::require_ok(b.truncate(0));
  const Forecast forecast = a.forecast();
  CHECK(forecast.n_tokens_end > a.n_tokens());
  (void)grow(a, 400);
  CHECK(a.n_tokens() == forecast.n_tokens_end);
}

TEST_CASE("the budget that ends first is named, the host's sum too", "[forecast]") {
  const Model model = load({{"devices", "cpu:0,cpu:1"},
                            {"kv.ladder", "none"},
                            {"kv.page_tokens", "16"},
                            {"context.max", "300"}});
  Engine engine = model.engine();
  Session session = test::new_session(model);
  test::require_ok(session.prefill(std::vector<int32_t>(20, 7)));
  const MemorySnapshot memory = engine.memory();
  const int64_t page =
      model.plan().devices[0].kv_page_bytes + model.plan().devices[1].kv_page_bytes;
  test::require_ok(engine.set_host_budget(memory.host_bytes_now + 3 * page));
  const Forecast forecast = session.forecast();
  REQUIRE(forecast.budgets.size() == 3);
  CHECK(budget(forecast, "host").n_tokens_end == 32 + 3 * 16);
  CHECK(budget(forecast, "host").device == -1);
  CHECK(budget(forecast, "cpu:1").n_tokens_end == 300);
  CHECK(forecast.n_tokens_end == 32 + 3 * 16);
  CHECK_FALSE(grow(session, 300).ok());
  CHECK(session.n_tokens() == forecast.n_tokens_end);

  test::require_ok(engine.set_host_budget(int64_t{1} << 40));
  test::require_ok(engine.set_budget(1, engine.memory().devices[1].bytes_now));
  CHECK(budget(session.forecast(), "cpu:1").n_tokens_end == session.n_tokens());
  CHECK(budget(session.forecast(), "cpu:0").n_tokens_end == 300);
}

TEST_CASE("the ladder does what was forecast", "[forecast]") {
  struct Case {
    const char *ladder, *tiers, *event;
    LadderStep then;
  };
  for (const Case& c :
       {Case{"file", "device,file", "spilled_to_file", LadderStep::kFile},
        Case{"requantise", "device", "requantised", LadderStep::kRequantise},
        Case{"spill,requantise,file", "device,file", "requantised", LadderStep::kRequantise}}) {
    const Model model = load({{"kv.ladder", c.ladder},
                              {"kv.tiers", c.tiers},
                              {"kv.page_tokens", "16"},
                              {"context.max", "300"}});
    Engine engine = model.engine();
    Session session = test::new_session(model);
    test::require_ok(session.prefill(std::vector<int32_t>(40, 7)));
    test::require_ok(engine.set_budget(
        0, engine.memory().devices[0].bytes_now + 5 * model.plan().devices[0].kv_page_bytes));
    const BudgetForecast forecast = budget(session.forecast(), "cpu");
    INFO(c.ladder << ": " << forecast.text);
    REQUIRE(forecast.then.has_value());
    CHECK(*forecast.then == c.then);
    test::require_ok(grow(session, forecast.n_tokens_end));
    CHECK(session.events().empty());
    test::require_ok(grow(session, forecast.n_tokens_end + 1));
    REQUIRE(session.events().size() == 1);
    CHECK(session.events()[0].kind == c.event);
    CHECK(session.events()[0].position == forecast.n_tokens_end);
    // And again, with pages that were moved or rewritten.
    const auto freed = [&] {
      int64_t bytes = 0;
      for (const Event& event : session.events()) bytes += event.bytes;
      return bytes;
    };
    for (int i = 0; i < 3; ++i) {
      const Forecast next = session.forecast();
      const int64_t before = freed();
      test::require_ok(grow(session, next.n_tokens_end));
      CHECK(freed() == before);
      if (next.n_tokens_end == 300) break;
      if (!grow(session, next.n_tokens_end + 1).ok()) break;
      CHECK(freed() > before);
    }
  }
}

TEST_CASE("a shorter chunk is forecast where passes may become shorter", "[forecast]") {
  const Model model = test::load_model(
      FATHOM_EXAMPLE_MODEL,
      {{"threads", "1"}, {"kv.ladder", "chunk"}, {"kv.page_tokens", "16"}, {"context.max", "300"}});
  REQUIRE(model.plan().prefill_chunk == 300);
  Engine engine = model.engine();
  Session session = test::new_session(model);
  test::require_ok(session.prefill(std::vector<int32_t>(40, 7)));
  test::require_ok(engine.set_budget(
      0, engine.memory().devices[0].bytes_now + 3 * model.plan().devices[0].kv_page_bytes));
  // Three pages beyond the third, which 40 tokens have begun.
  const BudgetForecast forecast = budget(session.forecast(), "cpu");
  INFO(forecast.text);
  CHECK(forecast.n_tokens_end == 6 * 16);
  REQUIRE(forecast.then.has_value());
  CHECK(*forecast.then == LadderStep::kChunk);
  CHECK(forecast.text.find("shorter") != std::string::npos);
  test::require_ok(grow(session, forecast.n_tokens_end));
  CHECK(session.events().empty());
  test::require_ok(grow(session, forecast.n_tokens_end + 1));
  REQUIRE(session.events().size() == 1);
  CHECK(session.events()[0].kind == "chunk_lowered");
  CHECK(session.events()[0].position == forecast.n_tokens_end);
  // Until the chunk is as short as it gets; then the end is the end.
  for (int i = 0;; ++i) {
    REQUIRE(i < 10);
    test::require_ok(engine.set_budget(0, engine.memory().devices[0].bytes_now));
    const BudgetForecast next = budget(session.forecast(), "cpu");
    INFO(next.text);
    test::require_ok(grow(session, next.n_tokens_end));
    if (!next.then) break;
    CHECK(*next.then == LadderStep::kChunk);
    test::require_ok(session.step(7));
  }
  CHECK(session.step(7).code() == Code::kContextFull);
}

TEST_CASE("pages to the host are forecast for a card", "[forecast]") {
  auto machine = MachineDescription::parse(
      R"({"devices": [{"name": "cpu", "bytes": "40G"}, {"name": "cuda:0", "bytes": "24G"}]})");
  REQUIRE(machine.ok());
  auto made = Engine::simulate(*machine, test::config_of({{"weights.type", "q8_0"},
                                                          {"context.max", "16384"},
                                                          {"kv.tiers", "device,host,file"},
                                                          {"kv.ladder", "spill,file"}}));
  INFO(made.status().message());
  REQUIRE(made.ok());
  Engine engine = *made;
  auto plan = engine.plan(std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2-lite.json");
  REQUIRE(plan.ok());
  auto model = Model::load(engine, *plan);
  REQUIRE(model.ok());
  int card = -1;
  for (int d = 0; d < 2; ++d)
    if (plan->devices[static_cast<size_t>(d)].name == "cuda:0") card = d;
  REQUIRE(card >= 0);
  REQUIRE(plan->devices[static_cast<size_t>(card)].n_layers > 0);
  Session session = test::new_session(*model);
  test::require_ok(session.prefill(std::vector<int32_t>(2000, 7)));
  const auto at = static_cast<size_t>(card);
  test::require_ok(engine.set_budget(
      card, engine.memory().devices[at].bytes_now + 3 * plan->devices[at].kv_page_bytes));
  const BudgetForecast forecast = budget(session.forecast(), "cuda:0");
  INFO(forecast.text);
  REQUIRE(forecast.then.has_value());
  CHECK(*forecast.then == LadderStep::kSpill);
  CHECK(forecast.text.find("host memory") != std::string::npos);
  CHECK(forecast.n_tokens_end > 2000);
  CHECK(forecast.n_tokens_end < 16384);
  test::require_ok(grow(session, forecast.n_tokens_end));
  CHECK(session.events().empty());
  test::require_ok(grow(session, forecast.n_tokens_end + 1));
  REQUIRE(session.events().size() == 1);
  CHECK(session.events()[0].kind == "spilled");
  CHECK(session.events()[0].position == forecast.n_tokens_end);
}

}  // namespace
}  // namespace fathom
