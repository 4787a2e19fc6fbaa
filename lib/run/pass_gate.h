// PassGate: passes of a model's sessions, which may be many at once, and changes of what they all
// use, which are made while none runs.
#pragma once

#include <condition_variable>
#include <mutex>

namespace fathom::run {

class PassGate {
 public:
  // Lives while a pass runs.  A thread has one at a time and makes no change meanwhile.
  class Pass {
   public:
    explicit Pass(PassGate& gate) : gate_(gate) {
      std::unique_lock lock(gate.mutex_);
      gate.turn_.wait(lock, [&] { return !gate.changing_; });  // no change waits for ever
      ++gate.n_passes_;
    }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;
    ~Pass() {
      std::lock_guard lock(gate_.mutex_);
      --gate_.n_passes_;
      gate_.turn_.notify_all();
    }

   private:
    PassGate& gate_;
  };

  // Runs body() while no pass runs, waiting for those that do; without `wait` only if none does.
  // Whether it ran.
  template <class Body>
  bool change(bool wait, Body&& body) {
    std::unique_lock lock(mutex_);
    if (!wait && (n_passes_ > 0 || changing_)) return false;
    turn_.wait(lock, [&] { return !changing_; });
    changing_ = true;
    turn_.wait(lock, [&] { return n_passes_ == 0; });
    lock.unlock();
    body();
    lock.lock();
    changing_ = false;
    turn_.notify_all();
    return true;
  }

 private:
  std::mutex mutex_;
  std::condition_variable turn_;
  int n_passes_ = 0;
  bool changing_ = false;
};

}  // namespace fathom::run
