// SpillFile: a file without a name that holds what memory has no room for.  It goes when its
// descriptor does, so neither a crash nor kill -9 leaves it behind.  Readable by nobody else.
//
//   Linux with O_TMPFILE     it never has a name
//   other file systems       created as .fathom-spill.<pid>.<number> under a lock and unlinked at
//                            once; a process killed between the two leaves an unlocked empty file,
//                            which the next create() in that folder removes
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "fathom/status.hpp"

namespace fathom::io {

// Whether files of a folder take memory (tmpfs, ramfs).  False for one that is not there.  What
// lies under an overlay cannot be told.
bool lies_in_memory(const std::string& folder) noexcept;
// The refusal: kConfig about kv.spill_folder.
Status refuse_memory(const std::string& folder);

class SpillFile {
 public:
  enum class Naming : uint8_t { kNameless, kUnlinked };
  // `naming` kUnlinked takes the second way at once, for tests.  Errors: kConfig (the folder lies
  // in memory, and that is not allowed), kNotFound (no such folder), kIo with errno.
  static Result<SpillFile> create(const std::string& folder, bool allow_memory = false,
                                  Naming naming = Naming::kNameless);
  SpillFile() noexcept = default;  // none: no call but is_open() may be made
  SpillFile(SpillFile&& other) noexcept;
  SpillFile& operator=(SpillFile&& other) noexcept;
  ~SpillFile();

  bool is_open() const noexcept { return fd_ >= 0; }
  // Whole or an error: kIo with errno (ENOSPC when the disk is full); then the bytes there are
  // undefined.
  Status write(int64_t offset, std::span<const std::byte> bytes) const noexcept;
  // Errors: kIo; also when the file ends before.
  Status read(int64_t offset, std::span<std::byte> bytes) const noexcept;
  // Says that these bytes will be read soon: the system may fetch them meanwhile.
  void read_ahead(int64_t offset, int64_t bytes) const noexcept;
  // Writes everything to the disk and asks the system to hold none of it in memory.  Errors: kIo.
  Status leave_cache() const noexcept;
  // Gives the disk blocks back where the file system can; the bytes are undefined afterwards.
  void discard(int64_t offset, int64_t bytes) const noexcept;
  const std::string& folder() const noexcept { return folder_; }

 private:
  Status failed(const char* what, int64_t offset, int error) const noexcept;

  std::string folder_;
  int fd_ = -1;
};

}  // namespace fathom::io
