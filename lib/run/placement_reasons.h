// Why a placement is as it is: as data, and in words.
#pragma once

#include <string>
#include <vector>

#include "fathom/plan.hpp"
#include "placement_solver.h"

namespace fathom::run {

// What was weighed; `memory` and `time` are still the solver's.
PlacementBalance weigh(const SolverProblem& problem, const Solution& solution);

// What lies where, a line for every device with its share of memory and time; then the slowest
// stage and what keeps it from giving a part away.
std::vector<std::string> explain_placement(const SolverProblem& problem, const Plan& plan);

// To be called when bytes and seconds of the plan's devices stand: puts how even they are into its
// balance, forgets a cause where they are even after all, and tells it where not.
void tell_balance(Plan& plan);

}  // namespace fathom::run
