// Ledger: every large byte by device and purpose, with budgets.  Nothing is asked of the system
// before the ledger has agreed.  Thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "fathom/memory.hpp"
#include "fathom/status.hpp"

namespace fathom::run {

struct LedgerDevice {
  std::string name;
  int64_t budget_bytes = 0;
  bool is_host = false;  // counts towards the host's total
};

// Sees what was booked, under the ledger's lock: be quick, do not call the ledger.
class LedgerWatcher {
 public:
  // Before the first change, once for each device in order: bytes held, [kPurposeCount].
  virtual void watching(int device, std::span<const int64_t> bytes_now) noexcept = 0;
  virtual void changed(int device, Purpose purpose, int64_t bytes_now) noexcept = 0;

 protected:
  ~LedgerWatcher() = default;
};

class Ledger {
 public:
  static constexpr int64_t kUnlimited = INT64_MAX;

  // `host_budget_bytes` limits the sum over host devices.
  Ledger(std::vector<LedgerDevice> devices, int64_t host_budget_bytes, MemoryObserver observer);

  // Books `bytes` more, or refuses and books nothing.  Errors: kBudget (needed, available, what
  // holds the rest), kCallback (the observer refused).
  Status acquire(int device, Purpose purpose, int64_t bytes);
  void release(int device, Purpose purpose, int64_t bytes) noexcept;

  // What could still be acquired on a device, its own budget and the host's considered.
  int64_t available(int device) const noexcept;
  int64_t host_available() const noexcept;  // over all host devices
  int64_t budget(int device) const noexcept;
  bool is_host(int device) const noexcept {
    return accounts_[static_cast<size_t>(device)].device.is_host;
  }
  int64_t host_budget() const noexcept;
  void set_budget(int device, int64_t bytes) noexcept;
  void set_host_budget(int64_t bytes) noexcept;
  // What the plans of the loaded models promise at most; adds up over models.  The purposes of a
  // device need not peak together, so that its own peak is told apart.
  void add_planned(int device, Purpose purpose, int64_t bytes) noexcept;
  void add_planned_peak(int device, int64_t bytes) noexcept;
  void reset_peaks() noexcept;
  MemorySnapshot snapshot() const;
  // The same into a snapshot of this ledger: nothing is allocated.
  void refresh(MemorySnapshot& picture) const noexcept;
  // From now on; null: nobody.  It must outlive the ledger or be taken back.
  void watch(LedgerWatcher* watcher) noexcept;

 private:
  struct Count {
    int64_t now = 0, peak = 0, planned = 0;
  };
  struct Account {
    LedgerDevice device;
    std::array<Count, kPurposeCount> purposes;
    Count total;
  };
  int64_t available_locked(const Account& account) const noexcept;

  mutable std::mutex mutex_;
  std::vector<Account> accounts_;
  int64_t host_budget_;
  int64_t host_now_ = 0;
  MemoryObserver observer_;
  LedgerWatcher* watcher_ = nullptr;
};

}  // namespace fathom::run
