// What people see on stderr: notes, progress, numbers in readable form.  Answers go to stdout, by
// put(), and nothing else does.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace cli {

enum class Verbosity { kQuiet, kNormal, kVerbose };
void set_verbosity(Verbosity) noexcept;
Verbosity verbosity() noexcept;

// One line on stderr; note() not with -q, detail() only with -v.
void note(std::string_view text);
void detail(std::string_view text);

// Writes to stdout at once.  put() leaves with kExitIo when stdout is closed or full; try_put()
// answers false, for callbacks of the library.
void put(std::string_view text);
bool try_put(std::string_view text) noexcept;

std::string with_commas(int64_t value);     // "31,413,626,880"
std::string human_bytes(int64_t bytes);     // "29.26 GiB", "512 B"
std::string human_seconds(double seconds);  // "0:07", "1:02:03"

double now_seconds() noexcept;  // monotonic

// A bar on a terminal, redrawn in one line at most 10 times a second; elsewhere, and with
// NO_COLOR, a plain line every 10 percent; nothing with -q.
class Progress {
 public:
  enum class Unit { kBytes, kTokens };
  // `extra`, when given, adds something to each line.
  Progress(std::string label, Unit unit, std::function<std::string()> extra = {});
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(int64_t done, int64_t total);

 private:
  std::string line(int64_t done, int64_t total) const;

  std::string label_;
  Unit unit_;
  std::function<std::string()> extra_;
  double start_, last_drawn_ = 0;
  int64_t last_tenth_ = 0;
  bool finished_ = false;
};

// Whether stderr is a terminal on which a line may be drawn over and over.
bool draws_bars();
// Draws `text` over what stands on the current line, cut to the terminal's width.
void draw_line(std::string_view text);

// Ends a bar that stands on the current line, so that other text starts on its own.
void end_progress_line() noexcept;

}  // namespace cli
