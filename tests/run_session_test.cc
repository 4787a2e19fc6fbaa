// Sessions: cutting, cancelling, growing and shrinking do not change what the model says.
#include <catch2/catch.hpp>

#include <algorithm>
#include <fstream>
#include <thread>

#include "support/golden.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

const std::string kTrained = FATHOM_EXAMPLE_MODEL;

std::vector<int32_t> text_tokens(int64_t n) {
  const auto golden = test::Golden::load(test::test_data("trained/golden.safetensors"));
  const auto tokens = golden.i32("ppl.tokens");
  return {tokens.begin(), tokens.begin() + n};
}

int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * 4096;
}

TEST_CASE("chunk sizes change the logits by less than the tolerance", "[session]") {
  for (const char* name : {"tiny-v2", "tiny-v2-lite", "tiny-v3"}) {
    const std::string folder = test::test_data(std::string("models/") + name);
    const Model model = test::load_model(folder, {{"numerics", "exact"}});
    const auto golden = test::Golden::load(folder + "/golden.safetensors");
    for (const char* prompt : {"p300", "p1000"})
      for (int64_t chunk : {1, 7, 64, 300, 0}) {
        const auto tokens = golden.i32(std::string(prompt) + ".tokens");
        const auto diff = test::max_abs_diff(golden.f32(std::string(prompt) + ".logits"),
                                             test::last_logits(model, tokens, chunk));
        INFO(name << " " << prompt << " chunk " << chunk << ": " << test::describe(diff));
        CHECK(diff.value <= (tokens.size() <= 300 ? 2e-4 : 1e-3));
      }
  }
}

TEST_CASE("page sizes and thread counts give the same bits", "[session]") {
  for (const std::string& path :
       {kTrained, test::test_data("models/tiny-v3"), test::test_data("quant/quant.Q4_K_M.gguf")})
    for (const char* numerics : {"fast", "exact"}) {
      const auto tokens = text_tokens(700);
      std::vector<int32_t> ids = tokens;
      std::vector<float> expected;
      for (const char* page : {"64", "16", "256", "1024"})
        for (const char* threads : {"1", "2", "3"}) {
          if (std::string(page) != "64" && std::string(threads) == "3") continue;
          const Model model = test::load_model(path, {{"numerics", numerics},
                                                      {"kv.page_tokens", page},
                                                      {"threads", threads},
                                                      {"prefill.chunk", "256"}});
          for (int32_t& id : ids) id %= static_cast<int32_t>(model.config().vocab_size);
          Session session = test::new_session(model);
          test::require_ok(session.prefill(ids));
          for (int32_t id : {5, 6, 7}) test::require_ok(session.step(id));
          const auto logits = session.logits();
          if (expected.empty()) expected.assign(logits.begin(), logits.end());
          INFO(path << " " << numerics << ", page " << page << ", threads " << threads);
          CHECK(test::first_bit_difference(expected, logits).index == -1);
        }
    }
}

TEST_CASE("16,384 generated tokens grow from a few pages, below the plan; truncating gives it back",
          "[session][slow]") {
  const Model model = test::load_model(kTrained, {{"context.max", "16600"}});
  Session session = test::new_session(model);
  test::require_ok(session.prefill(text_tokens(100)));
  const int64_t few = session.cache().size_bytes();
  CHECK(few <= 2 * model.plan().devices[0].kv_page_bytes);

  GenerateOptions options;
  options.max_new_tokens = 16384;
  options.stop_at_eos = false;
  options.sampling.temperature = 0.8f;
  options.sampling.seed = 7;
  int64_t seen = 0, largest_step = 0, before = few;
  auto result = session.generate(options, [&](const GeneratedToken&) {
    ++seen;
    largest_step = std::max(largest_step, session.cache().size_bytes() - before);
    before = session.cache().size_bytes();
    return true;
  });
  INFO(result.status().message());
  REQUIRE(result.ok());
  CHECK(result->reason == StopReason::kLength);
  CHECK(seen >= 16384);
  CHECK(session.n_tokens() == 16484);
  CHECK(largest_step == model.plan().devices[0].kv_page_bytes);  // page by page
  const MemorySnapshot memory = model.engine().memory();
  CHECK(memory.devices[0].bytes_peak <= model.plan().devices[0].peak_bytes());

  const int64_t resident = resident_bytes(), held = session.cache().size_bytes();
  test::require_ok(session.truncate(100));
  CHECK(session.cache().size_bytes() == few);
  const int64_t returned = resident - resident_bytes();
  INFO("held " << held << ", returned " << returned);
  CHECK(returned >= held - few - 2 * model.plan().devices[0].kv_page_bytes);
  // And it goes on as if nothing had been there.
  test::require_ok(session.prefill(text_tokens(50)));
}

TEST_CASE("truncated and continued equals fresh", "[session]") {
  const Model model = test::load_model(kTrained);
  const auto tokens = text_tokens(400);
  Session session = test::new_session(model);
  test::require_ok(session.prefill(tokens));
  test::require_ok(session.truncate(137));
  CHECK(session.logits().empty());
  CHECK(session.n_tokens() == 137);
  for (size_t i = 137; i < 140; ++i) test::require_ok(session.step(tokens[i]));

  Session fresh = test::new_session(model);
  test::require_ok(fresh.prefill(tokens));
  test::require_ok(fresh.truncate(137));
  for (size_t i = 137; i < 140; ++i) test::require_ok(fresh.step(tokens[i]));
  CHECK(test::first_bit_difference(fresh.logits(), session.logits()).index == -1);
  CHECK(std::equal(session.tokens().begin(), session.tokens().end(), tokens.begin()));
  CHECK(session.truncate(141).code() == Code::kInvalidArgument);
  CHECK(session.truncate(-1).code() == Code::kInvalidArgument);
}

TEST_CASE("a cancelled prefill keeps whole chunks and the session goes on", "[session]") {
  const Model model = test::load_model(kTrained, {{"prefill.chunk", "64"}});
  const auto tokens = text_tokens(400);
  Session session = test::new_session(model);
  RunOptions options;
  options.progress = [](ProgressPhase, int64_t done, int64_t) { return done < 128; };
  CHECK(session.prefill(tokens, options).code() == Code::kCancelled);
  CHECK(session.n_tokens() == 128);
  CHECK(session.logits().empty());

  CancelToken cancel;
  cancel.request();
  RunOptions cancelled;
  cancelled.cancel = &cancel;
  CHECK(session.prefill(std::span(tokens).subspan(128), cancelled).code() == Code::kCancelled);
  CHECK(session.n_tokens() == 128);

  // Between layers of a running chunk, from another thread.
  cancel.reset();
  std::thread other([&] { cancel.request(); });
  const Status status = session.prefill(std::span(tokens).subspan(128), cancelled);
  other.join();
  CHECK((status.ok() || status.code() == Code::kCancelled));
  const int64_t held = session.n_tokens();
  if (held < 400)
    test::require_ok(session.prefill(std::span(tokens).subspan(static_cast<size_t>(held))));

  RunOptions late;
  late.deadline_ms = 1;
  Session slow = test::new_session(model);
  std::vector<int32_t> many;
  for (int i = 0; i < 20; ++i) many.insert(many.end(), tokens.begin(), tokens.end());
  CHECK(slow.prefill(many, late).code() == Code::kCancelled);

  const auto expected = test::last_logits(model, tokens);
  CHECK(test::max_abs_diff(expected, session.logits()).value < 0.5);  // other cuts: fast numerics
  CHECK(test::argmax(expected) == test::argmax(session.logits()));
}

TEST_CASE("bad tokens, empty prompts and full contexts are refused and lose nothing", "[session]") {
  const Model model = test::load_model(kTrained, {{"context.max", "100"}});
  Session session = test::new_session(model);
  CHECK(session.prefill({}).code() == Code::kInvalidArgument);
  CHECK(session.generate({}).status().code() == Code::kState);
  const auto tokens = text_tokens(98);
  test::require_ok(session.prefill(tokens));
  const std::vector<float> before(session.logits().begin(), session.logits().end());

  const std::vector<int32_t> bad{1, 2048};
  const Status status = session.prefill(bad);
  CHECK(status.code() == Code::kInvalidArgument);
  CHECK(status.message().find("token 1 has id 2048") != std::string_view::npos);
  CHECK(session.step(-1).code() == Code::kInvalidArgument);
  CHECK(session.prefill(text_tokens(3)).code() == Code::kContextFull);
  RunOptions wide;
  wide.chunk = 100000;
  CHECK(session.prefill(text_tokens(1), wide).code() == Code::kInvalidArgument);
  CHECK(session.n_tokens() == 98);
  CHECK(test::first_bit_difference(before, session.logits()).index == -1);

  GenerateOptions options;
  options.stop_at_eos = false;
  const auto result = session.generate(options);
  REQUIRE(result.ok());
  CHECK(result->reason == StopReason::kContextFull);
  CHECK(result->status.code() == Code::kContextFull);
  CHECK(result->tokens.size() == 2);
  CHECK(session.n_tokens() == 100);
  test::require_ok(session.truncate(50));
  test::require_ok(session.step(tokens[50]));
}

TEST_CASE("a budget that ends during generation is a reason, and the session lives", "[session]") {
  auto engine = Engine::create();
  REQUIRE(engine.ok());
  auto plan =
      engine->plan(kTrained, test::config_of({{"context.max", "2000"}, {"kv.ladder", "none"}}));
  REQUIRE(plan.ok());
  auto model = Model::load(*engine, *plan);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  test::require_ok(session.prefill(text_tokens(100)));
  // Room for what is held and nothing more: the next page is refused.
  test::require_ok(engine->set_budget(0, engine->memory().devices[0].bytes_now));
  GenerateOptions options;
  options.stop_at_eos = false;
  options.max_new_tokens = 1000;
  auto result = session.generate(options);
  REQUIRE(result.ok());
  CHECK(result->reason == StopReason::kBudget);
  CHECK(result->status.code() == Code::kBudget);
  CHECK(result->status.bytes_needed() == plan->devices[0].kv_page_bytes);
  CHECK(session.n_tokens() == 100 + static_cast<int64_t>(result->tokens.size()));
  CHECK(session.n_tokens() == session.cache().capacity_tokens());
  test::require_ok(engine->set_budget(0, int64_t{1} << 40));
  result = session.generate(options);
  REQUIRE(result.ok());
  CHECK(result->tokens.size() == 1000);
}

TEST_CASE("generation in two calls equals one", "[session]") {
  const Model model = test::load_model(kTrained);
  const auto tokens = text_tokens(60);
  const auto generate = [&](std::vector<int64_t> parts) {
    Session session = test::new_session(model);
    test::require_ok(session.prefill(tokens));
    SamplingOptions sampling;
    sampling.temperature = 1;
    sampling.seed = 3;
    auto sampler = Sampler::create(sampling);
    REQUIRE(sampler.ok());
    for (int64_t n : parts) {
      GenerateOptions options;
      options.max_new_tokens = n;
      options.stop_at_eos = false;
      options.sampler = &*sampler;
      REQUIRE(session.generate(options).ok());
    }
    return std::vector<int32_t>(session.tokens().begin(), session.tokens().end());
  };
  CHECK(generate({40}) == generate({13, 27}));
}

TEST_CASE("stop strings are not handed out, not even in part", "[session]") {
  const Model model = test::load_model(kTrained);
  std::vector<int32_t> prompt;
  test::require_ok(
      model.tokenizer()->encode("Once upon a time there was", {.add_bos = true}, prompt));
  const auto run = [&](std::vector<std::string> stops) {
    Session session = test::new_session(model);
    test::require_ok(session.prefill(prompt));
    GenerateOptions options;
    options.max_new_tokens = 60;
    options.stop_strings = std::move(stops);
    std::string streamed;
    auto result = session.generate(options, [&](const GeneratedToken& token) {
      streamed += token.text;
      return true;
    });
    REQUIRE(result.ok());
    CHECK(streamed == result->text);
    return std::pair(result->reason, result->text);
  };
  const auto [length_reason, whole] = run({});
  CHECK(length_reason == StopReason::kLength);
  REQUIRE(whole.size() > 60);
  const std::string stop = whole.substr(30, 9);
  const auto [reason, text] = run({"never said", stop});
  CHECK(reason == StopReason::kStop);
  CHECK(text == whole.substr(0, whole.find(stop)));
  // The beginning of a stop string that does not come is handed out at the end.
  CHECK(run({whole.substr(whole.size() - 3) + "\x01"}).second == whole);
}

TEST_CASE("the callback can stop a generation", "[session]") {
  const Model model = test::load_model(kTrained);
  Session session = test::new_session(model);
  test::require_ok(session.prefill(text_tokens(20)));
  int calls = 0;
  GenerateOptions options;
  options.stop_at_eos = false;
  auto result = session.generate(options, [&](const GeneratedToken&) { return ++calls < 5; });
  REQUIRE(result.ok());
  CHECK(result->reason == StopReason::kCallback);
  CHECK(calls == 5);
  CHECK(session.n_tokens() == 25);
}

TEST_CASE("sessions of one model run at once, each as if alone", "[session]") {
  const Model model = test::load_model(kTrained, {{"sessions.max", "3"}});
  const auto tokens = text_tokens(600);
  const auto expected = test::last_logits(model, tokens);
  std::vector<std::vector<float>> got(3);
  {
    std::vector<std::thread> threads;
    for (auto& logits : got)
      threads.emplace_back([&] {
        auto session = Session::create(model);
        if (!session.ok() || !session->prefill(tokens).ok()) return;
        logits.assign(session->logits().begin(), session->logits().end());
      });
    for (std::thread& thread : threads) thread.join();
  }
  for (const auto& logits : got) {
    REQUIRE(logits.size() == expected.size());
    CHECK(test::first_bit_difference(expected, logits).index == -1);
  }
}

}  // namespace
}  // namespace fathom
