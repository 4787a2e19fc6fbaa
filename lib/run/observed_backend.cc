#include "observed_backend.h"

#include <chrono>
#include <utility>

namespace fathom::run {
namespace {

class ObservedBackend final : public Backend {
 public:
  ObservedBackend(std::unique_ptr<Backend> real, int device, OpObserver observer) noexcept
      : real_(std::move(real)), device_(device), observer_(std::move(observer)) {}

  DeviceKind kind() const noexcept override { return real_->kind(); }
  std::string_view name() const noexcept override { return real_->name(); }
  std::string describe() const override { return real_->describe(); }
  int64_t granularity() const noexcept override { return real_->granularity(); }
  MemoryState memory() const noexcept override { return real_->memory(); }
  int64_t runtime_bytes() const noexcept override { return real_->runtime_bytes(); }
  Result<void*> reserve(int64_t bytes) noexcept override { return real_->reserve(bytes); }
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

  void embed(const OpContext& op, const EmbedParams& p) noexcept override {
    timed("embed", op, [&] { real_->embed(op, p); });
  }
  void rms_norm(const OpContext& op, const RmsNormParams& p) noexcept override {
    timed("rms_norm", op, [&] { real_->rms_norm(op, p); });
  }
  void matmul(const OpContext& op, const MatmulParams& p) noexcept override {
    timed("matmul", op, [&] { real_->matmul(op, p); });
  }
  void heads_matmul(const OpContext& op, const HeadsMatmulParams& p) noexcept override {
    timed("heads_matmul", op, [&] { real_->heads_matmul(op, p); });
  }
  void rope_table(const OpContext& op, const RopeTableParams& p) noexcept override {
    timed("rope_table", op, [&] { real_->rope_table(op, p); });
  }
  void rope(const OpContext& op, const RopeParams& p) noexcept override {
    timed("rope", op, [&] { real_->rope(op, p); });
  }
  void kv_append(const OpContext& op, const KvAppendParams& p) noexcept override {
    timed("kv_append", op, [&] { real_->kv_append(op, p); });
  }
  void kv_convert(const OpContext& op, const KvConvertParams& p) noexcept override {
    timed("kv_convert", op, [&] { real_->kv_convert(op, p); });
  }
  void attend_absorbed(const OpContext& op, const AttendAbsorbedParams& p) noexcept override {
    timed("attend_absorbed", op, [&] { real_->attend_absorbed(op, p); });
  }
  void attend_expanded(const OpContext& op, const AttendExpandedParams& p) noexcept override {
    timed("attend_expanded", op, [&] { real_->attend_expanded(op, p); });
  }
  void route(const OpContext& op, const RouteParams& p) noexcept override {
    timed("route", op, [&] { real_->route(op, p); });
  }
  void ffn(const OpContext& op, const FfnParams& p) noexcept override {
    timed("ffn", op, [&] { real_->ffn(op, p); });
  }
  void experts(const OpContext& op, const ExpertsParams& p) noexcept override {
    timed("experts", op, [&] { real_->experts(op, p); });
  }
  void add(const OpContext& op, const AddParams& p) noexcept override {
    timed("add", op, [&] { real_->add(op, p); });
  }
  Status sync(const OpContext& op) noexcept override { return real_->sync(op); }

 private:
  template <class Work>
  void timed(std::string_view name, const OpContext& op, const Work& work) noexcept {
    const auto start = std::chrono::steady_clock::now();
    work();
    (void)real_->sync(op);  // a fault stays with the device and surfaces at the pass's own sync()
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    try {
      observer_({device_, name, elapsed.count()});
    } catch (...) {  // a host's exception must not pass through the library
    }
  }

  const std::unique_ptr<Backend> real_;
  const int device_;
  const OpObserver observer_;
};

}  // namespace

std::unique_ptr<Backend> observed(std::unique_ptr<Backend> backend, int device,
                                  OpObserver observer) {
  return std::make_unique<ObservedBackend>(std::move(backend), device, std::move(observer));
}

}  // namespace fathom::run
