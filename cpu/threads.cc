// The pool's hand-off: a call is opened, joined by whoever wakes in time, and closed.
//
// The caller never waits for a thread that has not begun: on a machine with other work a sleeping
// worker may be late, and by then the caller has done its tasks.  A worker joins by adding itself
// to `state_` while kOpen is set, so the call's data stay valid exactly as long as someone is in.
#include "cpu/threads.h"

#include <fmt/format.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <tuple>
#include <utility>

namespace fathom::cpu {
namespace {

constexpr uint32_t kOpen = 1u << 31;
// How long a thread looks before it sleeps: the next operation of a decode step often comes within
// this time, and a wake-up by the system costs several times more.
constexpr auto kSpinTime = std::chrono::microseconds(4);

thread_local const ThreadPool* t_pool = nullptr;  // the pool whose task this thread is running
thread_local int t_worker = 0;

inline void pause_cpu() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until done(value), first looking, then asleep; `value` is left as last loaded (acquire).
template <class T, class Done>
T wait_until(const std::atomic<T>& word, Done&& done) noexcept {
  T value = word.load(std::memory_order_acquire);
  if (done(value)) return value;
  const auto until = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 16; ++i) {
      pause_cpu();
      value = word.load(std::memory_order_acquire);
      if (done(value)) return value;
    }
  } while (std::chrono::steady_clock::now() < until);
  while (!done(value)) {
    word.wait(value, std::memory_order_acquire);
    value = word.load(std::memory_order_acquire);
  }
  return value;
}

}  // namespace

struct alignas(64) ThreadPool::Worker {
  std::atomic<uint32_t> calls{0};  // grows by one for each call this worker is woken for
  ThreadPool* pool = nullptr;
  int index = 0;
  pthread_t thread{};
};

ThreadPool::ThreadPool(int n_threads) noexcept : size_(n_threads), process_(getpid()) {}

Result<std::unique_ptr<ThreadPool>> ThreadPool::create(int n_threads) {
  if (n_threads < 1 || n_threads > kMaxThreads)
    return Status(Code::kInvalidArgument,
                  fmt::format("threads is {}, but must be in [1, {}]", n_threads, kMaxThreads));
  std::unique_ptr<ThreadPool> pool(new ThreadPool(n_threads));
  pool->workers_ = std::make_unique<Worker[]>(static_cast<size_t>(n_threads - 1));

  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, static_cast<size_t>(kStackBytes));
  // Signals belong to the host's threads; the mask is inherited by those started here.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = 0;
  for (int i = 0; i < n_threads - 1 && error == 0; ++i) {
    Worker& worker = pool->workers_[i];
    worker.pool = pool.get();
    worker.index = i + 1;
    error = pthread_create(&worker.thread, &attributes, &ThreadPool::thread_main, &worker);
    if (error == 0) ++pool->n_started_;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_attr_destroy(&attributes);
  if (error != 0)
    return Status(Code::kMemory, fmt::format("the system refused thread {} of {}: {}",
                                             pool->n_started_ + 2, n_threads, strerror(error)))
        .with_errno(error);
  return pool;
}

ThreadPool::~ThreadPool() {
  if (getpid() != process_) {  // joining threads that this process never had would not end
    (void)workers_.release();
    return;
  }
  ending_.store(true, std::memory_order_release);
  for (int i = 0; i < n_started_; ++i) {
    workers_[i].calls.fetch_add(1, std::memory_order_release);
    workers_[i].calls.notify_one();
  }
  for (int i = 0; i < n_started_; ++i) pthread_join(workers_[i].thread, nullptr);
}

int64_t ThreadPool::runtime_bytes() const noexcept {
  return static_cast<int64_t>(size_ - 1) * (kStackBytes + static_cast<int64_t>(sizeof(Worker))) +
         static_cast<int64_t>(sizeof(ThreadPool));
}

void ThreadPool::take_tasks(int worker) noexcept {
  const auto outer = std::pair(t_pool, t_worker);
  t_pool = this;
  t_worker = worker;
  for (;;) {
    const int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= n_tasks_) break;
    fn_(context_, task, worker);
  }
  std::tie(t_pool, t_worker) = outer;
}

void ThreadPool::run(int64_t n_tasks, TaskFn fn, void* context) noexcept {
  if (n_tasks <= 0) return;
  if (t_pool == this) {  // inside a task: the other threads are busy with the outer call
    for (int64_t task = 0; task < n_tasks; ++task) fn(context, task, t_worker);
    return;
  }
  const uint32_t ticket = next_ticket_.fetch_add(1, std::memory_order_relaxed);
  wait_until(serving_, [&](uint32_t value) { return value == ticket; });

  fn_ = fn;
  context_ = context;
  n_tasks_ = n_tasks;
  next_task_.store(0, std::memory_order_relaxed);
  const int64_t n_helpers = std::min<int64_t>(n_tasks, size_) - 1;
  if (n_helpers > 0) {
    state_.store(kOpen, std::memory_order_release);
    for (int64_t i = 0; i < n_helpers; ++i) {
      workers_[i].calls.fetch_add(1, std::memory_order_release);
      workers_[i].calls.notify_one();
    }
  }
  take_tasks(0);
  if (n_helpers > 0) {
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    wait_until(state_, [](uint32_t value) { return value == 0; });
  }
  serving_.store(ticket + 1, std::memory_order_release);
  serving_.notify_all();
}

void ThreadPool::worker_loop(Worker& worker) noexcept {
  uint32_t seen = 0;
  for (;;) {
    seen = wait_until(worker.calls, [&](uint32_t value) { return value != seen; });
    if (ending_.load(std::memory_order_acquire)) return;
    uint32_t state = state_.load(std::memory_order_relaxed);
    bool joined = false;
    while ((state & kOpen) != 0 && !joined)
      joined = state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel,
                                            std::memory_order_relaxed);
    if (!joined) continue;  // too late: the others have taken every task
    take_tasks(worker.index);
    if (state_.fetch_sub(1, std::memory_order_acq_rel) == 1) state_.notify_all();
  }
}

void* ThreadPool::thread_main(void* argument) noexcept {
  Worker& worker = *static_cast<Worker*>(argument);
#if defined(__linux__)
  char name[16];
  const auto end = fmt::format_to_n(name, sizeof name - 1, "fathom-{}", worker.index).out;
  *end = '\0';
  pthread_setname_np(pthread_self(), name);
#endif
  worker.pool->worker_loop(worker);
  return nullptr;
}

}  // namespace fathom::cpu
