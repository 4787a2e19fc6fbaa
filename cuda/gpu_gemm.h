// cuBLASLt, loaded when a GPU is opened: a machine without it keeps everything else.
#pragma once

#include <memory>

#include "cuda/device.h"

namespace fathom::cuda {

// Owner of the library's handle and functions.  Thread-safe.
class GemmLibrary {
 public:
  virtual ~GemmLibrary() = default;
  // Queues the product on the stream; 0, or a status of the library as kGemmError + status.
  virtual int gemm(void* cuda_stream, const GemmParams&) noexcept = 0;
  virtual std::string version() const = 0;
};
inline constexpr int kGemmError = 100000;

// Errors: kDevice, with the names tried and what the loader said.
Result<std::unique_ptr<GemmLibrary>> open_gemm_library();

}  // namespace fathom::cuda
