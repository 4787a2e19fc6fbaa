// StopMatcher: finds stop strings in text that arrives in pieces, and hands out only what can no
// longer be part of one.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <string_view>

namespace fathom::run {

class StopMatcher {
 public:
  // Empty strings are ignored.  The strings must outlive the matcher.
  explicit StopMatcher(std::span<const std::string> stops) : stops_(stops) {}

  // Takes `text`; appends to `out` what is settled.  True when a stop string was found: `out` ends
  // before it and nothing more is to be pushed.
  bool push(std::string_view text, std::string& out) {
    held_ += text;
    size_t found = std::string::npos;
    for (const std::string& stop : stops_)
      if (!stop.empty()) found = std::min(found, held_.find(stop));
    if (found != std::string::npos) {
      out.append(held_, 0, found);
      held_.clear();
      return true;
    }
    const size_t keep = longest_open_suffix();
    out.append(held_, 0, held_.size() - keep);
    held_.erase(0, held_.size() - keep);
    return false;
  }
  // Appends what is still held back: the text has ended without a stop.
  void finish(std::string& out) {
    out += held_;
    held_.clear();
  }

 private:
  // Length of the longest suffix of held_ that begins a stop string.
  size_t longest_open_suffix() const {
    size_t longest = 0;
    for (const std::string& stop : stops_)
      for (size_t n = std::min(held_.size(), stop.empty() ? 0 : stop.size() - 1); n > longest; --n)
        if (std::string_view(held_).substr(held_.size() - n) ==
            std::string_view(stop).substr(0, n)) {
          longest = n;
          break;
        }
    return longest;
  }

  std::span<const std::string> stops_;
  std::string held_;
};

}  // namespace fathom::run
