// A backend that computes nothing: every operation adds its predicted time (cost_model.h) to a
// clock.  With memory it is a simulated device (simulated_backend.h); without, a way to ask what
// the real layer functions would take.
#pragma once

#include <string>
#include <string_view>

#include "cost_model.h"

namespace fathom::run {

class CostBackend : public Backend {
 public:
  explicit CostBackend(MachineDevice device) : device_(std::move(device)) {}

  const MachineDevice& machine_device() const noexcept { return device_; }
  double busy_seconds() const noexcept { return busy_; }       // of all operations so far
  double expert_seconds() const noexcept { return experts_; }  // of them, routed experts
  // Rows without a page table are taken to be of this type.
  void assume_kv_type(KvType type) noexcept { kv_type_ = type; }

  DeviceKind kind() const noexcept override { return DeviceKind::kSimulated; }
  std::string_view name() const noexcept override { return device_.name; }
  std::string describe() const override;
  int64_t granularity() const noexcept override { return 1; }
  MemoryState memory() const noexcept override { return {device_.bytes, device_.bytes}; }
  int64_t runtime_bytes() const noexcept override { return 0; }
  bool host_accessible() const noexcept override { return true; }
  // It owns no memory and stores nothing.
  Result<void*> reserve(int64_t) noexcept override;
  Status commit(void*, int64_t, int64_t) noexcept override;
  void decommit(void*, int64_t, int64_t) noexcept override {}
  void release(void*, int64_t) noexcept override {}
  Status upload(void*, const void*, int64_t) noexcept override { return {}; }
  Status download(void*, const void*, int64_t) noexcept override { return {}; }
  Status weight_layout(Weight&) const noexcept override;
  Status store_rows(const Weight&, int64_t, int64_t, int64_t, const void*) noexcept override {
    return {};
  }
  Status store_scales(const Weight&, int64_t, const float*) noexcept override { return {}; }

  int64_t workspace_bytes(const MatmulParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const HeadsMatmulParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const AttendAbsorbedParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const AttendExpandedParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const FfnParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const ExpertsParams&) const noexcept override { return 0; }

  void embed(const OpContext&, const EmbedParams& p) noexcept override { spend(work_of(p)); }
  void rms_norm(const OpContext&, const RmsNormParams& p) noexcept override { spend(work_of(p)); }
  void matmul(const OpContext&, const MatmulParams& p) noexcept override { spend(work_of(p)); }
  void heads_matmul(const OpContext&, const HeadsMatmulParams& p) noexcept override {
    spend(work_of(p));
  }
  void rope_table(const OpContext&, const RopeTableParams& p) noexcept override {
    spend(work_of(p));
  }
  void rope(const OpContext&, const RopeParams& p) noexcept override { spend(work_of(p)); }
  void kv_append(const OpContext&, const KvAppendParams& p) noexcept override {
    spend(work_of(p, row_bytes(p.rows)));
  }
  void kv_convert(const OpContext&, const KvConvertParams& p) noexcept override {
    spend(work_of(p));
  }
  void attend_absorbed(const OpContext&, const AttendAbsorbedParams& p) noexcept override {
    spend(work_of(p, row_bytes(p.rows)));
  }
  void merge_attention(const OpContext&, const MergeAttentionParams& p) noexcept override {
    spend(work_of(p));
  }
  void attend_expanded(const OpContext&, const AttendExpandedParams& p) noexcept override {
    spend(work_of(p, row_bytes(p.rows)));
  }
  void route(const OpContext&, const RouteParams& p) noexcept override { spend(work_of(p)); }
  void ffn(const OpContext&, const FfnParams& p) noexcept override { spend(work_of(p)); }
  void experts(const OpContext&, const ExpertsParams& p) noexcept override {
    spend(work_of(p), /*routed=*/true);
  }
  void sum_experts(const OpContext&, const SumExpertsParams& p) noexcept override {
    spend(work_of(p), /*routed=*/true);
  }
  void add(const OpContext&, const AddParams& p) noexcept override { spend(work_of(p)); }
  Status sync(const OpContext&) noexcept override { return {}; }

 protected:
  // Adds an operation's time; `routed`: of routed experts.
  virtual void spend(const Work& work, bool routed = false) noexcept;
  // Average bytes of the cached rows that `rows` names.
  virtual double row_bytes(const KvRows& rows) const noexcept;

  const MachineDevice device_;

 private:
  double busy_ = 0, experts_ = 0;
  KvType kv_type_ = KvType::kF16;
};

}  // namespace fathom::run
