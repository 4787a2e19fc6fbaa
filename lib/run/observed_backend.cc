#include "observed_backend.h"

#include <chrono>
#include <utility>

#include "forwarding_backend.h"

namespace fathom::run {
namespace {

class ObservedBackend final : public ForwardingBackend {
 public:
  ObservedBackend(std::unique_ptr<Backend> real, int device, OpObserver observer) noexcept
      : ForwardingBackend(std::move(real)), device_(device), observer_(std::move(observer)) {}

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
  void sum_experts(const OpContext& op, const SumExpertsParams& p) noexcept override {
    timed("sum_experts", op, [&] { real_->sum_experts(op, p); });
  }

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

  const int device_;
  const OpObserver observer_;
};

}  // namespace

std::unique_ptr<Backend> observed(std::unique_ptr<Backend> backend, int device,
                                  OpObserver observer) {
  return std::make_unique<ObservedBackend>(std::move(backend), device, std::move(observer));
}

}  // namespace fathom::run
