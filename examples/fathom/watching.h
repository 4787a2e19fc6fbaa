// What `fathom run` shows and writes of the memory while it works: the timeline's file and the live
// line.
#pragma once

#include <string>

#include <CLI/CLI.hpp>

#include "fathom/engine.hpp"
#include "fathom/session.hpp"

namespace cli {

void add_timeline_flag(CLI::App&, std::string& path);

// --timeline FILE: records from its making on, and writes the file at its end, however the command
// ends.  Does nothing for an empty path.
class TimelineFile {
 public:
  // Leaves with kExitUsage when the path's suffix names no format.
  explicit TimelineFile(std::string path);
  ~TimelineFile();
  TimelineFile(const TimelineFile&) = delete;
  TimelineFile& operator=(const TimelineFile&) = delete;

  void start(const fathom::Engine& engine);
  // Writes now and says so; leaves with the exit code when that fails.
  void finish();

 private:
  std::string path_;
  fathom::TimelineFormat format_ = fathom::TimelineFormat::kHtml;
  std::shared_ptr<fathom::run::EngineState> engine_;
};

// "KV 1.25 GiB, budget 62%, room for 81,920 tokens"
std::string memory_line(const fathom::Session&);

// Shows a generation's progress on one line of the terminal, 10 times a second at most.  Quiet when
// stderr is no terminal, with -q, and when the answer itself goes to a terminal.
class LiveLine {
 public:
  explicit LiveLine(const fathom::Session& session);
  ~LiveLine();
  LiveLine(const LiveLine&) = delete;
  LiveLine& operator=(const LiveLine&) = delete;
  void token();

 private:
  const fathom::Session& session_;
  bool draws_;
  double start_, last_drawn_ = 0;
  int64_t n_tokens_ = 0;
};

}  // namespace cli
