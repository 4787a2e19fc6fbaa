// Pieces of the workspace that an operation is given.  With no memory behind it only counts, so
// that workspace_bytes() and the operation run the same carve function.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

#include "fathom/backend.hpp"

namespace fathom::cuda {

class Workspace {
 public:
  static constexpr int64_t kAlignment = 64;

  Workspace() noexcept = default;  // counts only
  explicit Workspace(const OpContext& op) noexcept
      : base_(static_cast<std::byte*>(op.workspace)), capacity_(op.workspace_bytes) {}

  // n values of T, uninitialised device memory; null when counting.
  template <class T>
  T* take(int64_t n) noexcept {
    const int64_t at = used_;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    if (used_ > peak_) peak_ = used_;
    if (base_ == nullptr) return nullptr;
    assert(used_ <= capacity_);
    return reinterpret_cast<T*>(base_ + at);
  }
  std::byte* take_bytes(int64_t n) noexcept { return take<std::byte>(n); }
  // What was taken after mark() is free again after rewind().
  int64_t mark() const noexcept { return used_; }
  void rewind(int64_t mark) noexcept { used_ = mark; }
  int64_t peak_bytes() const noexcept { return peak_; }

 private:
  std::byte* base_ = nullptr;
  int64_t capacity_ = 0, used_ = 0, peak_ = 0;
};

}  // namespace fathom::cuda
