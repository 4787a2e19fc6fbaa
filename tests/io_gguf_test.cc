// GGUF files that are right: what is read from them.  Files that are not: io_hostile_*_test.cc.
#include <catch2/catch.hpp>
#include <map>

#include "io_raw_files.h"
#include "lib/io/gguf_header.h"
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

TensorFile parsed(const RawGguf& gguf) {
  Result<TensorFile> file = TensorFile::parse_gguf(source_of(gguf.bytes()));
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

std::string piece(const TokenizerSource& t, size_t i) {
  const uint32_t begin = i == 0 ? 0 : t.piece_end[i - 1];
  return t.pieces.substr(begin, t.piece_end[i] - begin);
}

bool has_remark(const ModelConfig& config, std::string_view part) {
  for (const std::string& remark : config.remarks)
    if (remark.find(part) != std::string::npos) return true;
  return false;
}

}  // namespace

TEST_CASE("a small file, field by field") {
  const RawGguf raw = small_gguf();
  const std::string bytes = raw.bytes();
  const TensorFile file = parsed(raw);
  CHECK(file.format() == FileFormat::kGguf);
  CHECK(file.total_bytes() == static_cast<int64_t>(bytes.size()));

  REQUIRE(file.tensors().size() == 4);
  CHECK(file.tensors()[0].name == "blk.1.exp_probs_b.bias");  // sorted by name
  const TensorInfo* output = file.find("output.weight");
  REQUIRE(output != nullptr);
  CHECK(output->dtype == DType::kF32);
  CHECK(output->n_dims == 2);
  CHECK(output->shape[0] == 6);  // outermost first
  CHECK(output->shape[1] == 8);
  CHECK(output->cols() == 8);
  CHECK(output->elements() == 48);
  CHECK(output->bytes == 192);
  // The data begins at the next multiple of 32 behind the header; 192 and 32 bytes come before.
  const int64_t data = (static_cast<int64_t>(raw.header().size()) + 31) / 32 * 32;
  CHECK(output->offset == data + 192 + 32);
  CHECK(std::memcmp(read_tensor(file, *output).data(), bytes.data() + output->offset, 192) == 0);
  CHECK(file.find("output.weigh") == nullptr);
  CHECK(file.find("") == nullptr);

  std::byte two[2];
  CHECK(file.read(*output, 190, two).ok());
  CHECK(std::memcmp(two, bytes.data() + output->offset + 190, 2) == 0);
  check_refused(file.read(*output, 191, two), Code::kInvalidArgument);
  check_refused(file.read(*output, -1, two), Code::kInvalidArgument);
  check_refused(file.read(*output, INT64_MAX, two), Code::kInvalidArgument);

  const TokenizerSource& t = file.tokenizer();
  CHECK(t.gguf_model == "gpt2");
  CHECK(t.gguf_pre == "deepseek-v3");
  REQUIRE(t.piece_end.size() == 5);
  CHECK(piece(t, 1) == "</s>");
  CHECK(piece(t, 4) == "ab");
  CHECK(t.token_type == std::vector<int32_t>{3, 3, 1, 1, 1});
  CHECK(t.merges == "a b");
  CHECK(t.merge_end == std::vector<uint32_t>{3});
  CHECK(t.bos_token_id == 0);
  CHECK(t.eos_token_id == 1);
  CHECK(t.add_bos_token);
  CHECK_FALSE(t.add_eos_token);
  CHECK(t.json_path.empty());

  CHECK(file.metadata().size() == raw.keys.size());
  CHECK(file.metadata()[0].first == "general.architecture");  // file order
  CHECK(metadata_of(file, "general.name") == "small");
  CHECK(metadata_of(file, "deepseek2.block_count") == "2");
  CHECK(metadata_of(file, "deepseek2.attention.layer_norm_rms_epsilon") == "1e-06");
  CHECK(metadata_of(file, "deepseek2.expert_weights_norm") == "true");
  CHECK(metadata_of(file, "tokenizer.ggml.tokens") == "[5 values]");
}

TEST_CASE("every value type, version 2, and another alignment") {
  RawGguf raw = small_gguf();
  raw.version = 2;
  raw.alignment = 128;
  raw.set_u32("general.alignment", 128);
  raw.set("t.u8", ::raw<uint32_t>(0) + ::raw<uint8_t>(200));
  raw.set("t.i8", ::raw<uint32_t>(1) + ::raw<int8_t>(-100));
  raw.set_u16("t.u16", 60000);
  raw.set("t.i16", ::raw<uint32_t>(3) + ::raw<int16_t>(-30000));
  raw.set_u32("t.u32", 4000000000u);
  raw.set_i32("t.i32", -2000000000);
  raw.set_u64("t.u64", UINT64_MAX);
  raw.set("t.i64", ::raw<uint32_t>(11) + ::raw<int64_t>(INT64_MIN));
  raw.set("t.f64", ::raw<uint32_t>(12) + ::raw<double>(0.1));
  raw.set_bool("t.no", 0);
  raw.set_string("t.text",
                 "Gr\xC3\xBC\xC3\x9F"
                 "e");
  raw.set("t.u64s",
          ::raw<uint32_t>(9) + ::raw<uint32_t>(10) + ::raw<uint64_t>(3) + std::string(24, 'x'));
  raw.set("t.none", ::raw<uint32_t>(9) + ::raw<uint32_t>(8) + ::raw<uint64_t>(0));
  const TensorFile file = parsed(raw);
  const std::map<std::string, std::string> expected = {{"t.u8", "200"},
                                                       {"t.i8", "-100"},
                                                       {"t.u16", "60000"},
                                                       {"t.i16", "-30000"},
                                                       {"t.u32", "4000000000"},
                                                       {"t.i32", "-2000000000"},
                                                       {"t.u64", "18446744073709551615"},
                                                       {"t.i64", "-9223372036854775808"},
                                                       {"t.f64", "0.1"},
                                                       {"t.no", "false"},
                                                       {"t.text",
                                                        "Gr\xC3\xBC\xC3\x9F"
                                                        "e"},
                                                       {"t.u64s", "[3 values]"},
                                                       {"t.none", "[0 values]"}};
  for (const auto& [key, text] : expected) {
    INFO(key);
    CHECK(metadata_of(file, key) == text);
  }
  CHECK(file.find("output.weight")->offset % 128 == 0);
}

TEST_CASE("integers of any width are read as configuration") {
  RawGguf raw = small_gguf();
  raw.set_u64("deepseek2.block_count", 2);
  raw.set_u16("deepseek2.expert_count", 4);
  raw.set_i32("deepseek2.embedding_length", 8);
  raw.set_u32("deepseek2.rope.freq_base", 10000);
  raw.set("deepseek2.expert_weights_scale", ::raw<uint32_t>(12) + ::raw<double>(2.5));
  const TensorFile file = parsed(raw);
  CHECK(file.config().num_hidden_layers == 2);
  CHECK(file.config().n_routed_experts == 4);
  CHECK(file.config().rope_theta == 10000);
  CHECK(file.config().routed_scaling_factor == 2.5);
}

TEST_CASE("files without a model have no config") {
  SECTION("a vocabulary, whatever its architecture") {
    RawGguf raw = small_gguf();
    raw.tensors.clear();
    raw.set_string("general.architecture", "llama");
    const TensorFile file = parsed(raw);
    CHECK_FALSE(file.has_config());
    CHECK(file.tokenizer().piece_end.size() == 5);
  }
  SECTION("tensors without keys") {
    RawGguf raw;
    raw.set_string("general.architecture", "deepseek2");
    raw.add_f32("x", {3});
    const TensorFile file = parsed(raw);
    CHECK_FALSE(file.has_config());
    CHECK(file.tensors().size() == 1);
  }
  SECTION("nothing at all") {
    RawGguf raw;
    raw.set_string("general.architecture", "deepseek2");
    CHECK(parsed(raw).tensors().empty());
  }
}

TEST_CASE("layers for multi-token prediction are left out") {
  RawGguf raw = small_gguf();
  raw.set_u32("deepseek2.block_count", 3);
  raw.set_u32("deepseek2.nextn_predict_layers", 1);
  raw.add_f32("blk.2.nextn.eh_proj.weight", {8, 8});
  raw.add_f32("blk.2.attn_norm.weight", {8});
  const TensorFile file = parsed(raw);
  CHECK(file.config().num_hidden_layers == 2);
  CHECK(file.tensors().size() == 4);
  CHECK(file.find("blk.2.attn_norm.weight") == nullptr);
  CHECK(has_remark(file.config(), "2 tensors of layers from 2 on"));
}

TEST_CASE("the fingerprint tells models apart") {
  const auto print = [](const std::string& bytes) {
    Result<TensorFile> file = TensorFile::parse_gguf(source_of(bytes));
    REQUIRE(file.ok());
    return std::pair(file->fingerprint().lo, file->fingerprint().hi);
  };
  const std::string base = small_gguf().bytes();
  CHECK(print(base) == print(base));
  RawGguf other = small_gguf();
  other.set_string("general.name", "smalk");
  CHECK(print(base) != print(other.bytes()));
  CHECK(print(base) != print(base + std::string(32, '\0')));  // the size counts
  std::string tuned = base;  // the headers are the same, a weight is not
  tuned[tuned.size() - 10] ^= 1;
  CHECK(print(base) != print(tuned));
}

TEST_CASE("golden files have the configuration of their checkpoints") {
  const struct {
    const char *gguf, *folder;
    bool tells_groups;
  } pairs[] = {
      {"gguf/tiny-v2.new.BF16.gguf", "models/tiny-v2", true},
      {"gguf/tiny-v2.old.F16.gguf", "models/tiny-v2", false},
      {"gguf/tiny-v2-lite.old.F16.gguf", "models/tiny-v2-lite", true},  // it has no groups
      {"gguf/tiny-v2-lite.mid.F16.gguf", "models/tiny-v2-lite", true},
      {"gguf/tiny-v2-lite.split-00001-of-00003.gguf", "models/tiny-v2-lite", true},
      {"gguf/tiny-v3.new.BF16.gguf", "models/tiny-v3", true},
      {"trained/trained.Q8_0.gguf", "trained/model", true},
  };
  for (const auto& [gguf, folder, tells_groups] : pairs) {
    if (!std::filesystem::exists(test_data(folder) + "/config.json")) {
      WARN("not in this copy of the test data: " << folder);
      continue;
    }
    INFO(gguf);
    const TensorFile file = opened(test_data(gguf));
    const TensorFile checkpoint = opened(test_data(folder));
    REQUIRE(file.has_config());
    const ModelConfig &a = file.config(), &b = checkpoint.config();
    CHECK(a.architecture == "deepseek2");
    CHECK(a.vocab_size == b.vocab_size);
    CHECK(a.hidden_size == b.hidden_size);
    CHECK(a.num_hidden_layers == b.num_hidden_layers);
    CHECK(a.num_attention_heads == b.num_attention_heads);
    CHECK(a.max_position_embeddings == b.max_position_embeddings);
    CHECK(a.rms_norm_eps == Approx(b.rms_norm_eps));
    CHECK(a.rope_theta == b.rope_theta);
    CHECK(a.tie_word_embeddings == b.tie_word_embeddings);
    CHECK(a.q_lora_rank == b.q_lora_rank);
    CHECK(a.kv_lora_rank == b.kv_lora_rank);
    CHECK(a.qk_nope_head_dim == b.qk_nope_head_dim);
    CHECK(a.qk_rope_head_dim == b.qk_rope_head_dim);
    CHECK(a.v_head_dim == b.v_head_dim);
    CHECK(a.intermediate_size == b.intermediate_size);
    CHECK(a.first_k_dense_replace == b.first_k_dense_replace);
    CHECK(a.moe_intermediate_size == b.moe_intermediate_size);
    CHECK(a.n_routed_experts == b.n_routed_experts);
    CHECK(a.num_experts_per_tok == b.num_experts_per_tok);
    CHECK(a.n_shared_experts == b.n_shared_experts);
    CHECK(a.scoring_func == b.scoring_func);
    CHECK(a.norm_topk_prob == b.norm_topk_prob);
    CHECK(a.routed_scaling_factor == b.routed_scaling_factor);
    CHECK(a.bos_token_id == b.bos_token_id);
    CHECK(a.eos_token_id == b.eos_token_id);
    CHECK(a.yarn.enabled == b.yarn.enabled);
    CHECK(a.yarn.factor == b.yarn.factor);
    CHECK(a.yarn.original_max_position_embeddings == b.yarn.original_max_position_embeddings);
    CHECK(a.yarn.beta_fast == b.yarn.beta_fast);
    CHECK(a.yarn.beta_slow == b.yarn.beta_slow);
    CHECK(a.yarn.mscale == b.yarn.mscale);  // exactly: 0.707 comes back from 0.0707f
    CHECK(a.yarn.mscale_all_dim == b.yarn.mscale_all_dim);
    if (tells_groups) {
      CHECK(a.n_group == b.n_group);
      CHECK(a.topk_group == b.topk_group);
      CHECK(a.topk_method == b.topk_method);
    } else {
      CHECK(a.n_group == 1);
      CHECK(a.topk_method == TopkMethod::kGreedy);
      CHECK(has_remark(a, "does not tell its expert groups"));
    }
  }
}

TEST_CASE("all golden GGUF files open, and their tensors are inside") {
  int n_files = 0;
  for (const char* folder : {"gguf", "quant", "trained", "tokenizers"})
    for (const auto& entry : std::filesystem::directory_iterator(test_data(folder))) {
      const std::string path = entry.path().string();
      if (!path.ends_with(".gguf") || path.find("-00002-") != path.npos ||
          path.find("-00003-") != path.npos)
        continue;
      INFO(path);
      ++n_files;
      const TensorFile file = opened(path);
      const bool is_vocabulary = path.find("ggml-vocab") != path.npos;
      CHECK(file.tensors().empty() == is_vocabulary);
      CHECK(file.has_config() == (!is_vocabulary && path.find("blocks.gguf") == path.npos));
      if (is_vocabulary) CHECK(file.tokenizer().merge_end.size() > 30'000);
      if (file.has_config()) {
        CHECK(file.find("token_embd.weight") != nullptr);
        CHECK(file.tokenizer().piece_end.size() == static_cast<size_t>(file.config().vocab_size));
      }
      for (const TensorInfo& tensor : file.tensors()) {
        std::byte last;
        CHECK(tensor.bytes ==
              tensor.elements() / tensor.cols() * row_bytes(tensor.dtype, tensor.cols()));
        CHECK(file.read(tensor, tensor.bytes - 1, std::span(&last, 1)).ok());
      }
    }
  CHECK(n_files >= 15);
}

TEST_CASE("a split file equals its checkpoint") {
  // The GGUF's BF16 weights are those of the sharded checkpoint; the embeddings are stored alike.
  const TensorFile split = opened(test_data("gguf/tiny-v2-lite.split-00001-of-00003.gguf"));
  const TensorFile shards = opened(test_data("models/tiny-v2-lite-sharded"));
  CHECK(split.tensors().size() == 44);
  const std::pair<const char*, const char*> same[] = {
      {"token_embd.weight", "model.embed_tokens.weight"},
      {"output.weight", "lm_head.weight"},
      {"blk.1.attn_output.weight", "model.layers.1.self_attn.o_proj.weight"},
      {"blk.2.ffn_down_shexp.weight", "model.layers.2.mlp.shared_experts.down_proj.weight"}};
  for (const auto& [a, b] : same) {
    INFO(a);
    REQUIRE(split.find(a) != nullptr);
    REQUIRE(shards.find(b) != nullptr);
    CHECK(read_tensor(split, *split.find(a)) == read_tensor(shards, *shards.find(b)));
  }
  int64_t bytes = 0;
  for (const char* part : {"1", "2", "3"})
    bytes += static_cast<int64_t>(std::filesystem::file_size(
        test_data("gguf/tiny-v2-lite.split-0000") + part + "-of-00003.gguf"));
  CHECK(split.total_bytes() == bytes);
}

TEST_CASE("a file cut in three is the same file") {
  const RawGguf whole = small_gguf();
  const TemporaryFolder folder;
  folder.write("whole.gguf", whole.bytes());
  for (int i = 0; i < 3; ++i) {
    RawGguf part;
    if (i == 0) part.keys = whole.keys;
    part.set_u16("split.no", static_cast<uint16_t>(i));
    part.set_u16("split.count", 3);
    part.set_i32("split.tensors.count", 4);
    // As llama.cpp's gguf-split may do, the first part has no tensors.
    if (i == 1) part.tensors = {whole.tensors[0], whole.tensors[1]};
    if (i == 2) part.tensors = {whole.tensors[2], whole.tensors[3]};
    folder.write("cut-0000" + std::to_string(i + 1) + "-of-00003.gguf", part.bytes());
  }
  const TensorFile a = opened(folder / "whole.gguf");
  const TensorFile b = opened(folder / "cut-00001-of-00003.gguf");
  REQUIRE(a.tensors().size() == b.tensors().size());
  for (size_t i = 0; i < a.tensors().size(); ++i) {
    CHECK(a.tensors()[i].name == b.tensors()[i].name);
    CHECK(a.tensors()[i].bytes == b.tensors()[i].bytes);
    CHECK(a.tensors()[i].elements() == b.tensors()[i].elements());
  }
  CHECK(b.config().hidden_size == 8);
  CHECK(b.tokenizer().pieces == a.tokenizer().pieces);
}

TEST_CASE("the header of a 671B file is read in a fraction of a second") {
  RawGguf raw = small_gguf();
  std::vector<std::string> pieces, merges;
  for (int i = 0; i < 128'000; ++i) {
    pieces.push_back("piece" + std::to_string(i * 7919));
    merges.push_back("left" + std::to_string(i) + " right" + std::to_string(i));
  }
  raw.set_strings("tokenizer.ggml.tokens", pieces);
  raw.set_strings("tokenizer.ggml.merges", merges);
  raw.erase("tokenizer.ggml.token_type");
  raw.set_u32("deepseek2.vocab_size", 128'000);
  raw.tensor("token_embd.weight").dims[1] = 128'000;
  raw.tensor("token_embd.weight").bytes = 4 * 8 * 128'000;
  raw.tensor("output.weight").dims[1] = 128'000;
  raw.tensor("output.weight").bytes = 4 * 8 * 128'000;
  for (int i = 0; i < 1100; ++i)
    raw.add_f32("blk." + std::to_string(i % 2) + ".tensor" + std::to_string(i) + ".weight", {8});
  const auto source = source_of(raw.bytes());
  const CpuTimer timer;
  Result<TensorFile> file = TensorFile::parse_gguf(source);
  const double seconds = timer.seconds();
  INFO(file.status().message());
  REQUIRE(file.ok());
  CHECK(piece(file->tokenizer(), 127'999) == pieces.back());
  // About 15 ms; the bound leaves room for sanitizers and a busy machine.
  CHECK(seconds < 0.5);
}
