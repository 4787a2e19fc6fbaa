// KVCache: the latent rows of one session, in pages that are mapped as the text grows and given
// back to the system when it shrinks.  Growth moves no row; context.max is a limit, not an
// allocation.  Rows and pages: kv_page.hpp.
//
// Owned by a Session and used by its thread.  Movable, not copyable.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fathom/config.hpp"
#include "fathom/kv_page.hpp"
#include "fathom/placement.hpp"
#include "fathom/status.hpp"

namespace fathom {

namespace run {
class EngineState;
class KvPages;
}  // namespace run

struct KVCacheOptions {
  KvPolicy policy;
  KvLayout layout;
  std::vector<int64_t> layers_on_device;  // [n_devices] layers whose attention is there
  int64_t max_tokens = 0;                 // addresses are reserved for so many
  std::vector<KvTier> tiers = {KvTier::kDevice};
  std::string spill_folder = {};  // for the file tier
  bool spill_to_memory = false;   // the folder may lie in memory
  // The smallest type that the session's ladder may rewrite cold pages in; none: it does not.
  std::optional<KvType> floor_type = std::nullopt;
  // Rows that lie on other devices than their layers (Placement::kv).
  std::vector<KvSpan> spans = {};
};

class KVCache {
 public:
  // Reserves addresses; takes no memory.  Errors: kMemory.
  static Result<KVCache> create(std::shared_ptr<run::EngineState> engine, const KVCacheOptions&);
  KVCache(KVCache&&) noexcept;
  KVCache& operator=(KVCache&&) noexcept;
  ~KVCache();  // gives everything back

  int64_t n_tokens() const noexcept;         // rows appended
  int64_t capacity_tokens() const noexcept;  // rows that fit the mapped pages
  int64_t max_tokens() const noexcept;
  int64_t page_tokens() const noexcept;
  int64_t size_bytes() const noexcept;  // memory committed, all devices and the host
  // Bytes of pages in a tier, all devices; those in the file take no memory.
  int64_t bytes_in(KvTier tier) const noexcept;

  // Makes room for `n_tokens` tokens in all; pages that this makes cold are rewritten first. Either
  // all pages are mapped on all devices or none is added.  Climbs no ladder: Session::reserve does.
  // Errors: kContextFull beyond max_tokens, kBudget (needed and available bytes), kMemory; kIo when
  // the page to be written next was moved to the file and cannot be read.  Cost: O(new pages).
  Status reserve(int64_t n_tokens);
  // Makes room for one page more, in the type in which its rows were saved: the policy's type,
  // hot_type where it has hot pages, or one that the ladder may have rewritten it in.  Errors:
  // kContextFull, kMismatch (names the types), kBudget, kMemory; then no page is added.
  Status add_page(KvType type);
  // Says that the rows up to `n_tokens` are written now; n_tokens() <= n_tokens <= capacity.
  void commit_rows(int64_t n_tokens) noexcept;
  // Forgets rows from `n_tokens` on and returns the pages that hold no row to the system, but for
  // `keep_tokens` tokens of room.
  void truncate(int64_t n_tokens, int64_t keep_tokens = 0) noexcept;

  // View of one layer's rows [first_row, first_row + n_rows); layer_slot counts the layers of
  // `device`.  Pages that were moved have no data, those of a span lie on the span's device.  Valid
  // until the next reserve or truncate.
  KvRows rows(int device, int64_t layer_slot, int64_t first_row, int64_t n_rows) const noexcept;

  run::KvPages& pages() noexcept { return *pages_; }
  const run::KvPages& pages() const noexcept { return *pages_; }

 private:
  explicit KVCache(std::unique_ptr<run::KvPages>) noexcept;
  std::unique_ptr<run::KvPages> pages_;
};

}  // namespace fathom
