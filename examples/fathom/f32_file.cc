#include "f32_file.h"

#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include <fmt/format.h>

#include "exit.h"

namespace cli {

static_assert(std::endian::native == std::endian::little);

F32File::F32File(std::string path) : path_(std::move(path)), written_(path_) {
  // Pipes and devices are written directly.
  std::error_code ignored;
  const auto type = std::filesystem::status(path_, ignored).type();
  if (type == std::filesystem::file_type::not_found || type == std::filesystem::file_type::regular)
    written_ += ".part";
  file_ = std::fopen(written_.c_str(), "wb");
  if (file_ == nullptr) fail(kExitIo, fmt::format("{}: {}", path_, std::strerror(errno)));
}

F32File::~F32File() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  if (written_ != path_) std::remove(written_.c_str());
}

bool F32File::append(std::span<const float> values) noexcept {
  if (std::fwrite(values.data(), sizeof(float), values.size(), file_) != values.size()) {
    error_ = errno;
    return false;
  }
  n_values_ += static_cast<int64_t>(values.size());
  return true;
}

void F32File::close() {
  if (error_ == 0 && std::fflush(file_) != 0) error_ = errno;
  if (error_ != 0) fail(kExitIo, fmt::format("{}: {}", path_, std::strerror(error_)));
  if (std::fclose(std::exchange(file_, nullptr)) != 0 ||
      (written_ != path_ && std::rename(written_.c_str(), path_.c_str()) != 0))
    fail(kExitIo, fmt::format("{}: {}", path_, std::strerror(errno)));
}

F32Reader::F32Reader(std::string path, int64_t n_values) : path_(std::move(path)) {
  file_ = std::fopen(path_.c_str(), "rb");
  if (file_ == nullptr) fail(kExitIo, fmt::format("{}: {}", path_, std::strerror(errno)));
  std::error_code error;
  const auto bytes = std::filesystem::file_size(path_, error);
  const auto wanted = static_cast<uintmax_t>(n_values) * sizeof(float);
  if (!error && bytes == wanted) return;
  std::fclose(file_);
  if (error) fail(kExitIo, fmt::format("{}: {}", path_, error.message()));
  usage_error(fmt::format("{} has {} bytes; {} float32 values are {} bytes", path_, bytes, n_values,
                          wanted));
}

F32Reader::~F32Reader() {
  std::fclose(file_);
}

bool F32Reader::next(std::span<float> out) noexcept {
  if (std::fread(out.data(), sizeof(float), out.size(), file_) == out.size()) return true;
  error_ = std::ferror(file_) != 0 ? errno : EIO;
  return false;
}

void F32Reader::check() const {
  if (error_ != 0) fail(kExitIo, fmt::format("{}: {}", path_, std::strerror(error_)));
}

}  // namespace cli
