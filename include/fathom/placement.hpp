// Placement: which device holds which part of a model.  A value of the plan; no device is special:
// embedding and output head are items like all others.
//
//   layer 0   cuda:0   attention, cache pages, norms, dense network
//   layer 1   cuda:0   attention, cache pages, norms, router, shared experts
//             cuda:0     experts   0 ..  95
//             cpu        experts  96 .. 255
//   ...
//
// A layer's cache lies with its attention, unless spans say that rows of it lie on other devices;
// attention then goes where the rows are.
//
// Devices are counted as Config::devices names them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/kv_page.hpp"
#include "fathom/model_config.hpp"

namespace fathom {

// Routed experts [first, first + count) of a layer.
struct ExpertSpan {
  int device = 0;
  int64_t first = 0, count = 0;
  bool operator==(const ExpertSpan&) const = default;
};

struct LayerPlacement {
  int device = 0;    // attention and its cache pages, norms, router, dense network, shared experts
  int64_t slot = 0;  // which of that device's layers, counted from 0
  // Ascending, without gaps, all n_routed_experts; empty in dense layers.
  std::vector<ExpertSpan> experts;
  bool operator==(const LayerPlacement&) const = default;
};

// Cache rows [first_row, end_row) of every layer whose attention is on `home` lie on `device`.
// Bounds are multiples of kv_span_rows(), which attention's partial results and pages share; the
// last span may end at kKvNoEnd.
struct KvSpan {
  int home = 0, device = 0;
  int64_t first_row = 0, end_row = 0;
  bool operator==(const KvSpan&) const = default;
};
inline constexpr int64_t kKvNoEnd = INT64_MAX;
constexpr int64_t kv_span_rows(int64_t page_tokens) noexcept {
  return page_tokens > kKvSplitRows ? page_tokens : kKvSplitRows;
}

struct Placement {
  int embed_device = 0;
  int head_device = 0;  // final norm and output head
  std::vector<LayerPlacement> layers;
  // By device: whether it keeps copies of experts of its layers that live elsewhere, while it has
  // memory that nothing else needs (experts.cache); empty: none does.
  std::vector<bool> keeps_copies;
  // By home, rows ascending, none twice.  Rows that no span names lie with their layer.
  std::vector<KvSpan> kv;

  bool has_copies(int device) const noexcept {
    return static_cast<size_t>(device) < keeps_copies.size() &&
           keeps_copies[static_cast<size_t>(device)];
  }
  // Everything of a layer on the device named for it; embedding and head with the first and last
  // layer.  `layer_device` [num_hidden_layers].
  static Placement by_layer(const ModelConfig& config, const std::vector<int>& layer_device);
  // Numbers the layers of every device anew; to be called after devices were changed.
  void number_slots();

  int64_t layers_on(int device) const noexcept;
  // Experts of other devices' layers, or of its own, that a device holds.
  int64_t experts_on(int device) const noexcept;
  // Whether a device holds cache rows of layers that live on others.
  bool holds_rows_of_others(int device) const noexcept;
  bool uses(int device) const noexcept;
  bool operator==(const Placement&) const = default;
};

// Cards - devices that are not CPUs - are to be as full as each other and to work as long: largest
// over mean of their budgets' shares and of their seconds in a decode step.  That may cost 1 % of
// the fastest placement's time.
inline constexpr double kEvenMemory = 1.05, kEvenTime = 1.10, kMostForEven = 1.01;

// Why they do not.
enum class UnevenCause : uint8_t {
  kNone = 0,       // they do, or there are no two cards
  kMemory = 1,     // no part of the busiest fits on an idler card; to make room costs more time
  kTransfers = 2,  // smaller parts than layers are experts on other cards; the way there costs more
  kUnlike = 3,     // cards differ in memory or speed: to fill or employ them alike costs more time
  kPins = 4,       // without the pins they would
  kGrown = 5,      // in the cost model's figures they do, at the context the placement was made for
};
constexpr std::string_view uneven_cause_name(UnevenCause cause) noexcept {
  constexpr std::string_view kNames[] = {"none", "memory", "transfers", "unlike", "pins", "grown"};
  return kNames[static_cast<int>(cause)];
}

// Predicted seconds: of one pass through all devices, and of what placement.goal counts.
struct PlacementSeconds {
  double step = 0, goal = 0;
};

// What was weighed when parts got their places.  All figures but `memory` and `time` are those of
// the cost function that the placement is the best of.
struct PlacementBalance {
  double memory = 1, time = 1;  // of the cards, as planned; without cards, of all devices
  // The device that works longest in a step, and those on which no single part of it would fit.
  int slowest = -1;
  std::vector<int> full;
  PlacementSeconds seconds;  // of the placement
  // Passes and text of which it made room; the plan may have found it to hold others.
  int64_t chunk_tokens = 0, context_tokens = 0;

  UnevenCause cause = UnevenCause::kNone;
  // Unless kNone.  The card that gives: the busiest, or where time is even the fullest.
  int giver = -1;
  int64_t part_bytes = 0;    // of its smallest part
  int64_t room_bytes = 0;    // the most that another card has left
  PlacementSeconds fastest;  // of the fastest placement found: kMostForEven times that is the limit
  // The cheapest placement found that meets both bounds; `even_meets` false: nothing does, and this
  // is the nearest.
  bool even_meets = false;
  double even_memory = 1, even_time = 1;
  PlacementSeconds even_seconds;
  Placement even;
};

}  // namespace fathom
