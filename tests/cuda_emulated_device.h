// A Device without a GPU: memory is the host's, kernels run in the emulation, the library's product
// is a plain loop.  With it the whole CUDA backend is tested.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "cuda/cuda_backend.h"
#include "cuda/device.h"
#include "cuda/emulation.h"

namespace fathom::test {

// Reserved addresses fault until they are committed; committed memory is zeroed.
class EmulatedDevice final : public cuda::Device {
 public:
  explicit EmulatedDevice(std::string name = "cuda:0", int64_t total_bytes = int64_t{8} << 30);

  // Commits until the next one that fails once; -1: none fails.
  int64_t commits_until_failure = -1;
  int64_t committed_bytes() const noexcept { return committed_; }
  int64_t gemms() const noexcept { return gemms_; }

  std::string_view name() const noexcept override { return name_; }
  std::string describe() const override { return name_ + ": emulated on the host"; }
  int64_t max_shared_bytes() const noexcept override { return 227 << 10; }
  int64_t granularity() const noexcept override { return 64 << 10; }
  MemoryState memory() const noexcept override { return {total_, total_ - committed_}; }
  int64_t runtime_bytes() const noexcept override { return cuda::kStagingBytes; }
  Result<void*> reserve(int64_t bytes) noexcept override;
  Status commit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void release(void* base, int64_t bytes) noexcept override;
  Status upload(void* device, const void* host, int64_t bytes) noexcept override;
  Status download(void* host, const void* device, int64_t bytes) noexcept override;
  std::byte* staging() noexcept override { return staging_.get(); }
  cuda::Stream stream() const noexcept override { return nullptr; }
  int gemm(const cuda::GemmParams&) noexcept override;
  Status wait() noexcept override;
  std::string error_text(int error) const override;

 private:
  const std::string name_;
  int64_t total_, committed_ = 0, gemms_ = 0;
  std::map<void*, int64_t> ranges_;  // committed bytes by reservation
  std::unique_ptr<std::byte[]> staging_;
};

}  // namespace fathom::test
