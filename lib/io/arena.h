// Arena: bump allocation in one block.  With no block it only counts, so that measuring and
// placing are the same function: run it once with a counting arena, take that many bytes, run it
// again with the real one.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>

namespace fathom {

class Arena {
 public:
  static constexpr int64_t kAlignment = 64;  // every piece starts on a cache line

  Arena() noexcept = default;                   // counts only
  Arena(void* base, int64_t capacity) noexcept  // places; base is 64-byte aligned
      : base_(static_cast<std::byte*>(base)), capacity_(capacity) {}

  // n values of T, uninitialised; null when counting.
  template <class T>
  T* take(int64_t n) noexcept {
    return static_cast<T*>(take_bytes(n * static_cast<int64_t>(sizeof(T))));
  }
  void* take_bytes(int64_t bytes) noexcept {
    const int64_t at = used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (used_ > peak_) peak_ = used_;
    if (base_ == nullptr) return nullptr;
    assert(used_ <= capacity_);
    return base_ + at;
  }

  // Lifetimes that do not overlap share bytes: mark, carve one, rewind, carve the other.
  int64_t mark() const noexcept { return used_; }
  void rewind(int64_t mark) noexcept { used_ = mark; }

  int64_t peak_bytes() const noexcept { return peak_; }  // what the block must hold
  bool counting() const noexcept { return base_ == nullptr; }

 private:
  std::byte* base_ = nullptr;
  int64_t capacity_ = 0, used_ = 0, peak_ = 0;
};

}  // namespace fathom
