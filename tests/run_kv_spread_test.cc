// The cache of a layer on several devices (placement.kv): same bits wherever the rows lie, through
// prefill, decode, truncation, saving, the ladder and batches; bytes as planned; refusals.
#include <catch2/catch.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include <atomic>
#include <chrono>
#include <thread>

#include "lib/run/engine_state.h"
#include "lib/run/observed_backend.h"
#include "lib/run/session_state.h"
#include "support/golden.h"
#include "support/golden_models.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

using test::some_tokens;

test::Settings with(test::Settings settings, const test::Settings& more) {
  settings.insert(settings.end(), more.begin(), more.end());
  return settings;
}

void keep(std::vector<float>& all, const Session& session) {
  all.insert(all.end(), session.logits().begin(), session.logits().end());
}

// Logits after a prompt in chunks and one of another length, steps, truncation to the middle of a
// page, and steps again; `n` tokens at most.
std::vector<float> run(const Model& model, int64_t n, int64_t section_rows = nn::kSectionRows) {
  const auto tokens = some_tokens(n - 10, model.config().vocab_size);
  Session session = test::new_session(model);
  session.state().section_rows = section_rows;
  std::vector<float> all;
  test::require_ok(session.prefill(std::span(tokens).first(7)));
  keep(all, session);
  test::require_ok(session.prefill(std::span(tokens).subspan(7)));
  keep(all, session);
  for (int32_t token : {3, 1, 4, 1, 5}) {
    test::require_ok(session.step(token));
    keep(all, session);
  }
  test::require_ok(session.truncate(n / 2 + 3));
  test::require_ok(session.step(9));
  keep(all, session);
  test::require_ok(session.prefill(std::span(tokens).first(50)));
  keep(all, session);
  return all;
}

void check_same(const std::vector<float>& expected, const std::vector<float>& got) {
  const auto diff = test::first_bit_difference(expected, got);
  CHECK(diff.index == -1);
}

// No device holds more than its plan says.
void check_ledger(const Model& model) {
  const Plan& plan = model.plan();
  const MemorySnapshot now = model.engine().memory();
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    INFO(plan.devices[d].name);
    CHECK(now.devices[d].bytes_peak <= plan.devices[d].peak_bytes());
    CHECK(plan.devices[d].peak_bytes() <= plan.devices[d].budget_bytes);
  }
}

// The golden models have two or three layers.
const test::Settings kSpreads[] = {
    {{"devices", "cpu:0,cpu:1"},
     {"placement.layers", "cpu:0=*"},
     {"placement.kv", "home=512,cpu:1=*"}},
    // The oldest rows elsewhere; layers on both devices, each other's holder.
    {{"devices", "cpu:0,cpu:1"},
     {"placement.layers", "cpu:0=0,cpu:1=*"},
     {"placement.kv", "cpu:1=512,cpu:0=*"}},
    {{"devices", "cpu:0,cpu:1,cpu:2"},
     {"placement.layers", "cpu:1=*"},
     {"placement.experts", "cpu:2=*"},
     {"placement.kv", "cpu:0=512,cpu:2=512,home=*"}},
    {{"devices", "cpu:0,cpu:1,cpu:2,cpu:3"},
     {"placement.layers", "cpu:0=0,cpu:3=*"},
     {"placement.kv", "cpu:1=512,home=512,cpu:2=*"}},
};

void check_spreads(const char* name, std::span<const test::Settings> spreads) {
  const std::string path = test::test_data(name);
  // Of the larger form of attention too: 200 rows are above every golden model's crossover.
  const test::Settings settings{
      {"context.max", "1200"}, {"prefill.chunk", "200"}, {"threads", "1"}};
  const std::vector<float> expected = run(test::load_model(path, settings), 1200);
  for (const test::Settings& spread : spreads) {
    INFO(name << " with placement.kv=" << spread.back().second);
    const Model model = test::load_model(path, with(settings, spread));
    CHECK_FALSE(model.plan().placement.kv.empty());
    check_same(expected, run(model, 1200));
    check_ledger(model);
  }
}

// Logits of three steps of a batch of texts of so many tokens.
std::vector<float> batch_logits(const Model& model, std::initializer_list<int64_t> lengths,
                                int64_t section_rows = nn::kSectionRows) {
  std::vector<Session> sessions;
  std::vector<Session*> batch;
  std::vector<float> all;
  for (const int64_t n : lengths) {
    sessions.push_back(test::new_session(model));
    sessions.back().state().section_rows = section_rows;
    test::require_ok(sessions.back().prefill(some_tokens(n, model.config().vocab_size, n)));
  }
  for (Session& session : sessions) batch.push_back(&session);
  for (int i = 0; i < 3; ++i) {
    const int32_t tokens[] = {3, 1, 4};
    test::require_ok(Session::step_batch(batch, tokens));
    for (const Session& session : sessions) keep(all, session);
  }
  return all;
}

TEST_CASE("a cache spread over devices has the bits of one device", "[kv_spread]") {
  check_spreads("models/tiny-v2", kSpreads);
  check_spreads("models/tiny-v3", kSpreads);
}

TEST_CASE("a spread cache has the bits of one device with every golden model",
          "[kv_spread][slow]") {
  for (const char* name : test::kGoldenModels) check_spreads(name, kSpreads);
  for (const char* name : test::kMoreGoldenModels) check_spreads(name, kSpreads);
}

TEST_CASE("a spread cache has the same bits in every form, type and page size", "[kv_spread]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings kinds[] = {
      {{"prefill.chunk", "29"}},
      {{"prefill.chunk", "64"}, {"attention.form", "absorbed"}},
      {{"prefill.chunk", "64"}, {"attention.form", "expanded"}},
      {{"prefill.chunk", "64"}, {"kv.type", "q8_0"}, {"kv.recent_16bit", "128"}},
      {{"prefill.chunk", "64"}, {"kv.type", "q4_0"}, {"kv.first_16bit", "600"}},
      {{"prefill.chunk", "64"}, {"kv.page_tokens", "16"}},
      {{"prefill.chunk", "64"}, {"kv.page_tokens", "512"}},
      {{"prefill.chunk", "200"}, {"numerics", "exact"}},
  };
  for (const test::Settings& kind : kinds) {
    INFO(kind.back().first << "=" << kind.back().second);
    const test::Settings settings = with({{"context.max", "1100"}, {"threads", "1"}}, kind);
    check_same(run(test::load_model(path, settings), 1100),
               run(test::load_model(path, with(settings, kSpreads[2])), 1100));
  }
}

// Attention in sections of so many rows, as texts have them every kSectionRows.
void check_sections(const test::Settings& settings, int64_t n, int64_t section,
                    std::span<const test::Settings> spreads) {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings common =
      with({{"context.max", std::to_string(n)}, {"threads", "1"}}, settings);
  INFO(settings.back().first << "=" << settings.back().second << ", sections of " << section);
  const Model one = test::load_model(path, common);
  const std::vector<float> expected = run(one, n, section), whole = run(one, n);
  for (const test::Settings& spread : spreads) {
    INFO("placement.kv=" << spread.back().second);
    const Model model = test::load_model(path, with(common, spread));
    check_same(expected, run(model, n, section));
    check_ledger(model);
  }
  // Another order of sums, no other sums.
  double most = 0, sum = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    most = std::max(most, std::fabs(static_cast<double>(whole[i]) - expected[i]));
    sum += std::fabs(whole[i]);
  }
  INFO("largest difference " << most << ", mean " << sum / static_cast<double>(whole.size()));
  CHECK(most < 0.05 * sum / static_cast<double>(whole.size()));
}

const test::Settings kSectionSpreads[] = {
    // Sections of 512: the first at home, the rest elsewhere; the oldest elsewhere.
    {{"devices", "cpu:0,cpu:1"},
     {"placement.layers", "cpu:0=*"},
     {"placement.kv", "home=512,cpu:1=*"}},
    {{"devices", "cpu:0,cpu:1,cpu:2"},
     {"placement.layers", "cpu:0=*"},
     {"placement.kv", "cpu:1=512,cpu:2=512,home=*"}},
};

TEST_CASE("sections of a spread cache have the bits of one device", "[kv_spread]") {
  check_sections({{"prefill.chunk", "200"}}, 1300, 512, kSectionSpreads);
}

TEST_CASE("sections have the bits of one device, in every form", "[kv_spread][slow]") {
  const test::Settings kinds[] = {
      {{"prefill.chunk", "29"}},
      {{"prefill.chunk", "64"}, {"attention.form", "absorbed"}, {"numerics", "exact"}},
      {{"prefill.chunk", "64"}, {"kv.type", "q8_0"}, {"kv.recent_16bit", "128"}},
      {{"prefill.chunk", "64"}, {"kv.page_tokens", "512"}},
  };
  for (const test::Settings& kind : kinds)
    for (const int64_t section : {512, 1024}) {  // of which spans cut some
      check_sections(kind, 1600, section, kSpreads);
      check_sections(kind, 1600, section, kSectionSpreads);
    }
  check_sections({{"prefill.chunk", "1"}}, 1300, 512, kSectionSpreads);  // one slot and no more
}

TEST_CASE("a batch of spread caches has sections, too", "[kv_spread]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{
      {"context.max", "2400"}, {"prefill.chunk", "64"}, {"threads", "1"}, {"sessions.max", "3"}};
  const auto step = [](const Model& model) { return batch_logits(model, {40, 1300, 600}, 512); };
  const std::vector<float> expected = step(test::load_model(path, settings));
  for (const test::Settings& spread : kSectionSpreads)
    check_same(expected, step(test::load_model(path, with(settings, spread))));
}

TEST_CASE("devices that hold rows of one layer attend at once", "[kv_spread][overlap]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings = {{"context.max", "2400"},
                                   {"prefill.chunk", "64"},
                                   {"threads", "1"},
                                   {"devices", "cpu:0,cpu:1"},
                                   {"placement.layers", "cpu:0=*"},
                                   {"placement.experts", "cpu:0=*"},
                                   {"placement.embed", "cpu:0"},
                                   {"placement.head", "cpu:0"},
                                   {"placement.kv", "home=1024,cpu:1=*"}};
  std::atomic<int> at_home{0};
  std::atomic<bool> armed{false}, met{false};
  auto engine = run::create_engine(
      test::config_of(settings), {}, nullptr, [&](std::unique_ptr<Backend> backend, int device) {
        return run::observed(std::move(backend), device, [&](const OpTime& op) {
          if (op.op != "attend_absorbed") return;
          if (op.device == 0) ++at_home;
          // The guest, at the end of its first section, until the home has attended to one of its
          // own
          // - which came before the guest's turn where they follow each other.
          if (op.device != 1 || !armed.exchange(false)) return;
          const int before = at_home;
          const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
          while (at_home == before && std::chrono::steady_clock::now() < end)
            std::this_thread::sleep_for(std::chrono::microseconds(100));
          met = at_home > before;
        });
      });
  REQUIRE(engine.ok());
  auto plan = engine->plan(path);
  REQUIRE(plan.ok());
  auto model = Model::load(*engine, *plan);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  session.state().section_rows = 512;
  test::require_ok(session.prefill(some_tokens(2300, model->config().vocab_size)));
  // In a section that begins with a layer: the guest's are queued first, the home's are long.
  armed = true;
  test::require_ok(session.step(1));
  CHECK(met);
}

TEST_CASE("saved sessions go from one device to a spread cache and back", "[kv_spread]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{{"context.max", "1400"}, {"prefill.chunk", "64"}, {"threads", "1"}};
  const Model models[] = {test::load_model(path, settings),
                          test::load_model(path, with(settings, kSpreads[2])),
                          test::load_model(path, with(settings, kSpreads[0]))};
  const auto tokens = some_tokens(1290, models[0].config().vocab_size);
  Session first = test::new_session(models[0]);
  test::require_ok(first.prefill(tokens));
  test::require_ok(first.step(5));
  std::vector<float> expected;
  keep(expected, first);

  Session before = test::new_session(models[0]);
  test::require_ok(before.prefill(tokens));
  std::vector<std::byte> image;
  const auto save = [&](const Session& session) {
    image.clear();
    test::require_ok(session.save_to([&](std::span<const std::byte> bytes) {
      image.insert(image.end(), bytes.begin(), bytes.end());
      return Status();
    }));
  };
  const ReadFunction read = [&](int64_t offset, std::span<std::byte> out) {
    std::copy_n(image.begin() + offset, out.size(), out.begin());
    return Status();
  };
  save(before);
  const std::vector<std::byte> original = image;
  for (const int to : {1, 2, 0}) {
    INFO("model " << to);
    auto session = Session::restore_from(models[to], read, static_cast<int64_t>(image.size()));
    INFO(session.status().message());
    REQUIRE(session.ok());
    save(*session);
    CHECK(image == original);
    test::require_ok(session->step(5));
    std::vector<float> got;
    keep(got, *session);
    check_same(expected, got);
  }
}

TEST_CASE("sessions with spread caches step together", "[kv_spread]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{
      {"context.max", "1400"}, {"prefill.chunk", "64"}, {"threads", "1"}, {"sessions.max", "3"}};
  const auto step = [](const Model& model) { return batch_logits(model, {40, 600, 1100}); };
  const std::vector<float> expected = step(test::load_model(path, settings));
  for (const test::Settings& spread : kSpreads) {
    const Model model = test::load_model(path, with(settings, spread));
    check_same(expected, step(model));
    check_ledger(model);
  }
}

// What each of three devices holds beside the cache, when rows lie on all of them.
std::vector<int64_t> bytes_beside_cache(const std::string& path, const test::Settings& settings) {
  const test::Settings pinned = with(settings, {{"placement.kv", "home=512,cpu:1=1024,cpu:2=*"}});
  auto engine = Engine::create(test::config_of(pinned));
  REQUIRE(engine.ok());
  auto plan = engine->plan(path);
  REQUIRE(plan.ok());
  std::vector<int64_t> bytes;
  for (const PlanDevice& device : plan->devices)
    bytes.push_back(device.peak_bytes() - device.planned(Purpose::kKv));
  return bytes;
}

TEST_CASE("what one device cannot hold goes to others by itself, as planned", "[kv_spread]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{
      {"context.max", "3000"}, {"prefill.chunk", "128"}, {"threads", "1"}, {"kv.ladder", "none"}};
  const Model one = test::load_model(path, settings);
  const int64_t kv = one.plan().devices[0].planned(Purpose::kKv);
  const auto tokens = some_tokens(2990, one.config().vocab_size);
  std::vector<float> expected = test::last_logits(one, tokens);

  // All layers on the first device, whose budget ends far below its cache; uneven others.
  const test::Settings several = with(settings, {{"devices", "cpu:0,cpu:1,cpu:2"},
                                                 {"placement.layers", "cpu:0=*"},
                                                 {"placement.experts", "cpu:0=*"},
                                                 {"placement.embed", "cpu:0"},
                                                 {"placement.head", "cpu:0"}});
  const auto budgets = [&](int64_t a, int64_t b, int64_t c) {
    return with(several, {{"budget.cpu:0", std::to_string(a)},
                          {"budget.cpu:1", std::to_string(b)},
                          {"budget.cpu:2", std::to_string(c)}});
  };
  const std::vector<int64_t> beside = bytes_beside_cache(path, several);
  const test::Settings fits =
      budgets(beside[0] + kv * 25 / 100, beside[1] + kv * 50 / 100, beside[2] + kv * 40 / 100);

  int64_t most[3] = {0, 0, 0};
  HostHooks hooks;
  hooks.memory = [&](int device, Purpose, int64_t, int64_t total) {
    most[device] = std::max(most[device], total);
    return true;
  };
  auto engine = Engine::create(test::config_of(fits), hooks);
  REQUIRE(engine.ok());
  auto plan = engine->plan(path);
  REQUIRE(plan.ok());
  INFO(plan->describe());
  REQUIRE(plan->feasible);
  CHECK(plan->placement.kv.size() == 2);
  CHECK(std::any_of(plan->remarks.begin(), plan->remarks.end(), [](const std::string& remark) {
    return remark.find("which cannot hold them") != std::string::npos;
  }));
  auto model = Model::load(*engine, *plan);
  REQUIRE(model.ok());
  {
    Session session = test::new_session(*model);
    test::require_ok(session.prefill(tokens));
    std::vector<float> got;
    keep(got, session);
    check_same(expected, got);
    test::require_ok(session.reserve(3000));
    // To the byte, purpose by purpose; under the budget at all times.
    const MemorySnapshot now = engine->memory();
    for (int d = 0; d < 3; ++d) {
      const PlanDevice& device = plan->devices[static_cast<size_t>(d)];
      INFO(device.name);
      for (int p = 0; p < kPurposeCount; ++p) {
        const auto purpose = static_cast<Purpose>(p);
        INFO(purpose_name(purpose));
        CHECK(now.item(d, purpose).bytes_now ==
              device.bytes[static_cast<size_t>(Phase::kDecode)][static_cast<size_t>(p)]);
      }
      CHECK(device.planned(Purpose::kKv) > 0);
      CHECK(most[d] <= device.budget_bytes);
      CHECK(now.item(d, Purpose::kKv).bytes_now == plan->kv_bytes(d, 3000));
    }
    // The forecast ends at the first budget, and there it does.
    CHECK(session.forecast().n_tokens_end == 3000);
    test::require_ok(session.truncate(100));
    CHECK(engine->memory().item(1, Purpose::kKv).bytes_now == 0);
    CHECK(session.cache().size_bytes() == plan->kv_bytes(0, 100));
  }

  // Refused where the user wants it at home, and where there is no room anywhere.
  const auto feasible = [&](const test::Settings& asked) {
    auto other = Engine::create(test::config_of(asked));
    REQUIRE(other.ok());
    auto refused = other->plan(path);
    REQUIRE(refused.ok());
    return refused->feasible;
  };
  CHECK_FALSE(feasible(with(fits, {{"placement.kv", "home=*"}})));
  CHECK_FALSE(feasible(
      budgets(beside[0] + kv * 25 / 100, beside[1] + kv * 40 / 100, beside[2] + kv * 20 / 100)));
}

TEST_CASE("the ladder is climbed on every device of a spread cache", "[kv_spread]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{
      {"context.max", "3000"}, {"prefill.chunk", "128"}, {"threads", "1"}};
  const Model one = test::load_model(path, with(settings, {{"kv.ladder", "none"}}));
  const int64_t kv = one.plan().devices[0].planned(Purpose::kKv);
  const auto tokens = some_tokens(2950, one.config().vocab_size);
  const auto text = [&](const Model& model) {
    Session session = test::new_session(model);
    std::vector<float> all;
    test::require_ok(session.prefill(tokens));
    keep(all, session);
    test::require_ok(session.step(7));
    keep(all, session);
    test::require_ok(session.truncate(900));  // where rows lie in the file
    test::require_ok(session.step(7));
    keep(all, session);
    if (session.events().empty()) all.clear();  // it had room for everything
    return all;
  };
  Session session = test::new_session(one);
  std::vector<float> expected;
  test::require_ok(session.prefill(tokens));
  keep(expected, session);
  test::require_ok(session.step(7));
  keep(expected, session);
  test::require_ok(session.truncate(900));
  test::require_ok(session.step(7));
  keep(expected, session);

  const test::Settings several = with(settings, {{"devices", "cpu:0,cpu:1,cpu:2"},
                                                 {"placement.layers", "cpu:0=*"},
                                                 {"placement.experts", "cpu:0=*"},
                                                 {"placement.embed", "cpu:0"},
                                                 {"placement.head", "cpu:0"},
                                                 {"kv.page_tokens", "64"},
                                                 {"kv.tiers", "device,file"}});
  const std::vector<int64_t> beside = bytes_beside_cache(path, several);
  // Of a cache of which a sixth, a third and half would lie on the devices, each holds less.
  const auto budgets = [&](int64_t percent_0, int64_t percent_1, int64_t percent_2) {
    return with(several, {{"placement.kv", "home=512,cpu:1=1024,cpu:2=*"},
                          {"budget.cpu:0", std::to_string(beside[0] + kv * percent_0 / 100)},
                          {"budget.cpu:1", std::to_string(beside[1] + kv * percent_1 / 100)},
                          {"budget.cpu:2", std::to_string(beside[2] + kv * percent_2 / 100)}});
  };
  const test::Settings spread = budgets(13, 20, 12);
  const Model by_file = test::load_model(path, spread);
  CHECK(by_file.plan().by_ladder);
  check_same(expected, text(by_file));
  check_ledger(by_file);

  // Rewritten pages have other bits, and the text goes on.
  const Model smaller = test::load_model(
      path,
      with(budgets(15, 26, 36),
           {{"kv.tiers", "device"}, {"kv.ladder", "requantise"}, {"kv.ladder_type", "q4_0"}}));
  CHECK(smaller.plan().by_ladder);
  Session squeezed = test::new_session(smaller);
  test::require_ok(squeezed.prefill(tokens));
  REQUIRE_FALSE(squeezed.events().empty());
  CHECK(squeezed.events().back().kind == "requantised");
  check_ledger(smaller);
}

TEST_CASE("placement.kv is refused by name", "[kv_spread]") {
  auto engine = Engine::create(test::config_of({{"devices", "cpu:0,cpu:1"}}));
  REQUIRE(engine.ok());
  const struct {
    const char *value, *says;
  } cases[] = {
      {"cpu:0", "must be device=tokens"},         {"cpu:0=-5", "must be device=tokens"},
      {"cpu:0=0", "must be device=tokens"},       {"=512", "must be device=tokens"},
      {"home=*,cpu:1=512", "stands behind"},      {"home=512,cpu:7=*", "has no device"},
      {"home=500,cpu:1=*", "no multiple of 512"}, {"home=512,cpu:1=99999999999", "device=tokens"},
  };
  for (const auto& c : cases) {
    Config config = test::config_of({{"devices", "cpu:0,cpu:1"}});
    Status status = config.set("placement.kv", c.value);
    if (status.ok())
      status = engine->plan(test::test_data("models/tiny-v3"), config).status().clone();
    INFO(c.value << ": " << status.message());
    CHECK(status.code() == Code::kConfig);
    CHECK(status.key() == "placement.kv");
    CHECK(status.message().find(c.says) != std::string_view::npos);
  }
}

TEST_CASE("a simulated card gives its cache to another one", "[kv_spread][simulation]") {
  // 150,000 tokens of V2-Lite in 16 bits are 4.3 GiB; all layers are pinned to a card with 3 left.
  auto machine = MachineDescription::parse(
      R"({"devices": [{"name": "cpu", "bytes": "64G"},
                      {"name": "cuda:0", "kind": "cuda", "bytes": "24G"},
                      {"name": "cuda:1", "kind": "cuda", "bytes": "8G"}]})");
  REQUIRE(machine.ok());
  const Config config = test::config_of({{"weights.type", "q8_0"},
                                         {"context.max", "150000"},
                                         {"prefill.chunk", "2048"},
                                         {"placement.layers", "cuda:0=*"},
                                         {"placement.experts", "cuda:0=*"},
                                         {"budget.cuda:0", "19G"}});
  auto engine = Engine::simulate(*machine, config);
  REQUIRE(engine.ok());
  auto plan = engine->plan(std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2-lite.json");
  REQUIRE(plan.ok());
  INFO(plan->describe());
  REQUIRE(plan->feasible);
  REQUIRE_FALSE(plan->placement.kv.empty());
  auto model = Model::load(*engine, *plan);
  INFO(model.status().message());
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  test::require_ok(session.prefill(some_tokens(149000, model->config().vocab_size)));
  const double before = engine->seconds(), guest = engine->busy_seconds(2);
  test::require_ok(session.step(1));
  CHECK(engine->busy_seconds(2) > guest);  // attention was there
  CHECK(engine->seconds() - before == Approx(1 / plan->speed.decode_last).epsilon(0.02));
  test::require_ok(session.reserve(150000));
  const MemorySnapshot now = engine->memory();
  for (int d = 0; d < 3; ++d) {
    const DeviceMemory& memory = now.devices[static_cast<size_t>(d)];
    INFO(memory.name);
    CHECK(memory.bytes_peak == plan->devices[static_cast<size_t>(d)].peak_bytes());
    CHECK(memory.bytes_peak <= memory.budget_bytes);
  }
}

// Cold rows of a card on the host: attended there in latent form, or streamed through the card,
// whichever the machine's rates say is faster; and a session takes as long as was predicted.
TEST_CASE("rows that a card cannot hold are attended on the host or streamed, as is faster",
          "[kv_spread][simulation]") {
  struct Case {
    const char *cpu, *link;  // attention on the CPU, bytes of the link, per second
    bool streamed;
  };
  for (const Case& c : {Case{"4e12", "3e9", false}, Case{"2e10", "50e9", true}}) {
    auto machine = MachineDescription::parse(
        std::string(R"({"devices": [{"name": "cpu", "bytes": "64G", "attention_flops_per_s": )") +
        c.cpu + R"(, "read_bytes_per_s": 200e9},
                        {"name": "cuda:0", "kind": "cuda", "bytes": "24G"}],
            "links": [{"from": "cpu", "to": "cuda:0", "bytes_per_s": )" +
        c.link + "}]}");
    INFO(machine.status().message());
    REQUIRE(machine.ok());
    const auto plan_with = [&](const test::Settings& more) {
      auto engine =
          Engine::simulate(*machine, test::config_of(with({{"weights.type", "q8_0"},
                                                           {"context.max", "150000"},
                                                           {"prefill.chunk", "2048"},
                                                           {"placement.layers", "cuda:0=*"},
                                                           {"placement.experts", "cuda:0=*"},
                                                           {"placement.embed", "cuda:0"},
                                                           {"placement.head", "cuda:0"},
                                                           {"budget.cuda:0", "19G"}},
                                                          more)));
      REQUIRE(engine.ok());
      auto plan = engine->plan(std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2-lite.json");
      INFO(plan.status().message());
      REQUIRE(plan.ok());
      return std::pair(std::move(*engine), std::move(*plan));
    };
    const auto [engine, plan] = plan_with({{"kv.tiers", "device,host"}});
    INFO(plan.describe());
    REQUIRE(plan.feasible);
    CHECK(plan.placement.kv.empty() == c.streamed);
    CHECK(plan.by_ladder == c.streamed);
    CHECK(std::any_of(plan.remarks.begin(), plan.remarks.end(), [&](const std::string& remark) {
      return remark.find(c.streamed ? "from the host: streamed"
                                    : "from the host: attended there") != std::string::npos;
    }));
    // Without the host tier there is one way, by hand there is the other: what was chosen is
    // faster.
    const double there = plan_with({}).second.speed.decode_last;
    const double here = plan_with({{"kv.tiers", "device,host"}, {"placement.kv", "home=*"}})
                            .second.speed.decode_last;
    CHECK(plan.speed.decode_last == std::max(there, here));
    CHECK(std::min(there, here) < std::max(there, here));

    auto model = Model::load(engine, plan);
    INFO(model.status().message());
    REQUIRE(model.ok());
    Session session = test::new_session(*model);
    test::require_ok(session.prefill(some_tokens(149998, model->config().vocab_size)));
    CHECK((session.cache().bytes_in(KvTier::kHost) > 0) == c.streamed);
    test::require_ok(session.step(1));
    const double before = engine.seconds();
    test::require_ok(session.step(1));
    CHECK(engine.seconds() - before == Approx(1 / plan.speed.decode_last).epsilon(0.05));
  }
}

// Coder-V2 236B: attention on one of two cards, experts on the host.  A step at the end of a text,
// with rows of the cache where `rows` says.
struct StepSeconds {
  double step, home, guest;
};
StepSeconds step_seconds(int64_t n_tokens, const char* rows, int64_t section_rows) {
  auto machine = MachineDescription::parse(
      R"({"devices": [{"name": "cpu", "bytes": "256G", "like": "ddr5-8ch"},
                      {"name": "cuda:0", "kind": "cuda", "like": "rtx-4090"},
                      {"name": "cuda:1", "kind": "cuda", "like": "rtx-4090"}]})");
  REQUIRE(machine.ok());
  const Config config = test::config_of({{"weights.type", "q4_k"},
                                         {"context.max", std::to_string(n_tokens)},
                                         {"prefill.chunk", "4096"},
                                         {"experts.cache", "0"},
                                         {"placement.layers", "cuda:0=*"},
                                         {"placement.experts", "cpu=*"},
                                         {"placement.embed", "cpu"},
                                         {"placement.head", "cuda:0"},
                                         {"placement.kv", rows}});
  auto engine = Engine::simulate(*machine, config);
  REQUIRE(engine.ok());
  auto plan = engine->plan(std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2.json");
  REQUIRE(plan.ok());
  INFO(plan->describe());
  REQUIRE(plan->feasible);
  auto model = Model::load(*engine, *plan);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  session.state().section_rows = section_rows;
  test::require_ok(session.prefill(some_tokens(n_tokens - 10, model->config().vocab_size)));
  const StepSeconds before{engine->seconds(), engine->busy_seconds(1), engine->busy_seconds(2)};
  test::require_ok(session.step(1));
  const StepSeconds s{engine->seconds() - before.step, engine->busy_seconds(1) - before.home,
                      engine->busy_seconds(2) - before.guest};
  if (section_rows == nn::kSectionRows)
    CHECK(s.step == Approx(1 / plan->speed.decode_last).epsilon(0.01));
  return s;
}

// At 160 K tokens: rows on one card, or on both, one after the other and side by side.
TEST_CASE("rows on two simulated cards are attended at once", "[kv_spread][simulation]") {
  const StepSeconds alone = step_seconds(163840, "home=*", nn::kSectionRows);
  const StepSeconds after = step_seconds(163840, "home=98304,cuda:1=*", int64_t{1} << 30);
  const StepSeconds beside = step_seconds(163840, "home=98304,cuda:1=*", nn::kSectionRows);
  INFO("a step with all rows at home " << alone.step * 1e3 << " ms; one after the other "
                                       << after.step * 1e3 << " ms; side by side "
                                       << beside.step * 1e3 << " ms, of which the guest works "
                                       << beside.guest * 1e3 << " ms");
  // More than half of what the guest does is hidden, and it was worth to send it there.
  CHECK(beside.guest > 5e-3);
  CHECK(beside.step < after.step - 0.5 * beside.guest);
  CHECK(beside.step < alone.step - 0.3 * beside.guest);
}

// What the length of a section is: shorter ones let a holder of few rows begin earlier, and cost
// every long text operations on its own card.
TEST_CASE("shorter sections cost one card more than they bring two",
          "[kv_spread][simulation][slow]") {
  std::string table;
  double alone_long[2], beside_long[2];
  for (const auto& [n_tokens, rows] :
       {std::pair<int64_t, const char*>{40960, "home=24576,cuda:1=*"},
        std::pair<int64_t, const char*>{163840, "home=98304,cuda:1=*"}})
    for (const int64_t section_rows : {nn::kSectionRows, int64_t{8192}, int64_t{2048}}) {
      const StepSeconds alone = step_seconds(n_tokens, "home=*", section_rows);
      const StepSeconds beside = step_seconds(n_tokens, rows, section_rows);
      table += std::to_string(n_tokens) + " tokens, sections of " + std::to_string(section_rows) +
               ": all rows at home " + std::to_string(alone.step * 1e3) + " ms, on two cards " +
               std::to_string(beside.step * 1e3) + " ms\n";
      if (n_tokens == 163840 && section_rows >= 8192) {
        alone_long[section_rows == 8192] = alone.step;
        beside_long[section_rows == 8192] = beside.step;
      }
    }
  INFO(table);
  // At the length at which rows have to be on two cards shorter sections win nothing there, and
  // lose on one.
  CHECK(alone_long[1] > 1.005 * alone_long[0]);
  CHECK(beside_long[1] > 0.99 * beside_long[0]);
}

}  // namespace
}  // namespace fathom
