#include "watching.h"

#include <unistd.h>

#include <algorithm>

#include <fmt/format.h>

#include "exit.h"
#include "terminal.h"

namespace cli {

void add_timeline_flag(CLI::App& app, std::string& path) {
  app.add_option("--timeline", path,
                 "write what the memory did to FILE: .html, .svg, .csv or .json");
}

TimelineFile::TimelineFile(std::string path) : path_(std::move(path)) {
  if (path_.empty()) return;
  const fathom::Result<fathom::TimelineFormat> format = fathom::timeline_format_of(path_);
  if (!format.ok()) usage_error(fmt::format("--timeline: {}", format.status().message()));
  format_ = *format;
}

TimelineFile::~TimelineFile() {
  // The command has failed: what was recorded until then tells why.
  if (!engine_) return;
  const fathom::Engine engine(engine_);
  if (fathom::Status status = engine.write_timeline(path_, format_); !status.ok())
    note(fmt::format("fathom: {}", status.message()));
}

void TimelineFile::start(const fathom::Engine& engine) {
  if (path_.empty()) return;
  engine_ = engine.state();
  must(fathom::Engine(engine_).start_timeline());
}

void TimelineFile::finish() {
  if (!engine_) return;
  const fathom::Engine engine(std::exchange(engine_, nullptr));
  must(engine.write_timeline(path_, format_));
  note(fmt::format("{}: {}", path_, must(engine.timeline()).summary()));
}

std::string memory_line(const fathom::Session& session) {
  const fathom::Forecast forecast = session.forecast();
  double share = 0;  // of the budget that is closest to its end
  for (const fathom::BudgetForecast& budget : forecast.budgets)
    if (budget.budget_bytes > 0)
      share = std::max(
          share, static_cast<double>(budget.bytes_now) / static_cast<double>(budget.budget_bytes));
  return fmt::format("KV {}, budget {:.0f}%, room for {} tokens",
                     human_bytes(session.cache().size_bytes()), 100 * share,
                     with_commas(forecast.n_tokens_end));
}

LiveLine::LiveLine(const fathom::Session& session)
    : session_(session),
      draws_(draws_bars() && verbosity() != Verbosity::kQuiet && isatty(STDOUT_FILENO) == 0),
      start_(now_seconds()) {}

LiveLine::~LiveLine() {
  end_progress_line();
}

void LiveLine::token() {
  ++n_tokens_;
  if (!draws_) return;
  const double now = now_seconds();
  if (now - last_drawn_ < 0.1) return;
  last_drawn_ = now;
  draw_line(fmt::format("{} tokens, {:.1f} tok/s, {}", with_commas(session_.n_tokens()),
                        now > start_ ? static_cast<double>(n_tokens_) / (now - start_) : 0,
                        memory_line(session_)));
}

}  // namespace cli
