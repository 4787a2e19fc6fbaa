// The text of a tuned profile.  What is accepted says the same when it is written and read again,
// and can be applied.  Seed: what `fathom tune` wrote for the example model.
#include <string_view>

#include "fathom/tune.hpp"
#include "tensor_file_checks.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fathom;
  const Result<Profile> profile =
      Profile::parse(std::string_view(reinterpret_cast<const char*>(data), size));
  if (!profile.ok()) {
    test::require(!profile.status().message().empty());
    return 0;
  }
  const Result<Profile> again = Profile::parse(profile->to_json());
  test::require(again.ok());
  test::require(again->to_json() == profile->to_json());
  Config config;
  test::require(profile->apply(config).ok());
  return 0;
}
