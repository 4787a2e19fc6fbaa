// Saved sessions: restored they continue with the same bits; damaged they are refused; and whatever
// happens while one is written, the old file or the new one is there.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "lib/io/hash128.h"
#include "lib/run/session_file.h"
#include "lib/run/session_file_format.h"
#include "support/golden.h"
#include "support/loaded_model.h"

namespace fathom {
namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<std::byte>;

const std::string kLite = test::test_data("models/tiny-v2-lite");

std::vector<int32_t> some_tokens(int64_t n, uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % 512);
  return ids;
}

Model lite(test::Settings settings = {}) {
  settings.insert(settings.begin(), {{"prefill.chunk", "64"}, {"context.max", "2048"}});
  return test::load_model(kLite, settings);
}

Session filled(const Model& model, int64_t n_tokens, uint32_t seed = 1) {
  Session session = test::new_session(model);
  test::require_ok(session.prefill(some_tokens(n_tokens, seed)));
  return session;
}

Bytes saved(const Session& session) {
  Bytes bytes;
  test::require_ok(session.save_to([&](std::span<const std::byte> piece) {
    bytes.insert(bytes.end(), piece.begin(), piece.end());
    return Status();
  }));
  return bytes;
}

Result<Session> restored(const Model& model, const Bytes& bytes, const SessionOptions& options = {},
                         run::Checksums checksums = run::Checksums::kVerified,
                         const RunOptions& run = {}) {
  const ReadFunction read = [&](int64_t offset, std::span<std::byte> out) {
    if (!out.empty()) std::memcpy(out.data(), bytes.data() + offset, out.size());
    return Status();
  };
  return run::read_session(model, read, static_cast<int64_t>(bytes.size()), options, run,
                           checksums);
}

void check_same_future(Session& a, Session& b, int n_steps) {
  REQUIRE(a.n_tokens() == b.n_tokens());
  REQUIRE(std::equal(a.tokens().begin(), a.tokens().end(), b.tokens().begin()));
  REQUIRE(a.logits().size() == b.logits().size());
  CHECK(test::first_bit_difference(a.logits(), b.logits()).index == -1);
  for (int i = 0; i < n_steps; ++i) {
    test::require_ok(a.step(3 * i + 1));
    test::require_ok(b.step(3 * i + 1));
    INFO("step " << i);
    REQUIRE(test::first_bit_difference(a.logits(), b.logits()).index == -1);
  }
}

struct Folder {
  Folder() {
    std::string name = (fs::temp_directory_path() / "fathom-session-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
  std::string file(const std::string& name = "chat.session") const {
    return (path / name).string();
  }
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& entry : fs::directory_iterator(path)) all.push_back(entry.path().filename());
    std::sort(all.begin(), all.end());
    return all;
  }
  fs::path path;
};

void put_file(const std::string& path, const Bytes& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

std::vector<int64_t> held(const Model& model) {
  std::vector<int64_t> bytes;
  for (const MemoryItem& item : model.engine().memory().items) bytes.push_back(item.bytes_now);
  return bytes;
}

// ---- round trips ----

TEST_CASE("a restored session continues with the same bits", "[session_file]") {
  const std::vector<test::Settings> all = {
      {{"kv.type", "f32"}},
      {{"kv.type", "bf16"}},
      {{"kv.type", "f16"}},
      {{"kv.type", "fp8"}},
      {{"kv.type", "q8_0"}},
      {{"kv.type", "q4_0"}},
      {{"kv.type", "q8_0"}, {"kv.recent_16bit", "64"}, {"kv.first_16bit", "16"}}};
  for (const test::Settings& kv : all)
    for (const int64_t n : {1, 16, 150}) {
      test::Settings settings = kv;
      settings.push_back({"kv.page_tokens", "16"});
      const Model model = lite(settings);
      Session session = filled(model, n);
      Result<Session> again = restored(model, saved(session));
      INFO(kv[0].second << (kv.size() > 1 ? " mixed, " : ", ") << n
                        << " tokens: " << again.status().message());
      REQUIRE(again.ok());
      CHECK(again->cache().size_bytes() == session.cache().size_bytes());
      CHECK(saved(*again) == saved(session));
      check_same_future(session, *again, 60);
    }
}

TEST_CASE("page size, devices and threads may differ after restoring", "[session_file]") {
  const Model model = lite({{"kv.page_tokens", "32"}});
  Session session = filled(model, 150);
  const Bytes bytes = saved(session);
  for (const test::Settings& settings : std::vector<test::Settings>{
           {{"kv.page_tokens", "16"}}, {{"kv.page_tokens", "128"}}, {{"threads", "2"}}}) {
    const Model other = lite(settings);
    Result<Session> again = restored(other, bytes);
    INFO(settings[0].first << "=" << settings[0].second << ": " << again.status().message());
    REQUIRE(again.ok());
    Session here = filled(model, 150);
    check_same_future(here, *again, 5);
  }
}

TEST_CASE("empty and truncated sessions are saved without logits", "[session_file]") {
  const Model model = lite();
  Session empty = test::new_session(model);
  Result<Session> again = restored(model, saved(empty));
  REQUIRE(again.ok());
  CHECK(again->n_tokens() == 0);
  CHECK(again->logits().empty());
  test::require_ok(again->prefill(some_tokens(20)));
  Session fresh = filled(model, 20);
  check_same_future(fresh, *again, 3);

  Session cut = filled(model, 100);
  test::require_ok(cut.truncate(70));
  again = restored(model, saved(cut));
  REQUIRE(again.ok());
  CHECK(again->n_tokens() == 70);
  CHECK(again->logits().empty());
  check_same_future(cut, *again, 3);
}

TEST_CASE("20,000 tokens are saved and restored in constant memory", "[session_file][slow]") {
  const Model model = lite({{"context.max", "20100"}, {"prefill.chunk", "512"}});
  Session session = filled(model, 20000);
  const Folder folder;
  test::require_ok(session.save(folder.file()));
  Result<Session> again = Session::restore(model, folder.file());
  REQUIRE(again.ok());
  check_same_future(session, *again, 3);
}

// ---- what is refused ----

TEST_CASE("every prefix and every flipped byte is refused, and nothing is left behind",
          "[session_file]") {
  const Model model = lite({{"prefill.chunk", "16"}, {"kv.page_tokens", "16"}});
  const Bytes good = saved(filled(model, 3));
  const std::vector<int64_t> before = held(model);
  REQUIRE(restored(model, good).ok());
  for (size_t n = 0; n < good.size(); ++n) {
    const Result<Session> cut = restored(model, Bytes(good.begin(), good.begin() + n));
    INFO("cut after " << n);
    REQUIRE(!cut.ok());
    REQUIRE(cut.status().code() == Code::kFormat);
  }
  for (size_t n = 0; n < good.size(); ++n) {
    Bytes bad = good;
    bad[n] ^= static_cast<std::byte>(1u << (n % 8));
    const Result<Session> flipped = restored(model, bad);
    INFO("byte " << n << " flipped: " << flipped.status().message());
    REQUIRE(!flipped.ok());
    if (n < 8)
      REQUIRE(flipped.status().code() == Code::kFormat);
    else if (n >= 12)
      REQUIRE(flipped.status().code() == Code::kChecksum);
  }
  Bytes longer = good;
  longer.push_back(std::byte{0});
  CHECK(restored(model, longer).status().code() == Code::kFormat);
  CHECK(held(model) == before);
}

TEST_CASE("lengths that lie are refused with and without checksums", "[session_file]") {
  const Model model = lite({{"prefill.chunk", "16"}, {"kv.page_tokens", "16"}});
  const Bytes good = saved(filled(model, 40));
  const std::vector<int64_t> before = held(model);
  for (int64_t at = 12; at < run::kSessionHeaderBytes; at += at == 12 ? 4 : 8)
    for (const uint64_t value :
         {uint64_t{0}, uint64_t{1}, uint64_t{15}, uint64_t{41}, uint64_t{512}, uint64_t{1} << 24,
          uint64_t{1} << 31, uint64_t{1} << 40, uint64_t{1} << 62, uint64_t{1} << 63,
          ~uint64_t{0}}) {
      Bytes bad = good;
      std::memcpy(bad.data() + at, &value, at == 12 ? 4 : 8);
      io::Hash128 hash;
      hash.update({bad.data(), static_cast<size_t>(run::kSessionHeaderBytes)});
      const auto digest = hash.digest();
      std::memcpy(bad.data() + run::kSessionHeaderBytes, &digest, 16);
      if (std::memcmp(bad.data(), good.data(), static_cast<size_t>(run::kSessionHeaderBytes)) == 0)
        continue;
      INFO("field at " << at << " = " << value);
      CHECK(!restored(model, bad).ok());
      const Result<Session> unchecked = restored(model, bad, {}, run::Checksums::kIgnored);
      INFO(unchecked.status().message());
      CHECK(!unchecked.ok());
    }
  // A token that the vocabulary lacks.
  Bytes bad = good;
  const int32_t id = 512;
  std::memcpy(bad.data() + run::kSessionHeaderBytes + run::kDigestBytes + 8, &id, 4);
  const Result<Session> unchecked = restored(model, bad, {}, run::Checksums::kIgnored);
  REQUIRE(unchecked.status().code() == Code::kFormat);
  CHECK(unchecked.status().key() == "tokens");
  CHECK(unchecked.status().offset() ==
        static_cast<uint64_t>(run::kSessionHeaderBytes + run::kDigestBytes + 8));
  CHECK(held(model) == before);
}

TEST_CASE("a newer version, another model, another cache type, too little room", "[session_file]") {
  const Model model = lite({{"kv.type", "f16"}});
  const Bytes good = saved(filled(model, 100));
  Bytes newer = good;
  newer[8] = std::byte{2};
  CHECK(restored(model, newer).status().code() == Code::kVersion);

  const Status v3 =
      restored(test::load_model(test::test_data("models/tiny-v3")), good).status().clone();
  CHECK(v3.code() == Code::kMismatch);
  CHECK(v3.key() == "kv_lora_rank");
  CHECK(v3.message().find("44") != std::string_view::npos);
  CHECK(v3.message().find("52") != std::string_view::npos);
  const Model quantised = lite({{"kv.type", "q8_0"}});
  const Status type = restored(quantised, good).status().clone();
  CHECK(type.code() == Code::kMismatch);
  CHECK(type.key() == "kv.type");
  CHECK(type.message().find("f16") != std::string_view::npos);
  CHECK(type.message().find("q8_0") != std::string_view::npos);

  SessionOptions few;
  few.max_tokens = 99;
  CHECK(restored(model, good, few).status().code() == Code::kContextFull);
  few.max_tokens = 100;
  CHECK(restored(model, good, few).ok());

  Engine engine = model.engine();
  const std::vector<int64_t> before = held(model);
  test::require_ok(engine.set_budget(0, engine.memory().devices[0].bytes_now + 4096));
  const Status budget = restored(model, good).status().clone();
  CHECK(budget.code() == Code::kBudget);
  CHECK(budget.bytes_needed() > 0);
  CHECK(held(model) == before);
}

TEST_CASE("refused growth at every point of a restore leaves nothing", "[session_file]") {
  int64_t allowed = INT64_MAX;
  HostHooks hooks;
  hooks.memory = [&](int, Purpose, int64_t delta, int64_t) { return delta <= 0 || allowed-- > 0; };
  const Config config = test::config_of({{"kv.page_tokens", "16"}, {"prefill.chunk", "16"}});
  Engine engine = std::move(Engine::create(config, hooks)).value();
  const Plan plan = std::move(engine.plan(kLite)).value();
  const Model model = std::move(Model::load(engine, plan)).value();
  const Bytes good = saved(filled(model, 60));
  const std::vector<int64_t> before = held(model);
  int refused = 0;
  for (int64_t n = 0;; ++n) {
    allowed = n;
    Result<Session> session = restored(model, good);
    if (session.ok()) break;
    ++refused;
    CHECK(session.status().code() == Code::kCallback);
    CHECK(held(model) == before);
  }
  CHECK(refused >= 6);  // scratch, tables, four pages
}

TEST_CASE("host functions, progress and cancellation", "[session_file]") {
  const Model model = lite();
  const Session session = filled(model, 600);  // several buffers
  const Bytes good = saved(session);
  const size_t n_writes = (good.size() + 65535) / 65536;
  REQUIRE(n_writes >= 3);
  for (size_t failing = 0; failing < n_writes; ++failing) {
    size_t n = 0;
    const Status status = session.save_to([&](std::span<const std::byte> piece) {
      CHECK(piece.size() <= 65536);
      return n++ == failing ? Status(Code::kIo, "no space").with_errno(ENOSPC) : Status();
    });
    CHECK(status.code() == Code::kIo);
    CHECK(status.sys_errno() == ENOSPC);
    CHECK(n == failing + 1);
  }
  int64_t last = -1, ticks = 0;
  RunOptions options;
  options.progress = [&](ProgressPhase phase, int64_t done, int64_t total) {
    CHECK((phase == ProgressPhase::kSave || phase == ProgressPhase::kRestore));
    CHECK(total == static_cast<int64_t>(good.size()));
    CHECK(done > last);
    last = done;
    return ++ticks != 0;
  };
  test::require_ok(session.save_to([](std::span<const std::byte>) { return Status(); }, options));
  CHECK(last == static_cast<int64_t>(good.size()));
  last = -1;
  CHECK(restored(model, good, {}, run::Checksums::kVerified, options).ok());
  CHECK(last == static_cast<int64_t>(good.size()));

  const Folder folder;
  const Bytes old(100, std::byte{7});
  put_file(folder.file(), old);
  for (int64_t stop = 0; stop < ticks / 2; ++stop) {
    int64_t tick = 0;
    options.progress = [&](ProgressPhase, int64_t, int64_t) { return tick++ != stop; };
    CHECK(session.save(folder.file(), options).code() == Code::kCancelled);
    tick = 0;
    CHECK(restored(model, good, {}, run::Checksums::kVerified, options).status().code() ==
          Code::kCancelled);
  }
  CHECK(test::read_file(folder.file()) == old);
  CHECK(folder.names().size() == 1);
}

// ---- files ----

TEST_CASE("links, folders, devices and places that cannot be written", "[session_file]") {
  const Model model = lite();
  const Session session = filled(model, 30);
  const Folder folder;
  const Bytes precious(10, std::byte{9});
  put_file(folder.file("precious"), precious);
  fs::create_symlink("precious", folder.path / "link");
  fs::create_symlink("nowhere", folder.path / "dangling");
  fs::create_directory(folder.path / "folder");
  for (const std::string& path :
       {folder.file("link"), folder.file("dangling"), folder.file("folder"),
        std::string("/dev/full"), std::string(), folder.file("folder") + "/"}) {
    INFO(path);
    CHECK(session.save(path).code() == Code::kInvalidArgument);
  }
  CHECK(test::read_file(folder.file("precious")) == precious);
  CHECK(folder.names().size() == 4);
  CHECK(session.save(folder.file("no/such")).code() == Code::kNotFound);
  CHECK(session.save(folder.file("precious/x")).code() == Code::kNotFound);
  const Status proc = session.save("/proc/chat.session");  // refused to root too
  CHECK(proc.code() == Code::kIo);
  CHECK(proc.sys_errno() != 0);
  CHECK(Session::restore(model, folder.file("absent")).status().code() == Code::kNotFound);
  CHECK(Session::restore(model, folder.file("folder")).status().code() == Code::kFormat);

  const int full = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  REQUIRE(full >= 0);
  const Status status = session.save_to([&](std::span<const std::byte> piece) {
    return ::write(full, piece.data(), piece.size()) < 0
               ? Status(Code::kIo, "full").with_errno(errno)
               : Status();
  });
  ::close(full);
  CHECK(status.sys_errno() == ENOSPC);

  test::require_ok(session.save(folder.file()));
  struct stat info {};
  REQUIRE(::stat(folder.file().c_str(), &info) == 0);
  CHECK((info.st_mode & 0777) == 0600);
  CHECK(test::read_file(folder.file()) == saved(session));
}

// Fails, shortens, interrupts or dies at the n-th call that changes a file.
struct Faults : io::FileCalls {
  enum Kind { kNone, kError, kDieBefore, kDieAfter } kind = kNone;
  int at = -1, error = EIO, n_calls = 0;
  bool interrupt = false;  // every second call answers EINTR
  size_t most = SIZE_MAX;  // bytes that one write takes
  bool lock_failed = false;

  template <class Call>
  auto faulty(Call&& call) noexcept -> decltype(call()) {
    if (interrupt && n_calls++ % 2 == 0) {
      errno = EINTR;
      return -1;
    }
    const bool here = !interrupt && n_calls++ == at;
    if (here && kind == kError) {
      errno = error;
      return -1;
    }
    if (here && kind == kDieBefore) ::kill(::getpid(), SIGKILL);
    const auto answer = call();
    if (here && kind == kDieAfter) ::kill(::getpid(), SIGKILL);
    return answer;
  }
  int open_at(int dir, const char* name, int flags, mode_t mode) noexcept override {
    return faulty([&] { return FileCalls::open_at(dir, name, flags, mode); });
  }
  int lock(int fd) noexcept override {
    if (n_calls == at && !interrupt) lock_failed = true;
    return faulty([&] { return FileCalls::lock(fd); });
  }
  ssize_t write(int fd, const void* data, size_t bytes) noexcept override {
    return faulty([&] { return FileCalls::write(fd, data, std::min(bytes, most)); });
  }
  int sync(int fd) noexcept override {
    return faulty([&] { return FileCalls::sync(fd); });
  }
  int rename_at(int dir, const char* from, const char* to) noexcept override {
    return faulty([&] { return FileCalls::rename_at(dir, from, to); });
  }
};

Status save_with(Session& session, const std::string& path, io::FileCalls& calls) {
  return run::save_session(session.state(), path, {}, calls);
}

TEST_CASE("a failing system call leaves the old file and no other", "[session_file]") {
  const Model model = lite();
  Session session = filled(model, 300);
  const Bytes fresh = saved(session), old(100, std::byte{7});
  Faults counting;
  const Folder folder;
  test::require_ok(save_with(session, folder.file(), counting));
  REQUIRE(counting.n_calls >= 7);  // folder, file, lock, writes, sync, rename, sync
  for (int error : {EIO, ENOSPC, EDQUOT, EROFS})
    for (int at = 0; at < counting.n_calls; ++at) {
      put_file(folder.file(), old);
      Faults faults;
      faults.kind = Faults::kError;
      faults.at = at;
      faults.error = error;
      const Status status = save_with(session, folder.file(), faults);
      INFO("call " << at << ", errno " << error << ": " << status.message());
      const bool last = at == counting.n_calls - 1;  // the folder's sync: the new file stands
      CHECK(test::read_file(folder.file()) == (last || faults.lock_failed ? fresh : old));
      CHECK(status.ok() == faults.lock_failed);  // a file system without locks
      if (!status.ok()) {
        CHECK(status.code() == Code::kIo);
        CHECK(status.sys_errno() == error);
      }
      CHECK(folder.names().size() == 1);
    }
  Faults faults;
  faults.interrupt = true;
  faults.most = 1000;
  put_file(folder.file(), old);
  test::require_ok(save_with(session, folder.file(), faults));
  CHECK(test::read_file(folder.file()) == fresh);
}

TEST_CASE("kill -9 at every system call leaves the old file or the new one", "[session_file]") {
  const Model model = lite();
  Session session = filled(model, 300);
  const Bytes fresh = saved(session), old = saved(filled(model, 20, 2));
  const Folder folder;
  Faults counting;
  test::require_ok(save_with(session, folder.file(), counting));
  int left_over = 0, n_old = 0, n_new = 0;
  for (const auto kind : {Faults::kDieBefore, Faults::kDieAfter})
    for (int at = 0; at < counting.n_calls; ++at) {
      put_file(folder.file(), old);
      const pid_t child = ::fork();
      REQUIRE(child >= 0);
      if (child == 0) {
        Faults faults;
        faults.kind = kind;
        faults.at = at;
        const Status status = save_with(session, folder.file(), faults);
        ::_exit(status.ok() ? 0 : 1);
      }
      int how = 0;
      REQUIRE(::waitpid(child, &how, 0) == child);
      INFO("call " << at << (kind == Faults::kDieBefore ? ", before" : ", after"));
      REQUIRE(WIFSIGNALED(how));
      CHECK(WTERMSIG(how) == SIGKILL);
      const Bytes found = test::read_file(folder.file());
      CHECK((found == old || found == fresh));
      n_old += found == old;
      n_new += found == fresh;
      CHECK(restored(model, found).ok());
      left_over += folder.names().size() > 1;
      // The next save finds its way and cleans up.
      test::require_ok(session.save(folder.file()));
      CHECK(test::read_file(folder.file()) == fresh);
      CHECK(folder.names() == std::vector<std::string>{"chat.session"});
    }
  CHECK(left_over > 0);
  CHECK(n_old > 0);
  CHECK(n_new > 0);
}

// Saves another session to the same path in the middle of a save.
struct Meanwhile : io::FileCalls {
  const Session* other = nullptr;
  std::string path;
  ssize_t write(int fd, const void* data, size_t bytes) noexcept override {
    if (const Session* once = std::exchange(other, nullptr)) {
      const Status status = once->save(path);
      CHECK(status.ok());
    }
    return FileCalls::write(fd, data, bytes);
  }
};

TEST_CASE("only what dead writers to this path left is removed", "[session_file]") {
  const Model model = lite();
  Session session = filled(model, 30), other = filled(model, 40, 2);
  const Folder folder;
  const Bytes some(5, std::byte{1});
  for (const char* name :
       {"chat.session.tmp.12.34", "chat.session.tmp.backup", "chat.session.tmp.1.",
        "chat.session.tmp.1.2.3", "other.session.tmp.12.34"})
    put_file(folder.file(name), some);
  Meanwhile calls;
  calls.other = &other;
  calls.path = folder.file();
  test::require_ok(save_with(session, folder.file(), calls));
  CHECK(test::read_file(folder.file()) == saved(session));  // the later rename
  CHECK(folder.names() ==
        std::vector<std::string>{"chat.session", "chat.session.tmp.1.", "chat.session.tmp.1.2.3",
                                 "chat.session.tmp.backup", "other.session.tmp.12.34"});
}

TEST_CASE("two savers at once: every reader finds one whole file", "[session_file]") {
  const Model model = lite();
  const Session a = filled(model, 30), b = filled(model, 200, 2);
  const Folder folder;
  test::require_ok(a.save(folder.file()));
  std::atomic<int> failed{0}, running{2};
  const auto save_often = [&](const Session& session) {
    for (int i = 0; i < 20; ++i) failed += !session.save(folder.file()).ok();
    --running;
  };
  std::thread one(save_often, std::cref(a)), two(save_often, std::cref(b));
  int n_reads = 0;
  do {
    const Result<Session> found = Session::restore(model, folder.file());
    INFO(found.status().message());
    CHECK(found.ok());
    if (found.ok()) CHECK((found->n_tokens() == 30 || found->n_tokens() == 200));
    ++n_reads;
  } while (running > 0);
  one.join();
  two.join();
  CHECK(failed == 0);
  CHECK(n_reads > 0);
  CHECK(folder.names() == std::vector<std::string>{"chat.session"});
}

}  // namespace
}  // namespace fathom
