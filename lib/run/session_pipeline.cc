// Prefill over several devices: chunks of one prompt follow each other through them (pipeline.h).
#include <algorithm>
#include <utility>

#include "pipeline.h"
#include "session_state.h"

namespace fathom::run {

bool SessionState::chunks_overlap(const RunOptions& options) const {
  const Plan& plan = model.plan();
  // What is cold in a mixed cache follows the rows written, and a cache with other tiers moves rows
  // while a pass runs: both want one chunk at a time.
  const bool plain = plan.kv_policy.recent_tokens == 0 && plan.kv_policy.first_tokens == 0 &&
                     plan.config.kv_tiers.size() == 1;
  if (!plain || options.on_logits || trace != nullptr || plan.devices.size() < 2) return false;
  return can_overlap(plan.placement, layer_runs(plan.placement));
}

Status SessionState::prefill_overlapped(std::span<const int32_t> prompt, int64_t chunk,
                                        const RunControl& control, const RunOptions& options) {
  const std::vector<LayerRun> runs = layer_runs(model.plan().placement);
  const auto total = static_cast<int64_t>(prompt.size());
  const int64_t n_chunks = (total + chunk - 1) / chunk, base = n_tokens;

  pages_.begin_pass();
  nn::Sequence sequence{};
  Passes chunks{.count = n_chunks, .params = {}, .finish = {}};
  chunks.params = [&](int64_t index) {
    const int64_t first = index * chunk, n = std::min(chunk, total - first);
    sequence = {this, 0, n, base + first};
    return nn::ForwardParams{
        .config = model.config(),
        .rope = model.state()->rope,
        .weights = *model.state()->weights,
        .placement = model.plan().placement,
        .stages = stages,
        .staging = staging.data(),
        .tokens = prompt.subspan(static_cast<size_t>(first), static_cast<size_t>(n)),
        .sequences = {&sequence, 1},
        .form = form_of(n),
        .cancelled = RunControl::cancelled,
        .cancelled_arg = const_cast<RunControl*>(&control),
        .trace = nullptr,
        .section_rows = section_rows};
  };
  double last = seconds();
  chunks.finish = [&](const nn::ForwardParams& finished, int64_t index) -> Status {
    has_logits = has_likeliest = false;
    if (index == n_chunks - 1) {
      FATHOM_TRY(compute_logits(finished, static_cast<int64_t>(finished.tokens.size()) - 1, 1));
      has_logits = true;
    }
    append(finished.tokens);
    const auto n = static_cast<int64_t>(finished.tokens.size());
    const double now = seconds(), elapsed = now - std::exchange(last, now);
    times.prefill_tokens += n;
    times.prefill_seconds += elapsed;
    if (options.on_step && !report(options.on_step, Phase::kPrefill, n, elapsed))
      return Status(Code::kCallback, "the step callback asked to stop");
    if (n_tokens - base < total || options.progress)
      return control.check(ProgressPhase::kPrefill, n_tokens - base, total);
    return {};
  };
  return run_in_waves(runs, chunks);
}

}  // namespace fathom::run
