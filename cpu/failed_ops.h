// Operations return nothing, so what went wrong in one is told by sync(): a mark per OpContext,
// known by its workspace.
#pragma once

#include <array>
#include <atomic>

#include "fathom/backend.hpp"

namespace fathom::cpu {

// Thread-safe.
class FailedOps {
 public:
  // An operation of `op` gave up, and its output is undefined.
  void mark(const OpContext& op) noexcept {
    for (std::atomic<const void*>& slot : slots_) {
      const void* none = nullptr;
      if (slot.load() == op.workspace || slot.compare_exchange_strong(none, op.workspace)) return;
    }
    more_.store(true);
  }
  // Whether one did since the last call; the mark is gone then.  Contexts beyond the slots share a
  // mark, which fails one of them too many rather than none.
  bool take(const OpContext& op) noexcept {
    if (op.workspace == nullptr) return false;
    for (std::atomic<const void*>& slot : slots_) {
      const void* mine = op.workspace;
      if (slot.load(std::memory_order_relaxed) == mine &&
          slot.compare_exchange_strong(mine, nullptr))
        return true;
    }
    return more_.load(std::memory_order_relaxed) && more_.exchange(false);
  }

 private:
  std::array<std::atomic<const void*>, 16> slots_{};
  std::atomic<bool> more_{false};
};

}  // namespace fathom::cpu
