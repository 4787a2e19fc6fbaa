// Buffered, hashed streams between the host's functions and the pages of a session.
#include "session_file_stream.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "session_file_format.h"

namespace fathom::run {
namespace {

using DigestBytes = std::array<std::byte, static_cast<size_t>(kDigestBytes)>;

DigestBytes bytes_of(const io::Hash128& hash) noexcept {
  const io::Hash128::Digest digest = hash.digest();
  DigestBytes bytes;
  std::memcpy(bytes.data(), &digest.lo, 8);
  std::memcpy(bytes.data() + 8, &digest.hi, 8);
  return bytes;
}

}  // namespace

SessionSink::SessionSink(const WriteFunction& write, const RunControl& control, int64_t total_bytes)
    : write_(write),
      control_(control),
      total_(total_bytes),
      buffer_(new std::byte[static_cast<size_t>(kSessionBufferBytes)]) {}

Status SessionSink::put(std::span<const std::byte> bytes) {
  section_.update(bytes);
  while (!bytes.empty()) {
    if (filled_ == kSessionBufferBytes) FATHOM_TRY(flush());
    const size_t n = std::min(bytes.size(), static_cast<size_t>(kSessionBufferBytes - filled_));
    std::memcpy(buffer_.get() + filled_, bytes.data(), n);
    filled_ += static_cast<int64_t>(n);
    bytes = bytes.subspan(n);
  }
  return {};
}

Status SessionSink::put_digest(const io::Hash128& hash) {
  const DigestBytes digest = bytes_of(hash);
  whole_.update(digest);
  return put(digest);
}

Status SessionSink::end_section() {
  FATHOM_TRY(put_digest(section_));
  section_ = {};
  return {};
}

Status SessionSink::finish() {
  FATHOM_TRY(put_digest(whole_));
  return flush();
}

Status SessionSink::flush() {
  FATHOM_TRY(control_.check(ProgressPhase::kSave, written_, total_));
  FATHOM_TRY(write_({buffer_.get(), static_cast<size_t>(filled_)}));
  written_ += filled_;
  filled_ = 0;
  if (written_ < total_) return {};
  return control_.check(ProgressPhase::kSave, written_, total_);
}

SessionSource::SessionSource(const ReadFunction& read, int64_t size_bytes,
                             const RunControl& control, bool verify)
    : read_function_(read),
      size_(size_bytes),
      control_(control),
      verify_(verify),
      buffer_(new std::byte[static_cast<size_t>(kSessionBufferBytes)]) {}

Status SessionSource::ends_early(int64_t bytes, const char* what) const {
  return Status(Code::kFormat, fmt::format("{} at byte {}: {} bytes, but the file ends after {}",
                                           what, position(), bytes, remaining()))
      .at(static_cast<uint64_t>(position()));
}

Status SessionSource::refill() {
  FATHOM_TRY(control_.check(ProgressPhase::kRestore, read_, size_));
  const int64_t n = std::min(kSessionBufferBytes, size_ - read_);
  FATHOM_TRY(read_function_(read_, {buffer_.get(), static_cast<size_t>(n)}));
  read_ += n;
  filled_ = n;
  next_ = 0;
  return {};
}

Status SessionSource::take(std::span<std::byte> out, const char* what) {
  const auto bytes = static_cast<int64_t>(out.size());
  if (bytes > remaining()) return ends_early(bytes, what);
  for (std::span<std::byte> left = out; !left.empty();) {
    if (next_ == filled_) FATHOM_TRY(refill());
    const size_t n = std::min(left.size(), static_cast<size_t>(filled_ - next_));
    std::memcpy(left.data(), buffer_.get() + next_, n);
    next_ += static_cast<int64_t>(n);
    left = left.subspan(n);
  }
  section_.update(out);
  return {};
}

Status SessionSource::take(Backend& backend, void* data, int64_t bytes, const char* what) {
  if (bytes > remaining()) return ends_early(bytes, what);
  auto* to = static_cast<std::byte*>(data);
  while (bytes > 0) {
    if (next_ == filled_) FATHOM_TRY(refill());
    const int64_t n = std::min(bytes, filled_ - next_);
    const std::byte* from = buffer_.get() + next_;
    section_.update({from, static_cast<size_t>(n)});
    FATHOM_TRY(backend.upload(to, from, n));
    next_ += n;
    to += n;
    bytes -= n;
  }
  return {};
}

Status SessionSource::compare_digest(const io::Hash128& hash, const char* what, int64_t start) {
  const DigestBytes expected = bytes_of(hash);
  const int64_t end = position();
  DigestBytes found;
  FATHOM_TRY(take(found, what));
  whole_.update(found);
  if (!verify_ || found == expected) return {};
  return Status(Code::kChecksum, fmt::format("{}: bytes [{}, {}) do not match their checksum; the "
                                             "file is damaged",
                                             what, start, end))
      .at(static_cast<uint64_t>(start))
      .about(what);
}

Status SessionSource::end_section(const char* what) {
  FATHOM_TRY(compare_digest(section_, what, section_start_));
  section_ = {};
  section_start_ = position();
  return {};
}

Status SessionSource::finish() {
  FATHOM_TRY(compare_digest(whole_, "trailer", 0));
  if (remaining() == 0) return control_.check(ProgressPhase::kRestore, size_, size_);
  return Status(Code::kFormat, fmt::format("{} bytes follow the trailer", remaining()))
      .at(static_cast<uint64_t>(position()))
      .about("trailer");
}

}  // namespace fathom::run
