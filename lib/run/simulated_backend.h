// Simulated devices: declared bytes and speeds, no arithmetic.  Plans, the ledger, the scheduler
// and the cache are the real ones, so a model of 671 B parameters runs here for any number of
// tokens, and every byte and every second of it can be looked at.
//
// Memory is addresses: pages that nobody touches cost nothing, and what reads them sees zeros.
// Only what the library looks at itself is really there: the experts that tokens choose, where
// copies of experts are kept, and so copies of a few bytes from and to the host's memory.
//
// Time is the cost model's: each device has a clock that its operations advance; the thread that
// runs the passes has one too, which sync() and transfers advance.  A transfer between devices is
// done by engines of its own, beside what the devices compute.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "cost_backend.h"
#include "simulated_routing.h"

namespace fathom::run {

// What the simulated devices of one engine share: the machine, the time, and whose addresses are
// whose.  Thread-safe.
class SimulatedMachine {
 public:
  explicit SimulatedMachine(MachineDescription machine);

  const MachineDescription& description() const noexcept { return machine_; }
  double now() const noexcept { return host_.load(std::memory_order_relaxed); }
  double busy_seconds(int device) const noexcept { return clock(device).busy.load(); }

  // Queues `s` seconds of work on a device.
  void run(int device, double s) noexcept;
  // Waits for all that is queued on a device.
  void wait(int device) noexcept;
  // Moves bytes between two devices, or within one; waits for the end.
  void transfer(int from, int to, int64_t bytes) noexcept;
  // Waits for the next bytes of the spill file.  The disk fetches `ahead_bytes` while nobody waits.
  void read_file(int64_t bytes, int64_t ahead_bytes) noexcept;

  void add_range(const void* base, int64_t bytes, int device);
  void remove_range(const void* base) noexcept;
  // Counts `bytes` (or, negative, discounts) in the range that begins at `base`.  False, and
  // nothing counted, when the device has less left.
  bool count(const void* base, int64_t bytes) noexcept;
  // The device whose memory this is; -1: none of ours.
  int owner(const void* address) const noexcept;
  int64_t free_bytes(int device) const noexcept;

  // Without it tokens choose nobody: experts take what they take on average.
  SimulatedRouting& routing() noexcept { return routing_; }

 private:
  struct Clock {
    std::atomic<double> free_at{0};  // when the last operation ends
    std::atomic<double> busy{0};     // seconds of work
  };
  struct Range {
    const std::byte* begin;
    const std::byte* end;
    int device;
    int64_t committed;
  };
  Clock& clock(int device) noexcept { return clocks_[static_cast<size_t>(device)]; }
  const Clock& clock(int device) const noexcept { return clocks_[static_cast<size_t>(device)]; }

  const MachineDescription machine_;
  std::vector<Clock> clocks_;
  SimulatedRouting routing_;
  std::atomic<double> host_{0};
  std::atomic<double> file_{0};  // how far the disk has come
  mutable std::mutex mutex_;     // of what follows
  std::vector<Range> ranges_;    // sorted by address
  std::vector<int64_t> free_;    // by device
};

// Sizes - layouts and workspaces - are those of a real backend, `rules`: the CPU's, whose kernels
// this library always has.  Without rules it may be asked for time alone.
class SimulatedBackend final : public CostBackend {
 public:
  SimulatedBackend(std::shared_ptr<SimulatedMachine> machine, int index,
                   std::shared_ptr<const Backend> rules);

  int64_t granularity() const noexcept override { return granularity_; }
  MemoryState memory() const noexcept override {
    return {device_.bytes, machine_->free_bytes(index_)};
  }
  int64_t runtime_bytes() const noexcept override { return device_.runtime_bytes; }
  bool host_accessible() const noexcept override { return device_.kind == DeviceKind::kCpu; }
  Result<void*> reserve(int64_t bytes) noexcept override;
  Status commit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void release(void* base, int64_t bytes) noexcept override;
  Status upload(void* device, const void* host, int64_t bytes) noexcept override;
  Status download(void* host, const void* device, int64_t bytes) noexcept override;

  Status weight_layout(Weight& weight) const noexcept override {
    return rules_->weight_layout(weight);
  }
  int64_t workspace_bytes(const MatmulParams& p) const noexcept override {
    return rules_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const HeadsMatmulParams& p) const noexcept override {
    return rules_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const AttendAbsorbedParams& p) const noexcept override {
    return rules_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const AttendExpandedParams& p) const noexcept override {
    return rules_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const FfnParams& p) const noexcept override {
    return rules_->workspace_bytes(p);
  }
  int64_t workspace_bytes(const ExpertsParams& p) const noexcept override {
    return rules_->workspace_bytes(p);
  }
  void kv_convert(const OpContext&, const KvConvertParams& p) noexcept override;
  void route(const OpContext&, const RouteParams& p) noexcept override;
  void experts(const OpContext&, const ExpertsParams& p) noexcept override;
  bool keeps_expert_rows() const noexcept override { return true; }
  Status sync(const OpContext&) noexcept override;

 protected:
  void spend(const Work& work, bool routed) noexcept override;
  double row_bytes(const KvRows& rows) const noexcept override;

 private:
  const std::shared_ptr<SimulatedMachine> machine_;
  const int index_;
  const std::shared_ptr<const Backend> rules_;
  const int64_t granularity_;

  // All layers of a pass read the same pages: the last answer of row_bytes().
  struct RowsSeen {
    const KvPage* pages = nullptr;
    const void* first_page = nullptr;
    int64_t first_row = -1, n_rows = -1;
    double row_bytes = 0;
  };
  mutable std::mutex seen_mutex_;
  mutable RowsSeen seen_;
};

}  // namespace fathom::run
