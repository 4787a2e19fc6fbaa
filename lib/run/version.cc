// The version of the library: that of the headers it was built with.
#include "fathom/version.hpp"

namespace fathom {

std::string_view version() noexcept {
  return FATHOM_VERSION_STRING;
}

}  // namespace fathom
