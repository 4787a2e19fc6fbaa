// Backends that hand calls to another: the bases of those that watch, queue or disturb one.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fathom/backend.hpp"

namespace fathom::run {

// All but the operations: who changes when these run has to name each of them, and one that is
// added and forgotten does not compile.
class ForwardingDevice : public Backend {
 public:
  explicit ForwardingDevice(std::unique_ptr<Backend> real) noexcept : real_(std::move(real)) {}

  DeviceKind kind() const noexcept override { return real_->kind(); }
  std::string_view name() const noexcept override { return real_->name(); }
  std::string describe() const override { return real_->describe(); }
  int64_t granularity() const noexcept override { return real_->granularity(); }
  MemoryState memory() const noexcept override { return real_->memory(); }
  int64_t runtime_bytes() const noexcept override { return real_->runtime_bytes(); }
  std::vector<std::string> remarks() const override { return real_->remarks(); }
  void adopt_thread() noexcept override { real_->adopt_thread(); }
  Result<void*> reserve(int64_t bytes) noexcept override { return real_->reserve(bytes); }
  void* address(void* base, int64_t offset) const noexcept override {
    return real_->address(base, offset);
  }
  Status commit(void* base, int64_t offset, int64_t bytes) noexcept override {
    return real_->commit(base, offset, bytes);
  }
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept override {
    real_->decommit(base, offset, bytes);
  }
  void release(void* base, int64_t bytes) noexcept override { real_->release(base, bytes); }
  bool host_accessible() const noexcept override { return real_->host_accessible(); }
  Status upload(void* device, const void* host, int64_t bytes) noexcept override {
    return real_->upload(device, host, bytes);
  }
  Status download(void* host, const void* device, int64_t bytes) noexcept override {
    return real_->download(host, device, bytes);
  }
  void pin_host(void* host, int64_t bytes) noexcept override { real_->pin_host(host, bytes); }
  void unpin_host(void* host, int64_t bytes) noexcept override { real_->unpin_host(host, bytes); }
  Status weight_layout(Weight& weight) const noexcept override {
    return real_->weight_layout(weight);
  }
  Status store_rows(const Weight& weight, int64_t index, int64_t first_row, int64_t n_rows,
                    const void* rows) noexcept override {
    return real_->store_rows(weight, index, first_row, n_rows, rows);
  }
  Status store_scales(const Weight& weight, int64_t index, const float* scales) noexcept override {
    return real_->store_scales(weight, index, scales);
  }

  int64_t workspace_bytes(const MatmulParams& p) const noexcept override {
    return real_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const HeadsMatmulParams& p) const noexcept override {
    return real_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const AttendAbsorbedParams& p) const noexcept override {
    return real_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const AttendExpandedParams& p) const noexcept override {
    return real_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const FfnParams& p) const noexcept override {
    return real_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const ExpertsParams& p) const noexcept override {
    return real_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const TopKParams& p) const noexcept override {
    return real_->workspace_bytes(p);
  }
  int64_t max_top_k() const noexcept override { return real_->max_top_k(); }
  bool keeps_expert_rows() const noexcept override { return real_->keeps_expert_rows(); }
  void sum_experts(const OpContext&, const SumExpertsParams&) noexcept override = 0;
  void top_k(const OpContext&, const TopKParams&) noexcept override = 0;

 protected:
  const std::unique_ptr<Backend> real_;
};

class ForwardingBackend : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;

  void embed(const OpContext& op, const EmbedParams& p) noexcept override { real_->embed(op, p); }
  void rms_norm(const OpContext& op, const RmsNormParams& p) noexcept override {
    real_->rms_norm(op, p);
  }
  void matmul(const OpContext& op, const MatmulParams& p) noexcept override {
    real_->matmul(op, p);
  }
  void heads_matmul(const OpContext& op, const HeadsMatmulParams& p) noexcept override {
    real_->heads_matmul(op, p);
  }
  void rope_table(const OpContext& op, const RopeTableParams& p) noexcept override {
    real_->rope_table(op, p);
  }
  void rope(const OpContext& op, const RopeParams& p) noexcept override { real_->rope(op, p); }
  void kv_append(const OpContext& op, const KvAppendParams& p) noexcept override {
    real_->kv_append(op, p);
  }
  void kv_convert(const OpContext& op, const KvConvertParams& p) noexcept override {
    real_->kv_convert(op, p);
  }
  void attend_absorbed(const OpContext& op, const AttendAbsorbedParams& p) noexcept override {
    real_->attend_absorbed(op, p);
  }
  void attend_texts(const OpContext& op, const AttendAbsorbedParams* texts,
                    int64_t n_texts) noexcept override {
    real_->attend_texts(op, texts, n_texts);
  }
  void merge_attention(const OpContext& op, const MergeAttentionParams& p) noexcept override {
    real_->merge_attention(op, p);
  }
  void attend_expanded(const OpContext& op, const AttendExpandedParams& p) noexcept override {
    real_->attend_expanded(op, p);
  }
  void route(const OpContext& op, const RouteParams& p) noexcept override { real_->route(op, p); }
  void ffn(const OpContext& op, const FfnParams& p) noexcept override { real_->ffn(op, p); }
  void experts(const OpContext& op, const ExpertsParams& p) noexcept override {
    real_->experts(op, p);
  }
  void add(const OpContext& op, const AddParams& p) noexcept override { real_->add(op, p); }
  void sum_experts(const OpContext& op, const SumExpertsParams& p) noexcept override {
    real_->sum_experts(op, p);
  }
  void top_k(const OpContext& op, const TopKParams& p) noexcept override { real_->top_k(op, p); }
  Status sync(const OpContext& op) noexcept override { return real_->sync(op); }
};

}  // namespace fathom::run
