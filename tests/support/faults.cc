#include "support/faults.h"

#include <sys/mman.h>

#include <array>
#include <memory>
#include <mutex>

namespace fathom::test {
namespace {

// What is committed in each range; without the heap, which may be failing.
struct Ranges {
  struct Range {
    void* base = nullptr;
    int64_t committed = 0;
  };
  std::mutex mutex;
  std::array<Range, 256> ranges;

  Range* find(void* base) noexcept {
    for (Range& range : ranges)
      if (range.base == base) return &range;
    return nullptr;
  }
};

}  // namespace

HostAllocator faulty_allocator(int64_t* held) {
  const auto ranges = std::make_shared<Ranges>();
  return {.reserve = [ranges](int64_t bytes) -> void* {
            if (Faults::strikes()) return nullptr;
            void* base = mmap(nullptr, static_cast<size_t>(bytes), PROT_NONE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (base == MAP_FAILED) return nullptr;
            std::lock_guard lock(ranges->mutex);
            *ranges->find(nullptr) = {base, 0};
            return base;
          },
          .commit =
              [held, ranges](void* base, int64_t offset, int64_t bytes) {
                if (Faults::strikes()) return false;
                if (mprotect(static_cast<char*>(base) + offset, static_cast<size_t>(bytes),
                             PROT_READ | PROT_WRITE) != 0)
                  return false;
                std::lock_guard lock(ranges->mutex);
                ranges->find(base)->committed += bytes;
                *held += bytes;
                return true;
              },
          .decommit =
              [held, ranges](void* base, int64_t offset, int64_t bytes) {
                mmap(static_cast<char*>(base) + offset, static_cast<size_t>(bytes), PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
                std::lock_guard lock(ranges->mutex);
                ranges->find(base)->committed -= bytes;
                *held -= bytes;
              },
          .release =
              [held, ranges](void* base, int64_t bytes) {
                munmap(base, static_cast<size_t>(bytes));
                std::lock_guard lock(ranges->mutex);
                *held -= ranges->find(base)->committed;
                *ranges->find(base) = {};
              }};
}

}  // namespace fathom::test
