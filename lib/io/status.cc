// Status: the facts live on the heap, so that success costs one pointer.
#include "fathom/status.hpp"

#include <new>

namespace fathom {

struct Status::Facts {
  std::string message, key;
  int sys_errno = 0, device = -1;
  int64_t bytes_needed = 0, bytes_available = 0;
  uint64_t offset = 0;
};

void Status::FactsDelete::operator()(Facts* facts) const noexcept {
  delete facts;
}

const char* code_name(Code code) noexcept {
  // clang-format off
  switch (code) {
    case Code::kOk: return "kOk";
    case Code::kInvalidArgument: return "kInvalidArgument";
    case Code::kState: return "kState";
    case Code::kBusy: return "kBusy";
    case Code::kBufferTooSmall: return "kBufferTooSmall";
    case Code::kNotFound: return "kNotFound";
    case Code::kUnsupported: return "kUnsupported";
    case Code::kConfig: return "kConfig";
    case Code::kFormat: return "kFormat";
    case Code::kChecksum: return "kChecksum";
    case Code::kVersion: return "kVersion";
    case Code::kMismatch: return "kMismatch";
    case Code::kBudget: return "kBudget";
    case Code::kMemory: return "kMemory";
    case Code::kDevice: return "kDevice";
    case Code::kIo: return "kIo";
    case Code::kContextFull: return "kContextFull";
    case Code::kCancelled: return "kCancelled";
    case Code::kCallback: return "kCallback";
    case Code::kNumeric: return "kNumeric";
    case Code::kForked: return "kForked";
    case Code::kInternal: return "kInternal";
  }
  // clang-format on
  return "unknown code";
}

Status::Status(Code code, std::string_view message) noexcept : code_(code) {
  try {
    facts_.reset(new Facts);
    facts_->message = message;
  } catch (const std::bad_alloc&) {  // keep the code: it is what callers branch on
  }
}

Status Status::clone() const noexcept {
  Status copy;
  copy.code_ = code_;
  try {
    if (facts_) copy.facts_.reset(new Facts(*facts_));
  } catch (const std::bad_alloc&) {
  }
  return copy;
}

std::string_view Status::message() const noexcept {
  return facts_ ? std::string_view(facts_->message) : "";
}
int Status::sys_errno() const noexcept {
  return facts_ ? facts_->sys_errno : 0;
}
int Status::device() const noexcept {
  return facts_ ? facts_->device : -1;
}
int64_t Status::bytes_needed() const noexcept {
  return facts_ ? facts_->bytes_needed : 0;
}
int64_t Status::bytes_available() const noexcept {
  return facts_ ? facts_->bytes_available : 0;
}
uint64_t Status::offset() const noexcept {
  return facts_ ? facts_->offset : 0;
}
std::string_view Status::key() const noexcept {
  return facts_ ? std::string_view(facts_->key) : "";
}

Status&& Status::at(uint64_t offset) && noexcept {
  if (facts_) facts_->offset = offset;
  return std::move(*this);
}

Status&& Status::about(std::string_view key) && noexcept {
  try {
    if (facts_) facts_->key = key;
  } catch (const std::bad_alloc&) {
  }
  return std::move(*this);
}

Status&& Status::bytes(int64_t needed, int64_t available) && noexcept {
  if (facts_) facts_->bytes_needed = needed, facts_->bytes_available = available;
  return std::move(*this);
}

Status&& Status::on_device(int device) && noexcept {
  if (facts_) facts_->device = device;
  return std::move(*this);
}

Status&& Status::with_errno(int sys_errno) && noexcept {
  if (facts_) facts_->sys_errno = sys_errno;
  return std::move(*this);
}

Status&& Status::in(std::string_view context) && noexcept {
  try {
    if (facts_) facts_->message = std::string(context) + ": " + facts_->message;
  } catch (const std::bad_alloc&) {
  }
  return std::move(*this);
}

}  // namespace fathom
