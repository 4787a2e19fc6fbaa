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
  // An operation of `op`, which has a workspace, gave up; its output is undefined.
  void mark(const OpContext& op) noexcept {
    any_.store(true);
    for (std::atomic<const void*>& slot : slots_) {
      const void* none = nullptr;
      if (slot.load() == op.workspace || slot.compare_exchange_strong(none, op.workspace)) return;
    }
    full_.store(true);
  }
  // Whether one did since the last call; the mark is gone then.  When more contexts fail at once
  // than there are slots, which takes as many threads of the host, all fail from then on: better
  // than one that goes on with what is undefined.
  bool take(const OpContext& op) noexcept {
    if (!any_.load(std::memory_order_relaxed) || op.workspace == nullptr) return false;
    for (std::atomic<const void*>& slot : slots_) {
      const void* mine = op.workspace;
      if (slot.load(std::memory_order_relaxed) == mine &&
          slot.compare_exchange_strong(mine, nullptr))
        return true;
    }
    return full_.load();
  }

 private:
  std::array<std::atomic<const void*>, 256> slots_{};
  std::atomic<bool> any_{false};  // ever: most backends have none to look for
  std::atomic<bool> full_{false};
};

}  // namespace fathom::cpu
