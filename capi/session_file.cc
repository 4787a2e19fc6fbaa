// The C interface: saving and restoring sessions.
#include <fmt/format.h>

#include "capi/handles.h"

using namespace fathom;        // NOLINT: this file forwards to it, line by line
using namespace fathom::capi;  // NOLINT

namespace {

// What a host's function answered instead of `n` bytes.
Status bad_answer(const char* what, int64_t answer, uint64_t n) {
  if (answer > 0)
    return Status(Code::kCallback,
                  fmt::format("{} answered {} bytes, {} were asked for", what, answer, n));
  const int error = answer < 0 && answer >= -4095 ? static_cast<int>(-answer) : 0;
  return Status(Code::kIo, fmt::format("{} answered {} with {} bytes to go", what, answer, n))
      .with_errno(error);
}

bool is_count(int64_t answer, size_t n) {
  return answer > 0 && static_cast<uint64_t>(answer) <= n;
}

}  // namespace

int32_t fathom_session_save(const fathom_session* s, const char* path, const fathom_run* run,
                            fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    FATHOM_TRY_ASSIGN(const std::string_view name, to_text("path", path));
    FATHOM_TRY_ASSIGN(const RunArguments arguments, to_run(run));
    return s->session.save(std::string(name), arguments.options);
  });
}

int32_t fathom_session_save_io(const fathom_session* s, fathom_write_fn write, void* user,
                               const fathom_run* run, fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    if (write == nullptr) return null_argument("write");
    FATHOM_TRY_ASSIGN(const RunArguments arguments, to_run(run));
    const auto write_all = [&](std::span<const std::byte> bytes) -> Status {
      while (!bytes.empty()) {
        const int64_t took =
            host_callback(int64_t{-1}, [&] { return write(user, bytes.data(), bytes.size()); });
        if (!is_count(took, bytes.size())) return bad_answer("write", took, bytes.size());
        bytes = bytes.subspan(static_cast<size_t>(took));
      }
      return {};
    };
    return s->session.save_to(write_all, arguments.options);
  });
}

int32_t fathom_session_restore(fathom_model* model, const char* path,
                               const fathom_session_params* params, const fathom_run* run,
                               fathom_session** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY(check_handle(model, "model"));
    FATHOM_TRY_ASSIGN(const std::string_view name, to_text("path", path));
    FATHOM_TRY_ASSIGN(const SessionOptions options, to_session(params));
    FATHOM_TRY_ASSIGN(const RunArguments arguments, to_run(run));
    FATHOM_TRY_ASSIGN(Session session, Session::restore(model->model, std::string(name), options,
                                                        arguments.options));
    *out = new fathom_session(std::move(session));
    return {};
  });
}

int32_t fathom_session_restore_io(fathom_model* model, fathom_read_fn read, void* user,
                                  uint64_t size, const fathom_session_params* params,
                                  const fathom_run* run, fathom_session** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY(check_handle(model, "model"));
    if (read == nullptr) return null_argument("read");
    FATHOM_TRY_ASSIGN(const int64_t n_bytes, to_int64("size", size));
    FATHOM_TRY_ASSIGN(const SessionOptions options, to_session(params));
    FATHOM_TRY_ASSIGN(const RunArguments arguments, to_run(run));
    const auto read_all = [&](int64_t offset, std::span<std::byte> bytes) -> Status {
      while (!bytes.empty()) {
        const int64_t gave = host_callback(int64_t{-1}, [&] {
          return read(user, static_cast<uint64_t>(offset), bytes.data(), bytes.size());
        });
        if (!is_count(gave, bytes.size())) return bad_answer("read", gave, bytes.size());
        bytes = bytes.subspan(static_cast<size_t>(gave));
        offset += gave;
      }
      return {};
    };
    FATHOM_TRY_ASSIGN(Session session, Session::restore_from(model->model, read_all, n_bytes,
                                                             options, arguments.options));
    *out = new fathom_session(std::move(session));
    return {};
  });
}
