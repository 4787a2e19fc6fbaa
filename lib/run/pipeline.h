// Passes that follow each other through the devices, so that each device works on another one:
// chunks of a prompt (session_pipeline.cc), groups of a batch of sessions (session_batch.cc).
//
//   wave       0     1     2     3
//   cuda:0   p0    p1    p2
//   cuda:1         p0    p1    p2       rows go over between the waves
//
// A pass has the bits that it has alone: the devices do the same operations on the same rows.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "../nn/forward.h"

namespace fathom::run {

// Layers [first, end) of one device, which follow each other.
struct LayerRun {
  int device;
  size_t first, end;
};
std::vector<LayerRun> layer_runs(const Placement& placement);

// Whether passes can be on different devices at once: there are several, each has one run with the
// experts of its layers, and nothing else uses it.
bool can_overlap(const Placement& placement, std::span<const LayerRun> runs);

// What is taken through the devices.  Passes that may be under way at once have buffers of their
// own on each device, or follow each other there.
struct Passes {
  int64_t count = 0;
  // The pass, good until it is asked for the next one.
  std::function<nn::ForwardParams(int64_t index)> params;
  // Queues what the pass's last device has still to do.  May be empty.
  std::function<Status(const nn::ForwardParams&, int64_t index)> queue_end = {};
  // The pass has gone through all devices.
  std::function<Status(const nn::ForwardParams&, int64_t index)> finish;
};
// After an error no device works any more; passes not finished are without effect but in their
// buffers and the rows that they wrote.
Status run_in_waves(std::span<const LayerRun> runs, const Passes& passes);

}  // namespace fathom::run
