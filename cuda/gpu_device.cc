// A GPU through the CUDA runtime (linked statically: it finds the driver by itself, and answers
// with an error where there is none) and, for address ranges, the driver's virtual memory
// management.
#include <cuda.h>
#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "cuda/chunked_ranges.h"
#include "cuda/device.h"
#include "cuda/gpu_gemm.h"
#include "cuda/gpu_launcher.h"
#include "cuda/gpu_usage.h"
#include "cuda/pinned_host.h"

namespace fathom::cuda {
namespace {

// sm_80 is the oldest that the plug-in is built for.
constexpr int kMinMajor = 8;
// Free memory that is left alone: the driver loads kernels, ours and cuBLASLt's, when they are
// first used, and a full device could not start them.
constexpr int64_t kDriverBytes = int64_t{256} << 20;
// What a context is taken to cost where the driver's management library cannot tell; more than
// kMostContextBytes is not the context's, but what others took meanwhile.
constexpr int64_t kAssumedContextBytes = int64_t{512} << 20;
constexpr int64_t kMostContextBytes = int64_t{2} << 30;

// The driver's functions for address ranges, found at run time: the plug-in must load without one.
struct Driver {
  decltype(cuMemAddressReserve)* address_reserve = nullptr;
  decltype(cuMemAddressFree)* address_free = nullptr;
  decltype(cuMemCreate)* create = nullptr;
  decltype(cuMemRelease)* release = nullptr;
  decltype(cuMemMap)* map = nullptr;
  decltype(cuMemUnmap)* unmap = nullptr;
  decltype(cuMemSetAccess)* set_access = nullptr;
  decltype(cuMemGetAllocationGranularity)* granularity = nullptr;
  decltype(cuGetErrorString)* error_string = nullptr;
};

template <class Function>
bool find_function(const char* name, Function*& function) noexcept {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned kVersion = 12000;
  if (cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result) !=
          cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return false;
  }
  function = reinterpret_cast<Function*>(found);
  return true;
}

bool find_driver(Driver& d) noexcept {
  return find_function("cuMemAddressReserve", d.address_reserve) &&
         find_function("cuMemAddressFree", d.address_free) &&
         find_function("cuMemCreate", d.create) && find_function("cuMemRelease", d.release) &&
         find_function("cuMemMap", d.map) && find_function("cuMemUnmap", d.unmap) &&
         find_function("cuMemSetAccess", d.set_access) &&
         find_function("cuMemGetAllocationGranularity", d.granularity) &&
         find_function("cuGetErrorString", d.error_string);
}

std::string text_of(cudaError_t e) {
  return fmt::format("{} ({})", cudaGetErrorString(e), cudaGetErrorName(e));
}

// The device is also where chunks come from, for drivers without address ranges.
class GpuDevice final : public Device, private ChunkedRanges::Memory, private PinnedHost::Pinner {
 public:
  static Result<std::unique_ptr<Device>> open(int index, std::string name);
  ~GpuDevice() override;

  std::string_view name() const noexcept override { return name_; }
  std::string describe() const override {
    return fmt::format(
        "{}: {}, sm_{}{}, {} multiprocessors, driver for CUDA {}.{}, {}, memory by {}, context {} "
        "MiB{}, {} MiB of the host's memory pinned",
        name_, properties_.name, properties_.major, properties_.minor,
        properties_.multiProcessorCount, driver_version_ / 1000, driver_version_ % 1000 / 10,
        library_->version(), ranges_ ? "address ranges" : "chunks (no virtual memory management)",
        context_bytes_ >> 20, context_measured_ ? "" : " (assumed)", pinned_.held_bytes() >> 20);
  }
  int64_t max_shared_bytes() const noexcept override {
    return static_cast<int64_t>(properties_.sharedMemPerBlockOptin);
  }
  int64_t granularity() const noexcept override { return granularity_; }
  MemoryState memory() const noexcept override;
  int64_t runtime_bytes() const noexcept override {
    return kStagingBytes + kGraphBytes + context_bytes_;
  }
  Result<void*> reserve(int64_t bytes) noexcept override;
  bool maps_addresses() const noexcept override { return ranges_; }
  void* address(void* base, int64_t offset) const noexcept override {
    return ranges_ ? static_cast<std::byte*>(base) + offset : chunks_.address(base, offset);
  }
  Status commit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void release(void* base, int64_t bytes) noexcept override;
  Status upload(void* device, const void* host, int64_t bytes) noexcept override;
  Status download(void* host, const void* device, int64_t bytes) noexcept override;
  void pin_host(void* host, int64_t bytes) noexcept override { pinned_.pin(host, bytes); }
  void unpin_host(void* host, int64_t bytes) noexcept override { pinned_.unpin(host, bytes); }
  std::byte* staging() noexcept override { return staging_; }
  LaunchQueue& queue() noexcept override { return *queue_; }
  int gemm(const GemmParams& p) noexcept override {
    if (int e = queue_->flush(LaunchQueue::Why::kOrder)) return e;
    return use() == cudaSuccess ? library_->gemm(stream_, p) : cudaErrorDevicesUnavailable;
  }
  Status wait() noexcept override;
  std::string error_text(int error) const override {
    if (error >= kGemmError) return fmt::format("cuBLASLt status {}", error - kGemmError);
    if (error == kNoKernel) return "no kernel for this type";
    return text_of(static_cast<cudaError_t>(error));
  }

 private:
  GpuDevice(int index, std::string name) noexcept : index_(index), name_(std::move(name)) {}

  Result<void*> allocate(int64_t bytes) noexcept override;
  void free(void* memory) noexcept override { cudaFree(memory); }
  bool copy(void* to, const void* from, int64_t bytes) noexcept override {
    return cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                           stream_) == cudaSuccess &&
           cudaStreamSynchronize(stream_) == cudaSuccess;
  }

  // For all devices of the process: another one may hold a text's layers.
  bool pin(void* host, int64_t bytes) noexcept override {
    const bool pinned =
        use() == cudaSuccess &&
        cudaHostRegister(host, static_cast<size_t>(bytes), cudaHostRegisterPortable) == cudaSuccess;
    if (!pinned) cudaGetLastError();
    return pinned;
  }
  void unpin(void* host) noexcept override {
    if (use() != cudaSuccess || cudaHostUnregister(host) != cudaSuccess) cudaGetLastError();
  }

  // The runtime's current device belongs to the thread.
  cudaError_t use() const noexcept { return cudaSetDevice(index_); }
  Status failed(const char* what, cudaError_t e, Code code = Code::kDevice) const noexcept;
  Status failed(const char* what, CUresult e, Code code = Code::kDevice) const noexcept;
  // Hands over what the queue keeps; an error is for the next wait or copy.
  void hand_over(LaunchQueue::Why why = LaunchQueue::Why::kOrder) noexcept {
    if (int e = queue_->flush(why)) refused_ = e;
  }
  Status take_refused() noexcept;
  CUmemAllocationProp allocation() const noexcept {
    CUmemAllocationProp prop{};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, index_};
    return prop;
  }
  Status map_piece(uintptr_t address);  // the lock is held
  Status map(uintptr_t begin, uintptr_t end);
  void unmap(uintptr_t begin, uintptr_t end) noexcept;  // the lock is held

  const int index_;
  const std::string name_;
  cudaDeviceProp properties_{};
  int driver_version_ = 0;
  cudaStream_t stream_ = nullptr;
  std::byte* staging_ = nullptr;
  std::unique_ptr<GemmLibrary> library_;
  std::optional<GpuLauncher> launcher_;
  std::optional<LaunchQueue> queue_;
  std::atomic<int> refused_{0};
  int64_t context_bytes_ = 0;
  bool context_measured_ = false;
  Driver driver_;
  bool ranges_ = false;  // the driver can map memory into reserved addresses
  static constexpr int64_t kChunkGranularity = int64_t{2} << 20;
  int64_t granularity_ = kChunkGranularity;
  ChunkedRanges chunks_{*this, kChunkGranularity};  // where there are no ranges
  PinnedHost pinned_{*this};

  // What is mapped, by address, one piece for each granule: a mapping is undone whole or not at
  // all, and commits may be given back in parts.
  std::mutex mutex_;
  std::map<uintptr_t, CUmemGenericAllocationHandle> pieces_;
};

Status GpuDevice::failed(const char* what, cudaError_t e, Code code) const noexcept try {
  cudaGetLastError();  // told here; not sticky unless the device is lost
  return Status(code, fmt::format("{}: {}: {}", name_, what, text_of(e)));
} catch (const std::bad_alloc&) {
  return Status(code, "");
}
Status GpuDevice::failed(const char* what, CUresult e, Code code) const noexcept try {
  const char* text = nullptr;
  if (driver_.error_string != nullptr) driver_.error_string(e, &text);
  return Status(code, fmt::format("{}: {}: {} ({})", name_, what, text != nullptr ? text : "error",
                                  static_cast<int>(e)));
} catch (const std::bad_alloc&) {
  return Status(code, "");
}

Result<std::unique_ptr<Device>> GpuDevice::open(int index, std::string name) {
  std::unique_ptr<GpuDevice> d(new GpuDevice(index, std::move(name)));
  int count = 0;
  if (cudaError_t e = cudaDriverGetVersion(&d->driver_version_); e != cudaSuccess)
    return d->failed("asking for the driver's version", e);
  if (d->driver_version_ == 0)
    return Status(Code::kDevice, fmt::format("{}: no NVIDIA driver is installed", d->name_));
  const cudaError_t counted = cudaGetDeviceCount(&count);
  if (counted == cudaErrorInsufficientDriver)
    return Status(Code::kDevice,
                  fmt::format("{}: the driver is for CUDA {}.{}, this plug-in for {}.{}: {}",
                              d->name_, d->driver_version_ / 1000, d->driver_version_ % 1000 / 10,
                              CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, text_of(counted)));
  if (counted != cudaSuccess) return d->failed("counting the GPUs", counted);
  if (index >= count)
    return Status(Code::kNotFound, fmt::format("{}: this machine has {} GPU{}, numbered from 0",
                                               d->name_, count, count == 1 ? "" : "s"));
  if (cudaError_t e = cudaGetDeviceProperties(&d->properties_, index); e != cudaSuccess)
    return d->failed("asking for the GPU's properties", e);
  if (d->properties_.major < kMinMajor)
    return Status(Code::kUnsupported,
                  fmt::format("{}: {} is sm_{}{}; sm_80 and newer are supported", d->name_,
                              d->properties_.name, d->properties_.major, d->properties_.minor));
  char bus_id[32] = "";
  cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, index);
  const std::optional<int64_t> used_before = gpu_used_bytes(bus_id);
  FATHOM_TRY_ASSIGN(d->library_, open_gemm_library());
  if (cudaError_t e = d->use(); e != cudaSuccess) return d->failed("making a context", e);
  if (cudaError_t e = cudaStreamCreateWithFlags(&d->stream_, cudaStreamNonBlocking);
      e != cudaSuccess)
    return d->failed("making a stream", e);
  void* staging = nullptr;
  if (cudaError_t e = cudaMallocHost(&staging, static_cast<size_t>(kStagingBytes));
      e != cudaSuccess)
    return d->failed("taking pinned memory", e, Code::kMemory);
  d->staging_ = static_cast<std::byte*>(staging);
  d->launcher_.emplace(index, d->stream_);
  d->queue_.emplace(*d->launcher_);
  const std::optional<int64_t> used_after = gpu_used_bytes(bus_id);
  d->context_measured_ = used_before && used_after;
  d->context_bytes_ = d->context_measured_
                          ? std::clamp<int64_t>(*used_after - *used_before, 0, kMostContextBytes)
                          : kAssumedContextBytes;

  d->ranges_ = find_driver(d->driver_);
  if (d->ranges_) {
    size_t bytes = 0;
    const CUmemAllocationProp prop = d->allocation();
    d->ranges_ =
        d->driver_.granularity(&bytes, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED) == CUDA_SUCCESS;
    if (d->ranges_) d->granularity_ = static_cast<int64_t>(bytes);
  }
  return std::unique_ptr<Device>(std::move(d));
}

GpuDevice::~GpuDevice() {
  pinned_.unpin_all();
  if (use() != cudaSuccess) return;  // the driver is gone, and all memory with it
  if (stream_ != nullptr) {
    cudaStreamSynchronize(stream_);
    queue_.reset();
    cudaStreamDestroy(stream_);
  }
  if (staging_ != nullptr) cudaFreeHost(staging_);
}

MemoryState GpuDevice::memory() const noexcept {
  size_t free_bytes = 0, total_bytes = 0;
  if (use() != cudaSuccess || cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  return {static_cast<int64_t>(total_bytes),
          std::max<int64_t>(static_cast<int64_t>(free_bytes) - kDriverBytes, 0)};
}

Result<void*> GpuDevice::allocate(int64_t bytes) noexcept {
  void* memory = nullptr;
  if (cudaError_t e = cudaMalloc(&memory, static_cast<size_t>(bytes)); e != cudaSuccess)
    return failed("taking memory", e, Code::kMemory);
  return memory;
}

Result<void*> GpuDevice::reserve(int64_t bytes) noexcept {
  if (cudaError_t e = use(); e != cudaSuccess) return failed("choosing the device", e);
  if (!ranges_) return chunks_.reserve(bytes);
  CUdeviceptr address = 0;
  if (CUresult e = driver_.address_reserve(&address, static_cast<size_t>(bytes),
                                           static_cast<size_t>(granularity_), 0, 0);
      e != CUDA_SUCCESS)
    return failed("reserving addresses", e, Code::kMemory);
  return reinterpret_cast<void*>(address);
}

Status GpuDevice::map_piece(uintptr_t address) {
  const auto size = static_cast<size_t>(granularity_);
  // The piece has its place in the table before there is anything to lose.
  const auto entry = pieces_.emplace(address, 0).first;
  const CUmemAllocationProp prop = allocation();
  CUmemGenericAllocationHandle handle = 0;
  CUresult e = driver_.create(&handle, size, &prop, 0);
  if (e == CUDA_SUCCESS) {
    e = driver_.map(address, size, 0, handle, 0);
    if (e != CUDA_SUCCESS) driver_.release(handle);
  }
  if (e != CUDA_SUCCESS) {
    pieces_.erase(entry);
    return failed("taking memory", e, Code::kMemory);
  }
  entry->second = handle;
  return {};
}

Status GpuDevice::map(uintptr_t begin, uintptr_t end) {
  const std::lock_guard lock(mutex_);
  for (uintptr_t at = begin; at < end; at += static_cast<uintptr_t>(granularity_))
    if (Status status = map_piece(at); !status.ok()) {
      unmap(begin, at);
      return status;
    }
  CUmemAccessDesc access{};
  access.location = allocation().location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (CUresult e = driver_.set_access(begin, end - begin, &access, 1); e != CUDA_SUCCESS) {
    unmap(begin, end);
    return failed("giving access to memory", e, Code::kMemory);
  }
  return {};
}

Status GpuDevice::commit(void* base, int64_t offset, int64_t bytes) noexcept try {
  if (bytes <= 0) return {};
  hand_over();
  if (cudaError_t e = use(); e != cudaSuccess) return failed("choosing the device", e);
  if (ranges_) {
    const auto begin = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset);
    FATHOM_TRY(map(begin, begin + static_cast<uintptr_t>(bytes)));
  } else {
    FATHOM_TRY(chunks_.commit(base, offset, bytes));
  }
  if (cudaError_t e =
          cudaMemsetAsync(address(base, offset), 0, static_cast<size_t>(bytes), stream_);
      e != cudaSuccess) {
    Status why = failed("clearing memory", e);
    decommit(base, offset, bytes);
    return why;
  }
  return {};
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "the system refused memory for the library's own bookkeeping");
}

void GpuDevice::unmap(uintptr_t begin, uintptr_t end) noexcept {
  for (auto piece = pieces_.lower_bound(begin); piece != pieces_.end() && piece->first < end;) {
    driver_.unmap(piece->first, static_cast<size_t>(granularity_));
    driver_.release(piece->second);
    piece = pieces_.erase(piece);
  }
}

void GpuDevice::decommit(void* base, int64_t offset, int64_t bytes) noexcept {
  hand_over();
  if (use() != cudaSuccess) return;
  cudaStreamSynchronize(stream_);  // what still reads or writes it
  if (!ranges_) return chunks_.decommit(base, offset, bytes);
  const auto begin = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset);
  const std::lock_guard lock(mutex_);
  unmap(begin, begin + static_cast<uintptr_t>(bytes));
}

void GpuDevice::release(void* base, int64_t bytes) noexcept {
  hand_over();
  if (use() != cudaSuccess) return;
  cudaStreamSynchronize(stream_);
  if (!ranges_) return chunks_.release(base, bytes);
  const auto begin = reinterpret_cast<uintptr_t>(base);
  const std::lock_guard lock(mutex_);
  unmap(begin, begin + static_cast<uintptr_t>(bytes));
  driver_.address_free(begin, static_cast<size_t>(bytes));
}

Status GpuDevice::upload(void* device, const void* host, int64_t bytes) noexcept {
  if (bytes <= 0) return {};
  hand_over();
  FATHOM_TRY(take_refused());
  if (cudaError_t e = use(); e != cudaSuccess) return failed("choosing the device", e);
  cudaError_t e =
      cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_);
  if (e == cudaSuccess) e = cudaStreamSynchronize(stream_);
  return e == cudaSuccess ? Status() : failed("copying to the device", e);
}

Status GpuDevice::download(void* host, const void* device, int64_t bytes) noexcept {
  if (bytes <= 0) return {};
  hand_over();
  FATHOM_TRY(take_refused());
  if (cudaError_t e = use(); e != cudaSuccess) return failed("choosing the device", e);
  cudaError_t e =
      cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream_);
  if (e == cudaSuccess) e = cudaStreamSynchronize(stream_);
  return e == cudaSuccess ? Status() : failed("copying from the device", e);
}

Status GpuDevice::take_refused() noexcept {
  const int e = refused_.exchange(0);
  return e == 0 ? Status() : failed("a kernel could not be started", static_cast<cudaError_t>(e));
}

Status GpuDevice::wait() noexcept {
  hand_over(LaunchQueue::Why::kStep);
  if (cudaError_t e = use(); e != cudaSuccess) return failed("choosing the device", e);
  if (const cudaError_t e = cudaStreamSynchronize(stream_); e != cudaSuccess)
    return failed("waiting for the device", e);
  return take_refused();
}

}  // namespace

Result<std::unique_ptr<Device>> open_gpu(int index, std::string name) {
  return GpuDevice::open(index, std::move(name));
}

}  // namespace fathom::cuda
