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

// Holds memory only as long as nobody else needs it.
class LedgerLender {
 public:
  // Releases memory of a device, or of the host's other devices where their sum binds, until
  // `bytes` more can be acquired there or it holds nothing.  `wait`: for passes that use what it
  // holds; else only what can be given at once.  Returns the bytes released.  Called without the
  // ledger's lock.
  virtual int64_t give_back(int device, int64_t bytes, bool wait) noexcept = 0;

 protected:
  ~LedgerLender() = default;
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
  int64_t lent(int device) const noexcept;  // what take_back() can free at most: copies of experts
  int64_t host_available() const noexcept;  // over all host devices
  // The same, bound also by what the plans of the loaded models say of the device at most; negative
  // when more than that is held.
  int64_t room(int device) const noexcept;
  // What the plans say of a purpose beyond what it holds now.
  int64_t still_planned(int device, Purpose purpose) const noexcept;
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
  // While one lives, a device may hold as much as when it was made although its budget is lower:
  // what is moved about can always go back.  One at a time.
  class Exchange {
   public:
    explicit Exchange(Ledger& ledger);
    Exchange(const Exchange&) = delete;
    Exchange& operator=(const Exchange&) = delete;
    ~Exchange();
    // `bytes` of what a device holds are there a second time while this lives.
    void allow_twice(int device, int64_t bytes);

   private:
    Ledger& ledger_;
  };
  // Who is asked to give memory back; it is taken off the list before it ends.
  void add_lender(LedgerLender* lender);
  void remove_lender(LedgerLender* lender) noexcept;
  // Has lenders release memory so that `bytes` more can be acquired; the bytes released, which may
  // be too few.
  int64_t take_back(int device, int64_t bytes, bool wait) noexcept;

 private:
  struct Count {
    int64_t now = 0, peak = 0, planned = 0;
  };
  struct Account {
    LedgerDevice device;
    std::array<Count, kPurposeCount> purposes;
    Count total;
    int64_t exchange = 0;  // bytes that an Exchange allows
  };
  int64_t available_locked(const Account& account) const noexcept;

  mutable std::mutex mutex_;
  std::vector<Account> accounts_;
  int64_t host_budget_;
  int64_t host_now_ = 0, host_exchange_ = 0;
  MemoryObserver observer_;
  LedgerWatcher* watcher_ = nullptr;
  std::mutex lenders_mutex_;  // taken before mutex_
  std::vector<LedgerLender*> lenders_;
};

}  // namespace fathom::run
