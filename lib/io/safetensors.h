// One safetensors file: the header as a list of tensors.  Folders with config.json, index and
// shards: safetensors.cc.
#pragma once

#include <string_view>
#include <vector>

#include "fathom/status.hpp"
#include "hash128.h"
#include "json.h"
#include "tensor_file.h"

namespace fathom::io {

// Reads and checks the header of `source`; appends its tensors, marked with `source_index`, and
// feeds its bytes to `hash`.  Format: https://github.com/huggingface/safetensors.  Errors as
// TensorFile::open, the message begins with the source's name.
Status read_safetensors_header(const ByteSource& source, int source_index, Hash128& hash,
                               std::vector<TensorInfo>* tensors);

// model.safetensors.index.json: which shard has which tensor.
struct ShardIndex {
  std::vector<std::string> files;  // plain file names, sorted, unique
  struct Entry {
    std::string name;
    int file;
  };
  std::vector<Entry> tensors;  // sorted by name, unique
};
// Errors: kFormat, also for a shard name that leaves the folder.
Result<ShardIndex> parse_shard_index(std::string_view text);

}  // namespace fathom::io
