// step_batch: several texts in one pass say what each says alone; what cannot be is refused and
// changes nothing.
#include <algorithm>
#include <catch2/catch.hpp>

#include "support/golden.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

const std::string kTrained = FATHOM_EXAMPLE_MODEL;

std::vector<int32_t> text_tokens(int64_t first, int64_t n, int64_t vocab) {
  static const std::vector<int32_t> tokens = [] {
    const auto golden = test::Golden::load(test::test_data("trained/golden.safetensors"));
    const auto all = golden.i32("ppl.tokens");
    return std::vector<int32_t>(all.begin(), all.end());
  }();
  std::vector<int32_t> ids(tokens.begin() + first, tokens.begin() + first + n);
  for (int32_t& id : ids) id %= static_cast<int32_t>(vocab);
  return ids;
}

std::vector<float> copy(std::span<const float> logits) {
  return {logits.begin(), logits.end()};
}

// Texts of different lengths, each continued by `steps` tokens: alone, and in a batch.
void check_batch(const Model& model, int64_t n_texts, int64_t steps, bool same_bits,
                 const std::string& what) {
  const int64_t vocab = model.config().vocab_size;
  std::vector<Session> alone, together;
  std::vector<Session*> batch;
  for (int64_t i = 0; i < n_texts; ++i) {
    const auto prompt = text_tokens(40 * i, 1 + 37 * i % 150, vocab);
    for (auto* sessions : {&alone, &together}) {
      sessions->push_back(test::new_session(model));
      test::require_ok(sessions->back().prefill(prompt));
    }
  }
  for (Session& session : together) batch.push_back(&session);
  for (int64_t step = 0; step < steps; ++step) {
    const auto tokens = text_tokens(5000 + step * n_texts, n_texts, vocab);
    test::require_ok(Session::step_batch(batch, tokens));
    for (size_t i = 0; i < alone.size(); ++i) {
      test::require_ok(alone[i].step(tokens[i]));
      const std::vector<float> want = copy(alone[i].logits()), got = copy(together[i].logits());
      INFO(what << ", text " << i << " of " << n_texts << ", step " << step);
      if (same_bits)
        REQUIRE(want == got);
      else
        REQUIRE(test::max_abs_diff(want, got).value < 1e-3);
      REQUIRE(std::equal(alone[i].tokens().begin(), alone[i].tokens().end(),
                         together[i].tokens().begin(), together[i].tokens().end()));
    }
  }
  CHECK(together.front().times().decode_tokens == steps);
}

TEST_CASE("a batch gives each text the bits that it gets alone", "[batch]") {
  for (const std::string& isa : test::runnable_isas())
    for (const std::string& path : {kTrained, test::test_data("quant/quant.Q4_K_M.gguf")})
      for (const char* numerics : {"fast", "exact"}) {
        if (isa == "scalar" && (path == kTrained || numerics[0] == 'f')) continue;  // time
        const Model model = test::load_model(path, {{"isa", isa},
                                                    {"numerics", numerics},
                                                    {"sessions.max", "24"},
                                                    {"prefill.chunk", "32"}});
        check_batch(model, 1, 1, true, isa);
        check_batch(model, isa == "scalar" ? 3 : 11, 2, true, isa);
      }
}

TEST_CASE("texts of plain weights differ by rounding at most", "[batch]") {
  const Model model =
      test::load_model(test::test_data("models/tiny-v3"),
                       {{"numerics", "exact"}, {"sessions.max", "24"}, {"prefill.chunk", "32"}});
  check_batch(model, 3, 2, false, "tiny-v3");
  check_batch(model, 11, 2, false, "tiny-v3");
}

TEST_CASE("threads do not change the bits of a batch", "[batch]") {
  std::vector<std::vector<float>> first;
  for (const char* threads : {"1", "2", "3"}) {
    const Model model = test::load_model(
        kTrained, {{"threads", threads}, {"sessions.max", "8"}, {"prefill.chunk", "64"}});
    std::vector<Session> sessions;
    std::vector<Session*> batch;
    for (int64_t i = 0; i < 6; ++i) {
      sessions.push_back(test::new_session(model));
      test::require_ok(
          sessions.back().prefill(text_tokens(100 * i, 20 + 60 * i, model.config().vocab_size)));
    }
    for (Session& session : sessions) batch.push_back(&session);
    test::require_ok(Session::step_batch(batch, text_tokens(900, 6, model.config().vocab_size)));
    std::vector<std::vector<float>> logits;
    for (const Session& session : sessions) logits.push_back(copy(session.logits()));
    if (first.empty()) first = logits;
    INFO(threads << " threads");
    CHECK(first == logits);
  }
}

TEST_CASE("what cannot be one pass is refused, and every session is as it was", "[batch]") {
  const Model model = test::load_model(kTrained, {{"sessions.max", "4"}, {"prefill.chunk", "2"}});
  const Model other = test::load_model(kTrained, {{"prefill.chunk", "4"}});
  const auto prompt = text_tokens(0, 9, model.config().vocab_size);
  Session a = test::new_session(model), b = test::new_session(model), c = test::new_session(model);
  Session full = test::new_session(model, {.max_tokens = 9});
  Session foreign = test::new_session(other);
  for (Session* session : {&a, &b, &c, &full, &foreign}) test::require_ok(session->prefill(prompt));
  const std::vector<float> logits = copy(a.logits());
  const auto refuse = [&](std::vector<Session*> sessions, std::vector<int32_t> tokens, Code code,
                          const char* text) {
    const Status status = Session::step_batch(sessions, tokens);
    INFO(status.message());
    CHECK(status.code() == code);
    CHECK(std::string(status.message()).find(text) != std::string::npos);
    CHECK(a.n_tokens() == 9);
    CHECK(b.n_tokens() == 9);
    CHECK(copy(a.logits()) == logits);
    CHECK(copy(b.logits()) == logits);
  };
  const auto vocab = static_cast<int32_t>(model.config().vocab_size);
  refuse({}, {}, Code::kInvalidArgument, "0 sessions");
  refuse({&a, &b}, {1}, Code::kInvalidArgument, "2 sessions and 1 tokens");
  refuse({&a, nullptr}, {1, 2}, Code::kInvalidArgument, "session 1");
  refuse({&a, &a}, {1, 2}, Code::kInvalidArgument, "twice");
  refuse({&a, &b, &c}, {1, 2, 3}, Code::kInvalidArgument, "room for 2");
  refuse({&a, &b}, {1, vocab}, Code::kInvalidArgument, "token 1");
  refuse({&a, &foreign}, {1, 2}, Code::kMismatch, "another model");
  refuse({&a, &full}, {1, 2}, Code::kContextFull, "session 1");
  RunOptions options;
  CancelToken token;
  token.request();
  options.cancel = &token;
  std::vector<Session*> both = {&a, &b};
  const std::vector<int32_t> tokens = {1, 2};
  CHECK(Session::step_batch(both, tokens, options).code() == Code::kCancelled);
  CHECK(a.n_tokens() == 9);
  CHECK(copy(b.logits()) == logits);
  test::require_ok(Session::step_batch(both, tokens));
  CHECK(a.n_tokens() == 10);
}

}  // namespace
}  // namespace fathom
