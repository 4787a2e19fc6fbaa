// Prefill over several devices: chunks of one prompt follow each other through them (pipeline.h).
#include <algorithm>
#include <array>
#include <utility>

#include "pipeline.h"
#include "session_state.h"

namespace fathom::run {

bool SessionState::chunks_overlap(const RunOptions& options) const {
  if (options.on_logits || trace != nullptr) return false;
  const ChunkFlow flow = chunk_flow(model.plan());
  return flow == ChunkFlow::kWaves ||
         (flow == ChunkFlow::kTurns && model.plan().prefill_in_flight > 1);
}

Status SessionState::prefill_overlapped(std::span<const int32_t> prompt, int64_t chunk,
                                        const RunControl& control, const RunOptions& options) {
  const Plan& plan = model.plan();
  const bool in_turns = chunk_flow(plan) == ChunkFlow::kTurns;
  const auto total = static_cast<int64_t>(prompt.size());
  const int64_t n_chunks = (total + chunk - 1) / chunk, base = n_tokens;

  pages_.begin_pass();
  std::array<nn::Sequence, nn::kMostInFlight> sequences{};
  Passes chunks{.count = n_chunks, .params = {}, .finish = {}};
  chunks.params = [&](int64_t index) {
    const int64_t first = index * chunk, n = std::min(chunk, total - first);
    const int64_t place = in_turns ? index % plan.prefill_in_flight : 0;
    nn::Sequence& sequence = sequences[static_cast<size_t>(place)];
    sequence = {this, 0, n, base + first};
    return nn::ForwardParams{
        .config = model.config(),
        .rope = model.state()->rope,
        .weights = *model.state()->weights,
        .placement = plan.placement,
        .stages = stages_of(place),
        .staging = staging.data(),
        .tokens = prompt.subspan(static_cast<size_t>(first), static_cast<size_t>(n)),
        .sequences = {&sequence, 1},
        .form = form_of(n),
        .cancelled = RunControl::cancelled,
        .cancelled_arg = const_cast<RunControl*>(&control),
        .trace = nullptr,
        .section_rows = section_rows,
        .copies = in_turns ? model.state()->copies.get() : nullptr};
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
    if (finished.copies != nullptr) model.state()->copies->after_pass(n);
    times.prefill_tokens += n;
    times.prefill_seconds += elapsed;
    if (options.on_step && !report(options.on_step, Phase::kPrefill, n, elapsed))
      return Status(Code::kCallback, "the step callback asked to stop");
    if (n_tokens - base < total || options.progress)
      return control.check(ProgressPhase::kPrefill, n_tokens - base, total);
    return {};
  };
  return in_turns ? run_in_turns(plan.placement, plan.prefill_in_flight, chunks)
                  : run_in_waves(layer_runs(plan.placement), chunks);
}

}  // namespace fathom::run
