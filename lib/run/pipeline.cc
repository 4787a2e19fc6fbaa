#include "pipeline.h"

#include <algorithm>

namespace fathom::run {

std::vector<LayerRun> layer_runs(const Placement& placement) {
  std::vector<LayerRun> runs;
  for (size_t l = 0; l < placement.layers.size();) {
    const size_t end = nn::run_end(placement, l);
    runs.push_back({placement.layers[l].device, l, end});
    l = end;
  }
  return runs;
}

bool can_overlap(const Placement& placement, std::span<const LayerRun> runs) {
  // Rows on other devices use these devices' buffers.
  if (runs.size() < 2 || !placement.kv.empty()) return false;
  std::vector<int> users;
  for (const LayerRun& run : runs) users.push_back(run.device);
  if (placement.embed_device != runs.front().device) users.push_back(placement.embed_device);
  for (const LayerPlacement& layer : placement.layers)
    for (const ExpertSpan& span : layer.experts)
      if (span.device != layer.device) return false;
  std::sort(users.begin(), users.end());
  return std::adjacent_find(users.begin(), users.end()) == users.end();
}

Status run_in_waves(std::span<const LayerRun> runs, const Passes& passes) {
  const auto n_runs = static_cast<int64_t>(runs.size());
  size_t longest = 0;
  for (const LayerRun& run : runs) longest = std::max(longest, run.end - run.first);
  // Calls visit(run, pass) for those of a wave, the last device first: it takes its rows before the
  // one in front of it gets the next pass.
  const auto each = [&](int64_t wave, auto&& visit) {
    for (int64_t r = n_runs - 1; r >= 0; --r)
      if (const int64_t index = wave - r; index >= 0 && index < passes.count) visit(r, index);
  };
  Status status;
  for (int64_t wave = 0; wave < passes.count + n_runs - 1 && status.ok(); ++wave) {
    // A layer of each in turn, so that a device whose queue is full keeps none of the others waiting.
    for (size_t l = 0; l < longest && status.ok(); ++l)
      each(wave, [&](int64_t r, int64_t index) {
        const LayerRun& run = runs[static_cast<size_t>(r)];
        const size_t layer = run.first + l;
        if (!status.ok() || layer >= run.end) return;
        const nn::ForwardParams params = passes.params(index);
        status = nn::forward_layers(params, layer, layer + 1);
        if (status.ok() && layer + 1 == run.end && r == n_runs - 1 && passes.queue_end)
          status = passes.queue_end(params, index);
      });
    each(wave, [&](int64_t r, int64_t index) {  // all of them, also after a failure
      const nn::ForwardParams params = passes.params(index);
      const nn::Stage& stage = params.stages[static_cast<size_t>(runs[static_cast<size_t>(r)].device)];
      Status synced = stage.device->sync(stage.op);
      if (status.ok()) status = std::move(synced);
    });
    if (const int64_t done = wave - (n_runs - 1); done >= 0 && status.ok())
      status = passes.finish(passes.params(done), done);
  }
  return status;
}

}  // namespace fathom::run
