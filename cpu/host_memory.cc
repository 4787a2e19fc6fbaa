// Ranges by mmap and mprotect; facts from /proc/meminfo, /proc/self/cgroup and the cgroup files
// (Linux Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst).
#include "cpu/host_memory.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

namespace fathom::cpu {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

int64_t round_up(int64_t value, int64_t multiple) noexcept {
  return (value + multiple - 1) / multiple * multiple;
}

// A message without the heap: the system has just refused memory.
Status refused(const char* what, int64_t bytes, int error) noexcept {
  char text[160];
  std::snprintf(text, sizeof text, "the system refused to %s %lld bytes of host memory: %s", what,
                static_cast<long long>(bytes), std::strerror(error));
  return Status(Code::kMemory, text).bytes(bytes, 0).with_errno(error);
}

void advise_huge(void* address, int64_t bytes, HugePages huge_pages) noexcept {
  if (huge_pages == HugePages::kOff) return;
  // A refusal (no such pages on this system) changes speed only.
  (void)madvise(address, static_cast<size_t>(bytes), MADV_HUGEPAGE);
}

// The beginning of a small file as a C string; false when it cannot be read.
template <size_t N>
bool read_text(const char* path, char (&text)[N]) noexcept {
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  size_t size = 0;
  while (size < N - 1) {
    const ssize_t n = read(fd, text + size, N - 1 - size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    size += static_cast<size_t>(n);
  }
  close(fd);
  text[size] = '\0';
  return size > 0;
}

// The number after `key` at the beginning of a line of `text`; -1 when there is none.
int64_t number_after(const char* text, const char* key) noexcept {
  const size_t length = std::strlen(key);
  for (const char* line = text; line != nullptr && *line != '\0';) {
    if (std::strncmp(line, key, length) == 0) return std::strtoll(line + length, nullptr, 10);
    line = std::strchr(line, '\n');
    if (line != nullptr) ++line;
  }
  return -1;
}

// path = folder/name; false when it does not fit.
template <size_t N>
bool join_path(char (&path)[N], const char* folder, const char* name) noexcept {
  const int length = std::snprintf(path, N, "%s/%s", folder, name);
  return length > 0 && length < static_cast<int>(N);
}

// The number in the file folder/name; kUnlimited for "max", for no limit, or without the file.
int64_t number_in(const char* folder, const char* name) noexcept {
  char path[1024], text[64];
  if (!join_path(path, folder, name) || !read_text(path, text)) return kUnlimited;
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text, &end, 10);
  return end == text || errno == ERANGE || value < 0 ? kUnlimited : value;
}

// Calls visit(folder) for the control group of this process in `controller` (v1; "" is v2) and all
// groups above it that this process can see, the innermost first.
template <class Visit>
void visit_cgroups(const char* root, const char* controller, Visit&& visit) noexcept {
  char path[1024], text[4096];
  std::snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
  if (!read_text(path, text)) return;
  char group[512] = "";
  bool found = false;
  char* rest = nullptr;
  for (char* line = strtok_r(text, "\n", &rest); line != nullptr && !found;
       line = strtok_r(nullptr, "\n", &rest)) {  // "4:cpu,cpuacct:/user.slice"
    char* names = std::strchr(line, ':');
    char* name_end = names == nullptr ? nullptr : std::strchr(++names, ':');
    if (name_end == nullptr) continue;
    *name_end = '\0';
    if (*controller == '\0') {
      found = *names == '\0';
    } else {
      char* next = nullptr;
      for (char* name = strtok_r(names, ",", &next); name != nullptr && !found;
           name = strtok_r(nullptr, ",", &next))
        found = std::strcmp(name, controller) == 0;
    }
    if (found) std::snprintf(group, sizeof group, "%s", name_end + 1);
  }
  if (!found) return;
  for (;;) {
    std::snprintf(path, sizeof path, "%s/sys/fs/cgroup%s%s%s", root, *controller ? "/" : "",
                  controller, std::strcmp(group, "/") == 0 ? "" : group);
    visit(static_cast<const char*>(path));  // a group outside our view has no files: no limit
    char* slash = std::strrchr(group, '/');
    if (slash == nullptr || group[1] == '\0') return;
    slash[slash == group ? 1 : 0] = '\0';
  }
}

// Lowers `state` to what one group allows.  File pages that the group can drop count as free.
void apply_memory_group(const char* folder, bool v2, MemoryState& state) noexcept {
  const int64_t limit = number_in(folder, v2 ? "memory.max" : "memory.limit_in_bytes");
  if (limit >= state.total_bytes) return;  // v1 says "none" by a number near 2^63
  const int64_t used = number_in(folder, v2 ? "memory.current" : "memory.usage_in_bytes");
  char path[1024], text[8192];
  int64_t droppable = 0;
  if (join_path(path, folder, "memory.stat") && read_text(path, text))
    droppable =
        std::max<int64_t>(0, number_after(text, v2 ? "inactive_file " : "total_inactive_file "));
  state.total_bytes = limit;
  if (used != kUnlimited)
    state.free_bytes = std::min(state.free_bytes, std::max<int64_t>(0, limit - used + droppable));
  state.free_bytes = std::min(state.free_bytes, limit);
}

}  // namespace

int64_t host_page_bytes() noexcept {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

Result<void*> host_reserve(int64_t bytes, HugePages huge_pages) noexcept {
  if (bytes <= 0 || bytes > kUnlimited - 2 * kHugePageBytes) {
    char text[96];
    std::snprintf(text, sizeof text, "cannot reserve a range of %lld bytes",
                  static_cast<long long>(bytes));
    return Status(Code::kInvalidArgument, text);
  }
  const int64_t size = round_up(bytes, host_page_bytes());
  const int64_t slack = size >= kHugePageBytes ? kHugePageBytes : 0;
  // Not MAP_NORESERVE: unreadable pages cost nothing anyway, and with the flag the system would
  // no longer check commits against its policy but kill someone later.
  void* mapped = mmap(nullptr, static_cast<size_t>(size + slack), PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return refused("reserve addresses for", bytes, errno);
  auto* begin = static_cast<std::byte*>(mapped);
  if (slack > 0) {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    const auto head = static_cast<int64_t>(-address & (kHugePageBytes - 1));
    if (head > 0) munmap(begin, static_cast<size_t>(head));
    begin += head;
    if (slack > head) munmap(begin + size, static_cast<size_t>(slack - head));
    advise_huge(begin, size, huge_pages);
  }
  return static_cast<void*>(begin);
}

Status host_commit(void* base, int64_t offset, int64_t bytes) noexcept {
  const int64_t page = host_page_bytes();
  if (base == nullptr || offset < 0 || bytes < 0 || offset % page != 0 || bytes % page != 0) {
    char text[128];
    std::snprintf(text, sizeof text, "commit of %lld bytes at offset %lld: not multiples of %lld",
                  static_cast<long long>(bytes), static_cast<long long>(offset),
                  static_cast<long long>(page));
    return Status(Code::kInvalidArgument, text);
  }
  if (bytes == 0) return {};
  auto* address = static_cast<std::byte*>(base) + offset;
  if (mprotect(address, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE) == 0) return {};
  const int error = errno;
  // A range of several mappings may have been changed in part.
  (void)mprotect(address, static_cast<size_t>(bytes), PROT_NONE);
  return refused("commit", bytes, error);
}

void host_decommit(void* base, int64_t offset, int64_t bytes, HugePages huge_pages) noexcept {
  if (base == nullptr || bytes <= 0) return;
  auto* address = static_cast<std::byte*>(base) + offset;
  const auto size = static_cast<size_t>(bytes);
  // A fresh mapping in place of the old one returns the pages and their accounting in one step.
  if (mmap(address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
      MAP_FAILED) {
    advise_huge(address, bytes, huge_pages);
    return;
  }
  // Too many mappings in this process: drop the pages and keep them from being counted.
  (void)madvise(address, size, MADV_DONTNEED);
  (void)mprotect(address, size, PROT_NONE);
}

void host_release(void* base, int64_t bytes) noexcept {
  if (base == nullptr || bytes <= 0) return;
  munmap(base, static_cast<size_t>(round_up(bytes, host_page_bytes())));
}

MemoryState host_memory_state(const char* root) noexcept {
  MemoryState state;
  char path[1024], text[8192];
  std::snprintf(path, sizeof path, "%s/proc/meminfo", root);
  if (!read_text(path, text)) return state;
  state.total_bytes = std::max<int64_t>(0, number_after(text, "MemTotal:")) * 1024;
  int64_t available = number_after(text, "MemAvailable:");
  if (available < 0) available = number_after(text, "MemFree:");
  state.free_bytes = std::max<int64_t>(0, available) * 1024;
  visit_cgroups(root, "memory",
                [&](const char* folder) { apply_memory_group(folder, false, state); });
  visit_cgroups(root, "", [&](const char* folder) { apply_memory_group(folder, true, state); });

  rlimit limit{};
  if (getrlimit(RLIMIT_DATA, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    std::snprintf(path, sizeof path, "%s/proc/self/status", root);
    const int64_t data = read_text(path, text) ? number_after(text, "VmData:") : -1;
    const auto left =
        static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, static_cast<rlim_t>(kUnlimited)));
    if (data >= 0)
      state.free_bytes = std::min(state.free_bytes, std::max<int64_t>(0, left - data * 1024));
  }
  return state;
}

int usable_processors(const char* root) noexcept {
  int count = 0;
  // The kernel refuses masks smaller than its own: grow until it answers.
  for (int capacity = 1024; capacity <= 1 << 20 && count == 0; capacity *= 2) {
    cpu_set_t* set = CPU_ALLOC(capacity);
    if (set == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(capacity);
    const bool answered = sched_getaffinity(0, size, set) == 0;
    const bool too_small = !answered && errno == EINVAL;
    if (answered) count = CPU_COUNT_S(size, set);
    CPU_FREE(set);
    if (!answered && !too_small) break;
  }
  if (count < 1) count = std::max(1u, std::thread::hardware_concurrency());

  const auto lower_to = [&](int64_t quota, int64_t period) {
    if (quota <= 0 || quota == kUnlimited || period <= 0 || period == kUnlimited) return;
    count = static_cast<int>(std::clamp<int64_t>((quota + period - 1) / period, 1, count));
  };
  visit_cgroups(root, "cpu", [&](const char* folder) {
    lower_to(number_in(folder, "cpu.cfs_quota_us"), number_in(folder, "cpu.cfs_period_us"));
  });
  visit_cgroups(root, "", [&](const char* folder) {
    char path[1024], text[64];
    long long quota = 0, period = 0;  // "50000 100000" or "max 100000"
    if (join_path(path, folder, "cpu.max") && read_text(path, text) &&
        std::sscanf(text, "%lld %lld", &quota, &period) == 2)
      lower_to(quota, period);
  });
  return count;
}

}  // namespace fathom::cpu
