#include "exit.h"

#include <cstdio>
#include <string>

#include "signals.h"
#include "terminal.h"

namespace cli {

const char* const kExitCodeHelp =
    "Exit codes: 0 ok, 1 internal, 2 usage, 3 plan infeasible, 4 bad model or state file, 5 I/O,\n"
    "6 memory or budget, 7 device, 8 stopped by the deadline, 130 SIGINT, 143 SIGTERM.";

int exit_code(const fathom::Status& status) noexcept {
  using fathom::Code;
  switch (status.code()) {
    case Code::kOk:
      return kExitOk;
    case Code::kInvalidArgument:
    case Code::kConfig:
      return kExitUsage;
    case Code::kFormat:
    case Code::kChecksum:
    case Code::kVersion:
    case Code::kMismatch:
    case Code::kUnsupported:
      return kExitBadModel;
    case Code::kNotFound:
    case Code::kIo:
      return kExitIo;
    case Code::kBudget:
    case Code::kMemory:
    case Code::kContextFull:
      return kExitMemory;
    case Code::kDevice:
      return kExitDevice;
    case Code::kCancelled:
      return signal_exit_code() != 0 ? signal_exit_code() : kExitDeadline;
    case Code::kState:
    case Code::kBusy:
    case Code::kBufferTooSmall:
    case Code::kCallback:
    case Code::kNumeric:
    case Code::kForked:
    case Code::kInternal:
      return kExitInternal;
  }
  return kExitInternal;
}

void fail(const fathom::Status& status) {
  const int code = exit_code(status);
  if (status.message().empty()) fail(code, fathom::code_name(status.code()));
  fail(code, status.message());
}

void fail(int code, std::string_view message) {
  end_progress_line();
  std::string line = "fathom: ";
  line += message;
  line += '\n';
  std::fwrite(line.data(), 1, line.size(), stderr);
  throw Exit{code};
}

}  // namespace cli
