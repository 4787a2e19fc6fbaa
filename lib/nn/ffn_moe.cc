// Feed-forward: dense layers, and MoE layers with routed and shared experts (DeepSeekMoE;
// DeepSeek-V2 report, section 2.2; DeepSeek-V3 report, section 2.1.2).
#include "layers.h"

namespace fathom::nn {

void choose_experts(const Step& s, const LayerWeights& w) noexcept {
  const ModelConfig& c = s.config;
  const Scratch& b = s.scratch;
  const int64_t n = s.n_tokens, hidden = c.hidden_size;
  s.device.rms_norm(s.op, {b.x, hidden, w.ffn_norm, static_cast<float>(c.rms_norm_eps), n, hidden,
                           b.x_norm, hidden});
  // The router stays in f32: a rounded score can flip a choice, and that moves logits by O(1).
  s.device.matmul(s.op, {b.x_norm, hidden, n, &w.router, b.scores, c.n_routed_experts,
                         /*add=*/false, /*exact=*/true});
  s.device.route(s.op, {.scores = b.scores,
                        .bias = w.router_bias,
                        .n_tokens = n,
                        .n_experts = c.n_routed_experts,
                        .num_experts_per_tok = c.num_experts_per_tok,
                        .n_group = c.n_group,
                        .topk_group = c.topk_group,
                        .scoring_func = c.scoring_func,
                        .topk_method = c.topk_method,
                        .norm_topk_prob = c.norm_topk_prob,
                        .routed_scaling_factor = static_cast<float>(c.routed_scaling_factor),
                        .ids = b.expert_ids,
                        .weights = b.expert_weights});
}

void add_experts(const Step& s, const ExpertWeights& experts, bool begin) noexcept {
  const Scratch& b = s.scratch;
  s.device.experts(s.op, {.x = b.x_norm,
                          .n_tokens = s.n_tokens,
                          .ids = b.expert_ids,
                          .weights = b.expert_weights,
                          .num_experts_per_tok = s.config.num_experts_per_tok,
                          .gate = &experts.gate,
                          .up = &experts.up,
                          .down = &experts.down,
                          .out = b.routed,
                          .first_expert = experts.first,
                          .n_experts = s.config.n_routed_experts,
                          .add = !begin});
}

void add_own_network(const Step& s, const LayerWeights& w) noexcept {
  if (w.gate.rows == 0) return;  // a MoE layer without shared experts
  const Scratch& b = s.scratch;
  s.device.ffn(s.op, {.x = b.x_norm,
                      .n_tokens = s.n_tokens,
                      .gate = &w.gate,
                      .up = &w.up,
                      .down = &w.down,
                      .out = b.x,
                      .add = true});
}

void add_routed(const Step& s) noexcept {
  s.device.add(s.op, {s.scratch.routed, s.n_tokens * s.config.hidden_size, s.scratch.x});
}

void feed_forward(const Step& s, const LayerWeights& w, bool moe) noexcept {
  if (!moe) {
    const Scratch& b = s.scratch;
    const int64_t hidden = s.config.hidden_size;
    s.device.rms_norm(s.op, {b.x, hidden, w.ffn_norm, static_cast<float>(s.config.rms_norm_eps),
                             s.n_tokens, hidden, b.x_norm, hidden});
    return add_own_network(s, w);
  }
  choose_experts(s, w);
  for (const ExpertWeights& experts : w.experts)
    add_experts(s, experts, /*begin=*/experts.first == 0);
  add_own_network(s, w);
  add_routed(s);
}

void logits(const Step& s, const Weights& w, int64_t first_row, int64_t n_rows) noexcept {
  const ModelConfig& c = s.config;
  const int64_t hidden = c.hidden_size;
  const float* x = s.scratch.x + first_row * hidden;
  float* x_norm = s.scratch.x_norm + first_row * hidden;
  s.device.rms_norm(s.op, {x, hidden, w.final_norm, static_cast<float>(c.rms_norm_eps), n_rows,
                           hidden, x_norm, hidden});
  s.device.matmul(s.op, {x_norm, hidden, n_rows, &w.head, s.scratch.logits, c.vocab_size});
}

void likeliest(const Step& s, int64_t k) noexcept {
  s.device.top_k(s.op, {s.scratch.logits, 1, s.config.vocab_size, k, s.scratch.likeliest});
}

}  // namespace fathom::nn
