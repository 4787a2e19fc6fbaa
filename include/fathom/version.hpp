// The version of these headers, and of the library they are linked with.
#pragma once

#include <string_view>

#define FATHOM_VERSION_STRING "0.1.0"

namespace fathom {

std::string_view version() noexcept;  // of the library

}  // namespace fathom
