#include "cuda/gpu_usage.h"

#include "cuda/shared_library.h"

namespace fathom::cuda {
namespace {

// Of nvml.h, which comes with the driver's package and not with the toolkit.
using Device = struct NvmlDevice*;
struct Memory {  // nvmlMemory_t
  unsigned long long total, free, used;
};
constexpr int kSuccess = 0;  // NVML_SUCCESS

}  // namespace

std::optional<int64_t> gpu_used_bytes(const std::string& bus_id) {
  const Result<SharedLibrary> library =
      SharedLibrary::open({"libnvidia-ml.so.1", "libnvidia-ml.so"});
  if (!library.ok()) return std::nullopt;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*find)(const char*, Device*) = nullptr;
  int (*memory_info)(Device, Memory*) = nullptr;
  if (!library->find("nvmlInit_v2", init).ok() || !library->find("nvmlShutdown", shutdown).ok() ||
      !library->find("nvmlDeviceGetHandleByPciBusId_v2", find).ok() ||
      !library->find("nvmlDeviceGetMemoryInfo", memory_info).ok() || init() != kSuccess)
    return std::nullopt;
  Device device = nullptr;
  Memory memory{};
  const bool known =
      find(bus_id.c_str(), &device) == kSuccess && memory_info(device, &memory) == kSuccess;
  shutdown();
  if (!known) return std::nullopt;
  return static_cast<int64_t>(memory.used);
}

}  // namespace fathom::cuda
