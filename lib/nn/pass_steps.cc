#include "pass_steps.h"

#include <algorithm>

#include "transfer.h"

namespace fathom::nn {
namespace {

bool chooses_only(const PassStep& step, const Placement& placement) {
  return step.end_layer > step.first_layer && experts_apart(placement.layers[step.end_layer - 1]);
}

}  // namespace

std::vector<PassStep> pass_steps(const Placement& placement) {
  std::vector<PassStep> steps;
  PassStep step{.device = placement.embed_device, .embed = true};
  const auto go_to = [&](int device) {
    if (device == step.device) return;
    steps.push_back(step);
    step = {.device = device};
  };
  for (size_t l = 0; l < placement.layers.size(); ++l) {
    const LayerPlacement& layer = placement.layers[l];
    go_to(layer.device);
    if (step.first_layer == step.end_layer) step.first_layer = l;
    step.end_layer = l + 1;
    if (!experts_apart(layer)) continue;
    size_t span = 0;
    while (span < layer.experts.size() && layer.experts[span].device == layer.device) ++span;
    step.begun_spans = span;
    while (span < layer.experts.size()) {
      go_to(layer.experts[span].device);
      step.in = l;
      step.first_span = span;
      while (span < layer.experts.size() && layer.experts[span].device == step.device) ++span;
      step.end_span = span;
    }
    go_to(layer.device);
    step.in = l;
    step.add = true;
  }
  steps.push_back(step);
  return steps;
}

Status PassInSteps::queue() {
  const ForwardParams& p = params_;
  const PassStep& step = steps_[next_];
  const Stage& at = stage();
  const Step here = step_of(p, at);
  if (step.embed) queue_embedding(p);
  for (size_t i = step.first_span; i < step.end_span; ++i)
    add_experts(here, p.weights.layers[step.in].experts[i], /*begin=*/i == 0);
  if (step.add) add_routed(here);
  for (size_t l = step.first_layer; l < step.end_layer; ++l) {
    FATHOM_TRY(queue_attention(p, l));
    n_written_ = l + 1;
    const bool apart = experts_apart(p.placement.layers[l]);
    if (apart)
      choose_experts(here, p.weights.layers[l]);
    else
      feed_forward(here, p.weights.layers[l], p.config.is_moe_layer(static_cast<int64_t>(l)));
  }
  for (size_t i = 0; i < step.begun_spans; ++i)
    add_experts(here, p.weights.layers[step.end_layer - 1].experts[i], /*begin=*/i == 0);
  return {};
}

void PassInSteps::left() noexcept {
  const PassStep& step = steps_[next_];
  if (chooses_only(step, params_.placement))
    add_own_network(step_of(params_, stage()), params_.weights.layers[step.end_layer - 1]);
}

Status PassInSteps::bring() {
  const ForwardParams& p = params_;
  const PassStep& step = steps_[next_];
  const Stage& from = stage();
  const bool chose = chooses_only(step, p.placement);
  if (chose && p.copies != nullptr)
    FATHOM_TRY(tell_choices(step_of(p, from), step.end_layer - 1, *p.copies));
  ++next_;
  if (ended()) return {};
  const PassStep& next = steps_[next_];
  const Stage& to = stage();
  const int64_t rows = static_cast<int64_t>(p.tokens.size()) * p.config.hidden_size *
                       static_cast<int64_t>(sizeof(float));
  if (next.first_span == next.end_span && !next.add)  // a layer begins there
    return transfer(*from.device, from.scratch.x, *to.device, to.scratch.x, rows, p.staging);
  const std::vector<ExpertSpan>& spans = p.placement.layers[next.in].experts;
  const int home = p.placement.layers[next.in].device;
  // Rows and choices go to a device once per layer, when its first span is next.
  const auto before = spans.begin() + static_cast<std::ptrdiff_t>(next.first_span);
  const bool has_rows =
      next.device == home || std::any_of(spans.begin(), before, [&](const ExpertSpan& span) {
        return span.device == next.device;
      });
  if (!has_rows)
    FATHOM_TRY(send_rows(step_of(p, p.stages[static_cast<size_t>(home)]), to, p.staging));
  if (chose && step.begun_spans == 0) return {};  // no sum yet
  return transfer(*from.device, from.scratch.routed, *to.device, to.scratch.routed, rows,
                  p.staging);
}

}  // namespace fathom::nn
