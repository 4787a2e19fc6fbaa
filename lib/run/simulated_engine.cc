// Engine::simulate: an engine on the devices of a machine description.
#include <fmt/format.h>

#include <algorithm>

#include "config_schema.h"
#include "engine_state.h"
#include "fathom/engine.hpp"

namespace fathom {
namespace {

// The devices that `config` names, with their links; all when it says nothing.
Result<MachineDescription> chosen_devices(const MachineDescription& machine, Config& config) {
  if (config.devices == Config{}.devices && machine.find(config.devices) < 0)
    config.devices.clear();
  if (config.devices.empty() || config.devices == Config{}.devices) {
    config.devices.clear();
    for (const MachineDevice& device : machine.devices)
      config.devices += (config.devices.empty() ? "" : ",") + device.name;
    return machine;
  }
  FATHOM_TRY_ASSIGN(const std::vector<std::string> names, run::parse_devices(config.devices));
  MachineDescription chosen;
  chosen.name = machine.name;
  chosen.expert_skew = machine.expert_skew;
  std::vector<int> index;
  for (const std::string& name : names) {
    index.push_back(machine.find(name));
    if (index.back() < 0)
      return Status(Code::kConfig,
                    fmt::format("devices: the machine described has no device {}", name))
          .about("devices");
    chosen.devices.push_back(machine.devices[static_cast<size_t>(index.back())]);
  }
  for (int a = 0; a < static_cast<int>(index.size()); ++a)
    for (int b = a + 1; b < static_cast<int>(index.size()); ++b) {
      MachineLink link = machine.link(index[static_cast<size_t>(a)], index[static_cast<size_t>(b)]);
      link.from = a, link.to = b;
      chosen.links.push_back(link);
    }
  return chosen;
}

Result<Engine> simulated_engine(const MachineDescription& described, Config config,
                                const HostHooks& hooks) {
  FATHOM_TRY_ASSIGN(MachineDescription machine, chosen_devices(described, config));
  FATHOM_TRY(machine.complete());
  FATHOM_TRY(config.validate());
  const int host = machine.host();
  if (host < 0)
    return Status(Code::kConfig,
                  fmt::format("devices = {}: no CPU device is among them; tokens, page tables and "
                              "the tokenizer live on one",
                              config.devices))
        .about("devices");

  CpuOptions options;
  options.name = "host";
  options.threads = static_cast<int>(config.threads);
  if (options.threads == 0) options.threads = machine.devices[static_cast<size_t>(host)].threads;
  options.isa = config.isa;
  options.numerics = config.numerics;
  options.numa = NumaMode::kOff;  // its products are not computed
  FATHOM_TRY_ASSIGN(std::shared_ptr<Backend> tables, make_cpu_backend(options));

  std::vector<run::LedgerDevice> accounts;
  for (MachineDevice& device : machine.devices) {
    const bool is_host = device.kind == DeviceKind::kCpu;
    if (is_host) device.runtime_bytes = std::max(device.runtime_bytes, tables->runtime_bytes());
    if (const auto it = config.budget.find(device.name); it != config.budget.end())
      device.budget_bytes = it->second;
    accounts.push_back({device.name, device.budget_bytes, is_host});
  }
  const auto host_limit = config.budget.find("host");
  const int64_t host_budget =
      host_limit == config.budget.end() ? run::Ledger::kUnlimited : host_limit->second;

  auto simulation = std::make_shared<run::SimulatedMachine>(machine);
  std::vector<std::unique_ptr<Backend>> devices;
  for (int d = 0; d < static_cast<int>(machine.devices.size()); ++d)
    devices.push_back(std::make_unique<run::SimulatedBackend>(simulation, d, tables));
  auto state = std::make_shared<run::EngineState>(
      config, hooks, std::move(devices), std::move(machine), std::move(accounts), host_budget);
  state->simulation = std::move(simulation);
  state->tables = std::move(tables);
  FATHOM_TRY(state->start());
  return Engine(std::move(state));
}

}  // namespace

Result<Engine> Engine::simulate(const MachineDescription& machine, const Config& config,
                                const HostHooks& hooks) {
  return run::guarded([&] { return simulated_engine(machine, config, hooks); });
}

bool Engine::simulated() const noexcept {
  return state_->simulation != nullptr;
}

double Engine::busy_seconds(int device) const noexcept {
  return state_->simulation ? state_->simulation->busy_seconds(device) : 0;
}

}  // namespace fathom
