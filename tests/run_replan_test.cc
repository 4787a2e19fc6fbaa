// A loaded model and its sessions go to another placement: the same bits afterwards, and everything
// as before when it fails.
#include <catch2/catch.hpp>

#include <algorithm>
#include <filesystem>

#include "lib/run/engine_state.h"
#include "lib/run/forwarding_backend.h"
#include "support/spill.h"

namespace fathom {
namespace {

const std::string kTrained = FATHOM_EXAMPLE_MODEL;

test::Settings with(test::Settings settings, const test::Settings& more) {
  settings.insert(settings.end(), more.begin(), more.end());
  return settings;
}

using test::some_tokens;

Session start(const Model& model, int64_t n = 70) {
  Session session = test::new_session(model);
  test::require_ok(session.prefill(some_tokens(n, model.config().vocab_size)));
  return session;
}

// The logits that are there, and those of a few steps.
std::vector<float> go_on(Session& session, int32_t first = 3) {
  std::vector<float> all(session.logits().begin(), session.logits().end());
  REQUIRE_FALSE(all.empty());
  for (int32_t i = 0; i < 3; ++i) {
    test::require_ok(session.step(first + i));
    all.insert(all.end(), session.logits().begin(), session.logits().end());
  }
  return all;
}

void check_same(const std::vector<float>& expected, const std::vector<float>& got) {
  CHECK(test::first_bit_difference(expected, got).index == -1);
}

// Weights are what the plan says, and every device keeps its budget.
void check_ledger(const Model& model) {
  const MemorySnapshot now = model.engine().memory();
  for (int d = 0; d < static_cast<int>(now.devices.size()); ++d) {
    const PlanDevice& device = model.plan().devices[static_cast<size_t>(d)];
    INFO(device.name);
    CHECK(now.devices[static_cast<size_t>(d)].bytes_now <=
          now.devices[static_cast<size_t>(d)].budget_bytes);
    for (Purpose purpose : {Purpose::kWeights, Purpose::kExperts, Purpose::kActivations,
                            Purpose::kWorkspace, Purpose::kKv}) {
      INFO(purpose_name(purpose));
      if (purpose == Purpose::kKv)
        CHECK(now.item(d, purpose).bytes_now <= device.planned(purpose));
      else
        CHECK(now.item(d, purpose).bytes_now == device.planned(purpose));
    }
  }
}

std::vector<int64_t> bytes_of(const Engine& engine) {
  std::vector<int64_t> bytes;
  for (const MemoryItem& item : engine.memory().items) bytes.push_back(item.bytes_now);
  return bytes;
}

TEST_CASE("a model goes from placement to placement with the same bits", "[replan]") {
  const test::Settings pins[] = {
      {{"placement.layers", "cpu:0=*"}},
      {{"placement.layers", "cpu:1=*"}, {"placement.experts", "cpu:2=*"}},
      {{"placement.layers", "cpu:0=0,cpu:1=1,cpu:2=*"}},
      {{"placement.layers", "cpu:1=*"}, {"placement.experts", "cpu:0=*:0-1,cpu:1=*:2,cpu:2=*:3"}},
      {{"placement.layers", "cpu:2=*"}, {"placement.embed", "cpu:0"}, {"placement.head", "cpu:1"}},
      {{"placement.layers", "cpu:0=*"}, {"placement.experts", "cpu:1=*"}, {"experts.cache", "8M"}},
      {},
  };
  for (const char* name : {"models/tiny-v2", "models/tiny-v2-lite-sharded", "models/tiny-v3-fp8",
                           "gguf/tiny-v3.new.BF16.gguf", "quant/quant.Q4_K_M.gguf"}) {
    const std::string path = test::test_data(name);
    const test::Settings common{
        {"context.max", "120"}, {"prefill.chunk", "33"}, {"threads", "1"}, {"sessions.max", "2"}};
    const Model one = test::load_model(path, common);
    const test::Settings three = with(common, {{"devices", "cpu:0,cpu:1,cpu:2"}});
    Model model = test::load_model(path, three);
    Session a = start(model), b = start(model, 40), other_a = start(one), other_b = start(one, 40);
    Session* const sessions[] = {&a, &b};
    for (const test::Settings& pin : pins) {
      if (pin.size() > 1 && pin[1].second.find(":2,") != std::string::npos &&
          one.config().n_routed_experts != 4)
        continue;
      INFO(name << ", " << (pin.empty() ? "no pins" : pin[0].second));
      const Status moved = model.replan(sessions, test::config_of(with(three, pin)));
      INFO(moved.message());
      REQUIRE(moved.ok());
      check_ledger(model);
      check_same(go_on(other_a), go_on(a));
      check_same(go_on(other_b), go_on(b));
      check_ledger(model);
      REQUIRE(test::last_logits(model, some_tokens(20, one.config().vocab_size)) ==
              test::last_logits(one, some_tokens(20, one.config().vocab_size)));
      if (pin.empty()) continue;
      const int home = pin[0].second[4] - '0';
      CHECK(model.plan().placement.layers[0].device == home);
    }
  }
}

TEST_CASE("a refusal names the budget that binds, also below what is held", "[replan]") {
  run::Ledger ledger({{"cpu:0", 100, true}, {"cpu:1", 100, true}}, 150, {});
  const auto refused = [&](int device) {
    const Status status = ledger.acquire(device, Purpose::kKv, 70);
    CHECK(status.code() == Code::kBudget);
    return std::string(status.message());
  };
  test::require_ok(ledger.acquire(0, Purpose::kKv, 90));
  CHECK(refused(0) == "cpu:0: kv needs 70 bytes more, 10 of the budget of 100 bytes are free");
  CHECK(refused(1) == "cpu:1: kv needs 70 bytes more, 60 of the host budget of 150 bytes are free");
  ledger.set_budget(0, 40);
  const std::string over = "cpu:0: kv needs 70 bytes more, 0 of the budget of 40 bytes are free";
  CHECK(refused(0) == over);
  const run::Ledger::Exchange exchange(ledger);
  CHECK(refused(0) == over);
}

TEST_CASE("a device whose budget was lowered hands parts to others", "[replan]") {
  const test::Settings common{{"context.max", "600"}, {"prefill.chunk", "32"}, {"threads", "1"}};
  const Model one = test::load_model(kTrained, common);
  const int64_t whole = one.plan().devices[0].peak_bytes();
  Model model = test::load_model(
      kTrained, with(common, {{"devices", "cpu:0,cpu:1,cpu:2"}, {"experts.cache", "0"}}));
  Session session = start(model, 400), other = start(one, 400);
  Session* const sessions[] = {&session};
  Engine engine = model.engine();
  // A device among several has a thread of its own, which one device alone has not.
  const int64_t thread = engine.device(0).runtime_bytes() - one.engine().device(0).runtime_bytes();
  // Each device in turn keeps next to nothing, the others enough for the rest.
  for (const int small : {2, 1, 0}) {
    INFO("device " << small << " of " << whole << " bytes in all");
    for (int d = 0; d < 3; ++d)
      test::require_ok(engine.set_budget(d, thread + (d == small ? whole / 5 : whole * 9 / 10)));
    const Status moved = model.replan(sessions, model.plan().config);
    INFO(moved.message());
    REQUIRE(moved.ok());
    check_ledger(model);
    check_same(go_on(other), go_on(session));
  }
  CHECK(session.n_tokens() == 409);
  CHECK(session.times().prefill_tokens == 400);

  // Too little in all: refused with the numbers and what would help, and nothing has changed.
  const auto before = bytes_of(engine);
  const std::string plan = model.plan().to_json();
  for (int d = 0; d < 3; ++d) test::require_ok(engine.set_budget(d, whole / 5));
  const Status refused = model.replan(sessions, model.plan().config);
  CHECK(refused.code() == Code::kBudget);
  CHECK(refused.message().find("budget") != std::string_view::npos);
  CHECK(bytes_of(engine) == before);
  CHECK(model.plan().to_json() == plan);
  for (int d = 0; d < 3; ++d) test::require_ok(engine.set_budget(d, whole));
  check_same(go_on(other), go_on(session));
}

TEST_CASE("all sessions of a model move, each once", "[replan]") {
  const std::string path = test::test_data("models/tiny-v3");
  const test::Settings settings{{"context.max", "100"}, {"devices", "cpu:0,cpu:1"}};
  Model model = test::load_model(path, settings), another = test::load_model(path, settings);
  Session a = start(model), b = start(model), stranger = start(another);
  const Config config = model.plan().config;
  const auto code = [&](std::vector<Session*> sessions) {
    return model.replan(sessions, config).code();
  };
  CHECK(code({&a}) == Code::kState);
  CHECK(code({}) == Code::kState);
  CHECK(code({&a, &a}) == Code::kInvalidArgument);
  CHECK(code({&a, nullptr}) == Code::kInvalidArgument);
  CHECK(code({&a, &stranger}) == Code::kMismatch);
  CHECK(code({&a, &b}) == Code::kOk);
  Config elsewhere = config;
  elsewhere.devices = "cpu:0";
  Session* const both[] = {&a, &b};
  CHECK(model.replan(both, elsewhere).code() == Code::kConfig);
}

TEST_CASE("a move that fails anywhere leaves everything as it was", "[replan]") {
  test::TemporaryFolder folder("replan");
  const std::string path = folder.path() + "/model.gguf";
  std::filesystem::copy_file(test::test_data("quant/quant.Q8_0.gguf"), path);
  const test::Settings common{{"context.max", "120"}, {"prefill.chunk", "16"}, {"threads", "1"}};
  const Model one = test::load_model(path, common);
  const test::Settings two = with(common, {{"devices", "cpu:0,cpu:1"}});
  int64_t left = -1;  // growths until one is refused; negative: none is
  HostHooks hooks;
  hooks.memory = [&](int, Purpose, int64_t delta, int64_t) {
    return delta < 0 || left < 0 || left-- > 0;
  };
  auto engine = Engine::create(test::config_of(two), hooks);
  REQUIRE(engine.ok());
  auto plan = engine->plan(path, test::config_of(with(two, {{"placement.layers", "cpu:0=*"}})));
  REQUIRE(plan.ok());
  auto model = Model::load(*engine, *plan);
  REQUIRE(model.ok());
  Session session = start(*model), other = start(one);
  Session* const sessions[] = {&session};
  const Config there = test::config_of(
      with(two, {{"placement.layers", "cpu:1=*,cpu:0=0"}, {"placement.experts", "cpu:0=*"}}));
  const auto check_unchanged = [&](const std::string& json, const std::vector<int64_t>& bytes) {
    CHECK(model->plan().to_json() == json);
    CHECK(bytes_of(*engine) == bytes);
    check_same(go_on(other), go_on(session));
    test::require_ok(session.truncate(70));
    test::require_ok(other.truncate(70));
    test::require_ok(session.step(1));
    test::require_ok(other.step(1));
  };
  const std::string json = model->plan().to_json();
  test::require_ok(session.step(1));
  test::require_ok(other.step(1));

  SECTION("memory is refused at any moment") {
    const auto bytes = bytes_of(*engine);
    int failed = 0;
    for (int64_t n = 0;; ++n) {
      INFO("growth " << n);
      left = n;
      const Status status = model->replan(sessions, there);
      const bool used_up = left <= 0;
      left = -1;
      if (status.ok()) break;
      REQUIRE(used_up);
      CHECK(status.code() == Code::kCallback);
      ++failed;
      check_unchanged(json, bytes);
      REQUIRE(n < 100);
    }
    CHECK(failed > 4);
    check_ledger(*model);
    check_same(go_on(other), go_on(session));
  }
  SECTION("the host cancels") {
    const auto bytes = bytes_of(*engine);
    RunOptions options;
    options.progress = [](ProgressPhase, int64_t done, int64_t total) { return done < total / 2; };
    CHECK(model->replan(sessions, there, options).code() == Code::kCancelled);
    check_unchanged(json, bytes);
  }
  SECTION("the file has changed") {
    const auto bytes = bytes_of(*engine);
    std::filesystem::copy_file(test::test_data("quant/quant.Q4_K_M.gguf"), path,
                               std::filesystem::copy_options::overwrite_existing);
    CHECK(model->replan(sessions, there).code() == Code::kMismatch);
    std::filesystem::remove(path);
    CHECK(model->replan(sessions, there).code() == Code::kNotFound);
    check_unchanged(json, bytes);
  }
  SECTION("there is no folder for the sessions' rows") {
    const auto bytes = bytes_of(*engine);
    Config config = there;
    config.kv_spill_folder = folder.path() + "/none";
    // The sessions are saved where the plan in force says.
    CHECK(model->replan(sessions, config).ok());
    CHECK(model->replan(sessions, there).code() == Code::kNotFound);
    check_same(go_on(other), go_on(session));
  }
}

// ---- a lost device ----

class LosableBackend final : public run::ForwardingBackend {
 public:
  LosableBackend(std::unique_ptr<Backend> real, const bool& lost)
      : ForwardingBackend(std::move(real)), lost_(lost) {}
  bool host_accessible() const noexcept override { return false; }  // as a card
  Status upload(void* device, const void* host, int64_t bytes) noexcept override {
    return lost_ ? gone() : real_->upload(device, host, bytes);
  }
  Status download(void* host, const void* device, int64_t bytes) noexcept override {
    return lost_ ? gone() : real_->download(host, device, bytes);
  }
  Status sync(const OpContext& op) noexcept override { return lost_ ? gone() : real_->sync(op); }

 private:
  static Status gone() { return Status(Code::kDevice, "the device is gone").on_device(1); }
  const bool& lost_;
};

// The engine of `config`, whose device 1 is lost when `lost` says so; after `left` growths one is
// refused, none where that is negative.
Engine losable_engine(const Config& config, const bool& lost, int64_t& left) {
  auto plain = Engine::create(config);
  REQUIRE(plain.ok());
  std::vector<std::unique_ptr<Backend>> devices;
  std::vector<run::LedgerDevice> accounts;
  for (int d = 0; d < plain->n_devices(); ++d) {
    auto backend = make_cpu_backend({.name = std::string(plain->device(d).name()), .threads = 1});
    REQUIRE(backend.ok());
    std::unique_ptr<Backend> device = std::move(backend).value();
    if (d == 1) device = std::make_unique<LosableBackend>(std::move(device), lost);
    devices.push_back(std::move(device));
    accounts.push_back({std::string(plain->device(d).name()), int64_t{1} << 30, d != 1});
  }
  HostHooks hooks;
  hooks.memory = [&left](int, Purpose, int64_t delta, int64_t) {
    return delta < 0 || left < 0 || left-- > 0;
  };
  auto state =
      std::make_shared<run::EngineState>(config, std::move(hooks), std::move(devices),
                                         plain->machine(), std::move(accounts), int64_t{1} << 32);
  test::require_ok(state->start());
  return Engine(std::move(state));
}

TEST_CASE("after the loss of a device sessions go on from their tokens", "[replan]") {
  const test::Settings common{{"context.max", "200"}, {"prefill.chunk", "32"}, {"threads", "1"}};
  const std::string path = test::test_data("models/tiny-v3");
  const Model one = test::load_model(path, common);
  bool lost = false;
  int64_t left = -1;
  const Config config = test::config_of(
      with(common, {{"devices", "cpu:0,cpu:1"}, {"placement.layers", "cpu:1=1,cpu:0=*"}}));
  Engine engine = losable_engine(config, lost, left);
  auto plan = engine.plan(path, config);
  REQUIRE(plan.ok());
  INFO(plan->describe());
  auto loaded = Model::load(engine, *plan);
  INFO(loaded.status().message());
  REQUIRE(loaded.ok());
  Model model = std::move(loaded).value();
  Session session = start(model, 100);
  test::require_ok(session.step(5));
  const std::vector<int32_t> tokens(session.tokens().begin(), session.tokens().end());
  Session* const sessions[] = {&session};

  lost = true;
  CHECK(session.step(6).code() == Code::kDevice);
  CHECK(session.n_tokens() == 101);
  test::require_ok(engine.set_budget(1, 0));
  Config free = config;
  free.placement_layers = "auto";

  // Whatever fails and whenever: the tokens stay, and the session says what happened.
  int failed = 0;
  for (;; ++failed) {
    INFO("growth " << failed);
    left = failed;
    const Status status = model.replan(sessions, free);
    left = -1;
    if (status.ok()) break;
    REQUIRE(failed < 100);
    CHECK(status.code() == Code::kCallback);
    CHECK(model.plan().placement.uses(1));
    CHECK(session.n_tokens() == 101);
    CHECK(std::equal(tokens.begin(), tokens.end(), session.tokens().begin()));
    CHECK(session.step(6).code() == Code::kDevice);
    CHECK(session.prefill(std::vector<int32_t>(90, 1)).code() == Code::kDevice);
    CHECK(session.forecast().n_tokens == 101);
    CHECK(session.save("/var/tmp/fathom_never_written").code() == Code::kDevice);
  }
  CHECK(failed > 4);
  CHECK_FALSE(model.plan().placement.uses(1));
  CHECK(engine.memory().item(1, Purpose::kWeights).bytes_now == 0);
  CHECK(engine.memory().item(1, Purpose::kKv).bytes_now == 0);
  CHECK(std::equal(tokens.begin(), tokens.end(), session.tokens().begin()));
  // The bits of a session that reads these tokens as a prompt.
  Session other = test::new_session(one);
  test::require_ok(other.prefill(tokens));
  check_same(go_on(other), go_on(session));
}

}  // namespace
}  // namespace fathom
