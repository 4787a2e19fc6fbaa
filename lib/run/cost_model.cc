#include "cost_model.h"

#include <algorithm>
#include <cmath>

#include "cost_backend.h"
#include "fathom/quant.hpp"

namespace fathom::run {
namespace {

constexpr double kF32 = sizeof(float);

double product(int64_t a, int64_t b) {
  return static_cast<double>(a) * static_cast<double>(b);
}

// Bytes of one matrix as stored: rows and block scales.
double matrix_bytes(const Weight& w) {
  const auto blocks = [](int64_t n) { return (n + kF8ScaleBlock - 1) / kF8ScaleBlock; };
  double bytes = product(w.rows, row_bytes(w.dtype, w.cols));
  if (w.block_scaled) bytes += product(blocks(w.rows), blocks(w.cols)) * kF32;
  return bytes;
}

Arithmetic arithmetic_of(DType type) {
  return dtype_info(type).block_elements > 1 ? Arithmetic::kQuantised : Arithmetic::kDense;
}

// Products of `n_rows` rows with `count` matrices of w's shape.
Work products(const Weight& w, double count, int64_t n_rows) {
  return {.weight_bytes = count * matrix_bytes(w),
          .weight_type = w.dtype,
          .other_bytes = count * product(n_rows, w.cols + w.rows) * kF32,
          .flops = 2 * count * static_cast<double>(n_rows) * product(w.rows, w.cols),
          .arithmetic = arithmetic_of(w.dtype)};
}

Work moved(double bytes) {
  return {.other_bytes = bytes};
}

// Pairs of a query and a row that it sees, for queries first_position .. + n_tokens.
double visible_pairs(const KvRows& rows, int64_t first_position, int64_t n_tokens) {
  const double end = static_cast<double>(rows.first_row + rows.n_rows);
  const double first = static_cast<double>(rows.first_row);
  double pairs = 0;
  // An arithmetic series, cut below 0 and above all rows.
  const double seen_first = std::clamp(static_cast<double>(first_position + 1), first, end) - first;
  const double seen_last =
      std::clamp(static_cast<double>(first_position + n_tokens), first, end) - first;
  pairs = (seen_first + seen_last) / 2 * static_cast<double>(n_tokens);
  return pairs;
}

}  // namespace

double seconds(const MachineDevice& device, const Work& work) {
  double moving = work.other_bytes / device.read_bytes_per_s;
  if (work.weight_bytes > 0) moving += work.weight_bytes / device.read_rate(work.weight_type);
  const double rate = work.arithmetic == Arithmetic::kQuantised ? device.quantised_flops_per_s
                      : work.arithmetic == Arithmetic::kDense   ? device.dense_flops_per_s
                                                                : device.attention_flops_per_s;
  return device.operation_s + std::max(moving, work.flops / rate);
}

double seconds(const MachineLink& link, int64_t bytes) {
  return link.latency_s + static_cast<double>(bytes) / link.bytes_per_s;
}

double experts_touched(int64_t n_tokens, int64_t k, int64_t n) {
  if (n == 0) return 0;
  const double missed = 1 - static_cast<double>(k) / static_cast<double>(n);
  return static_cast<double>(n) * (1 - std::pow(missed, static_cast<double>(n_tokens)));
}

Work work_of(const EmbedParams& p) {
  return moved(static_cast<double>(p.n_tokens) *
               (static_cast<double>(row_bytes(p.table->dtype, p.table->cols)) +
                static_cast<double>(p.table->cols) * kF32));
}
Work work_of(const RmsNormParams& p) {
  return moved(2 * product(p.n_rows, p.n_cols) * kF32);
}
Work work_of(const MatmulParams& p) {
  return products(*p.w, 1, p.n_rows);
}
Work work_of(const HeadsMatmulParams& p) {
  return products(*p.w, static_cast<double>(p.w->count), p.n_tokens);
}
Work work_of(const RopeTableParams& p) {
  return moved(product(p.n_tokens, p.rope_dim) * kF32);
}
Work work_of(const RopeParams& p) {
  return moved(2 * product(p.n_tokens, p.n_heads * p.rope_dim) * kF32);
}
Work work_of(const KvAppendParams& p, double row_bytes) {
  const int64_t cols = p.rows.layout.kv_lora_rank + p.rows.layout.qk_rope_head_dim;
  return moved(static_cast<double>(p.rows.n_rows) * (static_cast<double>(cols) * kF32 + row_bytes));
}
Work work_of(const KvConvertParams& p) {
  return moved(static_cast<double>(p.layout.page_bytes(p.from, p.n_layers) +
                                   p.layout.page_bytes(p.to, p.n_layers)));
}

Work work_of(const AttendAbsorbedParams& p, double row_bytes) {
  const int64_t rank = p.rows.layout.kv_lora_rank, rope = p.rows.layout.qk_rope_head_dim;
  const double pairs = visible_pairs(p.rows, p.first_position, p.n_tokens);
  return {.other_bytes = static_cast<double>(p.rows.n_rows) * row_bytes +
                         product(p.n_tokens * p.n_heads, 2 * rank + rope) * kF32,
          .flops = 2 * pairs * product(p.n_heads, 2 * rank + rope),
          .arithmetic = Arithmetic::kAttention};
}

Work work_of(const AttendExpandedParams& p, double row_bytes) {
  const int64_t rank = p.rows.layout.kv_lora_rank, rope = p.rows.layout.qk_rope_head_dim;
  const int64_t expanded = p.qk_nope_head_dim + p.v_head_dim;
  const double pairs = visible_pairs(p.rows, p.first_position, p.n_tokens);
  const auto heads = static_cast<double>(p.n_heads);
  return {.weight_bytes = heads * (matrix_bytes(*p.k_b) + matrix_bytes(*p.v_b)),
          .weight_type = p.k_b->dtype,
          .other_bytes = static_cast<double>(p.rows.n_rows) * row_bytes +
                         product(p.n_tokens * p.n_heads, expanded + rope) * kF32,
          .flops = 2 * heads *
                   (pairs * static_cast<double>(expanded + rope) +
                    product(p.rows.n_rows * rank, expanded)),
          .arithmetic = Arithmetic::kAttention};
}

Work work_of(const MergeAttentionParams& p) {
  return moved(3 * product(p.n_tokens * p.n_heads, p.kv_lora_rank + 2) * kF32);
}

Work work_of(const RouteParams& p) {
  return moved(product(p.n_tokens, p.n_experts) * kF32);
}

Work work_of(const FfnParams& p) {
  Work work = products(*p.gate, 1, p.n_tokens);
  for (const Weight* w : {p.up, p.down}) {
    const Work more = products(*w, 1, p.n_tokens);
    work.weight_bytes += more.weight_bytes;
    work.other_bytes += more.other_bytes;
    work.flops += more.flops;
  }
  return work;
}

Work work_of(const ExpertsParams& p) {
  const int64_t k = p.num_experts_per_tok;
  const int64_t n_experts = p.n_experts > 0 ? p.n_experts : p.gate->count;
  const double share = static_cast<double>(p.gate->count) / static_cast<double>(n_experts);
  return work_of(p, share * experts_touched(p.n_tokens, k, n_experts),
                 share * product(p.n_tokens, k));
}

Work work_of(const ExpertsParams& p, double n_touched, double n_pairs) {
  Work work;
  for (const Weight* w : {p.gate, p.up, p.down}) {
    const Work each = products(*w, 1, 1);
    work.weight_bytes += n_touched * matrix_bytes(*w);
    work.other_bytes += n_pairs * each.other_bytes;
    work.flops += n_pairs * each.flops;
  }
  work.weight_type = p.gate->dtype;
  work.arithmetic = arithmetic_of(p.gate->dtype);
  return work;
}

Work work_of(const SumExpertsParams& p) {
  return moved(product(p.n_tokens, (p.num_experts_per_tok + 1) * p.hidden_size) * kF32);
}

Work work_of(const AddParams& p) {
  return moved(3 * static_cast<double>(p.n) * kF32);
}

// ---- predictions: the layers themselves, run over a backend that adds up -----------------------

namespace {

// Everything that a layer function asks for; addresses are made up and never followed.
class Prediction final : public nn::RowSourceOf {
 public:
  Prediction(const MachineDevice& device, const ModelConfig& config, const PassShape& pass)
      : backend_(device),
        config_(config),
        pass_(pass),
        arena_(reinterpret_cast<void*>(uintptr_t{Arena::kAlignment}), INT64_MAX),
        scratch_(nn::Scratch::carve(arena_, config, pass.n_tokens)),
        page_{nullptr, pass.kv_type} {
    backend_.assume_kv_type(pass.kv_type);
  }

  nn::Step step() {
    sequence_ = {this, 0, pass_.n_tokens, pass_.first_position};
    return {backend_, {}, config_, rope_, scratch_, pass_.n_tokens, {&sequence_, 1}, pass_.form};
  }
  KvRows rows(int, int64_t layer_slot, int64_t n_rows) const noexcept override {
    return {&page_,
            {pass_.page_tokens, config_.kv_lora_rank, config_.qk_rope_head_dim},
            layer_slot,
            0,
            n_rows};
  }
  CostBackend& backend() noexcept { return backend_; }
  const nn::Scratch& scratch() const noexcept { return scratch_; }

 private:
  CostBackend backend_;
  const ModelConfig& config_;
  const PassShape pass_;
  nn::Rope rope_;
  Arena arena_;
  nn::Scratch scratch_;
  nn::Sequence sequence_{};
  KvPage page_;
};

}  // namespace

LayerSeconds layer_seconds(const MachineDevice& device, const ModelConfig& config,
                           const nn::LayerWeights& weights, bool moe, const PassShape& pass) {
  Prediction prediction(device, config, pass);
  CostBackend& backend = prediction.backend();
  LayerSeconds out;
  (void)nn::mla_attention(prediction.step(), weights, {0, 0});  // copies nothing
  out.attention = backend.busy_seconds();
  nn::feed_forward(prediction.step(), weights, moe);
  out.experts = backend.expert_seconds();
  out.shared = backend.busy_seconds() - out.attention - out.experts;
  return out;
}

double embed_seconds(const MachineDevice& device, const ModelConfig& config,
                     const nn::Weights& weights, const PassShape& pass) {
  return seconds(device, work_of(EmbedParams{nullptr, pass.n_tokens, &weights.embed, nullptr})) +
         seconds(device, work_of(RopeTableParams{nullptr, 1, config.qk_rope_head_dim, 0,
                                                 pass.n_tokens, nullptr}));
}

double head_seconds(const MachineDevice& device, const ModelConfig& config,
                    const nn::Weights& weights) {
  Prediction prediction(device, config, {});
  nn::logits(prediction.step(), weights, 0, 1);
  return prediction.backend().busy_seconds();
}

}  // namespace fathom::run
