// How fast a plan runs on its devices, and how the work is spread: the forward pass itself, run
// over simulated devices whose memory is made up.  What a simulated session measures is what is
// predicted here; there is no second formula.
#pragma once

#include "../nn/weights.h"
#include "fathom/machine.hpp"
#include "fathom/plan.hpp"

namespace fathom::run {

// Fills in plan.speed and the devices' busy seconds.  `weights` are those of the plan's map; their
// data is not followed.
void predict(Plan& plan, const MachineDescription& machine, const nn::Weights& weights);
// Tokens per second of a long prompt half-way through max_context, with as many chunks at once as
// the plan has.
double prefill_rate(const Plan& plan, const MachineDescription& machine,
                    const nn::Weights& weights);
// Of n_rows tokens behind `position` others in `groups` passes that take turns.
double turns_seconds(const Plan& plan, const MachineDescription& machine,
                     const nn::Weights& weights, int64_t n_rows, int64_t position, int64_t groups);
// Of the step that writes token n_tokens of a text.
double step_seconds(const Plan& plan, const MachineDescription& machine, const nn::Weights& weights,
                    int64_t n_tokens);

}  // namespace fathom::run
