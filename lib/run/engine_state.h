// What an Engine handle shares with the models and sessions that live on it.
#pragma once

#include <memory>
#include <vector>

#include "fathom/backend.hpp"
#include "fathom/engine.hpp"
#include "fathom/machine.hpp"
#include "ledger.h"
#include "memory_range.h"

namespace fathom::run {

class EngineState {
 public:
  EngineState(Config config, HostHooks hooks, std::vector<std::unique_ptr<Backend>> devices,
              MachineDescription machine, std::vector<LedgerDevice> accounts, int64_t host_budget)
      : config(std::move(config)),
        hooks(std::move(hooks)),
        devices(std::move(devices)),
        machine(std::move(machine)),
        ledger(std::move(accounts), host_budget, this->hooks.memory) {}

  Result<MemoryRange> allocate(int device, Purpose purpose, int64_t bytes) {
    return MemoryRange::allocate(*devices[static_cast<size_t>(device)], ledger, device, purpose,
                                 bytes);
  }
  Result<MemoryRange> reserve(int device, Purpose purpose, int64_t bytes) {
    return MemoryRange::reserve(*devices[static_cast<size_t>(device)], ledger, device, purpose,
                                bytes);
  }
  void log(LogLevel level, std::string_view text) const noexcept {
    if (!hooks.log) return;
    try {
      hooks.log(level, text);
    } catch (...) {  // a host's exception must not pass through the library
    }
  }

  const Config config;
  const HostHooks hooks;
  const std::vector<std::unique_ptr<Backend>> devices;
  const MachineDescription machine;  // of `devices`, in their order: kinds, bytes, rates, links
  Ledger ledger;
  // Where host-side tables live (tokenizer, staging, token history): the first host device.
  const int host_device = 0;
};

// Runs `body`, which returns a Status or Result, and turns an exception of the standard library
// into a Status: the border that nothing is thrown across.
template <class Body>
auto guarded(Body&& body) noexcept -> decltype(body()) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return Status(Code::kMemory, "the system refused memory for the library's own bookkeeping");
  } catch (const std::exception& e) {
    return Status(Code::kInternal, e.what());
  } catch (...) {
    return Status(Code::kInternal, "an exception of unknown type");
  }
}

}  // namespace fathom::run
