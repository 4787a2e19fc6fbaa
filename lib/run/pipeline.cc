#include "pipeline.h"

#include <algorithm>
#include <optional>

#include "../nn/pass_steps.h"

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
    // A layer of each in turn, so that a device whose queue is full keeps none of the others
    // waiting.
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
      const nn::Stage& stage =
          params.stages[static_cast<size_t>(runs[static_cast<size_t>(r)].device)];
      Status synced = stage.device->sync(stage.op);
      if (status.ok()) status = std::move(synced);
    });
    if (const int64_t done = wave - (n_runs - 1); done >= 0 && status.ok())
      status = passes.finish(passes.params(done), done);
  }
  return status;
}

bool chunks_may_overlap(const Plan& plan) {
  // What is cold in a mixed cache follows the rows written, and a cache with other tiers moves rows
  // while a pass runs: both want one chunk at a time.
  return plan.kv_policy.recent_tokens == 0 && plan.kv_policy.first_tokens == 0 &&
         plan.config.kv_tiers.size() == 1;
}

ChunkFlow chunk_flow(const Plan& plan) {
  if (!chunks_may_overlap(plan) || plan.devices.size() < 2) return ChunkFlow::kOneByOne;
  if (can_overlap(plan.placement, layer_runs(plan.placement))) return ChunkFlow::kWaves;
  return can_take_turns(plan.placement) ? ChunkFlow::kTurns : ChunkFlow::kOneByOne;
}

bool can_take_turns(const Placement& placement) {
  return placement.kv.empty() && nn::pass_steps(placement).size() > 1;
}

namespace {

// Passes under way.  A device has one step queued at a time, so that waiting for it is waiting for
// that step; whose step was queued first is waited for first.
class Turns {
 public:
  Turns(const Placement& placement, int64_t in_flight, const Passes& passes)
      : steps_(nn::pass_steps(placement)),
        passes_(passes),
        under_way_(static_cast<size_t>(std::min(in_flight, passes.count))) {
    queue_.reserve(under_way_.size());
    for (const nn::PassStep& step : steps_)
      busy_.resize(std::max(busy_.size(), static_cast<size_t>(step.device) + 1), false);
  }

  Status run() {
    Status status = take_turns();
    // All of them, also after a failure.
    for (const std::optional<Pass>& pass : under_way_)
      for (const nn::Stage& stage :
           pass ? pass->at.params().stages : std::span<const nn::Stage>()) {
        Status synced = stage.device->sync(stage.op);
        if (status.ok()) status = std::move(synced);
      }
    return status;
  }

 private:
  struct Pass {
    nn::PassInSteps at;
    bool queued = false;
  };

  std::optional<Pass>& pass(int64_t index) {
    return under_way_[static_cast<size_t>(index) % under_way_.size()];
  }

  Status take_turns() {
    while (finished_ < passes_.count) {
      while (begun_ < passes_.count && !pass(begun_)) {
        pass(begun_).emplace(Pass{nn::PassInSteps(passes_.params(begun_), steps_)});
        ++begun_;
      }
      FATHOM_TRY(queue_ready());
      const int64_t index = queue_.front();
      queue_.erase(queue_.begin());
      Pass& turn = *pass(index);
      const nn::Stage& stage = turn.at.stage();
      FATHOM_TRY(stage.device->sync(stage.op));
      turn.at.left();
      busy_[static_cast<size_t>(turn.at.device())] = false;
      FATHOM_TRY(queue_ready());  // the device goes on before rows are copied
      FATHOM_TRY(turn.at.bring());
      turn.queued = false;
      while (finished_ < begun_ && pass(finished_)->at.ended()) {
        FATHOM_TRY(passes_.finish(pass(finished_)->at.params(), finished_));
        pass(finished_++).reset();
      }
    }
    return {};
  }

  // The earliest first; a pass attends to the rows of those before it.
  Status queue_ready() {
    for (int64_t index = finished_; index < begun_; ++index) {
      Pass& next = *pass(index);
      if (next.queued || next.at.ended()) continue;
      const auto device = static_cast<size_t>(next.at.device());
      if (busy_[device]) continue;
      if (index > finished_ && pass(index - 1)->at.n_written() < next.at.reads_to()) continue;
      FATHOM_TRY(next.at.queue());
      next.queued = busy_[device] = true;
      queue_.push_back(index);
    }
    return {};
  }

  const std::vector<nn::PassStep> steps_;
  const Passes& passes_;
  std::vector<std::optional<Pass>> under_way_;
  std::vector<bool> busy_;      // by device
  std::vector<int64_t> queue_;  // passes in the order in which their steps were queued
  int64_t begun_ = 0, finished_ = 0;
};

}  // namespace

Status run_in_turns(const Placement& placement, int64_t in_flight, const Passes& passes) {
  return Turns(placement, in_flight, passes).run();
}

}  // namespace fathom::run
