// What the format readers fill before it becomes a TensorFile, and how they call each other.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hash128.h"
#include "tensor_file.h"

namespace fathom::io {

// Limits on what one model may declare.  The largest released model has 91,000 tensors.
inline constexpr int64_t kMaxTensors = int64_t{1} << 18;
inline constexpr int64_t kMaxFiles = 1024;  // splits or shards; each keeps a descriptor open
inline constexpr size_t kMaxNameBytes = 1023;

struct TensorFileBuilder {
  explicit TensorFileBuilder(FileFormat format) noexcept { file.format_ = format; }

  std::vector<TensorInfo>& tensors() noexcept { return file.tensors_; }
  std::vector<std::shared_ptr<ByteSource>>& sources() noexcept { return file.sources_; }
  std::vector<std::pair<std::string, std::string>>& metadata() noexcept { return file.metadata_; }
  TokenizerSource& tokenizer() noexcept { return file.tokenizer_; }
  void set_config(ModelConfig config) noexcept {
    file.config_ = std::move(config);
    file.has_config_ = true;
  }

  // Sorts the tensors by name; kFormat when two have the same.
  Status sort_tensors();
  const TensorInfo* find(std::string_view name) const noexcept { return file.find(name); }
  // Removes the tensors `prefix`N.* with N >= n_layers (layers for multi-token prediction) and
  // adds a remark that says so.  Keeps the order.
  void drop_extra_layers(std::string_view prefix, int64_t n_layers,
                         std::vector<std::string>& remarks);
  // Completes the fingerprint.  Errors: those of reading, from sampling the weights of a model.
  Result<TensorFile> finish() &&;

  TensorFile file;
  Hash128 hash;  // of every header, size, and some of the weights
};

// Every pair of tensors of one source is disjoint; kFormat names the first two that are not.
Status check_no_overlap(std::span<const TensorInfo> tensors);

// gguf.cc.  `path` names the other files of a split; empty: there are none.
Result<TensorFile> open_gguf(std::shared_ptr<ByteSource> source, const std::string& path);

// safetensors.cc: one file, with the config.json beside it when that is what it belongs to; and a
// folder.
Result<TensorFile> open_safetensors(std::shared_ptr<ByteSource> source, const std::string& path);
Result<TensorFile> open_folder(const std::string& path);
// A config.json (of any name): the configuration, all its values as metadata, and where the files
// of the tokenizer are.  `tie_is_known`: whether it says tie_word_embeddings.
Status read_config_json(const std::string& path, TensorFileBuilder* builder, ModelConfig* config,
                        bool* tie_is_known);

}  // namespace fathom::io
