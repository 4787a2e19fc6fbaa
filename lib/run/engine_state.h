// What an Engine handle shares with the models and sessions that live on it.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "fathom/backend.hpp"
#include "fathom/engine.hpp"
#include "fathom/machine.hpp"
#include "ledger.h"
#include "memory_range.h"
#include "simulated_backend.h"
#include "timeline.h"

namespace fathom::run {

class EngineState {
 public:
  // One of the devices is a CPU.
  EngineState(Config config, HostHooks hooks, std::vector<std::unique_ptr<Backend>> devices,
              MachineDescription machine, std::vector<LedgerDevice> accounts, int64_t host_budget)
      : config(std::move(config)),
        hooks(std::move(hooks)),
        devices(std::move(devices)),
        machine(std::move(machine)),
        ledger(std::move(accounts), host_budget, this->hooks.memory),
        host_device(std::max(this->machine.host(), 0)) {}

  Result<MemoryRange> allocate(int device, Purpose purpose, int64_t bytes) {
    return MemoryRange::allocate(memory_of(device, purpose), ledger, device, purpose, bytes);
  }
  Result<MemoryRange> reserve(int device, Purpose purpose, int64_t bytes) {
    return MemoryRange::reserve(memory_of(device, purpose), ledger, device, purpose, bytes);
  }
  // Books what the devices themselves hold for life, and logs what they are.
  Status start() {
    for (int d = 0; d < static_cast<int>(devices.size()); ++d) {
      const Backend& device = *devices[static_cast<size_t>(d)];
      FATHOM_TRY(ledger.acquire(d, Purpose::kRuntime, device.runtime_bytes()));
      log(LogLevel::kInfo, device.describe());
      for (const std::string& remark : device.remarks()) log(LogLevel::kWarn, remark);
    }
    return {};
  }
  // Seconds since the engine was made: on the wall, or on the clock of its simulated devices.
  double seconds() const noexcept {
    if (simulation) return simulation->now();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - made_).count();
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
  const int host_device;
  // The configuration names no CPU: host_device, the last one, holds tables and computes nothing.
  // Set by the engine's maker.
  bool host_is_implied = false;
  // Devices that layers, experts, embedding and head may live on: the first so many.
  int n_computing() const noexcept {
    return static_cast<int>(devices.size()) - (host_is_implied ? 1 : 0);
  }

  // Engines of simulated devices; set by their maker.
  std::shared_ptr<SimulatedMachine> simulation;
  std::shared_ptr<Backend> tables;  // real memory for what the library itself reads and writes

  TimelineRecorder timeline{[this] { return seconds(); }};

 private:
  Backend& memory_of(int device, Purpose purpose) const noexcept {
    const bool table = purpose == Purpose::kStaging || purpose == Purpose::kTokenizer ||
                       purpose == Purpose::kRuntime;
    return tables && table && device == host_device ? *tables
                                                    : *devices[static_cast<size_t>(device)];
  }

  const std::chrono::steady_clock::time_point made_ = std::chrono::steady_clock::now();
};

// Where CPU devices come from; tests put other machines there.
struct CpuDevices {
  std::function<std::vector<NumaNode>()> nodes = [] { return numa_nodes(); };
  std::function<MemoryState()> memory = [] { return host_memory(); };  // of all nodes together
  std::function<Result<std::unique_ptr<Backend>>(const CpuOptions&)> make = make_cpu_backend;
};

// Engine::create(), with something between each device and those who use it: for tests.
using WrapDevice = std::function<std::unique_ptr<Backend>(std::unique_ptr<Backend>, int device)>;
Result<Engine> create_engine(const Config& config, const HostHooks& hooks,
                             const MachineDescription* rates, const WrapDevice& wrap = {},
                             const CpuDevices& cpus = {});

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
