// A backend that does what another one does on a thread of its own, so that devices which compute
// on the caller's thread work side by side, as cards do: operations are queued in order and return
// at once, sync() waits.  Memory calls, weights and kv_convert() are the real backend's, at once.
#pragma once

#include <memory>

#include "fathom/backend.hpp"

namespace fathom::run {

// Errors: kMemory when the system refuses the thread.
Result<std::unique_ptr<Backend>> queued(std::unique_ptr<Backend> backend);

}  // namespace fathom::run
