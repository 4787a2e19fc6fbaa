// RunControl: the one place that looks at a long call's cancel token, deadline and progress hook.
#pragma once

#include <chrono>
#include <cstdint>

#include "fathom/engine.hpp"
#include "fathom/status.hpp"

namespace fathom::run {

class RunControl {
 public:
  explicit RunControl(const RunOptions& options)
      : options_(options), start_(std::chrono::steady_clock::now()) {}

  // Reports progress, then says whether to go on.  Errors: kCancelled.
  Status check(ProgressPhase phase, int64_t done, int64_t total) const {
    if (options_.progress && !options_.progress(phase, done, total))
      return Status(Code::kCancelled, "the progress callback asked to stop");
    return check();
  }
  Status check() const {
    if (options_.cancel && options_.cancel->requested())
      return Status(Code::kCancelled, "cancelled by the host");
    if (past_deadline()) return Status(Code::kCancelled, "the deadline has passed");
    return {};
  }
  bool past_deadline() const noexcept {
    if (options_.deadline_ms <= 0) return false;
    const auto elapsed = std::chrono::steady_clock::now() - start_;
    return std::chrono::duration_cast<std::chrono::milliseconds>(elapsed).count() >=
           options_.deadline_ms;
  }
  // For nn::forward(): asked between layers.
  static bool cancelled(void* self) noexcept {
    const auto* control = static_cast<const RunControl*>(self);
    return (control->options_.cancel && control->options_.cancel->requested()) ||
           control->past_deadline();
  }

 private:
  const RunOptions& options_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace fathom::run
