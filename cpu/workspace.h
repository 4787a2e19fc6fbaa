// Workspace: pieces of the scratch that an operation is given.  With no memory behind it only
// counts, so that workspace_bytes() and the operation run the same carve function.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "fathom/backend.hpp"

namespace fathom::cpu {

class Workspace {
 public:
  static constexpr int64_t kAlignment = 64;  // every piece starts on a cache line

  Workspace() noexcept = default;  // counts only
  explicit Workspace(const OpContext& op) noexcept
      : base_(static_cast<std::byte*>(op.workspace)), capacity_(op.workspace_bytes) {}

  // n values of T, uninitialised; null when counting.
  template <class T>
  T* take(int64_t n) noexcept {
    const int64_t at = used_;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    if (base_ == nullptr) return nullptr;
    assert(used_ <= capacity_);
    return reinterpret_cast<T*>(base_ + at);
  }
  int64_t used_bytes() const noexcept { return used_; }

 private:
  std::byte* base_ = nullptr;
  int64_t capacity_ = 0, used_ = 0;
};

}  // namespace fathom::cpu
