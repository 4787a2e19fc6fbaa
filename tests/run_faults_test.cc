// Failing the n-th allocation, for every n: the right code, nothing leaked, and everything usable
// as if nothing had been tried.
#include <catch2/catch.hpp>

#include <cstdlib>
#include <new>

#include "cpu/gemm_onednn.h"
#include "support/faults.h"
#include "support/spill.h"

using fathom::test::Faults;
using fathom::test::HeapFaults;

// The heap of this program.  Not inlined: the compiler would find free() unlike new.
namespace {

void* counted(size_t bytes) noexcept {
  if (HeapFaults::on() && Faults::strikes()) return nullptr;
  void* block = std::malloc(bytes ? bytes : 1);
  HeapFaults::live() += block != nullptr;
  return block;
}
void uncounted(void* block) noexcept {
  HeapFaults::live() -= block != nullptr;
  std::free(block);
}

}  // namespace

[[gnu::noinline]] void* operator new(size_t bytes) {
  if (void* block = counted(bytes)) return block;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return counted(bytes);
}
[[gnu::noinline]] void operator delete(void* block) noexcept {
  uncounted(block);
}
[[gnu::noinline]] void operator delete(void* block, size_t) noexcept {
  uncounted(block);
}
[[gnu::noinline]] void operator delete(void* block, const std::nothrow_t&) noexcept {
  uncounted(block);
}

namespace fathom {
namespace {

const std::string kTrained = FATHOM_EXAMPLE_MODEL;

enum class Where { kMemory, kHeap };

struct World {
  int64_t held = 0;
  std::optional<Engine> engine;
  std::string folder;

  explicit World(const test::Settings& more, const std::string& spill) : folder(spill) {
    test::Settings settings{{"context.max", "600"},      {"threads", "1"},
                            {"kv.page_tokens", "64"},    {"prefill.chunk", "64"},
                            {"kv.tiers", "device,file"}, {"kv.spill_folder", spill}};
    settings.insert(settings.end(), more.begin(), more.end());
    HostHooks hooks;
    hooks.allocator = test::faulty_allocator(&held);
    auto made = Engine::create(test::config_of(settings), hooks);
    REQUIRE(made.ok());
    engine.emplace(std::move(made).value());
  }
  int64_t booked() const { return engine->memory().devices[0].bytes_now; }
};

// What act() leaves behind.
enum class Leaves { kNothing, kState };

// Runs act(), a function returning a Status, once for every n until no fault strikes; check() after
// each.  Returns how many faults struck.
template <class Act, class Check>
int64_t for_every_fault(Where where, Leaves leaves, Act&& act, Check&& check) {
  int64_t struck = 0;
  for (int64_t n = 1;; ++n) {
    Code code{};
    bool hit = false;
    char message[400] = "";  // no heap, which is counted
    const int64_t live = HeapFaults::live();
    {
      std::optional<HeapFaults> heap;
      if (where == Where::kHeap) heap.emplace();
      Faults::arm(n);
      const Status status = act();
      hit = Faults::disarm();
      code = status.code();
      status.message().copy(message, sizeof message - 1);
    }
    const int64_t leaked = HeapFaults::live() - live;
    INFO("allocation " << n << ": " << code_name(code) << " " << message);
    if (leaves == Leaves::kNothing) CHECK(leaked == 0);
    if (!hit) {
      REQUIRE(code == Code::kOk);
      check(true);
      return struck;
    }
    ++struck;
    // Where the library can do without (a message, a larger buffer) the call may succeed.
    CHECK((code == Code::kOk || code == Code::kMemory));
    check(code == Code::kOk);
  }
}

void fail_everything(Where where) {
  test::TemporaryFolder folder("faults");
  World world({}, folder.path());
  const int64_t empty = world.booked();
  const auto tokens = test::long_text(600);
  const auto ids = std::span(tokens);

  SECTION("plan and load") {
    std::optional<Plan> plan;
    for_every_fault(
        where, Leaves::kNothing, [&] { return world.engine->plan(kTrained).status().clone(); },
        [&](bool) { CHECK(world.booked() == empty); });
    auto made = world.engine->plan(kTrained);
    REQUIRE(made.ok());
    plan.emplace(std::move(made).value());
    const int64_t struck = for_every_fault(
        where, Leaves::kNothing, [&] { return Model::load(*world.engine, *plan).status().clone(); },
        [&](bool) {
          CHECK(world.booked() == empty);
          if (where == Where::kMemory) CHECK(world.held == 0);
        });
    CHECK(struck > 2);
  }
  SECTION("sessions") {
    auto plan = world.engine->plan(kTrained);
    REQUIRE(plan.ok());
    auto loaded = Model::load(*world.engine, *plan);
    REQUIRE(loaded.ok());
    const Model model = std::move(loaded).value();
    const int64_t with_model = world.booked();

    for_every_fault(
        where, Leaves::kNothing, [&] { return Session::create(model).status().clone(); },
        [&](bool) { CHECK(world.booked() == with_model); });

    // What the text says when nothing fails.
    std::vector<float> expected_prefill, expected_step;
    {
      Session calm = test::new_session(model);
      test::require_ok(calm.prefill(ids.first(500)));
      expected_prefill.assign(calm.logits().begin(), calm.logits().end());
      test::require_ok(calm.step(7));
      expected_step.assign(calm.logits().begin(), calm.logits().end());
    }
    for (const bool spilling : {false, true}) {
      INFO((spilling ? "with" : "without") << " pages in the file");
      Session session = test::new_session(model);
      test::require_ok(world.engine->set_budget(0, int64_t{1} << 40));
      if (spilling) test::leave(model, plan->devices[0].kv_page_bytes * 3);
      for_every_fault(
          where, Leaves::kState,
          [&] {
            return session.prefill(ids.subspan(static_cast<size_t>(session.n_tokens()),
                                               500 - static_cast<size_t>(session.n_tokens())));
          },
          [&](bool done) {
            CHECK(session.n_tokens() % 64 == (done ? 500 % 64 : 0));
            if (done) {
              CHECK(test::first_bit_difference(expected_prefill, session.logits()).index == -1);
              test::require_ok(session.truncate(0));
            }
          });
      test::require_ok(session.prefill(ids.first(500)));
      CHECK((session.cache().bytes_in(KvTier::kFile) > 0) == spilling);
      std::vector<std::byte> saved;
      const auto keep = [&](std::span<const std::byte> bytes) {
        saved.insert(saved.end(), bytes.begin(), bytes.end());
        return Status();
      };
      saved.reserve(4 << 20);
      for_every_fault(
          where, Leaves::kNothing,
          [&] {
            saved.clear();
            return session.save_to(keep);
          },
          [&](bool) {});
      for_every_fault(
          where, Leaves::kState, [&] { return session.step(7); },
          [&](bool done) {
            CHECK(session.n_tokens() == (done ? 501 : 500));
            if (done) {
              CHECK(test::first_bit_difference(expected_step, session.logits()).index == -1);
              test::require_ok(session.truncate(500));
            }
          });
      for_every_fault(
          where, Leaves::kState,
          [&] {
            FATHOM_TRY(session.truncate(130));
            return session.prefill(ids.subspan(130, 370));
          },
          [&](bool) {
            if (session.n_tokens() != 500) {
              test::require_ok(
                  session.prefill(ids.subspan(static_cast<size_t>(session.n_tokens()),
                                              500 - static_cast<size_t>(session.n_tokens()))));
            }
          });
      test::require_ok(session.step(7));
      CHECK(test::cosine(expected_step, session.logits()) > 0.999);  // other cuts
      const ReadFunction read = [&](int64_t offset, std::span<std::byte> out) {
        std::copy_n(saved.begin() + offset, out.size(), out.begin());
        return Status();
      };
      const int64_t before = world.booked();
      test::require_ok(world.engine->set_budget(0, int64_t{1} << 40));
      const int64_t size = static_cast<int64_t>(saved.size());
      for_every_fault(
          where, Leaves::kNothing,
          [&] { return Session::restore_from(model, read, size).status().clone(); },
          [&](bool) { CHECK(world.booked() == before); });
      auto restored = Session::restore_from(model, read, size);
      REQUIRE(restored.ok());
      test::require_ok(restored->step(7));
      CHECK(test::first_bit_difference(expected_step, restored->logits()).index == -1);
    }
    CHECK(world.booked() == with_model);
  }
}

TEST_CASE("every large allocation fails in turn", "[faults]") {
  fail_everything(Where::kMemory);
}

TEST_CASE("every allocation of the heap fails in turn", "[faults]") {
  fail_everything(Where::kHeap);
}

// oneDNN allocates small objects in the middle of a pass.  Other kernels in its place would round
// differently: the pass fails instead.
TEST_CASE("a bf16 product that the heap is too short for ends the pass", "[faults]") {
  test::TemporaryFolder folder("bf16");
  World world({{"kv.type", "bf16"}}, folder.path());
  auto plan = world.engine->plan(test::test_data("gguf/tiny-v3.new.BF16.gguf"));
  REQUIRE(plan.ok());
  auto loaded = Model::load(*world.engine, *plan);
  REQUIRE(loaded.ok());
  const Model model = std::move(loaded).value();
  const std::vector<int32_t> ids(64, 5);
  std::vector<float> expected;
  {
    Session calm = test::new_session(model);
    test::require_ok(calm.prefill(ids));
    expected.assign(calm.logits().begin(), calm.logits().end());
  }
  Session session = test::new_session(model);
  std::string told;
  for_every_fault(
      Where::kHeap, Leaves::kState,
      [&] {
        const Status status = session.prefill(ids);
        if (status.message().find("bf16 product") != std::string_view::npos) told = "told";
        return status.clone();
      },
      [&](bool done) {
        CHECK(session.n_tokens() == (done ? 64 : 0));
        if (!done) return;
        CHECK(test::first_bit_difference(expected, session.logits()).index == -1);
        test::require_ok(session.truncate(0));
      });
  CHECK((told == "told") == cpu::onednn_serves_bf16());
}

TEST_CASE("the host's memory serves all of it, and comes back", "[faults]") {
  test::TemporaryFolder folder("hook");
  World world({}, folder.path());
  const int64_t runtime = world.booked();  // thread stacks are the system's
  CHECK(world.held == 0);
  {
    auto model = Model::load(*world.engine, *world.engine->plan(kTrained));
    REQUIRE(model.ok());
    Session session = test::new_session(*model);
    test::require_ok(session.prefill(test::long_text(200)));
    CHECK(world.held == world.booked() - runtime);
    test::require_ok(session.truncate(0));
    CHECK(world.held == world.booked() - runtime);
    CHECK(world.held > 0);
  }
  CHECK(world.held == 0);
  HostHooks half;
  half.allocator.reserve = [](int64_t) -> void* { return nullptr; };
  CHECK(Engine::create({}, half).status().code() == Code::kInvalidArgument);
}

}  // namespace
}  // namespace fathom
