// Safetensors files and folders that are right.  Those that are not:
// io_hostile_safetensors_test.cc.
#include <catch2/catch.hpp>

#include "io_raw_files.h"
#include "lib/io/safetensors.h"
#include "support/golden.h"

using namespace fathom;
using namespace fathom::io;
using namespace fathom::test;

namespace {

TensorFile opened(const std::string& path) {
  Result<TensorFile> file = TensorFile::open(path);
  INFO(file.status().message());
  REQUIRE(file.ok());
  return std::move(file).value();
}

std::vector<std::byte> read_tensor(const TensorFile& file, const TensorInfo& tensor) {
  std::vector<std::byte> bytes(static_cast<size_t>(tensor.bytes));
  REQUIRE(file.read(tensor, 0, bytes).ok());
  return bytes;
}

std::string metadata_of(const TensorFile& file, std::string_view key) {
  for (const auto& [k, v] : file.metadata())
    if (k == key) return v;
  return "(absent)";
}

// A checkpoint folder in two shards; `second` may be spoilt by the caller.
void write_shards(const TemporaryFolder& folder) {
  folder.write("config.json", kSmallConfigJson);
  folder.write("a.safetensors",
               RawSafetensors{.json = R"({"model.embed_tokens.weight":{"dtype":"F32",)"
                                      R"("shape":[6,8],"data_offsets":[0,192]}})",
                              .n_data = 192,
                              .length = {}}
                   .bytes());
  folder.write("b.safetensors",
               RawSafetensors{.json = R"({"lm_head.weight":{"dtype":"BF16","shape":[6,8],)"
                                      R"("data_offsets":[8,104]},"unlisted":{"dtype":"I64",)"
                                      R"("shape":[],"data_offsets":[0,8]}})",
                              .n_data = 104,
                              .length = {}}
                   .bytes());
  folder.write("model.safetensors.index.json",
               R"({"metadata":{"total_size":288},"weight_map":{)"
               R"("lm_head.weight":"b.safetensors","model.embed_tokens.weight":"a.safetensors"}})");
}

}  // namespace

TEST_CASE("a small file, field by field") {
  const RawSafetensors raw = small_safetensors();
  const std::string bytes = raw.bytes();
  Result<TensorFile> file = TensorFile::parse_safetensors(source_of(bytes));
  INFO(file.status().message());
  REQUIRE(file.ok());
  CHECK(file->format() == FileFormat::kSafetensors);
  CHECK_FALSE(file->has_config());
  CHECK(file->total_bytes() == static_cast<int64_t>(bytes.size()));
  REQUIRE(file->tensors().size() == 4);
  const TensorInfo* head = file->find("lm_head.weight");
  REQUIRE(head != nullptr);
  CHECK(head->dtype == DType::kBF16);
  CHECK(head->n_dims == 2);
  CHECK(head->shape[0] == 6);
  CHECK(head->shape[1] == 8);
  CHECK(head->bytes == 96);
  CHECK(head->offset == static_cast<int64_t>(8 + raw.json.size() + 192));
  CHECK(std::memcmp(read_tensor(*file, *head).data(), bytes.data() + head->offset, 96) == 0);
  CHECK(file->find("model.layers.2.eh_proj.weight")->dtype == DType::kF8E4M3);
  CHECK(file->find("model.norm.weight")->dtype == DType::kF16);
}

TEST_CASE("every dtype, scalars, and a padded header") {
  const RawSafetensors raw = {
      .json = R"({"f64":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},)"
              R"("i64":{"dtype":"I64","shape":[],"data_offsets":[8,16]},)"
              R"("f32":{"dtype":"F32","shape":[1,1,1,1],"data_offsets":[16,20]},)"
              R"("i32":{"dtype":"I32","shape":[1],"data_offsets":[20,24]},)"
              R"("f16":{"dtype":"F16","shape":[1],"data_offsets":[24,26]},)"
              R"("bf16":{"dtype":"BF16","shape":[1],"data_offsets":[26,28]},)"
              R"("i16":{"dtype":"I16","shape":[1],"data_offsets":[28,30]},)"
              R"("i8":{"dtype":"I8","shape":[1],"data_offsets":[30,31]},)"
              R"("f8":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[31,32]}}     )",
      .n_data = 32,
      .length = {}};
  Result<TensorFile> file = TensorFile::parse_safetensors(source_of(raw.bytes()));
  INFO(file.status().message());
  REQUIRE(file.ok());
  const std::pair<const char*, DType> expected[] = {
      {"f64", DType::kF64}, {"i64", DType::kI64}, {"f32", DType::kF32},
      {"i32", DType::kI32}, {"f16", DType::kF16}, {"bf16", DType::kBF16},
      {"i16", DType::kI16}, {"i8", DType::kI8},   {"f8", DType::kF8E4M3}};
  for (const auto& [name, dtype] : expected) CHECK(file->find(name)->dtype == dtype);
  CHECK(file->find("i64")->n_dims == 1);
  CHECK(file->find("f32")->n_dims == 4);
}

TEST_CASE("an empty file is a file") {
  const RawSafetensors raw = {.json = "{}", .n_data = 0, .length = {}};
  Result<TensorFile> file = TensorFile::parse_safetensors(source_of(raw.bytes()));
  REQUIRE(file.ok());
  CHECK(file->tensors().empty());
}

TEST_CASE("a folder with config.json") {
  const TemporaryFolder folder;
  folder.write("config.json", kSmallConfigJson);
  folder.write("model.safetensors", small_safetensors().bytes());
  folder.write("tokenizer.json", "{}");

  for (const std::string& path :
       {folder.path(), folder.path() + "/", folder / "model.safetensors"}) {
    INFO(path);
    const TensorFile file = opened(path);
    REQUIRE(file.has_config());
    const ModelConfig& c = file.config();
    CHECK(c.name == std::filesystem::path(folder.path()).filename().string());
    CHECK(c.hidden_size == 8);
    CHECK(c.topk_method == TopkMethod::kNoauxTc);
    CHECK(c.yarn.factor == 40);
    CHECK(file.tensors().size() == 3);  // the layer for multi-token prediction is gone
    CHECK(file.find("model.layers.2.eh_proj.weight") == nullptr);
    REQUIRE(c.remarks.size() == 1);
    CHECK(c.remarks[0].find("multi-token prediction") != std::string::npos);
    CHECK(std::filesystem::equivalent(file.tokenizer().json_path, folder / "tokenizer.json"));
    CHECK(file.tokenizer().config_json_path.empty());
    CHECK(file.tokenizer().bos_token_id == 0);
    CHECK(file.tokenizer().eos_token_id == 1);
    CHECK(metadata_of(file, "hidden_size") == "8");
    CHECK(metadata_of(file, "rope_scaling.type") == "yarn");
    CHECK(metadata_of(file, "architectures") == "[1 values]");
    CHECK(metadata_of(file, "norm_topk_prob") == "true");
  }

  SECTION("golden values and adapters beside it are plain tensors") {
    RawSafetensors other = small_safetensors();
    other.json = replaced(other.json, "model.embed_tokens.weight", "p1.logits");
    folder.write("golden.safetensors", other.bytes());
    const TensorFile file = opened(folder / "golden.safetensors");
    CHECK_FALSE(file.has_config());
    CHECK(file.tensors().size() == 4);
  }
  SECTION("the config counts in the fingerprint") {
    const auto before = opened(folder.path()).fingerprint();
    folder.write("config.json", replaced(std::string(kSmallConfigJson), "2.5", "2.25"));
    const auto after = opened(folder.path()).fingerprint();
    CHECK((before.lo != after.lo || before.hi != after.hi));
  }
}

TEST_CASE("the output matrix may be missing when the embeddings are tied") {
  const TemporaryFolder folder;
  RawSafetensors raw = small_safetensors();
  raw.json = replaced(raw.json, "lm_head.weight", "model.other.weight");
  folder.write("model.safetensors", raw.bytes());
  const std::string config(kSmallConfigJson);
  SECTION("said so") {
    folder.write("config.json", replaced(config, R"("tie_word_embeddings": false)",
                                         R"("tie_word_embeddings": true)"));
    CHECK(opened(folder.path()).config().tie_word_embeddings);
  }
  SECTION("not said") {
    folder.write("config.json", replaced(config, R"("tie_word_embeddings": false,)", ""));
    const TensorFile file = opened(folder.path());
    CHECK(file.config().tie_word_embeddings);
    CHECK(file.config().remarks.size() == 2);
  }
  SECTION("denied") {
    folder.write("config.json", config);
    const Status status = TensorFile::open(folder.path()).status();
    check_refused(status, Code::kFormat);
    CHECK(status.key() == "lm_head.weight");
  }
}

TEST_CASE("shards") {
  const TemporaryFolder folder;
  write_shards(folder);
  const TensorFile file = opened(folder.path());
  REQUIRE(file.tensors().size() == 2);
  CHECK(file.find("unlisted") == nullptr);
  REQUIRE(file.config().remarks.size() == 1);
  CHECK(file.config().remarks[0].find("1 tensors that the index does not list") !=
        std::string::npos);
  const TensorInfo* head = file.find("lm_head.weight");
  const std::vector<std::byte> bytes = read_tensor(file, *head);
  CHECK(bytes[0] == std::byte{8 * 5});  // its place in the second file
  CHECK(head->source != file.find("model.embed_tokens.weight")->source);
}

TEST_CASE("golden checkpoints open") {
  const struct {
    const char* folder;
    DType projections;
    size_t n_tensors;
  } cases[] = {{"models/tiny-v2", DType::kBF16, 137},
               {"models/tiny-v2-lite", DType::kF32, 95},
               {"models/tiny-v2-lite-sharded", DType::kBF16, 95},
               {"models/tiny-v3", DType::kBF16, 139},
               {"models/tiny-v3-fp8", DType::kF8E4M3, 259}};
  for (const auto& [folder, projections, n_tensors] : cases) {
    INFO(folder);
    const TensorFile file = opened(test_data(folder));
    REQUIRE(file.has_config());
    CHECK(file.tensors().size() == n_tensors);
    CHECK(file.find("model.layers.0.self_attn.o_proj.weight")->dtype == projections);
    CHECK(file.find("model.embed_tokens.weight")->shape[0] == file.config().vocab_size);
    CHECK_FALSE(file.tokenizer().json_path.empty());
    CHECK_FALSE(file.tokenizer().config_json_path.empty());
    for (const TensorInfo& tensor : file.tensors()) {
      std::byte last;
      CHECK(tensor.bytes ==
            tensor.elements() / tensor.cols() * row_bytes(tensor.dtype, tensor.cols()));
      CHECK(file.read(tensor, tensor.bytes - 1, std::span(&last, 1)).ok());
    }
  }
  const TensorFile fp8 = opened(test_data("models/tiny-v3-fp8"));
  CHECK(fp8.find("model.layers.3.eh_proj.weight") == nullptr);
  CHECK(fp8.find("model.layers.0.self_attn.o_proj.weight_scale_inv")->dtype == DType::kF32);
}

TEST_CASE("golden values equal those of an independent reader") {
  const std::string path = test_data("models/tiny-v3/golden.safetensors");
  const TensorFile file = opened(path);
  const Golden golden = Golden::load(path);
  CHECK(file.tensors().size() == golden.tensors().size());
  for (const auto& [name, tensor] : golden.tensors()) {
    INFO(name);
    const TensorInfo* info = file.find(name);
    REQUIRE(info != nullptr);
    const std::vector<std::byte> bytes = read_tensor(file, *info);
    const void* expected = tensor.f32.empty() ? static_cast<const void*>(tensor.i32.data())
                                              : static_cast<const void*>(tensor.f32.data());
    CHECK(std::memcmp(bytes.data(), expected, bytes.size()) == 0);
  }
}

TEST_CASE("sharded and whole checkpoints have the same tensors") {
  const TensorFile whole = opened(test_data("models/tiny-v2-lite"));
  const TensorFile shards = opened(test_data("models/tiny-v2-lite-sharded"));
  REQUIRE(whole.tensors().size() == shards.tensors().size());
  for (size_t i = 0; i < whole.tensors().size(); ++i) {
    const TensorInfo &a = whole.tensors()[i], &b = shards.tensors()[i];
    INFO(a.name);
    CHECK(a.name == b.name);
    CHECK(a.elements() == b.elements());
    // F32 there, BF16 here, exact in both: the upper halves are equal, the lower ones zero.
    const std::vector<std::byte> wide = read_tensor(whole, a), narrow = read_tensor(shards, b);
    int64_t n_different = 0;
    for (size_t k = 0; k < narrow.size() / 2; ++k)
      n_different += wide[4 * k] != std::byte{0} || wide[4 * k + 1] != std::byte{0} ||
                     wide[4 * k + 2] != narrow[2 * k] || wide[4 * k + 3] != narrow[2 * k + 1];
    CHECK(n_different == (b.dtype == DType::kF32 ? -1 : 0));
  }
}

TEST_CASE("what the folder lacks is named") {
  const TemporaryFolder folder;
  Status status = TensorFile::open(folder.path()).status();
  check_refused(status, Code::kNotFound);
  CHECK(status.message().find("config.json") != std::string_view::npos);
  folder.write("config.json", kSmallConfigJson);
  status = TensorFile::open(folder.path()).status();
  check_refused(status, Code::kNotFound);
  CHECK(status.message().find("model.safetensors.index.json") != std::string_view::npos);
}
