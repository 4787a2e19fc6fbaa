// A plug-in for another version of the backend interface: must be refused before it is called.
#include <cstdlib>

#include "fathom/backend_plugin.hpp"
#include "fathom/version.hpp"

namespace {

fathom::Result<std::unique_ptr<fathom::Backend>> make(const fathom::PluginOptions&) noexcept {
  std::abort();
}
constexpr fathom::BackendPlugin kPlugin{fathom::kBackendVersion + 1, FATHOM_VERSION_STRING, make};

}  // namespace

extern "C" __attribute__((visibility("default"))) const fathom::BackendPlugin*
fathom_backend_plugin() noexcept {
  return &kPlugin;
}
