// Ranges of host memory: zeroed when committed, gone from the process when decommitted, refused
// under limits without harm; and what the system's files say about memory and processors.
#include "cpu/host_memory.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

using namespace fathom;
using namespace fathom::cpu;

namespace {

constexpr int64_t kMiB = 1 << 20;

int64_t rss_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t size = 0, resident = 0;
  file >> size >> resident;
  return resident * host_page_bytes();
}

void* reserve(int64_t bytes, HugePages huge = HugePages::kAdvise) {
  auto base = host_reserve(bytes, huge);
  REQUIRE(base.ok());
  return *base;
}

// Runs `body` in a process of its own, so that limits end with it; its exit code.
template <class Body>
int in_child(Body&& body) {
  const pid_t pid = fork();
  if (pid == 0) _exit(body());
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

// A tree of files that stands for /proc and /sys.
class FakeRoot {
 public:
  FakeRoot() {
    char name[] = "/tmp/fathom-root-XXXXXX";
    REQUIRE(mkdtemp(name) != nullptr);
    path_ = name;
  }
  ~FakeRoot() { std::filesystem::remove_all(path_); }
  void write(const std::string& file, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(path_ + file).parent_path());
    std::ofstream(path_ + file) << text;
  }
  const char* path() const { return path_.c_str(); }

 private:
  std::string path_;
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;  // their shadow memory is in RSS and breaks limits
#else
constexpr bool kSanitized = false;
#endif

}  // namespace

TEST_CASE("a range costs nothing until it is committed, and nothing after") {
  if (kSanitized) {
    WARN("skipped: RSS is the sanitizer's too");
    return;
  }
  const int64_t size = 256 * kMiB;
  for (const HugePages huge : {HugePages::kOff, HugePages::kAdvise}) {
    const int64_t before = rss_bytes();
    auto* base = static_cast<unsigned char*>(reserve(size, huge));
    CHECK(reinterpret_cast<uintptr_t>(base) % kHugePageBytes == 0);
    CHECK(rss_bytes() - before < 4 * kMiB);
    REQUIRE(host_commit(base, 0, 64 * kMiB).ok());
    std::memset(base, 1, 64 * kMiB);
    CHECK(rss_bytes() - before >= 60 * kMiB);
    // In the middle, at an odd place: the neighbours keep their bytes.
    host_decommit(base, 17 * 4096, 40 * kMiB, huge);
    CHECK(rss_bytes() - before < 28 * kMiB);
    CHECK(base[17 * 4096 - 1] == 1);
    CHECK(base[17 * 4096 + 40 * kMiB] == 1);
    // Committed again, it is zero.
    REQUIRE(host_commit(base, 17 * 4096, 40 * kMiB).ok());
    for (int64_t i = 0; i < 40 * kMiB; i += 4096) REQUIRE(base[17 * 4096 + i] == 0);
    host_decommit(base, 0, 64 * kMiB, huge);
    CHECK(rss_bytes() - before < 4 * kMiB);
    host_release(base, size);
    CHECK(rss_bytes() - before < 4 * kMiB);
  }
}

TEST_CASE("memory grows by pages and shrinks by pages many times over") {
  const int64_t page = host_page_bytes(), size = 8 * kMiB;
  auto* base = static_cast<unsigned char*>(reserve(size));
  for (int round = 0; round < 3; ++round) {
    for (int64_t offset = 0; offset < size; offset += 16 * page) {
      REQUIRE(host_commit(base, offset, 16 * page).ok());
      CHECK(base[offset + 5] == 0);
      base[offset + 5] = 9;
    }
    for (int64_t offset = size - 16 * page; offset >= 0; offset -= 16 * page)
      host_decommit(base, offset, 16 * page, HugePages::kAdvise);
  }
  host_release(base, size);
}

TEST_CASE("arguments that make no sense are refused") {
  for (const int64_t bytes : {int64_t{0}, int64_t{-1}, INT64_MAX}) {
    const auto base = host_reserve(bytes, HugePages::kOff);
    REQUIRE_FALSE(base.ok());
    CHECK(base.status().code() == Code::kInvalidArgument);
  }
  void* base = reserve(1 * kMiB);
  for (const auto& [offset, bytes] :
       {std::pair<int64_t, int64_t>{1, 4096}, {0, 100}, {-4096, 4096}})
    CHECK(host_commit(base, offset, bytes).code() == Code::kInvalidArgument);
  CHECK(host_commit(nullptr, 0, 4096).code() == Code::kInvalidArgument);
  CHECK(host_commit(base, 0, 0).ok());
  host_release(base, 1 * kMiB);
}

TEST_CASE("addresses that do not exist are refused with the system's reason") {
  const auto base = host_reserve(int64_t{1} << 60, HugePages::kAdvise);
  REQUIRE_FALSE(base.ok());
  CHECK(base.status().code() == Code::kMemory);
  CHECK(base.status().sys_errno() == ENOMEM);
  CHECK(base.status().bytes_needed() == int64_t{1} << 60);
}

TEST_CASE("under RLIMIT_DATA commits are refused whole, and what was there stays") {
  if (kSanitized) {
    WARN("skipped: limits do not go with sanitizers");
    return;
  }
  const int code = in_child([] {
    auto reserved = host_reserve(512 * kMiB, HugePages::kAdvise);
    if (!reserved.ok()) return 1;
    auto* base = static_cast<unsigned char*>(*reserved);
    std::ifstream file("/proc/self/statm");
    int64_t field = 0;
    for (int i = 0; i < 6; ++i) file >> field;  // the sixth: data pages
    const rlim_t limit = static_cast<rlim_t>(field * host_page_bytes() + 96 * kMiB);
    const rlimit limits{limit, limit};
    if (setrlimit(RLIMIT_DATA, &limits) != 0) return 2;
    if (host_memory_state().free_bytes > 97 * kMiB) return 3;
    if (!host_commit(base, 0, 64 * kMiB).ok()) return 4;
    base[0] = 7;
    const int64_t free_before = host_memory_state().free_bytes;
    const Status refused = host_commit(base, 64 * kMiB, 64 * kMiB);
    if (refused.code() != Code::kMemory || refused.sys_errno() != ENOMEM) return 5;
    if (refused.message().find("67108864") == std::string_view::npos) return 6;
    if (base[0] != 7) return 7;
    // Nothing of the refused range is left behind, and decommitted memory can be had again.
    if (host_memory_state().free_bytes < free_before - kMiB) return 8;
    host_decommit(base, 0, 64 * kMiB, HugePages::kAdvise);
    if (!host_commit(base, 64 * kMiB, 90 * kMiB).ok()) return 9;
    return 0;
  });
  CHECK(code == 0);
}

TEST_CASE("the state of memory: machine, then the smallest control group") {
  FakeRoot root;
  CHECK(host_memory_state(root.path()).total_bytes == 0);  // nothing known
  root.write("/proc/meminfo",
             "MemTotal:       8000000 kB\nMemFree:  100 kB\nMemAvailable:    5000000 kB\n");
  MemoryState state = host_memory_state(root.path());
  CHECK(state.total_bytes == int64_t{8000000} * 1024);
  CHECK(state.free_bytes == int64_t{5000000} * 1024);

  SECTION("version 2, limit on a group above") {
    root.write("/proc/self/cgroup", "0::/user/app/job\n");
    root.write("/sys/fs/cgroup/user/app/job/memory.max", "max\n");
    root.write("/sys/fs/cgroup/user/app/memory.max", "1000000000\n");
    root.write("/sys/fs/cgroup/user/app/memory.current", "700000000\n");
    root.write("/sys/fs/cgroup/user/app/memory.stat", "anon 5\ninactive_file 50000000\n");
    state = host_memory_state(root.path());
    CHECK(state.total_bytes == 1000000000);
    CHECK(state.free_bytes == 350000000);
  }
  SECTION("version 2, in a container: the group itself is the root of the view") {
    root.write("/proc/self/cgroup", "0::/\n");
    root.write("/sys/fs/cgroup/memory.max", "2000000000\n");
    root.write("/sys/fs/cgroup/memory.current", "2100000000\n");
    state = host_memory_state(root.path());
    CHECK(state.total_bytes == 2000000000);
    CHECK(state.free_bytes == 0);
  }
  SECTION("version 1") {
    root.write("/proc/self/cgroup", "9:cpu,cpuacct:/x\n4:memory:/box\n0::/ignored\n");
    root.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    root.write("/sys/fs/cgroup/memory/box/memory.limit_in_bytes", "3000000000\n");
    root.write("/sys/fs/cgroup/memory/box/memory.usage_in_bytes", "1000000000\n");
    root.write("/sys/fs/cgroup/memory/box/memory.stat",
               "inactive_file 1\ntotal_inactive_file 500000000\n");
    state = host_memory_state(root.path());
    CHECK(state.total_bytes == 3000000000);
    CHECK(state.free_bytes == 2500000000);
  }
  SECTION("text that is no number is no limit") {
    root.write("/proc/self/cgroup", "0::/\ngarbage\n:::\n");
    root.write("/sys/fs/cgroup/memory.max", "lots\n");
    state = host_memory_state(root.path());
    CHECK(state.total_bytes == int64_t{8000000} * 1024);
  }
}

TEST_CASE("the state of this machine is plausible") {
  const MemoryState state = host_memory_state();
  CHECK(state.total_bytes > 64 * kMiB);
  CHECK(state.free_bytes > 0);
  CHECK(state.free_bytes <= state.total_bytes);
}

TEST_CASE("processors: the mask, lowered by quotas, at least one") {
  const int machine = usable_processors("/nonexistent");
  CHECK(machine >= 1);
  CHECK(usable_processors() >= 1);
  CHECK(usable_processors() <= machine);
  FakeRoot root;
  SECTION("version 2, half a processor") {
    root.write("/proc/self/cgroup", "0::/a/b\n");
    root.write("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
    root.write("/sys/fs/cgroup/a/cpu.max", "50000 100000\n");
    CHECK(usable_processors(root.path()) == 1);
  }
  SECTION("version 1, no limit") {
    root.write("/proc/self/cgroup", "3:cpuacct,cpu:/a\n");
    root.write("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n");
    root.write("/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
    CHECK(usable_processors(root.path()) == machine);
  }
  SECTION("version 1, one processor and a half") {
    root.write("/proc/self/cgroup", "3:cpu:/a\n");
    root.write("/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "150000\n");
    root.write("/sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
    CHECK(usable_processors(root.path()) == std::min(machine, 2));
  }
}
