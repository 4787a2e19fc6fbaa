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
  int node = 0;
  pthread_t thread{};
};

// The tasks of one node in the call in progress: the i-th is slice first + i % width of row
// i / width.
struct alignas(64) ThreadPool::Queue {
  std::atomic<int64_t> next{0};
  int64_t n_tasks = 0, first = 0, width = 1;
  bool has_threads = false;  // that the pool has started
};

std::vector<int> divide_threads(int n_threads, std::span<const NumaNode> nodes) {
  int64_t n_cpus = 0;
  for (const NumaNode& node : nodes) n_cpus += static_cast<int64_t>(node.cpus.size());
  const int least = n_threads >= static_cast<int>(nodes.size()) ? 1 : 0;
  std::vector<int> threads(nodes.size(), least);
  for (int left = n_threads - least * static_cast<int>(nodes.size()); left > 0; --left) {
    // To the node that is furthest below its share.
    size_t poorest = 0;
    const auto shortage = [&](size_t i) {
      return n_threads * static_cast<int64_t>(nodes[i].cpus.size()) - threads[i] * n_cpus;
    };
    for (size_t i = 1; i < nodes.size(); ++i)
      if (shortage(i) > shortage(poorest)) poorest = i;
    ++threads[poorest];
  }
  return threads;
}

ThreadPool::ThreadPool(int n_threads, int n_nodes, NumaSystem& system) noexcept
    : size_(n_threads), n_nodes_(n_nodes), process_(getpid()), system_(system) {}

int ThreadPool::node_of(int worker) const noexcept {
  return worker == 0 ? caller_node_ : workers_[worker - 1].node;
}

Result<std::unique_ptr<ThreadPool>> ThreadPool::create(int n_threads,
                                                       std::span<const NumaNode> nodes,
                                                       NumaSystem& system) {
  if (n_threads < 1 || n_threads > kMaxThreads)
    return Status(Code::kInvalidArgument,
                  fmt::format("threads is {}, but must be in [1, {}]", n_threads, kMaxThreads));
  const int n_nodes = std::max<int>(1, static_cast<int>(nodes.size()));
  std::unique_ptr<ThreadPool> pool(new ThreadPool(n_threads, n_nodes, system));
  pool->workers_ = std::make_unique<Worker[]>(static_cast<size_t>(n_threads - 1));
  pool->queues_ = std::make_unique<Queue[]>(static_cast<size_t>(n_nodes));
  // Nodes take turns, so that a call of few tasks wakes threads of all of them.
  if (n_nodes > 1) {
    std::vector<int> left = divide_threads(n_threads, nodes);
    int node = 0;
    for (int i = 0; i < n_threads; ++i) {
      while (left[static_cast<size_t>(node)] == 0) node = (node + 1) % n_nodes;
      --left[static_cast<size_t>(node)];
      if (i == 0)
        pool->caller_node_ = node;
      else
        pool->workers_[i - 1].node = node;
      if (i > 0) pool->queues_[node].has_threads = true;
      node = (node + 1) % n_nodes;
    }
    for (int i = 0; i < n_nodes; ++i)
      for (const int cpu : nodes[static_cast<size_t>(i)].cpus) {
        if (cpu >= static_cast<int>(pool->node_of_cpu_.size()))
          pool->node_of_cpu_.resize(static_cast<size_t>(cpu) + 1, -1);
        pool->node_of_cpu_[static_cast<size_t>(cpu)] = i;
      }
  }

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
    if (error != 0) break;
    ++pool->n_started_;
    if (!nodes.empty()) {
      const int refused =
          system.bind_thread(worker.thread, nodes[static_cast<size_t>(worker.node)].cpus);
      if (pool->bind_error_ == 0) pool->bind_error_ = refused;
    }
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
         static_cast<int64_t>(sizeof(ThreadPool)) +
         static_cast<int64_t>(n_nodes_ * sizeof(Queue) + node_of_cpu_.size() * sizeof(int));
}

int ThreadPool::node_here() const noexcept {
  const int cpu = system_.current_cpu();
  const bool known = cpu >= 0 && cpu < static_cast<int>(node_of_cpu_.size());
  const int node = known ? node_of_cpu_[static_cast<size_t>(cpu)] : -1;
  return node >= 0 ? node : caller_node_;
}

void ThreadPool::take_from(Queue& queue, int worker) noexcept {
  for (;;) {
    int64_t n = 1;
    if (hand_ == Hand::kRuns) {
      const int64_t left = queue.n_tasks - queue.next.load(std::memory_order_relaxed);
      n = std::max<int64_t>(1, left / (2 * size_));
    }
    const int64_t begin = queue.next.fetch_add(n, std::memory_order_relaxed);
    const int64_t end = std::min(begin + n, queue.n_tasks);
    if (begin >= end) return;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task =
          n_queues_ == 1 ? i : i / queue.width * n_slices_ + queue.first + i % queue.width;
      fn_(context_, task, worker);
    }
    if (own_only_ && n_left_.fetch_sub(end - begin, std::memory_order_acq_rel) == end - begin)
      n_left_.notify_all();
  }
}

void ThreadPool::take_tasks(int worker) noexcept {
  const auto outer = std::pair(t_pool, t_worker);
  t_pool = this;
  t_worker = worker;
  const int first = worker == 0 ? first_queue_ : n_queues_ > 1 ? workers_[worker - 1].node : 0;
  for (int i = 0; i < n_queues_; ++i) {
    Queue& queue = queues_[(first + i) % n_queues_];
    // The caller stands in where a node has no thread but its own.
    if (i == 0 || !own_only_ || (worker == 0 && !queue.has_threads)) take_from(queue, worker);
  }
  std::tie(t_pool, t_worker) = outer;
}

void ThreadPool::run(int64_t n_tasks, const NodeCut* cut, Hand hand, TaskFn fn,
                     void* context) noexcept {
  if (n_tasks <= 0) return;
  if (t_pool == this) {  // inside a task: the other threads are busy with the outer call
    for (int64_t task = 0; task < n_tasks; ++task) fn(context, task, t_worker);
    return;
  }
  const uint32_t ticket = next_ticket_.fetch_add(1, std::memory_order_relaxed);
  wait_until(serving_, [&](uint32_t value) { return value == ticket; });

  fn_ = fn;
  context_ = context;
  hand_ = hand;
  n_queues_ = cut != nullptr ? n_nodes_ : 1;
  own_only_ = n_queues_ > 1 && cut->own_threads_only && getpid() == process_;
  first_queue_ = n_queues_ == 1 ? 0 : own_only_ ? caller_node_ : node_here();
  if (n_queues_ == 1) {
    queues_[0].n_tasks = n_tasks;
    queues_[0].next.store(0, std::memory_order_relaxed);
  } else {
    n_slices_ = cut->n_slices;
    for (int i = 0; i < n_nodes_; ++i) {
      Queue& queue = queues_[i];
      queue.first = cut->first[i];
      const int64_t width = cut->first[i + 1] - cut->first[i];
      queue.n_tasks = n_tasks / n_slices_ * width;
      queue.width = std::max<int64_t>(width, 1);
      queue.next.store(0, std::memory_order_relaxed);
    }
  }
  n_left_.store(n_tasks, std::memory_order_relaxed);
  const int64_t n_helpers = own_only_ ? size_ - 1 : std::min<int64_t>(n_tasks, size_) - 1;
  if (n_helpers > 0) {
    state_.store(kOpen, std::memory_order_release);
    for (int64_t i = 0; i < n_helpers; ++i) {
      workers_[i].calls.fetch_add(1, std::memory_order_release);
      workers_[i].calls.notify_one();
    }
  }
  take_tasks(0);
  if (own_only_) wait_until(n_left_, [](int64_t value) { return value == 0; });
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
