// Random models in GGUF and Hugging Face form; contracts in random_model.h.
#include "support/random_model.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "support/model_metadata.h"
#include "support/random_weights.h"

namespace fathom::test {
namespace {

void write_text(const std::string& path, std::string_view text) {
  FileSink sink(path);
  sink.write(std::as_bytes(std::span(text)));
  sink.close();
}

}  // namespace

void write_gguf_model(ByteSink& sink, const ModelConfig& c, const GgufOptions& options) {
  TensorBytes data;
  if (options.contents == Contents::kBlocks) data = random_block_bytes(options.seed);
  if (options.contents == Contents::kValues) data = gguf_value_bytes(c, options.seed);
  const std::vector<TensorSpec> tensors = gguf_tensors(c, options.layout, options.type);
  gguf_metadata(c, options.layout, options.type).write(sink, tensors, data);
}

void write_gguf_model(const std::string& path, const ModelConfig& c, const GgufOptions& options) {
  FileSink sink(path);
  write_gguf_model(sink, c, options);
  sink.close();
}

std::vector<std::byte> gguf_model(const ModelConfig& c, const GgufOptions& options) {
  MemorySink sink;
  write_gguf_model(sink, c, options);
  return sink.take();
}
void write_hf_model(const std::string& folder, const ModelConfig& c, const HfOptions& options) {
  if (::mkdir(folder.c_str(), 0755) != 0 && errno != EEXIST) {
    throw std::runtime_error(fmt::format("{}: {}", folder, std::strerror(errno)));
  }
  const std::vector<TensorSpec> tensors = hf_tensors(c, options.dtype);
  TensorBytes data;
  if (options.contents == Contents::kBlocks) data = random_block_bytes(options.seed);
  if (options.contents == Contents::kValues) data = hf_value_bytes(options.seed);
  write_text(folder + "/config.json", hf_config_json(c, options.dtype));

  std::vector<std::span<const TensorSpec>> shards;
  int64_t total_bytes = 0, shard_bytes = 0;
  size_t begin = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (shard_bytes >= options.shard_bytes && !tensors[i].name.ends_with("_scale_inv")) {
      shards.push_back(std::span(tensors).subspan(begin, i - begin));
      begin = i;
      shard_bytes = 0;
    }
    shard_bytes += tensors[i].bytes();
    total_bytes += tensors[i].bytes();
  }
  shards.push_back(std::span(tensors).subspan(begin));

  nlohmann::json weight_map = nlohmann::json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name =
        shards.size() == 1 ? "model.safetensors"
                           : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    FileSink sink(folder + "/" + name);
    write_safetensors(sink, shards[i], data);
    sink.close();
    for (const TensorSpec& tensor : shards[i]) weight_map[tensor.name] = name;
  }
  if (shards.size() > 1) {
    const nlohmann::json index = {{"metadata", {{"total_size", total_bytes}}},
                                  {"weight_map", std::move(weight_map)}};
    write_text(folder + "/model.safetensors.index.json", index.dump(2));
  }
}

}  // namespace fathom::test
