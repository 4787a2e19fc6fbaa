#include "cuda_emulated_device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fathom/tensor.hpp"

namespace fathom::test {
namespace {

constexpr const char* kLostText = "unspecified launch failure (cudaErrorLaunchFailure)";

std::byte* at(void* base, int64_t offset) {
  return static_cast<std::byte*>(base) + offset;
}

}  // namespace

// ---- graphs -------------------------------------------------------------------------------------

namespace {

constexpr int kRefused = 701;  // as cudaErrorLaunchOutOfResources

struct Graph {
  struct Node {
    cuda::KernelLaunch launch;
    std::unique_ptr<std::byte[]> params;
  };
  std::vector<Node> nodes;
};

}  // namespace

int EmulatedGraphs::run(const cuda::KernelLaunch& l) noexcept {
  if (launches_until_refusal >= 0 && launches_until_refusal-- == 0) return kRefused;
  ++n_launches;
  l.emulate(l);
  return 0;  // what a kernel does wrong shows when it is waited for
}

void* EmulatedGraphs::make(std::span<const cuda::KernelLaunch> launches) noexcept {
  if (!makes_graphs) return nullptr;
  auto graph = std::make_unique<Graph>();
  for (const cuda::KernelLaunch& l : launches) {
    // New memory of exactly this size, so that the address sanitizer sees stale pointers.
    Graph::Node node{l, std::unique_ptr<std::byte[]>(new std::byte[l.params_bytes])};
    std::memcpy(node.params.get(), l.params, l.params_bytes);
    node.launch.params = node.params.get();
    graph->nodes.push_back(std::move(node));
  }
  ++n_graphs_;
  return graph.release();
}

int EmulatedGraphs::update(void* graph, size_t index, const cuda::KernelLaunch& l) noexcept {
  if (!updates_graphs) return kRefused;
  Graph::Node& node = static_cast<Graph*>(graph)->nodes.at(index);
  if (node.launch.kernel != l.kernel || node.launch.params_bytes != l.params_bytes) std::abort();
  std::memcpy(node.params.get(), l.params, l.params_bytes);
  std::copy_n(l.grid, 3, node.launch.grid);
  return 0;
}

int EmulatedGraphs::run(void* graph) noexcept {
  for (const Graph::Node& node : static_cast<Graph*>(graph)->nodes)
    if (int e = run(node.launch)) return e;
  return 0;
}

void EmulatedGraphs::destroy(void* graph) noexcept {
  --n_graphs_;
  delete static_cast<Graph*>(graph);
}

// ---- the device ---------------------------------------------------------------------------------

EmulatedDevice::EmulatedDevice(std::string name, std::shared_ptr<EmulatedMemory> memory)
    : name_(std::move(name)),
      memory_(std::move(memory)),
      staging_(new std::byte[cuda::kStagingBytes]) {
  memory_->committed += kContextBytes;
}

std::string EmulatedDevice::describe() const {
  return name_ + ": emulated on the host, " + std::to_string(pinned_.held_bytes()) +
         " bytes of it pinned, " + std::to_string(pinned_copies_.load()) + " copies from there";
}

// The system locks the memory, and so refuses what is not mapped.
bool EmulatedDevice::pin(void* host, int64_t bytes) noexcept {
  return msync(host, static_cast<size_t>(bytes), MS_ASYNC) == 0;
}
// Memory must not be given back before.
void EmulatedDevice::unpin(void* host) noexcept {
  if (msync(host, 4096, MS_ASYNC) != 0) std::abort();
}

EmulatedDevice::~EmulatedDevice() {
  pinned_.unpin_all();
  memory_->committed -= kContextBytes;
}

Result<void*> EmulatedDevice::allocate(int64_t bytes) noexcept {
  if (memory_->committed + bytes > memory_->total)
    return Status(Code::kMemory, name_ + ": out of memory");
  void* memory = std::aligned_alloc(4096, static_cast<size_t>(bytes));
  if (memory == nullptr) return Status(Code::kMemory, "aligned_alloc");
  std::memset(memory, 0, static_cast<size_t>(bytes));
  memory_->committed += bytes;
  sizes_[memory] = bytes;
  return memory;
}
void EmulatedDevice::free(void* memory) noexcept {
  memory_->committed -= sizes_[memory];
  sizes_.erase(memory);
  std::free(memory);
}

Result<void*> EmulatedDevice::reserve(int64_t bytes) noexcept {
  if (!maps_memory) return chunks_.reserve(bytes);
  void* base = mmap(nullptr, static_cast<size_t>(bytes), PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return Status(Code::kMemory, "no addresses");
  return base;
}

Status EmulatedDevice::commit(void* base, int64_t offset, int64_t bytes) noexcept {
  hand_over();
  if (commits_until_failure >= 0 && commits_until_failure-- == 0)
    return Status(Code::kMemory, name_ + ": out of memory (a failure on purpose)");
  if (!maps_memory) return chunks_.commit(base, offset, bytes);
  if (memory_->committed + bytes > memory_->total)
    return Status(Code::kMemory, name_ + ": out of memory");
  if (mprotect(at(base, offset), static_cast<size_t>(bytes), PROT_READ | PROT_WRITE) != 0)
    return Status(Code::kMemory, "mprotect");
  memory_->committed += bytes;
  ranges_[base] += bytes;
  return {};
}

void EmulatedDevice::decommit(void* base, int64_t offset, int64_t bytes) noexcept {
  hand_over();
  if (!maps_memory) return chunks_.decommit(base, offset, bytes);
  mmap(at(base, offset), static_cast<size_t>(bytes), PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  memory_->committed -= bytes;
  ranges_[base] -= bytes;
}

void EmulatedDevice::release(void* base, int64_t bytes) noexcept {
  hand_over();
  if (!maps_memory) return chunks_.release(base, bytes);
  munmap(base, static_cast<size_t>(bytes));
  memory_->committed -= ranges_[base];
  ranges_.erase(base);
}

// As copies of a GPU: in the order of the stream, and impossible once the device is lost.
Status EmulatedDevice::transfer(void* to, const void* from, int64_t bytes) noexcept {
  if (bytes <= 0) return {};
  hand_over();
  FATHOM_TRY(take_refused());
  if (lost_) return Status(Code::kDevice, name_ + ": copying: " + kLostText);
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return {};
}
Status EmulatedDevice::upload(void* device, const void* host, int64_t bytes) noexcept {
  pinned_copies_ += pinned_.holds(host, bytes);
  return transfer(device, host, bytes);
}
Status EmulatedDevice::download(void* host, const void* device, int64_t bytes) noexcept {
  return transfer(host, device, bytes);
}
Status EmulatedDevice::take_refused() noexcept {
  const int e = std::exchange(refused_, 0);
  return e == 0
             ? Status()
             : Status(Code::kDevice, name_ + ": a kernel could not be started: " + error_text(e));
}

int EmulatedDevice::gemm(const cuda::GemmParams& p) noexcept {
  ++gemms_;
  if (int e = queue_.flush(cuda::LaunchQueue::Why::kOrder)) return e;
  const auto value = [&](const void* base, int64_t i) {
    return p.bf16 ? bf16_to_f32(static_cast<const uint16_t*>(base)[i])
                  : static_cast<const float*>(base)[i];
  };
  std::memset(p.workspace, 0xff, cuda::kGemmWorkspaceBytes);  // the library may use all of it
  for (int64_t b = 0; b < p.n_batch; ++b)
    for (int64_t i = 0; i < p.n_rows; ++i)
      for (int64_t j = 0; j < p.n_cols; ++j) {
        const int64_t x = b * p.x_batch_stride + i * p.x_stride;
        const int64_t w = b * p.w_batch_stride + (p.w_is_turned ? j : j * p.w_stride);
        const int64_t w_step = p.w_is_turned ? p.w_stride : 1;
        float sum = 0;
        for (int64_t k = 0; k < p.k; ++k) sum += value(p.x, x + k) * value(p.w, w + k * w_step);
        const int64_t to = b * p.out_batch_stride + i * p.out_stride + j;
        if (p.out_bf16)
          static_cast<uint16_t*>(p.out)[to] = f32_to_bf16(sum);
        else
          static_cast<float*>(p.out)[to] = p.add ? static_cast<float*>(p.out)[to] + sum : sum;
      }
  return 0;
}

Status EmulatedDevice::wait() noexcept {
  hand_over(cuda::LaunchQueue::Why::kStep);
  if (waits_until_loss >= 0 && waits_until_loss-- == 0) lost_ = true;
  if (lost_) return Status(Code::kDevice, name_ + ": waiting for the device: " + kLostText);
  const std::string failure = cuda::emulated::Machine::here().take_failure();
  if (!failure.empty()) return Status(Code::kDevice, name_ + ": " + failure);
  return take_refused();
}

std::string EmulatedDevice::error_text(int error) const {
  return error == kRefused ? "too many resources requested for launch"
                           : "error " + std::to_string(error);
}

}  // namespace fathom::test
