// What cuda_bench compares the kernels with: a copy on the device, and the vendor's product of two
// dense matrices.  yardstick_gpu.cc has the real ones, yardstick_emulated.cc those of the
// emulation.
#pragma once

#include <memory>

#include "cuda/device.h"

namespace fathom::test {

class Yardstick {
 public:
  virtual ~Yardstick() = default;
  // `n` times one after the other; both wait for the last.
  virtual void copy(void* to, const void* from, int64_t bytes, int n) = 0;
  virtual void gemm(const cuda::GemmParams&, int n) = 0;
};
std::unique_ptr<Yardstick> open_yardstick();

}  // namespace fathom::test
