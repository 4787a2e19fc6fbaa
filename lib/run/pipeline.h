// Passes that follow each other through the devices, so that each device works on another one:
// chunks of a prompt (session_pipeline.cc), groups of a batch of sessions (session_batch.cc).
//
//   wave       0     1     2     3
//   cuda:0   p0    p1    p2
//   cuda:1         p0    p1    p2       rows go over between the waves
//
// Where a pass goes to and fro, as when routed experts live on other devices than their layers,
// others take the turns that it leaves:
//
//   cuda:0     a p0   a p1   a p2   a p0   a p1       a: attention of a layer, and its own network
//   cpu               e p0   e p1   e p2   e p0       e: routed experts; rows and sums go over
//                                                     beside what both compute
//
// A pass has the bits that it has alone: the devices do the same operations on the same rows.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "../nn/forward.h"
#include "fathom/plan.hpp"

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

// Whether passes can take turns on the devices: a pass has steps on several, and rows of the cache
// are with their layers.
bool can_take_turns(const Placement& placement);

// How chunks of one prompt can go through the devices of a plan; in turns, where it has
// prefill_in_flight of them.
// In turns three keep two devices at work also while rows are copied: one on each, one on the way.
inline constexpr int64_t kChunksInTurns = 3;
bool chunks_may_overlap(const Plan& plan);  // as far as the cache goes
enum class ChunkFlow : uint8_t { kOneByOne, kWaves, kTurns };
ChunkFlow chunk_flow(const Plan& plan);

// What is taken through the devices.  Passes that may be under way at once have buffers of their
// own on each device, or follow each other there.
struct Passes {
  int64_t count = 0;
  // The pass, good until it is asked for the next one; in turns, for as long as it is under way.
  std::function<nn::ForwardParams(int64_t index)> params;
  // Queues what the pass's last device has still to do.  May be empty.
  std::function<Status(const nn::ForwardParams&, int64_t index)> queue_end = {};
  // The pass has gone through all devices.
  std::function<Status(const nn::ForwardParams&, int64_t index)> finish;
};
// After an error no device works any more; passes not finished are without effect but in their
// buffers and the rows that they wrote.
Status run_in_waves(std::span<const LayerRun> runs, const Passes& passes);

// At most `in_flight` passes at once; pass i is in the buffers of number i % in_flight.  queue_end
// is not asked for.
Status run_in_turns(const Placement& placement, int64_t in_flight, const Passes& passes);

}  // namespace fathom::run
