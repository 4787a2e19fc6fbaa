// Configurations that would break the model's code: every value out of its bounds, from config.json
// and from GGUF keys, refused with the key's name.
#include <limits>
#include <set>

#include "io_raw_files.h"
#include "lib/io/model_config.h"

using namespace fathom;
using namespace fathom::io;
using namespace fathom::test;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Puts `value` in the place of what member `key` has in the small config.json.
std::string with_member(std::string_view key, std::string_view value) {
  std::string text(kSmallConfigJson);
  const std::string name = "\"" + std::string(key) + "\": ";
  const size_t at = text.find(name);
  REQUIRE(at != text.npos);
  const size_t begin = at + name.size();
  const char open = text[begin];
  const size_t end = open == '[' || open == '{' ? text.find(open == '[' ? ']' : '}', begin) + 1
                                                : text.find_first_of(",}\n", begin);
  return text.replace(begin, end - begin, value);
}

std::string with_extra(std::string_view member) {
  std::string text(kSmallConfigJson);
  return text.insert(1, std::string(member) + ",");
}

void check(std::string_view name, const Status& status, Code expected, std::string_view key) {
  INFO("case: " << name);
  check_refused(status, expected);
  if (!key.empty()) {
    CHECK(status.key() == key);
    CHECK_THAT(std::string(status.message()), Catch::Contains(std::string(key)));
  }
}

}  // namespace

TEST_CASE("hostile config.json: values") {
  REQUIRE(parse_config_json(kSmallConfigJson).ok());
  const struct {
    const char *key, *value;
    const char* reported = nullptr;  // the key of the refusal, when it is another
  } cases[] = {{"vocab_size", "0"},
               {"vocab_size", "-6"},
               {"vocab_size", "4294967296"},
               {"vocab_size", "18446744073709551615"},
               {"vocab_size", "1e3"},
               {"vocab_size", "6.5"},
               {"vocab_size", "\"6\""},
               {"vocab_size", "null"},
               {"vocab_size", "true"},
               {"vocab_size", "[6]"},
               {"hidden_size", "0"},
               {"hidden_size", "-1"},
               {"hidden_size", "9223372036854775807"},
               {"num_hidden_layers", "0"},
               {"num_hidden_layers", "2147483648"},
               {"num_attention_heads", "0"},
               {"num_attention_heads", "1000000"},
               {"max_position_embeddings", "0"},
               {"max_position_embeddings", "-64"},
               {"rms_norm_eps", "0"},
               {"rms_norm_eps", "-1e-6"},
               {"rms_norm_eps", "1"},
               {"rms_norm_eps", "\"1e-6\""},
               {"rope_theta", "0"},
               {"rope_theta", "-10000"},
               {"rope_theta", "1e300"},
               {"rope_theta", "1"},
               {"q_lora_rank", "-1"},
               {"q_lora_rank", "1073741824"},
               {"kv_lora_rank", "0"},
               {"kv_lora_rank", "null"},
               {"kv_lora_rank", "1099511627776"},
               {"qk_nope_head_dim", "0"},
               {"qk_rope_head_dim", "0"},
               {"qk_rope_head_dim", "3"},
               {"qk_rope_head_dim", "-2"},
               {"qk_rope_head_dim", "1000000"},
               {"v_head_dim", "0"},
               {"intermediate_size", "0"},
               {"intermediate_size", "-12"},
               {"moe_intermediate_size", "0"},
               {"moe_intermediate_size", "null"},
               {"n_routed_experts", "-4"},
               {"n_routed_experts", "1000000"},
               {"n_routed_experts", "1", "num_experts_per_tok"},
               {"n_routed_experts", "5", "n_group"},
               {"num_experts_per_tok", "0"},
               {"num_experts_per_tok", "5"},
               {"num_experts_per_tok", "3", "topk_group"},
               {"n_shared_experts", "-1"},
               {"n_group", "0"},
               {"n_group", "3"},
               {"n_group", "5"},
               {"n_group", "4", "topk_group"},
               {"topk_group", "0"},
               {"topk_group", "3"},
               {"topk_group", "2.0"},
               {"first_k_dense_replace", "-1"},
               {"first_k_dense_replace", "3"},
               {"first_k_dense_replace", "null"},
               {"routed_scaling_factor", "0"},
               {"routed_scaling_factor", "-1"},
               {"routed_scaling_factor", "1e30"},
               {"norm_topk_prob", "1"},
               {"tie_word_embeddings", "\"false\""},
               {"attention_bias", "0"},
               {"bos_token_id", "6"},
               {"bos_token_id", "-1"},
               {"eos_token_id", "4294967295"},
               {"eos_token_id", "[1, 6]"},
               {"eos_token_id", "[\"a\"]"},
               {"eos_token_id", "\"1\""},
               {"num_nextn_predict_layers", "-1"},
               {"num_nextn_predict_layers", "1000000000000"},
               {"architectures", "\"DeepseekV3ForCausalLM\""},
               {"architectures", "[]"},
               {"architectures", "[1]"},
               {"model_type", "3"},
               {"hidden_act", "1"},
               {"scoring_func", "2"},
               {"rope_scaling", "[]"},
               {"rope_scaling", "\"yarn\""},
               {"factor", "0"},
               {"factor", "0.5"},
               {"factor", "null"},
               {"factor", "1e10"},
               {"original_max_position_embeddings", "0"},
               {"original_max_position_embeddings", "-1"},
               {"original_max_position_embeddings", "16.0"},
               {"beta_fast", "-1"},
               {"beta_fast", "0.5"},
               {"beta_slow", "-1"},
               {"mscale", "-1"},
               {"mscale_all_dim", "1e9"}};
  std::set<std::string> names;
  for (const auto& c : cases) {
    const std::string name = std::string(c.key) + " = " + c.value;
    CHECK(names.insert(name).second);
    check(name, parse_config_json(with_member(c.key, c.value)).status(), Code::kFormat,
          c.reported != nullptr ? c.reported : c.key);
  }
  CHECK(names.size() >= 90);
}

TEST_CASE("hostile config.json: what is known but not supported") {
  const struct {
    const char *key, *value;
    const char* reported = nullptr;
  } changes[] = {{"architectures", "[\"LlamaForCausalLM\"]"},
                 {"architectures", "[\"DeepseekV32ForCausalLM\"]"},
                 {"model_type", "\"llama\""},
                 {"hidden_act", "\"gelu\""},
                 {"attention_bias", "true"},
                 {"moe_layer_freq", "2"},
                 {"moe_layer_freq", "[0, 1]"},
                 {"moe_layer_freq", "\"1\""},
                 {"scoring_func", "\"softmax\"", "topk_method"},
                 {"scoring_func", "\"tanh\"", "topk_method"},
                 {"topk_method", "\"greedy\""},
                 {"topk_method", "\"\""},
                 {"type", "\"linear\"", "rope_type"},
                 {"type", "\"dynamic\"", "rope_type"},
                 {"type", "\"longrope\"", "rope_type"}};
  for (const auto& c : changes)
    check(std::string(c.key) + " = " + c.value,
          parse_config_json(with_member(c.key, c.value)).status(), Code::kUnsupported,
          c.reported != nullptr ? c.reported : c.key);
  const std::pair<const char*, const char*> additions[] = {
      {R"("index_topk": 2048)", "index_topk"},
      {R"("rope_interleave": false)", "rope_interleave"},
      {R"("quantization_config": {"quant_method": "awq"})", "quant_method"},
      {R"("quantization_config": {"quant_method": "fp8", "fmt": "e5m2",
           "weight_block_size": [128, 128]})",
       "fmt"},
      {R"("quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 128]})",
       "weight_block_size"},
      {R"("quantization_config": {"quant_method": "fp8", "weight_block_size": null})",
       "weight_block_size"},
      {R"("quantization_config": {"quant_method": "fp8"})", "weight_block_size"}};
  for (const auto& [member, key] : additions)
    check(member, parse_config_json(with_extra(member)).status(), Code::kUnsupported, key);
}

TEST_CASE("hostile config.json: the text") {
  using namespace std::string_literals;
  const std::string good(kSmallConfigJson);
  const std::pair<const char*, std::string> cases[] = {
      {"empty", ""},
      {"blank", " \n"},
      {"null", "null"},
      {"an array", "[" + good + "]"},
      {"a string", "\"config\""},
      {"an empty object", "{}"},
      {"NaN", with_member("rms_norm_eps", "NaN")},
      {"Infinity", with_member("rope_theta", "Infinity")},
      {"1e999", with_member("rope_theta", "1e999")},
      {"-1e999", with_member("rope_theta", "-1e999")},
      {"a decimal comma", with_member("routed_scaling_factor", "2,5")},
      {"a comment", "// config\n" + good},
      {"a comma too many", replaced(good, "1.0}", "1.0,}")},
      {"a member twice", with_extra("\"vocab_size\": 6")},
      {"an unknown member twice", with_extra("\"x\": 1, \"x\": 2")},
      {"nested too deep",
       with_extra("\"x\": " + std::string(100'000, '[') + std::string(100'000, ']'))},
      {"UTF-16",
       [&] {
         std::string wide = "\xFF\xFE";
         for (const char c : good) wide += c, wide += '\0';
         return wide;
       }()},
      {"bad UTF-8", with_extra("\"x\": \"\xC3\"")},
      {"a zero byte behind", good + "\0"s},
      {"two objects", good + good},
      {"larger than 16 MB", good + std::string(16 << 20, ' ')},
  };
  for (const auto& [name, text] : cases)
    check(name, parse_config_json(text).status(), Code::kFormat, "");
  // What is unknown is left alone, however long.
  CHECK(parse_config_json(with_extra("\"x\": \"" + std::string(10 << 20, 'x') + "\"")).ok());
  CHECK(parse_config_json(with_member("bos_token_id", "-0")).ok());
  for (size_t n = 0; n < good.size(); ++n)
    CHECK(parse_config_json(good.substr(0, n)).status().code() == Code::kFormat);
}

TEST_CASE("hostile GGUF: hyperparameters") {
  const auto number = [](double v) { return raw<uint32_t>(12) + raw(v); };
  const auto integer = [](int64_t v) { return raw<uint32_t>(11) + raw(v); };
  const auto text = [](std::string_view v) { return raw<uint32_t>(8) + raw_string(v); };
  const struct {
    const char* key;
    std::string value;  // "": the key is removed
    const char* reported = nullptr;
    Code expected = Code::kFormat;
  } cases[] = {
      {"block_count", integer(0)},
      {"block_count", integer(1ll << 31)},
      {"block_count", integer(-1)},
      {"block_count", ""},
      {"block_count", text("2")},
      {"block_count", number(2)},
      {"context_length", integer(0)},
      {"context_length", ""},
      {"embedding_length", integer(0)},
      {"embedding_length", integer(INT64_MAX)},
      {"embedding_length", ""},
      {"embedding_length", integer(16), "token_embd.weight"},
      {"feed_forward_length", integer(-1)},
      {"feed_forward_length", "", "intermediate_size"},
      {"attention.head_count", integer(0)},
      {"attention.head_count", integer(1ll << 40)},
      {"attention.head_count", ""},
      {"attention.head_count", raw<uint32_t>(9) + raw<uint32_t>(4) + raw<uint64_t>(1) + raw(2u)},
      {"attention.layer_norm_rms_epsilon", number(kNan)},
      {"attention.layer_norm_rms_epsilon", number(kInfinity)},
      {"attention.layer_norm_rms_epsilon", number(0)},
      {"attention.layer_norm_rms_epsilon", number(-1e-6)},
      {"attention.layer_norm_rms_epsilon", ""},
      {"rope.freq_base", number(kNan)},
      {"rope.freq_base", number(-kInfinity)},
      {"rope.freq_base", number(0)},
      {"rope.freq_base", number(1), "rope_theta"},
      {"rope.dimension_count", integer(0)},
      {"rope.dimension_count", integer(5), "deepseek2.attention.key_length_mla"},
      {"rope.dimension_count", integer(3), "deepseek2.attention.key_length"},
      {"rope.dimension_count", ""},
      {"rope.scaling.type", text("linear"), nullptr, Code::kUnsupported},
      {"rope.scaling.type", integer(1)},
      {"rope.scaling.factor", number(0)},
      {"rope.scaling.factor", number(kNan)},
      {"rope.scaling.factor", ""},
      {"rope.scaling.original_context_length", integer(0)},
      {"rope.scaling.original_context_length", ""},
      {"rope.scaling.yarn_log_multiplier", number(-1)},
      {"rope.scaling.yarn_log_multiplier", number(kNan)},
      {"rope.scaling.yarn_beta_fast", number(kInfinity)},
      {"rope.scaling.yarn_beta_slow", number(33), "beta_fast"},
      {"attention.q_lora_rank", integer(-1)},
      {"attention.kv_lora_rank", integer(0)},
      {"attention.kv_lora_rank", integer(1ll << 40)},
      {"attention.kv_lora_rank", ""},
      {"attention.kv_lora_rank", integer(5), "deepseek2.attention.key_length"},
      {"attention.key_length_mla", integer(2)},
      {"attention.key_length_mla", integer(-1)},
      {"attention.value_length_mla", integer(0)},
      {"attention.value_length_mla", ""},
      {"attention.key_length", integer(7)},
      {"attention.value_length", integer(3)},
      {"vocab_size", integer(0)},
      {"vocab_size", integer(7), "token_embd.weight"},
      {"vocab_size", integer(5), "token_embd.weight"},
      {"vocab_size", integer(-1)},
      {"expert_count", integer(-1)},
      {"expert_count", integer(1ll << 40)},
      {"expert_count", integer(1), "deepseek2.expert_used_count"},
      {"expert_count", integer(5), "n_group"},
      {"expert_used_count", integer(0)},
      {"expert_used_count", integer(5)},
      {"expert_used_count", integer(3), "topk_group"},
      {"expert_used_count", ""},
      {"expert_shared_count", integer(-1)},
      {"expert_feed_forward_length", integer(0)},
      {"expert_feed_forward_length", ""},
      {"expert_group_count", integer(0)},
      {"expert_group_count", integer(3), "n_group"},
      {"expert_group_count", integer(4), "topk_group"},
      {"expert_group_used_count", integer(0)},
      {"expert_group_used_count", integer(3)},
      {"expert_group_used_count", ""},
      {"expert_gating_func", integer(3), nullptr, Code::kUnsupported},
      {"expert_gating_func", integer(1), nullptr, Code::kUnsupported},  // there is a bias
      {"expert_gating_func", integer(-1)},
      {"expert_weights_scale", number(-1)},
      {"expert_weights_scale", number(kNan)},
      {"expert_weights_scale", number(1e30)},
      {"expert_weights_norm", integer(1)},
      {"leading_dense_block_count", integer(3)},
      {"leading_dense_block_count", integer(-1)},
      {"nextn_predict_layers", integer(2)},
      {"nextn_predict_layers", integer(-1)}};
  std::set<std::string> names;
  for (const auto& c : cases) {
    const std::string key = "deepseek2." + std::string(c.key);
    RawGguf f = small_gguf();
    if (c.value.empty())
      f.erase(key);
    else
      f.set(key, c.value);
    names.insert(key + c.value);
    check(key, TensorFile::parse_gguf(source_of(f.bytes())).status(), c.expected,
          c.reported == nullptr ? key : c.reported);
  }
  CHECK(names.size() >= 80);
}

TEST_CASE("hostile GGUF: embeddings that do not fit") {
  RawGguf f = small_gguf();
  SECTION("missing") {
    f.tensor("token_embd.weight").name = "token_embd.bias";
    check("", TensorFile::parse_gguf(source_of(f.bytes())).status(), Code::kFormat,
          "token_embd.weight");
  }
  SECTION("one dimension") {
    f.tensor("token_embd.weight").dims = {48};
    f.erase("deepseek2.vocab_size");
    check("", TensorFile::parse_gguf(source_of(f.bytes())).status(), Code::kFormat,
          "token_embd.weight");
  }
  SECTION("three dimensions") {
    f.tensor("token_embd.weight").dims = {8, 3, 2};
    check("", TensorFile::parse_gguf(source_of(f.bytes())).status(), Code::kFormat,
          "token_embd.weight");
  }
  SECTION("output matrix of another size") {
    f.tensor("output.weight").dims = {8, 5};
    check("", TensorFile::parse_gguf(source_of(f.bytes())).status(), Code::kFormat,
          "output.weight");
  }
}

TEST_CASE("products of values in their bounds may still be too large") {
  RawGguf f = small_gguf();
  f.set_u32("deepseek2.expert_shared_count", 4096);
  f.set_u32("deepseek2.expert_feed_forward_length", 1 << 20);
  check("", TensorFile::parse_gguf(source_of(f.bytes())).status(), Code::kFormat,
        "n_shared_experts");
}
