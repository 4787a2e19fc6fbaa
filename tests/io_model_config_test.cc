// ModelConfig from config.json and from GGUF keys: published forms, defaults, known shapes.
// Values out of bounds: io_hostile_config_test.cc.
#include "lib/io/model_config.h"

#include <catch2/catch.hpp>

#include "io_raw_files.h"

using namespace fathom;
using namespace fathom::io;
using namespace fathom::test;

namespace {

ModelConfig config_of(const std::string& json) {
  Result<ModelConfig> config = parse_config_json(json);
  INFO(config.status().message());
  REQUIRE(config.ok());
  return std::move(config).value();
}

ModelConfig config_of(const RawGguf& raw) {
  Result<TensorFile> file = TensorFile::parse_gguf(source_of(raw.bytes()));
  INFO(file.status().message());
  REQUIRE(file.ok());
  REQUIRE(file->has_config());
  return file->config();
}

bool has_remark(const ModelConfig& config, std::string_view part) {
  for (const std::string& remark : config.remarks)
    if (remark.find(part) != std::string::npos) return true;
  return false;
}

// As published on Hugging Face, without what no reader looks at.
constexpr std::string_view kDeepSeekV3 = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
  "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
  "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
  "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
  "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
  "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                   "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
  "v_head_dim": 128, "vocab_size": 129280})";

constexpr std::string_view kDeepSeekV2Lite = R"({
  "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "aux_loss_alpha": 0.001,
  "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
  "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
  "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
  "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
  "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null,
  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
                   "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
                   "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
  "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy",
  "v_head_dim": 128, "vocab_size": 102400})";

}  // namespace

TEST_CASE("DeepSeek-V3 as published") {
  const ModelConfig c = config_of(std::string(kDeepSeekV3));
  CHECK(c.architecture == "deepseek2");
  CHECK(c.vocab_size == 129280);
  CHECK(c.hidden_size == 7168);
  CHECK(c.num_hidden_layers == 61);
  CHECK(c.num_attention_heads == 128);
  CHECK(c.max_position_embeddings == 163840);
  CHECK(c.rms_norm_eps == 1e-6);
  CHECK(c.rope_theta == 10000);
  CHECK_FALSE(c.tie_word_embeddings);
  CHECK(c.q_lora_rank == 1536);
  CHECK(c.kv_lora_rank == 512);
  CHECK(c.qk_nope_head_dim == 128);
  CHECK(c.qk_rope_head_dim == 64);
  CHECK(c.v_head_dim == 128);
  CHECK(c.intermediate_size == 18432);
  CHECK(c.first_k_dense_replace == 3);
  CHECK(c.moe_intermediate_size == 2048);
  CHECK(c.n_routed_experts == 256);
  CHECK(c.num_experts_per_tok == 8);
  CHECK(c.n_shared_experts == 1);
  CHECK(c.n_group == 8);
  CHECK(c.topk_group == 4);
  CHECK(c.scoring_func == ScoringFunc::kSigmoid);
  CHECK(c.topk_method == TopkMethod::kNoauxTc);
  CHECK(c.norm_topk_prob);
  CHECK(c.routed_scaling_factor == 2.5);
  CHECK(c.yarn.enabled);
  CHECK(c.yarn.factor == 40);
  CHECK(c.yarn.original_max_position_embeddings == 4096);
  CHECK(c.yarn.beta_fast == 32);
  CHECK(c.yarn.beta_slow == 1);
  CHECK(c.yarn.mscale == 1);
  CHECK(c.yarn.mscale_all_dim == 1);
  CHECK(c.bos_token_id == 0);
  CHECK(c.eos_token_id == 1);
  CHECK(c.remarks.empty());
}

TEST_CASE("DeepSeek-V2-Lite as published") {
  const ModelConfig c = config_of(std::string(kDeepSeekV2Lite));
  CHECK(c.q_lora_rank == 0);  // null: there is none
  CHECK(c.scoring_func == ScoringFunc::kSoftmax);
  CHECK(c.topk_method == TopkMethod::kGreedy);
  CHECK(c.yarn.mscale_all_dim == 0.707);
  CHECK(c.eos_token_id == 100001);
}

TEST_CASE("relatives: Kimi-K2 and Moonlight") {
  std::string kimi = replaced(std::string(kDeepSeekV3), R"("deepseek_v3")", R"("kimi_k2")");
  kimi = replaced(kimi, R"("n_routed_experts": 256)", R"("n_routed_experts": 384)");
  kimi = replaced(kimi, R"("n_group": 8)", R"("n_group": 1)");
  kimi = replaced(kimi, R"("topk_group": 4)", R"("topk_group": 1)");
  const ModelConfig c = config_of(kimi);
  CHECK(c.n_group == 1);
  CHECK(c.topk_method == TopkMethod::kNoauxTc);
  std::string moonlight =
      replaced(std::string(kDeepSeekV3), R"("q_lora_rank": 1536)", R"("q_lora_rank": null)");
  const size_t rope = moonlight.find(R"("rope_scaling")");
  const size_t rope_end = moonlight.find("},", rope);
  moonlight.erase(rope, rope_end + 2 - rope);
  CHECK_FALSE(config_of(moonlight).yarn.enabled);
}

TEST_CASE("what config.json may leave out") {
  const std::string base(kSmallConfigJson);
  SECTION("eps and theta") {
    std::string text = replaced(base, R"("rms_norm_eps": 1e-06, )", "");
    text = replaced(text, R"("rope_theta": 10000, )", "");
    CHECK(config_of(text).rms_norm_eps == 1e-6);
    CHECK(config_of(text).rope_theta == 10000);
  }
  SECTION("the router's functions, by family") {
    const std::string text =
        replaced(base, R"("scoring_func": "sigmoid", "topk_method": "noaux_tc",)", "");
    CHECK(config_of(text).topk_method == TopkMethod::kNoauxTc);
    std::string v2 = replaced(text, "DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM");
    v2 = replaced(v2, "deepseek_v3", "deepseek_v2");
    v2 = replaced(v2, R"("norm_topk_prob": true,)", "");
    v2 = replaced(v2, R"("routed_scaling_factor": 2.5,)", "");
    const ModelConfig c = config_of(v2);
    CHECK(c.topk_method == TopkMethod::kGreedy);
    CHECK(c.scoring_func == ScoringFunc::kSoftmax);
    CHECK(c.n_group == 1);  // greedy knows no groups, whatever n_group says
    CHECK_FALSE(c.norm_topk_prob);
    CHECK(c.routed_scaling_factor == 1);
  }
  SECTION("one of the two names of the family") {
    CHECK(parse_config_json(replaced(base, R"("model_type": "deepseek_v3",)", "")).ok());
    CHECK(parse_config_json(replaced(base, R"("architectures": ["DeepseekV3ForCausalLM"], )", ""))
              .ok());
  }
  SECTION("experts: a dense model") {
    const std::string text =
        replaced(base, R"("n_routed_experts": 4,)", R"("n_routed_experts": null,)");
    CHECK(config_of(text).n_routed_experts == 0);
    CHECK_FALSE(config_of(text).is_moe_layer(1));
  }
  SECTION("token ids") {
    const std::string text = replaced(base, R"("bos_token_id": 0, "eos_token_id": 1, )", "");
    CHECK(config_of(text).bos_token_id == -1);
    CHECK(config_of(text).eos_token_id == -1);
  }
  SECTION("yarn's betas and mscales") {
    const std::string text =
        replaced(base, R"("beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0)",
                 R"("rope_theta": 5)");
    const ModelConfig c = config_of(text);
    CHECK(c.yarn.beta_fast == 32);
    CHECK(c.yarn.beta_slow == 1);
    CHECK(c.yarn.mscale == 1);
    CHECK(c.yarn.mscale_all_dim == 0);
    CHECK(c.rope_theta == 10000);  // the outer one counts
  }
}

TEST_CASE("several end tokens: the first is used, and it is said") {
  const ModelConfig c = config_of(
      replaced(std::string(kSmallConfigJson), R"("eos_token_id": 1)", R"("eos_token_id": [3, 1])"));
  CHECK(c.eos_token_id == 3);
  CHECK(has_remark(c, "eos_token_id lists 2 tokens"));
}

TEST_CASE("the newer form with rope_parameters") {
  std::string text = replaced(std::string(kSmallConfigJson), R"("rope_theta": 10000, )", "");
  text = replaced(text, R"("rope_scaling": {"type": "yarn",)",
                  R"("rope_parameters": {"rope_type": "yarn", "rope_theta": 50000.0,)");
  const ModelConfig c = config_of(text);
  CHECK(c.rope_theta == 50000);
  CHECK(c.yarn.enabled);
  CHECK(c.yarn.mscale_all_dim == 1);
  const std::string plain = replaced(text, R"("rope_type": "yarn")", R"("rope_type": "default")");
  CHECK_FALSE(config_of(plain).yarn.enabled);
  CHECK(config_of(plain).rope_theta == 50000);
}

TEST_CASE("GGUF keys of the newer layout") {
  const ModelConfig c = config_of(small_gguf());
  CHECK(c.name == "small");
  CHECK(c.qk_nope_head_dim == 3);
  CHECK(c.qk_rope_head_dim == 2);
  CHECK(c.v_head_dim == 3);
  CHECK(c.kv_lora_rank == 4);
  CHECK(c.n_group == 2);
  CHECK(c.topk_group == 1);
  CHECK(c.topk_method == TopkMethod::kNoauxTc);
  CHECK(c.yarn.mscale_all_dim == 1);
  CHECK(c.yarn.mscale == 1);
  CHECK(c.yarn.beta_fast == 32);
  CHECK_FALSE(c.tie_word_embeddings);
  CHECK(c.remarks.empty());
}

TEST_CASE("GGUF keys of the older layout") {
  RawGguf raw = small_gguf();
  raw.erase("deepseek2.attention.key_length_mla");
  raw.erase("deepseek2.attention.value_length_mla");
  raw.set_u32("deepseek2.attention.key_length", 5);
  raw.set_u32("deepseek2.attention.value_length", 3);
  const ModelConfig c = config_of(raw);
  CHECK(c.qk_nope_head_dim == 3);
  CHECK(c.v_head_dim == 3);
}

TEST_CASE("what GGUF files may leave out") {
  RawGguf raw = small_gguf();
  SECTION("the gating function, told by the router's bias") {
    raw.erase("deepseek2.expert_gating_func");
    CHECK(config_of(raw).scoring_func == ScoringFunc::kSigmoid);
    raw.tensors.pop_back();
    CHECK(config_of(raw).scoring_func == ScoringFunc::kSoftmax);
    CHECK(config_of(raw).topk_method == TopkMethod::kGroupLimitedGreedy);
    raw.set_u32("deepseek2.expert_group_count", 1);
    CHECK(config_of(raw).topk_method == TopkMethod::kGreedy);
  }
  SECTION("the weights' scale") {
    raw.set_f32("deepseek2.expert_weights_scale", 0);
    CHECK(config_of(raw).routed_scaling_factor == 1);
    raw.erase("deepseek2.expert_weights_scale");
    CHECK(config_of(raw).routed_scaling_factor == 1);
  }
  SECTION("the size of the vocabulary") {
    raw.erase("deepseek2.vocab_size");
    CHECK(config_of(raw).vocab_size == 6);
  }
  SECTION("the output matrix") {
    std::erase_if(raw.tensors, [](const auto& t) { return t.name == "output.weight"; });
    CHECK(config_of(raw).tie_word_embeddings);
    CHECK(has_remark(config_of(raw), "no output.weight"));
  }
  SECTION("yarn") {
    raw.erase("deepseek2.rope.scaling.yarn_log_multiplier");
    CHECK(config_of(raw).yarn.mscale == 1);
    CHECK(config_of(raw).yarn.mscale_all_dim == 0);
    CHECK(has_remark(config_of(raw), "yarn_log_multiplier"));
    raw.set_string("deepseek2.rope.scaling.type", "none");
    CHECK_FALSE(config_of(raw).yarn.enabled);
  }
}

TEST_CASE("expert groups of old files: the published ones for known shapes") {
  const struct {
    const char* name;
    uint32_t hidden_size, n_layers, n_experts, n_used;
    int64_t n_group, topk_group;
    bool sigmoid;
    TopkMethod method;
    const char* remark;
  } cases[] = {
      {"V2", 5120, 60, 160, 6, 8, 3, false, TopkMethod::kGroupLimitedGreedy, "Coder-V2 (236B)"},
      {"V3", 7168, 61, 256, 8, 8, 4, true, TopkMethod::kNoauxTc, "R1 (671B)"},
      {"V2-Lite", 2048, 27, 64, 6, 1, 1, false, TopkMethod::kGreedy, "(16B)"},
      {"another", 5120, 60, 160, 7, 1, 1, false, TopkMethod::kGreedy, "of no known model"},
      {"Kimi", 7168, 61, 384, 8, 1, 1, true, TopkMethod::kNoauxTc, "of no known model"},
  };
  for (const auto& k : cases) {
    INFO(k.name);
    RawGguf raw = small_gguf();
    raw.erase("deepseek2.expert_group_count");
    raw.erase("deepseek2.expert_group_used_count");
    raw.set_u32("deepseek2.embedding_length", k.hidden_size);
    raw.set_u32("deepseek2.block_count", k.n_layers);
    raw.set_u32("deepseek2.expert_count", k.n_experts);
    raw.set_u32("deepseek2.expert_used_count", k.n_used);
    raw.set_u32("deepseek2.expert_gating_func", k.sigmoid ? 2 : 1);
    raw.tensors.clear();
    raw.add_f32("token_embd.weight", {k.hidden_size, 6});
    raw.add_f32("output.weight", {k.hidden_size, 6});
    const ModelConfig c = config_of(raw);
    CHECK(c.n_group == k.n_group);
    CHECK(c.topk_group == k.topk_group);
    CHECK(c.topk_method == k.method);
    CHECK(has_remark(c, k.remark));
  }
}
