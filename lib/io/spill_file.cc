#include "spill_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

namespace fathom::io {
namespace {

constexpr std::string_view kPrefix = ".fathom-spill.";
constexpr size_t kMaxTransfer = size_t{1} << 30;  // Linux moves at most 2 GiB - 4 KiB at once

template <class Call>
auto retried(Call&& call) noexcept {
  for (;;)
    if (const auto answer = call(); answer >= 0 || errno != EINTR) return answer;
}

// Files of killed processes: nobody holds their lock.
void remove_left_overs(const std::string& folder) noexcept {
  try {
    std::error_code error;
    for (std::filesystem::directory_iterator it(folder, error), end; !error && it != end;
         it.increment(error)) {
      if (!it->path().filename().string().starts_with(kPrefix)) continue;
      const int fd = ::open(it->path().c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
      if (fd < 0) continue;
      struct stat info {};
      if (::fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_uid == ::geteuid() &&
          ::flock(fd, LOCK_EX | LOCK_NB) == 0)
        ::unlink(it->path().c_str());
      ::close(fd);
    }
  } catch (...) {  // no memory for a name: left for the next time
  }
}

int create_unlinked(const std::string& folder) {
  static std::atomic<uint64_t> counter{0};
  constexpr int kAttempts = 16;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const std::string path = fmt::format("{}/{}{}.{}", folder, kPrefix, ::getpid(),
                                         counter.fetch_add(1, std::memory_order_relaxed));
    const int fd = retried([&] {
      return ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    });
    if (fd < 0 && errno == EEXIST) continue;
    if (fd < 0) return fd;
    (void)retried([&] { return ::flock(fd, LOCK_EX | LOCK_NB); });
    ::unlink(path.c_str());  // whoever took it for a left-over has done so already
    return fd;
  }
  errno = EEXIST;
  return -1;
}

}  // namespace

bool lies_in_memory(const std::string& folder) noexcept {
  struct statfs info {};
  if (retried([&] { return ::statfs(folder.c_str(), &info); }) != 0) return false;
  const auto type = static_cast<uint64_t>(info.f_type);
  return type == TMPFS_MAGIC || type == RAMFS_MAGIC || type == HUGETLBFS_MAGIC;
}

Status refuse_memory(const std::string& folder) {
  return Status(
             Code::kConfig,
             fmt::format("kv.spill_folder = {}: it lies in memory (tmpfs), so that pages moved "
                         "there would take what they are to free; name a folder on a disk, or set "
                         "kv.spill_tmpfs=allow",
                         folder))
      .about("kv.spill_folder");
}

SpillFile::SpillFile(SpillFile&& other) noexcept
    : folder_(std::move(other.folder_)), fd_(std::exchange(other.fd_, -1)) {}

SpillFile& SpillFile::operator=(SpillFile&& other) noexcept {
  std::swap(folder_, other.folder_);
  std::swap(fd_, other.fd_);
  return *this;
}

SpillFile::~SpillFile() {
  if (fd_ >= 0) ::close(fd_);
}

Result<SpillFile> SpillFile::create(const std::string& folder, bool allow_memory, Naming naming) {
  if (!allow_memory && lies_in_memory(folder)) return refuse_memory(folder);
  SpillFile file;
  file.folder_ = folder;
  remove_left_overs(folder);
  if (naming == Naming::kNameless)
    file.fd_ = retried(
        [&] { return ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600); });
  // EISDIR: a kernel without O_TMPFILE; EOPNOTSUPP: a file system without it.
  if (naming == Naming::kUnlinked ||
      (file.fd_ < 0 && (errno == EISDIR || errno == EOPNOTSUPP || errno == EINVAL)))
    file.fd_ = create_unlinked(folder);
  if (file.fd_ >= 0) return file;
  const int error = errno;
  return Status(error == ENOENT || error == ENOTDIR ? Code::kNotFound : Code::kIo,
                fmt::format("kv.spill_folder = {}: no file can be made there: {}", folder,
                            std::generic_category().message(error)))
      .with_errno(error)
      .about("kv.spill_folder");
}

Status SpillFile::write(int64_t offset, std::span<const std::byte> bytes) const noexcept {
  while (!bytes.empty()) {
    const ssize_t wrote = retried(
        [&] { return ::pwrite(fd_, bytes.data(), std::min(bytes.size(), kMaxTransfer), offset); });
    if (wrote < 0) return failed("writing", offset, errno);
    if (wrote == 0) return failed("writing", offset, ENOSPC);
    bytes = bytes.subspan(static_cast<size_t>(wrote));
    offset += wrote;
  }
  return {};
}

Status SpillFile::read(int64_t offset, std::span<std::byte> bytes) const noexcept {
  while (!bytes.empty()) {
    const ssize_t got = retried(
        [&] { return ::pread(fd_, bytes.data(), std::min(bytes.size(), kMaxTransfer), offset); });
    if (got < 0) return failed("reading", offset, errno);
    if (got == 0) return failed("reading", offset, EIO);
    bytes = bytes.subspan(static_cast<size_t>(got));
    offset += got;
  }
  return {};
}

void SpillFile::read_ahead(int64_t offset, int64_t bytes) const noexcept {
  (void)::posix_fadvise(fd_, offset, bytes, POSIX_FADV_WILLNEED);
}

Status SpillFile::leave_cache() const noexcept {
  if (retried([&] { return ::fdatasync(fd_); }) < 0) return failed("flushing", 0, errno);
  (void)::posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
  return {};
}

void SpillFile::discard(int64_t offset, int64_t bytes) const noexcept {
  (void)::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
}

Status SpillFile::failed(const char* what, int64_t offset, int error) const noexcept {
  Status status(Code::kIo, "");
  try {
    status =
        Status(Code::kIo, fmt::format("the spill file in {}: {} failed at byte {}: {}", folder_,
                                      what, offset, std::generic_category().message(error)));
  } catch (...) {  // keep the code
  }
  return std::move(status).with_errno(error).at(static_cast<uint64_t>(offset));
}

}  // namespace fathom::io
