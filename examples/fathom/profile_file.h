// Where tuned profiles are kept: $XDG_CACHE_HOME/fathom/profiles (else ~/.cache/fathom/profiles),
// one file per model and machine.
#pragma once

#include <string>

#include "fathom/tune.hpp"
#include "options.h"

namespace cli {

// Empty when neither XDG_CACHE_HOME nor HOME is set.
std::string profile_path(const std::string& model, const std::string& machine);

// Makes the folders; written beside its place and renamed.  Leaves with kExitIo.
void write_profile(const std::string& path, const fathom::Profile& profile);

// The configuration of `flags` over the profile of this model and machine, when there is one that
// holds: what the user sets wins.  What is used, and why a profile is not, is said.
fathom::Config config_with_profile(const std::string& model, const ConfigFlags& flags);

}  // namespace cli
