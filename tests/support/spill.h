// Sessions under budgets that end: what the tests of the ladder and of its files share.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "support/golden.h"
#include "support/loaded_model.h"

namespace fathom::test {

// A folder of its own on a disk, which /tmp often is not; removed at the end of the test.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& name)
      : path_(std::filesystem::path("/var/tmp") /
              ("fathom_" + std::to_string(getpid()) + "_" + name)) {
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::string path() const { return path_.string(); }
  int64_t n_entries() const {
    int64_t n = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(path_)) ++n;
    return n;
  }

 private:
  std::filesystem::path path_;
};

// `n` tokens of running text, repeated where the text is shorter.
inline std::vector<int32_t> long_text(int64_t n) {
  const auto golden = Golden::load(test_data("trained/golden.safetensors"));
  const auto tokens = golden.i32("ppl.tokens");
  std::vector<int32_t> text(static_cast<size_t>(n));
  for (size_t i = 0; i < text.size(); ++i)
    text[i] = tokens[(i + i / tokens.size() * 37) % tokens.size()];
  return text;
}

// Leaves the device `bytes` beyond what it holds.
inline void leave(const Model& model, int64_t bytes, int device = 0) {
  Engine engine = model.engine();
  require_ok(engine.set_budget(
      device, engine.memory().devices[static_cast<size_t>(device)].bytes_now + bytes));
}

inline int64_t count_events(const Session& session, std::string_view kind) {
  int64_t n = 0;
  for (const Event& event : session.events()) n += event.kind == kind;
  return n;
}

}  // namespace fathom::test
