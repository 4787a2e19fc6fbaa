// KVCache: the public face of KvPages.
#include "fathom/kv_cache.hpp"

#include <algorithm>

#include "kv_pages.h"

namespace fathom {

KVCache::KVCache(std::unique_ptr<run::KvPages> pages) noexcept : pages_(std::move(pages)) {}
KVCache::KVCache(KVCache&&) noexcept = default;
KVCache& KVCache::operator=(KVCache&&) noexcept = default;
KVCache::~KVCache() = default;

Result<KVCache> KVCache::create(std::shared_ptr<run::EngineState> engine,
                                const KVCacheOptions& options) {
  return run::guarded([&]() -> Result<KVCache> {
    FATHOM_TRY_ASSIGN(auto pages, run::KvPages::create(std::move(engine), options));
    return KVCache(std::move(pages));
  });
}

int64_t KVCache::n_tokens() const noexcept {
  return pages_->n_tokens();
}
int64_t KVCache::capacity_tokens() const noexcept {
  return std::min(pages_->n_pages() * page_tokens(), max_tokens());
}
int64_t KVCache::max_tokens() const noexcept {
  return pages_->options().max_tokens;
}
int64_t KVCache::page_tokens() const noexcept {
  return pages_->options().layout.page_tokens;
}
int64_t KVCache::size_bytes() const noexcept {
  return pages_->size_bytes();
}
int64_t KVCache::bytes_in(KvTier tier) const noexcept {
  return pages_->bytes_in(tier);
}
Status KVCache::reserve(int64_t n_tokens) {
  return pages_->reserve(n_tokens);
}
Status KVCache::add_page(KvType type) {
  return pages_->add_page(type);
}
void KVCache::commit_rows(int64_t n_tokens) noexcept {
  pages_->commit_rows(n_tokens);
}
void KVCache::truncate(int64_t n_tokens, int64_t keep_tokens) noexcept {
  pages_->truncate(n_tokens, keep_tokens);
}
KvRows KVCache::rows(int device, int64_t layer_slot, int64_t first_row,
                     int64_t n_rows) const noexcept {
  return pages_->rows(device, layer_slot, first_row, n_rows);
}

}  // namespace fathom
