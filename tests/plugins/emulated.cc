// A plug-in like libfathom_cuda.so, over the emulated device: the whole library runs on it without
// a GPU.  Device numbers choose what happens:
//   cuda:0, cuda:1   work                     cuda:8   no such GPU
//   cuda:7           cuBLASLt is missing      cuda:9   the eleventh commit fails
#include "cuda/shared_library.h"
#include "cuda_emulated_device.h"
#include "fathom/backend_plugin.hpp"
#include "fathom/version.hpp"

namespace fathom::test {
namespace {

Result<std::unique_ptr<Backend>> make(const PluginOptions& options) {
  if (options.name == "cuda:8")
    return Status(Code::kNotFound, "cuda:8: this machine has 2 GPUs, numbered from 0");
  if (options.name == "cuda:7") {
    auto library = cuda::SharedLibrary::open({"libcublasLt.so.0", "libcublas.so.0"});
    if (!library.ok()) return std::move(library).status();
  }
  auto device = std::make_unique<EmulatedDevice>(std::string(options.name));
  if (options.name == "cuda:9") device->commits_until_failure = 10;
  return std::unique_ptr<Backend>(
      std::make_unique<cuda::CudaBackend>(std::move(device), options.numerics));
}

Result<std::unique_ptr<Backend>> make_backend(const PluginOptions& options) noexcept try {
  return make(options);
} catch (const std::exception& e) {
  return Status(Code::kMemory, e.what());
}

constexpr BackendPlugin kPlugin{kBackendVersion, FATHOM_VERSION_STRING, make_backend};

}  // namespace
}  // namespace fathom::test

extern "C" __attribute__((visibility("default"))) const fathom::BackendPlugin*
fathom_backend_plugin() noexcept {
  return &fathom::test::kPlugin;
}
