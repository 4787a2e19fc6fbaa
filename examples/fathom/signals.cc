#include "signals.h"

#include <unistd.h>
#include <csignal>

namespace cli {
namespace {

fathom::CancelToken g_cancel;
volatile std::sig_atomic_t g_signal = 0;

void on_signal(int number) {
  if (g_signal != 0) _exit(128 + number);
  g_signal = number;
  g_cancel.request();
}

}  // namespace

void install_signal_handlers() noexcept {
  // No SA_RESTART: a read from the terminal must return, so that ^C at the chat prompt ends it.
  struct sigaction action = {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, nullptr);
}

fathom::CancelToken& cancel_token() noexcept {
  return g_cancel;
}

int signal_exit_code() noexcept {
  return g_signal == 0 ? 0 : 128 + g_signal;
}

void forget_interrupt() noexcept {
  if (g_signal == SIGINT) {
    g_signal = 0;
    g_cancel.reset();
  }
}

}  // namespace cli
