// Bodies of the templates of handles.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <type_traits>

namespace fathom::capi {

// ---- callbacks ----

// Of the innermost callback or call on this thread.
struct ThreadState {
  int callback_depth;
  bool threw;         // a callback of the call under way
  char message[200];  // of what it threw; may be empty
};
ThreadState& thread_state() noexcept;

// To be called in a handler: notes the exception being handled.
void note_exception() noexcept;

template <class R, class F>
R host_callback(R stop, F&& callback) noexcept {
  ThreadState& thread = thread_state();
  R answer = stop;
  ++thread.callback_depth;
  try {
    answer = callback();
  } catch (...) {
    note_exception();
  }
  --thread.callback_depth;
  return answer;
}

// ---- calls ----

int32_t finish(const Status& status, fathom_error* err) noexcept;
// Status of the exception being handled.
Status exception_status() noexcept;
Status callback_threw() noexcept;
Status refused_in_callback() noexcept;

template <class F>
int32_t call(fathom_error* err, F&& work, InCallback in_callback) noexcept {
  if (inside_callback() && in_callback == InCallback::kRefused)
    return finish(refused_in_callback(), err);
  ThreadState& thread = thread_state();
  const bool outer_threw = std::exchange(thread.threw, false);
  Status status;
  try {
    status = work();
  } catch (...) {
    status = exception_status();
  }
  if (std::exchange(thread.threw, outer_threw)) status = callback_threw();
  return finish(status, err);
}

template <class F>
int32_t session_call(fathom_error* err, const fathom_session* s, F&& work,
                     InCallback in_callback) noexcept {
  return call(
      err,
      [&]() -> Status {
        Use use;
        FATHOM_TRY(use.begin(s, "s"));
        Status status = work();
        if (status.code() == Code::kDevice)
          const_cast<fathom_session*>(s)->poisoned.store(true, std::memory_order_relaxed);
        return status;
      },
      in_callback);
}

// ---- arguments ----

Status bad_count(const char* name, uint64_t value, uint64_t max);
Status bad_struct_size(const char* name, uint32_t size, size_t min, size_t max);
Status unknown_fields(const char* name, uint32_t size, size_t known);

inline constexpr uint64_t kMaxCount = (uint64_t{1} << 31) - 1;
// No struct of any version is smaller or larger.
inline constexpr size_t kMinStruct = 8, kMaxStruct = 4096;

template <class T>
Result<std::span<const T>> to_span(const char* name, const T* data, uint64_t n) {
  if (n > kMaxCount) return bad_count(name, n, kMaxCount);
  if (data == nullptr && n > 0) return null_argument(name);
  return std::span<const T>(data, static_cast<size_t>(n));
}

template <class T>
Result<T> from_caller(const T* in, const char* name) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMaxStruct);
  T out;
  std::memset(&out, 0, sizeof out);
  if (in == nullptr) return out;
  uint32_t size;  // read as bytes: the caller's struct may be shorter than T
  std::memcpy(&size, in, sizeof size);
  if (size < kMinStruct || size > kMaxStruct)
    return bad_struct_size(name, size, kMinStruct, kMaxStruct);
  const auto* bytes = reinterpret_cast<const unsigned char*>(in);
  if (size > sizeof(T) &&
      std::any_of(bytes + sizeof(T), bytes + size, [](unsigned char b) { return b != 0; }))
    return unknown_fields(name, size, sizeof(T));
  std::memcpy(&out, bytes, std::min<size_t>(size, sizeof out));
  return out;
}

template <class T>
Status check_out(const T* out, const char* name) {
  if (out == nullptr) return null_argument(name);
  uint32_t size;
  std::memcpy(&size, out, sizeof size);
  if (size < kMinStruct || size > kMaxStruct)
    return bad_struct_size(name, size, kMinStruct, kMaxStruct);
  return {};
}

template <class T>
void to_caller(const T& value, T* out) noexcept {
  static_assert(std::is_trivially_copyable_v<T>);
  uint32_t size;
  std::memcpy(&size, out, sizeof size);
  auto* to = reinterpret_cast<unsigned char*>(out);
  const auto* from = reinterpret_cast<const unsigned char*>(&value);
  const size_t known = std::min<size_t>(size, sizeof value);
  std::memcpy(to + sizeof size, from + sizeof size, known - sizeof size);
  if (size > known) std::memset(to + known, 0, size - known);
}

Status too_small(uint64_t needed, uint64_t cap);

template <class T>
Status give_array(std::span<const T> values, T* buf, uint64_t cap, uint64_t* n) {
  if (n == nullptr) return null_argument("n");
  if (buf == nullptr && cap > 0) return null_argument("buf");
  *n = values.size();
  if (buf == nullptr) return {};
  if (cap < values.size()) return too_small(values.size(), cap);
  std::copy(values.begin(), values.end(), buf);
  return {};
}

template <class H>
void free_handle(H* handle) noexcept {
  if (handle == nullptr || inside_callback()) return;
  if constexpr (std::is_base_of_v<Owned, H>)
    if (handle->foreign()) return;
  if constexpr (std::is_base_of_v<Exclusive, H>)
    if (handle->busy.exchange(true, std::memory_order_acquire)) return;
  // Hooks of the host may run in here and throw; there is nobody to tell.
  ThreadState& thread = thread_state();
  const bool outer_threw = thread.threw;
  delete handle;
  thread.threw = outer_threw;
}

}  // namespace fathom::capi
