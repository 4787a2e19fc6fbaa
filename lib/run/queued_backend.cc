#include "queued_backend.h"

#include <fmt/format.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <type_traits>

#include "forwarding_backend.h"

namespace fathom::run {
namespace {

// Operations in flight; a caller that is further ahead waits.  A layer of a long chunk in absorbed
// form is about sixty.
constexpr uint32_t kSlots = 256;
constexpr int64_t kStackBytes = 512 * 1024;  // as of the pool's threads
constexpr size_t kMostParams = 320;
// How long a thread looks before it sleeps: what it waits for often comes within this time.
constexpr auto kLookTime = std::chrono::microseconds(4);

// The counters only grow, and wrap: whether `counter` has come to `number`.
bool reached(uint32_t counter, uint32_t number) noexcept {
  return static_cast<int32_t>(counter - number) >= 0;
}

void wait_for(const std::atomic<uint32_t>& counter, uint32_t number) noexcept {
  uint32_t seen = counter.load(std::memory_order_acquire);
  if (reached(seen, number)) return;
  const auto until = std::chrono::steady_clock::now() + kLookTime;
  while (std::chrono::steady_clock::now() < until) {
    seen = counter.load(std::memory_order_acquire);
    if (reached(seen, number)) return;
  }
  while (!reached(seen, number)) {
    counter.wait(seen, std::memory_order_acquire);
    seen = counter.load(std::memory_order_acquire);
  }
}

struct Slot {
  void (*run)(Backend&, const OpContext&, const void* params) noexcept = nullptr;
  OpContext op;
  alignas(16) std::byte params[kMostParams];
};

class QueuedBackend final : public ForwardingDevice {
 public:
  explicit QueuedBackend(std::unique_ptr<Backend> real)
      : ForwardingDevice(std::move(real)),
        slots_(std::make_unique<Slot[]>(kSlots)),
        process_(getpid()) {}

  ~QueuedBackend() override {
    if (!started_ || getpid() != process_) return;  // a child after fork() has no such thread
    {
      std::lock_guard lock(mutex_);
      ending_.store(true, std::memory_order_relaxed);
      queued_.fetch_add(1, std::memory_order_release);
      queued_.notify_one();
    }
    pthread_join(thread_, nullptr);
  }

  Status start() {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, static_cast<size_t>(kStackBytes));
    // Signals belong to the host's threads; the mask is inherited by the one started here.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int error = pthread_create(&thread_, &attributes, &thread_main, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (error != 0)
      return Status(Code::kMemory, fmt::format("the system refused the thread of {}: {}",
                                               real_->name(), strerror(error)))
          .with_errno(error);
    started_ = true;
    return {};
  }

  int64_t runtime_bytes() const noexcept override {
    return real_->runtime_bytes() + kStackBytes +
           static_cast<int64_t>(sizeof(QueuedBackend) + kSlots * sizeof(Slot));
  }

  void embed(const OpContext& op, const EmbedParams& p) noexcept override {
    queue<&Backend::embed>(op, p);
  }
  void rms_norm(const OpContext& op, const RmsNormParams& p) noexcept override {
    queue<&Backend::rms_norm>(op, p);
  }
  void matmul(const OpContext& op, const MatmulParams& p) noexcept override {
    queue<&Backend::matmul>(op, p);
  }
  void heads_matmul(const OpContext& op, const HeadsMatmulParams& p) noexcept override {
    queue<&Backend::heads_matmul>(op, p);
  }
  void rope_table(const OpContext& op, const RopeTableParams& p) noexcept override {
    queue<&Backend::rope_table>(op, p);
  }
  void rope(const OpContext& op, const RopeParams& p) noexcept override {
    queue<&Backend::rope>(op, p);
  }
  void kv_append(const OpContext& op, const KvAppendParams& p) noexcept override {
    queue<&Backend::kv_append>(op, p);
  }
  // Not queued: it comes between passes, and the tail of its page is given back as soon as it
  // returns.
  void kv_convert(const OpContext& op, const KvConvertParams& p) noexcept override {
    real_->kv_convert(op, p);
  }
  void attend_absorbed(const OpContext& op, const AttendAbsorbedParams& p) noexcept override {
    queue<&Backend::attend_absorbed>(op, p);
  }
  void merge_attention(const OpContext& op, const MergeAttentionParams& p) noexcept override {
    queue<&Backend::merge_attention>(op, p);
  }
  void attend_expanded(const OpContext& op, const AttendExpandedParams& p) noexcept override {
    queue<&Backend::attend_expanded>(op, p);
  }
  void route(const OpContext& op, const RouteParams& p) noexcept override {
    queue<&Backend::route>(op, p);
  }
  void ffn(const OpContext& op, const FfnParams& p) noexcept override {
    queue<&Backend::ffn>(op, p);
  }
  void experts(const OpContext& op, const ExpertsParams& p) noexcept override {
    queue<&Backend::experts>(op, p);
  }
  void add(const OpContext& op, const AddParams& p) noexcept override {
    queue<&Backend::add>(op, p);
  }
  void sum_experts(const OpContext& op, const SumExpertsParams& p) noexcept override {
    queue<&Backend::sum_experts>(op, p);
  }
  void top_k(const OpContext& op, const TopKParams& p) noexcept override {
    queue<&Backend::top_k>(op, p);
  }
  // Waits for what was queued until now, also by others: their operations came before.
  Status sync(const OpContext& op) noexcept override {
    if (getpid() == process_) wait_for(done_, queued_.load(std::memory_order_acquire));
    return real_->sync(op);
  }

 private:
  template <auto Operation, class Params>
  void queue(const OpContext& op, const Params& params) noexcept {
    static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= kMostParams);
    if (getpid() != process_) return ((*real_).*Operation)(op, params);
    std::lock_guard lock(mutex_);
    const uint32_t number = queued_.load(std::memory_order_relaxed);
    wait_for(done_, number - kSlots + 1);  // until the slot is free
    Slot& slot = slots_[number % kSlots];
    slot.op = op;
    slot.run = [](Backend& real, const OpContext& context, const void* p) noexcept {
      (real.*Operation)(context, *static_cast<const Params*>(p));
    };
    std::memcpy(slot.params, &params, sizeof params);
    queued_.store(number + 1, std::memory_order_release);
    queued_.notify_one();
  }

  static void* thread_main(void* self) noexcept {
    auto& backend = *static_cast<QueuedBackend*>(self);
    backend.real_->adopt_thread();
    backend.work();
    return nullptr;
  }
  void work() noexcept {
    for (uint32_t number = 0;; ++number) {
      wait_for(queued_, number + 1);
      if (ending_.load(std::memory_order_relaxed) &&
          number + 1 == queued_.load(std::memory_order_relaxed))
        return;
      const Slot& slot = slots_[number % kSlots];
      slot.run(*real_, slot.op, slot.params);
      done_.store(number + 1, std::memory_order_release);
      done_.notify_all();
    }
  }

  const std::unique_ptr<Slot[]> slots_;
  const pid_t process_;
  bool started_ = false;
  pthread_t thread_{};
  std::mutex mutex_;  // of callers
  alignas(64) std::atomic<uint32_t> queued_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  std::atomic<bool> ending_{false};
};

}  // namespace

Result<std::unique_ptr<Backend>> queued(std::unique_ptr<Backend> backend) {
  auto made = std::make_unique<QueuedBackend>(std::move(backend));
  FATHOM_TRY(made->start());
  return std::unique_ptr<Backend>(std::move(made));
}

}  // namespace fathom::run
