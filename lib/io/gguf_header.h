// The header of one GGUF file, read and checked but not yet understood: typed metadata, the arrays
// of the tokenizer, tensor places.  What the values mean: gguf.cc and model_config_gguf.cc.
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/status.hpp"
#include "hash128.h"
#include "tensor_file.h"

namespace fathom::io {

enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64,
};
inline constexpr uint32_t kGgufTypeCount = 13;
const char* gguf_type_name(GgufType type) noexcept;

struct GgufEntry {
  std::string key;
  GgufType type = GgufType::kU8;
  GgufType element = GgufType::kU8;  // of an array
  uint64_t bits = 0;    // integers: sign-extended; bool: 0 or 1; arrays: the number of elements
  double real = 0;      // kF32, kF64
  std::string text;     // kString
  uint64_t offset = 0;  // of the key in the file

  std::string to_text() const;  // for listings; arrays as "[n values]"
};

// The metadata in file order, with unique keys.
class GgufMetadata {
 public:
  std::vector<GgufEntry> entries;

  // Builds the index that find() needs; kFormat when a key appears twice.
  Status index();
  const GgufEntry* find(std::string_view key) const noexcept;

  // Typed values.  Integers of any width pass as integers and as numbers.  Errors: kFormat, naming
  // key, value and bound.  `_or`: the fallback stands for an absent key.
  Result<int64_t> integer(std::string_view key, int64_t min, int64_t max) const;
  Result<int64_t> integer_or(std::string_view key, int64_t fallback, int64_t min,
                             int64_t max) const;
  Result<double> number(std::string_view key, double min, double max) const;
  Result<double> number_or(std::string_view key, double fallback, double min, double max) const;
  Result<bool> boolean_or(std::string_view key, bool fallback) const;
  Result<std::string_view> string(std::string_view key) const;
  Result<std::string_view> string_or(std::string_view key, std::string_view fallback) const;

 private:
  std::vector<uint32_t> by_key_;
};

struct GgufHeader {
  GgufMetadata metadata;
  TokenizerSource tokenizer;        // the arrays and strings, as the file has them
  std::vector<TensorInfo> tensors;  // file order; offsets from the start of the file
};

// Reads the header of `source` and feeds its bytes to `hash`.  `source_index` goes into the
// tensors.  Errors as TensorFile::open; the message begins with the source's name.
Result<GgufHeader> read_gguf_header(const ByteSource& source, int source_index, Hash128& hash);

}  // namespace fathom::io
