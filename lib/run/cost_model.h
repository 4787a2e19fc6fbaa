// What work costs in time on a described device: the one home of the formula.  Plans, the placement
// solver and simulated devices use it.
//
// Roofline by operation (Williams, Waterman, Patterson 2009): an operation takes its fixed cost and
// the longer of moving its bytes and doing its arithmetic; operations of one device follow each
// other; a transfer takes the link's latency and its bytes over the link's rate.
#pragma once

#include <cstdint>

#include "../nn/layers.h"
#include "fathom/backend.hpp"
#include "fathom/machine.hpp"
#include "fathom/model_config.hpp"

namespace fathom::run {

// Which of a device's rates bounds the arithmetic.
enum class Arithmetic : uint8_t { kQuantised, kDense, kAttention };

// One operation.
struct Work {
  double weight_bytes = 0;  // read once, at the rate of their type
  DType weight_type = DType::kF32;
  double other_bytes = 0;  // activations and cache rows, read and written
  double flops = 0;        // a multiply-add is two
  Arithmetic arithmetic = Arithmetic::kDense;
};

double seconds(const MachineDevice& device, const Work& work);
double seconds(const MachineLink& link, int64_t bytes);

// Experts that `n_tokens` tokens touch on average when each takes `k` of `n` at random.
double experts_touched(int64_t n_tokens, int64_t k, int64_t n);

// The work of each operation of Backend, from its parameters' shapes (data is not followed).
// Attention: `row_bytes` is the average size of a cached row in the pages that are read.
Work work_of(const EmbedParams&);
Work work_of(const RmsNormParams&);
Work work_of(const MatmulParams&);
Work work_of(const HeadsMatmulParams&);
Work work_of(const RopeTableParams&);
Work work_of(const RopeParams&);
Work work_of(const KvAppendParams&, double row_bytes);
Work work_of(const KvConvertParams&);
Work work_of(const AttendAbsorbedParams&, double row_bytes);
Work work_of(const AttendExpandedParams&, double row_bytes);
Work work_of(const MergeAttentionParams&);
Work work_of(const RouteParams&);
Work work_of(const FfnParams&);
Work work_of(const ExpertsParams&);  // of a span: its share of the layer's
Work work_of(const ExpertsParams&, double n_touched,
             double n_pairs);  // experts read, (token, k) here
Work work_of(const SumExpertsParams&);
Work work_of(const AddParams&);

// One pass of `n_tokens` tokens behind `first_position` others.
struct PassShape {
  int64_t n_tokens = 1;
  int64_t first_position = 0;
  AttentionForm form = AttentionForm::kAbsorbed;
  KvType kv_type = KvType::kF16;
  int64_t page_tokens = 64;
};

// Seconds of one layer on one device, by what can live on different devices: the real layer
// functions, run over a backend that only adds up.
struct LayerSeconds {
  double attention = 0;  // norm, projections, cache, attention
  double shared = 0;     // norm, router, dense or shared feed-forward
  double experts = 0;    // routed experts
  double total() const noexcept { return attention + shared + experts; }
};
LayerSeconds layer_seconds(const MachineDevice& device, const ModelConfig& config,
                           const nn::LayerWeights& weights, bool moe, const PassShape& pass);
// Embedding and rope table of a pass; final norm and logits of its last row.
double embed_seconds(const MachineDevice& device, const ModelConfig& config,
                     const nn::Weights& weights, const PassShape& pass);
double head_seconds(const MachineDevice& device, const ModelConfig& config,
                    const nn::Weights& weights);
// Bytes of the residual stream that a pass hands from device to device.
inline int64_t residual_bytes(const ModelConfig& config, int64_t n_tokens) noexcept {
  return n_tokens * config.hidden_size * static_cast<int64_t>(sizeof(float));
}

}  // namespace fathom::run
