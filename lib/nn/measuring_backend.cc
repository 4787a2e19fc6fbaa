// A backend that runs nothing and remembers the largest workspace it was asked for.  Passing it
// through the real layer functions measures what they need; there is no second formula.
#include <algorithm>

#include "forward.h"

namespace fathom::nn {
namespace {

// Rows of made-up pages: shapes and a type, no data.
class MeasuredRows final : public RowSourceOf {
 public:
  MeasuredRows(KvType type, KvLayout layout) noexcept : page_{nullptr, type}, layout_(layout) {}
  KvRows rows(int, int64_t layer_slot, int64_t n_rows) const noexcept override {
    return {&page_, layout_, layer_slot, 0, n_rows};
  }

 private:
  KvPage page_;
  KvLayout layout_;
};

class MeasuringBackend final : public Backend {
 public:
  explicit MeasuringBackend(const Backend& real) : real_(real) {}
  int64_t most() const noexcept { return most_; }

  DeviceKind kind() const noexcept override { return real_.kind(); }
  std::string_view name() const noexcept override { return real_.name(); }
  std::string describe() const override { return real_.describe(); }
  int64_t granularity() const noexcept override { return real_.granularity(); }
  MemoryState memory() const noexcept override { return real_.memory(); }
  int64_t runtime_bytes() const noexcept override { return 0; }
  bool host_accessible() const noexcept override { return true; }
  // It owns no memory and stores nothing.
  Result<void*> reserve(int64_t) noexcept override { return refusal(); }
  Status commit(void*, int64_t, int64_t) noexcept override { return refusal(); }
  void decommit(void*, int64_t, int64_t) noexcept override {}
  void release(void*, int64_t) noexcept override {}
  Status upload(void*, const void*, int64_t) noexcept override { return {}; }
  Status download(void*, const void*, int64_t) noexcept override { return {}; }
  Status weight_layout(Weight&) const noexcept override { return refusal(); }
  Status store_rows(const Weight&, int64_t, int64_t, int64_t, const void*) noexcept override {
    return refusal();
  }
  Status store_scales(const Weight&, int64_t, const float*) noexcept override { return refusal(); }

  int64_t workspace_bytes(const MatmulParams& p) const noexcept override { return need(p); }
  int64_t workspace_bytes(const HeadsMatmulParams& p) const noexcept override { return need(p); }
  int64_t workspace_bytes(const AttendAbsorbedParams& p) const noexcept override { return need(p); }
  int64_t workspace_bytes(const AttendExpandedParams& p) const noexcept override { return need(p); }
  int64_t workspace_bytes(const FfnParams& p) const noexcept override { return need(p); }
  int64_t workspace_bytes(const ExpertsParams& p) const noexcept override { return need(p); }
  int64_t workspace_bytes(const TopKParams& p) const noexcept override { return need(p); }

  void embed(const OpContext&, const EmbedParams&) noexcept override {}
  void rms_norm(const OpContext&, const RmsNormParams&) noexcept override {}
  void matmul(const OpContext&, const MatmulParams& p) noexcept override { see(p); }
  void heads_matmul(const OpContext&, const HeadsMatmulParams& p) noexcept override { see(p); }
  void rope_table(const OpContext&, const RopeTableParams&) noexcept override {}
  void rope(const OpContext&, const RopeParams&) noexcept override {}
  void kv_append(const OpContext&, const KvAppendParams&) noexcept override {}
  void kv_convert(const OpContext&, const KvConvertParams&) noexcept override {}
  void attend_absorbed(const OpContext&, const AttendAbsorbedParams& p) noexcept override {
    see(p);
  }
  void merge_attention(const OpContext&, const MergeAttentionParams&) noexcept override {}
  void attend_expanded(const OpContext&, const AttendExpandedParams& p) noexcept override {
    see(p);
  }
  void route(const OpContext&, const RouteParams&) noexcept override {}
  void ffn(const OpContext&, const FfnParams& p) noexcept override { see(p); }
  void experts(const OpContext&, const ExpertsParams& p) noexcept override { see(p); }
  void add(const OpContext&, const AddParams&) noexcept override {}
  int64_t max_top_k() const noexcept override { return real_.max_top_k(); }
  void top_k(const OpContext&, const TopKParams& p) noexcept override { see(p); }
  Status sync(const OpContext&) noexcept override { return {}; }

 private:
  static Status refusal() noexcept {
    return Status(Code::kInternal, "a measuring backend holds nothing");
  }
  template <class Params>
  int64_t need(const Params& p) const noexcept {
    return real_.workspace_bytes(p);
  }
  template <class Params>
  void see(const Params& p) noexcept {
    most_ = std::max(most_, need(p));
  }

  const Backend& real_;
  int64_t most_ = 0;
};

}  // namespace

namespace {

// The copies of a layer, by the longest pass that uses them.
void measure_copies(MeasuringBackend& measuring, const ModelConfig& config, const Backend& device,
                    const LayerWeights& w, int64_t n_tokens) {
  const int64_t k = config.num_experts_per_tok, n = std::min(n_tokens, kCopyPairs / k);
  const auto copies = experts_on(device, w, config.n_routed_experts);
  if (!copies.ok() || n == 0) return;
  measuring.experts({}, {.x = nullptr,
                         .n_tokens = n,
                         .ids = nullptr,
                         .weights = nullptr,
                         .num_experts_per_tok = k,
                         .gate = &copies->gate,
                         .up = &copies->up,
                         .down = &copies->down,
                         .out = nullptr,
                         .n_experts = config.n_routed_experts});
}

}  // namespace

int64_t measure_workspace(const Backend& device, int index, const ModelConfig& config,
                          const Weights& weights, const Placement& placement, int64_t max_tokens,
                          KvType kv_type, int64_t page_tokens) {
  MeasuringBackend measuring(device);
  const Rope rope = make_rope(config);
  const MeasuredRows rows(kv_type, {page_tokens, config.kv_lora_rank, config.qk_rope_head_dim});
  const DeviceRoles roles = DeviceRoles::of(placement, index);

  // Workspaces grow with the rows of a pass, so the longest pass of each form decides; the
  // smallest is asked too, since few rows may take other kernels.
  const auto pass = [&](int64_t n, AttentionForm form) {
    // Addresses are never followed; a made-up base keeps pointer arithmetic defined.
    Arena arena(reinterpret_cast<void*>(uintptr_t{Arena::kAlignment}), INT64_MAX);
    const Scratch scratch = Scratch::carve(arena, config, n, roles);
    const Sequence sequence{&rows, 0, n, 0};
    const Step step{measuring, {}, config, rope, scratch, n, {&sequence, 1}, form};
    for (size_t l = 0; l < placement.layers.size(); ++l) {
      const LayerPlacement& place = placement.layers[l];
      const LayerWeights& w = weights.layers[l];
      const bool here = place.device == index;
      if (here) (void)mla_attention(step, w, {0, 0});  // copies nothing
      if (here && place.experts.empty()) feed_forward(step, w, /*moe=*/false);
      if (here && !place.experts.empty()) {
        choose_experts(step, w);
        add_own_network(step, w);
      }
      for (size_t i = 0; i < place.experts.size(); ++i)
        if (place.experts[i].device == index) add_experts(step, w.experts[i], /*begin=*/i == 0);
      if (here && !place.experts.empty() && placement.has_copies(index))
        measure_copies(measuring, config, device, w, n);
    }
    if (roles.rows) attend_as_guest(step, rows.rows(0, 0, n), std::min(n, kAbsorbedRows));
    if (roles.head) {
      logits(step, weights, 0, std::min(n, kLogitRows));
      logits(step, weights, 0, 1);
      if (const int64_t k = std::min(measuring.max_top_k(), config.vocab_size); k > 0)
        likeliest(step, k);
    }
  };
  for (AttentionForm form : {AttentionForm::kAbsorbed, AttentionForm::kExpanded})
    for (int64_t n : {max_tokens, int64_t{1}}) pass(n, form);
  return measuring.most();
}

}  // namespace fathom::nn
