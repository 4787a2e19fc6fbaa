#include "memory_range.h"

#include <algorithm>

namespace fathom::run {

Result<MemoryRange> MemoryRange::reserve(Backend& backend, Ledger& ledger, int device,
                                         Purpose purpose, int64_t bytes) {
  MemoryRange range;
  range.backend_ = &backend;
  range.ledger_ = &ledger;
  range.device_ = device;
  range.purpose_ = purpose;
  const int64_t rounded = committed_bytes(bytes, backend.granularity());
  if (rounded > 0) {
    FATHOM_TRY_ASSIGN(range.base_, backend.reserve(rounded));
    range.reserved_ = rounded;
  }
  return range;
}

Result<MemoryRange> MemoryRange::allocate(Backend& backend, Ledger& ledger, int device,
                                          Purpose purpose, int64_t bytes) {
  FATHOM_TRY_ASSIGN(MemoryRange range, reserve(backend, ledger, device, purpose, bytes));
  if (range.reserved_ > 0) FATHOM_TRY(range.commit(0, range.reserved_));
  return range;
}

MemoryRange::~MemoryRange() {
  if (base_ == nullptr) return;
  if (pinned_for_ != nullptr) pinned_for_->unpin_host(base_, reserved_);
  backend_->release(base_, reserved_);
  if (committed_ > 0) ledger_->release(device_, purpose_, committed_);
}

Status MemoryRange::commit(int64_t offset, int64_t bytes) {
  if (bytes == 0) return {};
  for (;;) {
    Status refused = try_commit(offset, bytes);
    if (refused.ok() || purpose_ == Purpose::kExpertCache) return refused;
    // What system or host refuses although the ledger has it must really become less.
    const int64_t free =
        refused.code() == Code::kBudget ? 0 : std::max<int64_t>(ledger_->room(device_), 0);
    if (ledger_->take_back(device_, free + bytes, /*wait=*/true) == 0) return refused;
  }
}

Status MemoryRange::try_commit(int64_t offset, int64_t bytes) {
  FATHOM_TRY(ledger_->acquire(device_, purpose_, bytes));
  if (Status s = backend_->commit(base_, offset, bytes); !s.ok()) {
    ledger_->release(device_, purpose_, bytes);
    return std::move(s).on_device(device_);
  }
  committed_ += bytes;
  if (pinned_for_ != nullptr) pinned_for_->pin_host(data(offset), bytes);
  return {};
}

void MemoryRange::decommit(int64_t offset, int64_t bytes) noexcept {
  if (bytes == 0) return;
  if (pinned_for_ != nullptr) pinned_for_->unpin_host(data(offset), bytes);
  backend_->decommit(base_, offset, bytes);
  ledger_->release(device_, purpose_, bytes);
  committed_ -= bytes;
}

Status MemoryRange::resize(int64_t bytes) {
  if (base_ == nullptr) return {};
  const int64_t wanted = committed_bytes(bytes, backend_->granularity());
  if (wanted > committed_) return commit(committed_, wanted - committed_);
  decommit(wanted, committed_ - wanted);
  return {};
}

void MemoryRange::swap(MemoryRange& other) noexcept {
  std::swap(backend_, other.backend_);
  std::swap(pinned_for_, other.pinned_for_);
  std::swap(ledger_, other.ledger_);
  std::swap(device_, other.device_);
  std::swap(purpose_, other.purpose_);
  std::swap(base_, other.base_);
  std::swap(reserved_, other.reserved_);
  std::swap(committed_, other.committed_);
}

}  // namespace fathom::run
