// The calls by number, without libnuma: mbind(2), sched_setaffinity(2).
#include "cpu/node_memory.h"

#include <fmt/format.h>
#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "cpu/host_memory.h"
#include "cpu/weight_layout.h"

namespace fathom::cpu {
namespace {

constexpr int kMaxNodeId = 1024;  // the kernel's limit on every architecture

class KernelNuma final : public NumaSystem {
 public:
  int set_policy(void* begin, int64_t bytes, Policy policy,
                 std::span<const int> nodes) noexcept override {
    constexpr int kBits = 8 * sizeof(unsigned long);
    unsigned long mask[kMaxNodeId / kBits] = {};
    for (const int node : nodes) {
      if (node < 0 || node >= kMaxNodeId) return EINVAL;
      mask[node / kBits] |= 1ul << (node % kBits);
    }
    const int mode = policy == Policy::kPrefer ? MPOL_PREFERRED : MPOL_INTERLEAVE;
    // One more than the number of bits: the kernel takes one off.
    return syscall(SYS_mbind, begin, static_cast<unsigned long>(bytes), mode, mask,
                   static_cast<unsigned long>(kMaxNodeId + 1), 0u) == 0
               ? 0
               : errno;
  }

  int bind_thread(pthread_t thread, std::span<const int> cpus) noexcept override {
    if (cpus.empty()) return EINVAL;
    const int capacity = *std::max_element(cpus.begin(), cpus.end()) + 1;
    cpu_set_t* set = CPU_ALLOC(capacity);
    if (set == nullptr) return ENOMEM;
    const size_t size = CPU_ALLOC_SIZE(capacity);
    CPU_ZERO_S(size, set);
    for (const int cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), size, set);
    const int error = pthread_setaffinity_np(thread, size, set);
    CPU_FREE(set);
    return error;
  }

  int current_cpu() noexcept override { return sched_getcpu(); }
};

}  // namespace

NumaSystem& kernel_numa() noexcept {
  static KernelNuma system;
  return system;
}

NodeShares::NodeShares(std::span<const NumaNode> nodes) noexcept
    : n_nodes_(static_cast<int>(nodes.size())) {
  for (int i = 0; i < n_nodes_; ++i)
    before_[i + 1] = before_[i] + static_cast<int64_t>(nodes[static_cast<size_t>(i)].cpus.size());
}

NodeMemory::NodeMemory(NumaSystem& system, std::span<const NumaNode> nodes,
                       std::span<const NumaNode> machine, bool ours)
    : system_(ours ? &system : nullptr), shares_(nodes) {
  if (!ours) return;
  for (const NumaNode& node : nodes) {
    int id = node.id, least = 0;
    bool found = node.total_bytes > 0;
    for (size_t i = 0; i < machine.size() && node.total_bytes == 0; ++i) {
      const int distance = i < node.distances.size() ? node.distances[i] : 0;
      if (machine[i].total_bytes == 0 || (found && distance >= least)) continue;
      found = true;
      id = machine[i].id;
      least = distance;
    }
    memory_.push_back(id);
  }
  spread_ = memory_;
  std::sort(spread_.begin(), spread_.end());
  spread_.erase(std::unique(spread_.begin(), spread_.end()), spread_.end());

  // Containers often forbid the call: a page of our own tells.
  const int64_t page = host_page_bytes();
  void* const probe =
      mmap(nullptr, static_cast<size_t>(page), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (probe == MAP_FAILED) return;
  for (const int& node : spread_)
    if (const int error = system.set_policy(probe, page, NumaSystem::Policy::kPrefer, {&node, 1});
        error != 0)
      refused_.store(error);
  munmap(probe, static_cast<size_t>(page));
}

void NodeMemory::set(void* begin, int64_t bytes, NumaSystem::Policy policy,
                     std::span<const int> nodes) noexcept {
  if (bytes <= 0) return;
  if (const int error = system_->set_policy(begin, bytes, policy, nodes); error != 0) {
    failed_.store(error, std::memory_order_relaxed);
    n_failed_.fetch_add(1, std::memory_order_relaxed);
  }
}

void NodeMemory::place(void* base, int64_t bytes) noexcept {
  if (!binds()) return;
  set(base, bytes, spread_.size() > 1 ? NumaSystem::Policy::kSpread : NumaSystem::Policy::kPrefer,
      spread_);
}

NodeMemory::Pages NodeMemory::pages_of(const Weight& w, int64_t index, int64_t group,
                                       int64_t end) noexcept {
  const auto page = static_cast<uintptr_t>(host_page_bytes());
  const auto up = [page](uintptr_t address) { return (address + page - 1) / page * page; };
  const auto base = reinterpret_cast<uintptr_t>(w.matrix(index));
  const auto rows_end =
      is_packed(w) ? row_groups(w) * group_bytes(w) : w.rows * row_bytes(w.dtype, w.cols);
  const uintptr_t first = up(base + static_cast<uintptr_t>(group * group_bytes(w)));
  const uintptr_t last =
      up(base + static_cast<uintptr_t>(std::min(end * group_bytes(w), rows_end)));
  return {reinterpret_cast<std::byte*>(first),
          last > first ? static_cast<int64_t>(last - first) : 0};
}

void NodeMemory::begin_rows(const Weight& w, int64_t index, int64_t first_row,
                            int64_t n_rows) noexcept {
  if (!has_rows() || !binds()) return;
  const int64_t group0 = first_row / kGroupRows,
                group1 = (first_row + n_rows + kGroupRows - 1) / kGroupRows;
  for (int node = 0; node < shares_.n_nodes(); ++node) {
    const int64_t begin = std::max(group0, shares_.begin(row_groups(w), node));
    const int64_t end = std::min(group1, shares_.begin(row_groups(w), node + 1));
    if (begin >= end) continue;
    const Pages pages = pages_of(w, index, begin, end);
    set(pages.begin, pages.bytes, NumaSystem::Policy::kPrefer,
        {&memory_[static_cast<size_t>(node)], 1});
  }
}

void NodeMemory::end_rows(const Weight& w, int64_t index, int64_t first_row,
                          int64_t n_rows) noexcept {
  if (!has_rows() || !binds()) return;
  const Pages pages = pages_of(w, index, first_row / kGroupRows,
                               (first_row + n_rows + kGroupRows - 1) / kGroupRows);
  place(pages.begin, pages.bytes);
}

std::string NodeMemory::remark() const {
  if (const int error = refused_.load(); error != 0)
    return fmt::format(
        "the system does not let memory be bound to nodes ({}); pages lie where "
        "the threads that fill them run",
        std::strerror(error));
  if (const int64_t n = n_failed_.load(); n > 0)
    return fmt::format("{} pieces of memory could not be bound to their node ({})", n,
                       std::strerror(failed_.load()));
  return {};
}

}  // namespace fathom::cpu
