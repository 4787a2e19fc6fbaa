// The one entry point of libfathom_cuda.so.
#include <fmt/format.h>

#include <charconv>
#include <utility>

#include "cuda/cuda_backend.h"
#include "fathom/backend_plugin.hpp"
#include "fathom/version.hpp"

namespace fathom::cuda {
namespace {

Result<std::unique_ptr<Backend>> make(const PluginOptions& options) {
  constexpr std::string_view kPrefix = "cuda:";
  int index = -1;
  const std::string_view name = options.name;
  if (name.substr(0, kPrefix.size()) == kPrefix) {
    const char* end = name.data() + name.size();
    const auto [at, error] = std::from_chars(name.data() + kPrefix.size(), end, index);
    if (error != std::errc() || at != end) index = -1;
  }
  if (index < 0)
    return Status(Code::kInvalidArgument,
                  fmt::format("\"{}\" is no name of a GPU: cuda:N is", name));
  FATHOM_TRY_ASSIGN(std::unique_ptr<Device> device, open_gpu(index, std::string(name)));
  return std::unique_ptr<Backend>(
      std::make_unique<CudaBackend>(std::move(device), options.numerics));
}

Result<std::unique_ptr<Backend>> make_backend(const PluginOptions& options) noexcept try {
  return make(options);
} catch (const std::exception& e) {
  return Status(Code::kMemory, e.what());
}

constexpr BackendPlugin kPlugin{
    .version = kBackendVersion, .library_version = FATHOM_VERSION_STRING, .make = make_backend};

}  // namespace
}  // namespace fathom::cuda

extern "C" __attribute__((visibility("default"))) const fathom::BackendPlugin*
fathom_backend_plugin() noexcept {
  return &fathom::cuda::kPlugin;
}
