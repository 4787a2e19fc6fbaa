// ThreadPool: the CPU backend's own threads.  One call hands out numbered tasks, the caller takes
// part, and the call returns when all are done.  Idle threads sleep; nothing is allocated per call.
//
//   pool.parallel_for(n_panels, [&](int64_t panel, int worker) { ... });
//
// Tasks are taken in ascending order by whoever is free, so which worker runs a task is a matter of
// timing: results must depend on the task alone, and `worker` only chooses scratch.
//
// On several memory nodes the threads are divided among them and bound to their processors, and a
// call can say which node a task's data lie on (NodeCut): its threads take these tasks first, and
// those of others when they have none left.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "cpu/node_memory.h"
#include "fathom/status.hpp"

namespace fathom::cpu {

// Tasks that come in rows of `n_slices`, each row cut over the nodes in the same way.
struct NodeCut {
  int64_t n_slices = 0;
  // Task t is node i's where t % n_slices in [first[i], first[i + 1]).
  int64_t first[kMaxNodes + 1];
  // Nobody but the node's own threads: for work that decides where memory lies.  Takes longer when
  // the system keeps these threads waiting.
  bool own_threads_only = false;
};

// How tasks are handed out: one at a time, or in runs, for tasks of equal length that read on where
// the one before ended.  A free thread takes that part of the tasks left which it would have if the
// first half of them were divided among all: runs are long at first, and short when it matters that
// all end together.
enum class Hand : uint8_t { kOneByOne, kRuns };

// Threads for each node with so many processors: in proportion to them, one at least where there
// are as many threads as nodes; the sum is n_threads.
std::vector<int> divide_threads(int n_threads, std::span<const NumaNode> nodes);

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
  // `nodes`: started threads are bound to the processors of their node, asked of `system`; the
  // caller's own thread is left where it is.  At most kMaxNodes, each with processors.
  static Result<std::unique_ptr<ThreadPool>> create(int n_threads,
                                                    std::span<const NumaNode> nodes = {},
                                                    NumaSystem& system = kernel_numa());
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const noexcept { return size_; }
  int n_nodes() const noexcept { return n_nodes_; }  // 1 without nodes
  // Index of a worker's node; the caller's is the one it is booked on.
  int node_of(int worker) const noexcept;
  int bind_error() const noexcept { return bind_error_; }  // of the first refusal, as errno; else 0
  // Memory kept for life: the stacks and what belongs to them.
  int64_t runtime_bytes() const noexcept;

  // Calls fn(task, worker) once for each task in [0, n_tasks), 0 <= worker < size().  fn must not
  // throw.  All that fn wrote is visible to the caller afterwards.
  template <class F>
  void parallel_for(int64_t n_tasks, F&& fn, Hand hand = Hand::kOneByOne) noexcept {
    run(n_tasks, nullptr, hand, &call<std::remove_reference_t<F>>,
        const_cast<void*>(static_cast<const void*>(&fn)));
  }
  // The same, where the tasks of each node are its threads' first.  n_tasks is a multiple of
  // cut.n_slices, and the cut is one over n_nodes() nodes.
  template <class F>
  void parallel_for(int64_t n_tasks, const NodeCut& cut, F&& fn,
                    Hand hand = Hand::kOneByOne) noexcept {
    run(n_tasks, &cut, hand, &call<std::remove_reference_t<F>>,
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

 private:
  using TaskFn = void (*)(void* context, int64_t task, int worker);
  struct Worker;
  struct Queue;

  template <class Fn>
  static void call(void* context, int64_t task, int worker) {
    (*static_cast<Fn*>(context))(task, worker);
  }

  ThreadPool(int n_threads, int n_nodes, NumaSystem& system) noexcept;
  void run(int64_t n_tasks, const NodeCut* cut, Hand hand, TaskFn fn, void* context) noexcept;
  void take_tasks(int worker) noexcept;
  void take_from(Queue& queue, int worker) noexcept;
  int node_here() const noexcept;
  void worker_loop(Worker& worker) noexcept;
  static void* thread_main(void* worker) noexcept;

  const int size_;
  const int n_nodes_;
  const int process_;  // whose threads they are
  NumaSystem& system_;
  int n_started_ = 0;
  int bind_error_ = 0;
  int caller_node_ = 0;                // that the caller's thread is booked on
  std::vector<int> node_of_cpu_;       // -1: none
  std::unique_ptr<Worker[]> workers_;  // [size_ - 1]
  std::unique_ptr<Queue[]> queues_;    // [n_nodes_]

  // The call in progress.  Written before `state_` opens it, constant until it is closed and left.
  TaskFn fn_ = nullptr;
  void* context_ = nullptr;
  int64_t n_slices_ = 0;
  int n_queues_ = 0;  // 1, or n_nodes_ for a call that is cut
  bool own_only_ = false;
  Hand hand_ = Hand::kOneByOne;
  int first_queue_ = 0;                         // of the caller
  alignas(64) std::atomic<int64_t> n_left_{0};  // tasks not done, where own_only_
  // kOpen while tasks may be taken, plus the number of workers inside the call.
  alignas(64) std::atomic<uint32_t> state_{0};
  // Callers wait for their number.
  alignas(64) std::atomic<uint32_t> next_ticket_{0};
  std::atomic<uint32_t> serving_{0};
  std::atomic<bool> ending_{false};
};

}  // namespace fathom::cpu
