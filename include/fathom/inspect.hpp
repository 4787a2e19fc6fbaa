// What is in a weight file, without an engine and without loading it: for tools that list, check
// or export tensors.
//
//   auto info = inspect_file("model.gguf");
//   for (const TensorEntry& t : info->tensors) print(t.name, dtype_info(t.dtype).name, t.bytes);
//
// Reads headers only, but for read_tensor_f32().  Thread-safe; nothing is kept between calls.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fathom/model_config.hpp"
#include "fathom/status.hpp"
#include "fathom/tensor.hpp"

namespace fathom {

struct TensorEntry {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // outermost first
  int64_t bytes = 0;           // in the file

  int64_t elements() const noexcept {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
};

struct FileInfo {
  std::string format;                               // "gguf" or "safetensors"
  int64_t total_bytes = 0;                          // of all files that belong to it
  uint64_t fingerprint_lo = 0, fingerprint_hi = 0;  // names the model: all headers and sizes
  bool has_config = false;  // false for a bare .safetensors: `config` is empty then
  ModelConfig config;
  std::vector<std::pair<std::string, std::string>> metadata;  // key, value as text
  std::vector<TensorEntry> tensors;                           // sorted by name
};

// A .gguf (of a split one the first), a .safetensors or a folder with config.json.
// Errors: kNotFound, kIo, kFormat (offset, field), kVersion, kUnsupported, kMemory.
Result<FileInfo> inspect_file(const std::string& path);

// Hands out the values of one tensor in order, dequantised, in pieces of at most 16,384.  Codes of
// type F8_E4M3 are multiplied by their block scales (<name>_scale_inv, one per 128 x 128 weights)
// when the file has them.  `on_piece` answers false to stop (kCallback).
// Errors: as inspect_file; kNotFound for a name that the file lacks; kUnsupported for integers.
Status read_tensor_f32(const std::string& path, std::string_view name,
                       const std::function<bool(std::span<const float> values)>& on_piece);

}  // namespace fathom
