// The two byte sources: a regular file read with pread, and memory.  The operating system's file
// interface appears here and in replace_file.cc, and nowhere else in lib/io.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "checked.h"
#include "tensor_file.h"

namespace fathom::io {
namespace {

// Errors of read() must not throw, not even when their message finds no memory.
template <class Make>
Status status_noexcept(Code code, Make&& make_message) noexcept {
  try {
    return Status(code, make_message());
  } catch (...) {
    return Status(code, "");
  }
}

Status beyond_end(const ByteSource& source, int64_t offset, size_t bytes) noexcept {
  return status_noexcept(Code::kFormat,
                         [&] {
                           return fmt::format(
                               "{}: bytes [{}, +{}) lie beyond the end of the file at {}",
                               source.name(), offset, bytes, source.size());
                         })
      .at(offset < 0 ? 0 : static_cast<uint64_t>(offset));
}

bool inside(int64_t size, int64_t offset, size_t bytes) noexcept {
  return (Checked(offset) + Checked(bytes)).at_most(size);
}

class FileSource final : public ByteSource {
 public:
  FileSource(int fd, int64_t size, std::string name) noexcept
      : fd_(fd), size_(size), name_(std::move(name)) {}
  ~FileSource() override { ::close(fd_); }
  FileSource(const FileSource&) = delete;
  FileSource& operator=(const FileSource&) = delete;

  int64_t size() const noexcept override { return size_; }
  const std::string& name() const noexcept override { return name_; }

  Status read(int64_t offset, std::span<std::byte> out) const noexcept override {
    if (!inside(size_, offset, out.size())) return beyond_end(*this, offset, out.size());
    constexpr size_t kMaxRead = size_t{1} << 30;  // Linux transfers at most 2 GiB - 4 KiB at once
    // A large read is most often followed by the one behind it: the disk fetches while the caller
    // works on what it has.  A hint; a failure means nothing.
    constexpr size_t kLargeRead = size_t{256} << 10;
    constexpr off_t kReadAhead = off_t{8} << 20;
    if (out.size() >= kLargeRead)
      static_cast<void>(::posix_fadvise(fd_, offset + static_cast<off_t>(out.size()), kReadAhead,
                                        POSIX_FADV_WILLNEED));
    while (!out.empty()) {
      const ssize_t got = ::pread(fd_, out.data(), std::min(out.size(), kMaxRead), offset);
      if (got < 0) {
        if (errno == EINTR) continue;
        const int error = errno;
        return status_noexcept(Code::kIo,
                               [&] {
                                 return fmt::format("{}: reading {} bytes at {} failed: {}", name_,
                                                    out.size(), offset,
                                                    std::generic_category().message(error));
                               })
            .with_errno(error)
            .at(static_cast<uint64_t>(offset));
      }
      if (got == 0)
        return status_noexcept(Code::kFormat,
                               [&] {
                                 return fmt::format(
                                     "{}: the file ends at {}; it had {} bytes when it was opened",
                                     name_, offset, size_);
                               })
            .at(static_cast<uint64_t>(offset));
      out = out.subspan(static_cast<size_t>(got));
      offset += got;
    }
    return {};
  }

 private:
  int fd_;
  int64_t size_;
  std::string name_;
};

class MemorySource final : public ByteSource {
 public:
  MemorySource(std::string name, std::vector<std::byte> bytes) noexcept
      : name_(std::move(name)), bytes_(std::move(bytes)) {}

  int64_t size() const noexcept override { return static_cast<int64_t>(bytes_.size()); }
  const std::string& name() const noexcept override { return name_; }

  Status read(int64_t offset, std::span<std::byte> out) const noexcept override {
    if (!inside(size(), offset, out.size())) return beyond_end(*this, offset, out.size());
    if (!out.empty()) std::memcpy(out.data(), bytes_.data() + offset, out.size());
    return {};
  }

 private:
  std::string name_;
  std::vector<std::byte> bytes_;
};

Status cannot_open(const std::string& path, int error) {
  const Code code = error == ENOENT || error == ENOTDIR ? Code::kNotFound
                    : error == ENOMEM                   ? Code::kMemory
                                                        : Code::kIo;
  return Status(code,
                fmt::format("cannot open {}: {}", path, std::generic_category().message(error)))
      .with_errno(error);
}

Status not_regular(const std::string& path, mode_t mode) {
  const char* kind = S_ISDIR(mode)    ? "a directory"
                     : S_ISFIFO(mode) ? "a pipe"
                     : S_ISSOCK(mode) ? "a socket"
                                      : "a device";
  return Status(Code::kFormat, fmt::format("{} is {}, not a regular file", path, kind));
}

}  // namespace

Result<std::shared_ptr<ByteSource>> open_file(const std::string& path) {
  if (path.find('\0') != path.npos)
    return Status(Code::kInvalidArgument, "the file name contains a zero byte");
  // The kind is asked before opening, since opening a device can have effects, and again after,
  // since the name may mean something else by then.  O_NONBLOCK: a pipe must not stop us.
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return cannot_open(path, errno);
  if (!S_ISREG(info.st_mode)) return not_regular(path, info.st_mode);
  int fd;
  do {
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) return cannot_open(path, errno);
  if (::fstat(fd, &info) != 0) {
    const int error = errno;
    ::close(fd);
    return cannot_open(path, error);
  }
  if (!S_ISREG(info.st_mode)) {
    ::close(fd);
    return not_regular(path, info.st_mode);
  }
  try {
    return std::shared_ptr<ByteSource>(
        std::make_shared<FileSource>(fd, static_cast<int64_t>(info.st_size), path));
  } catch (...) {
    ::close(fd);
    throw;
  }
}

std::shared_ptr<ByteSource> memory_source(std::string name, std::vector<std::byte> bytes) {
  return std::make_shared<MemorySource>(std::move(name), std::move(bytes));
}

}  // namespace fathom::io
