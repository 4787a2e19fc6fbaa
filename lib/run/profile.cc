// Profiles of tuned settings as text, and the fingerprints that say what they are for.
#include <fmt/format.h>

#include <fstream>
#include <thread>

#include "../io/hash128.h"
#include "../io/json.h"
#include "config_schema.h"
#include "fathom/tune.hpp"

namespace fathom {
namespace {

constexpr int64_t kProfileVersion = 1;

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, 10, "model name") == 0) return line.substr(10);
  return "";
}

}  // namespace

std::string model_fingerprint(const FileInfo& file) {
  return fmt::format("{:016x}{:016x}", file.fingerprint_hi, file.fingerprint_lo);
}

std::string machine_fingerprint(const Engine& engine) {
  std::string facts = processor_name();
  facts += fmt::format("\n{}\n", std::thread::hardware_concurrency());
  for (const IsaInfo& isa : cpu_isas()) facts += fmt::format("{} {}\n", isa.name, isa.available);
  for (const MachineDevice& device : engine.machine().devices)
    facts += fmt::format("{} {} {}\n", device.name, static_cast<int>(device.kind), device.bytes);
  io::Hash128 hash;
  hash.update(std::as_bytes(std::span(facts)));
  const io::Hash128::Digest digest = hash.digest();
  return fmt::format("{:016x}{:016x}", digest.hi, digest.lo);
}

std::string Profile::to_json() const {
  std::string keys;
  for (const auto& [key, value] : settings)
    keys += fmt::format("{}\n    {}: {}", keys.empty() ? "" : ",", run::json_quote(key),
                        run::json_quote(value));
  return fmt::format(
      "{{\n  \"fathom_profile\": {},\n  \"model\": {},\n  \"machine\": {},\n  \"goal\": {},\n"
      "  \"settings\": {{{}\n  }},\n  \"prefill_tps\": {:.3f},\n  \"decode_tps\": {:.3f}\n}}\n",
      kProfileVersion, run::json_quote(model), run::json_quote(machine), run::json_quote(goal),
      keys, rates.prefill_tps, rates.decode_tps);
}

Result<Profile> Profile::parse(std::string_view json) {
  FATHOM_TRY_ASSIGN(const io::JsonDocument document,
                    io::JsonDocument::parse(json, {.max_bytes = 1 << 16, .max_depth = 4}));
  const io::JsonValue root = document.root();
  FATHOM_TRY_ASSIGN(const int64_t version,
                    io::json_integer(root, "fathom_profile", 1, int64_t{1} << 30));
  if (version > kProfileVersion)
    return Status(Code::kVersion, fmt::format("profile of version {}, this library knows {}",
                                              version, kProfileVersion));
  Profile profile;
  for (const auto& [key, field] :
       {std::pair{"model", &profile.model}, std::pair{"machine", &profile.machine},
        std::pair{"goal", &profile.goal}}) {
    FATHOM_TRY_ASSIGN(const std::string_view text, io::json_string(root, key));
    *field = text;
  }
  for (const auto& [key, field] : {std::pair{"prefill_tps", &profile.rates.prefill_tps},
                                   std::pair{"decode_tps", &profile.rates.decode_tps}}) {
    FATHOM_TRY_ASSIGN(*field, io::json_number(root, key, 0, 1e12));
  }
  const io::JsonValue settings = root.find("settings");
  if (!settings.is_object())
    return Status(Code::kFormat, "profile: settings is not an object").about("settings");
  Config config;
  for (const auto& member : settings.members()) {
    if (!member.value.is_string())
      return Status(Code::kFormat, fmt::format("profile: settings.{} is no text", member.key))
          .about(member.key);
    if (Status status = config.set(member.key, member.value.string()); !status.ok())
      return Status(Code::kFormat, fmt::format("profile: {}", status.message())).about(member.key);
    profile.settings.emplace_back(member.key, member.value.string());
  }
  return profile;
}

Status Profile::check(const FileInfo& file, const Engine& engine) const {
  if (model != model_fingerprint(file))
    return Status(Code::kMismatch, fmt::format("the profile is for another model file ({}, not {})",
                                               model, model_fingerprint(file)));
  if (machine != machine_fingerprint(engine))
    return Status(Code::kMismatch, fmt::format("the profile is for another machine ({}, not {})",
                                               machine, machine_fingerprint(engine)));
  return {};
}

Status Profile::apply(Config& config) const {
  Config changed = config;
  for (const auto& [key, value] : settings) FATHOM_TRY(changed.set(key, value));
  config = std::move(changed);
  return {};
}

}  // namespace fathom
