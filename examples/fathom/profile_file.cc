#include "profile_file.h"

#include <unistd.h>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>

#include <fmt/format.h>

#include "exit.h"
#include "loading.h"
#include "terminal.h"

namespace cli {

std::string profile_path(const std::string& model, const std::string& machine) {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  std::string folder;
  if (cache && *cache == '/')
    folder = cache;
  else if (home && *home == '/')
    folder = std::string(home) + "/.cache";
  else
    return "";
  return fmt::format("{}/fathom/profiles/{}-{}.json", folder, model, machine);
}

void write_profile(const std::string& path, const fathom::Profile& profile) {
  if (path.empty()) fail(kExitIo, "neither XDG_CACHE_HOME nor HOME is set: give -o FILE");
  const std::filesystem::path place(path);
  std::error_code error;
  if (place.has_parent_path()) std::filesystem::create_directories(place.parent_path(), error);
  const std::string beside = fmt::format("{}.tmp.{}", path, getpid());
  const std::string text = profile.to_json();
  std::FILE* file = error ? nullptr : std::fopen(beside.c_str(), "wb");
  bool written = file && std::fwrite(text.data(), 1, text.size(), file) == text.size();
  const int number = error ? error.value() : errno;
  if (file) written = std::fclose(file) == 0 && written;
  if (written && std::rename(beside.c_str(), path.c_str()) == 0) return;
  const std::string why = std::strerror(written ? errno : number);
  std::remove(beside.c_str());
  fail(kExitIo, fmt::format("{}: {}", path, why));
}

namespace {

// Why it is not used, or nothing.
std::optional<std::string> try_profile(const std::string& model, const ConfigFlags& flags,
                                       const std::string& text, const fathom::FileInfo& file,
                                       const fathom::Engine& engine, fathom::Config& config,
                                       std::string& told) {
  const fathom::Result<fathom::Profile> profile = fathom::Profile::parse(text);
  if (!profile.ok()) return std::string(profile.status().message());
  if (fathom::Status status = profile->check(file, engine); !status.ok())
    return std::string(status.message());
  fathom::Config tuned;
  must(profile->apply(tuned));
  tuned = make_config(flags, tuned);
  const fathom::Result<fathom::Engine> other = fathom::Engine::create(tuned);
  if (!other.ok()) return std::string(other.status().message());
  const fathom::Result<fathom::Plan> plan = other->plan(model, tuned);
  if (!plan.ok()) return std::string(plan.status().message());
  if (!plan->feasible) {
    const fathom::Result<fathom::Plan> plain = engine.plan(model, config);
    // What does not fit without it either is not the profile's fault.
    if (plain.ok() && plain->feasible) return "it does not fit the memory that is free now";
  }
  config = tuned;
  for (const auto& [key, value] : profile->settings)
    told += fmt::format("{}{}={}", told.empty() ? "" : " ", key, must(tuned.get(key)));
  return std::nullopt;
}

}  // namespace

fathom::Config config_with_profile(const std::string& model, const ConfigFlags& flags) {
  fathom::Config config = make_config(flags);
  const fathom::Result<fathom::FileInfo> file = fathom::inspect_file(model);
  const fathom::Result<fathom::Engine> engine = fathom::Engine::create(config);
  if (!file.ok() || !engine.ok()) return config;  // loading will say what is wrong
  const std::string path =
      profile_path(fathom::model_fingerprint(*file), fathom::machine_fingerprint(*engine));
  std::ifstream stream(path, std::ios::binary);
  if (path.empty() || !stream) return config;
  const std::string text((std::istreambuf_iterator<char>(stream)),
                         std::istreambuf_iterator<char>());
  std::string told;
  if (const auto why_not = try_profile(model, flags, text, *file, *engine, config, told))
    note(fmt::format("profile ignored: {} ({})", *why_not, path));
  else
    note(fmt::format("profile: {} (--no-profile switches it off)", told));
  return config;
}

}  // namespace cli
