// The ladder: what a session does when memory ends, and that none of it shows in the logits but
// where it says so.
#include <catch2/catch.hpp>

#include <algorithm>

#include "lib/run/ladder.h"
#include "support/spill.h"

namespace fathom {
namespace {

using test::count_events;
using test::leave;
using test::long_text;

const std::string kTrained = FATHOM_EXAMPLE_MODEL;

// Logits after a prefill in two parts and a few steps.
std::vector<std::vector<float>> run_text(Session& session, std::span<const int32_t> tokens) {
  std::vector<std::vector<float>> all;
  const auto keep = [&] {
    const auto logits = session.logits();
    all.emplace_back(logits.begin(), logits.end());
  };
  const size_t n = tokens.size() - 3;
  test::require_ok(session.prefill(tokens.first(n / 2)));
  keep();
  test::require_ok(session.prefill(tokens.subspan(n / 2, n - n / 2)));
  keep();
  for (size_t i = n; i < tokens.size(); ++i) {
    test::require_ok(session.step(tokens[i]));
    keep();
  }
  return all;
}

void check_same_bits(const std::vector<std::vector<float>>& expected,
                     const std::vector<std::vector<float>>& got) {
  REQUIRE(expected.size() == got.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    INFO("logits " << i << " of " << expected.size());
    CHECK(test::first_bit_difference(expected[i], got[i]).index == -1);
  }
}

TEST_CASE("pages in the file give the same bits, for every page size, thread count and form",
          "[ladder]") {
  test::TemporaryFolder folder("bits");
  const auto tokens = long_text(2100);
  for (const char* form : {"expanded", "absorbed"}) {
    const test::Settings common{{"attention.form", form}, {"prefill.chunk", "256"}};
    std::vector<std::vector<float>> expected;
    {
      const Model model = test::load_model(kTrained, common);
      Session session = test::new_session(model);
      expected = run_text(session, tokens);
    }
    for (const char* page : {"16", "64", "1024"})
      for (const char* threads : {"1", "2"}) {
        if (std::string(page) != "64" && std::string(threads) == "1") continue;
        test::Settings settings = common;
        settings.insert(settings.end(), {{"kv.page_tokens", page},
                                         {"threads", threads},
                                         {"kv.tiers", "device,file"},
                                         {"kv.ladder", "file"},
                                         {"kv.spill_folder", folder.path()}});
        const Model model = test::load_model(kTrained, settings);
        Session session = test::new_session(model);
        // Room for the window of a pass and little more: nearly all goes to the file.
        const int64_t page_bytes = model.plan().devices[0].kv_page_bytes;
        leave(model, page_bytes * (256 / session.cache().page_tokens() + 2));
        INFO(form << ", page " << page << ", threads " << threads);
        check_same_bits(expected, run_text(session, tokens));
        CHECK(session.cache().bytes_in(KvTier::kFile) > 0);
        CHECK(count_events(session, "spilled_to_file") == 1);
        const MemorySnapshot memory = model.engine().memory();
        CHECK(memory.devices[0].bytes_peak <= memory.devices[0].budget_bytes);
        CHECK(folder.n_entries() == 0);  // the file has no name
      }
  }
}

TEST_CASE("mixed types and windows survive the file with the same bits", "[ladder]") {
  test::TemporaryFolder folder("windows");
  const auto tokens = long_text(2500);
  const test::Settings common{{"kv.type", "q8_0"},
                              {"kv.recent_16bit", "256"},
                              {"kv.first_16bit", "100"},
                              {"prefill.chunk", "256"},
                              {"kv.page_tokens", "64"}};
  std::vector<std::vector<float>> expected;
  {
    const Model model = test::load_model(kTrained, common);
    Session session = test::new_session(model);
    expected = run_text(session, tokens);
  }
  test::Settings settings = common;
  settings.insert(
      settings.end(),
      {{"kv.tiers", "device,file"}, {"kv.ladder", "file"}, {"kv.spill_folder", folder.path()}});
  const Model model = test::load_model(kTrained, settings);
  Session session = test::new_session(model);
  leave(model, model.plan().devices[0].kv_hot_page_bytes * 14);
  check_same_bits(expected, run_text(session, tokens));
  CHECK(session.cache().bytes_in(KvTier::kFile) > 0);
  const KvRows rows = session.cache().rows(0, 0, 0, 2500);
  CHECK(rows.pages[0].data != nullptr);  // the first window stays
  CHECK(rows.pages[1].data != nullptr);
  CHECK(rows.pages[2].data == nullptr);
  CHECK(rows.pages[2].type == KvType::kQ8_0);
}

TEST_CASE("truncating into moved pages, going on, and forgetting all of them", "[ladder]") {
  test::TemporaryFolder folder("truncate");
  const auto tokens = long_text(2000);
  const Model free = test::load_model(kTrained, {{"prefill.chunk", "128"}});
  const Model model = test::load_model(kTrained, {{"prefill.chunk", "128"},
                                                  {"kv.page_tokens", "64"},
                                                  {"kv.tiers", "device,file"},
                                                  {"kv.ladder", "file"},
                                                  {"kv.spill_folder", folder.path()}});
  Session session = test::new_session(model), other = test::new_session(free);
  leave(model, model.plan().devices[0].kv_page_bytes * 5);
  const auto both = [&](auto&& act) {
    act(session);
    act(other);
  };
  both([&](Session& s) { test::require_ok(s.prefill(tokens)); });
  for (const int64_t keep : {1999, 1500, 777, 640, 65, 1}) {
    both([&](Session& s) {
      test::require_ok(s.truncate(keep));
      test::require_ok(s.prefill(std::span(tokens).subspan(
          static_cast<size_t>(keep), 300 > 2000 - keep ? static_cast<size_t>(2000 - keep) : 300)));
      test::require_ok(s.step(9));
    });
    INFO("truncated to " << keep);
    CHECK(test::first_bit_difference(other.logits(), session.logits()).index == -1);
  }
  test::require_ok(session.truncate(0));
  CHECK(session.cache().size_bytes() == 0);
  CHECK(session.cache().bytes_in(KvTier::kFile) == 0);
}

TEST_CASE("the end of the ladder is a full context: saved, truncated, gone on", "[ladder]") {
  test::TemporaryFolder folder("full");
  const auto tokens = long_text(1000);
  // Ladder with nothing but the chunk, which a pinned one takes away: every step is used up.
  const Model model =
      test::load_model(kTrained, {{"kv.page_tokens", "64"}, {"prefill.chunk", "64"}});
  Session session = test::new_session(model);
  const int64_t page_bytes = model.plan().devices[0].kv_page_bytes;
  leave(model, page_bytes * 4);
  const Status status = session.prefill(tokens);
  CHECK(status.code() == Code::kContextFull);
  CHECK(session.n_tokens() == 256);
  CHECK(status.bytes_needed() == page_bytes);
  CHECK(status.bytes_available() == 0);
  CHECK(status.key() == "kv");
  for (const char* part :
       {"256 tokens", "Helps: [1]", "kv.tiers=device,file", "truncate to 192", "budget.cpu +"})
    CHECK_THAT(std::string(status.message()), Catch::Contains(part));
  INFO(status.message());

  const std::string path = folder.path() + "/kept";
  test::require_ok(session.save(path));
  test::require_ok(session.truncate(192));
  test::require_ok(session.prefill(std::span(tokens).subspan(192, 64)));
  const std::vector<float> logits(session.logits().begin(), session.logits().end());
  GenerateOptions options;
  options.stop_at_eos = false;
  const auto result = session.generate(options);
  REQUIRE(result.ok());
  CHECK(result->reason == StopReason::kContextFull);
  CHECK(result->tokens.empty());  // the page was full
  CHECK(result->status.code() == Code::kContextFull);
  CHECK(test::first_bit_difference(logits, session.logits()).index == -1);

  // Without a ladder the budget ends it.
  const Model plain = test::load_model(
      kTrained, {{"kv.page_tokens", "64"}, {"prefill.chunk", "64"}, {"kv.ladder", "none"}});
  Session bounded = test::new_session(plain);
  leave(plain, page_bytes * 4);
  const Status refused = bounded.prefill(tokens);
  CHECK(refused.code() == Code::kBudget);
  CHECK_THAT(std::string(refused.message()), Catch::Contains("Helps: [1]"));
}

TEST_CASE("the chunk is lowered while the text is read, and what was read counts", "[ladder]") {
  const auto tokens = long_text(3000);
  const Model model = test::load_model(kTrained, {{"kv.page_tokens", "64"}});
  REQUIRE(model.plan().prefill_chunk == 512);
  Session session = test::new_session(model);
  const int64_t scratch = model.engine().memory().item(0, Purpose::kActivations).bytes_now +
                          model.engine().memory().item(0, Purpose::kWorkspace).bytes_now;
  leave(model, model.plan().devices[0].kv_page_bytes * 16);
  test::require_ok(session.prefill(tokens));
  CHECK(session.n_tokens() == 3000);
  CHECK(count_events(session, "chunk_lowered") == 1);
  const Event& event = session.events().front();
  INFO(event.text);
  CHECK(event.bytes > 0);
  CHECK(event.position > 0);
  CHECK_THAT(event.text, Catch::Contains("passes of"));
  const MemorySnapshot memory = model.engine().memory();
  CHECK(memory.item(0, Purpose::kActivations).bytes_now +
            memory.item(0, Purpose::kWorkspace).bytes_now ==
        scratch - event.bytes);
  CHECK(memory.devices[0].bytes_peak <= memory.devices[0].budget_bytes);
  // Other cuts, same text: the logits agree as for any other chunk.
  Session roomy = test::new_session(test::load_model(kTrained));
  test::require_ok(roomy.prefill(tokens));
  CHECK(test::cosine(roomy.logits(), session.logits()) > 0.999);
  CHECK(test::argmax(roomy.logits()) == test::argmax(session.logits()));

  // Memory is there again: the next prompt is read in the passes of the plan.
  const std::vector<float> before(session.logits().begin(), session.logits().end());
  test::require_ok(Engine(model.engine()).set_budget(0, int64_t{1} << 40));
  test::require_ok(session.step(5));
  CHECK(count_events(session, "chunk_raised") == 0);  // a step wants no passes
  test::require_ok(session.truncate(3000));
  test::require_ok(session.prefill(std::span(tokens).first(700)));
  CHECK(count_events(session, "chunk_raised") == 1);
  const MemorySnapshot again = model.engine().memory();
  CHECK(again.item(0, Purpose::kActivations).bytes_now +
            again.item(0, Purpose::kWorkspace).bytes_now ==
        scratch);
  test::require_ok(session.truncate(2999));
  test::require_ok(session.step(tokens[2999]));
  CHECK(test::cosine(before, session.logits()) > 0.999);
  // Not so far that the prompt's own pages would lower it again.
  leave(model, model.plan().devices[0].kv_page_bytes * 2);
  test::require_ok(session.prefill(std::span(tokens).first(600)));
  CHECK(count_events(session, "chunk_lowered") == 2);
  leave(model, model.plan().devices[0].kv_page_bytes * 30 + scratch / 8);
  test::require_ok(session.prefill(std::span(tokens).first(1000)));
  CHECK(count_events(session, "chunk_lowered") == 2);

  // A session that begins when memory is short takes a shorter chunk at once.
  Engine engine = model.engine();
  test::require_ok(session.truncate(0));
  test::require_ok(engine.set_budget(0, engine.memory().devices[0].bytes_now + scratch / 2));
  Session small = test::new_session(model);
  CHECK(count_events(small, "chunk_lowered") == 1);
  test::require_ok(small.step(3));
  const auto refused = Session::create(model);
  REQUIRE_FALSE(refused.ok());
  CHECK(refused.status().code() == Code::kBudget);
  CHECK_THAT(std::string(refused.status().message()), Catch::Contains("Helps: [1]"));
}

TEST_CASE("cold pages are requantised down to the floor and no further", "[ladder]") {
  const auto tokens = long_text(2600);
  for (const char* floor : {"q8_0", "fp8", "q4_0"}) {
    const Model model = test::load_model(kTrained, {{"kv.page_tokens", "64"},
                                                    {"prefill.chunk", "128"},
                                                    {"kv.ladder", "requantise"},
                                                    {"kv.ladder_type", floor}});
    Session session = test::new_session(model);
    const int64_t page_bytes = model.plan().devices[0].kv_page_bytes;
    leave(model, page_bytes * 20);
    const Status status = session.prefill(tokens);
    CHECK(status.code() == Code::kContextFull);
    INFO(floor << ": " << session.n_tokens() << " tokens; " << status.message());
    CHECK(session.n_tokens() > 20 * 64);
    CHECK(count_events(session, "requantised") == 1);
    const KvRows rows = session.cache().rows(0, 0, 0, session.n_tokens());
    CHECK(kv_type_name(rows.pages[0].type) == floor);
    CHECK(session.cache().size_bytes() <= page_bytes * 20);
    // It still says what the text says.
    Session roomy = test::new_session(test::load_model(kTrained));
    test::require_ok(
        roomy.prefill(std::span(tokens).first(static_cast<size_t>(session.n_tokens()))));
    test::require_ok(session.truncate(session.n_tokens() - 1));
    test::require_ok(session.step(tokens[static_cast<size_t>(session.n_tokens())]));
    CHECK(test::cosine(roomy.logits(), session.logits()) > (floor[1] == '4' ? 0.97 : 0.999));
  }
}

TEST_CASE("a whole ladder is climbed in its order", "[ladder]") {
  test::TemporaryFolder folder("whole");
  const Model model = test::load_model(kTrained, {{"kv.page_tokens", "64"},
                                                  {"kv.tiers", "device,host,file"},
                                                  {"kv.ladder", "chunk,spill,requantise,file"},
                                                  {"kv.spill_folder", folder.path()}});
  Session session = test::new_session(model);
  leave(model, model.plan().devices[0].kv_page_bytes * 6);
  test::require_ok(session.prefill(long_text(5000)));
  std::vector<std::string> kinds;
  for (const Event& event : session.events())
    if (kinds.empty() || kinds.back() != event.kind) kinds.push_back(event.kind);
  REQUIRE(kinds.size() >= 3);  // the device is the host: nothing to spill to
  CHECK(kinds[0] == "chunk_lowered");
  CHECK(kinds[1] == "requantised");
  CHECK(kinds[2] == "spilled_to_file");
  for (const Event& event : session.events()) {
    INFO(event.kind << ": " << event.text);
    CHECK(event.bytes > 0);
    CHECK_FALSE(event.text.empty());
  }
}

TEST_CASE("a full disk is told, and the session stays", "[ladder]") {
  const auto tokens = long_text(1000);
  const Model model = test::load_model(kTrained, {{"kv.page_tokens", "64"},
                                                  {"prefill.chunk", "64"},
                                                  {"kv.tiers", "device,file"},
                                                  {"kv.ladder", "file"},
                                                  {"kv.spill_folder", "/nonexistent/folder"}});
  Session session = test::new_session(model);
  leave(model, model.plan().devices[0].kv_page_bytes * 4);
  const Status status = session.prefill(tokens);
  CHECK(status.code() == Code::kContextFull);
  CHECK_THAT(std::string(status.message()), Catch::Contains("/nonexistent/folder"));
  CHECK(session.n_tokens() == 256);
  test::require_ok(session.truncate(100));
  test::require_ok(session.prefill(std::span(tokens).subspan(100, 100)));
}

TEST_CASE("saved with moved pages, restored with moved pages: the same bits", "[ladder]") {
  test::TemporaryFolder folder("saved");
  const auto tokens = long_text(2000);
  const std::string path = folder.path() + "/session";
  const test::Settings settings{{"kv.page_tokens", "64"},
                                {"prefill.chunk", "128"},
                                {"kv.tiers", "device,file"},
                                {"kv.ladder", "requantise,file"},
                                {"kv.spill_folder", folder.path()}};
  const Model model = test::load_model(kTrained, settings);
  const int64_t page_bytes = model.plan().devices[0].kv_page_bytes;
  std::vector<float> expected;
  {
    Session session = test::new_session(model);
    leave(model, page_bytes * 8);
    test::require_ok(session.prefill(tokens));
    CHECK(session.cache().bytes_in(KvTier::kFile) > 0);
    test::require_ok(session.save(path));
    for (int32_t id : {4, 5, 6}) test::require_ok(session.step(id));
    expected.assign(session.logits().begin(), session.logits().end());
  }
  for (const char* page : {"64", "16"})
    for (const bool tight : {true, false}) {
      test::Settings other = settings;
      other[0].second = page;
      const Model again = test::load_model(kTrained, other);
      const Session probe = test::new_session(again);  // what a session holds without pages
      if (tight) leave(again, 0);
      Engine engine = again.engine();
      if (tight)
        test::require_ok(
            engine.set_budget(0, engine.memory().devices[0].budget_bytes +
                                     engine.memory().item(0, Purpose::kActivations).bytes_now +
                                     engine.memory().item(0, Purpose::kWorkspace).bytes_now +
                                     engine.memory().item(0, Purpose::kStaging).bytes_now +
                                     (1 << 20) + page_bytes * 8));
      auto restored = Session::restore(again, path);
      INFO("page " << page << (tight ? ", tight: " : ": ") << restored.status().message());
      REQUIRE(restored.ok());
      CHECK((restored->cache().bytes_in(KvTier::kFile) > 0) == tight);
      for (int32_t id : {4, 5, 6}) test::require_ok(restored->step(id));
      CHECK(test::first_bit_difference(expected, restored->logits()).index == -1);
    }
  // A session whose ladder rewrites nothing takes no rewritten pages.
  const auto refused =
      Session::restore(test::load_model(kTrained, {{"kv.page_tokens", "64"}}), path);
  REQUIRE_FALSE(refused.ok());
  CHECK(refused.status().code() == Code::kMismatch);
}

TEST_CASE("pages of a device with memory of its own go to the host, and from there to the file",
          "[ladder]") {
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
  REQUIRE(plan->feasible);
  int card = -1, host = -1;
  for (int d = 0; d < static_cast<int>(plan->devices.size()); ++d)
    (plan->devices[static_cast<size_t>(d)].kind == DeviceKind::kCpu ? host : card) = d;
  REQUIRE(card >= 0);
  REQUIRE(host >= 0);
  auto model = Model::load(engine, *plan);
  REQUIRE(model.ok());
  const int64_t idle = engine.memory().devices[static_cast<size_t>(card)].bytes_now;
  {
    Session session = test::new_session(*model);
    const std::vector<int32_t> text(4000, 7);
    test::require_ok(session.prefill(text));
    leave(*model, 0, card);
    test::require_ok(session.prefill(text));
    CHECK(count_events(session, "spilled") == 1);
    CHECK(count_events(session, "spilled_to_file") == 0);
    const int64_t on_host = session.cache().bytes_in(KvTier::kHost);
    CHECK(on_host > 0);
    CHECK(session.cache().bytes_in(KvTier::kFile) == 0);
    leave(*model, 0, host);
    test::require_ok(engine.set_host_budget(engine.memory().host_bytes_now));
    (void)session.prefill(text);  // the host's own layers have no room either
    CHECK(engine.memory().devices[static_cast<size_t>(card)].bytes_peak <=
          plan->devices[static_cast<size_t>(card)].budget_bytes);
    CHECK(session.cache().bytes_in(KvTier::kFile) > 0);
    test::require_ok(session.truncate(0));
    CHECK(session.cache().size_bytes() == 0);
  }
  CHECK(engine.memory().devices[static_cast<size_t>(card)].bytes_now == idle);
}

TEST_CASE("a plan that fits by the ladder says so, and the run stays below it", "[ladder]") {
  test::TemporaryFolder folder("plan");
  const test::Settings base{{"context.max", "4096"}, {"kv.page_tokens", "64"}};
  const Plan full = test::load_model(kTrained, base).plan();
  const int64_t kv = full.devices[0].planned(Purpose::kKv);
  test::Settings settings = base;
  settings.push_back({"budget.cpu", std::to_string(full.devices[0].peak_bytes() - kv * 3 / 4)});
  const auto made = [&](test::Settings more) {
    test::Settings all = settings;
    all.insert(all.end(), more.begin(), more.end());
    return test::config_of(all);
  };
  auto engine = Engine::create(made({}));
  REQUIRE(engine.ok());
  const auto plain = engine->plan(kTrained);
  REQUIRE(plain.ok());
  CHECK_FALSE(plain->feasible);
  CHECK(std::any_of(plain->alternatives.begin(), plain->alternatives.end(), [](const auto& a) {
    return a.changes[0] == std::pair<std::string, std::string>("kv.tiers", "device,file");
  }));

  const auto model = Model::load(
      kTrained, made({{"kv.tiers", "device,file"}, {"kv.spill_folder", folder.path()}}));
  INFO(model.status().message());
  REQUIRE(model.ok());
  const Plan& plan = model->plan();
  CHECK(plan.by_ladder);
  CHECK(plan.max_context == 4096);
  CHECK(plan.max_context_resident < 4096);
  CHECK(plan.max_context_resident > 512);
  CHECK(plan.devices[0].kv_moved_bytes > 0);
  CHECK(plan.devices[0].kv_moved_bytes + plan.devices[0].planned(Purpose::kKv) == kv);
  CHECK(std::any_of(plan.remarks.begin(), plan.remarks.end(), [&](const std::string& remark) {
    return remark.find(folder.path()) != std::string::npos;
  }));
  CHECK_THAT(plan.describe(), Catch::Contains("by the ladder from"));
  Session session = test::new_session(*model);
  test::require_ok(session.prefill(long_text(4094)));
  test::require_ok(session.step(1));
  const MemorySnapshot memory = model->engine().memory();
  CHECK(memory.devices[0].bytes_peak <= plan.devices[0].peak_bytes());
  for (int p = 0; p < kPurposeCount; ++p) {
    INFO(purpose_name(static_cast<Purpose>(p)));
    CHECK(memory.item(0, static_cast<Purpose>(p)).bytes_peak <=
          plan.devices[0].planned(static_cast<Purpose>(p)));
  }
  CHECK(session.cache().bytes_in(KvTier::kFile) > 0);
  CHECK(count_events(session, "chunk_lowered") == 0);  // the plan chose it for this budget
}

TEST_CASE("pages come back from the file when memory does, and stay", "[ladder]") {
  test::TemporaryFolder folder("return");
  const auto tokens = long_text(1400);
  const test::Settings common{{"kv.page_tokens", "64"}, {"prefill.chunk", "128"}};
  test::Settings settings = common;
  settings.insert(
      settings.end(),
      {{"kv.tiers", "device,file"}, {"kv.ladder", "file"}, {"kv.spill_folder", folder.path()}});
  const Model model = test::load_model(kTrained, settings),
              free = test::load_model(kTrained, common);
  Session session = test::new_session(model), other = test::new_session(free);
  const int64_t page_bytes = model.plan().devices[0].kv_page_bytes;
  const auto file = [&] { return session.cache().bytes_in(KvTier::kFile); };
  const auto both = [&](size_t first, size_t n) {
    test::require_ok(session.prefill(std::span(tokens).subspan(first, n)));
    test::require_ok(other.prefill(std::span(tokens).subspan(first, n)));
    CHECK(test::first_bit_difference(other.logits(), session.logits()).index == -1);
    const MemorySnapshot memory = model.engine().memory();
    CHECK(memory.devices[0].bytes_now <= memory.devices[0].budget_bytes);
  };
  leave(model, 5 * page_bytes);
  both(0, 1000);
  const int64_t moved = file();
  REQUIRE(moved >= 8 * page_bytes);

  // A little memory: some pages come, beside room for the next passes, and nothing goes to and fro.
  leave(model, 5 * page_bytes);
  both(1000, 10);
  CHECK(file() < moved);
  CHECK(file() > 0);
  CHECK(count_events(session, "returned") == 1);
  const size_t events = session.events().size();
  for (int i = 0; i < 100; ++i) {
    test::require_ok(session.step(i));
    test::require_ok(other.step(i));
  }
  CHECK(test::first_bit_difference(other.logits(), session.logits()).index == -1);
  CHECK(session.events().size() == events);

  // All of it: nothing is left in the file, and it can be filled again.
  test::require_ok(Engine(model.engine()).set_budget(0, int64_t{1} << 40));
  both(1010, 1);
  CHECK(file() == 0);
  CHECK(session.cache().size_bytes() == other.cache().size_bytes());
  leave(model, 0);
  both(1100, 300);
  CHECK(file() > 0);
  const KvRows rows = session.cache().rows(0, 0, 0, session.n_tokens());
  CHECK(rows.pages[0].data == nullptr);
}

TEST_CASE("pages that the system refuses are not asked for again and again", "[ladder]") {
  test::TemporaryFolder folder("refused");
  int64_t asked = 0;
  bool refusing = false;
  HostHooks hooks;
  hooks.memory = [&](int, Purpose purpose, int64_t delta, int64_t) {
    if (purpose != Purpose::kKv || delta <= 0 || !refusing) return true;
    ++asked;
    return false;
  };
  auto engine = Engine::create(test::config_of({{"kv.page_tokens", "64"},
                                                {"prefill.chunk", "64"},
                                                {"kv.tiers", "device,file"},
                                                {"kv.spill_folder", folder.path()}}),
                               hooks);
  REQUIRE(engine.ok());
  auto model = Model::load(*engine, *engine->plan(kTrained));
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  leave(*model, 4 * model->plan().devices[0].kv_page_bytes);
  test::require_ok(session.prefill(long_text(600)));
  const int64_t moved = session.cache().bytes_in(KvTier::kFile);
  REQUIRE(moved > 0);
  leave(*model, int64_t{64} << 20);
  refusing = true;
  for (int i = 0; i < 20; ++i) test::require_ok(session.step(i));
  CHECK(asked == 1);
  CHECK(session.cache().bytes_in(KvTier::kFile) == moved);
  refusing = false;
  test::require_ok(session.step(6));
  CHECK(session.cache().bytes_in(KvTier::kFile) == moved);  // no more than was refused
  leave(*model, int64_t{128} << 20);
  test::require_ok(session.step(7));
  CHECK(session.cache().bytes_in(KvTier::kFile) == 0);
}

TEST_CASE("decisions of the ladder, by hand", "[ladder]") {
  using run::LadderGains;
  const std::vector<LadderStep> ladder{LadderStep::kChunk, LadderStep::kRequantise,
                                       LadderStep::kFile};
  LadderGains gains;
  CHECK_FALSE(run::next_step(ladder, gains));
  gains[LadderStep::kSpill] = 5;  // not on this ladder
  CHECK_FALSE(run::next_step(ladder, gains));
  gains[LadderStep::kFile] = 5;
  CHECK(run::next_step(ladder, gains) == LadderStep::kFile);
  gains[LadderStep::kChunk] = 1;
  CHECK(run::next_step(ladder, gains) == LadderStep::kChunk);

  const KvPolicy plain{.page_tokens = 64};
  CHECK(run::movable_end(plain, 130, 140) == 2);
  // The tenth page is begun by a pass from 513 to 577: two pages are being written.
  CHECK(run::floor_bytes(plain, 640, 64, 0, 10, 10) == 20);
  CHECK(run::floor_bytes(plain, 640, 64, 4, 10, 10) == 52);
  CHECK(run::floor_bytes(plain, 640, 1, 0, 10, 10) == 10);
  const KvPolicy windows{
      .type = KvType::kQ8_0, .page_tokens = 64, .first_tokens = 64, .recent_tokens = 128};
  CHECK(run::movable_end(windows, 640, 640) == 8);
  CHECK(run::floor_bytes(windows, 640, 128, 0, 5, 10) == 40);
}

}  // namespace
}  // namespace fathom
