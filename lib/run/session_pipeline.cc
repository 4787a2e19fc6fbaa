// Prefill over several devices: chunks of one prompt follow each other through the devices, so that
// each device works on another chunk.
//
//   wave       0     1     2     3
//   cuda:0   c0    c1    c2
//   cuda:1         c0    c1    c2       rows go over between the waves
//
// A chunk has the bits that it has alone: the devices do the same operations on the same rows.
#include <algorithm>
#include <utility>

#include "session_state.h"

namespace fathom::run {
namespace {

// The layers of one device, which follow each other.
struct Run {
  int device;
  size_t first, end;
};

std::vector<Run> runs_of(const Placement& placement) {
  std::vector<Run> runs;
  for (size_t l = 0; l < placement.layers.size();) {
    const size_t end = nn::run_end(placement, l);
    runs.push_back({placement.layers[l].device, l, end});
    l = end;
  }
  return runs;
}

// Whether chunks can be on different devices at once: each device has one run and is used by no
// other part of the pass, as its buffers hold one chunk.
bool separate(const Placement& placement, const std::vector<Run>& runs) {
  std::vector<int> users;
  for (const Run& run : runs) users.push_back(run.device);
  if (placement.embed_device != runs.front().device) users.push_back(placement.embed_device);
  for (const LayerPlacement& layer : placement.layers)
    for (const ExpertSpan& span : layer.experts)
      if (span.device != layer.device) return false;
  std::sort(users.begin(), users.end());
  return std::adjacent_find(users.begin(), users.end()) == users.end();
}

}  // namespace

bool SessionState::chunks_overlap(const RunOptions& options) const {
  const Plan& plan = model.plan();
  // What is cold in a mixed cache follows the rows written, and a cache with other tiers moves rows
  // while a pass runs: both want one chunk at a time.
  const bool plain = plan.kv_policy.recent_tokens == 0 && plan.kv_policy.first_tokens == 0 &&
                     plan.config.kv_tiers.size() == 1;
  // Rows on other devices use these devices' buffers.
  if (!plain || !plan.placement.kv.empty() || options.on_logits || trace != nullptr || plan.devices.size() < 2) return false;
  const std::vector<Run> runs = runs_of(plan.placement);
  return runs.size() > 1 && separate(plan.placement, runs);
}

Status SessionState::prefill_overlapped(std::span<const int32_t> prompt, int64_t chunk,
                                        const RunControl& control, const RunOptions& options) {
  const std::vector<Run> runs = runs_of(model.plan().placement);
  const auto total = static_cast<int64_t>(prompt.size());
  const int64_t n_chunks = (total + chunk - 1) / chunk, base = n_tokens;
  const auto n_runs = static_cast<int64_t>(runs.size());

  pages_.begin_pass();
  nn::Sequence sequence{};
  const auto params_of = [&](int64_t index) {
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
        .trace = nullptr};
  };
  // The last device first: it takes its rows before the one in front of it gets the next chunk.
  const auto wave = [&](int64_t number) -> Status {
    Status status;
    for (int64_t r = n_runs - 1; r >= 0 && status.ok(); --r) {
      const int64_t index = number - r;
      if (index < 0 || index >= n_chunks) continue;
      const Run& run = runs[static_cast<size_t>(r)];
      status = nn::forward_layers(params_of(index), run.first, run.end);
    }
    for (const Run& run : runs) {  // all of them, also after a failure: their buffers are in use
      const nn::Stage& stage = stages[static_cast<size_t>(run.device)];
      Status synced = stage.device->sync(stage.op);
      if (status.ok()) status = std::move(synced);
    }
    return status;
  };

  Status status;
  double last = seconds();
  for (int64_t number = 0; number < n_chunks + n_runs - 1 && status.ok(); ++number) {
    status = wave(number);
    const int64_t done = number - (n_runs - 1);
    if (!status.ok() || done < 0) continue;
    const nn::ForwardParams finished = params_of(done);
    has_logits = false;
    if (done == n_chunks - 1) {
      status = compute_logits(finished, static_cast<int64_t>(finished.tokens.size()) - 1, 1);
      if (!status.ok()) continue;
      has_logits = true;
    }
    append(finished.tokens);
    const auto n = static_cast<int64_t>(finished.tokens.size());
    const double now = seconds(), elapsed = now - std::exchange(last, now);
    times.prefill_tokens += n;
    times.prefill_seconds += elapsed;
    if (options.on_step && !report(options.on_step, Phase::kPrefill, n, elapsed))
      status = Status(Code::kCallback, "the step callback asked to stop");
    else if (n_tokens - base < total || options.progress)
      status = control.check(ProgressPhase::kPrefill, n_tokens - base, total);
  }
  return status;
}

}  // namespace fathom::run
