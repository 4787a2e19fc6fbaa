// The cache alone over a whole context: growth moves no row, and memory follows the text up and
// down, in the ledger and in the process.
#include <unistd.h>

#include <catch2/catch.hpp>

#include <cstring>
#include <fstream>

#include "fathom/kv_cache.hpp"
#include "support/loaded_model.h"

namespace fathom {
namespace {

constexpr int64_t kContext = 163840, kStep = 512;

// Resident bytes of the process; the sum over its mappings, since counters in statm lag behind.
int64_t resident_bytes() {
  std::ifstream smaps("/proc/self/smaps_rollup");
  for (std::string line; std::getline(smaps, line);)
    if (line.rfind("Rss:", 0) == 0) return std::stoll(line.substr(4)) * 1024;
  return -1;
}

KVCacheOptions options_of(KvType type) {
  return {.policy = {.type = type, .page_tokens = 64},
          .layout = {64, 96, 32},
          .layers_on_device = {4},
          .max_tokens = kContext};
}

// What page number `page` is filled with.
std::byte mark_of(int64_t page) {
  return static_cast<std::byte>(page * 37 % 251 + 1);
}

TEST_CASE("160 K tokens of growth move no row; memory follows the text within two pages", "[kv]") {
  auto made = Engine::create(test::config_of({{"threads", "1"}}));
  REQUIRE(made.ok());
  Engine engine = *made;
  for (const KvType type : {KvType::kF16, KvType::kQ8_0}) {
    const KVCacheOptions options = options_of(type);
    auto cache = KVCache::create(engine.state(), options);
    REQUIRE(cache.ok());
    const int64_t used = options.layout.page_bytes(type, 4);
    const int64_t system_page = sysconf(_SC_PAGESIZE);
    const int64_t page_bytes = (used + system_page - 1) / system_page * system_page;
    const int64_t empty = engine.memory().devices[0].bytes_now;
    [[maybe_unused]] const int64_t before = resident_bytes();
    CHECK(cache->size_bytes() == 0);  // a limit is not an allocation

    std::vector<const void*> places;
    for (int64_t n = kStep; n <= kContext; n += kStep) {
      test::require_ok(cache->reserve(n));
      const KvRows rows = cache->rows(0, 0, 0, n);
      for (int64_t page = static_cast<int64_t>(places.size()); page < n / 64; ++page) {
        places.push_back(rows.pages[page].data);
        std::memset(rows.pages[page].data, static_cast<int>(mark_of(page)),
                    static_cast<size_t>(used));
      }
      cache->commit_rows(n);
      REQUIRE(cache->size_bytes() == n / 64 * page_bytes);
    }
    CHECK(engine.memory().devices[0].bytes_now == empty + kContext / 64 * page_bytes);
    const KvRows rows = cache->rows(0, 0, 0, kContext);
    int64_t moved = 0, changed = 0;
    for (int64_t page = 0; page < kContext / 64; ++page) {
      const auto* data = static_cast<const std::byte*>(rows.pages[page].data);
      moved += data != places[static_cast<size_t>(page)];
      for (int64_t i = 0; i < used; ++i) changed += data[i] != mark_of(page);
    }
    CHECK(moved == 0);
    CHECK(changed == 0);

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    int64_t resident = resident_bytes(), held = cache->size_bytes();
    INFO(kv_type_name(type) << ": resident before " << before << ", full " << resident);
    CHECK(resident - before >= held - 2 * page_bytes);
    for (const int64_t keep : {100001, 65536, 1000, 1, 0}) {
      cache->truncate(keep);
      const int64_t now = resident_bytes(), left = cache->size_bytes();
      INFO("truncated to " << keep << ": resident " << now << ", held " << left);
      CHECK(left == (keep + 63) / 64 * page_bytes);
      CHECK(std::abs((resident - now) - (held - left)) <= 2 * page_bytes);
      resident = now;
      held = left;
    }
#endif
    cache->truncate(0);
    CHECK(engine.memory().devices[0].bytes_now == empty);
    // And up again, in the same places.
    test::require_ok(cache->reserve(1000));
    CHECK(cache->rows(0, 0, 0, 1000).pages[3].data == places[3]);
  }
}

}  // namespace
}  // namespace fathom
