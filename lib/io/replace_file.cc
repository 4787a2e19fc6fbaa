// ReplaceFile.  All names are looked up relative to the open folder, so that a folder that is
// moved meanwhile does not split the temporary file from its place.
#include "replace_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <system_error>
#include <utility>

namespace fathom::io {

int FileCalls::open_at(int dir, const char* name, int flags, mode_t mode) noexcept {
  return ::openat(dir, name, flags, mode);
}
int FileCalls::lock(int fd) noexcept {
  return ::flock(fd, LOCK_EX | LOCK_NB);
}
ssize_t FileCalls::write(int fd, const void* data, size_t bytes) noexcept {
  return ::write(fd, data, bytes);
}
int FileCalls::sync(int fd) noexcept {
  return ::fsync(fd);
}
int FileCalls::rename_at(int dir, const char* from, const char* to) noexcept {
  return ::renameat(dir, from, dir, to);
}
int FileCalls::unlink_at(int dir, const char* name) noexcept {
  return ::unlinkat(dir, name, 0);
}

namespace {

constexpr const char* kInfix = ".tmp.";

template <class Call>
auto retried(Call&& call) noexcept {
  for (;;)
    if (const auto answer = call(); answer >= 0 || errno != EINTR) return answer;
}

// Tells the writers of one process apart, and those of one number in different containers.
uint64_t next_number() noexcept {
  static std::atomic<uint64_t> counter{0};
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count()) +
         counter.fetch_add(1, std::memory_order_relaxed);
}

// "<digits>.<digits>", what follows the infix in the names we make.
bool is_our_suffix(std::string_view text) noexcept {
  const size_t dot = text.find('.');
  const auto digits = [](std::string_view s) {
    return !s.empty() && s.find_first_not_of("0123456789") == s.npos;
  };
  return dot != text.npos && digits(text.substr(0, dot)) && digits(text.substr(dot + 1));
}

}  // namespace

ReplaceFile::ReplaceFile(FileCalls& calls, const std::string& path) : calls_(&calls), path_(path) {
  const size_t slash = path.rfind('/');
  folder_ = slash == path.npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  name_ = slash == path.npos ? path : path.substr(slash + 1);
}

ReplaceFile::ReplaceFile(ReplaceFile&& other) noexcept
    : calls_(other.calls_),
      path_(std::move(other.path_)),
      folder_(std::move(other.folder_)),
      name_(std::move(other.name_)),
      temporary_(std::exchange(other.temporary_, {})),
      folder_fd_(std::exchange(other.folder_fd_, -1)),
      fd_(std::exchange(other.fd_, -1)),
      offset_(other.offset_) {}

ReplaceFile::~ReplaceFile() {
  // Removed before the lock goes with the descriptor, so that nobody else sees it as left over.
  if (!temporary_.empty()) calls_->unlink_at(folder_fd_, temporary_.c_str());
  if (fd_ >= 0) ::close(fd_);
  if (folder_fd_ >= 0) ::close(folder_fd_);
}

Result<ReplaceFile> ReplaceFile::create(const std::string& path, FileCalls& calls) {
  if (path.find('\0') != path.npos)
    return Status(Code::kInvalidArgument, "the file name contains a zero byte");
  ReplaceFile file(calls, path);
  if (file.name_.empty() || file.name_ == "." || file.name_ == "..")
    return Status(Code::kInvalidArgument, fmt::format("\"{}\" is not the name of a file", path));
  FATHOM_TRY(file.open_folder());
  FATHOM_TRY(file.check_target());
  file.remove_left_overs();
  FATHOM_TRY(file.create_temporary());
  return file;
}

Status ReplaceFile::open_folder() {
  folder_fd_ = retried([&] {
    return calls_->open_at(AT_FDCWD, folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  });
  if (folder_fd_ >= 0) return {};
  const int error = errno;
  return Status(error == ENOENT || error == ENOTDIR ? Code::kNotFound : Code::kIo,
                fmt::format("cannot open the folder {}: {}", folder_,
                            std::generic_category().message(error)))
      .with_errno(error);
}

Status ReplaceFile::check_target() const {
  struct stat info {};
  if (::fstatat(folder_fd_, name_.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0)
    return errno == ENOENT ? Status() : failed("looking it up", errno);
  if (S_ISREG(info.st_mode)) return {};
  const char* kind = S_ISLNK(info.st_mode)   ? "a symbolic link; name the file itself"
                     : S_ISDIR(info.st_mode) ? "a folder"
                                             : "a device, pipe or socket";
  return Status(Code::kInvalidArgument, fmt::format("{} is {}", path_, kind));
}

// Whatever fails in here is left for the next time: the disk holds a file too many, no more.
void ReplaceFile::remove_left_overs() noexcept {
  try {
    const std::string prefix = name_ + kInfix;
    std::error_code error;
    for (std::filesystem::directory_iterator it(folder_, error), end; !error && it != end;
         it.increment(error)) {
      const std::string name = it->path().filename().string();
      if (name.compare(0, prefix.size(), prefix) != 0 ||
          !is_our_suffix(std::string_view(name).substr(prefix.size())))
        continue;
      const int fd = calls_->open_at(folder_fd_, name.c_str(),
                                     O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY, 0);
      if (fd < 0) continue;
      struct stat info {};
      // The owner of a locked file lives.
      if (::fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && calls_->lock(fd) == 0)
        calls_->unlink_at(folder_fd_, name.c_str());
      ::close(fd);
    }
  } catch (...) {  // no memory for a name
  }
}

Status ReplaceFile::create_temporary() {
  constexpr int kAttempts = 16;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    std::string name = fmt::format("{}{}{}.{}", name_, kInfix, ::getpid(), next_number());
    fd_ = retried([&] {
      return calls_->open_at(folder_fd_, name.c_str(),
                             O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    });
    if (fd_ < 0) {
      if (errno == EEXIST) continue;
      return failed("creating the file beside it", errno);
    }
    temporary_ = std::move(name);
    const bool locked = retried([&] { return calls_->lock(fd_); }) == 0;
    // On a file system without locks nobody can take our file for a left-over, nor ever remove one.
    const bool lockless = !locked && errno != EWOULDBLOCK;
    struct stat info {};
    if ((locked || lockless) && ::fstat(fd_, &info) == 0 && info.st_nlink > 0) return {};
    // Between our open and our lock another writer took it for a left-over: it removes the file.
    calls_->unlink_at(folder_fd_, std::exchange(temporary_, {}).c_str());
    ::close(std::exchange(fd_, -1));
  }
  return failed("creating the file beside it", EEXIST);
}

Status ReplaceFile::write(std::span<const std::byte> bytes) noexcept {
  constexpr size_t kMaxWrite = size_t{1} << 30;  // Linux transfers at most 2 GiB - 4 KiB at once
  while (!bytes.empty()) {
    const ssize_t wrote = retried(
        [&] { return calls_->write(fd_, bytes.data(), std::min(bytes.size(), kMaxWrite)); });
    if (wrote < 0) return failed("writing", errno);
    if (wrote == 0) return failed("writing", ENOSPC);
    bytes = bytes.subspan(static_cast<size_t>(wrote));
    offset_ += static_cast<uint64_t>(wrote);
  }
  return {};
}

Status ReplaceFile::commit() noexcept {
  if (retried([&] { return calls_->sync(fd_); }) != 0) return failed("syncing", errno);
  if (retried([&] { return calls_->rename_at(folder_fd_, temporary_.c_str(), name_.c_str()); }) !=
      0)
    return failed("moving the new file into place", errno);
  temporary_.clear();
  if (retried([&] { return calls_->sync(folder_fd_); }) == 0) return {};
  // File systems that cannot sync a folder say so with EINVAL; there is nothing more to do there.
  if (errno == EINVAL) return {};
  return failed("the new file is in place, but may not survive a power cut: syncing the folder",
                errno);
}

Status ReplaceFile::failed(const char* what, int error) const noexcept {
  Status status(Code::kIo, "");
  try {
    status = Status(Code::kIo, fmt::format("{}: {} failed at byte {}: {}", path_, what, offset_,
                                           std::generic_category().message(error)));
  } catch (...) {  // keep the code
  }
  return std::move(status).with_errno(error).at(offset_);
}

}  // namespace fathom::io
