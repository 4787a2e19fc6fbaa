// A backend that does what another one does and tells a host how long each operation took.
#pragma once

#include <memory>

#include "fathom/backend.hpp"
#include "fathom/engine.hpp"

namespace fathom::run {

// What the observer is told.
//   kOperations  operations, each waited for: what it takes on its device
//   kCalls       operations, copies and waits, each as its call returns: what the thread that
//                calls does, while the device works through what was queued
enum class Observed { kOperations, kCalls };

// `device` is what the observer is told.
std::unique_ptr<Backend> observed(std::unique_ptr<Backend> backend, int device, OpObserver observer,
                                  Observed what = Observed::kOperations);

}  // namespace fathom::run
