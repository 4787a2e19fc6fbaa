// Backends in shared libraries of their own, opened when a configuration names a device of theirs:
// "cuda:N" opens libfathom_cuda.so.  A plug-in exports one function, kPluginEntry:
//
//   extern "C" const fathom::BackendPlugin* fathom_backend_plugin() noexcept;
//
// It is C++ on both sides, so it must be built with the same compiler and the same release of
// Fathom; the two versions are compared before anything else of it is used.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "fathom/backend.hpp"
#include "fathom/status.hpp"

namespace fathom {

struct PluginOptions {
  std::string_view name;  // the device: "cuda:0"
  Numerics numerics = Numerics::kFast;
};

struct BackendPlugin {
  uint32_t version;             // kBackendVersion when it was built; the first field for ever
  const char* library_version;  // FATHOM_VERSION_STRING when it was built
  // Errors: kNotFound (no such device), kDevice (no driver, a library of the vendor's is missing, a
  // failure), kUnsupported, kMemory; the message has the driver's text.
  Result<std::unique_ptr<Backend>> (*make)(const PluginOptions&) noexcept;
};

inline constexpr const char* kPluginEntry = "fathom_backend_plugin";

}  // namespace fathom
