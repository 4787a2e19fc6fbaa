// GGUF files -> TensorFile: one file, or the parts of a split one, which must be complete and agree
// with each other.  The bytes of a header: gguf_header.cc.
#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "gguf_header.h"
#include "model_config.h"
#include "tensor_file_builder.h"
#include "text.h"

namespace fathom::io {
namespace {

// "-00001-of-00003.gguf": how the parts of a split are named, counted from 1.
std::string split_suffix(int64_t number, int64_t count) {
  return fmt::format("-{:05}-of-{:05}.gguf", number, count);
}

struct Split {
  int64_t no = 0, count = 1;
  int64_t n_tensors = -1;  // of all parts; -1: not told
};

Result<Split> read_split(const GgufMetadata& metadata) {
  Split split;
  if (metadata.find("split.count") == nullptr) return split;
  // 0 is what some tools write into a file that was merged again.
  FATHOM_TRY_ASSIGN(split.count, metadata.integer("split.count", 0, kMaxFiles));
  if (split.count == 0) split.count = 1;
  FATHOM_TRY_ASSIGN(split.no, metadata.integer("split.no", 0, split.count - 1));
  FATHOM_TRY_ASSIGN(split.n_tensors,
                    metadata.integer_or("split.tensors.count", -1, 0, kMaxTensors));
  return split;
}

Status append_tensors(std::vector<TensorInfo>&& part, std::vector<TensorInfo>* all) {
  if (std::cmp_greater(all->size() + part.size(), kMaxTensors))
    return Status(Code::kFormat, fmt::format("the parts have more than {} tensors", kMaxTensors));
  all->insert(all->end(), std::make_move_iterator(part.begin()),
              std::make_move_iterator(part.end()));
  return {};
}

// Opens and checks parts 2 to split.count.
Status read_other_parts(const std::string& path, const Split& split, TensorFileBuilder* builder) {
  if (path.empty())
    return Status(Code::kInvalidArgument,
                  fmt::format("this is one of {} parts of a split file; only a path can open it",
                              split.count))
        .about("split.count");
  const std::string own_suffix = split_suffix(split.no + 1, split.count);
  if (!path.ends_with(own_suffix))
    return Status(Code::kFormat, fmt::format("{} says it is part {} of {}, so its name must end "
                                             "in {}",
                                             path, split.no + 1, split.count, own_suffix))
        .about("split.no");
  const std::string stem = path.substr(0, path.size() - own_suffix.size());
  if (split.no != 0)
    return Status(Code::kInvalidArgument,
                  fmt::format("{} is part {} of {}; open the first, {}{}", path, split.no + 1,
                              split.count, stem, split_suffix(1, split.count)))
        .about("split.no");

  for (int64_t i = 1; i < split.count; ++i) {
    const std::string part_path = stem + split_suffix(i + 1, split.count);
    FATHOM_TRY_ASSIGN(std::shared_ptr<ByteSource> source, open_file(part_path));
    FATHOM_TRY_ASSIGN(GgufHeader header,
                      read_gguf_header(*source, static_cast<int>(i), builder->hash));
    FATHOM_TRY_ASSIGN(const Split other, read_split(header.metadata));
    if (other.no != i || other.count != split.count || other.n_tensors != split.n_tensors)
      return Status(Code::kFormat,
                    fmt::format("{} says split.no {}, split.count {}, split.tensors.count {}; the "
                                "first part asks for {}, {}, {}",
                                part_path, other.no, other.count, other.n_tensors, i, split.count,
                                split.n_tensors))
          .about("split.no");
    FATHOM_TRY(append_tensors(std::move(header.tensors), &builder->tensors()));
    builder->sources().push_back(std::move(source));
  }
  if (split.n_tensors >= 0 && std::cmp_not_equal(builder->tensors().size(), split.n_tensors))
    return Status(Code::kFormat, fmt::format("split.tensors.count is {}, the parts have {} tensors",
                                             split.n_tensors, builder->tensors().size()))
        .about("split.tensors.count");
  return {};
}

// Block layouts have changed once; files with the old ones have another number here.
Status check_quantization_version(const GgufMetadata& metadata,
                                  std::span<const TensorInfo> tensors) {
  constexpr const char* kKey = "general.quantization_version";
  constexpr int64_t kCurrent = 2;
  FATHOM_TRY_ASSIGN(const int64_t version, metadata.integer_or(kKey, kCurrent, 0, INT32_MAX));
  const bool quantized = std::any_of(tensors.begin(), tensors.end(), [](const TensorInfo& tensor) {
    return dtype_info(tensor.dtype).block_elements > 1;
  });
  if (version == kCurrent || !quantized) return {};
  return Status(Code::kUnsupported,
                fmt::format("{} is {}; only {} is supported", kKey, version, kCurrent))
      .about(kKey);
}

// Whether the file describes a model of ours.  A file without tensors is a vocabulary, whatever
// model it was taken from; a file of our architecture without a single key of it is a bag of
// tensors.  Both have no config.
Result<bool> describes_model(const GgufMetadata& metadata, std::span<const TensorInfo> tensors) {
  FATHOM_TRY_ASSIGN(const std::string_view architecture, metadata.string("general.architecture"));
  FATHOM_TRY_ASSIGN(const std::string_view kind, metadata.string_or("general.type", "model"));
  if (tensors.empty()) return false;
  if (architecture != "deepseek2")
    return Status(Code::kUnsupported, fmt::format("general.architecture is \"{}\"; only "
                                                  "\"deepseek2\" is supported",
                                                  printable(architecture)))
        .about("general.architecture");
  if (kind != "model")
    return Status(
               Code::kUnsupported,
               fmt::format("general.type is \"{}\"; only \"model\" is supported", printable(kind)))
        .about("general.type");
  return std::any_of(metadata.entries.begin(), metadata.entries.end(),
                     [](const GgufEntry& entry) { return entry.key.starts_with("deepseek2."); });
}

Status open_parts(std::shared_ptr<ByteSource> source, const std::string& path,
                  TensorFileBuilder* builder) {
  FATHOM_TRY_ASSIGN(GgufHeader header, read_gguf_header(*source, 0, builder->hash));
  builder->sources().push_back(std::move(source));
  FATHOM_TRY(append_tensors(std::move(header.tensors), &builder->tensors()));
  FATHOM_TRY_ASSIGN(const Split split, read_split(header.metadata));
  if (split.count > 1) FATHOM_TRY(read_other_parts(path, split, builder));

  FATHOM_TRY(builder->sort_tensors());
  FATHOM_TRY(check_no_overlap(builder->tensors()));
  FATHOM_TRY(check_quantization_version(header.metadata, builder->tensors()));
  FATHOM_TRY_ASSIGN(const bool is_model, describes_model(header.metadata, builder->tensors()));
  if (is_model) {
    FATHOM_TRY_ASSIGN(ModelConfig config, config_from_gguf(header.metadata, builder->tensors()));
    if (std::cmp_greater(header.tokenizer.piece_end.size(), config.vocab_size))
      return Status(Code::kFormat,
                    fmt::format("tokenizer.ggml.tokens has {} tokens, more than the {} rows of the "
                                "embeddings",
                                header.tokenizer.piece_end.size(), config.vocab_size))
          .about("tokenizer.ggml.tokens");
    builder->drop_extra_layers("blk.", config.num_hidden_layers, config.remarks);
    builder->set_config(std::move(config));
  }
  for (GgufEntry& entry : header.metadata.entries) {
    std::string text = entry.to_text();
    builder->metadata().emplace_back(std::move(entry.key), std::move(text));
  }
  builder->tokenizer() = std::move(header.tokenizer);
  return {};
}

}  // namespace

Result<TensorFile> open_gguf(std::shared_ptr<ByteSource> source, const std::string& path) {
  const std::string name = source->name();
  TensorFileBuilder builder(FileFormat::kGguf);
  Status status = open_parts(std::move(source), path, &builder);
  if (!status.ok()) {
    if (status.message().starts_with(name)) return status;  // it names a file already
    return std::move(status).in(name);
  }
  return std::move(builder).finish();
}

}  // namespace fathom::io
