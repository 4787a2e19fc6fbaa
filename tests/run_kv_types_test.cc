// Typed cache pages end to end: every type keeps its promise of bytes and of quality; mixed pages
// follow the policy and the plan.
#include <catch2/catch.hpp>
#include <cmath>

#include "support/golden.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

std::vector<int32_t> text_tokens(int64_t first, int64_t n) {
  const auto golden = test::Golden::load(test::test_data("trained/golden.safetensors"));
  const auto tokens = golden.i32("ppl.tokens").subspan(static_cast<size_t>(first));
  return {tokens.begin(), tokens.begin() + n};
}

// Mean negative log likelihood of every next token of one long text.
double mean_nll(const Model& model, std::span<const int32_t> tokens) {
  Session session = test::new_session(model);
  double nll = 0;
  RunOptions options;
  options.on_logits = [&](int64_t position, std::span<const float> logits) {
    if (position + 1 == static_cast<int64_t>(tokens.size())) return true;
    double most = logits[0], total = 0;
    for (float l : logits) most = std::max<double>(most, l);
    for (float l : logits) total += std::exp(l - most);
    nll += std::log(total) + most -
           logits[static_cast<size_t>(tokens[static_cast<size_t>(position) + 1])];
    return true;
  };
  test::require_ok(session.prefill(tokens, options));
  return nll / static_cast<double>(tokens.size() - 1);
}

TEST_CASE("what typed caches cost in perplexity on the trained model", "[kv]") {
  struct Case {
    test::Settings settings;
    double worst;  // relative growth of perplexity over the f32 cache
  };
  const Case cases[] = {
      {{{"kv.type", "f16"}}, 0.0005},
      {{{"kv.type", "bf16"}}, 0.003},
      {{{"kv.type", "fp8"}}, 0.005},
      {{{"kv.type", "q8_0"}}, 0.005},
      {{{"kv.type", "q4_0"}, {"kv.recent_16bit", "256"}, {"prefill.chunk", "256"}}, 0.03},
      {{{"kv.type", "q4_0"},
        {"kv.recent_16bit", "256"},
        {"kv.first_16bit", "64"},
        {"kv.page_tokens", "64"},
        {"prefill.chunk", "256"}},
       0.03},
  };
  const auto tokens = text_tokens(0, 2048);
  const double reference =
      mean_nll(test::load_model(FATHOM_EXAMPLE_MODEL, {{"kv.type", "f32"}}), tokens);
  for (const Case& c : cases) {
    const Model model = test::load_model(FATHOM_EXAMPLE_MODEL, c.settings);
    const double growth = std::exp(mean_nll(model, tokens) - reference) - 1;
    INFO(c.settings[0].second << ": perplexity grows by " << growth * 100 << " %");
    CHECK(growth <= c.worst);
  }
}

TEST_CASE("mixed pages: what is held follows the policy, the plan and nothing else", "[kv]") {
  for (const char* type : {"q4_0", "q8_0", "fp8"})
    for (const char* first : {"0", "100"}) {
      const Model model = test::load_model(FATHOM_EXAMPLE_MODEL, {{"kv.type", type},
                                                                  {"kv.recent_16bit", "128"},
                                                                  {"kv.first_16bit", first},
                                                                  {"kv.page_tokens", "64"},
                                                                  {"prefill.chunk", "128"},
                                                                  {"context.max", "1000"}});
      const Plan& plan = model.plan();
      Session session = test::new_session(model);
      const auto tokens = text_tokens(0, 1000);
      int64_t peak = 0;
      for (int64_t at = 0; at < 900; at += 90) {
        test::require_ok(session.prefill(std::span(tokens).subspan(static_cast<size_t>(at), 90)));
        INFO(type << " first " << first << " at " << at + 90);
        CHECK(session.cache().size_bytes() == plan.kv_bytes(0, at + 90));
        peak = std::max(peak, session.cache().size_bytes());
      }
      for (int64_t at = 900; at < 1000; ++at)
        test::require_ok(session.step(tokens[static_cast<size_t>(at)]));
      CHECK(session.cache().size_bytes() == plan.kv_bytes(0, 1000));
      CHECK(model.engine().memory().devices[0].bytes_peak == plan.devices[0].peak_bytes());
      const KvRows rows = session.cache().rows(0, 0, 0, 1000);
      CHECK(rows.pages[0].type == (std::string_view(first) == "0" ? plan.kv_type : KvType::kF16));
      CHECK(rows.pages[5].type == plan.kv_type);
      CHECK(rows.pages[15].type == KvType::kF16);
      test::require_ok(session.truncate(70));
      CHECK(session.cache().size_bytes() <= 2 * plan.devices[0].kv_hot_page_bytes);
      test::require_ok(session.prefill(std::span(tokens).subspan(70, 500)));
    }
}

TEST_CASE("how a text was cut does not show in mixed pages", "[kv]") {
  // Rewriting depends on the number of tokens alone, so steps and chunks leave the same bytes.
  const Model model = test::load_model(FATHOM_EXAMPLE_MODEL, {{"kv.type", "q4_0"},
                                                              {"kv.recent_16bit", "128"},
                                                              {"kv.page_tokens", "64"},
                                                              {"prefill.chunk", "64"},
                                                              {"numerics", "exact"}});
  const auto tokens = text_tokens(500, 400);
  std::vector<std::vector<float>> all;
  for (int64_t chunk : {64, 13, 1}) all.push_back(test::last_logits(model, tokens, chunk));
  // A chunk sees pages as they are at its end: a page may be read in 4 bits a few rows earlier.
  for (size_t i = 1; i < all.size(); ++i) {
    INFO(test::describe(test::max_abs_diff(all[0], all[i])));
    CHECK(test::cosine(all[0], all[i]) > 0.999);
  }
}

TEST_CASE("a window smaller than the chunk is refused by name", "[kv]") {
  const auto config = test::config_of({{"kv.recent_16bit", "64"}, {"prefill.chunk", "128"}});
  const Status status = config.validate();
  CHECK(status.code() == Code::kConfig);
  CHECK(status.message().find("kv.recent_16bit") != std::string_view::npos);
  CHECK(status.message().find("prefill.chunk") != std::string_view::npos);
}

}  // namespace
}  // namespace fathom
