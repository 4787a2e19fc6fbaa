#include "ledger.h"

#include <fmt/format.h>

#include <algorithm>

namespace fathom::run {

Ledger::Ledger(std::vector<LedgerDevice> devices, int64_t host_budget_bytes,
               MemoryObserver observer)
    : host_budget_(host_budget_bytes), observer_(std::move(observer)) {
  for (LedgerDevice& device : devices) accounts_.push_back({std::move(device), {}, {}});
}

int64_t Ledger::available_locked(const Account& account) const noexcept {
  int64_t left = std::max(account.device.budget_bytes, account.exchange) - account.total.now;
  if (account.device.is_host)
    left = std::min(left, std::max(host_budget_, host_exchange_) - host_now_);
  return std::max<int64_t>(left, 0);
}

Status Ledger::acquire(int device, Purpose purpose, int64_t bytes) {
  std::lock_guard lock(mutex_);
  Account& account = accounts_[static_cast<size_t>(device)];
  const int64_t left = available_locked(account);
  if (bytes > left) {
    const int64_t own_left =
        std::max(account.device.budget_bytes, account.exchange) - account.total.now;
    const bool own = std::max<int64_t>(own_left, 0) == left;
    return Status(Code::kBudget,
                  fmt::format("{}: {} needs {} bytes more, {} of the {}budget of {} bytes are free",
                              account.device.name, purpose_name(purpose), bytes, left,
                              own ? "" : "host ", own ? account.device.budget_bytes : host_budget_))
        .on_device(device)
        .about(purpose_name(purpose))
        .bytes(bytes, left);
  }
  if (observer_) {
    bool agreed = false;
    try {
      agreed = observer_(device, purpose, bytes, account.total.now + bytes);
    } catch (...) {  // a host's exception is a refusal
    }
    if (!agreed)
      return Status(Code::kCallback,
                    fmt::format("{}: the host's memory observer refused {} bytes for {}",
                                account.device.name, bytes, purpose_name(purpose)))
          .on_device(device)
          .bytes(bytes, left);
  }
  Count& count = account.purposes[static_cast<size_t>(purpose)];
  count.now += bytes;
  count.peak = std::max(count.peak, count.now);
  account.total.now += bytes;
  account.total.peak = std::max(account.total.peak, account.total.now);
  if (account.device.is_host) host_now_ += bytes;
  if (watcher_) watcher_->changed(device, purpose, count.now);
  return {};
}

void Ledger::release(int device, Purpose purpose, int64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  Account& account = accounts_[static_cast<size_t>(device)];
  Count& count = account.purposes[static_cast<size_t>(purpose)];
  count.now -= bytes;
  account.total.now -= bytes;
  if (account.device.is_host) host_now_ -= bytes;
  if (watcher_) watcher_->changed(device, purpose, count.now);
  if (!observer_) return;
  try {
    observer_(device, purpose, -bytes, account.total.now);
  } catch (...) {  // a release cannot be refused
  }
}

int64_t Ledger::available(int device) const noexcept {
  std::lock_guard lock(mutex_);
  return available_locked(accounts_[static_cast<size_t>(device)]);
}

int64_t Ledger::lent(int device) const noexcept {
  std::lock_guard lock(mutex_);
  return accounts_[static_cast<size_t>(device)]
      .purposes[static_cast<size_t>(Purpose::kExpertCache)]
      .now;
}

int64_t Ledger::host_available() const noexcept {
  std::lock_guard lock(mutex_);
  return std::max<int64_t>(host_budget_ - host_now_, 0);
}

int64_t Ledger::room(int device) const noexcept {
  std::lock_guard lock(mutex_);
  const Account& account = accounts_[static_cast<size_t>(device)];
  int64_t left = account.device.budget_bytes - account.total.now;
  if (account.device.is_host) left = std::min(left, host_budget_ - host_now_);
  if (account.total.planned > 0) left = std::min(left, account.total.planned - account.total.now);
  return left;
}

int64_t Ledger::still_planned(int device, Purpose purpose) const noexcept {
  std::lock_guard lock(mutex_);
  const Count& count =
      accounts_[static_cast<size_t>(device)].purposes[static_cast<size_t>(purpose)];
  return std::max<int64_t>(count.planned - count.now, 0);
}

int64_t Ledger::budget(int device) const noexcept {
  std::lock_guard lock(mutex_);
  return accounts_[static_cast<size_t>(device)].device.budget_bytes;
}

void Ledger::set_budget(int device, int64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  accounts_[static_cast<size_t>(device)].device.budget_bytes = bytes;
}

int64_t Ledger::host_budget() const noexcept {
  std::lock_guard lock(mutex_);
  return host_budget_;
}

void Ledger::set_host_budget(int64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  host_budget_ = bytes;
}

void Ledger::add_planned(int device, Purpose purpose, int64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  Account& account = accounts_[static_cast<size_t>(device)];
  account.purposes[static_cast<size_t>(purpose)].planned += bytes;
}

void Ledger::add_planned_peak(int device, int64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  accounts_[static_cast<size_t>(device)].total.planned += bytes;
}

void Ledger::reset_peaks() noexcept {
  std::lock_guard lock(mutex_);
  for (Account& account : accounts_) {
    account.total.peak = account.total.now;
    for (Count& count : account.purposes) count.peak = count.now;
  }
}

MemorySnapshot Ledger::snapshot() const {
  MemorySnapshot picture;
  for (size_t d = 0; d < accounts_.size(); ++d) {  // names never change
    picture.devices.push_back({.name = accounts_[d].device.name});
    for (int p = 0; p < kPurposeCount; ++p)
      picture.items.push_back({.device = static_cast<int>(d), .purpose = static_cast<Purpose>(p)});
  }
  refresh(picture);
  return picture;
}

void Ledger::refresh(MemorySnapshot& picture) const noexcept {
  std::lock_guard lock(mutex_);
  picture.host_budget_bytes = host_budget_;
  picture.host_bytes_now = host_now_;
  for (size_t d = 0; d < accounts_.size(); ++d) {
    const Account& account = accounts_[d];
    DeviceMemory& device = picture.devices[d];
    device.budget_bytes = account.device.budget_bytes;
    device.bytes_now = account.total.now;
    device.bytes_peak = account.total.peak;
    device.bytes_planned = account.total.planned;
    for (size_t p = 0; p < kPurposeCount; ++p) {
      MemoryItem& item = picture.items[d * kPurposeCount + p];
      item.bytes_now = account.purposes[p].now;
      item.bytes_peak = account.purposes[p].peak;
      item.bytes_planned = account.purposes[p].planned;
    }
  }
}

Ledger::Exchange::Exchange(Ledger& ledger) : ledger_(ledger) {
  std::lock_guard lock(ledger_.mutex_);
  for (Account& account : ledger_.accounts_) account.exchange = account.total.now;
  ledger_.host_exchange_ = ledger_.host_now_;
}

void Ledger::Exchange::allow_twice(int device, int64_t bytes) {
  std::lock_guard lock(ledger_.mutex_);
  Account& account = ledger_.accounts_[static_cast<size_t>(device)];
  account.exchange += bytes;
  if (account.device.is_host) ledger_.host_exchange_ += bytes;
}

Ledger::Exchange::~Exchange() {
  std::lock_guard lock(ledger_.mutex_);
  for (Account& account : ledger_.accounts_) account.exchange = 0;
  ledger_.host_exchange_ = 0;
}

void Ledger::add_lender(LedgerLender* lender) {
  std::lock_guard lock(lenders_mutex_);
  lenders_.push_back(lender);
}

void Ledger::remove_lender(LedgerLender* lender) noexcept {
  std::lock_guard lock(lenders_mutex_);
  std::erase(lenders_, lender);
}

int64_t Ledger::take_back(int device, int64_t bytes, bool wait) noexcept {
  std::lock_guard lock(lenders_mutex_);
  int64_t released = 0;
  for (LedgerLender* lender : lenders_) released += lender->give_back(device, bytes, wait);
  return released;
}

void Ledger::watch(LedgerWatcher* watcher) noexcept {
  std::lock_guard lock(mutex_);
  for (size_t d = 0; watcher != nullptr && d < accounts_.size(); ++d) {
    std::array<int64_t, kPurposeCount> bytes_now;
    for (size_t p = 0; p < kPurposeCount; ++p) bytes_now[p] = accounts_[d].purposes[p].now;
    watcher->watching(static_cast<int>(d), bytes_now);
  }
  watcher_ = watcher;
}

}  // namespace fathom::run
