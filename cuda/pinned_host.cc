#include "cuda/pinned_host.h"

#include <iterator>
#include <new>

namespace fathom::cuda {

void PinnedHost::pin(void* host, int64_t bytes) noexcept try {
  if (bytes <= 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(host);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  const std::lock_guard lock(mutex_);
  unpin_overlapping(begin, end);
  // The piece has its place in the table before there is anything to lose.
  const auto piece = pieces_.emplace(begin, end).first;
  if (!pinner_.pin(host, bytes)) pieces_.erase(piece);
} catch (const std::bad_alloc&) {  // not pinned is only slower
}

void PinnedHost::unpin(void* host, int64_t bytes) noexcept {
  const auto begin = reinterpret_cast<uintptr_t>(host);
  const std::lock_guard lock(mutex_);
  unpin_overlapping(begin, begin + static_cast<uintptr_t>(bytes));
}

void PinnedHost::unpin_all() noexcept {
  const std::lock_guard lock(mutex_);
  unpin_overlapping(0, UINTPTR_MAX);
}

void PinnedHost::unpin_overlapping(uintptr_t begin, uintptr_t end) noexcept {
  auto piece = pieces_.lower_bound(begin);
  if (piece != pieces_.begin() && std::prev(piece)->second > begin) --piece;
  while (piece != pieces_.end() && piece->first < end) {
    pinner_.unpin(reinterpret_cast<void*>(piece->first));
    piece = pieces_.erase(piece);
  }
}

int64_t PinnedHost::held_bytes() const noexcept {
  const std::lock_guard lock(mutex_);
  uintptr_t bytes = 0;
  for (const auto& [begin, end] : pieces_) bytes += end - begin;
  return static_cast<int64_t>(bytes);
}

bool PinnedHost::holds(const void* host, int64_t bytes) const noexcept {
  const auto begin = reinterpret_cast<uintptr_t>(host);
  const std::lock_guard lock(mutex_);
  auto piece = pieces_.upper_bound(begin);
  return piece != pieces_.begin() &&
         std::prev(piece)->second >= begin + static_cast<uintptr_t>(bytes);
}

}  // namespace fathom::cuda
