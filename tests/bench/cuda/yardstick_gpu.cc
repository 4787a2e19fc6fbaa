#include <cuda_runtime.h>

#include "cuda/gpu_gemm.h"
#include "report.h"
#include "yardstick.h"

namespace fathom::test {
namespace {

class GpuYardstick final : public Yardstick {
 public:
  explicit GpuYardstick(std::unique_ptr<cuda::GemmLibrary> library)
      : library_(std::move(library)) {}
  void copy(void* to, const void* from, int64_t bytes, int n) override {
    for (int i = 0; i < n; ++i)
      if (const cudaError_t error = cudaMemcpyAsync(to, from, static_cast<size_t>(bytes),
                                                    cudaMemcpyDeviceToDevice, nullptr);
          error != cudaSuccess)
        fail(cudaGetErrorString(error));
    wait();
  }
  void gemm(const cuda::GemmParams& p, int n) override {
    for (int i = 0; i < n; ++i)
      if (const int error = library_->gemm(nullptr, p))
        fail(fmt::format("cuBLASLt refused the product: {}", error));
    wait();
  }

 private:
  static void wait() {
    if (const cudaError_t error = cudaStreamSynchronize(nullptr); error != cudaSuccess)
      fail(cudaGetErrorString(error));
  }
  std::unique_ptr<cuda::GemmLibrary> library_;
};

}  // namespace

std::unique_ptr<Yardstick> open_yardstick() {
  return std::make_unique<GpuYardstick>(must(cuda::open_gemm_library()));
}

}  // namespace fathom::test
