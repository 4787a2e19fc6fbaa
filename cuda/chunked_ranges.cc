#include "cuda/chunked_ranges.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

namespace fathom::cuda {

ChunkedRanges::~ChunkedRanges() {
  for (const auto& [first, chunk] : chunks_) memory_.free(chunk.memory);
}

// Names are not used twice; there are 2^63 of them.
void* ChunkedRanges::reserve(int64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  const uintptr_t base = next_;
  next_ += (static_cast<uintptr_t>(bytes) + granularity_ - 1) / granularity_ * granularity_;
  return reinterpret_cast<void*>(base);
}

Status ChunkedRanges::commit(void* base, int64_t offset, int64_t bytes) noexcept try {
  if (bytes <= 0) return {};
  const std::lock_guard lock(mutex_);
  const uintptr_t first = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset);
  // The chunk has its place in the table before there is anything to lose.
  const auto [entry, is_new] =
      chunks_.emplace(first, Chunk{first + static_cast<uintptr_t>(bytes), nullptr, bytes});
  if (!is_new) return Status(Code::kMemory, "a chunk that could not be given back is in the way");
  Result<void*> memory = memory_.allocate(bytes);
  if (!memory.ok()) {
    chunks_.erase(entry);
    return std::move(memory).status();
  }
  entry->second.memory = *memory;
  return {};
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "the system refused memory for the library's own bookkeeping");
}

// Names [first, end) of a chunk that begins at of_first get memory of their own.
bool ChunkedRanges::move_part(uintptr_t first, uintptr_t end, const Chunk& of, uintptr_t of_first) {
  const auto bytes = static_cast<int64_t>(end - first);
  Result<void*> memory = memory_.allocate(bytes);
  if (!memory.ok()) return false;
  const auto* from = static_cast<const std::byte*>(of.memory) + of.offset + (first - of_first);
  try {
    if (memory_.copy(*memory, from, bytes)) {
      chunks_.emplace(first, Chunk{end, *memory, bytes});
      return true;
    }
  } catch (const std::bad_alloc&) {
  }
  memory_.free(*memory);
  return false;
}

void ChunkedRanges::decommit(void* base, int64_t offset, int64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  const uintptr_t first = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset);
  const uintptr_t end = first + static_cast<uintptr_t>(bytes);
  auto at = chunks_.lower_bound(first);
  if (at != chunks_.begin() && std::prev(at)->second.end > first) --at;
  while (at != chunks_.end() && at->first < end) {
    const auto [chunk_first, chunk] = *at;
    // Taken out first: what stays in front of `first` begins where the chunk did.
    auto node = chunks_.extract(at++);
    const bool front = chunk_first<first, back = chunk.end> end;
    bool moved = true;
    if (front) moved = move_part(chunk_first, first, chunk, chunk_first);
    if (back && moved) {
      moved = move_part(end, chunk.end, chunk, chunk_first);
      if (!moved && front) {
        memory_.free(chunks_.find(chunk_first)->second.memory);
        chunks_.erase(chunk_first);
      }
    }
    if (moved) {
      memory_.free(chunk.memory);
      continue;
    }
    // Its names are given back at least, unless they are in the middle.
    if (!back) node.mapped().end = first;
    if (!front) {
      node.key() = end;
      node.mapped().offset += static_cast<int64_t>(end - chunk_first);
    }
    chunks_.insert(std::move(node));
  }
}

void* ChunkedRanges::address(void* base, int64_t offset) const noexcept {
  const std::lock_guard lock(mutex_);
  const uintptr_t name = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset);
  auto at = chunks_.upper_bound(name);
  if (at == chunks_.begin()) return nullptr;
  --at;
  if (name >= at->second.end) return nullptr;
  return static_cast<std::byte*>(at->second.memory) + at->second.offset + (name - at->first);
}

int64_t ChunkedRanges::held_bytes() const noexcept {
  const std::lock_guard lock(mutex_);
  int64_t bytes = 0;
  for (const auto& [first, chunk] : chunks_) bytes += chunk.bytes;
  return bytes;
}

}  // namespace fathom::cuda
