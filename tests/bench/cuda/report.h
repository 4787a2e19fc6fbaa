// How the programs of `cmake/dev test cuda` say what came out: a line for each figure, which
// gpu_checks.py reads.  Everything else they print is for people.
//
//   @ name | figure | PASS, FAIL or INFO
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "fathom/status.hpp"

namespace fathom::test {

inline void report(std::string_view name, std::string_view figure, const char* verdict = "INFO") {
  fmt::print("@ {} | {} | {}\n", name, figure, verdict);
  std::fflush(stdout);
}
inline void report(std::string_view name, std::string_view figure, bool pass) {
  report(name, figure, pass ? "PASS" : "FAIL");
}

[[noreturn]] inline void fail(std::string_view text) {
  report("stopped", text, false);
  std::exit(1);
}
inline void must(const Status& status) {
  if (!status.ok()) fail(status.message());
}
template <class T>
T must(Result<T> result) {
  must(result.status());
  return std::move(result).value();
}

}  // namespace fathom::test
