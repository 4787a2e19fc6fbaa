// MemoryRange: addresses on one device, with what is committed booked in the ledger.  The only way
// in which the library takes large memory.
#pragma once

#include <cstdint>
#include <utility>

#include "fathom/backend.hpp"
#include "fathom/status.hpp"
#include "ledger.h"

namespace fathom::run {

// Bytes that a commit of `bytes` takes on a device with this granularity.  The plan and
// MemoryRange both round by it.
constexpr int64_t committed_bytes(int64_t bytes, int64_t granularity) noexcept {
  return (bytes + granularity - 1) / granularity * granularity;
}

// Owner; movable.  The backend and the ledger must outlive it.  Not thread-safe.
class MemoryRange {
 public:
  MemoryRange() noexcept = default;
  // Addresses for `bytes`, nothing committed.
  static Result<MemoryRange> reserve(Backend& backend, Ledger& ledger, int device, Purpose purpose,
                                     int64_t bytes);
  // Reserved and committed whole; an empty range for 0 bytes.
  static Result<MemoryRange> allocate(Backend& backend, Ledger& ledger, int device, Purpose purpose,
                                      int64_t bytes);
  MemoryRange(MemoryRange&& other) noexcept { swap(other); }
  MemoryRange& operator=(MemoryRange&& other) noexcept {
    MemoryRange gone(std::move(*this));
    swap(other);
    return *this;
  }
  ~MemoryRange();

  // offset and bytes are multiples of the granularity; the part is not committed yet (commit) or
  // wholly committed (decommit).  A commit that is refused has lenders give memory back (not for
  // what is lent itself) and asks again.  Errors of commit: kBudget, kCallback, kMemory; nothing
  // changed.
  Status commit(int64_t offset, int64_t bytes);
  void decommit(int64_t offset, int64_t bytes) noexcept;
  // Of a range that is committed from its beginning on: room for `bytes` and no more.  Errors: as
  // commit; giving back does not fail.
  Status resize(int64_t bytes);

  // Of host memory, before anything is committed: what comes is pinned for copies of `device`,
  // which must outlive the range.
  void pin_for(Backend& device) noexcept { pinned_for_ = &device; }

  // Of a range that was committed whole, or of what was committed at `offset`.
  std::byte* data(int64_t offset = 0) const noexcept {
    return base_ == nullptr ? nullptr : static_cast<std::byte*>(backend_->address(base_, offset));
  }
  // Giving back a part moves the rest (Backend::address).
  bool moves() const noexcept { return data() != base_; }
  int64_t reserved_bytes() const noexcept { return reserved_; }
  int64_t size_bytes() const noexcept { return committed_; }  // booked
  int64_t bytes_on(int device) const noexcept { return device == device_ ? committed_ : 0; }

 private:
  void swap(MemoryRange& other) noexcept;
  Status try_commit(int64_t offset, int64_t bytes);

  Backend* backend_ = nullptr;
  Backend* pinned_for_ = nullptr;
  Ledger* ledger_ = nullptr;
  int device_ = 0;
  Purpose purpose_ = Purpose::kWeights;
  void* base_ = nullptr;
  int64_t reserved_ = 0, committed_ = 0;
};

}  // namespace fathom::run
