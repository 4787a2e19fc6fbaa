// KVCache: the latent rows of one session, in pages that are mapped as the text grows and given
// back to the system when it shrinks.  Growth moves no row; context.max is a limit, not an
// allocation.  Rows and pages: kv_page.hpp.
//
// Owned by a Session and used by its thread.  Movable, not copyable.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "fathom/kv_page.hpp"
#include "fathom/status.hpp"

namespace fathom {

namespace run {
class EngineState;
}

struct KVCacheOptions {
  KvPolicy policy;
  KvLayout layout;
  std::vector<int64_t> layers_on_device;  // [n_devices] layers whose rows live there
  int64_t max_tokens = 0;                 // addresses are reserved for so many
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
  int64_t size_bytes() const noexcept;  // committed, all devices

  // Makes room for `n_tokens` tokens in all; pages that this makes cold are rewritten first. Either
  // all pages are mapped on all devices or none is added.  Errors: kContextFull beyond max_tokens,
  // kBudget (needed and available bytes), kMemory.  Cost: O(new pages).
  Status reserve(int64_t n_tokens);
  // Makes room for one page more, in the type in which its rows were saved: the policy's type, or
  // hot_type where it has hot pages.  Errors: kContextFull, kMismatch (names the types), kBudget,
  // kMemory; then no page is added.
  Status add_page(KvType type);
  // Says that the rows up to `n_tokens` are written now; n_tokens() <= n_tokens <= capacity.
  void commit_rows(int64_t n_tokens) noexcept;
  // Forgets rows from `n_tokens` on and returns the pages that hold no row to the system, but for
  // `keep_tokens` tokens of room.
  void truncate(int64_t n_tokens, int64_t keep_tokens = 0) noexcept;

  // View of one layer's rows [first_row, first_row + n_rows) on `device`; layer_slot counts the
  // layers of that device.  Valid until the next reserve or truncate.
  KvRows rows(int device, int64_t layer_slot, int64_t first_row, int64_t n_rows) const noexcept;

 private:
  struct State;
  explicit KVCache(std::unique_ptr<State>) noexcept;
  std::unique_ptr<State> state_;
};

}  // namespace fathom
