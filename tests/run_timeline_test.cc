// The timeline's recorder: bounded, loses no extreme, invents no state, allocates nothing; and what
// it writes can be read.
#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "lib/run/session_state.h"
#include "support/loaded_model.h"

namespace {
thread_local int64_t allocations = 0;  // counted by the operators below
}  // namespace

// Not inlined: the compiler would see malloc paired with delete and warn.
[[gnu::noinline]] void* operator new(size_t n) {
  ++allocations;
  if (void* p = std::malloc(n ? n : 1)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t n, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(n ? n : 1);
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

namespace fathom {
namespace {

Engine new_engine(const test::Settings& settings = {}) {
  Result<Engine> engine = Engine::create(test::config_of(settings));
  INFO(engine.status().message());
  REQUIRE(engine.ok());
  return std::move(engine).value();
}

// An engine whose recorder runs on a clock of the test's.
struct Recorded {
  explicit Recorded(int64_t max_points, const char* devices = "cpu")
      : engine(new_engine({{"devices", devices}, {"threads", "1"}, {"budget.host", "1T"}})) {
    state().timeline.set_clock([this] { return clock; });
    test::require_ok(engine.start_timeline({max_points}));
  }
  run::EngineState& state() { return *engine.state(); }
  Timeline picture() {
    Result<Timeline> timeline = engine.timeline();
    REQUIRE(timeline.ok());
    return std::move(timeline).value();
  }
  double clock = 100;
  Engine engine;
};

using Bytes = std::array<int64_t, kPurposeCount>;

Bytes bytes_of(const MemorySnapshot& memory, int device) {
  Bytes bytes{};
  for (int p = 0; p < kPurposeCount; ++p)
    bytes[static_cast<size_t>(p)] = memory.item(device, static_cast<Purpose>(p)).bytes_now;
  return bytes;
}

TEST_CASE("the recorder is bounded, keeps every extreme and invents no state", "[timeline]") {
  for (const int64_t max_points : {16, 17, 300, 2000})
    for (const double mean_gap : {1e-5, 0.02, 30.0}) {
      Recorded recorded(max_points, "cpu:0,cpu:1");
      run::Ledger& ledger = recorded.state().ledger;
      std::mt19937 random(static_cast<uint32_t>(max_points));
      std::exponential_distribution<double> gap(1 / mean_gap);
      struct State {
        double seconds;
        int64_t total;
      };
      std::vector<State> truth[2];
      std::set<Bytes> seen[2];
      const auto note = [&](int device) {
        const Bytes bytes = bytes_of(ledger.snapshot(), device);
        seen[device].insert(bytes);
        int64_t total = 0;
        for (int64_t b : bytes) total += b;
        truth[device].push_back({recorded.clock - 100, total});
      };
      note(0), note(1);
      Bytes held[2] = {};
      int64_t n_tokens = 0;
      for (int i = 0; i < 3000; ++i) {
        recorded.clock += gap(random);
        const int device = static_cast<int>(random() % 2);
        const auto purpose = static_cast<Purpose>(random() % kPurposeCount);
        int64_t& now = held[device][static_cast<size_t>(purpose)];
        if (now > 0 && random() % 2) {
          const int64_t back = 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(now));
          ledger.release(device, purpose, back);
          now -= back;
        } else {
          const int64_t more = 1 + random() % 1'000'000;
          test::require_ok(ledger.acquire(device, purpose, more));
          now += more;
        }
        recorded.state().timeline.tokens(1);
        ++n_tokens;
        note(device);
      }
      const Timeline t = recorded.picture();
      INFO(max_points << " points, gaps of " << mean_gap << " s");
      REQUIRE(t.devices.size() == 2);
      const double width = 2 * t.seconds / double((max_points - 1) / 2) + 2.0 / 1024;
      for (int d = 0; d < 2; ++d) {
        const TimelineDevice& device = t.devices[static_cast<size_t>(d)];
        REQUIRE(static_cast<int64_t>(device.points.size()) <= max_points);
        REQUIRE(static_cast<int64_t>(device.points.size()) >= std::min<int64_t>(max_points / 5, 3));
        for (size_t i = 0; i < device.points.size(); ++i) {
          if (i > 0) REQUIRE(device.points[i].seconds >= device.points[i - 1].seconds);
          REQUIRE(seen[d].count(device.points[i].bytes) == 1);
        }
        int64_t most = 0;
        for (size_t i = 0; i < truth[d].size(); i += 1 + truth[d].size() / 500) {
          const State& state = truth[d][i];
          bool above = false, below = false;
          for (const TimelinePoint& p : device.points)
            if (std::abs(p.seconds - state.seconds) <= width) {
              above = above || p.total() >= state.total;
              below = below || p.total() <= state.total;
            }
          REQUIRE(above);
          REQUIRE(below);
        }
        for (const State& state : truth[d]) most = std::max(most, state.total);
        CHECK(device.peak_bytes == most);
        CHECK(std::any_of(device.points.begin(), device.points.end(),
                          [&](const TimelinePoint& p) { return p.total() == most; }));
        CHECK(device.points.back().bytes == bytes_of(ledger.snapshot(), d));
        CHECK(device.points.back().n_tokens == n_tokens);
        CHECK(device.points.back().seconds == t.seconds);
      }
    }
}

TEST_CASE("between far changes a device is shown as it was", "[timeline]") {
  Recorded recorded(64);
  run::Ledger& ledger = recorded.state().ledger;
  const int64_t base = ledger.snapshot().devices[0].bytes_now;
  recorded.clock += 1;
  test::require_ok(ledger.acquire(0, Purpose::kKv, 5000));
  ledger.release(0, Purpose::kKv, 4000);
  recorded.clock += 1000;  // nothing happens
  test::require_ok(ledger.acquire(0, Purpose::kKv, 1));
  const Timeline t = recorded.picture();
  // At any time in the pause the last point at or before it says 1000.
  for (const double at : {100.0, 500.0, 999.0}) {
    const TimelinePoint* last = nullptr;
    for (const TimelinePoint& p : t.devices[0].points)
      if (p.seconds <= at) last = &p;
    REQUIRE(last);
    CHECK(last->total() == base + 1000);
  }
}

TEST_CASE("the recorder's memory is booked, planned and given back", "[timeline]") {
  const Engine engine = new_engine();
  Engine e = engine;
  const MemorySnapshot before = engine.memory();
  CHECK(engine.timeline().status().code() == Code::kState);
  CHECK(e.stop_timeline().code() == Code::kState);
  CHECK(e.start_timeline({15}).code() == Code::kInvalidArgument);
  CHECK(e.start_timeline({2001}).code() == Code::kInvalidArgument);
  test::require_ok(e.start_timeline());
  CHECK(e.start_timeline().code() == Code::kState);
  const MemorySnapshot during = engine.memory();
  const int64_t taken = during.devices[0].bytes_now - before.devices[0].bytes_now;
  CHECK(taken > 100'000);
  CHECK(taken < 260'000);
  CHECK(during.item(0, Purpose::kRuntime).bytes_planned == taken);
  CHECK(during.devices[0].bytes_planned == taken);
  test::require_ok(e.stop_timeline());
  CHECK(engine.memory().devices[0].bytes_now == before.devices[0].bytes_now);
  CHECK(engine.memory().devices[0].bytes_planned == 0);
  test::require_ok(e.start_timeline());  // and again; its end is the engine's

  Result<Engine> small = Engine::create(test::config_of({{"threads", "1"}, {"budget.cpu", "64K"}}));
  if (small.ok()) CHECK(small->start_timeline().code() == Code::kBudget);
}

TEST_CASE("marks are bounded and none goes uncounted", "[timeline]") {
  Recorded recorded(64);
  for (int i = 0; i < 5000; ++i) {
    recorded.clock += 0.01 * (1 + i % 7);
    recorded.state().timeline.mark(i % 3 == 0 ? "spilled" : "truncate", "why", i, 10);
    if (i % 50 == 0)
      recorded.state().timeline.begin(i % 100 == 0 ? TimelinePhase::kPrefill
                                                   : TimelinePhase::kDecode);
  }
  const Timeline t = recorded.picture();
  CHECK(t.marks.size() <= 128);
  CHECK(t.marks.size() >= 32);
  int64_t count = 0, bytes = 0, phases = 0;
  for (const TimelineMark& mark : t.marks) {
    if (mark.kind == "spilled" || mark.kind == "truncate") {
      count += mark.count;
      bytes += mark.bytes;
    } else {
      phases += mark.count;
    }
  }
  CHECK(count == 5000);
  CHECK(bytes == 50000);
  CHECK(phases == 100);
}

TEST_CASE("a whole run: phases, tokens and peaks are those of the engine", "[timeline]") {
  Engine engine = new_engine({{"context.max", "600"}, {"prefill.chunk", "64"}});
  test::require_ok(engine.start_timeline());
  const auto plan = engine.plan(FATHOM_EXAMPLE_MODEL);
  REQUIRE(plan.ok());
  auto model = Model::load(engine, *plan);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  test::require_ok(session.prefill(std::vector<int32_t>(500, 7)));
  for (int i = 0; i < 100; ++i) test::require_ok(session.step(7));
  test::require_ok(session.truncate(30));
  {
    Session other = test::new_session(*model, {.max_tokens = 100});
    test::require_ok(other.prefill(std::vector<int32_t>(20, 7)));
    CHECK(engine.timeline()->devices[0].points.back().n_tokens == 50);
    test::require_ok(session.step(7));  // logits, for the batch
    Session* both[] = {&session, &other};
    const int32_t next[] = {7, 7};
    int reports = 0;
    RunOptions options;
    options.on_step = [&](const StepReport& report) { return reports += report.n_new, true; };
    test::require_ok(Session::step_batch(both, next, options));
    CHECK(reports == 2);
    CHECK(engine.timeline()->devices[0].points.back().n_tokens == 53);
  }
  const auto t = engine.timeline();
  REQUIRE(t.ok());
  const TimelineDevice& device = t->devices[0];
  const MemorySnapshot memory = engine.memory();
  CHECK(device.points.back().n_tokens == 32);
  CHECK(device.points.back().bytes == bytes_of(memory, 0));
  CHECK(device.planned_bytes == memory.devices[0].bytes_planned);
  CHECK(device.planned_bytes == plan->devices[0].peak_bytes() +
                                    memory.item(0, Purpose::kRuntime).bytes_planned -
                                    plan->devices[0].planned(Purpose::kRuntime));
  CHECK(device.peaks[static_cast<size_t>(Purpose::kKv)] == memory.item(0, Purpose::kKv).bytes_peak);
  std::vector<std::string> kinds;
  for (const TimelineMark& mark : t->marks) kinds.push_back(mark.kind);
  CHECK(kinds ==
        std::vector<std::string>{"load", "prefill", "decode", "truncate", "prefill", "decode"});
  int64_t most_tokens = 0;
  for (const TimelinePoint& p : device.points) most_tokens = std::max(most_tokens, p.n_tokens);
  CHECK(most_tokens == 600);
}

TEST_CASE("nothing is allocated while a recorder and a step callback watch", "[timeline]") {
  Engine engine = new_engine({{"context.max", "600"}, {"threads", "1"}});
  test::require_ok(engine.start_timeline());
  const auto plan = engine.plan(FATHOM_EXAMPLE_MODEL);
  auto model = Model::load(engine, *plan);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  test::require_ok(session.prefill(std::vector<int32_t>(100, 7)));
  test::require_ok(session.step(7));
  int64_t seen = 0;
  const StepFunction on_step = [&](const StepReport& report) {
    seen += report.memory.item(0, Purpose::kKv).bytes_now;
    return true;
  };
  REQUIRE(session.state().report(on_step, Phase::kDecode, 1, 0));
  const int64_t before = allocations;
  for (int i = 0; i < 200; ++i) {
    if (!session.step(7).ok()) FAIL("a step failed");
    if (!session.state().report(on_step, Phase::kDecode, 1, 0)) FAIL("a report was refused");
  }
  CHECK(allocations == before);
  CHECK(seen > 0);
}

// What watching costs:  run_timeline_test "watching costs*" -s
TEST_CASE("watching costs less than one percent of decode time", "[timeline]") {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::time_point from) {
    return std::chrono::duration<double>(Clock::now() - from).count();
  };
  Engine engine = new_engine({{"context.max", "4000"}});
  const auto plan = engine.plan(FATHOM_EXAMPLE_MODEL);
  auto model = Model::load(engine, *plan);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  test::require_ok(session.prefill(std::vector<int32_t>(100, 7)));
  double sum = 0;
  const StepFunction on_step = [&](const StepReport& report) {
    return (sum += report.seconds) > 0;
  };
  test::require_ok(engine.start_timeline());
  std::vector<double> steps;
  for (int i = 0; i < 1000; ++i) {
    const auto start = Clock::now();
    test::require_ok(session.step(7));
    steps.push_back(seconds(start));
  }
  // What the recorder and the report do in a step, alone; best of some runs.
  double cost = 1;
  for (int run = 0; run < 20; ++run) {
    const auto start = Clock::now();
    for (int i = 0; i < 1000; ++i) {
      session.state().timeline().begin(TimelinePhase::kDecode);
      session.state().timeline().tokens(1);
      session.state().report(on_step, Phase::kDecode, 1, 1);
    }
    cost = std::min(cost, seconds(start) / 1000);
  }
  session.state().timeline().tokens(-20'000);
  std::nth_element(steps.begin(), steps.begin() + 500, steps.end());
  INFO("a step of the example model " << steps[500] * 1e6 << " us, watching it " << cost * 1e9
                                      << " ns: " << 100 * cost / steps[500] << " percent");
  CHECK(cost < 0.01 * steps[500]);  // a twentieth of the bound, as measured
}

TEST_CASE("recorders start, are read and stop while sessions work on other threads", "[timeline]") {
  const Model model = test::load_model(
      FATHOM_EXAMPLE_MODEL, {{"context.max", "300"}, {"threads", "1"}, {"sessions.max", "2"}});
  Engine engine = model.engine();
  std::atomic<bool> failed{false}, done{false};
  const auto work = [&] {
    for (int round = 0; round < 6; ++round) {
      auto session = Session::create(model);
      for (int i = 0; i < 40 && session.ok(); ++i)
        if (!session->step(7).ok()) failed = true;
      if (!session.ok() || !session->truncate(3).ok()) failed = true;
    }
  };
  std::thread a(work), b([&] {
    work();
    done = true;
  });
  int n_read = 0;
  do {
    if (!engine.start_timeline({64}).ok()) failed = true;
    for (int i = 0; i < 5; ++i) {
      const auto timeline = engine.timeline();
      if (!timeline.ok() || timeline->devices[0].points.empty()) failed = true;
      ++n_read;
    }
    if (!engine.stop_timeline().ok()) failed = true;
  } while (!done);
  a.join();
  b.join();
  CHECK_FALSE(failed);
  CHECK(n_read >= 5);
  test::require_ok(engine.start_timeline());
  CHECK(engine.timeline()->devices[0].points.back().n_tokens == 0);  // every session is gone
}

TEST_CASE("a step callback sees every pass and token, and can stop", "[timeline]") {
  const Model model =
      test::load_model(FATHOM_EXAMPLE_MODEL, {{"context.max", "600"}, {"prefill.chunk", "64"}});
  Session session = test::new_session(model);
  std::vector<int64_t> passes;
  int64_t stop_at = 0;
  RunOptions options;
  options.on_step = [&](const StepReport& report) {
    const MemorySnapshot now = model.engine().memory();
    CHECK(report.n_tokens == session.n_tokens());
    CHECK(report.kv_bytes == session.cache().size_bytes());
    CHECK(report.seconds > 0);
    REQUIRE(report.memory.items.size() == now.items.size());
    for (size_t i = 0; i < now.items.size(); ++i) {
      CHECK(report.memory.items[i].bytes_now == now.items[i].bytes_now);
      CHECK(report.memory.items[i].bytes_peak == now.items[i].bytes_peak);
      CHECK(report.memory.items[i].bytes_planned == now.items[i].bytes_planned);
    }
    passes.push_back(report.phase == Phase::kPrefill ? report.n_new : -report.n_new);
    return report.n_tokens != stop_at;
  };
  const std::vector<int32_t> text(150, 7);
  test::require_ok(session.prefill(text, options));
  CHECK(passes == std::vector<int64_t>{64, 64, 22});
  GenerateOptions generate{.max_new_tokens = 3, .stop_at_eos = false, .run = options};
  REQUIRE(session.generate(generate)->reason == StopReason::kLength);
  CHECK(passes == std::vector<int64_t>{64, 64, 22, -1, -1, -1});
  stop_at = 155;
  CHECK(session.generate(generate)->reason == StopReason::kCallback);
  CHECK(session.n_tokens() == 155);
  stop_at = 155 + 128;
  CHECK(session.prefill(text, options).code() == Code::kCallback);
  CHECK(session.n_tokens() == stop_at);
}

TEST_CASE("the written formats hold what was recorded", "[timeline]") {
  Recorded recorded(200, "cpu:0,cpu:1");
  run::Ledger& ledger = recorded.state().ledger;
  for (int i = 0; i < 100; ++i) {
    recorded.clock += 0.5;
    test::require_ok(ledger.acquire(i % 2, Purpose::kKv, 1'000'000));
    recorded.state().timeline.begin(TimelinePhase::kDecode);
    recorded.state().timeline.tokens(3);
  }
  recorded.state().timeline.mark("spilled", "</script> & \"quotes\" <b>", 1, 2);
  const Timeline t = recorded.picture();
  const auto json = nlohmann::json::parse(t.to_json());
  REQUIRE(json["devices"].size() == 2);
  CHECK(json["devices"][1]["peak_bytes"] == t.devices[1].peak_bytes);
  REQUIRE(json["devices"][0]["points"].size() == t.devices[0].points.size());
  for (size_t i = 0; i < t.devices[0].points.size(); ++i) {
    const auto& row = json["devices"][0]["points"][i];
    CHECK(row.size() == 3 + kPurposeCount);
    CHECK(row[1] == t.devices[0].points[i].n_tokens);
    CHECK(row[3 + static_cast<size_t>(Purpose::kKv)] ==
          t.devices[0].points[i].bytes[static_cast<size_t>(Purpose::kKv)]);
  }
  CHECK(json["marks"].back()["text"] == t.marks.back().text);

  const std::string csv = t.to_csv();
  CHECK(std::count(csv.begin(), csv.end(), '\n') ==
        1 + static_cast<int64_t>(t.devices[0].points.size() + t.devices[1].points.size()));

  const std::string svg = t.to_svg(), html = t.to_html();
  for (const std::string* text : {&svg, &html}) {
    CHECK(text->find("</script> &") == std::string::npos);
    CHECK(text->find(t.summary()) != std::string::npos);
    CHECK(text->find("://") == text->find("://www.w3.org/2000/svg"));  // nothing from elsewhere
  }
  // The page's data is the JSON.
  const size_t begin = html.find("id=\"data\">") + 10, end = html.find("</script>", begin);
  CHECK(nlohmann::json::parse(html.substr(begin, end - begin)) == json);

  CHECK(timeline_format_of("a/b.html").value() == TimelineFormat::kHtml);
  CHECK(timeline_format_of("x.y.csv").value() == TimelineFormat::kCsv);
  for (const char* path : {"a", "a.b/c", "a.HTML ", "", "a."})
    CHECK(timeline_format_of(path).status().code() == Code::kInvalidArgument);
}

}  // namespace
}  // namespace fathom
