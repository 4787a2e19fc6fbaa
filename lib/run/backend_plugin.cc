#include "backend_plugin.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <vector>

#include "fathom/version.hpp"

namespace fathom::run {
namespace {

// The folder of the file that holds this code: libfathom.so, or the program it is linked into.
std::string own_folder() {
  static const char here = 0;
  Dl_info info{};
  if (dladdr(&here, &info) == 0 || info.dli_fname == nullptr) return {};
  const std::string_view file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == file.npos ? "." : std::string(file.substr(0, slash));
}

std::vector<std::string> candidates(const std::string& path, const std::string& file) {
  if (!path.empty()) return {path};
  const std::string folder = own_folder();
  if (folder.empty()) return {file};
  return {folder + "/" + file, folder + "/../lib/" + file, file};
}

// What the loader says of a failure; it names the file.
std::string loader_text(const std::string& file) {
  const char* text = dlerror();
  return text != nullptr ? text : file;
}

}  // namespace

std::string plugin_file(std::string_view device) {
  const std::string_view kind = device.substr(0, device.find(':'));
  return kind == "cuda" ? fmt::format("libfathom_{}.so", kind) : std::string();
}

Result<std::unique_ptr<Backend>> open_plugin_device(const std::string& path,
                                                    const PluginOptions& options) {
  const std::string file = plugin_file(options.name);
  void* library = nullptr;
  std::string opened, reasons;
  for (const std::string& name : candidates(path, file)) {
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library != nullptr) {
      opened = name;
      break;
    }
    reasons += fmt::format("{}{}", reasons.empty() ? "" : "; ", loader_text(name));
  }
  if (library == nullptr)
    return Status(Code::kUnsupported,
                  fmt::format("{}: the plug-in could not be opened: {}", options.name, reasons))
        .about("devices");
  void* symbol = dlsym(library, kPluginEntry);
  if (symbol == nullptr)
    return Status(Code::kUnsupported, fmt::format("{}: {} is no plug-in of Fathom: it has no {}",
                                                  options.name, opened, kPluginEntry))
        .about("devices");
  const BackendPlugin* plugin = reinterpret_cast<const BackendPlugin* (*)() noexcept>(symbol)();
  if (plugin->version != kBackendVersion)
    return Status(Code::kVersion,
                  fmt::format("{}: {} was built for version {} of the backend interface, this "
                              "library has {}",
                              options.name, opened, plugin->version, kBackendVersion))
        .about("devices");
  if (std::string_view(plugin->library_version) != FATHOM_VERSION_STRING)
    return Status(Code::kVersion,
                  fmt::format("{}: {} belongs to Fathom {}, this library is {}", options.name,
                              opened, plugin->library_version, FATHOM_VERSION_STRING))
        .about("devices");
  Result<std::unique_ptr<Backend>> device = plugin->make(options);
  if (!device.ok()) return std::move(device).status().about("devices");
  return device;
}

}  // namespace fathom::run
