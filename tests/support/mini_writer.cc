// GGUF and safetensors writers; contracts in mini_writer.h.
#include "support/mini_writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace fathom::test {
namespace {

constexpr int64_t kGgufAlignment = 32;
constexpr int64_t kChunkBytes = int64_t{8} << 20;

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what);
}

// GGUF's metadata types that we write.
enum GgufType : uint32_t { kU32 = 4, kI32 = 5, kF32 = 6, kBool = 7, kString = 8, kArray = 9 };

template <class T>
void append(std::vector<std::byte>& out, T value) {
  const auto* bytes = reinterpret_cast<const std::byte*>(&value);
  out.insert(out.end(), bytes, bytes + sizeof value);
}

void append_text(std::vector<std::byte>& out, std::string_view text) {
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  out.insert(out.end(), bytes, bytes + text.size());
}

void append_string(std::vector<std::byte>& out, std::string_view text) {
  append<uint64_t>(out, text.size());
  append_text(out, text);
}

int64_t padding(int64_t size, int64_t alignment) {
  return (alignment - size % alignment) % alignment;
}

// Writes the data of one tensor in chunks of whole blocks.
void write_data(ByteSink& sink, const TensorSpec& tensor, const TensorBytes& data,
                std::vector<std::byte>& buffer) {
  const int64_t total = tensor.bytes();
  if (!data) return sink.skip(total);
  const int64_t unit = std::max<int64_t>(dtype_info(tensor.dtype).block_bytes, 64);
  const int64_t chunk = kChunkBytes / unit * unit;
  for (int64_t offset = 0; offset < total; offset += chunk) {
    const int64_t size = std::min(chunk, total - offset);
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
    const std::span<std::byte> out(buffer.data(), static_cast<size_t>(size));
    data(tensor, offset, out);
    sink.write(out);
  }
}

}  // namespace

int64_t TensorSpec::elements() const {
  int64_t n = 1;
  for (const int64_t dim : shape) n *= dim;
  return n;
}

int64_t TensorSpec::bytes() const {
  if (cols() % dtype_info(dtype).block_elements != 0) {
    fail(fmt::format("{}: rows of {} values do not fit {}", name, cols(), dtype_info(dtype).name));
  }
  return row_bytes(dtype, elements());
}

void MemorySink::write(std::span<const std::byte> bytes) {
  bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
}

void MemorySink::skip(int64_t n_bytes) {
  bytes_.resize(bytes_.size() + static_cast<size_t>(n_bytes));
}

FileSink::FileSink(const std::string& path)
    : path_(path), fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)) {
  if (fd_ < 0) fail(fmt::format("{}: {}", path_, std::strerror(errno)));
}

FileSink::~FileSink() {
  if (fd_ >= 0) ::close(fd_);
}

void FileSink::write(std::span<const std::byte> bytes) {
  size_ += static_cast<int64_t>(bytes.size());
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail(fmt::format("{}: {}", path_, std::strerror(errno)));
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void FileSink::skip(int64_t n_bytes) {
  size_ += n_bytes;
  if (::lseek(fd_, size_, SEEK_SET) != size_) {
    fail(fmt::format("{}: {}", path_, std::strerror(errno)));
  }
}

void FileSink::close() {
  // A hole at the end exists only after the size is set.
  const bool good = ::ftruncate(fd_, size_) == 0;
  const int error = errno;
  const bool closed = ::close(std::exchange(fd_, -1)) == 0;
  if (!good || !closed) fail(fmt::format("{}: {}", path_, std::strerror(good ? errno : error)));
}

uint32_t gguf_type_number(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 0;
    case DType::kF16:
      return 1;
    case DType::kQ4_0:
      return 2;
    case DType::kQ4_1:
      return 3;
    case DType::kQ5_0:
      return 6;
    case DType::kQ5_1:
      return 7;
    case DType::kQ8_0:
      return 8;
    case DType::kQ8_1:
      return 9;
    case DType::kQ2_K:
      return 10;
    case DType::kQ3_K:
      return 11;
    case DType::kQ4_K:
      return 12;
    case DType::kQ5_K:
      return 13;
    case DType::kQ6_K:
      return 14;
    case DType::kQ8_K:
      return 15;
    case DType::kIQ2_XXS:
      return 16;
    case DType::kIQ2_XS:
      return 17;
    case DType::kIQ3_XXS:
      return 18;
    case DType::kIQ1_S:
      return 19;
    case DType::kIQ4_NL:
      return 20;
    case DType::kIQ3_S:
      return 21;
    case DType::kIQ2_S:
      return 22;
    case DType::kIQ4_XS:
      return 23;
    case DType::kI8:
      return 24;
    case DType::kI16:
      return 25;
    case DType::kI32:
      return 26;
    case DType::kI64:
      return 27;
    case DType::kF64:
      return 28;
    case DType::kIQ1_M:
      return 29;
    case DType::kBF16:
      return 30;
    case DType::kTQ1_0:
      return 34;
    case DType::kTQ2_0:
      return 35;
    case DType::kMXFP4:
      return 39;
    case DType::kF8E4M3:
      break;
  }
  fail(fmt::format("GGUF has no type {}", dtype_info(dtype).name));
}

void GgufWriter::add_key(std::string_view key, uint32_t type) {
  append_string(keys_, key);
  append(keys_, type);
  ++n_keys_;
}

void GgufWriter::set_u32(std::string_view key, uint32_t value) {
  add_key(key, kU32);
  append(keys_, value);
}

void GgufWriter::set_f32(std::string_view key, float value) {
  add_key(key, kF32);
  append(keys_, value);
}

void GgufWriter::set_bool(std::string_view key, bool value) {
  add_key(key, kBool);
  append<uint8_t>(keys_, value ? 1 : 0);
}

void GgufWriter::set_string(std::string_view key, std::string_view value) {
  add_key(key, kString);
  append_string(keys_, value);
}

void GgufWriter::set_strings(std::string_view key, std::span<const std::string> values) {
  add_key(key, kArray);
  append<uint32_t>(keys_, kString);
  append<uint64_t>(keys_, values.size());
  for (const std::string& value : values) append_string(keys_, value);
}

void GgufWriter::set_i32s(std::string_view key, std::span<const int32_t> values) {
  add_key(key, kArray);
  append<uint32_t>(keys_, kI32);
  append<uint64_t>(keys_, values.size());
  for (const int32_t value : values) append(keys_, value);
}

void GgufWriter::write(ByteSink& sink, std::span<const TensorSpec> tensors,
                       const TensorBytes& data) const {
  std::vector<std::byte> header;
  append_text(header, "GGUF");
  append<uint32_t>(header, 3);
  append<uint64_t>(header, tensors.size());
  append<uint64_t>(header, n_keys_);
  header.insert(header.end(), keys_.begin(), keys_.end());
  int64_t offset = 0;
  for (const TensorSpec& tensor : tensors) {
    append_string(header, tensor.name);
    append(header, static_cast<uint32_t>(tensor.shape.size()));
    for (auto dim = tensor.shape.rbegin(); dim != tensor.shape.rend(); ++dim) {
      append(header, static_cast<uint64_t>(*dim));
    }
    append(header, gguf_type_number(tensor.dtype));
    append(header, static_cast<uint64_t>(offset));
    offset += tensor.bytes() + padding(tensor.bytes(), kGgufAlignment);
  }
  const int64_t header_bytes = static_cast<int64_t>(header.size());
  header.resize(header.size() + static_cast<size_t>(padding(header_bytes, kGgufAlignment)));
  sink.write(header);
  std::vector<std::byte> buffer;
  for (const TensorSpec& tensor : tensors) {
    write_data(sink, tensor, data, buffer);
    sink.skip(padding(tensor.bytes(), kGgufAlignment));
  }
}

void write_safetensors(ByteSink& sink, std::span<const TensorSpec> tensors,
                       const TensorBytes& data) {
  std::string header = "{";
  int64_t offset = 0;
  for (const TensorSpec& tensor : tensors) {
    if (dtype_info(tensor.dtype).block_elements != 1) {
      fail(fmt::format("safetensors has no type {}", dtype_info(tensor.dtype).name));
    }
    const int64_t end = offset + tensor.bytes();
    header += fmt::format(R"({}"{}":{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                          offset == 0 ? "" : ",", tensor.name, dtype_info(tensor.dtype).name,
                          fmt::join(tensor.shape, ","), offset, end);
    offset = end;
  }
  header += '}';
  header.append(static_cast<size_t>(padding(static_cast<int64_t>(header.size()), 8)), ' ');
  const auto header_bytes = static_cast<uint64_t>(header.size());
  sink.write(std::as_bytes(std::span(&header_bytes, 1)));
  sink.write(std::as_bytes(std::span(header)));
  std::vector<std::byte> buffer;
  for (const TensorSpec& tensor : tensors) write_data(sink, tensor, data, buffer);
}

}  // namespace fathom::test
