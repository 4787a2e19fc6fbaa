// ReferenceBackend: every operation written down as the formula says, in double precision over
// Eigen, with weights held as f32.  The oracle of whole passes: slow, boring, independent of cpu/.
#pragma once

#include <memory>

#include "fathom/backend.hpp"

namespace fathom::test {

std::unique_ptr<Backend> make_reference_backend();

}  // namespace fathom::test
