// Address ranges out of chunks: what is committed is where address() says, keeps its bytes while
// its neighbours come and go, and costs what it costs.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <string_view>

#include "cuda/chunked_ranges.h"
#include "cuda/pinned_host.h"

using namespace fathom;
using cuda::ChunkedRanges;

namespace {

class Heap final : public ChunkedRanges::Memory {
 public:
  int64_t bytes = 0, limit = INT64_MAX;
  bool copies = true;
  Result<void*> allocate(int64_t n) noexcept override {
    if (bytes + n > limit) return Status(Code::kMemory, "the heap is full");
    auto* memory = static_cast<int64_t*>(std::calloc(1, static_cast<size_t>(n) + 16));
    bytes += n;
    *memory = n;
    return memory + 2;
  }
  void free(void* p) noexcept override {
    auto* memory = static_cast<int64_t*>(p) - 2;
    bytes -= *memory;
    std::free(memory);
  }
  bool copy(void* to, const void* from, int64_t n) noexcept override {
    if (copies) std::memcpy(to, from, static_cast<size_t>(n));
    return copies;
  }
};

constexpr int64_t kUnit = 64;

void fill(const ChunkedRanges& ranges, void* base, int64_t unit, char value) {
  auto* at = static_cast<char*>(ranges.address(base, unit * kUnit));
  REQUIRE(at != nullptr);
  std::memset(at, value, kUnit);
}
char look(const ChunkedRanges& ranges, void* base, int64_t unit) {
  const auto* at = static_cast<const char*>(ranges.address(base, unit * kUnit));
  return at == nullptr ? '-' : at[kUnit - 1];
}

}  // namespace

TEST_CASE("a commit lies together, and parts of it go back while the rest stays",
          "[cuda][ranges]") {
  Heap heap;
  {
    ChunkedRanges ranges(heap, kUnit);
    void* base = ranges.reserve(20 * kUnit);
    void* other = ranges.reserve(5 * kUnit);
    CHECK(heap.bytes == 0);
    REQUIRE(ranges.commit(base, 2 * kUnit, 6 * kUnit).ok());
    REQUIRE(ranges.commit(base, 8 * kUnit, kUnit).ok());
    REQUIRE(ranges.commit(other, 0, 5 * kUnit).ok());
    CHECK(heap.bytes == 12 * kUnit);
    auto* first = static_cast<char*>(ranges.address(base, 2 * kUnit));
    CHECK(ranges.address(base, 7 * kUnit) == first + 5 * kUnit);
    CHECK(ranges.address(base, kUnit) == nullptr);
    CHECK(ranges.address(base, 9 * kUnit) == nullptr);
    for (int64_t u = 2; u < 9; ++u) fill(ranges, base, u, static_cast<char>('a' + u));
    ranges.decommit(base, 4 * kUnit, 2 * kUnit);  // the middle
    CHECK(heap.bytes == 10 * kUnit);
    for (int64_t u = 2; u < 9; ++u)
      CHECK(look(ranges, base, u) == (u == 4 || u == 5 ? '-' : static_cast<char>('a' + u)));
    ranges.decommit(base, 3 * kUnit, 5 * kUnit);  // the end of one, all of the next, a hole
    CHECK(look(ranges, base, 2) == 'c');
    CHECK(look(ranges, base, 3) == '-');
    CHECK(look(ranges, base, 8) == 'i');
    CHECK(heap.bytes == 7 * kUnit);
    ranges.release(base, 20 * kUnit);
    CHECK(heap.bytes == 5 * kUnit);
    CHECK(ranges.held_bytes() == 5 * kUnit);
  }
  CHECK(heap.bytes == 0);
}

TEST_CASE("what cannot be moved stays whole, and a refused commit leaves nothing",
          "[cuda][ranges]") {
  Heap heap;
  ChunkedRanges ranges(heap, kUnit);
  void* base = ranges.reserve(8 * kUnit);
  REQUIRE(ranges.commit(base, 0, 4 * kUnit).ok());
  for (int64_t u = 0; u < 4; ++u) fill(ranges, base, u, static_cast<char>('a' + u));
  heap.limit = 4 * kUnit;
  CHECK(ranges.commit(base, 4 * kUnit, kUnit).code() == Code::kMemory);
  CHECK(ranges.address(base, 4 * kUnit) == nullptr);
  ranges.decommit(base, kUnit, 2 * kUnit);  // no room for the parts
  CHECK(look(ranges, base, 0) == 'a');
  CHECK(look(ranges, base, 3) == 'd');
  heap.limit = 5 * kUnit;  // room for the first part, not for the second
  ranges.decommit(base, kUnit, 2 * kUnit);
  CHECK(look(ranges, base, 0) == 'a');
  CHECK(look(ranges, base, 3) == 'd');
  CHECK(heap.bytes == 4 * kUnit);
  heap.limit = INT64_MAX;
  heap.copies = false;
  ranges.decommit(base, kUnit, 2 * kUnit);
  CHECK(look(ranges, base, 3) == 'd');
  // An end that cannot be moved away from is no longer there, and goes with the rest.
  ranges.decommit(base, 3 * kUnit, kUnit);
  CHECK(look(ranges, base, 3) == '-');
  CHECK(look(ranges, base, 2) == 'c');
  ranges.decommit(base, 0, kUnit);
  CHECK(look(ranges, base, 0) == '-');
  CHECK(look(ranges, base, 1) == 'b');
  CHECK(look(ranges, base, 2) == 'c');
  CHECK(heap.bytes == 4 * kUnit);
  heap.copies = true;
  ranges.decommit(base, kUnit, kUnit);
  CHECK(look(ranges, base, 2) == 'c');
  CHECK(heap.bytes == kUnit);
  ranges.decommit(base, 2 * kUnit, kUnit);
  CHECK(heap.bytes == 0);
}

TEST_CASE("any order of commits and decommits", "[cuda][ranges]") {
  std::mt19937 random(3);
  for (int round = 0; round < 30; ++round) {
    Heap heap;
    ChunkedRanges ranges(heap, kUnit);
    constexpr int64_t kUnits = 24;
    void* base = ranges.reserve(kUnits * kUnit);
    std::string model(kUnits, '-');
    for (int step = 0; step < 200; ++step) {
      const auto first = static_cast<int64_t>(random() % kUnits);
      const auto n = static_cast<int64_t>(random() % static_cast<uint64_t>(kUnits - first)) + 1;
      const auto part =
          std::string_view(model).substr(static_cast<size_t>(first), static_cast<size_t>(n));
      if (part.find_first_not_of('-') == part.npos) {  // free: commit
        REQUIRE(ranges.commit(base, first * kUnit, n * kUnit).ok());
        for (int64_t u = first; u < first + n; ++u) {
          model[static_cast<size_t>(u)] = static_cast<char>('a' + step % 26);
          fill(ranges, base, u, model[static_cast<size_t>(u)]);
        }
      } else {
        ranges.decommit(base, first * kUnit, n * kUnit);
        for (int64_t u = first; u < first + n; ++u) model[static_cast<size_t>(u)] = '-';
      }
      std::string got;
      for (int64_t u = 0; u < kUnits; ++u) got += look(ranges, base, u);
      REQUIRE(got == model);
      const auto free_units = std::count(model.begin(), model.end(), '-');
      REQUIRE(heap.bytes == (kUnits - free_units) * kUnit);
    }
  }
}

TEST_CASE("pinned memory is unpinned as it was pinned, piece by piece", "[cuda][ranges]") {
  struct Log final : cuda::PinnedHost::Pinner {
    std::map<void*, int64_t> pinned;
    int64_t most = 1 << 20;
    bool pin(void* host, int64_t bytes) noexcept override {
      if (bytes > most) return false;
      CHECK(pinned.emplace(host, bytes).second);
      return true;
    }
    void unpin(void* host) noexcept override { CHECK(pinned.erase(host) == 1); }
  } log;
  cuda::PinnedHost host(log);
  std::vector<char> memory(8192);
  char* base = memory.data();
  host.pin(base, 1000);
  host.pin(base + 1000, 1000);
  host.pin(base + 4000, 1000);
  CHECK(host.held_bytes() == 3000);
  CHECK(host.holds(base + 10, 990));
  CHECK_FALSE(host.holds(base + 10, 991));  // two pieces
  CHECK_FALSE(host.holds(base + 3999, 1));
  host.unpin(base + 2000, 2000);  // none
  CHECK(host.held_bytes() == 3000);
  host.unpin(base + 1999, 10);  // the second, whole
  CHECK(host.held_bytes() == 2000);
  host.pin(base + 4500, 1000);  // anew, over another one
  CHECK(host.held_bytes() == 2000);
  CHECK(log.pinned.count(base + 4500) == 1);
  log.most = 10;
  host.pin(base + 6000, 1000);  // refused: without effect
  host.pin(base, 0);
  CHECK(host.held_bytes() == 2000);
  host.unpin_all();
  CHECK(log.pinned.empty());
  CHECK(host.held_bytes() == 0);
}
