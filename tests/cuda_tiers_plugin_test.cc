// Pages of a CUDA device in memory of the host and in the spill file: attention over them gives the
// bits of resident pages.
#include <catch2/catch.hpp>

#include <string>

#include "cuda_test_plugin.h"
#include "support/golden.h"
#include "support/loaded_model.h"
#include "support/spill.h"

using namespace fathom;
using Catch::Contains;

namespace {

test::Settings settings(const test::Settings& more) {
  test::Settings all{{"devices", "cuda:0,cpu"},        {"cuda.plugin", cuda_test::plugin_path()},
                     {"placement.layers", "cuda:0=*"}, {"placement.experts", "cuda:0=*"},
                     {"budget.cuda:0", "1G"},          {"budget.cpu", "400M"},
                     {"context.max", "600"},           {"kv.page_tokens", "16"},
                     {"prefill.chunk", "16"}};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

std::vector<float> copy(std::span<const float> logits) {
  return {logits.begin(), logits.end()};
}

}  // namespace

TEST_CASE("a card's pages on the host and in the file give the bits of resident ones",
          "[cuda][plugin][ladder]") {
  const std::string folder = test::test_data("models/tiny-v2-lite");
  const test::Golden golden = test::Golden::load(folder + "/golden.safetensors");
  const std::span<const int32_t> text = golden.i32("p64.tokens");
  test::TemporaryFolder spill("cuda_tiers");
  for (const char* type : {"q8_0"}) {  // one: emulation is slow
    std::vector<std::vector<float>> expected;
    {
      const Model model = test::load_model(folder, settings({{"kv.type", type}}));
      Session session = test::new_session(model);
      test::require_ok(session.prefill(text));
      expected.push_back(copy(session.logits()));
      for (int i = 0; i < 18; ++i) test::require_ok(session.step(7 + i));
      expected.push_back(copy(session.logits()));
      for (int i = 40; i < 42; ++i) test::require_ok(session.step(i));
      expected.push_back(copy(session.logits()));
    }
    const Model model = test::load_model(folder, settings({{"kv.type", type},
                                                           {"kv.tiers", "device,host,file"},
                                                           {"kv.ladder", "spill,file"},
                                                           {"kv.spill_folder", spill.path()}}));
    Session session = test::new_session(model);
    INFO(type);
    test::leave(model, 2 * model.plan().devices[0].kv_page_bytes);
    test::require_ok(session.prefill(text));
    CHECK(session.cache().bytes_in(KvTier::kHost) > 0);
    CHECK(session.cache().bytes_in(KvTier::kFile) == 0);
    CHECK(test::first_bit_difference(expected[0], session.logits()).index == -1);
    if (!cuda_test::real_gpu()) {  // which says it in other words
      const std::string what = model.engine().device(0).describe();
      INFO(what);
      CHECK_THAT(what, Contains(std::to_string(session.cache().bytes_in(KvTier::kHost)) +
                                " bytes of it pinned"));
      CHECK_THAT(what, !Contains(" 0 copies from there"));
    }
    test::leave(model, 0, 1);  // the host is full now, too
    for (int i = 0; i < 18; ++i) test::require_ok(session.step(7 + i));
    CHECK(session.cache().bytes_in(KvTier::kHost) > 0);
    CHECK(session.cache().bytes_in(KvTier::kFile) > 0);
    CHECK(test::first_bit_difference(expected[1], session.logits()).index == -1);
    CHECK(test::count_events(session, "spilled") >= 1);
    CHECK(test::count_events(session, "spilled_to_file") >= 1);
    // The host has room again: what is in the file goes there; then the card has, and all comes
    // back.
    Engine engine = model.engine();
    test::require_ok(engine.set_budget(1, int64_t{400} << 20));
    test::require_ok(session.step(40));
    CHECK(session.cache().bytes_in(KvTier::kHost) > 0);
    CHECK(session.cache().bytes_in(KvTier::kFile) == 0);
    test::require_ok(engine.set_budget(0, int64_t{1} << 30));
    test::require_ok(session.step(41));
    CHECK(session.cache().bytes_in(KvTier::kHost) == 0);
    if (!cuda_test::real_gpu())
      CHECK_THAT(model.engine().device(0).describe(), Contains(" 0 bytes of it pinned"));
    CHECK(test::first_bit_difference(expected[2], session.logits()).index == -1);
    CHECK(test::count_events(session, "returned") == 1);
    const MemorySnapshot memory = model.engine().memory();
    for (int d = 0; d < 2; ++d)
      CHECK(memory.devices[static_cast<size_t>(d)].bytes_now <=
            memory.devices[static_cast<size_t>(d)].budget_bytes);
  }
}
