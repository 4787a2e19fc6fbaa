// What a GPU's memory holds by the count of the driver's management library (NVML), which answers
// without a context: so it is known what the context itself takes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace fathom::cuda {

// Bytes in use by all processes; none where the library is not there.  `bus_id` as
// cudaDeviceGetPCIBusId() writes it.
std::optional<int64_t> gpu_used_bytes(const std::string& bus_id);

}  // namespace fathom::cuda
