// The whole library with layers on a CUDA device: the backend and its kernels come through the
// plug-in, over the emulated device.
#include <catch2/catch.hpp>
#include <string>

#include "cuda_test_plugin.h"
#include "support/golden.h"
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
  more.emplace_back("budget.cuda:0", "1G");
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
  test::Settings missing = plugin, none = plugin;
  missing.emplace_back("devices", "cuda:7,cpu");
  none.emplace_back("devices", "cuda:8,cpu");
  const Status no_library = create(missing), no_gpu = create(none);
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
      for (const Purpose purpose : {Purpose::kWeights, Purpose::kExperts, Purpose::kKv,
                                    Purpose::kActivations, Purpose::kWorkspace}) {
        INFO(memory.devices[static_cast<size_t>(d)].name << " " << purpose_name(purpose));
        CHECK(memory.item(d, purpose).bytes_now == memory.item(d, purpose).bytes_planned);
      }
  }
}

TEST_CASE("out of device memory while the cache grows leaves a usable session", "[cuda][plugin]") {
  if (cuda_test::real_gpu()) return;  // the emulated device fails where it is told to
  test::Settings with =
      settings("cuda:9,cpu",
               {{"context.max", "20000"}, {"kv.page_tokens", "16"}, {"kv.ladder", "none"}});
  for (auto& [key, value] : with)
    if (key == "budget.cuda:0") key = "budget.cuda:9";
  const Model model = test::load_model(test::test_data("models/tiny-v2-lite"), with);
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

TEST_CASE("any growth on the device may be refused: the session goes on", "[cuda][plugin]") {
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
