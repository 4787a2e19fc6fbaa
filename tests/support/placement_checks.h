// What a plan says about its placement, held against what could be: parts are moved for real and
// priced by cost_of(); nothing of the solver's search, nor of the code that finds the reasons, is
// used.
#pragma once

#include <string>
#include <vector>

#include "fathom/plan.hpp"
#include "lib/run/placement_solver.h"

namespace fathom::test {

// Sentences about what is not as it should be; none: nothing speaks against the plan.
//
// - No single part, moved anywhere, makes passes shorter and cards no less even, or cards evener
// and
//   passes no longer; nor does a part for every card at once, from what is slower.
// - No single part, moved from a slower device to a faster one, saves more than evenness may cost.
// - The cause, where cards are uneven: what it says does not fit does not fit, the figures are
// those
//   of the placement it names, that one is dearer than allowed, and a search of its own finds none
//   that is not.
std::vector<std::string> refute(const run::SolverProblem& problem, const Plan& plan);

}  // namespace fathom::test
