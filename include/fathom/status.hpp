// How every fallible function of Fathom answers: a Status, or a Result<T> that is either a value
// or the Status that explains why there is none.  Nothing here throws.
//
//   Result<Model> model = Model::load("model.gguf");
//   if (!model.ok()) return report(model.status());     // code, text, and the numbers behind it
//
// Codes are the same numbers as FATHOM_E_* in capi/fathom.h and are never renumbered.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>

namespace fathom {

enum class Code : int32_t {
  kOk = 0,
  kInvalidArgument = -1,  // null, out of range, bad struct size
  kState = -2,            // call order; the handle is poisoned
  kBusy = -3,             // handle in use by another thread, or re-entered from a callback
  kBufferTooSmall = -4,   // bytes_needed says how much
  kNotFound = -5,         // file, key, device, tensor
  kUnsupported = -6,      // known, but not in this build or on this machine
  kConfig = -7,           // unknown key, bad value, conflict; key() names it
  kFormat = -8,           // file malformed; offset() and key() say where
  kChecksum = -9,
  kVersion = -10,      // file or header newer than this library
  kMismatch = -11,     // state file of another model; plan gone stale
  kBudget = -12,       // a declared budget would be exceeded: our limit
  kMemory = -13,       // the system refused memory
  kDevice = -14,       // driver or device error
  kIo = -15,           // sys_errno() is set
  kContextFull = -16,  // the session is intact: truncate, save or end it
  kCancelled = -17,
  kCallback = -18,  // a host callback asked to stop with an error
  kNumeric = -19,   // NaN or infinity in the logits
  kForked = -20,    // handle inherited over fork()
  kInternal = -21,  // a defect of ours
};

// "kOk", "kBudget", ...; a static string, never null.
const char* code_name(Code) noexcept;

// Success, or a code with a message for the person who must act, and the facts behind it.
// Cheap when ok (one pointer).  Movable; copying is spelled clone().  Thread-compatible.
class [[nodiscard]] Status {
 public:
  Status() noexcept = default;  // ok
  // `message` names the thing, the value and the bound.  When even the message cannot be
  // allocated the status keeps its code and an empty message.
  Status(Code code, std::string_view message) noexcept;
  Status(Status&&) noexcept = default;
  Status& operator=(Status&&) noexcept = default;
  Status clone() const noexcept;

  bool ok() const noexcept { return code_ == Code::kOk; }
  Code code() const noexcept { return code_; }
  std::string_view message() const noexcept;  // UTF-8; empty when ok

  // Facts; each has a neutral value when it does not apply.
  int sys_errno() const noexcept;            // 0
  int device() const noexcept;               // -1
  int64_t bytes_needed() const noexcept;     // 0
  int64_t bytes_available() const noexcept;  // 0
  uint64_t offset() const noexcept;          // 0; byte offset in the file or JSON text
  std::string_view key() const noexcept;     // ""; config key, tensor or metadata name

  // Builders, used where the status is made: return Status(Code::kFormat, m).at(offset).about(key);
  Status&& at(uint64_t offset) && noexcept;
  Status&& about(std::string_view key) && noexcept;
  Status&& bytes(int64_t needed, int64_t available) && noexcept;
  Status&& on_device(int device) && noexcept;
  Status&& with_errno(int sys_errno) && noexcept;
  // Puts "context: " before the message (the file's name before a parser's message).
  Status&& in(std::string_view context) && noexcept;

 private:
  struct Facts;
  struct FactsDelete {
    void operator()(Facts*) const noexcept;
  };
  Code code_ = Code::kOk;
  std::unique_ptr<Facts, FactsDelete> facts_;
};

// A value or the reason why there is none.  value() may be called only after ok() was true.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) noexcept : has_value_(true) {  // NOLINT: implicit on purpose
    new (&storage_.value) T(std::move(value));
  }
  // NOLINTNEXTLINE: implicit; must not be ok
  Result(Status status) noexcept : status_(std::move(status)) {}
  Result(Result&& other) noexcept
      : has_value_(other.has_value_), status_(std::move(other.status_)) {
    if (has_value_) new (&storage_.value) T(std::move(other.storage_.value));
  }
  Result& operator=(Result&& other) noexcept {
    if (this != &other) {
      this->~Result();
      new (this) Result(std::move(other));
    }
    return *this;
  }
  ~Result() {
    if (has_value_) storage_.value.~T();
  }

  bool ok() const noexcept { return has_value_; }
  T& value() & noexcept { return storage_.value; }
  const T& value() const& noexcept { return storage_.value; }
  T&& value() && noexcept { return std::move(storage_.value); }
  T* operator->() noexcept { return &storage_.value; }
  const T* operator->() const noexcept { return &storage_.value; }
  T& operator*() noexcept { return storage_.value; }
  const T& operator*() const noexcept { return storage_.value; }
  const Status& status() const& noexcept { return status_; }  // ok() when there is a value
  Status status() && noexcept { return std::move(status_); }

 private:
  union Storage {
    Storage() noexcept {}
    ~Storage() {}
    T value;
  };
  Storage storage_;
  bool has_value_ = false;
  Status status_;
};

// FATHOM_TRY(expr): return early when the Status is not ok.
// FATHOM_TRY_ASSIGN(auto x, expr): the same for a Result, else x gets the value.
#define FATHOM_TRY(expr)                                                        \
  do {                                                                          \
    if (::fathom::Status fathom_try_status_ = (expr); !fathom_try_status_.ok()) \
      return fathom_try_status_;                                                \
  } while (false)
#define FATHOM_CONCAT_INNER_(a, b) a##b
#define FATHOM_CONCAT_(a, b) FATHOM_CONCAT_INNER_(a, b)
#define FATHOM_TRY_ASSIGN(declaration, expr) \
  FATHOM_TRY_ASSIGN_INNER_(FATHOM_CONCAT_(fathom_result_, __LINE__), declaration, expr)
#define FATHOM_TRY_ASSIGN_INNER_(result, declaration, expr) \
  auto result = (expr);                                     \
  if (!result.ok()) return std::move(result).status();      \
  declaration = std::move(result).value()

}  // namespace fathom
