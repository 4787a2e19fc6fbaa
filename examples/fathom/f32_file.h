// Files of raw little-endian float32 values.  Written in pieces beside the final name and renamed
// when whole, so that a failure leaves an older file as it was; read in pieces.
#pragma once

#include <cstdio>
#include <span>
#include <string>

#include "fathom/status.hpp"

namespace cli {

class F32File {
 public:
  // Leaves with kExitIo when the file cannot be made.
  explicit F32File(std::string path);
  ~F32File();  // without close(): removes what was written
  F32File(const F32File&) = delete;
  F32File& operator=(const F32File&) = delete;

  // False after a failed write: for callbacks of the library, which must not throw.
  bool append(std::span<const float> values) noexcept;
  // Leaves with kExitIo when not all could be written.
  void close();
  int64_t n_values() const noexcept { return n_values_; }
  bool failed() const noexcept { return error_ != 0; }

 private:
  std::string path_, written_;
  std::FILE* file_ = nullptr;
  int64_t n_values_ = 0;
  int error_ = 0;
};

class F32Reader {
 public:
  // Leaves with kExitIo when the file cannot be read, with kExitUsage when it does not hold exactly
  // `n_values` values.
  F32Reader(std::string path, int64_t n_values);
  ~F32Reader();
  F32Reader(const F32Reader&) = delete;
  F32Reader& operator=(const F32Reader&) = delete;

  // The next values.  False after a failed read: for callbacks of the library.
  bool next(std::span<float> out) noexcept;
  // Leaves with kExitIo when a read failed.
  void check() const;

 private:
  std::string path_;
  std::FILE* file_ = nullptr;
  int error_ = 0;
};

}  // namespace cli
