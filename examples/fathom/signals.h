// SIGINT and SIGTERM: the first one cancels what runs, cleanly; the second one ends the program.
// A closed pipe on stdout is an error of the write, not a signal.
#pragma once

#include "fathom/engine.hpp"

namespace cli {

void install_signal_handlers() noexcept;

// The flag that every long call of this program watches.
fathom::CancelToken& cancel_token() noexcept;

// 130 or 143 once a signal has come, else 0.
int signal_exit_code() noexcept;

// Takes a SIGINT back, for a chat that goes on after a cancelled answer.
void forget_interrupt() noexcept;

}  // namespace cli
