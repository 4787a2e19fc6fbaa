// A Device without a GPU: memory is the host's, kernels run in the emulation, the library's product
// is a plain loop.  With it the whole CUDA backend is tested.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "cuda/chunked_ranges.h"
#include "cuda/cuda_backend.h"
#include "cuda/device.h"
#include "cuda/emulation.h"
#include "cuda/pinned_host.h"

namespace fathom::test {

// The memory of one GPU, which all that open it share.
struct EmulatedMemory {
  int64_t total = int64_t{8} << 30;
  std::atomic<int64_t> committed{0};
};

// Graphs as lists of launches with parameters of their own, run one after the other.
class EmulatedGraphs final : public cuda::GraphDriver {
 public:
  // Launches until one is refused, once; -1: none is.
  int64_t launches_until_refusal = -1;
  bool makes_graphs = true, updates_graphs = true;
  int64_t n_graphs() const noexcept { return n_graphs_; }
  int64_t n_launches = 0;  // by themselves

  int run(const cuda::KernelLaunch&) noexcept override;
  void* make(std::span<const cuda::KernelLaunch>) noexcept override;
  int update(void* graph, size_t index, const cuda::KernelLaunch&) noexcept override;
  int run(void* graph) noexcept override;
  void destroy(void* graph) noexcept override;

 private:
  int64_t n_graphs_ = 0;  // that live
};

// Reserved addresses fault until they are committed; committed memory is zeroed.
class EmulatedDevice final : public cuda::Device,
                             private cuda::ChunkedRanges::Memory,
                             private cuda::PinnedHost::Pinner {
 public:
  explicit EmulatedDevice(std::string name = "cuda:0", std::shared_ptr<EmulatedMemory> memory =
                                                           std::make_shared<EmulatedMemory>());
  ~EmulatedDevice() override;

  EmulatedGraphs graphs;
  // False: as with a driver without virtual memory management; set before memory is taken.
  bool maps_memory = true;
  const cuda::ChunkedRanges& chunks() const noexcept { return chunks_; }
  // Waits until the device is lost, for good; -1: it is not.
  int64_t waits_until_loss = -1;

  // Commits until the next one that fails once; -1: none fails.
  int64_t commits_until_failure = -1;
  static constexpr int64_t kContextBytes = int64_t{1} << 20;
  int64_t committed_bytes() const noexcept { return memory_->committed; }
  int64_t gemms() const noexcept { return gemms_; }

  std::string_view name() const noexcept override { return name_; }
  std::string describe() const override;
  int64_t max_shared_bytes() const noexcept override { return 227 << 10; }
  int64_t granularity() const noexcept override { return kGranularity; }
  MemoryState memory() const noexcept override {
    return {memory_->total, memory_->total - memory_->committed};
  }
  int64_t runtime_bytes() const noexcept override {
    return cuda::kStagingBytes + cuda::kGraphBytes + kContextBytes;
  }
  Result<void*> reserve(int64_t bytes) noexcept override;
  bool maps_addresses() const noexcept override { return maps_memory; }
  void* address(void* base, int64_t offset) const noexcept override {
    return maps_memory ? static_cast<std::byte*>(base) + offset : chunks_.address(base, offset);
  }
  Status commit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void release(void* base, int64_t bytes) noexcept override;
  Status upload(void* device, const void* host, int64_t bytes) noexcept override;
  Status download(void* host, const void* device, int64_t bytes) noexcept override;
  void pin_host(void* host, int64_t bytes) noexcept override { pinned_.pin(host, bytes); }
  void unpin_host(void* host, int64_t bytes) noexcept override { pinned_.unpin(host, bytes); }
  std::byte* staging() noexcept override { return staging_.get(); }
  cuda::LaunchQueue& queue() noexcept override { return queue_; }
  int gemm(const cuda::GemmParams&) noexcept override;
  Status wait() noexcept override;
  std::string error_text(int error) const override;

 private:
  Result<void*> allocate(int64_t bytes) noexcept override;
  void free(void* memory) noexcept override;
  bool copy(void* to, const void* from, int64_t bytes) noexcept override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return true;
  }

  bool pin(void* host, int64_t bytes) noexcept override;
  void unpin(void* host) noexcept override;

  const std::string name_;
  const std::shared_ptr<EmulatedMemory> memory_;
  static constexpr int64_t kGranularity = 64 << 10;
  std::map<void*, int64_t> sizes_;  // of chunks
  cuda::ChunkedRanges chunks_{*this, kGranularity};
  cuda::PinnedHost pinned_{*this};
  std::atomic<int64_t> pinned_copies_{0};  // uploads from pinned memory
  int64_t gemms_ = 0;
  std::map<void*, int64_t> ranges_;  // committed bytes by reservation
  std::unique_ptr<std::byte[]> staging_;
  cuda::LaunchQueue queue_{graphs};
  int refused_ = 0;
  bool lost_ = false;
  Status transfer(void* to, const void* from, int64_t bytes) noexcept;
  Status take_refused() noexcept;
  void hand_over(cuda::LaunchQueue::Why why = cuda::LaunchQueue::Why::kOrder) noexcept {
    if (int e = queue_.flush(why)) refused_ = e;
  }
};

}  // namespace fathom::test
