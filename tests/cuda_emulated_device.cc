#include "cuda_emulated_device.h"

#include <sys/mman.h>

#include <cstring>

#include "fathom/tensor.hpp"

namespace fathom::test {
namespace {

std::byte* at(void* base, int64_t offset) {
  return static_cast<std::byte*>(base) + offset;
}

}  // namespace

EmulatedDevice::EmulatedDevice(std::string name, int64_t total_bytes)
    : name_(std::move(name)), total_(total_bytes), staging_(new std::byte[cuda::kStagingBytes]) {}

Result<void*> EmulatedDevice::reserve(int64_t bytes) noexcept {
  void* base = mmap(nullptr, static_cast<size_t>(bytes), PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return Status(Code::kMemory, "no addresses");
  return base;
}

Status EmulatedDevice::commit(void* base, int64_t offset, int64_t bytes) noexcept {
  if (commits_until_failure >= 0 && commits_until_failure-- == 0)
    return Status(Code::kMemory, name_ + ": out of memory (a failure on purpose)");
  if (committed_ + bytes > total_) return Status(Code::kMemory, name_ + ": out of memory");
  if (mprotect(at(base, offset), static_cast<size_t>(bytes), PROT_READ | PROT_WRITE) != 0)
    return Status(Code::kMemory, "mprotect");
  committed_ += bytes;
  ranges_[base] += bytes;
  return {};
}

void EmulatedDevice::decommit(void* base, int64_t offset, int64_t bytes) noexcept {
  mmap(at(base, offset), static_cast<size_t>(bytes), PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  committed_ -= bytes;
  ranges_[base] -= bytes;
}

void EmulatedDevice::release(void* base, int64_t bytes) noexcept {
  munmap(base, static_cast<size_t>(bytes));
  committed_ -= ranges_[base];
  ranges_.erase(base);
}

Status EmulatedDevice::upload(void* device, const void* host, int64_t bytes) noexcept {
  if (bytes > 0) std::memcpy(device, host, static_cast<size_t>(bytes));
  return {};
}
Status EmulatedDevice::download(void* host, const void* device, int64_t bytes) noexcept {
  return upload(host, device, bytes);
}

int EmulatedDevice::gemm(const cuda::GemmParams& p) noexcept {
  ++gemms_;
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
  const std::string failure = cuda::emulated::Machine::here().take_failure();
  return failure.empty() ? Status() : Status(Code::kDevice, name_ + ": " + failure);
}

std::string EmulatedDevice::error_text(int error) const {
  return "error " + std::to_string(error);
}

}  // namespace fathom::test
