// TensorFile: the neutral view that both weight formats yield - named tensors with a place in a
// file, and the facts about model and tokenizer - read with pread, never mapped, so that a file
// that shrinks under us is an error and not a signal.
//   GGUF: gguf.cc.  Hugging Face folder or single .safetensors: safetensors.cc.  A config.json
//   without weights: tensor_listing.cc.
// Shapes are row-major, outermost first (Hugging Face order; GGUF's ne reversed).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/model_config.hpp"
#include "fathom/status.hpp"
#include "fathom/tensor.hpp"

namespace fathom::io {

// Read-only random access to bytes: a file, or memory in tests and fuzz targets.
// Thread-safe.  read() fills all of `out` or fails with kIo / kFormat (beyond the end).
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  virtual int64_t size() const noexcept = 0;
  virtual const std::string& name() const noexcept = 0;  // for messages
  virtual Status read(int64_t offset, std::span<std::byte> out) const noexcept = 0;
};

// Regular files only (kFormat for a FIFO, a device, a directory); follows symbolic links.
Result<std::shared_ptr<ByteSource>> open_file(const std::string& path);
std::shared_ptr<ByteSource> memory_source(std::string name, std::vector<std::byte> bytes);

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  int n_dims = 0;                   // 1..4
  int64_t shape[4] = {1, 1, 1, 1};  // shape[0] is outermost; unused entries are 1
  int source = 0;                   // which of the TensorFile's sources
  int64_t offset = 0;               // of the first byte in that source
  int64_t bytes = 0;                // checked: offset + bytes <= size of the source

  int64_t cols() const noexcept { return shape[n_dims - 1]; }
  int64_t elements() const noexcept { return shape[0] * shape[1] * shape[2] * shape[3]; }
};

enum class FileFormat : uint8_t { kGguf, kSafetensors };

// Everything that a tokenizer is made from, exactly as the file has it, in flat arrays (a
// vocabulary of 128 K pieces is a handful of allocations).  Empty when the file has none.
struct TokenizerSource {
  std::string gguf_model, gguf_pre;  // tokenizer.ggml.model ("gpt2"), tokenizer.ggml.pre
  std::string pieces;                // all pieces one after another, byte-level alphabet as stored
  std::vector<uint32_t> piece_end;   // [n_pieces] end offset of each piece in `pieces`
  std::vector<int32_t> token_type;   // GGUF token_type: 1 normal 3 control 4 user 5 unused 6 byte
  std::string merges;                // all "left right" strings one after another
  std::vector<uint32_t> merge_end;
  int64_t bos_token_id = -1, eos_token_id = -1;
  bool add_bos_token = false, add_eos_token = false;
  std::string chat_template;     // text, only ever compared
  std::string json_path;         // Hugging Face: path of tokenizer.json (read by the tokenizer)
  std::string config_json_path;  // Hugging Face: tokenizer_config.json, or empty
};

class TensorFile {
 public:
  // A .gguf (the first of a split finds the others), a .safetensors, or a folder with config.json.
  // Reads headers, metadata and 4 KB of the weights.  Errors: kNotFound, kIo, kFormat (offset,
  // field), kVersion, kUnsupported (architecture, tensor type).
  static Result<TensorFile> open(const std::string& path);
  // One GGUF file from any source, not split; for tests and fuzzing.
  static Result<TensorFile> parse_gguf(std::shared_ptr<ByteSource> source);
  // One safetensors file from any source; no config (config() is empty).
  static Result<TensorFile> parse_safetensors(std::shared_ptr<ByteSource> source);

  FileFormat format() const noexcept { return format_; }
  const ModelConfig& config() const noexcept { return config_; }  // has_config() must be true
  bool has_config() const noexcept { return has_config_; }
  const TokenizerSource& tokenizer() const noexcept { return tokenizer_; }
  // All scalar and string metadata as text (GGUF keys, or the top-level keys of config.json), for
  // `inspect` and fathom_model_metadata.  Arrays appear as "[n values]".
  const std::vector<std::pair<std::string, std::string>>& metadata() const noexcept {
    return metadata_;
  }

  std::span<const TensorInfo> tensors() const noexcept { return tensors_; }  // sorted by name
  const TensorInfo* find(std::string_view name) const noexcept;              // null when absent
  // False for the tensors of a model of which only the configuration is there.
  bool has_weights() const noexcept { return !sources_.empty(); }
  // Bytes [offset, offset + out.size()) of a tensor.  Thread-safe.  Errors: kNotFound without
  // weights; kIo, kFormat.
  Status read(const TensorInfo& tensor, int64_t offset, std::span<std::byte> out) const noexcept;
  // All headers and sizes, and samples of a few tensors of a model, folded into 128 bits; names
  // the model in profiles and saved sessions.
  struct Fingerprint {
    uint64_t lo = 0, hi = 0;
  };
  Fingerprint fingerprint() const noexcept { return fingerprint_; }
  int64_t total_bytes() const noexcept;  // of all sources

 private:
  friend struct TensorFileBuilder;  // gguf.cc and safetensors.cc fill the members through it
  FileFormat format_ = FileFormat::kGguf;
  bool has_config_ = false;
  ModelConfig config_;
  TokenizerSource tokenizer_;
  std::vector<std::pair<std::string, std::string>> metadata_;
  std::vector<TensorInfo> tensors_;
  std::vector<std::shared_ptr<ByteSource>> sources_;
  Fingerprint fingerprint_;
};

}  // namespace fathom::io
