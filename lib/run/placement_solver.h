// The placement solver, on numbers alone: parts with bytes and seconds by device in, a placement
// out.  Where the numbers come from: placement.cc.
//
// What is minimised, for each kind of pass (a step of decode, a chunk of a prompt) with its weight:
//
//   makespan(S) = time of one pass through all devices + (S - 1) * time of the busiest device
//
// for S passes that follow each other through the devices: sessions that decode at once, chunks of
// one prompt.  S = 1 is latency alone; as S grows the slowest stage alone decides.  Ties go to the
// smaller slowest stage, then to the evener use of memory.  Bytes beyond a budget cost more than
// any time, so that a solution over budget comes out only where none was found within it.
//
// Method: layers in contiguous runs, from several starts (shares by memory, by speed, the fastest
// device filled first), then descent by moving run boundaries, experts of a layer, embedding and
// head, single layers and pairs of them, until no move helps; then again from around the best. Then
// cards are made to work alike where that costs at most kMostForEven of the fastest found: full
// ones trade experts for layers, those with too large parts give experts to each other.  Last,
// every move of one part that is no loss is made, so that no room is left that something slower
// could use. Against all placements of small instances: tests/run_placement_solver_test.cc.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "fathom/placement.hpp"
#include "placement_pins.h"

namespace fathom::run {

// A kind of pass: seconds by layer and device.
struct SolverPass {
  double weight = 1;      // passes of this kind that count
  int64_t in_flight = 1;  // S
  // The passes are of one session, whose buffers on a device hold one pass: they follow each other
  // where every device has its layers in one run and their experts with them.  Elsewhere they take
  // turns (pipeline.h), and this share of a pass's time lies between two of them, if no device
  // needs more.
  bool one_session = false;
  double in_turns = 1;
  std::vector<std::vector<double>> own;      // [layer][device] attention, router
  std::vector<std::vector<double>> network;  // [layer][device] dense network or shared experts
  std::vector<std::vector<double>> experts;  // [layer][device] all routed experts of the layer
  std::vector<double> embed, head;           // [device]
  // Residual rows from device to device, and hidden rows with choices there and back.
  std::vector<std::vector<double>> hand_over, round_trip;  // [device][device]
};

struct SolverProblem {
  int n_devices = 0;
  int64_t n_experts = 0;  // per MoE layer
  // Bytes by device.  What every device holds in any case is taken from the budgets before.
  std::vector<int64_t> budget;
  std::vector<int64_t> held;                                          // that; empty: nothing
  std::vector<int64_t> layers_scratch, guests_scratch, ends_scratch;  // once, by what lives there
  std::vector<int64_t> embed_bytes, head_bytes;
  std::vector<std::vector<int64_t>> own_bytes;  // [layer][device], cache included
  // [device][layers there] what the cache's pages take beyond own_bytes, since they are committed
  // in whole units; empty: nothing.
  std::vector<std::vector<int64_t>> page_rest;
  std::vector<std::vector<int64_t>> expert_bytes;  // [layer][device] of one expert; 0: dense layer
  std::vector<bool> is_host;                       // devices whose sum is bound by host_budget
  int64_t host_budget = INT64_MAX;
  bool tied_embedding = false;  // head and embedding are one where they share a device
  std::vector<SolverPass> passes;
  PlacementPins pins;
};

// What a placement costs.
struct PlacementCost {
  double makespan = 0;         // weighted over the kinds of passes; the goal
  std::vector<double> busy;    // [device] seconds of the first kind of pass
  double latency = 0;          // of one pass of the first kind
  std::vector<int64_t> bytes;  // [device] without what is held in any case
  int64_t bytes_over = 0;      // sum of bytes beyond budgets
};

PlacementCost cost_of(const SolverProblem& problem, const Placement& placement);

// Of the cards: largest over mean.
struct CardBalance {
  double memory = 1, time = 1;
  double miss = 0;  // how far all cards together are above the bounds
};
CardBalance balance_of(const SolverProblem& problem, const PlacementCost& cost);
// Bytes that no placement can find room for: what the parts take beyond all budgets together, or
// what a device holds in any case beyond its own.  0: there may be one that fits.
int64_t least_bytes_over(const SolverProblem& problem);

struct Solution {
  Placement placement;
  PlacementSeconds fastest;  // of the fastest found
  // Where `placement` is not within the bounds of evenness: the cheapest that is, or the nearest.
  std::optional<Placement> even;
};
Solution solve_placement(const SolverProblem& problem);
}  // namespace fathom::run
