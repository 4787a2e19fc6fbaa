#include "loading.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <fmt/format.h>

#include "exit.h"
#include "fathom/version.hpp"
#include "machine.h"
#include "signals.h"
#include "terminal.h"

namespace cli {
namespace {

void tell_gpu_layers(const fathom::Plan& plan, const ConfigFlags& flags) {
  if (!flags.gpu_layers) return;
  std::string places;
  for (const fathom::PlanDevice& device : plan.devices)
    places += fmt::format("{}{} on {}", places.empty() ? "" : ", ", device.n_layers, device.name);
  note(fmt::format("note: -ngl {} is a hint; the plan has {} layers: {}", *flags.gpu_layers,
                   plan.model.num_hidden_layers, places));
}

fathom::HostHooks log_hooks() {
  fathom::HostHooks hooks;
  hooks.log = [](fathom::LogLevel level, std::string_view text) {
    if (level == fathom::LogLevel::kError || level == fathom::LogLevel::kWarn)
      note(text);
    else
      detail(text);
  };
  return hooks;
}

}  // namespace

fathom::Engine make_engine(const fathom::Config& config, const std::string& machine_file) {
  if (machine_file.empty()) return make_engine(config);
  const fathom::MachineDescription machine = must(fathom::MachineDescription::read(machine_file));
  return must(fathom::Engine::simulate(machine, config, log_hooks()));
}

fathom::Engine make_engine(const fathom::Config& config, fathom::OpObserver op) {
  fathom::HostHooks hooks = log_hooks();
  hooks.op = std::move(op);
  fathom::Result<fathom::Engine> engine = fathom::Engine::create(config, hooks);
  if (!engine.ok() && engine.status().code() == fathom::Code::kUnsupported)
    fail(kExitDevice, engine.status().message());
  return must(std::move(engine));
}

// Where the rates of these devices are kept; empty when there is no place.
static std::filesystem::path rates_file(const fathom::Engine& engine) {
  std::string key = std::string(fathom::version());
  for (int d = 0; d < engine.n_devices(); ++d) key += engine.device(d).describe();
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const char c : key) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  if (cache == nullptr && home == nullptr) return {};
  const std::filesystem::path folder =
      cache != nullptr ? std::filesystem::path(cache) : std::filesystem::path(home) / ".cache";
  return folder / "fathom" / fmt::format("rates-{:016x}.json", hash);
}

fathom::Engine make_engine_with_rates(const fathom::Config& config, bool measure) {
  fathom::Engine engine = make_engine(config);
  const std::filesystem::path path = rates_file(engine);
  std::error_code error;
  if (!measure && (path.empty() || !std::filesystem::exists(path, error))) return engine;
  fathom::MachineDescription rates;
  if (measure) {
    note(fmt::format("measuring {} device{}, about {} s", engine.n_devices(),
                     engine.n_devices() == 1 ? "" : "s", 2 * engine.n_devices()));
    rates = must(engine.measure());
    if (!path.empty()) {
      std::filesystem::create_directories(path.parent_path(), error);
      if (std::ofstream(path) << rates.to_json() << "\n")
        detail("rates are kept in " + path.string());
      else
        note("note: the rates could not be kept in " + path.string());
    }
  } else {
    fathom::Result<fathom::MachineDescription> kept =
        fathom::MachineDescription::read(path.string());
    if (!kept.ok()) {
      note(fmt::format("note: {} is not used: {}", path.string(), kept.status().message()));
      return engine;
    }
    rates = std::move(kept).value();
  }
  return must(fathom::Engine::create(config, log_hooks(), &rates));
}

fathom::Plan make_plan(const fathom::Engine& engine, const std::string& model_path,
                       const fathom::Config& config, const ConfigFlags& flags) {
  fathom::Plan plan = must(engine.plan(model_path, config));
  if (flags.context_of_model() && plan.model.max_position_embeddings > 0) {
    fathom::Config full = config;
    full.context_max = plan.model.max_position_embeddings;
    plan = must(engine.plan(model_path, full));
  }
  tell_gpu_layers(plan, flags);
  return plan;
}

Loaded load_model(const std::string& model_path, const fathom::Config& config,
                  const ConfigFlags& flags, TimelineFile* timeline, fathom::OpObserver op) {
  fathom::Engine engine = make_engine(config, std::move(op));
  if (timeline) timeline->start(engine);
  fathom::Plan plan = make_plan(engine, model_path, config, flags);
  detail(plan.describe());
  if (!plan.feasible) {
    if (verbosity() != Verbosity::kVerbose) note(plan.describe());
    fail(kExitInfeasible, "the plan does not fit the budget; nothing was loaded");
  }
  Progress bar("load", Progress::Unit::kBytes);
  fathom::RunOptions options;
  options.cancel = &cancel_token();
  options.progress = [&bar](fathom::ProgressPhase, int64_t done, int64_t total) {
    bar.update(done, total);
    return true;
  };
  const double start = now_seconds();
  fathom::Model model = must(fathom::Model::load(engine, plan, options));
  const double seconds = now_seconds() - start;
  end_progress_line();
  for (const std::string& line : model.load_report()) detail(line);
  return {std::move(engine), std::move(plan), std::move(model), seconds};
}

fathom::Status prefill(fathom::Session& session, std::span<const int32_t> tokens,
                       int64_t deadline_ms, size_t bar_from) {
  Progress bar("prefill", Progress::Unit::kTokens, [&session] { return memory_line(session); });
  fathom::RunOptions options;
  options.cancel = &cancel_token();
  options.deadline_ms = deadline_ms;
  if (tokens.size() >= bar_from)
    options.progress = [&bar](fathom::ProgressPhase, int64_t done, int64_t total) {
      bar.update(done, total);
      return true;
    };
  return session.prefill(tokens, options);
}

Json memory_json(const fathom::Engine& engine) {
  const fathom::MemorySnapshot snapshot = engine.memory();
  int64_t planned = 0, peak = 0;
  for (const fathom::DeviceMemory& device : snapshot.devices) {
    planned += device.bytes_planned;
    peak += device.bytes_peak;
  }
  Json purposes = Json::object();
  for (int p = 0; p < fathom::kPurposeCount; ++p) {
    const auto purpose = static_cast<fathom::Purpose>(p);
    int64_t purpose_peak = 0, purpose_planned = 0;
    for (int d = 0; d < static_cast<int>(snapshot.devices.size()); ++d) {
      purpose_peak += snapshot.item(d, purpose).bytes_peak;
      purpose_planned += snapshot.item(d, purpose).bytes_planned;
    }
    purposes[std::string(fathom::purpose_name(purpose))] = {{"peak_bytes", purpose_peak},
                                                            {"planned_bytes", purpose_planned}};
  }
  return {{"planned_peak_bytes", planned},
          {"ledger_peak_bytes", peak},
          {"rss_peak_bytes", rss_peak_bytes()},
          {"purposes", purposes}};
}

std::string memory_table(const fathom::Engine& engine) {
  const fathom::MemorySnapshot snapshot = engine.memory();
  std::string text = fmt::format("{:<8} {:<12} {:>18} {:>18} {:>18}\n", "device", "purpose", "now",
                                 "peak", "planned");
  for (int d = 0; d < static_cast<int>(snapshot.devices.size()); ++d) {
    const fathom::DeviceMemory& device = snapshot.devices[static_cast<size_t>(d)];
    for (int p = 0; p < fathom::kPurposeCount; ++p) {
      const auto purpose = static_cast<fathom::Purpose>(p);
      const fathom::MemoryItem& item = snapshot.item(d, purpose);
      if (item.bytes_peak == 0 && item.bytes_planned == 0) continue;
      text += fmt::format("{:<8} {:<12} {:>18} {:>18} {:>18}\n", device.name,
                          fathom::purpose_name(purpose), with_commas(item.bytes_now),
                          with_commas(item.bytes_peak), with_commas(item.bytes_planned));
    }
    text += fmt::format("{:<8} {:<12} {:>18} {:>18} {:>18}   budget {}\n", device.name, "total",
                        with_commas(device.bytes_now), with_commas(device.bytes_peak),
                        with_commas(device.bytes_planned), with_commas(device.budget_bytes));
  }
  text += fmt::format("process: resident peak {}, now {}", with_commas(rss_peak_bytes()),
                      with_commas(rss_bytes()));
  return text;
}

Json events_json(const fathom::Session& session) {
  Json events = Json::array();
  for (const fathom::Event& event : session.events())
    events.push_back({{"kind", event.kind},
                      {"text", event.text},
                      {"position", event.position},
                      {"bytes", event.bytes},
                      {"pass_seconds", event.pass_seconds}});
  return events;
}

double rate(int64_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

void put_json(const Json& json) {
  put(json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

}  // namespace cli
