// Long texts under budgets that hold a fraction of them, processes that are killed, and the limits
// of the operating system.
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include <algorithm>
#include <fstream>
#include <optional>

#include "lib/io/spill_file.h"
#include "support/spill.h"

namespace fathom {
namespace {

const std::string kTrained = FATHOM_EXAMPLE_MODEL;

// Settings for a context whose budget holds a quarter of the cache at 16 bits.
test::Settings quarter(int64_t context, const std::string& ladder, const std::string& folder) {
  test::Settings settings{{"context.max", std::to_string(context)}, {"kv.type", "f16"}};
  auto engine = Engine::create();
  REQUIRE(engine.ok());
  auto plan = engine->plan(kTrained, test::config_of(settings));
  REQUIRE(plan.ok());
  settings.insert(settings.end(),
                  {{"kv.tiers", "device,file"},
                   {"kv.ladder", ladder},
                   {"kv.ladder_type", "q4_0"},
                   {"kv.spill_folder", folder},
                   {"budget.cpu", std::to_string(plan->devices[0].peak_bytes() -
                                                 plan->devices[0].planned(Purpose::kKv) * 3 / 4)}});
  return settings;
}

int64_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

int64_t data_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmData:", 0) == 0) return std::stoll(line.substr(7)) * 1024;
  return -1;
}

// Runs body() in a child; its answer becomes the exit code.  -1 - signal when it was killed.
template <class Body>
int in_child(Body&& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1 - WTERMSIG(status);
}

TEST_CASE("a spill file has no name, holds what was written, and reports a full disk", "[spill]") {
  using io::SpillFile;
  for (const auto naming : {SpillFile::Naming::kNameless, SpillFile::Naming::kUnlinked}) {
    test::TemporaryFolder folder("file");
    auto file = SpillFile::create(folder.path(), false, naming);
    INFO(file.status().message());
    REQUIRE(file.ok());
    CHECK(folder.n_entries() == 0);
    std::vector<std::byte> bytes(100000), back(100000);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 31 >> 3);
    test::require_ok(file->write(1 << 20, bytes));
    test::require_ok(file->read(1 << 20, back));
    CHECK(bytes == back);
    file->read_ahead(1 << 20, 100000);
    file->discard(1 << 20, 100000);
    const Status beyond = file->read(1 << 30, back);
    CHECK(beyond.code() == Code::kIo);

    // A file size limit is a full disk as far as a writer can tell.
    rlimit before{};
    getrlimit(RLIMIT_FSIZE, &before);
    rlimit low = before;
    low.rlim_cur = 4096;
    const auto handler = signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &low);
    const Status full = file->write(8192, bytes);
    setrlimit(RLIMIT_FSIZE, &before);
    signal(SIGXFSZ, handler);
    CHECK(full.code() == Code::kIo);
    CHECK(full.sys_errno() == EFBIG);
    CHECK(std::string(full.message()).find(folder.path()) != std::string::npos);
  }
  const auto missing = SpillFile::create("/nonexistent/folder");
  CHECK(missing.status().code() == Code::kNotFound);
  CHECK(missing.status().key() == "kv.spill_folder");
}

TEST_CASE("a spill folder in memory is refused, unless it is allowed", "[spill]") {
  const std::string folder = "/dev/shm";
  if (!io::lies_in_memory(folder)) {
    WARN("skipped: no tmpfs at " << folder);
    return;
  }
  CHECK_FALSE(io::lies_in_memory("/nonexistent/folder"));
  CHECK_FALSE(io::lies_in_memory("/proc"));
  const auto refused = io::SpillFile::create(folder);
  CHECK(refused.status().code() == Code::kConfig);
  CHECK(refused.status().key() == "kv.spill_folder");
  CHECK(io::SpillFile::create(folder, true).ok());

  test::Settings settings{{"kv.tiers", "device,file"}, {"kv.spill_folder", folder}};
  auto engine = Engine::create();
  REQUIRE(engine.ok());
  const auto plan = engine->plan(kTrained, test::config_of(settings));
  REQUIRE_FALSE(plan.ok());
  CHECK(plan.status().code() == Code::kConfig);
  for (const char* part : {"/dev/shm", "tmpfs", "kv.spill_tmpfs=allow"})
    CHECK_THAT(std::string(plan.status().message()), Catch::Contains(part));
  settings.push_back({"kv.spill_tmpfs", "allow"});
  const auto allowed = engine->plan(kTrained, test::config_of(settings));
  REQUIRE(allowed.ok());
  CHECK(std::any_of(allowed->remarks.begin(), allowed->remarks.end(), [](const std::string& text) {
    return text.find("/dev/shm lies in memory") != std::string::npos;
  }));
  // Without the file tier nothing is kept there.
  CHECK(engine->plan(kTrained, test::config_of({{"kv.spill_folder", folder}})).ok());
}

TEST_CASE("what a killed process left is removed by the next one, what a living one holds is not",
          "[spill]") {
  test::TemporaryFolder folder("left");
  const std::string dead = folder.path() + "/.fathom-spill.1.0",
                    alive = folder.path() + "/.fathom-spill.1.1";
  std::ofstream(dead) << "x";
  std::ofstream(alive) << "x";
  std::ofstream(folder.path() + "/a_file_of_somebody") << "x";
  const int fd = open(alive.c_str(), O_RDWR);
  REQUIRE(flock(fd, LOCK_EX) == 0);
  REQUIRE(io::SpillFile::create(folder.path()).ok());
  CHECK(access(dead.c_str(), F_OK) != 0);
  CHECK(access(alive.c_str(), F_OK) == 0);
  CHECK(folder.n_entries() == 2);
  close(fd);
}

TEST_CASE("kill -9 during a spilling run leaves nothing in the folder", "[spill]") {
  test::TemporaryFolder folder("killed");
  int ready[2];
  REQUIRE(pipe(ready) == 0);
  const pid_t child = fork();
  if (child == 0) {
    auto model = Model::load(kTrained, test::config_of({{"context.max", "4000"},
                                                        {"kv.page_tokens", "64"},
                                                        {"prefill.chunk", "64"},
                                                        {"kv.tiers", "device,file"},
                                                        {"kv.spill_folder", folder.path()}}));
    if (!model.ok()) _exit(1);
    auto session = Session::create(*model);
    Engine engine = model->engine();
    if (!session.ok() || !session->prefill(test::long_text(500)).ok() ||
        !engine.set_budget(0, engine.memory().devices[0].bytes_now).ok())
      _exit(2);
    while (session->prefill(test::long_text(64)).ok())
      if (session->cache().bytes_in(KvTier::kFile) > 0 && write(ready[1], "x", 1) != 1) _exit(3);
    _exit(4);
  }
  close(ready[1]);
  char byte = 0;
  REQUIRE(read(ready[0], &byte, 1) == 1);  // it spills, and goes on
  kill(child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
  close(ready[0]);
  CHECK(WIFSIGNALED(status));
  REQUIRE(io::SpillFile::create(folder.path()).ok());  // the next start
  CHECK(folder.n_entries() == 0);
}

TEST_CASE("under RLIMIT_DATA at the plan and a tenth the process survives everything", "[spill]") {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  WARN("skipped: sanitizers map memory of their own");
  return;
#endif
  test::TemporaryFolder folder("limit");
  const int code = in_child([&]() -> int {
    const test::Settings settings{{"context.max", "4096"},
                                  {"kv.page_tokens", "64"},
                                  {"kv.tiers", "device,file"},
                                  {"kv.spill_folder", folder.path()},
                                  {"threads", "1"},
                                  {"sessions.max", "1"}};
    auto engine = Engine::create(test::config_of(settings));
    if (!engine.ok()) return 1;
    auto plan = engine->plan(kTrained);
    if (!plan.ok() || !plan->feasible) return 2;
    const auto text = test::long_text(4096);
    const int64_t peak = plan->devices[0].peak_bytes();
    const rlimit limit{static_cast<rlim_t>(data_bytes() + peak + peak / 10),
                       static_cast<rlim_t>(data_bytes() + peak + peak / 10)};
    if (setrlimit(RLIMIT_DATA, &limit) != 0) return 3;
    auto model = Model::load(*engine, *plan);
    if (!model.ok()) return 4;
    auto session = Session::create(*model);
    if (!session.ok()) return 5;
    if (!session->prefill(std::span(text).first(4000)).ok()) return 6;
    // More than was planned: the system refuses, the ladder moves pages, and nobody dies.
    std::vector<Session> more;
    Code last = Code::kOk;
    for (int i = 0; i < 8 && last == Code::kOk; ++i) {
      auto another = Session::create(*model);
      last = another.status().code();
      if (!another.ok()) break;
      const Status read = another->prefill(std::span(text).first(3000));
      last = read.code();
      more.push_back(std::move(another).value());
    }
    if (last != Code::kMemory && last != Code::kContextFull) return 7;
    more.clear();
    if (!session->step(1).ok()) return 8;
    if (!session->truncate(100).ok()) return 9;
    if (!session->prefill(std::span(text).first(300)).ok()) return 10;
    GenerateOptions options;
    options.max_new_tokens = 20;
    options.stop_at_eos = false;
    if (auto result = session->generate(options); !result.ok() || result->tokens.size() != 20)
      return 11;
    const std::string path = folder.path() + "/kept";
    if (!session->save(path).ok()) return 12;
    // A second one beside it may find no room; it is told so.
    if (auto again = Session::restore(*model, path); !again.ok())
      if (again.status().code() != Code::kMemory) return 13;
    { const Session gone = std::move(*session); }
    auto again = Session::restore(*model, path);
    if (!again.ok() || again->n_tokens() != 420 || !again->step(1).ok()) return 14;
    return 0;
  });
  CHECK(code == 0);
}

void generate_under_a_quarter(const char* ladder) {
  test::TemporaryFolder folder("generate");
  const Model model = test::load_model(kTrained, quarter(16600, ladder, folder.path()));
  CHECK(model.plan().by_ladder);
  Session session = test::new_session(model);
  test::require_ok(session.prefill(test::long_text(100)));
  GenerateOptions options;
  options.max_new_tokens = 16384;
  options.stop_at_eos = false;
  options.sampling.temperature = 0.8f;
  options.sampling.seed = 7;
  auto result = session.generate(options);
  INFO(ladder << ": " << result.status().message());
  REQUIRE(result.ok());
  INFO(result->status.message());
  CHECK(result->reason == StopReason::kLength);
  CHECK(session.n_tokens() == 16484);
  CHECK(test::count_events(session, "spilled_to_file") >= 1);
  const DeviceMemory memory = model.engine().memory().devices[0];
  CHECK(memory.bytes_peak <= model.plan().devices[0].peak_bytes());
  CHECK(memory.bytes_peak <= memory.budget_bytes);
  const int64_t resident = resident_bytes(), held = session.cache().size_bytes();
  test::require_ok(session.truncate(100));
  const int64_t page = model.plan().devices[0].kv_page_bytes;
  CHECK(resident - resident_bytes() >= held - session.cache().size_bytes() - 2 * page);
  CHECK(session.cache().bytes_in(KvTier::kFile) <= page);  // the one that holds the beginning
}

TEST_CASE("16,384 generated tokens under a quarter of their cache, by the ladder",
          "[spill][slow]") {
  generate_under_a_quarter("chunk,requantise,file");
}

TEST_CASE("16,384 generated tokens under a quarter of their cache, the rest in the file",
          "[.deep]") {
  generate_under_a_quarter("file");
}

TEST_CASE("16,384 tokens whose budget and disk end: full, saved, truncated, gone on",
          "[spill][slow]") {
  test::TemporaryFolder folder("ends");
  test::Settings settings = quarter(16600, "chunk,requantise", folder.path());
  settings.push_back({"context.max", "16600"});
  auto engine = Engine::create(test::config_of(settings));
  REQUIRE(engine.ok());
  // What requantising alone can hold: the plan says how much, and so does the run.
  auto plan = engine->plan(kTrained);
  REQUIRE(plan.ok());
  CHECK_FALSE(plan->feasible);
  CHECK(plan->max_context_feasible > plan->max_context_resident);
  Config config = test::config_of(settings);
  test::require_ok(config.set("context.max", std::to_string(plan->max_context_feasible)));
  auto fits = engine->plan(kTrained, config);
  REQUIRE(fits.ok());
  REQUIRE(fits->feasible);
  auto model = Model::load(*engine, *fits);
  REQUIRE(model.ok());
  Session session = test::new_session(*model);
  const auto text = test::long_text(fits->max_context);
  test::require_ok(session.prefill(text));
  CHECK(engine->memory().devices[0].bytes_peak <= fits->devices[0].peak_bytes());
  test::require_ok(session.truncate(session.n_tokens() - 64));
  test::require_ok(session.step(5));  // truncated, it has no logits to go on from

  test::require_ok(engine->set_host_budget(engine->memory().host_bytes_now));
  GenerateOptions options;
  options.stop_at_eos = false;
  auto result = session.generate(options);
  REQUIRE(result.ok());
  CHECK(result->reason == StopReason::kContextFull);
  const std::string path = folder.path() + "/kept";
  test::require_ok(session.save(path));
  test::require_ok(session.truncate(5000));
  options.max_new_tokens = 200;
  test::require_ok(session.step(5));
  result = session.generate(options);
  REQUIRE(result.ok());
  CHECK(result->tokens.size() == 200);
}

// Every row of a long text must still be what it was when it was written.
uint64_t row_sum(const Session& session, int64_t row) {
  const KvRows rows = session.cache().rows(0, 0, row, 1);
  const KvPage& page = rows.pages[row / rows.layout.page_tokens];
  const auto* data = static_cast<const unsigned char*>(page.data) +
                     row % rows.layout.page_tokens * rows.layout.latent_row_bytes(page.type);
  uint64_t sum = reinterpret_cast<uintptr_t>(data);
  for (int64_t i = 0; i < rows.layout.latent_row_bytes(page.type); ++i) sum = sum * 31 + data[i];
  return sum;
}

TEST_CASE("160 K tokens of growth move no row", "[.deep]") {
  const Model model = test::load_model(kTrained, {{"context.max", "163840"}});
  Session session = test::new_session(model);
  const auto text = test::long_text(163840);
  std::vector<uint64_t> sums;
  // What is held beside the cache is at every length what it was at the first.
  std::optional<int64_t> beside;
  const auto check_peak = [&] {
    const MemorySnapshot memory = model.engine().memory();
    const int64_t now = memory.devices[0].bytes_peak - memory.item(0, Purpose::kKv).bytes_peak;
    CHECK(now == beside.value_or(now));
    CHECK(memory.item(0, Purpose::kKv).bytes_peak == session.cache().size_bytes());
    beside = now;
  };
  Engine(model.engine()).reset_peaks();
  for (int64_t at = 0; at < 163840; at += 4096) {
    test::require_ok(session.prefill(std::span(text).subspan(static_cast<size_t>(at), 4096)));
    check_peak();
    if (at % 8192 == 4096) sums.push_back(row_sum(session, at - 4096 + 17));
    for (size_t i = 0; i < sums.size(); ++i)
      CHECK(row_sum(session, static_cast<int64_t>(i) * 8192 + 17) == sums[i]);
  }
  const int64_t resident = resident_bytes(), held = session.cache().size_bytes();
  test::require_ok(session.truncate(1000));
  CHECK(resident - resident_bytes() >=
        held - session.cache().size_bytes() - 2 * model.plan().devices[0].kv_page_bytes);
}

TEST_CASE("prefill of 163,840 tokens under a quarter of their cache, by the ladder", "[.deep]") {
  test::TemporaryFolder folder("prefill");
  const Model model =
      test::load_model(kTrained, quarter(163840, "chunk,requantise,file", folder.path()));
  CHECK(model.plan().by_ladder);
  Session session = test::new_session(model);
  test::require_ok(session.prefill(test::long_text(163840)));
  CHECK(session.n_tokens() == 163840);
  CHECK(session.cache().bytes_in(KvTier::kFile) > 0);
  const DeviceMemory memory = model.engine().memory().devices[0];
  CHECK(memory.bytes_peak <= model.plan().devices[0].peak_bytes());
}

TEST_CASE("a session of 100,000 tokens with moved pages is restored with the same bits",
          "[.deep]") {
  test::TemporaryFolder folder("restore");
  const std::string path = folder.path() + "/session";
  const test::Settings settings = quarter(100100, "file", folder.path());
  std::vector<float> expected;
  {
    const Model model = test::load_model(kTrained, settings);
    Session session = test::new_session(model);
    test::require_ok(session.prefill(test::long_text(100000)));
    CHECK(session.cache().bytes_in(KvTier::kFile) > 0);
    test::require_ok(session.save(path));
    for (const int32_t id : {4, 5, 6}) test::require_ok(session.step(id));
    expected.assign(session.logits().begin(), session.logits().end());
  }
  const Model model = test::load_model(kTrained, settings);
  auto restored = Session::restore(model, path);
  INFO(restored.status().message());
  REQUIRE(restored.ok());
  CHECK(restored->cache().bytes_in(KvTier::kFile) > 0);
  for (const int32_t id : {4, 5, 6}) test::require_ok(restored->step(id));
  CHECK(test::first_bit_difference(expected, restored->logits()).index == -1);
}

}  // namespace
}  // namespace fathom
