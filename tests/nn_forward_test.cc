// The model's mathematics over the reference backend (double precision), against the goldens:
// logits, residual stream, routing, greedy tokens, both forms of attention, every file layout.
#include <catch2/catch.hpp>

#include <algorithm>

#include "lib/io/tensor_file.h"
#include "lib/nn/forward.h"
#include "support/golden.h"
#include "support/reference_backend.h"

namespace fathom {
namespace {

// A loaded model with one stage on the reference backend and an f32 cache of 64-row pages.
class ReferenceModel final : public nn::RowSourceOf {
 public:
  explicit ReferenceModel(const std::string& path, int64_t max_tokens = 400)
      : file(open(path)), max_tokens_(max_tokens) {
    devices_.push_back(test::make_reference_backend());
    placement_ = Placement::by_layer(
        config(), std::vector<int>(static_cast<size_t>(config().num_hidden_layers), 0));
    auto map = nn::WeightMap::create(file, placement_, devices_);
    INFO(map.status().message());
    REQUIRE(map.ok());
    for (Purpose purpose : {Purpose::kWeights, Purpose::kExperts}) {
      Arena counting;
      map->carve(0, purpose, counting);
      blocks_.emplace_back(static_cast<size_t>(counting.peak_bytes() / 4 + 16));
      Arena arena(aligned(blocks_.back()), counting.peak_bytes());
      map->carve(0, purpose, arena);
    }
    std::vector<std::byte> staging(static_cast<size_t>(map->staging_bytes()));
    for (const nn::WeightItem& item : map->items()) {
      Status s = map->load(file, item, *devices_[0], staging, {});
      INFO(item.name << ": " << s.message());
      REQUIRE(s.ok());
    }
    weights_ = std::move(*map).take_weights();
    rope_ = nn::make_rope(config());

    layout_ = {64, config().kv_lora_rank, config().qk_rope_head_dim};
    const int64_t pages = (max_tokens + 63) / 64;
    const int64_t page_bytes = layout_.page_bytes(KvType::kF32, config().num_hidden_layers);
    cache_.resize(static_cast<size_t>(pages * page_bytes));
    for (int64_t i = 0; i < pages; ++i)
      pages_.push_back({cache_.data() + i * page_bytes, KvType::kF32});

    Arena counting;
    nn::Scratch::carve(counting, config(), max_tokens);
    blocks_.emplace_back(static_cast<size_t>(counting.peak_bytes() / 4 + 16));
    Arena arena(aligned(blocks_.back()), counting.peak_bytes());
    stage_.device = devices_[0].get();
    stage_.scratch = nn::Scratch::carve(arena, config(), max_tokens);
  }

  const ModelConfig& config() const { return file.config(); }
  KvRows rows(int, int64_t slot, int64_t n_rows) const noexcept override {
    return {pages_.data(), layout_, slot, 0, n_rows};
  }

  // Appends `tokens` in one pass; logits of all its rows.
  std::vector<float> pass(std::span<const int32_t> tokens, AttentionForm form,
                          const nn::Trace* trace = nullptr) {
    REQUIRE(n_tokens_ + static_cast<int64_t>(tokens.size()) <= max_tokens_);
    const nn::Sequence sequence{this, 0, static_cast<int64_t>(tokens.size()), n_tokens_};
    const nn::ForwardParams params{.config = config(),
                                   .rope = rope_,
                                   .weights = *weights_,
                                   .placement = placement_,
                                   .stages = {&stage_, 1},
                                   .tokens = tokens,
                                   .sequences = {&sequence, 1},
                                   .form = form,
                                   .trace = trace};
    REQUIRE(nn::forward(params).ok());
    std::vector<float> logits;
    const auto n = static_cast<int64_t>(tokens.size());
    for (int64_t row = 0; row < n; row += nn::kLogitRows) {
      const int64_t count = std::min(nn::kLogitRows, n - row);
      REQUIRE(nn::forward_logits(params, row, count).ok());
      logits.insert(logits.end(), stage_.scratch.logits,
                    stage_.scratch.logits + count * config().vocab_size);
    }
    n_tokens_ += n;
    return logits;
  }
  void reset() { n_tokens_ = 0; }

  io::TensorFile file;

 private:
  static io::TensorFile open(const std::string& path) {
    auto opened = io::TensorFile::open(path);
    INFO(path << ": " << opened.status().message());
    REQUIRE(opened.ok());
    return std::move(opened).value();
  }
  static void* aligned(std::vector<float>& block) {
    const auto at = reinterpret_cast<uintptr_t>(block.data());
    return reinterpret_cast<void*>((at + 63) / 64 * 64);
  }

  int64_t max_tokens_, n_tokens_ = 0;
  std::vector<std::unique_ptr<Backend>> devices_;
  Placement placement_;
  std::vector<std::vector<float>> blocks_;
  std::vector<std::byte> cache_;
  std::vector<KvPage> pages_;
  KvLayout layout_;
  nn::Rope rope_;
  std::unique_ptr<nn::Weights> weights_;
  nn::Stage stage_;
};

// golden/README.md: f32 engines differ by at most this up to 300 tokens.
constexpr double kTolerance = 2e-4;

struct Case {
  const char* model;   // file or folder
  const char* golden;  // its reference values
};
// Every file layout: Hugging Face single, sharded, FP8; GGUF old, mid, new, split; three forms.
constexpr Case kCases[] = {
    {"models/tiny-v2", "models/tiny-v2/golden.safetensors"},
    {"models/tiny-v2-lite", "models/tiny-v2-lite/golden.safetensors"},
    {"models/tiny-v2-lite-sharded", "models/tiny-v2-lite/golden.safetensors"},
    {"models/tiny-v3", "models/tiny-v3/golden.safetensors"},
    {"models/tiny-v3-fp8", "models/tiny-v3-fp8/golden.safetensors"},
    {"gguf/tiny-v2.old.F16.gguf", "gguf/tiny-v2.old.F16.golden.safetensors"},
    {"gguf/tiny-v2.new.BF16.gguf", "models/tiny-v2/golden.safetensors"},
    {"gguf/tiny-v2-lite.old.F16.gguf", "models/tiny-v2-lite/golden.safetensors"},
    {"gguf/tiny-v2-lite.mid.F16.gguf", "models/tiny-v2-lite/golden.safetensors"},
    {"gguf/tiny-v2-lite.split-00001-of-00003.gguf", "models/tiny-v2-lite/golden.safetensors"},
    {"gguf/tiny-v3.new.BF16.gguf", "models/tiny-v3/golden.safetensors"},
};

void sort_by_weight(float* weights, int32_t* ids, int64_t n) {
  std::vector<std::pair<float, int32_t>> pairs;
  for (int64_t i = 0; i < n; ++i) pairs.push_back({weights[i], ids[i]});
  std::stable_sort(pairs.begin(), pairs.end(), [](auto& a, auto& b) { return a.first > b.first; });
  for (int64_t i = 0; i < n; ++i) std::tie(weights[i], ids[i]) = pairs[static_cast<size_t>(i)];
}

TEST_CASE("logits of every file layout in both forms of attention", "[nn][forward]") {
  for (const Case& c : kCases) {
    ReferenceModel model(test::test_data(c.model));
    const test::Golden golden = test::Golden::load(test::test_data(c.golden));
    for (const char* prompt : {"p1", "p7", "p64"})
      for (AttentionForm form : {AttentionForm::kAbsorbed, AttentionForm::kExpanded}) {
        model.reset();
        const auto got = model.pass(golden.i32(std::string(prompt) + ".tokens"), form);
        const auto diff = test::max_abs_diff(golden.f32(std::string(prompt) + ".logits"), got);
        INFO(c.model << " " << prompt << " form " << static_cast<int>(form) << ": "
                     << test::describe(diff));
        CHECK(diff.value <= kTolerance);
      }
  }
}

TEST_CASE("residual stream and routing after every layer", "[nn][forward]") {
  for (const char* name : {"tiny-v2", "tiny-v2-lite", "tiny-v3", "tiny-v3-fp8"}) {
    const std::string folder = test::test_data(std::string("models/") + name);
    ReferenceModel model(folder);
    const test::Golden golden = test::Golden::load(folder + "/golden.safetensors");
    int points = 0;
    std::vector<int32_t> ids;  // of the layer whose weights come next
    const nn::Trace trace = [&](const nn::TracePoint& at) {
      const size_t n = static_cast<size_t>(at.n_rows * at.n_cols);
      const std::string layer = std::to_string(at.layer);
      INFO(name << " " << at.name << " " << layer);
      ++points;
      if (at.name == "route_ids") {
        const auto* got = static_cast<const int32_t*>(at.data);
        ids.assign(got, got + n);
        return;
      }
      std::vector<float> values(static_cast<const float*>(at.data),
                                static_cast<const float*>(at.data) + n);
      std::string key = at.name == "embed" ? "h.embed" : "h." + layer;
      if (at.name == "route_weights") {
        key = "route." + layer + ".weights";
        // The golden lists the chosen by descending weight, we by descending choice score.
        for (int64_t t = 0; t < at.n_rows; ++t)
          sort_by_weight(values.data() + t * at.n_cols, ids.data() + t * at.n_cols, at.n_cols);
        const auto expected = golden.i32("route." + layer + ".ids");
        CHECK(std::equal(expected.begin(), expected.end(), ids.begin(), ids.end()));
      }
      const auto diff = test::max_abs_diff(golden.f32(key), values);
      INFO(test::describe(diff));
      CHECK(diff.value <= kTolerance);
    };
    model.pass(golden.i32("p64.tokens"), AttentionForm::kExpanded, &trace);
    CHECK(points == 1 + 3 + 2 * 2);  // embed, three layers, two MoE layers with ids and weights
  }
}

TEST_CASE("cutting the prompt does not change the logits", "[nn][forward]") {
  for (const char* name : {"tiny-v2", "tiny-v2-lite", "tiny-v3"}) {
    const std::string folder = test::test_data(std::string("models/") + name);
    ReferenceModel model(folder);
    const test::Golden golden = test::Golden::load(folder + "/golden.safetensors");
    const auto tokens = golden.i32("p64.tokens");
    for (size_t chunk : {size_t{1}, size_t{7}, size_t{33}}) {
      model.reset();
      std::vector<float> all;
      for (size_t at = 0; at < tokens.size(); at += chunk) {
        const auto part = tokens.subspan(at, std::min(chunk, tokens.size() - at));
        const auto form = at % 2 ? AttentionForm::kExpanded : AttentionForm::kAbsorbed;
        const auto logits = model.pass(part, form);
        all.insert(all.end(), logits.begin(), logits.end());
      }
      const auto diff = test::max_abs_diff(golden.f32("p64.logits"), all);
      INFO(name << " chunk " << chunk << ": " << test::describe(diff));
      CHECK(diff.value <= kTolerance);
    }
  }
}

}  // namespace
}  // namespace fathom
