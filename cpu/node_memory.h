// Which memory node pages lie on: rows of weights on the node that multiplies them, everything else
// spread over the nodes, or all of it on one node.  The system is asked through NumaSystem alone.
//
//   a matrix over two nodes:   | rows of node 0           | rows of node 1            |
//   its pages:             |....|....|....|....|....|....|....|....|....|....|....|....|
//                            0    0    0    0    0    0    1    1    1    1    1    1
//
// A page belongs to the node of the row that its first byte is part of, so that every page of a
// matrix has one node and no byte is added for it.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cpu/numa_topology.h"
#include "fathom/backend.hpp"

namespace fathom::cpu {

// The system calls about nodes; a test puts its own behind it.  Answers: 0, or what went wrong as
// errno does.
class NumaSystem {
 public:
  // kPrefer  pages come from the first of the nodes while it has any, then from its neighbours:
  //          binding strictly would let the system end the process instead
  // kSpread  pages come from the nodes in turn
  enum class Policy : uint8_t { kPrefer, kSpread };

  // For pages of [begin, begin + bytes) that are touched from now on; `begin` is that of a page.
  virtual int set_policy(void* begin, int64_t bytes, Policy policy,
                         std::span<const int> nodes) noexcept = 0;
  virtual int bind_thread(pthread_t thread, std::span<const int> cpus) noexcept = 0;
  virtual int current_cpu() noexcept = 0;  // of the calling thread; -1: unknown

 protected:
  ~NumaSystem() = default;
};
// The real ones.
NumaSystem& kernel_numa() noexcept;

// Shares of the nodes of a device in numbered things: in proportion to their processors.  With
// fewer things than nodes some have none.
class NodeShares {
 public:
  NodeShares() noexcept = default;  // one node
  // At most kMaxNodes, each with processors.
  explicit NodeShares(std::span<const NumaNode> nodes) noexcept;

  int n_nodes() const noexcept { return n_nodes_; }
  // Node i has [begin(n, i), begin(n, i + 1)) of n.
  int64_t begin(int64_t n, int node) const noexcept {
    return n * before_[node] / before_[n_nodes_];
  }

 private:
  int n_nodes_ = 1;
  int64_t before_[kMaxNodes + 1] = {0, 1};  // processors of the nodes before
};

// Thread-safe.  Asks nothing more where the system has refused.
class NodeMemory {
 public:
  // `nodes` with processors; with one, all memory is asked for from it.  `machine`: all nodes,
  // among them those whose memory stands in for that of a node without.  Asks the system once, so
  // that remark() can tell from the beginning.  `ours`: false for memory that a host's allocator
  // gives; then rows are cut, and where they lie is left to it.
  NodeMemory(NumaSystem& system, std::span<const NumaNode> nodes, std::span<const NumaNode> machine,
             bool ours = true);

  // Whether rows are cut over several nodes.
  bool has_rows() const noexcept { return shares_.n_nodes() > 1; }
  bool binds() const noexcept {
    return system_ != nullptr && refused_.load(std::memory_order_relaxed) == 0;
  }
  const NodeShares& shares() const noexcept { return shares_; }

  // A range of addresses that was just reserved or given back.
  void place(void* base, int64_t bytes) noexcept;
  // Around the storing of rows [first_row, first_row + n_rows) of a matrix: which nodes their pages
  // come from, and the end of it.  Policies are not kept: each piece of memory with one of its own
  // is a mapping, of which a process may have 65,530, and a large model has more matrices.
  void begin_rows(const Weight&, int64_t index, int64_t first_row, int64_t n_rows) noexcept;
  void end_rows(const Weight&, int64_t index, int64_t first_row, int64_t n_rows) noexcept;

  // What the system refused, in words; empty: nothing.
  std::string remark() const;

 private:
  struct Pages {
    std::byte* begin;
    int64_t bytes;
  };
  void set(void* begin, int64_t bytes, NumaSystem::Policy, std::span<const int> nodes) noexcept;
  // Pages whose first byte belongs to row groups [group, end) of a matrix.
  static Pages pages_of(const Weight&, int64_t index, int64_t group, int64_t end) noexcept;

  NumaSystem* system_ = nullptr;
  NodeShares shares_;
  std::vector<int> memory_;      // per node of the device: the node whose memory is used
  std::vector<int> spread_;      // the same, each once, ascending
  std::atomic<int> refused_{0};  // errno of the first question: nothing more is asked
  std::atomic<int> failed_{0};   // of the last single call that failed later
  std::atomic<int64_t> n_failed_{0};
};

}  // namespace fathom::cpu
