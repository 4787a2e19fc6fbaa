// The home of the Backend interface.  Alone in its file, so that a plug-in that is linked with
// libfathom.a gets it without a backend.
#include "fathom/backend.hpp"

namespace fathom {

Backend::~Backend() = default;

}  // namespace fathom
