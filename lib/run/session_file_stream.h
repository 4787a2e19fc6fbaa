// Streams of a saved session: one buffer of 64 KiB between the host's function and the pages,
// digests on the way, cancellation and progress at every turn of the buffer.  What bytes mean:
// session_file_format.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "../io/hash128.h"
#include "fathom/backend.hpp"
#include "fathom/session.hpp"
#include "run_control.h"

namespace fathom::run {

inline constexpr int64_t kSessionBufferBytes = int64_t{64} << 10;

class SessionSink {
 public:
  // All must outlive it; `total_bytes` is for the progress.
  SessionSink(const WriteFunction& write, const RunControl& control, int64_t total_bytes);

  Status put(std::span<const std::byte> bytes);
  // The same from read(out, at, n), which fills n bytes from position `at` of what is put.
  template <class Read>
  Status put(int64_t bytes, Read&& read) {
    for (int64_t at = 0; at < bytes;) {
      if (filled_ == kSessionBufferBytes) FATHOM_TRY(flush());
      const int64_t n = std::min(bytes - at, kSessionBufferBytes - filled_);
      std::byte* out = buffer_.get() + filled_;
      FATHOM_TRY(read(out, at, n));
      section_.update({out, static_cast<size_t>(n)});
      filled_ += n;
      at += n;
    }
    return {};
  }
  // Appends the digest of what was put since the last digest.
  Status end_section();
  // Appends the trailer and hands the rest to the host.
  Status finish();
  int64_t position() const noexcept { return written_ + filled_; }

 private:
  Status put_digest(const io::Hash128& hash);
  Status flush();

  const WriteFunction& write_;
  const RunControl& control_;
  const int64_t total_;
  std::unique_ptr<std::byte[]> buffer_;
  int64_t filled_ = 0, written_ = 0;
  io::Hash128 section_, whole_;
};

class SessionSource {
 public:
  // `verify`: digests are compared; fuzzers read without.
  SessionSource(const ReadFunction& read, int64_t size_bytes, const RunControl& control,
                bool verify);

  // `what` is for the message.  Errors: kFormat when the file ends before, kCancelled, the host's.
  Status take(std::span<std::byte> out, const char* what);
  // The same into memory of a device.
  Status take(Backend& backend, void* data, int64_t bytes, const char* what);
  // Reads the digest of what was taken since the last one.  Errors: kChecksum with the section's
  // offset.
  Status end_section(const char* what);
  // Reads the trailer; nothing may follow it.  Errors: kChecksum, kFormat.
  Status finish();
  int64_t position() const noexcept { return read_ - filled_ + next_; }
  int64_t remaining() const noexcept { return size_ - position(); }

 private:
  Status refill();
  Status ends_early(int64_t bytes, const char* what) const;
  Status compare_digest(const io::Hash128& hash, const char* what, int64_t start);

  const ReadFunction& read_function_;
  const int64_t size_;
  const RunControl& control_;
  const bool verify_;
  std::unique_ptr<std::byte[]> buffer_;
  int64_t filled_ = 0, next_ = 0, read_ = 0;
  int64_t section_start_ = 0;
  io::Hash128 section_, whole_;
};

}  // namespace fathom::run
