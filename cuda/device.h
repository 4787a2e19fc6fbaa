// Device: what the backend needs of a GPU besides kernels: memory, one stream, and a library's
// matrix product.  gpu_device.cc has the real one; tests run the backend over an emulated one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "cuda/kernels.h"
#include "cuda/launch_queue.h"
#include "fathom/backend.hpp"
#include "fathom/status.hpp"

namespace fathom::cuda {

// out[b] (+)= x[b] w[b]^T, or x[b] w[b] when w_is_turned; b < n_batch.  Strides in values.
struct GemmParams {
  const void* x;  // [n_rows, k]
  int64_t x_stride, x_batch_stride;
  const void* w;  // [n_cols, k]; turned: [k, n_cols]
  int64_t w_stride, w_batch_stride;
  bool w_is_turned;
  void* out;  // [n_rows, n_cols]
  int64_t out_stride, out_batch_stride;
  int64_t n_rows, n_cols, k, n_batch;
  bool bf16;      // x and w; else f32, multiplied in f32
  bool out_bf16;  // else f32
  bool add;
  void* workspace;  // kGemmWorkspaceBytes
};
inline constexpr int64_t kGemmWorkspaceBytes = int64_t{8} << 20;

// Thread-safe.  Errors: kMemory for memory, kDevice for all else, with the driver's text.
//
// What a device queues runs in the order of the calls, whatever the queue does with it: copies,
// memory calls and gemm() hand over first what is kept for a graph.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::string_view name() const noexcept = 0;
  virtual std::string describe() const = 0;
  virtual int64_t max_shared_bytes() const noexcept = 0;  // of a block

  // As the functions of Backend.
  virtual int64_t granularity() const noexcept = 0;
  virtual MemoryState memory() const noexcept = 0;
  virtual int64_t runtime_bytes() const noexcept = 0;
  virtual Result<void*> reserve(int64_t bytes) noexcept = 0;
  virtual bool maps_addresses() const noexcept = 0;  // address() is base + offset
  virtual void* address(void* base, int64_t offset) const noexcept = 0;
  virtual Status commit(void* base, int64_t offset, int64_t bytes) noexcept = 0;
  virtual void decommit(void* base, int64_t offset, int64_t bytes) noexcept = 0;
  virtual void release(void* base, int64_t bytes) noexcept = 0;

  // Copies in the order of the stream, finished on return.
  virtual Status upload(void* device, const void* host, int64_t bytes) noexcept = 0;
  virtual Status download(void* host, const void* device, int64_t bytes) noexcept = 0;
  // As the functions of Backend; copies are known to be from pinned memory by its addresses.
  virtual void pin_host(void* host, int64_t bytes) noexcept = 0;
  virtual void unpin_host(void* host, int64_t bytes) noexcept = 0;
  // Pinned memory for uploads, kStagingBytes; whoever uses it holds a lock of the backend.
  virtual std::byte* staging() noexcept = 0;

  virtual LaunchQueue& queue() noexcept = 0;
  // Queued like a kernel: 0, or an error for error_text().
  virtual int gemm(const GemmParams&) noexcept = 0;
  // Ends a step and waits for the stream.
  virtual Status wait() noexcept = 0;
  virtual std::string error_text(int error) const = 0;

  Stream stream() noexcept { return &queue(); }
};
inline constexpr int64_t kStagingBytes = int64_t{8} << 20;

// Opens GPU `index` as device `name`: driver, context, stream, libcublasLt.  Errors: kNotFound (no
// such GPU), kUnsupported (too old), kDevice (no driver, no library, or they fail), kMemory.
Result<std::unique_ptr<Device>> open_gpu(int index, std::string name);

}  // namespace fathom::cuda
