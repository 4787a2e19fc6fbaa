#include "observed_backend.h"

#include <chrono>
#include <mutex>
#include <utility>
#include <vector>

#include "forwarding_backend.h"

namespace fathom::run {
namespace {

class ObservedBackend final : public ForwardingBackend {
 public:
  ObservedBackend(std::unique_ptr<Backend> real, int device, OpObserver observer,
                  Observed what) noexcept
      : ForwardingBackend(std::move(real)),
        device_(device),
        observer_(std::move(observer)),
        what_(what) {}

  Status upload(void* device, const void* host, int64_t bytes) noexcept override {
    return call("upload", [&] { return real_->upload(device, host, bytes); });
  }
  Status download(void* host, const void* device, int64_t bytes) noexcept override {
    return call("download", [&] { return real_->download(host, device, bytes); });
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
  void attend_texts(const OpContext& op, const AttendAbsorbedParams* texts,
                    int64_t n_texts) noexcept override {
    timed("attend_absorbed", op, [&] { real_->attend_texts(op, texts, n_texts); });
  }
  void merge_attention(const OpContext& op, const MergeAttentionParams& p) noexcept override {
    timed("merge_attention", op, [&] { real_->merge_attention(op, p); });
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
  void top_k(const OpContext& op, const TopKParams& p) noexcept override {
    timed("top_k", op, [&] { real_->top_k(op, p); });
  }
  Status sync(const OpContext& op) noexcept override {
    Status kept = take_fault(op);
    Status now = call("sync", [&] { return real_->sync(op); });
    return kept.ok() ? std::move(now) : std::move(kept);
  }

 private:
  template <class Work>
  void timed(std::string_view name, const OpContext& op, const Work& work) noexcept {
    const auto start = Clock::now();
    work();
    if (what_ == Observed::kOperations)
      if (Status fault = real_->sync(op); !fault.ok()) keep_fault(op, std::move(fault));
    tell(name, start);
  }
  // A copy or a wait: told of where calls are observed.
  template <class Work>
  Status call(std::string_view name, const Work& work) noexcept {
    const auto start = Clock::now();
    Status status = work();
    if (what_ == Observed::kCalls) tell(name, start);
    return status;
  }
  using Clock = std::chrono::steady_clock;
  void tell(std::string_view name, Clock::time_point start) const noexcept {
    const std::chrono::duration<double> elapsed = Clock::now() - start;
    try {
      observer_({device_, name, elapsed.count()});
    } catch (...) {  // a host's exception must not pass through the library
    }
  }

  // What the wait behind an operation found belongs to the pass's own sync().
  struct Fault {
    const void* context;
    Status status;
  };
  void keep_fault(const OpContext& op, Status fault) noexcept {
    const std::lock_guard lock(mutex_);
    for (const Fault& known : faults_)
      if (known.context == op.workspace) return;
    try {
      faults_.push_back({op.workspace, std::move(fault)});
    } catch (const std::bad_alloc&) {  // a lost device fails the pass's own sync() as well
    }
  }
  Status take_fault(const OpContext& op) noexcept {
    const std::lock_guard lock(mutex_);
    for (Fault& known : faults_)
      if (known.context == op.workspace) {
        Status fault = std::move(known.status);
        std::swap(known, faults_.back());
        faults_.pop_back();
        return fault;
      }
    return {};
  }

  const int device_;
  const OpObserver observer_;
  const Observed what_;
  std::mutex mutex_;
  std::vector<Fault> faults_;
};

}  // namespace

std::unique_ptr<Backend> observed(std::unique_ptr<Backend> backend, int device, OpObserver observer,
                                  Observed what) {
  return std::make_unique<ObservedBackend>(std::move(backend), device, std::move(observer), what);
}

}  // namespace fathom::run
