// How the command line ends: the exit codes, and the short way out of a command.
//
// Commands are written for the case that all goes well; what fails says why on stderr and leaves
// through the exception Exit, so that models and sessions are torn down on the way.  The library
// itself throws nothing.
#pragma once

#include <string_view>
#include <utility>

#include "fathom/status.hpp"

namespace cli {

enum ExitCode : int {
  kExitOk = 0,
  kExitInternal = 1,
  kExitUsage = 2,
  kExitInfeasible = 3,
  kExitBadModel = 4,
  kExitIo = 5,
  kExitMemory = 6,
  kExitDevice = 7,
  kExitDeadline = 8,
  kExitInterrupted = 130,  // SIGINT
  kExitTerminated = 143,   // SIGTERM
};

// The table above for --help.
extern const char* const kExitCodeHelp;

struct Exit {
  int code;
};

// Exit code of a failed call.  kCancelled: by signal, else by deadline.
int exit_code(const fathom::Status& status) noexcept;

// Prints "fathom: <message>" to stderr and leaves.
[[noreturn]] void fail(const fathom::Status& status);
[[noreturn]] void fail(int code, std::string_view message);
[[noreturn]] inline void usage_error(std::string_view message) {
  fail(kExitUsage, message);
}

// The value, or the way out.
inline void must(fathom::Status status) {
  if (!status.ok()) fail(status);
}
template <class T>
T must(fathom::Result<T> result) {
  if (!result.ok()) fail(result.status());
  return std::move(result).value();
}

}  // namespace cli
