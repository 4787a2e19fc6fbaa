// What the plug-in `traced` (tests/plugins/traced.cc) hands to the program that opened it.
#pragma once

#include <chrono>
#include <string>
#include <vector>

namespace fathom::test {

struct TracedCall {
  using Clock = std::chrono::steady_clock;
  std::string name;  // function of Backend
  Clock::time_point end;
  double seconds;
  Clock::time_point begin() const {
    return end -
           std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }
};

// Exported by the plug-in under this name: the calls since the last one, in order.
inline constexpr const char* kTracedCallsEntry = "fathom_traced_calls";
using TracedCallsFunction = void (*)(std::vector<TracedCall>& out);

}  // namespace fathom::test
