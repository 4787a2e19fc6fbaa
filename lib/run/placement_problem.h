// From a model file and an engine to the numbers that the placement solver takes.
#pragma once

#include <vector>

#include "../io/tensor_file.h"
#include "engine_state.h"
#include "fathom/plan.hpp"
#include "placement_solver.h"

namespace fathom::run {

// Bytes come from the layouts and scratch functions that also allocate, seconds from the cost
// model.  Of `plan` are read: model, config, devices (budgets), cache types.  `available` [device]
// is what the plan may take in all; `chunk` and `context` are the passes to make room for.
struct PlacementInputs {
  const EngineState& engine;
  const io::TensorFile& file;
  const Plan& plan;
  const PlacementPins& pins;
  std::vector<int64_t> available;
  int64_t host_available = INT64_MAX;
  int64_t tokenizer_bytes = 0;
  int64_t chunk = 1, context = 1;
};
Result<SolverProblem> placement_problem(const PlacementInputs& inputs);

}  // namespace fathom::run
