// A plug-in of another release of Fathom: must be refused before it is called.
#include <cstdlib>

#include "fathom/backend_plugin.hpp"

namespace {

fathom::Result<std::unique_ptr<fathom::Backend>> make(const fathom::PluginOptions&) noexcept {
  std::abort();
}
constexpr fathom::BackendPlugin kPlugin{fathom::kBackendVersion, "0.0.1", make};

}  // namespace

extern "C" __attribute__((visibility("default"))) const fathom::BackendPlugin*
fathom_backend_plugin() noexcept {
  return &kPlugin;
}
