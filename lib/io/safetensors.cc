// Hugging Face checkpoints -> TensorFile: a folder with config.json and either model.safetensors or
// shards and their index, or a single file.  The bytes of a file's header: safetensors_header.cc.
#include "safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "model_config.h"
#include "tensor_file_builder.h"
#include "text.h"

namespace fathom::io {
namespace {

constexpr int64_t kMaxConfigBytes = int64_t{16} << 20;
constexpr int64_t kMaxIndexBytes = int64_t{64} << 20;

std::string in_folder(const std::string& folder, std::string_view file) {
  return (std::filesystem::path(folder) / file).string();
}

// The last name of the folder's absolute path, or "" when there is none to be had.
std::string folder_name(const std::string& folder) {
  std::error_code error;
  std::filesystem::path path = std::filesystem::absolute(folder, error).lexically_normal();
  if (error) return "";
  if (!path.has_filename()) path = path.parent_path();  // it ended in a slash
  std::string name = path.filename().string();
  return is_plain_utf8(name) ? name : "";
}

std::string path_if_file(const std::string& folder, std::string_view file) {
  std::string path = in_folder(folder, file);
  std::error_code error;
  return std::filesystem::is_regular_file(path, error) ? path : "";
}

// Members of nested objects as "outer.inner".
void flatten(const std::string& prefix, JsonValue object,
             std::vector<std::pair<std::string, std::string>>* out) {
  for (const JsonMember member : object.members()) {
    std::string key = prefix;
    key += member.key;
    if (member.value.is_object())
      flatten(key + ".", member.value, out);
    else
      out->emplace_back(std::move(key), json_text(member.value));
  }
}

// Fits config and tensors together, and leaves out what is skipped.
Status join(ModelConfig config, bool tie_is_known, TensorFileBuilder* builder) {
  constexpr const char* kEmbeddings = "model.embed_tokens.weight";
  constexpr const char* kOutput = "lm_head.weight";
  const TensorInfo* embeddings = builder->find(kEmbeddings);
  if (embeddings == nullptr)
    return Status(Code::kFormat, fmt::format("tensor {} is missing", kEmbeddings))
        .about(kEmbeddings);
  FATHOM_TRY(check_vocabulary(embeddings, builder->find(kOutput), kOutput, tie_is_known, &config));
  builder->drop_extra_layers("model.layers.", config.num_hidden_layers, config.remarks);
  builder->set_config(std::move(config));
  return {};
}

Status read_shards(const std::string& folder, std::string_view index_text,
                   TensorFileBuilder* builder, std::vector<std::string>* remarks) {
  FATHOM_TRY_ASSIGN(const ShardIndex index, parse_shard_index(index_text));
  builder->hash.update(std::as_bytes(std::span(index_text)));
  const auto place_of = [&](const std::string& name) {
    const auto it = std::lower_bound(index.tensors.begin(), index.tensors.end(), name,
                                     [](const ShardIndex::Entry& entry, const std::string& wanted) {
                                       return entry.name < wanted;
                                     });
    return it != index.tensors.end() && it->name == name ? &*it : nullptr;
  };

  int64_t n_unlisted = 0;
  for (int file = 0; std::cmp_less(file, index.files.size()); ++file) {
    FATHOM_TRY_ASSIGN(std::shared_ptr<ByteSource> source,
                      open_file(in_folder(folder, index.files[static_cast<size_t>(file)])));
    std::vector<TensorInfo> tensors;
    FATHOM_TRY(read_safetensors_header(*source, file, builder->hash, &tensors));
    builder->sources().push_back(std::move(source));
    for (TensorInfo& tensor : tensors) {
      const ShardIndex::Entry* entry = place_of(tensor.name);
      if (entry == nullptr) {
        ++n_unlisted;
        continue;
      }
      if (entry->file != file)
        return Status(Code::kFormat,
                      fmt::format("tensor {} is in {}, the index says in {}", tensor.name,
                                  index.files[static_cast<size_t>(file)],
                                  index.files[static_cast<size_t>(entry->file)]))
            .about(tensor.name);
      builder->tensors().push_back(std::move(tensor));
    }
  }
  FATHOM_TRY(builder->sort_tensors());
  for (const ShardIndex::Entry& entry : index.tensors)
    if (builder->find(entry.name) == nullptr)
      return Status(Code::kFormat,
                    fmt::format("the index says that tensor {} is in {}, which does not have it",
                                entry.name, index.files[static_cast<size_t>(entry.file)]))
          .about(entry.name);
  if (n_unlisted > 0)
    remarks->push_back(
        fmt::format("{} tensors that the index does not list were left out.", n_unlisted));
  return {};
}

// A file name that stays in its folder.
bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name.ends_with(".safetensors") &&
         name.find_first_of("/\\:") == name.npos && name[0] != '.' && is_plain_name(name);
}

}  // namespace

Status read_config_json(const std::string& path, TensorFileBuilder* builder, ModelConfig* config,
                        bool* tie_is_known) {
  FATHOM_TRY_ASSIGN(const std::string text, read_text_file(path, kMaxConfigBytes));
  builder->hash.update(std::as_bytes(std::span(text)));
  Result<JsonDocument> document = JsonDocument::parse(text);
  if (!document.ok()) return std::move(document).status().in(path);
  Result<ModelConfig> parsed = config_from_json(*document);
  if (!parsed.ok()) return std::move(parsed).status().in(path);
  *config = std::move(parsed).value();
  *tie_is_known = !document->root().find("tie_word_embeddings").is_null_or_absent();
  flatten("", document->root(), &builder->metadata());

  // A file of another name was taken out of its folder: what lies beside it belongs to others.
  const std::filesystem::path file(path);
  const bool in_place = file.filename() == "config.json";
  const std::string folder = file.has_parent_path() ? file.parent_path().string() : ".";
  const std::string stem = file.stem().string();
  config->name = in_place ? folder_name(folder) : is_plain_utf8(stem) ? stem : "";
  TokenizerSource& tokenizer = builder->tokenizer();
  if (in_place) {
    tokenizer.json_path = path_if_file(folder, "tokenizer.json");
    tokenizer.config_json_path = path_if_file(folder, "tokenizer_config.json");
  }
  tokenizer.bos_token_id = config->bos_token_id;
  tokenizer.eos_token_id = config->eos_token_id;
  return {};
}

Result<ShardIndex> parse_shard_index(std::string_view text) {
  constexpr JsonLimits kLimits = {
      .max_bytes = kMaxIndexBytes, .max_depth = 8, .max_values = 2 * kMaxTensors + 1000};
  FATHOM_TRY_ASSIGN(const JsonDocument document, JsonDocument::parse(text, kLimits));
  const JsonValue map = document.root().find("weight_map");
  if (!map.is_object() || map.size() == 0)
    return Status(Code::kFormat, "weight_map must be an object with at least one tensor")
        .about("weight_map");
  if (map.size() > kMaxTensors)
    return Status(Code::kFormat, fmt::format("weight_map has {} tensors, at most {} are accepted",
                                             map.size(), kMaxTensors))
        .about("weight_map");

  ShardIndex index;
  for (const JsonMember member : map.members()) {
    if (member.key.size() > kMaxNameBytes || !is_plain_name(member.key))
      return Status(Code::kFormat, fmt::format("weight_map names a tensor {}, which is longer than "
                                               "{} bytes or has control characters",
                                               printable(member.key), kMaxNameBytes))
          .about("weight_map")
          .at(member.value.offset());
    const std::string_view file = member.value.string();
    if (!is_plain_file_name(file))
      return Status(Code::kFormat,
                    fmt::format("weight_map places tensor {} in \"{}\", which is no plain name of "
                                "a .safetensors file",
                                member.key, printable(json_text(member.value), 300)))
          .about("weight_map")
          .at(member.value.offset());
    index.files.emplace_back(file);
  }
  std::sort(index.files.begin(), index.files.end());
  index.files.erase(std::unique(index.files.begin(), index.files.end()), index.files.end());
  if (std::cmp_greater(index.files.size(), kMaxFiles))
    return Status(Code::kFormat, fmt::format("weight_map names {} files, at most {} are accepted",
                                             index.files.size(), kMaxFiles))
        .about("weight_map");
  index.tensors.reserve(static_cast<size_t>(map.size()));
  for (const JsonMember member : map.members()) {
    const auto file =
        std::lower_bound(index.files.begin(), index.files.end(), member.value.string());
    index.tensors.push_back(
        {std::string(member.key), static_cast<int>(file - index.files.begin())});
  }
  std::sort(index.tensors.begin(), index.tensors.end(),
            [](const ShardIndex::Entry& a, const ShardIndex::Entry& b) { return a.name < b.name; });
  return index;
}

Result<TensorFile> open_safetensors(std::shared_ptr<ByteSource> source, const std::string& path) {
  TensorFileBuilder builder(FileFormat::kSafetensors);
  FATHOM_TRY(read_safetensors_header(*source, 0, builder.hash, &builder.tensors()));
  builder.sources().push_back(std::move(source));
  FATHOM_TRY(builder.sort_tensors());
  // A config.json beside the file is about it only when it holds a model, and not, say, golden
  // values or an adapter.
  if (path.empty() || builder.find("model.embed_tokens.weight") == nullptr)
    return std::move(builder).finish();
  const std::string folder = std::filesystem::path(path).parent_path().string();
  if (path_if_file(folder, "config.json").empty()) return std::move(builder).finish();
  ModelConfig config;
  bool tie_is_known = false;
  FATHOM_TRY(read_config_json(in_folder(folder, "config.json"), &builder, &config, &tie_is_known));
  Status joined = join(std::move(config), tie_is_known, &builder);
  if (!joined.ok()) return std::move(joined).in(path);
  return std::move(builder).finish();
}

Result<TensorFile> open_folder(const std::string& path) {
  TensorFileBuilder builder(FileFormat::kSafetensors);
  ModelConfig config;
  bool tie_is_known = false;
  FATHOM_TRY(read_config_json(in_folder(path, "config.json"), &builder, &config, &tie_is_known));

  const std::string index_path = in_folder(path, "model.safetensors.index.json");
  Result<std::shared_ptr<ByteSource>> whole = open_file(in_folder(path, "model.safetensors"));
  if (whole.ok()) {
    FATHOM_TRY(read_safetensors_header(**whole, 0, builder.hash, &builder.tensors()));
    builder.sources().push_back(std::move(whole).value());
    FATHOM_TRY(builder.sort_tensors());
  } else if (whole.status().code() != Code::kNotFound) {
    return std::move(whole).status();
  } else {
    Result<std::string> index_text = read_text_file(index_path, kMaxIndexBytes);
    if (!index_text.ok() && index_text.status().code() == Code::kNotFound)
      return Status(Code::kNotFound, fmt::format("{} has neither model.safetensors nor "
                                                 "model.safetensors.index.json",
                                                 path));
    if (!index_text.ok()) return std::move(index_text).status();
    Status shards = read_shards(path, *index_text, &builder, &config.remarks);
    if (!shards.ok()) return std::move(shards).in(index_path);
  }
  Status joined = join(std::move(config), tie_is_known, &builder);
  if (!joined.ok()) return std::move(joined).in(path);
  return std::move(builder).finish();
}

}  // namespace fathom::io
