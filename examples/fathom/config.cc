// fathom config: the configuration that the flags make, or the schema of all keys; and
// fathom version: what this build and this machine can do.
#include <memory>

#include <fmt/format.h>

#include "commands.h"
#include "exit.h"
#include "fathom/backend.hpp"
#include "fathom/version.hpp"
#include "loading.h"
#include "terminal.h"

namespace cli {
namespace {

struct ConfigArgs {
  ConfigFlags config;
  OutputFlags output;
  bool schema = false, keys = false;
};

std::string keys_table() {
  std::string text;
  for (const Json& key : Json::parse(fathom::Config::schema_json())) {
    const auto field = [&key](const char* name) -> std::string {
      if (!key.contains(name)) return "";
      return key[name].is_string() ? key[name].get<std::string>() : key[name].dump();
    };
    text += fmt::format("{:<18} {} {}\n", field("key"), field("type"), field("unit"));
    text += fmt::format("{:<18}   default {}; range {}\n", "", field("default"), field("range"));
    text += fmt::format("{:<18}   {}\n", "", field("text"));
    if (!field("memory").empty()) text += fmt::format("{:<18}   memory: {}\n", "", field("memory"));
  }
  return text;
}

int show_config(const ConfigArgs& args) {
  apply(args.output);
  const fathom::Config config = make_config(args.config);
  must(config.validate());
  if (args.schema)
    put_json(Json::parse(fathom::Config::schema_json()));
  else if (args.keys)
    put(keys_table());
  else
    put_json(Json::parse(config.to_json()));
  return kExitOk;
}

int show_version(const OutputFlags& output) {
  apply(output);
  const std::vector<fathom::IsaInfo> isas = fathom::cpu_isas();
  if (output.json) {
    Json list = Json::array();
    for (const fathom::IsaInfo& isa : isas)
      list.push_back({{"name", isa.name}, {"available", isa.available}, {"reason", isa.reason}});
    put_json({{"version", fathom::version()}, {"isas", list}});
    return kExitOk;
  }
  put(fmt::format("fathom {}\n", fathom::version()));
  for (const fathom::IsaInfo& isa : isas)
    put(fmt::format("  {:<8} {}\n", isa.name, isa.available ? "available" : isa.reason));
  return kExitOk;
}

}  // namespace

void add_config(CLI::App& app, Action& action) {
  auto args = std::make_shared<ConfigArgs>();
  CLI::App* command = app.add_subcommand(
      "config", "The configuration that the flags make, as JSON; --schema: every key");
  command->add_flag("--schema", args->schema,
                    "every key as JSON: type, unit, default, range, effect on memory, meaning");
  command->add_flag("--keys", args->keys, "the same as a table for people");
  add_config_flags(*command, args->config);
  add_output_flags(*command, args->output);
  command->callback([args, &action] { action = [args] { return show_config(*args); }; });
}

void add_version(CLI::App& app, Action& action) {
  auto output = std::make_shared<OutputFlags>();
  CLI::App* command = app.add_subcommand("version", "The version, and the instruction sets");
  add_output_flags(*command, *output);
  command->callback([output, &action] { action = [output] { return show_version(*output); }; });
}

}  // namespace cli
