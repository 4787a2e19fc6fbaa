// Launches and graphs of the CUDA runtime, for the queue of a device.
#pragma once

#include <cuda_runtime.h>

#include <array>

#include "cuda/launch_queue.h"

namespace fathom::cuda {

// Called under the queue's lock.  Errors are cudaError_t.
class GpuLauncher final : public GraphDriver {
 public:
  GpuLauncher(int device, cudaStream_t stream) noexcept : device_(device), stream_(stream) {}

  int run(const KernelLaunch&) noexcept override;
  void* make(std::span<const KernelLaunch>) noexcept override;
  int update(void* graph, size_t index, const KernelLaunch&) noexcept override;
  int run(void* graph) noexcept override;
  void destroy(void* graph) noexcept override;

 private:
  cudaError_t allow_shared(const KernelLaunch&) noexcept;

  const int device_;
  const cudaStream_t stream_;
  // Kernels that were allowed more shared memory than all have.
  struct Allowed {
    const void* kernel = nullptr;
    size_t bytes = 0;
  };
  std::array<Allowed, 32> allowed_;
  size_t next_ = 0;
};

}  // namespace fathom::cuda
