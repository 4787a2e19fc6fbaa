// The whole library with layers on a CUDA device: the backend and its kernels come through the
// plug-in, over the emulated device.
#include <algorithm>
#include <catch2/catch.hpp>
#include <optional>
#include <string>

#include "cuda_test_plugin.h"
#include "support/golden.h"
#include "support/greedy.h"
#include "support/loaded_model.h"

using namespace fathom;
using Catch::Contains;
using test::Golden;

namespace {

test::Settings settings(const std::string& devices, test::Settings more = {}) {
  more.emplace_back("devices", devices);
  more.emplace_back("cuda.plugin", cuda_test::plugin_path());
  // All layers with their experts on the first device, whatever the solver would do.
  const std::string everything = devices.substr(0, devices.find(',')) + "=*";
  more.emplace_back("placement.layers", everything);
  more.emplace_back("placement.experts", everything);
  more.emplace_back("budget." + devices.substr(0, devices.find(',')), "1G");
  more.emplace_back("budget.cpu", "400M");
  return more;
}

Status create(const test::Settings& more) {
  return Engine::create(test::config_of(more)).status().clone();
}

}  // namespace

TEST_CASE("a device that the plug-in cannot make is refused with the vendor's words",
          "[cuda][plugin]") {
  const test::Settings plugin = {
      {"cuda.plugin", std::string(FATHOM_TEST_PLUGINS) + "/emulated.so"}};
  test::Settings missing = plugin, none = plugin, old = plugin;
  missing.emplace_back("devices", "cuda:7,cpu");
  none.emplace_back("devices", "cuda:8,cpu");
  old.emplace_back("devices", "cuda:6,cpu");
  const Status no_library = create(missing), no_gpu = create(none), too_old = create(old);
  CHECK(too_old.code() == Code::kUnsupported);
  CHECK_THAT(std::string(too_old.message()), Contains("sm_70"));
  CHECK(no_library.code() == Code::kDevice);
  CHECK_THAT(std::string(no_library.message()),
             Contains("libcublasLt.so.0") && Contains("cannot open shared object file"));
  CHECK(no_gpu.code() == Code::kNotFound);
  CHECK_THAT(std::string(no_gpu.message()), Contains("this machine has 2 GPUs"));
  missing.emplace_back("devices.missing", "skip");
  CHECK(create(missing).ok());
}

TEST_CASE("golden models with layers on a CUDA device, exact numerics", "[cuda][plugin][golden]") {
  for (const char* name : {"tiny-v2", "tiny-v2-lite", "tiny-v3", "tiny-v3-fp8"}) {
    const std::string folder = test::test_data(std::string("models/") + name);
    const Model model = test::load_model(folder, settings("cuda:0,cpu", {{"numerics", "exact"}}));
    REQUIRE(model.engine().device(0).kind() == DeviceKind::kCuda);
    const std::string what = model.engine().device(0).describe();
    INFO(what);
    REQUIRE((what.find("emulated") == what.npos) == cuda_test::real_gpu());
    REQUIRE(model.plan().devices[0].n_layers >= 1);
    const Golden golden = Golden::load(folder + "/golden.safetensors");
    for (const char* prompt : {"p1", "p7", "p64", "p300"}) {
      if (!cuda_test::real_gpu() && std::string(prompt).size() > 2) continue;  // slow
      if (!golden.has(std::string(prompt) + ".tokens")) continue;
      const auto tokens = golden.i32(std::string(prompt) + ".tokens");
      const auto diff = test::max_abs_diff(golden.f32(std::string(prompt) + ".logits"),
                                           test::all_logits(model, tokens));
      INFO(name << " " << prompt << ": " << test::describe(diff));
      CHECK(diff.value <= 2e-4);
    }
  }
}

TEST_CASE("greedy texts on a CUDA device are the reference's", "[cuda][plugin][golden]") {
  for (const char* name : {"tiny-v2-lite", "tiny-v2", "tiny-v3", "tiny-v3-fp8"}) {
    if (!cuda_test::real_gpu() && std::string(name) != "tiny-v2-lite") continue;  // slow
    const std::string folder = test::test_data(std::string("models/") + name);
    const Model model = test::load_model(folder, settings("cuda:0,cpu", {{"numerics", "exact"}}));
    const Golden golden = Golden::load(folder + "/golden.safetensors");
    for (const char* greedy : {"g7", "g64", "g300"}) {
      if (!golden.has(std::string(greedy) + ".tokens")) continue;
      INFO(name);
      test::check_greedy(model, golden, greedy, 1e-3f, cuda_test::real_gpu() ? 1 << 20 : 6);
      if (!cuda_test::real_gpu()) break;
    }
  }
}

TEST_CASE("fast numerics on a CUDA device stay close to the reference", "[cuda][plugin][golden]") {
  // The bound and its reason: golden_test.cc.
  for (const char* name : {"tiny-v2-lite", "tiny-v2", "tiny-v3", "tiny-v3-fp8"}) {
    const std::string folder = test::test_data(std::string("models/") + name);
    const Model model = test::load_model(folder, settings("cuda:0,cpu"));
    const Golden golden = Golden::load(folder + "/golden.safetensors");
    const std::string prompt = cuda_test::real_gpu() ? "p64" : "p7";
    const auto tokens = golden.i32(prompt + ".tokens");
    const auto expected = golden.f32(prompt + ".logits");
    const auto got = test::all_logits(model, tokens);
    const size_t vocab = expected.size() / tokens.size();
    double sum = 0;
    for (size_t t = 0; t < tokens.size(); ++t)
      sum += test::cosine(expected.subspan(t * vocab, vocab),
                          std::span(got).subspan(t * vocab, vocab));
    INFO(name << ": mean cosine " << sum / double(tokens.size()));
    CHECK(sum / double(tokens.size()) > 0.99);
  }
}

TEST_CASE("planned bytes are the ledger's with a CUDA device", "[cuda][plugin]") {
  const Model model = test::load_model(test::test_data("models/tiny-v2-lite"),
                                       settings("cuda:0,cpu", {{"context.max", "600"}}));
  const Golden golden = Golden::load(test::test_data("models/tiny-v2-lite/golden.safetensors"));
  {
    Session session = test::new_session(model);
    test::require_ok(session.reserve(600));
    test::require_ok(session.prefill(golden.i32("p64.tokens")));
    test::require_ok(session.step(3));
    const MemorySnapshot memory = model.engine().memory();
    for (int d = 0; d < 2; ++d)
      for (const Purpose purpose :
           {Purpose::kWeights, Purpose::kExperts, Purpose::kKv, Purpose::kActivations,
            Purpose::kWorkspace, Purpose::kRuntime}) {
        if (d == 1 && purpose == Purpose::kRuntime) continue;  // tables of sessions.max texts
        INFO(memory.devices[static_cast<size_t>(d)].name << " " << purpose_name(purpose));
        CHECK(memory.item(d, purpose).bytes_now == memory.item(d, purpose).bytes_planned);
      }
  }
}

TEST_CASE("a configuration may name GPUs alone: the host holds tables and computes nothing",
          "[cuda][plugin]") {
  const std::string folder = test::test_data("models/tiny-v2-lite");
  const auto logits_on = [&](const test::Settings& with) {
    test::Settings all = with;
    all.emplace_back("cuda.plugin", cuda_test::plugin_path());
    all.emplace_back("budget.cuda:0", "1G");
    all.emplace_back("context.max", "600");
    const Model model = test::load_model(folder, all);
    const Plan& plan = model.plan();
    REQUIRE(plan.devices.size() == 2);
    CHECK(plan.devices[1].kind == DeviceKind::kCpu);
    CHECK(plan.devices[1].n_layers == 0);
    CHECK(plan.placement.embed_device == 0);
    CHECK(plan.placement.head_device == 0);
    CHECK(plan.devices[1].planned(Purpose::kWeights) == 0);
    CHECK(plan.devices[1].planned(Purpose::kExperts) == 0);
    Session session = test::new_session(model);
    test::require_ok(session.reserve(600));
    test::require_ok(session.prefill(std::vector<int32_t>{3, 1, 4, 1, 5}));
    const MemorySnapshot memory = model.engine().memory();
    for (int d = 0; d < 2; ++d)
      for (int p = 0; p < kPurposeCount; ++p) {
        const auto purpose = static_cast<Purpose>(p);
        INFO(memory.devices[static_cast<size_t>(d)].name << " " << purpose_name(purpose));
        if (purpose != Purpose::kStaging)  // of loading
          CHECK(memory.item(d, purpose).bytes_now == memory.item(d, purpose).bytes_planned);
      }
    const auto logits = session.logits();
    return std::vector<float>(logits.begin(), logits.end());
  };
  const std::vector<float> alone = logits_on({{"devices", "cuda:0"}});
  CHECK(alone == logits_on({{"devices", "cuda:0,cpu"},
                            {"placement.layers", "cuda:0=*"},
                            {"placement.experts", "cuda:0=*"},
                            {"placement.embed", "cuda:0"},
                            {"placement.head", "cuda:0"},
                            {"budget.cpu", "400M"}}));
  // Several without a CPU: nothing comes to lie on the host, whether it fits or not.
  for (const char* budget : {"1G", "40M"}) {
    if (cuda_test::real_gpu()) break;  // which may be the only one
    const Engine engine =
        std::move(Engine::create(test::config_of({{"devices", "cuda:0,cuda:1"},
                                                  {"cuda.plugin", cuda_test::plugin_path()},
                                                  {"budget.cuda:0", budget},
                                                  {"budget.cuda:1", budget},
                                                  {"context.max", "600"}})))
            .value();
    const auto plan = engine.plan(folder);
    INFO(plan.status().message());
    REQUIRE(plan.ok());
    CHECK(plan->devices[2].n_layers == 0);
    CHECK(plan->devices[2].n_experts == 0);
    CHECK(plan->placement.embed_device < 2);
    CHECK(plan->placement.head_device < 2);
  }
  // The host is no device of this configuration.
  const Engine engine =
      std::move(Engine::create(test::config_of({{"devices", "cuda:0"},
                                                {"cuda.plugin", cuda_test::plugin_path()},
                                                {"budget.cuda:0", "1G"},
                                                {"placement.layers", "cpu=*"}})))
          .value();
  const auto pinned = engine.plan(folder);
  CHECK(pinned.status().code() == Code::kConfig);
  CHECK_THAT(std::string(pinned.status().message()), Contains("has no device \"cpu\""));
}

TEST_CASE("a device that cannot map memory into addresses gets chunks: the same text and bytes",
          "[cuda][plugin]") {
  if (cuda_test::real_gpu()) return;  // real drivers can
  const auto text_on = [](const std::string& device) {
    const Model model = test::load_model(test::test_data("models/tiny-v2-lite"),
                                         settings(device + ",cpu", {{"context.max", "600"},
                                                                    {"kv.page_tokens", "64"},
                                                                    {"kv.type", "q4_0"},
                                                                    {"prefill.chunk", "32"},
                                                                    {"kv.recent_16bit", "32"}}));
    Session session = test::new_session(model);
    const int64_t free_before = model.engine().device(0).memory().free_bytes;
    int64_t held = model.engine().memory().devices[0].bytes_now;
    test::require_ok(session.prefill(std::vector<int32_t>(150, 9)));
    // Pages that went cold were rewritten and gave back what they no longer need.
    CHECK(free_before - model.engine().device(0).memory().free_bytes ==
          model.engine().memory().devices[0].bytes_now - held);
    test::require_ok(session.step(4));
    const auto logits = session.logits();
    std::vector<float> all(logits.begin(), logits.end());
    test::require_ok(session.truncate(40));
    test::require_ok(session.step(5));
    all.insert(all.end(), session.logits().begin(), session.logits().end());
    CHECK(free_before - model.engine().device(0).memory().free_bytes ==
          model.engine().memory().devices[0].bytes_now - held);
    return all;
  };
  CHECK(text_on("cuda:10") == text_on("cuda:0"));
}

TEST_CASE(
    "generation brings the likeliest tokens of a device: the same text, and logits when asked",
    "[cuda][plugin]") {
  int64_t n_found = 0;
  HostHooks hooks;
  hooks.op = [&](const OpTime& op) { n_found += op.op == "top_k"; };
  const Result<Engine> engine =
      Engine::create(test::config_of(settings("cuda:0,cpu", {{"context.max", "600"}})), hooks);
  REQUIRE(engine.ok());
  const std::string folder = test::test_data("models/tiny-v2-lite");
  const Result<Model> model = Model::load(*engine, std::move(engine->plan(folder)).value());
  REQUIRE(model.ok());
  const std::vector<int32_t> prompt = {3, 1, 4, 1, 5};
  for (const SamplingOptions& sampling :
       {SamplingOptions{},
        SamplingOptions{.temperature = 0.9f, .top_k = 7, .top_p = 0.9f, .seed = 3},
        SamplingOptions{.temperature = 0.9f, .seed = 4}, SamplingOptions{.repeat_penalty = 1.2f}}) {
    Session session = test::new_session(*model), by_hand = test::new_session(*model);
    test::require_ok(session.prefill(prompt));
    test::require_ok(by_hand.prefill(prompt));
    n_found = 0;
    GenerateOptions options{.max_new_tokens = 5, .sampling = sampling, .stop_at_eos = false};
    bool asked = false;
    const auto result = session.generate(options, [&](const GeneratedToken& token) {
      // A host may look at the logits at any token.
      if (token.position == 7) asked = session.logits().size() > 0;
      return true;
    });
    INFO(result.status().message());
    REQUIRE(result.ok());
    CHECK(asked);
    Sampler sampler = std::move(Sampler::create(sampling)).value();
    CHECK(n_found == (sampler.n_deciding() > 0 ? 5 : 0));
    std::vector<int32_t> expected;
    for (int i = 0; i < 5; ++i) {
      expected.push_back(std::move(sampler.pick(by_hand.logits(), by_hand.tokens())).value());
      test::require_ok(by_hand.step(expected.back()));
    }
    CHECK(result->tokens == expected);
    const auto a = session.logits(), b = by_hand.logits();
    REQUIRE(a.size() == b.size());
    CHECK(std::equal(a.begin(), a.end(), b.begin()));
    // Going on by hand and again by generation.
    test::require_ok(session.step(2));
    test::require_ok(by_hand.step(2));
    CHECK(std::equal(session.logits().begin(), session.logits().end(), by_hand.logits().begin()));
  }
}

TEST_CASE("a launch that the device refuses is a status, and the session goes on",
          "[cuda][plugin][faults]") {
  if (cuda_test::real_gpu()) return;  // the emulated device fails where it is told to
  const Model model = test::load_model(test::test_data("models/tiny-v2-lite"),
                                       settings("cuda:4,cpu", {{"context.max", "600"}}));
  const Model other = test::load_model(test::test_data("models/tiny-v2-lite"),
                                       settings("cuda:0,cpu", {{"context.max", "600"}}));
  Session session = test::new_session(model), reference = test::new_session(other);
  Status refused;
  for (int32_t token = 1; token < 12; ++token) {
    Status status = session.step(token);
    if (!status.ok()) {
      CHECK(session.n_tokens() == token - 1);
      refused = std::move(status);
      test::require_ok(session.step(token));
    }
    test::require_ok(reference.step(token));
    const auto got = session.logits(), expected = reference.logits();
    CHECK(std::equal(got.begin(), got.end(), expected.begin(), expected.end()));
  }
  CHECK(refused.code() == Code::kDevice);
  CHECK_THAT(std::string(refused.message()),
             Contains("cuda:4: a kernel could not be started") && Contains("too many resources"));
}

TEST_CASE("a lost device is a status with the driver's text; the process and its CPUs go on",
          "[cuda][plugin][faults]") {
  if (cuda_test::real_gpu()) return;  // the emulated device is lost where it is told to
  const std::string folder = test::test_data("models/tiny-v2-lite");
  const Model on_cpu = test::load_model(folder, {{"context.max", "600"}});
  Session beside = test::new_session(on_cpu);
  test::require_ok(beside.prefill(std::vector<int32_t>{1, 2, 3}));
  {
    const Model model = test::load_model(folder, settings("cuda:5,cpu", {{"context.max", "600"}}));
    Session session = test::new_session(model);
    Status lost;
    int32_t token = 1;
    for (; token < 12 && lost.ok(); ++token) lost = session.step(token);
    INFO(lost.message());
    REQUIRE(lost.code() == Code::kDevice);
    CHECK_THAT(std::string(lost.message()),
               Contains("cuda:5: waiting for the device: unspecified launch failure"));
    CHECK(session.n_tokens() == token - 2);  // what was there before the call
    // It stays so, and says so; what needs no device works.
    CHECK(session.step(3).code() == Code::kDevice);
    CHECK(session.prefill(std::vector<int32_t>(20, 4)).code() == Code::kDevice);
    test::require_ok(session.truncate(1));
    CHECK(session.n_tokens() == 1);
    CHECK(model.engine().memory().devices[0].bytes_now > 0);
    test::require_ok(beside.step(4));
  }
  test::require_ok(beside.step(5));
  CHECK(beside.n_tokens() == 5);
}

TEST_CASE("out of device memory while the cache grows leaves a usable session",
          "[cuda][plugin][allocation]") {
  if (cuda_test::real_gpu()) return;  // the emulated device fails where it is told to
  const Model model = test::load_model(
      test::test_data("models/tiny-v2-lite"),
      settings("cuda:9,cpu",
               {{"context.max", "20000"}, {"kv.page_tokens", "16"}, {"kv.ladder", "none"}}));
  Session session = test::new_session(model);
  const std::vector<int32_t> tokens(16, 5);
  Status status;
  int64_t held = 0;
  for (int i = 0; i < 60 && status.ok(); ++i) {
    held = session.n_tokens();
    status = session.prefill(tokens);
  }
  INFO(status.message());
  REQUIRE(status.code() == Code::kMemory);
  CHECK_THAT(std::string(status.message()), Contains("out of memory"));
  CHECK(session.n_tokens() == held);
  // The failure was once; the session goes on where it was.
  test::require_ok(session.prefill(tokens));
  CHECK(session.n_tokens() == held + 16);
  test::require_ok(session.truncate(8));
  test::require_ok(session.step(7));
}

TEST_CASE("any growth on the device may be refused: the session goes on",
          "[cuda][plugin][allocation]") {
  // The n-th growth of device 0 fails once, for every n until all succeed.
  const std::string folder = test::test_data("models/tiny-v2-lite");
  const std::vector<int32_t> tokens(20, 7);
  for (int64_t n = 0;; ++n) {
    REQUIRE(n < 100);
    int64_t growths = 0;
    HostHooks hooks;
    hooks.memory = [&](int device, Purpose, int64_t delta, int64_t) {
      return device != 0 || delta <= 0 || growths++ != n;
    };
    // Without the ladder, which would lower the chunk and try again.
    const Config config = test::config_of(settings(
        "cuda:0,cpu", {{"kv.page_tokens", "16"}, {"context.max", "600"}, {"kv.ladder", "none"}}));
    Status status;
    // Whatever fails is tried again, and then succeeds.
    const auto twice = [&](auto&& make) {
      auto made = make();
      if (made.ok()) return made;
      status = made.status().clone();
      INFO(n << ": " << status.message());
      CHECK(status.code() == Code::kCallback);
      return make();
    };
    Result<Engine> engine = twice([&] { return Engine::create(config, hooks); });
    REQUIRE(engine.ok());
    const Result<Plan> plan = engine->plan(folder);
    REQUIRE(plan.ok());
    const Result<Model> model = twice([&] { return Model::load(*engine, *plan); });
    REQUIRE(model.ok());
    Result<Session> session = twice([&] { return Session::create(*model); });
    REQUIRE(session.ok());
    for (int pass = 0; pass < 2; ++pass) {
      Status done = session->prefill(tokens);
      if (!done.ok()) {
        CHECK(done.code() == Code::kCallback);
        CHECK(session->n_tokens() == pass * 20);
        status = std::move(done);
        test::require_ok(session->prefill(tokens));
      }
      CHECK(session->n_tokens() == (pass + 1) * 20);
    }
    if (growths <= n) break;
    CHECK_FALSE(status.ok());
  }
}

namespace {

// Somebody else on the same GPU, who holds all of its memory but a little.
class Neighbour {
 public:
  Neighbour() : device_(cuda_test::open_device(Numerics::kFast)), unit_(device_->granularity()) {
    const MemoryState memory = device_->memory();
    reserved_ = memory.total_bytes / unit_ * unit_;
    auto base = device_->reserve(reserved_);
    REQUIRE(base.ok());
    base_ = *base;
    // What the device keeps for itself is not in free_bytes but can be had.
    for (int64_t step = memory.free_bytes / unit_ * unit_; step >= unit_;)
      if (held_ + step > reserved_ || !device_->commit(base_, held_, step).ok())
        step = step / 2 / unit_ * unit_;
      else
        held_ += step;
    full_ = held_;
  }
  ~Neighbour() { device_->release(base_, reserved_); }
  // Leaves others `bytes` more than nothing.
  void leave(int64_t bytes) {
    const int64_t wanted = full_ - bytes / unit_ * unit_;
    if (wanted < held_) device_->decommit(base_, wanted, held_ - wanted);
    if (wanted > held_) REQUIRE(device_->commit(base_, held_, wanted - held_).ok());
    held_ = wanted;
  }

 private:
  const std::unique_ptr<Backend> device_;
  const int64_t unit_;
  void* base_ = nullptr;
  int64_t reserved_ = 0, held_ = 0, full_ = 0;
};

}  // namespace

TEST_CASE("the driver may refuse any allocation: nothing is sticky, the session goes on",
          "[cuda][plugin][allocation]") {
  const std::string folder = test::test_data("models/tiny-v2-lite");
  const std::vector<int32_t> tokens(20, 7);
  std::vector<int64_t> taken;  // by device 0, in order
  HostHooks hooks;
  hooks.memory = [&](int device, Purpose purpose, int64_t delta, int64_t) {
    if (device == 0 && delta > 0 && purpose != Purpose::kRuntime) taken.push_back(delta);
    return true;
  };
  Result<Engine> engine =
      Engine::create(test::config_of(settings("cuda:0,cpu", {{"kv.page_tokens", "16"},
                                                             {"context.max", "600"},
                                                             {"kv.ladder", "none"},
                                                             {"budget.cuda:0", "1G"}})),
                     hooks);
  REQUIRE(engine.ok());
  const Result<Plan> plan = engine->plan(folder);
  REQUIRE(plan.ok());
  struct Made {
    std::optional<Model> model;
    std::optional<Session> session;
  };
  // Does what is left to do; stops at the first failure.
  const auto go_on = [&](Made& made) -> Status {
    if (!made.model) {
      FATHOM_TRY_ASSIGN(made.model, Model::load(*engine, *plan));
    }
    if (!made.session) {
      FATHOM_TRY_ASSIGN(made.session, Session::create(*made.model));
    }
    while (made.session->n_tokens() < 40) {
      const int64_t before = made.session->n_tokens();
      if (Status status = made.session->prefill(tokens); !status.ok()) {
        CHECK(made.session->n_tokens() == before);
        return status;
      }
    }
    return {};
  };
  {
    Made all;
    test::require_ok(go_on(all));
  }
  const std::vector<int64_t> sizes = taken;
  REQUIRE(sizes.size() >= 5);
  Neighbour neighbour;
  int64_t before = 0, needed = 0;
  for (const int64_t size : sizes) needed += size;
  for (const int64_t size : sizes) {
    Made made;
    neighbour.leave(before + size / 2);
    const Status refused = go_on(made);
    INFO("an allocation of " << size << " behind " << before << ": " << refused.message());
    CHECK(refused.code() == Code::kMemory);
    CHECK_THAT(std::string(refused.message()), Contains("memory"));
    neighbour.leave(2 * needed);
    test::require_ok(go_on(made));
    test::require_ok(made.session->step(3));
    before += size;
  }
}
