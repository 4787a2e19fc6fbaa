// Files for the reader tests, byte by byte, so that every field can be given any value: what
// support/mini_writer.h, which writes valid files, cannot do.  The base files are the smallest that
// are read without complaint; each test spoils one thing.
#pragma once

#include <stdlib.h>

#include <catch2/catch.hpp>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lib/io/tensor_file.h"
#include "lib/io/text.h"

namespace fathom::test {

// Values as the file has them, little-endian.
template <class T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}
inline std::string raw_string(std::string_view text) {
  return raw<uint64_t>(text.size()).append(text);
}

inline std::shared_ptr<io::ByteSource> source_of(std::string_view bytes,
                                                 std::string name = "test.file") {
  const auto* begin = reinterpret_cast<const std::byte*>(bytes.data());
  return io::memory_source(std::move(name), std::vector<std::byte>(begin, begin + bytes.size()));
}

// A GGUF file.  A key is its value's type and bytes; a tensor knows its place only when told.
struct RawGguf {
  struct Key {
    std::string name, value;  // value: type number and bytes
  };
  struct Tensor {
    std::string name;
    std::vector<uint64_t> dims;  // innermost first, as the file has them
    uint32_t type = 0;
    std::optional<uint64_t> offset;  // default: behind the tensors before it
    std::optional<uint32_t> n_dims;  // default: dims.size()
    uint64_t bytes = 0;              // that it takes
  };
  std::string magic = "GGUF";
  uint32_t version = 3;
  std::optional<uint64_t> n_tensors, n_keys;
  std::vector<Key> keys;
  std::vector<Tensor> tensors;
  uint64_t alignment = 32;
  int64_t extra_data = 0;  // bytes behind the last tensor; negative: the data is cut short

  void set(std::string name, std::string value) {
    for (Key& key : keys)
      if (key.name == name) {
        key.value = std::move(value);
        return;
      }
    keys.push_back({std::move(name), std::move(value)});
  }
  void set_u32(std::string name, uint32_t v) { set(std::move(name), raw<uint32_t>(4) + raw(v)); }
  void set_u64(std::string name, uint64_t v) { set(std::move(name), raw<uint32_t>(10) + raw(v)); }
  void set_i32(std::string name, int32_t v) { set(std::move(name), raw<uint32_t>(5) + raw(v)); }
  void set_u16(std::string name, uint16_t v) { set(std::move(name), raw<uint32_t>(2) + raw(v)); }
  void set_f32(std::string name, float v) { set(std::move(name), raw<uint32_t>(6) + raw(v)); }
  void set_bool(std::string name, uint8_t v) { set(std::move(name), raw<uint32_t>(7) + raw(v)); }
  void set_string(std::string name, std::string_view v) {
    set(std::move(name), raw<uint32_t>(8) + raw_string(v));
  }
  void set_strings(std::string name, const std::vector<std::string>& values) {
    std::string value = raw<uint32_t>(9) + raw<uint32_t>(8) + raw<uint64_t>(values.size());
    for (const std::string& text : values) value += raw_string(text);
    set(std::move(name), std::move(value));
  }
  void erase(std::string_view name) {
    const size_t erased = std::erase_if(keys, [&](const Key& key) { return key.name == name; });
    REQUIRE(erased == 1);
  }
  Tensor& tensor(std::string_view name) {
    for (Tensor& t : tensors)
      if (t.name == name) return t;
    FAIL("no tensor " << name);
    return tensors[0];
  }
  void add_f32(std::string name, std::vector<uint64_t> dims) {
    uint64_t bytes = 4;
    for (const uint64_t dim : dims) bytes *= dim;
    tensors.push_back({.name = std::move(name),
                       .dims = std::move(dims),
                       .type = 0,
                       .offset = {},
                       .n_dims = {},
                       .bytes = bytes});
  }

  // Everything before the padding.
  std::string header() const {
    std::string out = magic + raw(version) + raw(n_tensors.value_or(tensors.size())) +
                      raw(n_keys.value_or(keys.size()));
    for (const Key& key : keys) out += raw_string(key.name) + key.value;
    uint64_t offset = 0;
    for (const Tensor& t : tensors) {
      out += raw_string(t.name) + raw<uint32_t>(t.n_dims.value_or(t.dims.size()));
      for (const uint64_t dim : t.dims) out += raw(dim);
      out += raw(t.type) + raw(t.offset.value_or(offset));
      offset += (t.bytes + alignment - 1) / alignment * alignment;
    }
    return out;
  }
  std::string bytes() const {
    std::string out = header();
    uint64_t data = 0;
    for (const Tensor& t : tensors) data = (data + alignment - 1) / alignment * alignment + t.bytes;
    if (tensors.empty()) return out;
    out.append((alignment - out.size() % alignment) % alignment, '\0');
    const size_t n = static_cast<size_t>(static_cast<int64_t>(data) + extra_data);
    for (size_t i = 0; i < n; ++i) out += static_cast<char>(i * 7);
    return out;
  }
};

// A model of the newer key layout with two layers, four experts and the tensors that the readers
// look at (the others are the business of lib/nn).
inline RawGguf small_gguf() {
  RawGguf f;
  f.set_string("general.architecture", "deepseek2");
  f.set_string("general.name", "small");
  f.set_u32("deepseek2.block_count", 2);
  f.set_u32("deepseek2.context_length", 64);
  f.set_u32("deepseek2.embedding_length", 8);
  f.set_u32("deepseek2.feed_forward_length", 12);
  f.set_u32("deepseek2.attention.head_count", 2);
  f.set_f32("deepseek2.rope.freq_base", 10000);
  f.set_f32("deepseek2.attention.layer_norm_rms_epsilon", 1e-6f);
  f.set_u32("deepseek2.expert_used_count", 2);
  f.set_u32("deepseek2.expert_group_count", 2);
  f.set_u32("deepseek2.expert_group_used_count", 1);
  f.set_u32("deepseek2.expert_gating_func", 2);
  f.set_u32("deepseek2.leading_dense_block_count", 1);
  f.set_u32("deepseek2.vocab_size", 6);
  f.set_u32("deepseek2.attention.q_lora_rank", 4);
  f.set_u32("deepseek2.attention.kv_lora_rank", 4);
  f.set_u32("deepseek2.attention.key_length", 6);
  f.set_u32("deepseek2.attention.value_length", 4);
  f.set_u32("deepseek2.attention.key_length_mla", 5);
  f.set_u32("deepseek2.attention.value_length_mla", 3);
  f.set_u32("deepseek2.expert_feed_forward_length", 5);
  f.set_u32("deepseek2.expert_count", 4);
  f.set_u32("deepseek2.expert_shared_count", 1);
  f.set_f32("deepseek2.expert_weights_scale", 2.5f);
  f.set_bool("deepseek2.expert_weights_norm", 1);
  f.set_u32("deepseek2.rope.dimension_count", 2);
  f.set_string("deepseek2.rope.scaling.type", "yarn");
  f.set_f32("deepseek2.rope.scaling.factor", 40);
  f.set_u32("deepseek2.rope.scaling.original_context_length", 16);
  f.set_f32("deepseek2.rope.scaling.yarn_log_multiplier", 0.1f);
  f.set_string("tokenizer.ggml.model", "gpt2");
  f.set_string("tokenizer.ggml.pre", "deepseek-v3");
  f.set_strings("tokenizer.ggml.tokens", {"<s>", "</s>", "a", "b", "ab"});
  f.set("tokenizer.ggml.token_type", raw<uint32_t>(9) + raw<uint32_t>(5) + raw<uint64_t>(5) +
                                         raw<int32_t>(3) + raw<int32_t>(3) + raw<int32_t>(1) +
                                         raw<int32_t>(1) + raw<int32_t>(1));
  f.set_strings("tokenizer.ggml.merges", {"a b"});
  f.set_u32("tokenizer.ggml.bos_token_id", 0);
  f.set_u32("tokenizer.ggml.eos_token_id", 1);
  f.set_bool("tokenizer.ggml.add_bos_token", 1);
  f.add_f32("token_embd.weight", {8, 6});
  f.add_f32("output_norm.weight", {8});
  f.add_f32("output.weight", {8, 6});
  f.add_f32("blk.1.exp_probs_b.bias", {4});
  return f;
}

// A safetensors file: header text and data.
struct RawSafetensors {
  std::string json;
  int64_t n_data = 0;
  std::optional<uint64_t> length;  // default: that of the text

  std::string bytes() const {
    std::string out = raw<uint64_t>(length.value_or(json.size())) + json;
    for (int64_t i = 0; i < n_data; ++i) out += static_cast<char>(i * 5);
    return out;
  }
};

// What TensorFile::open reads from a folder of that kind; vocabulary 6, hidden size 8.
inline constexpr std::string_view kSmallConfigJson = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
  "attention_bias": false, "hidden_act": "silu", "moe_layer_freq": 1,
  "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64,
  "rms_norm_eps": 1e-06, "rope_theta": 10000, "tie_word_embeddings": false,
  "norm_topk_prob": true, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
  "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
  "vocab_size": 6, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
  "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2,
  "v_head_dim": 3, "intermediate_size": 12, "moe_intermediate_size": 5, "n_routed_experts": 4,
  "num_experts_per_tok": 2, "n_shared_experts": 1, "num_nextn_predict_layers": 1,
  "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16,
                   "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
})";

inline RawSafetensors small_safetensors() {
  return {
      .json =
          R"({"__metadata__":{"format":"pt"},)"
          R"("model.embed_tokens.weight":{"dtype":"F32","shape":[6,8],"data_offsets":[0,192]},)"
          R"("lm_head.weight":{"dtype":"BF16","shape":[6,8],"data_offsets":[192,288]},)"
          R"("model.norm.weight":{"dtype":"F16","shape":[8],"data_offsets":[288,304]},)"
          R"("model.layers.2.eh_proj.weight":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[304,308]}})",
      .n_data = 308,
      .length = {}};
}

// A folder that is gone at the end of the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "fathom-test-XXXXXX").string();
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(std::string_view name) const { return path_ + "/" + std::string(name); }
  void write(std::string_view name, std::string_view bytes) const {
    std::ofstream file(*this / name, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    REQUIRE(file.good());
  }

 private:
  std::string path_;
};

// Replaces the one occurrence of `from`; fails the test when there is none or another.
inline std::string replaced(std::string text, std::string_view from, std::string_view to) {
  const size_t at = text.find(from);
  REQUIRE(at != text.npos);
  REQUIRE(text.find(from, at + 1) == text.npos);
  return text.replace(at, from.size(), to);
}

// Processor time of this process: unlike the clock on the wall it does not count other programs.
class CpuTimer {
 public:
  double seconds() const { return static_cast<double>(std::clock() - start_) / CLOCKS_PER_SEC; }

 private:
  std::clock_t start_ = std::clock();
};

// A refusal of the expected kind that says something, and says nothing twice.
inline void check_refused(const Status& status, Code expected) {
  INFO("message: " << status.message());
  CHECK(code_name(status.code()) == std::string(code_name(expected)));
  CHECK_FALSE(status.message().empty());
  CHECK(status.message().size() < 3000);
  CHECK(io::is_plain_name(status.message()));  // nothing that a terminal would obey
}

}  // namespace fathom::test
