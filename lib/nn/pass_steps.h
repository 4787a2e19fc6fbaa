// A pass in steps, each on one device, for passes that are under way at once on devices which share
// the layers: attention here, routed experts there.  While one pass is in its experts, another one
// is in its attention (lib/run/pipeline.h says who goes when).
//
//   device   cuda:0        cpu         cuda:0                  cpu         cuda:0
//   step     layers 0, 1   experts 1   add 1, attention 2      experts 2   add 2, attention 3 ...
//
// The operations and their order are those of forward(), and so are the bits.
#pragma once

#include <span>
#include <vector>

#include "forward.h"

namespace fathom::nn {

struct PassStep {
  int device = 0;
  bool embed = false;
  // In this order: experts of `in` [first_span, end_span), then its sum is added, if `add`; then
  // layers [first_layer, end_layer), of which the last may end with choosing experts.
  size_t in = 0, first_span = 0, end_span = 0;
  bool add = false;
  size_t first_layer = 0, end_layer = 0;
  // Then, when the last layer's experts begin here: spans [0, begun_spans) of it.
  size_t begun_spans = 0;
};
std::vector<PassStep> pass_steps(const Placement& placement);

// The turns of one pass: queue(), a sync() of the device, left(), bring(), and so on until ended().
// Its stages are its own but for what a step does not leave behind (Scratch::carve_in_flight).
class PassInSteps {
 public:
  // `steps` outlive it, and so does all that `params` names.
  PassInSteps(const ForwardParams& params, std::span<const PassStep> steps) noexcept
      : params_(params), steps_(steps) {}

  const ForwardParams& params() const noexcept { return params_; }
  bool ended() const noexcept { return next_ == steps_.size(); }
  int device() const noexcept { return steps_[next_].device; }
  const Stage& stage() const noexcept { return params_.stages[static_cast<size_t>(device())]; }
  // Layers whose cache rows are written, or queued to be; and those that the next step attends to.
  size_t n_written() const noexcept { return n_written_; }
  size_t reads_to() const noexcept { return steps_[next_].end_layer; }

  // Queues the step.  Errors: kCancelled, kDevice, those of the cache's status().
  Status queue();
  // The device has been waited for: queues what it may do while others have the rows (the layer's
  // own network), then
  void left() noexcept;
  // takes what the next step reads to its device, whose turn it is then.  Errors: kDevice.
  Status bring();

 private:
  ForwardParams params_;
  std::span<const PassStep> steps_;
  size_t next_ = 0, n_written_ = 0;
};

}  // namespace fathom::nn
