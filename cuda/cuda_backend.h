// CudaBackend: a GPU behind the Backend interface.  It chooses the kernel for each operation and
// gives it its piece of the workspace; the files named after the operations hold the choices.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/device.h"
#include "cuda/workspace.h"
#include "fathom/backend.hpp"

namespace fathom::cuda {

// All operations of all OpContexts go to one stream, in the order of the calls.  A launch that the
// device refuses is kept for the sync() of the context it belongs to.
class CudaBackend final : public Backend {
 public:
  CudaBackend(std::unique_ptr<Device> device, Numerics numerics) noexcept
      : device_(std::move(device)), numerics_(numerics) {}
  Device& device() noexcept { return *device_; }

  DeviceKind kind() const noexcept override { return DeviceKind::kCuda; }
  std::string_view name() const noexcept override { return device_->name(); }
  std::string describe() const override;

  int64_t granularity() const noexcept override { return device_->granularity(); }
  MemoryState memory() const noexcept override { return device_->memory(); }
  int64_t runtime_bytes() const noexcept override { return device_->runtime_bytes(); }
  Result<void*> reserve(int64_t bytes) noexcept override { return device_->reserve(bytes); }
  void* address(void* base, int64_t offset) const noexcept override {
    return device_->address(base, offset);
  }
  Status commit(void* base, int64_t offset, int64_t bytes) noexcept override {
    return device_->commit(base, offset, bytes);
  }
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept override {
    device_->decommit(base, offset, bytes);
  }
  void release(void* base, int64_t bytes) noexcept override { device_->release(base, bytes); }
  bool host_accessible() const noexcept override { return false; }
  Status upload(void* device, const void* host, int64_t bytes) noexcept override {
    return device_->upload(device, host, bytes);
  }
  Status download(void* host, const void* device, int64_t bytes) noexcept override {
    return device_->download(host, device, bytes);
  }
  void pin_host(void* host, int64_t bytes) noexcept override { device_->pin_host(host, bytes); }
  void unpin_host(void* host, int64_t bytes) noexcept override { device_->unpin_host(host, bytes); }

  Status weight_layout(Weight& weight) const noexcept override;
  Status store_rows(const Weight& weight, int64_t index, int64_t first_row, int64_t n_rows,
                    const void* rows) noexcept override;
  Status store_scales(const Weight& weight, int64_t index, const float* scales) noexcept override;

  int64_t workspace_bytes(const MatmulParams&) const noexcept override;
  int64_t workspace_bytes(const HeadsMatmulParams&) const noexcept override;
  int64_t workspace_bytes(const AttendAbsorbedParams&) const noexcept override;
  int64_t workspace_bytes(const AttendExpandedParams&) const noexcept override;
  int64_t workspace_bytes(const FfnParams&) const noexcept override;
  int64_t workspace_bytes(const ExpertsParams&) const noexcept override;
  int64_t workspace_bytes(const TopKParams&) const noexcept override;

  void embed(const OpContext&, const EmbedParams&) noexcept override;
  void rms_norm(const OpContext&, const RmsNormParams&) noexcept override;
  void matmul(const OpContext&, const MatmulParams&) noexcept override;
  void heads_matmul(const OpContext&, const HeadsMatmulParams&) noexcept override;
  void rope_table(const OpContext&, const RopeTableParams&) noexcept override;
  void rope(const OpContext&, const RopeParams&) noexcept override;
  void kv_append(const OpContext&, const KvAppendParams&) noexcept override;
  void kv_convert(const OpContext&, const KvConvertParams&) noexcept override;
  void attend_absorbed(const OpContext&, const AttendAbsorbedParams&) noexcept override;
  void attend_texts(const OpContext&, const AttendAbsorbedParams* texts,
                    int64_t n_texts) noexcept override;
  void merge_attention(const OpContext&, const MergeAttentionParams&) noexcept override;
  void attend_expanded(const OpContext&, const AttendExpandedParams&) noexcept override;
  void route(const OpContext&, const RouteParams&) noexcept override;
  void ffn(const OpContext&, const FfnParams&) noexcept override;
  void experts(const OpContext&, const ExpertsParams&) noexcept override;
  void add(const OpContext&, const AddParams&) noexcept override;
  // Copies of experts have their places in reserved addresses, of which only some are backed.
  bool keeps_expert_rows() const noexcept override { return device_->maps_addresses(); }
  void sum_experts(const OpContext&, const SumExpertsParams&) noexcept override;
  int64_t max_top_k() const noexcept override { return kMaxTopK; }
  void top_k(const OpContext&, const TopKParams&) noexcept override;
  Status sync(const OpContext&) noexcept override;

 private:
  // Keeps the first error of a context.
  void check(const OpContext& op, int error) noexcept;
  void begin_pass(int64_t n_rows) noexcept;
  bool exact() const noexcept { return numerics_ == Numerics::kExact; }

  std::unique_ptr<Device> device_;
  const Numerics numerics_;
  std::mutex staging_mutex_;

  struct Fault {
    const void* context = nullptr;  // the OpContext's workspace
    int error = 0;
  };
  static constexpr int kMaxFaults = 64;
  std::mutex faults_mutex_;
  Fault faults_[kMaxFaults];
  int n_faults_ = 0;
  int lost_ = 0;  // more faults than can be kept: every context is told
};

}  // namespace fathom::cuda
