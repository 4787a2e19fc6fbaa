#include "terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include <fmt/format.h>

#include "exit.h"

namespace cli {
namespace {

Verbosity g_verbosity = Verbosity::kNormal;
bool g_line_open = false;  // a bar stands on the current line of stderr

size_t terminal_columns() {
  winsize size = {};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

void write_line(std::string_view text) {
  end_progress_line();
  const std::string line = fmt::format("{}\n", text);
  std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace

bool draws_bars() {
  static const bool draws = [] {
    const char* no_color = std::getenv("NO_COLOR");
    return isatty(STDERR_FILENO) == 1 && (no_color == nullptr || *no_color == '\0');
  }();
  return draws;
}

void draw_line(std::string_view text) {
  const std::string drawn = fmt::format("\r{}\x1b[K", text.substr(0, terminal_columns() - 1));
  std::fwrite(drawn.data(), 1, drawn.size(), stderr);
  std::fflush(stderr);
  g_line_open = true;
}

void set_verbosity(Verbosity verbosity) noexcept {
  g_verbosity = verbosity;
}
Verbosity verbosity() noexcept {
  return g_verbosity;
}

void note(std::string_view text) {
  if (g_verbosity != Verbosity::kQuiet) write_line(text);
}

void detail(std::string_view text) {
  if (g_verbosity == Verbosity::kVerbose) write_line(text);
}

bool try_put(std::string_view text) noexcept {
  while (!text.empty()) {
    const ssize_t n = ::write(STDOUT_FILENO, text.data(), text.size());
    if (n < 0 && errno != EINTR) return false;
    if (n > 0) text.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

void put(std::string_view text) {
  if (!try_put(text)) fail(kExitIo, "cannot write to standard output");
}

std::string with_commas(int64_t value) {
  const std::string digits = std::to_string(value);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    text += digits[i];
    const size_t left = digits.size() - 1 - i;
    if (left > 0 && left % 3 == 0 && digits[i] != '-') text += ',';
  }
  return text;
}

std::string human_bytes(int64_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.2f} {}", value, kUnits[unit]);
}

std::string human_seconds(double seconds) {
  const int64_t s = static_cast<int64_t>(std::max(0.0, seconds) + 0.5);
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

double now_seconds() noexcept {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

Progress::Progress(std::string label, Unit unit, std::function<std::string()> extra)
    : label_(std::move(label)), unit_(unit), extra_(std::move(extra)), start_(now_seconds()) {}

Progress::~Progress() {
  end_progress_line();
}

std::string Progress::line(int64_t done, int64_t total) const {
  const double elapsed = now_seconds() - start_;
  const double rate = elapsed > 0 ? static_cast<double>(done) / elapsed : 0;
  const int64_t percent = total > 0 ? done * 100 / total : 100;
  std::string text =
      unit_ == Unit::kBytes
          ? fmt::format("{}  {} of {}  {}%", label_, human_bytes(done), human_bytes(total), percent)
          : fmt::format("{}  {} of {} tokens  {}%", label_, with_commas(done), with_commas(total),
                        percent);
  if (rate > 0) {
    text += unit_ == Unit::kBytes ? fmt::format("  {}/s", human_bytes(static_cast<int64_t>(rate)))
                                  : fmt::format("  {:.1f} tok/s", rate);
    text += done < total
                ? fmt::format("  ETA {}", human_seconds(static_cast<double>(total - done) / rate))
                : fmt::format("  {:.1f} s", elapsed);
  }
  if (extra_) text += "  " + extra_();
  return text;
}

void Progress::update(int64_t done, int64_t total) {
  if (g_verbosity == Verbosity::kQuiet || finished_ || total <= 0) return;
  finished_ = done >= total;
  if (draws_bars()) {
    const double now = now_seconds();
    if (!finished_ && now - last_drawn_ < 0.1) return;
    last_drawn_ = now;
    draw_line(line(done, total));
    if (finished_) end_progress_line();
    return;
  }
  const int64_t tenth = done * 10 / total;
  if (tenth == last_tenth_) return;
  last_tenth_ = tenth;
  write_line(line(done, total));
}

void end_progress_line() noexcept {
  if (!g_line_open) return;
  g_line_open = false;
  std::fputc('\n', stderr);
}

}  // namespace cli
