// ThreadPool: the CPU backend's own threads.  One call hands out numbered tasks, the caller takes
// part, and the call returns when all are done.  Idle threads sleep; nothing is allocated per call.
//
//   pool.parallel_for(n_panels, [&](int64_t panel, int worker) { ... });
//
// Tasks are taken in ascending order by whoever is free, so which worker runs a task is a matter of
// timing: results must depend on the task alone, and `worker` only chooses scratch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "fathom/status.hpp"

namespace fathom::cpu {

// Thread-safe: calls from several threads are served one at a time, in the order of their arrival.
// A call made inside a task of the same pool runs all its tasks on the calling thread.
// The pool must not be destroyed while a call is in progress.
// In a child after fork() the threads are gone: calls run on their caller alone, and destruction
// leaves the stacks behind.
class ThreadPool {
 public:
  static constexpr int kMaxThreads = 1024;
  // Stack of each thread that the pool starts.  Kernels keep their tiles in the caller's workspace.
  static constexpr int64_t kStackBytes = 512 * 1024;

  // `n_threads` in [1, kMaxThreads] including the caller of parallel_for, so n_threads - 1 are
  // started; signals are blocked in them.  Errors: kInvalidArgument; kMemory when the system
  // refuses a thread (those already started have ended by then).
  static Result<std::unique_ptr<ThreadPool>> create(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const noexcept { return size_; }
  // Memory kept for life: the stacks and what belongs to them.
  int64_t runtime_bytes() const noexcept;

  // Calls fn(task, worker) once for each task in [0, n_tasks), 0 <= worker < size().  fn must not
  // throw.  All that fn wrote is visible to the caller afterwards.
  template <class F>
  void parallel_for(int64_t n_tasks, F&& fn) noexcept {
    using Fn = std::remove_reference_t<F>;
    run(
        n_tasks,
        [](void* context, int64_t task, int worker) { (*static_cast<Fn*>(context))(task, worker); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

 private:
  using TaskFn = void (*)(void* context, int64_t task, int worker);
  struct Worker;

  explicit ThreadPool(int n_threads) noexcept;
  void run(int64_t n_tasks, TaskFn fn, void* context) noexcept;
  void take_tasks(int worker) noexcept;
  void worker_loop(Worker& worker) noexcept;
  static void* thread_main(void* worker) noexcept;

  const int size_;
  const int process_;  // whose threads they are
  int n_started_ = 0;
  std::unique_ptr<Worker[]> workers_;  // [size_ - 1]

  // The call in progress.  Written before `state_` opens it, constant until it is closed and left.
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  int64_t n_tasks_ = 0;
  alignas(64) std::atomic<int64_t> next_task_{0};
  // kOpen while tasks may be taken, plus the number of workers inside the call.
  alignas(64) std::atomic<uint32_t> state_{0};
  // Callers wait for their number.
  alignas(64) std::atomic<uint32_t> next_ticket_{0};
  std::atomic<uint32_t> serving_{0};
  std::atomic<bool> ending_{false};
};

}  // namespace fathom::cpu
