// Reads a header front to back through one buffer.  Every read is checked against the end of the
// source and a cap on the header, so that what a length field claims is never taken on trust.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "fathom/status.hpp"
#include "hash128.h"
#include "tensor_file.h"

namespace fathom::io {

class BufferedReader {
 public:
  static constexpr int64_t kBufferBytes = int64_t{256} << 10;

  // Bytes behind `limit` count as beyond the end.  `hash` gets every byte that was consumed once
  // finish() was called.
  BufferedReader(const ByteSource& source, int64_t limit, Hash128& hash)
      : source_(source),
        end_(std::min(source.size(), limit)),
        hash_(hash),
        buffer_(static_cast<size_t>(std::min(end_, kBufferBytes))) {}

  int64_t position() const noexcept { return buffer_start_ + next_; }
  int64_t remaining() const noexcept { return end_ - position(); }

  // The next n <= kBufferBytes bytes, valid until the next call.  `what` is for the message.
  Status view(int64_t n, const char* what, const char** out) {
    if (filled_ - next_ < n) FATHOM_TRY(refill(n, what));
    *out = reinterpret_cast<const char*>(buffer_.data() + next_);
    next_ += n;
    return {};
  }

  template <class T>
  requires std::is_arithmetic_v<T> Status scalar(const char* what, T* out) {
    const char* bytes = nullptr;
    FATHOM_TRY(view(sizeof(T), what, &bytes));
    std::memcpy(out, bytes, sizeof(T));
    return {};
  }

  // n bytes appended to a string; memory grows only as bytes arrive.
  Status append(int64_t n, const char* what, std::string* out) {
    if (n > remaining()) return ends_early(n, what);
    while (n > 0) {
      const int64_t piece = std::min(n, kBufferBytes);
      const char* bytes = nullptr;
      FATHOM_TRY(view(piece, what, &bytes));
      out->append(bytes, static_cast<size_t>(piece));
      n -= piece;
    }
    return {};
  }

  Status skip(int64_t n, const char* what) {
    if (n > remaining()) return ends_early(n, what);
    while (n > 0) {
      const int64_t piece = std::min(n, kBufferBytes);
      const char* bytes = nullptr;
      FATHOM_TRY(view(piece, what, &bytes));
      n -= piece;
    }
    return {};
  }

  // Feeds the rest of what was consumed to the hash.
  void finish() noexcept {
    hash_.update(std::span(buffer_).first(static_cast<size_t>(next_)));
    drop_consumed();
  }

  Status ends_early(int64_t n, const char* what) const {
    const bool capped = end_ < source_.size();
    return Status(
               Code::kFormat,
               fmt::format("{} at byte {} needs {} bytes, but {} after {} more", what, position(),
                           n, capped ? "the header may not go on" : "the file ends", remaining()))
        .at(static_cast<uint64_t>(position()));
  }

 private:
  void drop_consumed() noexcept {
    std::memmove(buffer_.data(), buffer_.data() + next_, static_cast<size_t>(filled_ - next_));
    buffer_start_ += next_;
    filled_ -= next_;
    next_ = 0;
  }

  Status refill(int64_t n, const char* what) {
    if (n > remaining()) return ends_early(n, what);
    finish();
    const int64_t more =
        std::min(static_cast<int64_t>(buffer_.size()), end_ - buffer_start_) - filled_;
    FATHOM_TRY(source_.read(
        buffer_start_ + filled_,
        std::span(buffer_).subspan(static_cast<size_t>(filled_), static_cast<size_t>(more))));
    filled_ += more;
    return {};
  }

  const ByteSource& source_;
  int64_t end_;
  Hash128& hash_;
  std::vector<std::byte> buffer_;
  int64_t buffer_start_ = 0;  // place of buffer_[0] in the source
  int64_t filled_ = 0;        // valid bytes of the buffer
  int64_t next_ = 0;          // first byte not yet consumed
};

}  // namespace fathom::io
