// Plans from a bare config.json: the tensors that are listed are those that a file of that shape
// and type has, and the plan is the file's, to the byte.
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

#include "lib/io/tensor_listing.h"
#include "support/loaded_model.h"
#include "support/model_metadata.h"
#include "support/model_shapes.h"
#include "support/random_model.h"

namespace fathom {
namespace {

std::string published_config(const std::string& name) {
  return std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/" + name + ".json";
}

// A folder that is removed at the end of the test.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& name)
      : path_(std::filesystem::temp_directory_path() /
              ("fathom_" + std::to_string(getpid()) + "_" + name)) {
    std::filesystem::create_directory(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::string path() const { return path_.string(); }
  std::string write(const std::string& name, std::string_view text) const {
    std::ofstream(path_ / name) << text;
    return (path_ / name).string();
  }

 private:
  std::filesystem::path path_;
};

std::vector<test::TensorSpec> specs_of(const io::TensorFile& file) {
  std::vector<test::TensorSpec> specs;
  for (const io::TensorInfo& tensor : file.tensors())
    specs.push_back({tensor.name, tensor.dtype, {tensor.shape, tensor.shape + tensor.n_dims}});
  return specs;
}

// `wanted` comes from the writers of test files, which share nothing with the library.
void check_same_tensors(const io::TensorFile& listed, std::vector<test::TensorSpec> wanted) {
  std::sort(wanted.begin(), wanted.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  const std::vector<test::TensorSpec> found = specs_of(listed);
  REQUIRE(found.size() == wanted.size());
  for (size_t i = 0; i < found.size(); ++i) {
    INFO("tensor " << i << ": " << found[i].name << " " << dtype_info(found[i].dtype).name
                   << ", expected " << wanted[i].name << " " << dtype_info(wanted[i].dtype).name);
    REQUIRE(found[i].name == wanted[i].name);
    REQUIRE(found[i].dtype == wanted[i].dtype);
    REQUIRE(found[i].shape == wanted[i].shape);
    REQUIRE(listed.tensors()[i].bytes == wanted[i].bytes());
  }
}

struct NamedType {
  WeightsType type;
  const char* gguf;
};
constexpr NamedType kGgufTypes[] = {{WeightsType::kBF16, "BF16"},
                                    {WeightsType::kF16, "F16"},
                                    {WeightsType::kQ8_0, "Q8_0"},
                                    {WeightsType::kQ4_K, "Q4_K_M"}};

TEST_CASE("the tensors listed for a configuration are those of its files", "[config-plan]") {
  for (const char* name : {"v2-lite", "v2", "v3", "kimi-k2"}) {
    const ModelConfig shape = test::named_shape(name);
    for (const NamedType& type : kGgufTypes) {
      INFO(name << " as " << type.gguf);
      const auto listed = io::list_tensors(published_config(name), type.type);
      INFO(listed.status().message());
      REQUIRE(listed.ok());
      CHECK(listed->format() == io::FileFormat::kGguf);
      CHECK_FALSE(listed->has_weights());
      check_same_tensors(*listed, test::gguf_tensors(shape, test::GgufLayout::kNew, type.gguf));
    }
    INFO(name << " as fp8");
    const auto listed = io::list_tensors(published_config(name), WeightsType::kF8);
    REQUIRE(listed.ok());
    CHECK(listed->format() == io::FileFormat::kSafetensors);
    check_same_tensors(*listed, test::hf_tensors(shape, DType::kF8E4M3));
  }
}

// Sizes of the files that bartowski/deepseek-ai_DeepSeek-V3-0324-GGUF lists, in 10^9 bytes.
TEST_CASE("the listed weights of V3 take what its published files take", "[config-plan]") {
  const std::pair<WeightsType, double> published[] = {{WeightsType::kQ8_0, 713.29e9},
                                                      {WeightsType::kQ4_K, 404.43e9}};
  for (const auto& [type, size] : published) {
    const auto listed = io::list_tensors(published_config("v3"), type);
    REQUIRE(listed.ok());
    double bytes = 0;
    for (const io::TensorInfo& tensor : listed->tensors())
      bytes += static_cast<double>(tensor.bytes);
    INFO(weights_type_name(type) << ": " << bytes);
    CHECK(bytes == Approx(size).epsilon(0.001));
  }
}

TEST_CASE("rows that are no whole blocks fall back as llama.cpp's", "[config-plan]") {
  TemporaryFolder folder("odd");
  ModelConfig shape = test::named_shape("tiny-v2");
  shape.moe_intermediate_size = 96;  // no multiple of 256, one of 32
  shape.intermediate_size = 200;     // of neither
  const std::string path = folder.write("odd.json", test::hf_config_json(shape, DType::kBF16));
  for (const NamedType& type : kGgufTypes) {
    INFO(type.gguf);
    const auto listed = io::list_tensors(path, type.type);
    REQUIRE(listed.ok());
    check_same_tensors(*listed, test::gguf_tensors(shape, test::GgufLayout::kNew, type.gguf));
  }
}

// All bytes but the tokenizer's, which a bare configuration does not have.
void check_same_bytes(const Plan& a, const Plan& b) {
  CHECK(a.max_context == b.max_context);
  CHECK(a.prefill_chunk == b.prefill_chunk);
  CHECK(a.feasible == b.feasible);
  REQUIRE(a.devices.size() == b.devices.size());
  for (size_t d = 0; d < a.devices.size(); ++d)
    for (int phase = 0; phase < kPhaseCount; ++phase)
      for (int p = 0; p < kPurposeCount; ++p) {
        if (static_cast<Purpose>(p) == Purpose::kTokenizer) continue;
        INFO("device " << d << ", " << phase_name(static_cast<Phase>(phase)) << ", "
                       << purpose_name(static_cast<Purpose>(p)));
        const auto i = static_cast<size_t>(phase), j = static_cast<size_t>(p);
        CHECK(a.devices[d].bytes[i][j] == b.devices[d].bytes[i][j]);
      }
}

TEST_CASE("the plan of a config.json is the plan of the file, to the byte", "[config-plan]") {
  TemporaryFolder folder("plan");
  auto engine = Engine::create(test::config_of({{"budget.cpu", "2000G"}}));
  REQUIRE(engine.ok());
  for (const char* name : {"v2-lite", "v2", "v3"})
    for (const NamedType& type : kGgufTypes) {
      INFO(name << " as " << type.gguf);
      test::GgufOptions options;
      options.type = type.gguf;
      options.contents = test::Contents::kHoles;
      const std::string file = folder.path() + "/model.gguf";
      test::write_gguf_model(file, test::named_shape(name), options);
      const test::Settings settings{{"budget.cpu", "2000G"}, {"context.max", "16384"}};
      auto of_file = engine->plan(file, test::config_of(settings));
      INFO(of_file.status().message());
      REQUIRE(of_file.ok());
      test::Settings typed = settings;
      typed.push_back({"weights.type", std::string(weights_type_name(type.type))});
      auto of_config = engine->plan(published_config(name), test::config_of(typed));
      INFO(of_config.status().message());
      REQUIRE(of_config.ok());
      check_same_bytes(*of_config, *of_file);
    }
}

TEST_CASE("without weights.type the configuration decides", "[config-plan]") {
  const auto v3 = io::list_tensors(published_config("v3"), std::nullopt);
  REQUIRE(v3.ok());  // it has a quantization_config
  CHECK(v3->find("model.layers.3.mlp.experts.0.up_proj.weight")->dtype == DType::kF8E4M3);
  const auto v2 = io::list_tensors(published_config("v2"), std::nullopt);
  REQUIRE(v2.ok());
  CHECK(v2->find("blk.1.ffn_up_exps.weight")->dtype == DType::kBF16);
  CHECK((v2->fingerprint().lo != v3->fingerprint().lo));
}

TEST_CASE("what is planned without weights is not loaded", "[config-plan]") {
  TemporaryFolder folder("bare");
  const std::string text = test::hf_config_json(test::named_shape("tiny-v3"), DType::kBF16);
  folder.write("config.json", text);
  auto engine = Engine::create();
  REQUIRE(engine.ok());
  auto plan = engine->plan(folder.path());  // the folder, as it is before the weights arrive
  INFO(plan.status().message());
  REQUIRE(plan.ok());
  CHECK(plan->feasible);
  CHECK(plan->describe().find("FITS") != std::string::npos);
  const auto model = Model::load(*engine, *plan);
  REQUIRE_FALSE(model.ok());
  CHECK(model.status().code() == Code::kNotFound);
  CHECK(model.status().message().find("no weights") != std::string_view::npos);
  CHECK(engine->memory().devices[0].bytes_now == engine->device(0).runtime_bytes());

  const auto listed = io::list_tensors(folder.path(), std::nullopt);
  REQUIRE(listed.ok());
  std::byte one;
  CHECK(listed->read(listed->tensors()[0], 0, {&one, 1}).code() == Code::kNotFound);
}

TEST_CASE("weights.type is refused where there are weights", "[config-plan]") {
  auto engine = Engine::create();
  REQUIRE(engine.ok());
  const auto plan = engine->plan(FATHOM_EXAMPLE_MODEL, test::config_of({{"weights.type", "q8_0"}}));
  REQUIRE_FALSE(plan.ok());
  CHECK(plan.status().code() == Code::kConfig);
  CHECK(plan.status().key() == "weights.type");
}

TEST_CASE("a configuration that no machine could hold is refused", "[config-plan]") {
  TemporaryFolder folder("huge");
  ModelConfig shape = test::named_shape("tiny-v3");
  shape.num_hidden_layers = 4096;
  shape.n_routed_experts = 4096;
  shape.hidden_size = shape.moe_intermediate_size = 1 << 20;
  const std::string path = folder.write("huge.json", test::hf_config_json(shape, DType::kBF16));
  for (const WeightsType type : {WeightsType::kBF16, WeightsType::kF8}) {
    const auto listed = io::list_tensors(path, type);
    REQUIRE_FALSE(listed.ok());
    CHECK(listed.status().code() == Code::kFormat);
  }
  // Many small tensors are refused by their number.
  shape.hidden_size = shape.moe_intermediate_size = 1;
  const auto listed = io::list_tensors(
      folder.write("many.json", test::hf_config_json(shape, DType::kBF16)), WeightsType::kF8);
  REQUIRE_FALSE(listed.ok());
  CHECK(listed.status().code() == Code::kFormat);
  CHECK(listed.status().message().find("tensors") != std::string_view::npos);
}

}  // namespace
}  // namespace fathom
