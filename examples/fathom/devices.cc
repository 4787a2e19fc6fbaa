// fathom devices: what this machine has - memory nodes with their processors, the devices that the
// configuration makes of them, and the links between these.
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "loading.h"
#include "terminal.h"

namespace cli {
namespace {

struct DevicesArgs {
  bool measure = false;
  ConfigFlags config;
  OutputFlags output;
};

// 0 1 2 3 8 -> "0-3,8".
std::string ranges(const std::vector<int>& ids) {
  std::string text;
  for (size_t i = 0; i < ids.size(); ++i) {
    size_t last = i;
    while (last + 1 < ids.size() && ids[last + 1] == ids[last] + 1) ++last;
    text += fmt::format("{}{}", text.empty() ? "" : ",", ids[i]);
    if (last > i) text += fmt::format("-{}", ids[last]);
    i = last;
  }
  return text.empty() ? "none" : text;
}

Json json_of(const fathom::Engine& engine, const std::vector<fathom::NumaNode>& nodes) {
  Json all = Json::parse(engine.machine().to_json());
  for (int d = 0; d < engine.n_devices(); ++d) {
    all["devices"][static_cast<size_t>(d)]["text"] = engine.device(d).describe();
    all["devices"][static_cast<size_t>(d)]["remarks"] = engine.device(d).remarks();
  }
  all["nodes"] = Json::array();
  for (const fathom::NumaNode& node : nodes)
    all["nodes"].push_back({{"id", node.id},
                            {"cpus", node.cpus},
                            {"bytes", node.total_bytes},
                            {"free_bytes", node.free_bytes},
                            {"distances", node.distances}});
  return all;
}

std::string text_of(const fathom::Engine& engine, const std::vector<fathom::NumaNode>& nodes) {
  std::string text = "memory nodes that this process may use\n";
  for (const fathom::NumaNode& node : nodes)
    text += fmt::format("  node {}: processors {}; {}, {} free; distances {}\n", node.id,
                        ranges(node.cpus), human_bytes(node.total_bytes),
                        human_bytes(node.free_bytes), fmt::join(node.distances, " "));
  const fathom::MachineDescription& machine = engine.machine();
  text += "devices\n";
  for (int d = 0; d < engine.n_devices(); ++d) {
    const fathom::MachineDevice& device = machine.devices[static_cast<size_t>(d)];
    text += fmt::format("  {}: {} of {}, reads {:.1f} GB/s ({})\n", device.name,
                        human_bytes(device.budget_bytes), human_bytes(device.bytes),
                        device.read_bytes_per_s / 1e9, rate_source_name(device.source));
    std::string description = engine.device(d).describe();
    while (!description.empty() && description.back() == '\n') description.pop_back();
    text += "    ";
    for (const char c : description) text += c == '\n' ? "\n    " : std::string(1, c);
    text += "\n";
  }
  if (!machine.links.empty()) text += "links\n";
  for (const fathom::MachineLink& link : machine.links)
    text += fmt::format("  {} - {}: {:.1f} GB/s, {:.1f} us ({})\n",
                        machine.devices[static_cast<size_t>(link.from)].name,
                        machine.devices[static_cast<size_t>(link.to)].name, link.bytes_per_s / 1e9,
                        link.latency_s * 1e6, rate_source_name(link.source));
  return text;
}

int run(const DevicesArgs& args) {
  apply(args.output);
  const fathom::Engine engine = make_engine_with_rates(make_config(args.config), args.measure);
  const std::vector<fathom::NumaNode> nodes = fathom::numa_nodes();
  if (args.output.json)
    put_json(json_of(engine, nodes));
  else
    put(text_of(engine, nodes));
  return kExitOk;
}

}  // namespace

void add_devices(CLI::App& app, Action& action) {
  auto args = std::make_shared<DevicesArgs>();
  CLI::App* command =
      app.add_subcommand("devices", "Show memory nodes, devices and links of this machine");
  command->add_flag("--measure", args->measure,
                    "measure first, two seconds per device; the rates are kept for later");
  add_config_flags(*command, args->config, false);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return run(*args); }; });
}

}  // namespace cli
