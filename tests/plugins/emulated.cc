// A plug-in like libfathom_cuda.so, over the emulated device: the whole library runs on it without
// a GPU.  Device numbers choose what happens:
//   cuda:0, cuda:1   work                     cuda:2, cuda:3   makes, updates no graphs
//   cuda:4           the 150th launch fails   cuda:5           lost at the fourth wait
//   cuda:6           too old                  cuda:7           cuBLASLt is missing
//   cuda:8           no such GPU              cuda:9           the eleventh commit fails
//   cuda:10          cannot map memory into reserved addresses
#include <map>
#include <mutex>

#include "cuda/shared_library.h"
#include "cuda_emulated_device.h"
#include "fathom/backend_plugin.hpp"
#include "fathom/version.hpp"

namespace fathom::test {
namespace {

// Of the GPU with this name, for as long as the process lives.
std::shared_ptr<EmulatedMemory> memory_of(const std::string& name) {
  static std::mutex mutex;
  static std::map<std::string, std::shared_ptr<EmulatedMemory>> memories;
  const std::lock_guard lock(mutex);
  std::shared_ptr<EmulatedMemory>& memory = memories[name];
  if (!memory) memory = std::make_shared<EmulatedMemory>();
  return memory;
}

Result<std::unique_ptr<Backend>> make(const PluginOptions& options) {
  if (options.name == "cuda:8")
    return Status(Code::kNotFound, "cuda:8: this machine has 2 GPUs, numbered from 0");
  if (options.name == "cuda:6")
    return Status(Code::kUnsupported, "cuda:6: Tesla V100 is sm_70; sm_80 and newer are supported");
  if (options.name == "cuda:7") {
    auto library = cuda::SharedLibrary::open({"libcublasLt.so.0", "libcublas.so.0"});
    if (!library.ok()) return std::move(library).status();
  }
  const std::string name(options.name);
  auto device = std::make_unique<EmulatedDevice>(name, memory_of(name));
  if (name == "cuda:2") device->graphs.makes_graphs = false;
  if (name == "cuda:3") device->graphs.updates_graphs = false;
  if (name == "cuda:4") device->graphs.launches_until_refusal = 149;
  if (name == "cuda:5") device->waits_until_loss = 3;
  if (name == "cuda:10") device->maps_memory = false;
  if (name == "cuda:9") device->commits_until_failure = 10;
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
