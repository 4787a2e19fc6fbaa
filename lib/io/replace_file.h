// ReplaceFile: writes a file beside its place and moves it there when it is whole, so that a crash
// at any moment, kill -9 included, leaves the old file or the new one.
//
//   <path>.tmp.<pid>.<number>   written under an exclusive lock, synced, renamed to <path>
//
// The lock is the sign of life: what a killed writer left is a file that nobody has locked, and
// the next writer to the same path removes it.  (A process number would lie: it is used again, and
// means nothing to another machine or container that shares the folder.)
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <span>
#include <string>

#include "fathom/status.hpp"

namespace fathom::io {

// The system calls that change files; each answers as the call of that name.  Tests put failures
// and deaths in between.
class FileCalls {
 public:
  virtual ~FileCalls() = default;
  virtual int open_at(int dir, const char* name, int flags, mode_t mode) noexcept;
  virtual int lock(int fd) noexcept;  // flock, exclusive, without waiting
  virtual ssize_t write(int fd, const void* data, size_t bytes) noexcept;
  virtual int sync(int fd) noexcept;  // fsync
  virtual int rename_at(int dir, const char* from, const char* to) noexcept;
  virtual int unlink_at(int dir, const char* name) noexcept;
};

class ReplaceFile {
 public:
  // Creates the file beside `path`, readable by this user alone, and removes what dead writers to
  // this path left.  `calls` must outlive the result.  Errors: kInvalidArgument (the path is empty,
  // ends with '/', or what stands there is no regular file: links are not followed and devices not
  // replaced), kNotFound (no such folder), kIo.
  static Result<ReplaceFile> create(const std::string& path, FileCalls& calls);
  ReplaceFile(ReplaceFile&& other) noexcept;
  ReplaceFile& operator=(ReplaceFile&&) = delete;
  // Without commit(): removes the file beside; what stood at the path is as it was.
  ~ReplaceFile();

  // Appends.  Errors: kIo with errno and the offset.
  Status write(std::span<const std::byte> bytes) noexcept;
  // Makes it the file at `path`, on disk when this returns.  Errors: kIo; then the old file stands
  // as before, unless the message says that the new one is in place but may not survive a power
  // cut.
  Status commit() noexcept;

 private:
  ReplaceFile(FileCalls& calls, const std::string& path);
  Status open_folder();
  Status check_target() const;
  void remove_left_overs() noexcept;
  Status create_temporary();
  Status failed(const char* what, int error) const noexcept;

  FileCalls* calls_;
  std::string path_, folder_, name_;  // path_ = folder_ / name_
  std::string temporary_;             // name in the folder; "" when there is none
  int folder_fd_ = -1, fd_ = -1;
  uint64_t offset_ = 0;
};

}  // namespace fathom::io
