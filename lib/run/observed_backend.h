// A backend that does what another one does and tells a host how long each operation took.
#pragma once

#include <memory>

#include "fathom/backend.hpp"
#include "fathom/engine.hpp"

namespace fathom::run {

// `device` is what the observer is told.
std::unique_ptr<Backend> observed(std::unique_ptr<Backend> backend, int device,
                                  OpObserver observer);

}  // namespace fathom::run
