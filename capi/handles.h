// What stands behind the opaque handles, and what every function of the C interface does around
// its one line of work: arguments, fork, callbacks, exclusive use, exceptions, the error struct.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "capi/fathom.h"
#include "fathom/fathom.hpp"

namespace fathom::capi {

// Every handle remembers the process it was made in: threads do not survive fork().
struct Owned {
  Owned() noexcept;
  bool foreign() const noexcept;  // this process is a child of the one that made the handle
  const pid_t pid;
};

// Handles that one thread uses at a time.
struct Exclusive : Owned {
  mutable std::atomic<bool> busy{false};
  std::atomic<bool> poisoned{false};  // after FATHOM_E_DEVICE
};

}  // namespace fathom::capi

struct fathom_config : fathom::capi::Exclusive {
  fathom::Config config;
};
struct fathom_engine : fathom::capi::Owned {
  explicit fathom_engine(fathom::Engine e) : engine(std::move(e)) {}
  fathom::Engine engine;
};
struct fathom_cancel {
  // Shared with the calls that watch it.
  std::shared_ptr<fathom::CancelToken> token = std::make_shared<fathom::CancelToken>();
};
struct fathom_plan : fathom::capi::Owned {
  fathom_plan(fathom::Engine e, fathom::Plan p) : engine(std::move(e)), plan(std::move(p)) {}
  fathom::Engine engine;
  fathom::Plan plan;
};
struct fathom_model : fathom::capi::Owned {
  explicit fathom_model(fathom::Model m) : model(std::move(m)) {}
  fathom::Model model;
};
struct fathom_tokenizer : fathom::capi::Owned {
  explicit fathom_tokenizer(fathom::Tokenizer t) : tokenizer(std::move(t)) {}
  fathom::Tokenizer tokenizer;
};
struct fathom_sampler : fathom::capi::Exclusive {
  explicit fathom_sampler(fathom::Sampler s) : sampler(std::move(s)) {}
  fathom::Sampler sampler;
};
struct fathom_session : fathom::capi::Exclusive {
  explicit fathom_session(fathom::Session s) : session(std::move(s)) {}
  fathom::Session session;
};

namespace fathom::capi {

// ---- callbacks of the host ----

// Runs a callback of the host.  What it throws is kept for the end of the call under way on this
// thread, and `stop` is the answer.
template <class R, class F>
R host_callback(R stop, F&& callback) noexcept;

bool inside_callback() noexcept;

// ---- the frame of every call ----

enum class InCallback : bool { kRefused, kAllowed };

// Runs `work`, a function returning Status; turns its Status, its exceptions and those of callbacks
// into the returned code and *err.
template <class F>
int32_t call(fathom_error* err, F&& work, InCallback in_callback = InCallback::kRefused) noexcept;

// A call that uses a session; a device error poisons it.
template <class F>
int32_t session_call(fathom_error* err, const fathom_session* s, F&& work,
                     InCallback in_callback = InCallback::kRefused) noexcept;

// ---- arguments ----

Status null_argument(const char* name);
// Not null, not inherited over fork().
Status check_handle(const Owned* handle, const char* name);

// Exclusive use of a handle until the end of the call.
class Use {
 public:
  Use() noexcept = default;
  Use(const Use&) = delete;
  ~Use() {
    if (handle_) handle_->busy.store(false, std::memory_order_release);
  }
  // Errors: kInvalidArgument, kForked, kBusy, kState.
  enum class Poisoned : bool { kRefused, kTaken };
  Status begin(const Exclusive* handle, const char* name, Poisoned poisoned = Poisoned::kRefused);

 private:
  const Exclusive* handle_ = nullptr;
};

// Signed view of a count from C.  Errors: kInvalidArgument above INT64_MAX.
Result<int64_t> to_int64(const char* name, uint64_t value);
// Array of `n` elements: null is allowed for none.  Errors: kInvalidArgument; n is bounded by 2^31.
template <class T>
Result<std::span<const T>> to_span(const char* name, const T* data, uint64_t n);
// Errors: kInvalidArgument for null.
Result<std::string_view> to_text(const char* name, const char* text, uint64_t len = FATHOM_NTS);
// Errors: kInvalidArgument for bits outside `known`.
Status check_flags(uint32_t flags, uint32_t known);

// A struct from C as this version's struct: missing tail zero.  `in` may be null: all zero.
// Errors: kInvalidArgument (struct_size), kVersion (something unknown is set).
template <class T>
Result<T> from_caller(const T* in, const char* name);
// Before work that fills a struct.  Errors: kInvalidArgument (null, struct_size).
template <class T>
Status check_out(const T* out, const char* name);
// Fills the caller's struct; what it has beyond ours becomes zero.  struct_size stays.
template <class T>
void to_caller(const T& value, T* out) noexcept;

// Text and arrays out: contract 11.
Status give_text(std::string_view text, char* buf, uint64_t cap, uint64_t* len);
template <class T>
Status give_array(std::span<const T> values, T* buf, uint64_t cap, uint64_t* n);

// Copies text into a fixed field, cut at a character, NUL-terminated.
void copy_text(std::string_view text, char* field, size_t size) noexcept;
template <size_t N>
void copy_text(std::string_view text, char (&field)[N]) noexcept {
  copy_text(text, field, N);
}

// Options of a long call.  `run` may be null.  The cancel token lives as long as the result.
struct RunArguments {
  RunOptions options;
  std::shared_ptr<const CancelToken> cancel;
};
Result<RunArguments> to_run(const fathom_run* run);

fathom_memory_item to_item(const MemorySnapshot& snapshot, const MemoryItem& item);
StepFunction to_step(fathom_step_fn on_step, void* user);

Result<SessionOptions> to_session(const fathom_session_params* params);
Result<SamplingOptions> to_sampling(const fathom_sampler_params* params);

// A free: nothing happens inside a callback, after fork(), or while another thread uses the handle.
template <class H>
void free_handle(H* handle) noexcept;

}  // namespace fathom::capi

#include "capi/handles_inline.h"
