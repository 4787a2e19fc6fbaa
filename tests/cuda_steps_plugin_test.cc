// Decode steps on a CUDA device: as graphs, over the texts of a batch at once, waiting for nothing
// but the token.
#include <dlfcn.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <string>

#include "cuda_test_plugin.h"
#include "support/golden.h"
#include "support/loaded_model.h"
#include "support/traced_calls.h"

using namespace fathom;

namespace {

// All layers with their experts on the device.
test::Settings settings(const std::string& device, test::Settings more = {}) {
  more.emplace_back("devices", device + ",cpu");
  if (std::none_of(more.begin(), more.end(),
                   [](const auto& s) { return s.first == "cuda.plugin"; }))
    more.emplace_back("cuda.plugin", cuda_test::plugin_path());
  more.emplace_back("placement.layers", device + "=*");
  more.emplace_back("placement.experts", device + "=*");
  more.emplace_back("budget." + device, "1G");
  more.emplace_back("budget.cpu", "400M");
  more.emplace_back("context.max", "600");
  return more;
}

}  // namespace

TEST_CASE("a token is waited for once, and nothing else", "[cuda][plugin]") {
  const std::string traced = std::string(FATHOM_TEST_PLUGINS) + "/traced.so";
  setenv("FATHOM_TEST_TRACED_PLUGIN", cuda_test::plugin_path().c_str(), 1);
  const Model model = test::load_model(test::test_data("models/tiny-v2-lite"),
                                       settings("cuda:0", {{"cuda.plugin", traced},
                                                           {"placement.embed", "cuda:0"},
                                                           {"placement.head", "cuda:0"},
                                                           {"kv.page_tokens", "64"}}));
  void* library = dlopen(traced.c_str(), RTLD_NOW | RTLD_LOCAL);
  REQUIRE(library != nullptr);
  const auto take =
      reinterpret_cast<test::TracedCallsFunction>(dlsym(library, test::kTracedCallsEntry));
  REQUIRE(take != nullptr);
  Session session = test::new_session(model);
  test::require_ok(session.reserve(64));
  test::require_ok(session.prefill(std::vector<int32_t>{3, 1, 4, 1, 5}));
  std::vector<test::TracedCall> calls;
  take(calls);
  int n_tokens = 0;
  const GenerateOptions options{.max_new_tokens = 6, .stop_at_eos = false};
  const auto result = session.generate(options, [&](const GeneratedToken&) {
    take(calls);
    int waits = 0, down = 0, up = 0, operations = 0;
    std::string all;
    for (const test::TracedCall& call : calls) {
      waits += call.name == "sync";
      down += call.name == "download";
      up += call.name == "upload";
      operations += call.name != "sync" && call.name != "download" && call.name != "upload";
      all += call.name + " ";
    }
    INFO(n_tokens << ": " << all);
    // The first comes of the prompt's logits.
    if (n_tokens++ > 0) {
      CHECK(operations > 20);
      CHECK(waits == 1);
      CHECK(down == 1);
      CHECK(up == 0);
    }
    return true;
  });
  INFO(result.status().message());
  REQUIRE(result.ok());
  CHECK(n_tokens == 6);
}

TEST_CASE("a batch of texts is attended at once and has the bits of each alone", "[cuda][plugin]") {
  int64_t n_attended = 0;
  HostHooks hooks;
  hooks.op = [&](const OpTime& op) { n_attended += op.op == "attend_absorbed"; };
  const std::string folder = test::test_data("models/tiny-v2-lite");
  const test::Settings common{{"sessions.max", "5"}};
  const Model model = test::load_model(folder, settings("cuda:0", common));
  const Result<Engine> watched = Engine::create(test::config_of(settings("cuda:0", common)), hooks);
  REQUIRE(watched.ok());
  const Result<Model> counted = Model::load(*watched, std::move(watched->plan(folder)).value());
  REQUIRE(counted.ok());
  const auto begin = [](const Model& m, int32_t i) {
    Session session = test::new_session(m);
    test::require_ok(session.prefill(std::vector<int32_t>(static_cast<size_t>(2 + 5 * i), i)));
    return session;
  };
  constexpr int32_t kTexts = 4, kSteps = 4;
  std::vector<Session> batch, alone, observed;
  for (int32_t i = 0; i < kTexts; ++i) batch.push_back(begin(model, i));
  for (int32_t step = 0; step < kSteps; ++step) {
    std::vector<int32_t> tokens;
    std::vector<Session*> all;
    for (int32_t i = 0; i < kTexts; ++i) {
      tokens.push_back(step * 3 + i);
      all.push_back(&batch[static_cast<size_t>(i)]);
    }
    test::require_ok(Session::step_batch(all, tokens));
  }
  for (int32_t i = 0; i < kTexts; ++i) {
    Session session = begin(model, i);
    for (int32_t step = 0; step < kSteps; ++step) test::require_ok(session.step(step * 3 + i));
    INFO("text " << i);
    const auto got = batch[static_cast<size_t>(i)].logits(), expected = session.logits();
    CHECK(std::equal(got.begin(), got.end(), expected.begin(), expected.end()));
  }
  std::vector<Session*> all;
  for (int32_t i = 0; i < kTexts; ++i) observed.push_back(begin(*counted, i));
  for (Session& session : observed) all.push_back(&session);
  n_attended = 0;
  test::require_ok(Session::step_batch(all, std::vector<int32_t>{1, 2, 3, 4}));
  CHECK(n_attended == counted->config().num_hidden_layers);
  if (cuda_test::real_gpu()) return;
  const std::string what = model.engine().device(0).describe();
  INFO(what);
  CHECK(what.find(" 0 graphs made") == what.npos);
}

TEST_CASE("decode through graphs has the bits of decode without", "[cuda][plugin]") {
  if (cuda_test::real_gpu()) return;  // a real driver makes graphs; golden texts went through them
  const auto texts = [](const std::string& device) {
    const Model model = test::load_model(test::test_data("models/tiny-v2-lite"), settings(device));
    Session session = test::new_session(model);
    test::require_ok(session.prefill(std::vector<int32_t>{3, 1, 4, 1, 5}));
    std::vector<float> logits;
    for (const int32_t token : {9, 2, 6, 5, 3}) {
      test::require_ok(session.step(token));
      logits.insert(logits.end(), session.logits().begin(), session.logits().end());
    }
    const std::string what = model.engine().device(0).describe();
    INFO(what);
    CHECK((what.find(" 0 graphs made") == what.npos) == (device != "cuda:2"));
    CHECK((what.find("; off") == what.npos) == (device == "cuda:0"));
    return logits;
  };
  const std::vector<float> with = texts("cuda:0");
  CHECK(with == texts("cuda:2"));
  CHECK(with == texts("cuda:3"));
}
