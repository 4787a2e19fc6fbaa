// The frame of every call: errors into the caller's struct, exceptions, callbacks, arguments.
#include <fmt/format.h>
#include <unistd.h>

#include <climits>
#include <cstddef>

#include "capi/handles.h"

namespace fathom::capi {

static_assert(FATHOM_E_ARGUMENT == static_cast<int>(Code::kInvalidArgument));
static_assert(FATHOM_E_STATE == static_cast<int>(Code::kState));
static_assert(FATHOM_E_BUSY == static_cast<int>(Code::kBusy));
static_assert(FATHOM_E_BUFFER_TOO_SMALL == static_cast<int>(Code::kBufferTooSmall));
static_assert(FATHOM_E_NOT_FOUND == static_cast<int>(Code::kNotFound));
static_assert(FATHOM_E_UNSUPPORTED == static_cast<int>(Code::kUnsupported));
static_assert(FATHOM_E_CONFIG == static_cast<int>(Code::kConfig));
static_assert(FATHOM_E_FORMAT == static_cast<int>(Code::kFormat));
static_assert(FATHOM_E_CHECKSUM == static_cast<int>(Code::kChecksum));
static_assert(FATHOM_E_VERSION == static_cast<int>(Code::kVersion));
static_assert(FATHOM_E_MISMATCH == static_cast<int>(Code::kMismatch));
static_assert(FATHOM_E_BUDGET == static_cast<int>(Code::kBudget));
static_assert(FATHOM_E_MEMORY == static_cast<int>(Code::kMemory));
static_assert(FATHOM_E_DEVICE == static_cast<int>(Code::kDevice));
static_assert(FATHOM_E_IO == static_cast<int>(Code::kIo));
static_assert(FATHOM_E_CONTEXT_FULL == static_cast<int>(Code::kContextFull));
static_assert(FATHOM_E_CANCELLED == static_cast<int>(Code::kCancelled));
static_assert(FATHOM_E_CALLBACK == static_cast<int>(Code::kCallback));
static_assert(FATHOM_E_NUMERIC == static_cast<int>(Code::kNumeric));
static_assert(FATHOM_E_FORKED == static_cast<int>(Code::kForked));
static_assert(FATHOM_E_INTERNAL == static_cast<int>(Code::kInternal));
static_assert(sizeof(fathom_error) == 512);

Owned::Owned() noexcept : pid(getpid()) {}
bool Owned::foreign() const noexcept {
  return pid != getpid();
}

// ---- callbacks ----

ThreadState& thread_state() noexcept {
  thread_local ThreadState state{};  // plain data: nothing to run when a thread ends
  return state;
}

bool inside_callback() noexcept {
  return thread_state().callback_depth > 0;
}

void note_exception() noexcept {
  ThreadState& thread = thread_state();
  thread.threw = true;
  thread.message[0] = '\0';
  try {
    throw;
  } catch (const std::exception& e) {
    copy_text(e.what(), thread.message);
  } catch (...) {  // of a type we know nothing about
  }
}

Status callback_threw() noexcept {
  const char* const what = thread_state().message;
  try {
    return Status(Code::kCallback, *what ? fmt::format("a callback threw: {}", what)
                                         : "a callback threw an exception");
  } catch (...) {
    return Status(Code::kCallback, "");
  }
}

Status refused_in_callback() noexcept {
  return Status(Code::kBusy, "this function may not be called inside a callback");
}

// ---- results ----

Status exception_status() noexcept {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return Status(Code::kMemory, "the system refused memory");
  } catch (const std::exception& e) {
    return Status(Code::kInternal, e.what());
  } catch (...) {
    return Status(Code::kInternal, "an exception of unknown type");
  }
}

int32_t finish(const Status& status, fathom_error* err) noexcept {
  const auto code = static_cast<int32_t>(status.code());
  if (status.ok() || err == nullptr || err->struct_size < kMinStruct) return code;
  fathom_error out{};
  out.code = code;
  out.sys_errno = status.sys_errno();
  out.device = status.device();
  out.bytes_needed = static_cast<uint64_t>(status.bytes_needed());
  out.bytes_available = static_cast<uint64_t>(status.bytes_available());
  out.offset = status.offset();
  copy_text(status.key(), out.key);
  copy_text(status.message(), out.message);
  // Never beyond our own size: an error struct is the one that people leave uninitialised.
  const size_t known = std::min<size_t>(err->struct_size, sizeof out);
  std::memcpy(reinterpret_cast<char*>(err) + sizeof err->struct_size,
              reinterpret_cast<const char*>(&out) + sizeof out.struct_size,
              known - sizeof err->struct_size);
  if (known < sizeof out && known > offsetof(fathom_error, key))  // cut inside a text: end it
    reinterpret_cast<char*>(err)[known - 1] = '\0';
  return code;
}

void copy_text(std::string_view text, char* field, size_t size) noexcept {
  size_t n = std::min(text.size(), size - 1);
  if (n < text.size())  // not inside a character
    while (n > 0 && (static_cast<unsigned char>(text[n]) & 0xc0) == 0x80) --n;
  std::memcpy(field, text.data(), n);
  std::memset(field + n, 0, size - n);
}

// ---- arguments ----

Status null_argument(const char* name) {
  return Status(Code::kInvalidArgument, fmt::format("{} is NULL", name)).about(name);
}

Status check_handle(const Owned* handle, const char* name) {
  if (handle == nullptr) return null_argument(name);
  if (handle->foreign())
    return Status(Code::kForked, fmt::format("{} was made in process {}, this is its child {}",
                                             name, handle->pid, getpid()));
  return {};
}

Status Use::begin(const Exclusive* handle, const char* name, Poisoned poisoned) {
  FATHOM_TRY(check_handle(handle, name));
  if (handle->busy.exchange(true, std::memory_order_acquire))
    return Status(Code::kBusy, fmt::format("{} is in use by another call", name));
  handle_ = handle;
  if (poisoned == Poisoned::kRefused && handle->poisoned.load(std::memory_order_relaxed))
    return Status(Code::kState,
                  fmt::format("{} had a device error and can only be replanned or freed", name));
  return {};
}

Status bad_count(const char* name, uint64_t value, uint64_t max) {
  return Status(Code::kInvalidArgument, fmt::format("{} is {}, at most {}", name, value, max))
      .about(name);
}

Result<int64_t> to_int64(const char* name, uint64_t value) {
  constexpr uint64_t kMax = INT64_MAX;
  if (value > kMax) return bad_count(name, value, kMax);
  return static_cast<int64_t>(value);
}

Result<std::string_view> to_text(const char* name, const char* text, uint64_t len) {
  if (text == nullptr) return null_argument(name);
  if (len == FATHOM_NTS) return std::string_view(text);
  if (len > kMaxCount) return bad_count("len", len, kMaxCount);
  return std::string_view(text, static_cast<size_t>(len));
}

Status check_flags(uint32_t flags, uint32_t known) {
  if ((flags & ~known) == 0) return {};
  return Status(Code::kInvalidArgument,
                fmt::format("flags {:#x} has unknown bits; known are {:#x}", flags, known))
      .about("flags");
}

Status bad_struct_size(const char* name, uint32_t size, size_t min, size_t max) {
  return Status(Code::kInvalidArgument,
                fmt::format("struct_size of {} is {}, must be its sizeof, in [{}, {}]", name, size,
                            min, max))
      .about(name);
}

Status unknown_fields(const char* name, uint32_t size, size_t known) {
  return Status(Code::kVersion,
                fmt::format("{} has {} bytes and sets fields beyond the {} that version {} knows",
                            name, size, known, version()))
      .about(name);
}

Status too_small(uint64_t needed, uint64_t cap) {
  return Status(Code::kBufferTooSmall, fmt::format("cap is {}, {} are needed", cap, needed))
      .bytes(static_cast<int64_t>(needed),
             static_cast<int64_t>(std::min<uint64_t>(cap, INT64_MAX)));
}

Status give_text(std::string_view text, char* buf, uint64_t cap, uint64_t* len) {
  if (len == nullptr) return null_argument("len");
  if (buf == nullptr && cap > 0) return null_argument("buf");
  *len = text.size();
  if (buf == nullptr) return {};
  if (cap <= text.size()) return too_small(text.size() + 1, cap);
  std::memcpy(buf, text.data(), text.size());
  buf[text.size()] = '\0';
  return {};
}

Result<RunArguments> to_run(const fathom_run* run) {
  FATHOM_TRY_ASSIGN(const fathom_run r, from_caller(run, "run"));
  FATHOM_TRY(check_flags(r.flags, 0));
  RunArguments out;
  constexpr uint64_t kLongestMs = uint64_t{1} << 42;  // 139 years; in nanoseconds it fits int64_t
  out.options.deadline_ms = static_cast<int64_t>(std::min(r.deadline_ms, kLongestMs));
  FATHOM_TRY_ASSIGN(out.options.chunk, to_int64("chunk", r.chunk));
  if (r.cancel != nullptr) {
    out.cancel = r.cancel->token;
    out.options.cancel = out.cancel.get();
  }
  if (r.progress != nullptr)
    out.options.progress = [r](ProgressPhase phase, int64_t done, int64_t total) {
      return host_callback(false, [&] {
        return r.progress(r.user, static_cast<int32_t>(phase), static_cast<uint64_t>(done),
                          static_cast<uint64_t>(total)) == 0;
      });
    };
  if (r.on_logits != nullptr)
    out.options.on_logits = [r](int64_t position, std::span<const float> logits) {
      return host_callback(false, [&] {
        return r.on_logits(r.user, static_cast<uint64_t>(position), logits.data(), logits.size()) ==
               0;
      });
    };
  if (r.on_step != nullptr) out.options.on_step = to_step(r.on_step, r.user);
  return out;
}

Result<SessionOptions> to_session(const fathom_session_params* params) {
  FATHOM_TRY_ASSIGN(const fathom_session_params p, from_caller(params, "params"));
  FATHOM_TRY(check_flags(p.flags, 0));
  SessionOptions options;
  FATHOM_TRY_ASSIGN(options.max_tokens, to_int64("max_tokens", p.max_tokens));
  FATHOM_TRY_ASSIGN(options.reserve_tokens, to_int64("reserve_tokens", p.reserve_tokens));
  return options;
}

Result<SamplingOptions> to_sampling(const fathom_sampler_params* params) {
  FATHOM_TRY_ASSIGN(const fathom_sampler_params p, from_caller(params, "params"));
  SamplingOptions options;
  options.temperature = p.temperature;
  options.top_k = p.top_k;
  options.min_p = p.min_p;
  options.seed = p.seed;
  if (p.top_p != 0) options.top_p = p.top_p;
  if (p.repeat_penalty != 0) options.repeat_penalty = p.repeat_penalty;
  if (p.repeat_window > INT32_MAX) return bad_count("repeat_window", p.repeat_window, INT32_MAX);
  if (p.repeat_window != 0) options.repeat_window = static_cast<int32_t>(p.repeat_window);
  return options;
}

}  // namespace fathom::capi
