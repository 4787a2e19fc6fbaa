// Engine: makes the devices that the configuration names, and their ledger.
#include "fathom/engine.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <thread>

#include "../io/replace_file.h"
#include "backend_plugin.h"
#include "config_schema.h"
#include "engine_state.h"
#include "observed_backend.h"
#include "planner.h"
#include "queued_backend.h"

namespace fathom {
namespace {

// "cpu" or "cpu:N".
bool is_cpu_name(std::string_view name) {
  if (name == "cpu") return true;
  if (name.substr(0, 4) != "cpu:" || name.size() == 4) return false;
  return std::all_of(name.begin() + 4, name.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// The documented link between two nodes is that of two sockets, a distance of 20; others are as
// much faster or slower as the firmware says that they are nearer or further.
void between_nodes(MachineLink& link, const NumaNode* a, const NumaNode* b,
                   const std::vector<NumaNode>& nodes) {
  if (a == nullptr || b == nullptr) return;
  const auto to = static_cast<size_t>(b - nodes.data());
  if (to >= a->distances.size()) return;
  constexpr double kSockets = 20;
  const double factor = std::clamp(a->distances[to] / kSockets, 0.5, 10.0);
  link.bytes_per_s /= factor;
  link.latency_s *= factor;
}

// Takes over the rates of devices and links of the same names.
void adopt_rates(MachineDescription& machine, const MachineDescription& known) {
  machine.file_bytes_per_s = known.file_bytes_per_s;
  machine.file_source = known.file_source;
  for (MachineDevice& device : machine.devices) {
    const int at = known.find(device.name);
    if (at < 0) continue;
    const MachineDevice& from = known.devices[static_cast<size_t>(at)];
    device.read_bytes_per_s = from.read_bytes_per_s;
    device.read_bytes_per_s_by_type = from.read_bytes_per_s_by_type;
    device.quantised_flops_per_s = from.quantised_flops_per_s;
    device.dense_flops_per_s = from.dense_flops_per_s;
    device.attention_flops_per_s = from.attention_flops_per_s;
    device.operation_s = from.operation_s;
    device.source = from.source;
  }
  for (MachineLink& link : machine.links) {
    const int from = known.find(machine.devices[static_cast<size_t>(link.from)].name);
    const int to = known.find(machine.devices[static_cast<size_t>(link.to)].name);
    if (from < 0 || to < 0) continue;
    const MachineLink& other = known.link(from, to);
    link.bytes_per_s = other.bytes_per_s;
    link.latency_s = other.latency_s;
    link.source = other.source;
  }
}

// A device of the configuration: by its name, or one of the nodes that "numa" stands for.
struct Named {
  std::string name;
  const NumaNode* node = nullptr;
};

Result<std::vector<Named>> named_devices(const Config& config, const std::vector<NumaNode>& nodes) {
  FATHOM_TRY_ASSIGN(const std::vector<std::string> names, run::parse_devices(config.devices));
  std::vector<Named> devices;
  for (const std::string& name : names) {
    if (name != run::kNodeDevices) {
      devices.push_back({name});
      continue;
    }
    for (const NumaNode& node : nodes)
      if (!node.cpus.empty()) devices.push_back({fmt::format("cpu:{}", node.id), &node});
  }
  const auto count = [&](const std::string& name) {
    return std::count_if(devices.begin(), devices.end(),
                         [&](const Named& device) { return device.name == name; });
  };
  for (const Named& device : devices)
    if (count(device.name) > 1)
      return Status(Code::kConfig, fmt::format("devices = \"{}\": {} is a node and named beside it",
                                               config.devices, device.name))
          .about("devices");
  for (const auto& [name, bytes] : config.budget)
    if (name != "host" && count(name) == 0)
      return Status(Code::kConfig,
                    fmt::format("budget.{} = {}: no node of this number has a processor that this "
                                "process may use",
                                name, bytes))
          .about(fmt::format("budget.{}", name));
  return devices;
}

Result<std::unique_ptr<Backend>> make_device(const Config& config, const HostHooks& hooks,
                                             const Named& named, int threads,
                                             const run::CpuDevices& cpus) {
  const std::string& name = named.name;
  if (!run::plugin_file(name).empty())
    return run::open_plugin_device(config.cuda_plugin.value_or(""),
                                   {.name = name, .numerics = config.numerics});
  if (!is_cpu_name(name))
    return Status(Code::kUnsupported,
                  fmt::format("devices: \"{}\" is not a device of this build (cpu, cpu:N, cuda:N)",
                              name))
        .about("devices");
  CpuOptions options;
  options.name = name;
  options.threads = threads;
  options.isa = config.isa;
  options.numerics = config.numerics;
  options.allocator = hooks.allocator;
  options.numa = config.numa;
  if (named.node != nullptr) options.node = named.node->id;
  return cpus.make(options);
}

bool is_host(const Backend& device) {
  return device.kind() == DeviceKind::kCpu;
}

struct Devices {
  std::vector<std::unique_ptr<Backend>> all;
  std::vector<const NumaNode*> nodes;  // of each; null: of no one node
  bool host_is_implied = false;        // the last one
};

// The devices that the configuration names, without those it lets be missing; behind them a CPU
// that computes nothing where none is named: tokens, tables, staging and logits are the host's.
Result<Devices> make_devices(const Config& config, const HostHooks& hooks,
                             const run::CpuDevices& cpus, const std::vector<NumaNode>& nodes,
                             std::vector<std::string>& warnings) {
  FATHOM_TRY_ASSIGN(const std::vector<Named> names, named_devices(config, nodes));
  Devices devices;
  for (const Named& named : names) {
    Result<std::unique_ptr<Backend>> device =
        make_device(config, hooks, named, static_cast<int>(config.threads), cpus);
    if (device.ok()) {
      devices.all.push_back(std::move(device).value());
      devices.nodes.push_back(named.node);
    } else if (config.devices_missing == MissingDevice::kRefuse ||
               run::plugin_file(named.name).empty())
      return std::move(device).status();
    else
      warnings.push_back(
          fmt::format("left out (devices.missing=skip): {}", device.status().message()));
  }
  if (devices.all.empty())
    return Status(
               Code::kConfig,
               fmt::format("devices = \"{}\": none of them can be had; \"{},cpu\" names one that "
                           "always can",
                           config.devices, config.devices))
        .about("devices");
  devices.host_is_implied = std::none_of(devices.all.begin(), devices.all.end(),
                                         [](const auto& d) { return is_host(*d); });
  if (devices.host_is_implied) {
    FATHOM_TRY_ASSIGN(std::unique_ptr<Backend> host, make_device(config, hooks, {"cpu"}, 1, cpus));
    devices.all.push_back(std::move(host));
    devices.nodes.push_back(nullptr);
  }
  return devices;
}

}  // namespace

Result<Engine> run::create_engine(const Config& config, const HostHooks& hooks,
                                  const MachineDescription* rates, const WrapDevice& wrap,
                                  const CpuDevices& cpus) {
  FATHOM_TRY(config.validate());
  const HostAllocator& allocator = hooks.allocator;
  if (const bool all =
          allocator.reserve && allocator.commit && allocator.decommit && allocator.release;
      !all && (allocator.reserve || allocator.commit || allocator.decommit || allocator.release))
    return Status(
        Code::kInvalidArgument,
        "the host's allocator has some of reserve, commit, decommit and release, not all");
  std::vector<std::string> warnings;
  const std::vector<NumaNode> nodes = cpus.nodes();
  FATHOM_TRY_ASSIGN(Devices made, make_devices(config, hooks, cpus, nodes, warnings));
  std::vector<std::unique_ptr<Backend>>& devices = made.all;
  std::vector<std::string> names;
  for (const auto& device : devices) names.emplace_back(device->name());
  if (wrap)
    for (size_t d = 0; d < devices.size(); ++d)
      devices[d] = wrap(std::move(devices[d]), static_cast<int>(d));
  // Several devices work at once: those that compute on the caller's thread get one of their own.
  if (devices.size() > 1)
    for (auto& device : devices)
      if (is_host(*device)) {
        FATHOM_TRY_ASSIGN(device, run::queued(std::move(device)));
      }
  if (hooks.op)
    for (size_t d = 0; d < devices.size(); ++d)
      devices[d] = run::observed(std::move(devices[d]), static_cast<int>(d), hooks.op);

  // Budgets: as asked for, else what is free now.
  const auto budget_of = [&](const std::string& name, int64_t otherwise) {
    const auto it = config.budget.find(name);
    return it == config.budget.end() ? otherwise : it->second;
  };
  const bool any_node = std::any_of(made.nodes.begin(), made.nodes.end(),
                                    [](const NumaNode* node) { return node != nullptr; });
  const auto host =
      std::find_if(devices.begin(), devices.end(), [](const auto& d) { return is_host(*d); });
  const int64_t host_budget =
      budget_of("host", any_node ? cpus.memory().free_bytes : (*host)->memory().free_bytes);
  std::vector<run::LedgerDevice> accounts;
  for (size_t i = 0; i < names.size(); ++i) {
    const bool on_host = is_host(*devices[i]);
    // What a device of its own memory holds for its runtime already is part of its budget.
    const int64_t free = devices[i]->memory().free_bytes;
    const int64_t otherwise = made.nodes[i] != nullptr ? std::min(host_budget, free)
                              : on_host                ? host_budget
                                                       : free + devices[i]->runtime_bytes();
    accounts.push_back({names[i], budget_of(names[i], otherwise), on_host});
  }
  // A budget asked for by device is not cut by what happens to be free.
  int64_t asked = 0;
  for (const run::LedgerDevice& account : accounts)
    if (account.is_host && config.budget.count(account.name)) asked += account.budget_bytes;
  const int64_t host_limit =
      config.budget.count("host") ? host_budget : std::max(host_budget, asked);

  MachineDescription machine;
  for (size_t i = 0; i < names.size(); ++i) {
    const Backend& backend = *devices[i];
    MachineDevice device;
    device.name = names[i];
    device.kind = backend.kind();
    device.bytes = backend.memory().total_bytes;
    device.budget_bytes = std::min(accounts[i].budget_bytes, device.bytes);
    device.runtime_bytes = backend.runtime_bytes();
    const int processors = made.nodes[i] != nullptr
                               ? static_cast<int>(made.nodes[i]->cpus.size())
                               : static_cast<int>(std::thread::hardware_concurrency());
    device.threads = config.threads > 0 ? static_cast<int>(config.threads) : processors;
    machine.devices.push_back(std::move(device));
  }
  FATHOM_TRY(machine.complete());
  for (MachineLink& link : machine.links)
    between_nodes(link, made.nodes[static_cast<size_t>(link.from)],
                  made.nodes[static_cast<size_t>(link.to)], nodes);
  if (rates != nullptr) adopt_rates(machine, *rates);

  auto state = std::make_shared<run::EngineState>(
      config, hooks, std::move(devices), std::move(machine), std::move(accounts), host_limit);
  state->host_is_implied = made.host_is_implied;
  for (const std::string& warning : warnings) state->log(LogLevel::kWarn, warning);
  FATHOM_TRY(state->start());
  return Engine(std::move(state));
}

Engine::Engine(std::shared_ptr<run::EngineState> state) noexcept : state_(std::move(state)) {}

Result<Engine> Engine::create(const Config& config, const HostHooks& hooks,
                              const MachineDescription* rates) {
  return run::guarded([&] { return run::create_engine(config, hooks, rates); });
}

const Config& Engine::config() const noexcept {
  return state_->config;
}
int Engine::n_devices() const noexcept {
  return static_cast<int>(state_->devices.size());
}
const Backend& Engine::device(int index) const noexcept {
  return *state_->devices[static_cast<size_t>(index)];
}

const MachineDescription& Engine::machine() const noexcept {
  return state_->machine;
}
double Engine::seconds() const noexcept {
  return state_->seconds();
}

Result<Plan> Engine::plan(const std::string& model_path) const {
  return plan(model_path, state_->config);
}

Result<Plan> Engine::plan(const std::string& model_path, const Config& config) const {
  return run::guarded([&]() -> Result<Plan> {
    Config asked = config;
    if (simulated() && asked.devices == Config{}.devices) asked.devices = state_->config.devices;
    FATHOM_TRY_ASSIGN(auto planner, run::Planner::open(*state_, model_path, asked));
    return planner.plan(asked);
  });
}

MemorySnapshot Engine::memory() const {
  return state_->ledger.snapshot();
}
void Engine::reset_peaks() noexcept {
  state_->ledger.reset_peaks();
}

Status Engine::set_budget(int device, int64_t bytes) {
  if (device < 0 || device >= n_devices())
    return Status(Code::kInvalidArgument,
                  fmt::format("device {} is not in [0, {})", device, n_devices()));
  if (bytes < 0)
    return Status(Code::kInvalidArgument, fmt::format("a budget of {} bytes is negative", bytes));
  state_->ledger.set_budget(device, bytes);
  state_->ledger.take_back(device, 0, /*wait=*/false);
  state_->timeline.mark("budget", fmt::format("{}: {} bytes", this->device(device).name(), bytes),
                        0, 0);
  return {};
}

Status Engine::set_host_budget(int64_t bytes) {
  if (bytes < 0)
    return Status(Code::kInvalidArgument, fmt::format("a budget of {} bytes is negative", bytes));
  state_->ledger.set_host_budget(bytes);
  state_->ledger.take_back(state_->host_device, 0, /*wait=*/false);
  state_->timeline.mark("budget", fmt::format("host: {} bytes", bytes), 0, 0);
  return {};
}

Status Engine::start_timeline(const TimelineOptions& options) {
  return run::guarded([&]() -> Status {
    run::EngineState& s = *state_;
    FATHOM_TRY_ASSIGN(const int64_t bytes,
                      run::TimelineRecorder::buffer_bytes(options, n_devices()));
    FATHOM_TRY_ASSIGN(auto buffer, s.allocate(s.host_device, Purpose::kRuntime, bytes));
    return s.timeline.start(std::move(buffer), s.ledger, s.host_device, options);
  });
}
Result<Timeline> Engine::timeline() const {
  return run::guarded([&] { return state_->timeline.picture(); });
}
Status Engine::write_timeline(const std::string& path, TimelineFormat format) const {
  return run::guarded([&]() -> Status {
    FATHOM_TRY_ASSIGN(const Timeline recorded, state_->timeline.picture());
    const std::string text = format == TimelineFormat::kJson  ? recorded.to_json()
                             : format == TimelineFormat::kCsv ? recorded.to_csv()
                             : format == TimelineFormat::kSvg ? recorded.to_svg()
                                                              : recorded.to_html();
    io::FileCalls calls;
    FATHOM_TRY_ASSIGN(io::ReplaceFile file, io::ReplaceFile::create(path, calls));
    FATHOM_TRY(file.write(std::as_bytes(std::span(text))));
    return file.commit();
  });
}
Status Engine::stop_timeline() {
  return run::guarded([&] { return state_->timeline.stop(); });
}

}  // namespace fathom
