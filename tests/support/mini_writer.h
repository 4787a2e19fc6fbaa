// Writers of GGUF and safetensors files for tests and benchmarks: the smallest code that makes
// valid files, written from the format specifications and sharing nothing with lib/io.
// Tensor bytes come from a callback, so a file may be larger than memory; without a callback the
// data is a hole, which makes a file of any size out of its header alone.
// Whatever goes wrong throws std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/tensor.hpp"

namespace fathom::test {

struct TensorSpec {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // outermost first, as in safetensors; GGUF stores the reverse

  int64_t elements() const;
  int64_t cols() const { return shape.back(); }
  int64_t bytes() const;
};

// Where a file goes: bytes in order, and holes that read as zeros.
class ByteSink {
 public:
  virtual ~ByteSink() = default;
  virtual void write(std::span<const std::byte> bytes) = 0;
  virtual void skip(int64_t n_bytes) = 0;
};

class MemorySink final : public ByteSink {
 public:
  void write(std::span<const std::byte> bytes) override;
  void skip(int64_t n_bytes) override;
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

// Creates or replaces `path`.  close() reports the last error; the destructor only closes.
class FileSink final : public ByteSink {
 public:
  explicit FileSink(const std::string& path);
  FileSink(const FileSink&) = delete;
  FileSink& operator=(const FileSink&) = delete;
  ~FileSink() override;
  void write(std::span<const std::byte> bytes) override;
  void skip(int64_t n_bytes) override;
  void close();

 private:
  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
};

// Fills `out` with bytes [offset, offset + out.size()) of the tensor.  Calls come in order; offset
// and size are whole blocks, and whole 64-byte words for plain types except at the tensor's end.
using TensorBytes =
    std::function<void(const TensorSpec& tensor, int64_t offset, std::span<std::byte> out)>;

// Number of a type in GGUF files.  Throws for types that GGUF does not have (F8_E4M3).
uint32_t gguf_type_number(DType);

// Metadata of a GGUF file (version 3, little-endian), written in the order of the calls.
class GgufWriter {
 public:
  void set_u32(std::string_view key, uint32_t value);
  void set_f32(std::string_view key, float value);
  void set_bool(std::string_view key, bool value);
  void set_string(std::string_view key, std::string_view value);
  void set_strings(std::string_view key, std::span<const std::string> values);
  void set_i32s(std::string_view key, std::span<const int32_t> values);

  // The whole file: header, metadata, tensor table, data aligned to 32 bytes.  Null `data`: holes.
  void write(ByteSink& sink, std::span<const TensorSpec> tensors, const TensorBytes& data) const;

 private:
  void add_key(std::string_view key, uint32_t type);

  std::vector<std::byte> keys_;
  uint64_t n_keys_ = 0;
};

// One safetensors file.  Types: F64, F32, F16, BF16, F8_E4M3, I64, I32, I16, I8.
void write_safetensors(ByteSink& sink, std::span<const TensorSpec> tensors,
                       const TensorBytes& data);

}  // namespace fathom::test
