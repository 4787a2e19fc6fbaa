// The random models of tests/support: every form of a model is the same model, true shapes have
// the published sizes, and random blocks have the magnitude that was asked for.
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "fathom/tensor.hpp"
#include "lib/io/tensor_file.h"
#include "support/golden.h"
#include "support/model_shapes.h"
#include "support/random_model.h"
#include "support/random_weights.h"

using namespace fathom;
using namespace fathom::test;

namespace {

// A folder that is removed with all it holds.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "fathom-XXXXXX").string();
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

io::TensorFile open_gguf(std::vector<std::byte> bytes) {
  auto file = io::TensorFile::parse_gguf(io::memory_source("memory.gguf", std::move(bytes)));
  INFO(file.status().message());
  REQUIRE(file.ok());
  return std::move(file).value();
}

std::vector<float> values_of(const io::TensorFile& file, const std::string& name) {
  const io::TensorInfo* info = file.find(name);
  INFO("tensor " << name);
  REQUIRE(info != nullptr);
  std::vector<std::byte> bytes(static_cast<size_t>(info->bytes));
  REQUIRE(file.read(*info, 0, bytes).ok());
  std::vector<float> values(static_cast<size_t>(info->elements()));
  dequantize(info->dtype, bytes.data(), info->elements(), values.data());
  return values;
}

void check_config(const ModelConfig& expected, const ModelConfig& got) {
  CHECK(got.vocab_size == expected.vocab_size);
  CHECK(got.hidden_size == expected.hidden_size);
  CHECK(got.num_hidden_layers == expected.num_hidden_layers);
  CHECK(got.num_attention_heads == expected.num_attention_heads);
  CHECK(got.max_position_embeddings == expected.max_position_embeddings);
  CHECK(got.rope_theta == Approx(expected.rope_theta));
  CHECK(got.yarn.enabled == expected.yarn.enabled);
  CHECK(got.yarn.factor == Approx(expected.yarn.factor));
  CHECK(got.yarn.mscale_all_dim == Approx(expected.yarn.mscale_all_dim));
  CHECK(got.q_lora_rank == expected.q_lora_rank);
  CHECK(got.kv_lora_rank == expected.kv_lora_rank);
  CHECK(got.qk_nope_head_dim == expected.qk_nope_head_dim);
  CHECK(got.qk_rope_head_dim == expected.qk_rope_head_dim);
  CHECK(got.v_head_dim == expected.v_head_dim);
  CHECK(got.intermediate_size == expected.intermediate_size);
  CHECK(got.first_k_dense_replace == expected.first_k_dense_replace);
  CHECK(got.moe_intermediate_size == expected.moe_intermediate_size);
  CHECK(got.n_routed_experts == expected.n_routed_experts);
  CHECK(got.num_experts_per_tok == expected.num_experts_per_tok);
  CHECK(got.n_shared_experts == expected.n_shared_experts);
  CHECK(got.n_group == expected.n_group);
  CHECK(got.topk_group == expected.topk_group);
  CHECK(got.scoring_func == expected.scoring_func);
  CHECK(got.norm_topk_prob == expected.norm_topk_prob);
  CHECK(got.routed_scaling_factor == Approx(expected.routed_scaling_factor));
  CHECK(got.bos_token_id == expected.bos_token_id);
  CHECK(got.eos_token_id == expected.eos_token_id);
}

}  // namespace

TEST_CASE("random model: F32, F16 and BF16 files hold the same values in every layout") {
  const ModelConfig config = tiny_v2_shape();
  for (const GgufLayout layout : {GgufLayout::kOld, GgufLayout::kMid, GgufLayout::kNew}) {
    const io::TensorFile f32 = open_gguf(gguf_model(config, {.layout = layout, .type = "F32"}));
    for (const char* type : {"F16", "BF16"}) {
      const io::TensorFile half = open_gguf(gguf_model(config, {.layout = layout, .type = type}));
      REQUIRE(half.tensors().size() == f32.tensors().size());
      for (const io::TensorInfo& tensor : f32.tensors()) {
        INFO(type << " " << tensor.name);
        CHECK(describe(first_bit_difference(values_of(f32, tensor.name),
                                            values_of(half, tensor.name))) == "none");
      }
    }
  }
}

TEST_CASE("random model: GGUF and checkpoint have the same weights, attn_k_b transposed") {
  const TemporaryFolder folder;
  const ModelConfig config = tiny_v3_shape();
  write_hf_model(folder / "hf", config, {.dtype = DType::kF32});
  auto opened = io::TensorFile::open(folder / "hf");
  INFO(opened.status().message());
  REQUIRE(opened.ok());
  const io::TensorFile& hf = *opened;
  check_config(config, hf.config());
  const io::TensorFile gguf = open_gguf(gguf_model(config, {}));
  check_config(config, gguf.config());

  CHECK(values_of(gguf, "output.weight") == values_of(hf, "lm_head.weight"));
  CHECK(values_of(gguf, "blk.2.exp_probs_b.bias") ==
        values_of(hf, "model.layers.2.mlp.gate.e_score_correction_bias"));
  const std::vector<float> experts = values_of(gguf, "blk.1.ffn_down_exps.weight");
  const std::vector<float> expert = values_of(hf, "model.layers.1.mlp.experts.3.down_proj.weight");
  CHECK(std::equal(expert.begin(), expert.end(),
                   experts.begin() + 3 * static_cast<int64_t>(expert.size())));

  const std::vector<float> kv_b = values_of(hf, "model.layers.0.self_attn.kv_b_proj.weight");
  const std::vector<float> k_b = values_of(gguf, "blk.0.attn_k_b.weight");
  const std::vector<float> v_b = values_of(gguf, "blk.0.attn_v_b.weight");
  const auto nope = static_cast<size_t>(config.qk_nope_head_dim);
  const auto v = static_cast<size_t>(config.v_head_dim);
  const auto latent = static_cast<size_t>(config.kv_lora_rank);
  const size_t head = 2, row = 5, col = 77;
  CHECK(k_b[(head * latent + col) * nope + row] == kv_b[(head * (nope + v) + row) * latent + col]);
  CHECK(v_b[(head * v + row) * latent + col] ==
        kv_b[(head * (nope + v) + nope + row) * latent + col]);
}

TEST_CASE("random model: F8 codes times scales are the weights, shards hold all tensors") {
  const TemporaryFolder folder;
  ModelConfig config = tiny_v3_shape();
  config.hidden_size = 288;  // ragged 128 x 128 blocks
  write_hf_model(folder / "f8", config, {.dtype = DType::kF8E4M3, .shard_bytes = 1 << 20});
  CHECK(std::filesystem::exists(folder / "f8/model.safetensors.index.json"));
  auto opened = io::TensorFile::open(folder / "f8");
  INFO(opened.status().message());
  REQUIRE(opened.ok());
  const std::string name = "model.layers.1.self_attn.o_proj.weight";
  const std::vector<float> codes = values_of(*opened, name);
  const std::vector<float> scales = values_of(*opened, name + "_scale_inv");
  const TensorSpec spec{name, DType::kF32, {288, 256}};
  const std::vector<float> expected = hf_values(1, spec);
  REQUIRE(codes.size() == expected.size());
  REQUIRE(scales.size() == 3 * 2);
  std::vector<float> got(codes.size());
  for (size_t i = 0; i < codes.size(); ++i) {
    got[i] = codes[i] * scales[i / 256 / 128 * 2 + i % 256 / 128];
  }
  CHECK(cosine(expected, got) > 0.999);
  float largest = 0;
  for (const float value : expected) largest = std::max(largest, std::fabs(value));
  CHECK(max_abs_diff(expected, got).value <= largest / 16);  // half a step of the top binade
}

TEST_CASE("random model: Q8_0 and Q4_0 files are near the F32 file") {
  const ModelConfig config = tiny_v2_lite_shape();
  const io::TensorFile f32 = open_gguf(gguf_model(config, {.type = "F32"}));
  for (const auto& [type, bound] : {std::pair("Q8_0", 0.9999), std::pair("Q4_0", 0.99)}) {
    const io::TensorFile quantised = open_gguf(gguf_model(config, {.type = type}));
    for (const io::TensorInfo& tensor : f32.tensors()) {
      INFO(type << " " << tensor.name);
      CHECK(cosine(values_of(f32, tensor.name), values_of(quantised, tensor.name)) > bound);
    }
  }
}

TEST_CASE("random model: header-only files of the published models have their sizes") {
  const TemporaryFolder folder;
  struct Case {
    ModelConfig config;
    const char* type;
    double weights, gigabytes;
  };
  // Weights: the sums of the published checkpoints, without multi-token prediction.
  for (const Case& c :
       {Case{v2_lite_shape(), "Q4_K_M", 15.706e9, 10.36},
        Case{v2_shape(), "Q4_K_M", 235.741e9, 142.5}, Case{v3_shape(), "Q8_0", 671.026e9, 713.3},
        Case{kimi_k2_shape(), "Q4_K_M", 1026.41e9, 620.5}}) {
    const std::string path = folder / (c.config.name + ".gguf");
    write_gguf_model(path, c.config, {.type = c.type, .contents = Contents::kHoles});
    auto file = io::TensorFile::open(path);
    INFO(c.config.name << ": " << file.status().message());
    REQUIRE(file.ok());
    check_config(c.config, file->config());
    double weights = 0;
    for (const io::TensorInfo& tensor : file->tensors()) {
      weights += static_cast<double>(tensor.elements());
    }
    CHECK(weights == Approx(c.weights).epsilon(1e-4));
    CHECK(static_cast<double>(file->total_bytes()) * 1e-9 == Approx(c.gigabytes).epsilon(1e-3));
    struct stat status {};
    REQUIRE(stat(path.c_str(), &status) == 0);
    CHECK(status.st_blocks * 512 < 64 << 20);  // holes take no room
  }
}

TEST_CASE("random model: blocks of every weight type are finite and of the asked size") {
  for (int i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    if (!is_weight_dtype(dtype)) continue;
    INFO(dtype_info(dtype).name);
    constexpr int64_t kN = 256 * 256;
    constexpr float kDeviation = 0.0125f;
    std::vector<std::byte> bytes(static_cast<size_t>(row_bytes(dtype, kN)));
    fill_random_blocks(dtype, kDeviation, 42, 0, bytes);
    std::vector<float> values(kN);
    dequantize(dtype, bytes.data(), kN, values.data());
    double sum = 0, squares = 0;
    for (const float value : values) {
      sum += value;
      squares += static_cast<double>(value) * value;
    }
    const double deviation = std::sqrt(squares / kN);
    // MXFP4 has powers of two only; the grids of the IQ types are described roughly.
    CHECK(deviation > kDeviation * 0.7);
    CHECK(deviation < kDeviation * 1.5);
    CHECK(std::fabs(sum / kN) < 0.05 * kDeviation);

    // A part asked for alone is the same as in the whole.
    const int64_t part = row_bytes(dtype, kN / 2);
    std::vector<std::byte> half(static_cast<size_t>(part));
    fill_random_blocks(dtype, kDeviation, 42, part, half);
    CHECK(std::equal(half.begin(), half.end(), bytes.begin() + part));
  }
}

TEST_CASE("random model: requests that make no sense throw") {
  CHECK_THROWS(named_shape("v9"));
  CHECK_THROWS(dtype_named("Q9_Z"));
  CHECK_THROWS(gguf_model(tiny_v3_shape(), {.type = "Q4_K"}));  // values need a quantiser
  CHECK_THROWS(gguf_type_number(DType::kF8E4M3));
  ModelConfig small = tiny_v3_shape();
  small.vocab_size = 200;
  CHECK_THROWS(gguf_model(small, {}));
}
