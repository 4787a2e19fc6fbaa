// The text of a model.safetensors.index.json.  No shard may leave the folder.
#include <string_view>

#include "lib/io/safetensors.h"
#include "tensor_file_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fathom;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const Result<io::ShardIndex> index = io::parse_shard_index(text);
  if (!index.ok()) {
    test::require(!index.status().message().empty());
    return 0;
  }
  test::require(!index->tensors.empty());
  for (const std::string& file : index->files)
    test::require(file.find('/') == file.npos && file.ends_with(".safetensors") && file[0] != '.');
  for (size_t i = 0; i < index->tensors.size(); ++i) {
    test::require(i == 0 || index->tensors[i - 1].name < index->tensors[i].name);
    test::require(static_cast<size_t>(index->tensors[i].file) < index->files.size());
  }
  return 0;
}
