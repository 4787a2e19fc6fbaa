// Which host memory the driver has pinned: each piece is undone as it was done, whole.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

namespace fathom::cuda {

// Thread-safe.
class PinnedHost {
 public:
  class Pinner {
   public:
    virtual ~Pinner() = default;
    virtual bool pin(void* host, int64_t bytes) noexcept = 0;  // false: refused
    virtual void unpin(void* host) noexcept = 0;               // of a pin() from here on
  };
  explicit PinnedHost(Pinner& pinner) noexcept : pinner_(pinner) {}

  // Without effect where the driver refuses.
  void pin(void* host, int64_t bytes) noexcept;
  // Every piece that has something of [host, host + bytes).
  void unpin(void* host, int64_t bytes) noexcept;
  void unpin_all() noexcept;
  int64_t held_bytes() const noexcept;
  bool holds(const void* host, int64_t bytes) const noexcept;  // all of it, in one piece

 private:
  void unpin_overlapping(uintptr_t begin, uintptr_t end) noexcept;  // the lock is held

  Pinner& pinner_;
  mutable std::mutex mutex_;
  std::map<uintptr_t, uintptr_t> pieces_;  // begin, end
};

}  // namespace fathom::cuda
