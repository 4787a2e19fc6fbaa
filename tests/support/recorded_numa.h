// A NumaSystem that writes down what it is asked, and refuses when told to.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include "cpu/node_memory.h"

namespace fathom::test {

class RecordedNuma final : public cpu::NumaSystem {
 public:
  struct Call {
    uintptr_t begin = 0;
    int64_t bytes = 0;
    Policy policy = Policy::kPrefer;
    std::vector<int> nodes;
  };

  int set_policy(void* begin, int64_t bytes, Policy policy,
                 std::span<const int> nodes) noexcept override {
    std::lock_guard lock(mutex_);
    calls_.push_back({reinterpret_cast<uintptr_t>(begin), bytes, policy,
                      std::vector<int>(nodes.begin(), nodes.end())});
    return memory_error;
  }
  int bind_thread(pthread_t, std::span<const int> cpus) noexcept override {
    std::lock_guard lock(mutex_);
    bound_.emplace_back(cpus.begin(), cpus.end());
    return thread_error;
  }
  int current_cpu() noexcept override { return cpu; }

  // What was asked since the last time.
  std::vector<Call> take_calls() {
    std::lock_guard lock(mutex_);
    return std::exchange(calls_, {});
  }
  // Processors of every thread that was bound, in order of their first processor.
  std::vector<std::vector<int>> bound() {
    std::lock_guard lock(mutex_);
    std::vector<std::vector<int>> all = bound_;
    std::sort(all.begin(), all.end());
    return all;
  }

  std::atomic<int> memory_error{0}, thread_error{0};
  std::atomic<int> cpu{0};

 private:
  std::mutex mutex_;
  std::vector<Call> calls_;
  std::vector<std::vector<int>> bound_;
};

}  // namespace fathom::test
