// Added tokens ("<｜User｜>", "<think>", ...): their places in a text, found by an automaton in one
// pass (Aho and Corasick 1975, with the matches of a leftmost-longest search).
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "arena.h"

namespace fathom::io {

struct AddedToken {
  std::string_view text;  // at most kMaxAddedBytes, not empty
  int32_t id;
};
inline constexpr int64_t kMaxAddedBytes = 256;

// A view; the arrays stand in the tokenizer's block.
class AddedMatcher {
 public:
  struct Match {
    size_t begin, end;
    int32_t id;  // -1: none, and begin == end == size of the text
  };

  // The automaton under construction.  The states are numbered in breadth-first order, so the
  // children of a state follow one another and a child's number is that of its edge plus one.
  struct Automaton {
    explicit Automaton(std::vector<AddedToken> tokens);  // distinct texts
    std::vector<uint8_t> label;        // [n_states - 1] byte of each edge, in order of the states
    std::vector<uint32_t> first_edge;  // [n_states + 1]
    std::vector<uint32_t> fail;        // [n_states] where to go on when no edge fits
    std::vector<int32_t> id;           // [n_states] token that ends here, -1: none
    std::vector<uint16_t> length;      // [n_states] bytes of that token
  };
  // Takes the arrays and, unless the arena counts, copies the automaton into them.
  static AddedMatcher carve(Arena& arena, const Automaton& automaton) noexcept;

  // The leftmost token in `text` at or after `from`; of those that begin there the longest.
  Match next(std::string_view text, size_t from) const noexcept;

 private:
  static constexpr uint32_t kRoot = 0;
  static constexpr uint32_t kNoState = UINT32_MAX;  // no such edge; as `fail`: the search ends here
  static uint32_t child(const uint8_t* label, const uint32_t* first_edge, uint32_t state,
                        uint8_t byte) noexcept;

  uint32_t n_states_ = 0;
  const uint8_t* label_ = nullptr;
  const uint32_t* first_edge_ = nullptr;
  const uint32_t* fail_ = nullptr;
  const int32_t* id_ = nullptr;
  const uint16_t* length_ = nullptr;
  const uint32_t* from_root_ = nullptr;  // [256] child of the root, or the root
};

}  // namespace fathom::io
