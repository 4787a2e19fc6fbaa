// What the tests of the CUDA backend share: the backend over an emulated device, in every order of
// threads, with guarded workspaces, next to the scalar CPU backend.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu_weights.h"
#include "cuda/weights.h"
#include "cuda_compare.h"
#include "cuda_emulated_device.h"

namespace fathom::cuda_test {

using cpu_test::random_values;
using cpu_test::Rng;
using cuda::emulated::Order;

inline constexpr Order kOrders[] = {Order::kForward, Order::kBackward, Order::kMixed};
inline const char* order_name(Order order) {
  return order == Order::kForward ? "forward" : order == Order::kBackward ? "backward" : "mixed";
}

class TestGpu {
 public:
  explicit TestGpu(Numerics numerics, Order order = Order::kForward) {
    cuda::emulated::Machine::here().order = order;
    auto device = std::make_unique<test::EmulatedDevice>();
    device_ = device.get();
    backend_ = std::make_unique<cuda::CudaBackend>(std::move(device), numerics);
  }
  ~TestGpu() { cuda::emulated::Machine::here().order = Order::kForward; }

  cuda::CudaBackend& operator*() { return *backend_; }
  cuda::CudaBackend* operator->() { return backend_.get(); }
  test::EmulatedDevice& device() { return *device_; }

  // Runs an operation with exactly the workspace it asks for, and fails for whatever the emulation
  // found.
  template <class Params, class Run>
  void run(const Params& p, Run&& body) {
    const cpu_test::GuardedWorkspace space(backend_->workspace_bytes(p));
    body(space.op());
    finish(space.op());
    space.check();
  }
  void finish(const OpContext& op = {}) {
    const Status status = backend_->sync(op);
    INFO(status.message());
    REQUIRE(status.ok());
  }

  // A test weight stored the GPU's way; `t` is changed to it.
  struct Stored {
    Weight weight;
    cpu_test::AlignedBytes memory;
  };
  Stored store(const cpu_test::TestWeight& t) {
    Stored s{t.weight, nullptr};
    REQUIRE(backend_->weight_layout(s.weight).ok());
    const int64_t count = s.weight.count, rows = s.weight.rows;
    s.memory = cpu_test::aligned_bytes(s.weight.matrix_bytes * count);
    std::memset(s.memory.get(), 0xff, static_cast<size_t>(s.weight.matrix_bytes * count));
    s.weight.data = s.memory.get();
    const int64_t file_bytes = row_bytes(s.weight.dtype, s.weight.cols);
    const int64_t blocks = (rows + 127) / 128 * ((s.weight.cols + 127) / 128);
    for (int64_t m = 0; m < count; ++m) {
      // In two parts, as a loader would.
      const int64_t first = rows > 16 ? 16 : 0;
      const uint8_t* file = t.file.data() + m * rows * file_bytes;
      REQUIRE(backend_->store_rows(s.weight, m, 0, first, file).ok());
      REQUIRE(
          backend_->store_rows(s.weight, m, first, rows - first, file + first * file_bytes).ok());
      if (s.weight.block_scaled)
        REQUIRE(backend_->store_scales(s.weight, m, t.scales.data() + m * blocks).ok());
    }
    return s;
  }

 private:
  std::unique_ptr<cuda::CudaBackend> backend_;
  test::EmulatedDevice* device_ = nullptr;
};

inline std::vector<DType> cuda_dtypes() {
  std::vector<DType> types;
  for (const DType type : cpu_test::weight_dtypes())
    if (cuda::block_shape(type) != nullptr) types.push_back(type);
  return types;
}

inline const char* name_of(Numerics numerics) {
  return numerics == Numerics::kExact ? "exact" : "fast";
}

}  // namespace fathom::cuda_test
