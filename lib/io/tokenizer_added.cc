#include "tokenizer_added.h"

#include <algorithm>

namespace fathom::io {

uint32_t AddedMatcher::child(const uint8_t* label, const uint32_t* first_edge, uint32_t state,
                             uint8_t byte) noexcept {
  const uint8_t* const begin = label + first_edge[state];
  const uint8_t* const end = label + first_edge[state + 1];
  const uint8_t* const edge = std::lower_bound(begin, end, byte);
  return edge != end && *edge == byte ? static_cast<uint32_t>(edge - label) + 1 : kNoState;
}

AddedMatcher::Automaton::Automaton(std::vector<AddedToken> tokens) {
  std::sort(tokens.begin(), tokens.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.text < b.text; });

  // The trie: a state is a prefix, that is a range of the sorted tokens and a depth.
  struct Range {
    size_t begin, end, depth;
  };
  std::vector<Range> states = {{0, tokens.size(), 0}};
  for (size_t s = 0; s < states.size(); ++s) {
    auto [begin, end, depth] = states[s];
    first_edge.push_back(static_cast<uint32_t>(label.size()));
    id.push_back(-1);
    length.push_back(0);
    if (begin < end && tokens[begin].text.size() == depth) {
      id.back() = tokens[begin].id;
      length.back() = static_cast<uint16_t>(depth);
      ++begin;
    }
    while (begin < end) {
      const char byte = tokens[begin].text[depth];
      size_t after = begin;
      while (after < end && tokens[after].text[depth] == byte) ++after;
      label.push_back(static_cast<uint8_t>(byte));
      states.push_back({begin, after, depth + 1});
      begin = after;
    }
  }
  first_edge.push_back(static_cast<uint32_t>(label.size()));

  // Where to go on when no edge fits: the longest proper suffix that is a state.  Not behind a
  // token that has ended, though: what begins later than it does not count any more.
  fail.assign(states.size(), kRoot);
  for (uint32_t s = 0; s < states.size(); ++s) {
    for (uint32_t edge = first_edge[s]; edge < first_edge[s + 1]; ++edge) {
      const uint32_t next = edge + 1;
      if (id[next] >= 0) {
        fail[next] = kNoState;
        continue;
      }
      if (s == kRoot) continue;
      uint32_t suffix = fail[s];
      uint32_t to = kNoState;
      while (suffix != kNoState) {
        to = child(label.data(), first_edge.data(), suffix, label[edge]);
        if (to != kNoState) break;
        if (suffix == kRoot) {
          to = kRoot;
          break;
        }
        suffix = fail[suffix];
      }
      fail[next] = to;
      if (to != kNoState) {  // a token that ends as the suffix ends here too
        id[next] = id[to];
        length[next] = length[to];
      }
    }
  }
}

AddedMatcher AddedMatcher::carve(Arena& arena, const Automaton& automaton) noexcept {
  const auto n = static_cast<int64_t>(automaton.fail.size());
  auto* const label = arena.take<uint8_t>(n);
  auto* const first_edge = arena.take<uint32_t>(n + 1);
  auto* const fail = arena.take<uint32_t>(n);
  auto* const id = arena.take<int32_t>(n);
  auto* const length = arena.take<uint16_t>(n);
  auto* const from_root = arena.take<uint32_t>(256);
  if (!arena.counting()) {
    std::copy(automaton.label.begin(), automaton.label.end(), label);
    std::copy(automaton.first_edge.begin(), automaton.first_edge.end(), first_edge);
    std::copy(automaton.fail.begin(), automaton.fail.end(), fail);
    std::copy(automaton.id.begin(), automaton.id.end(), id);
    std::copy(automaton.length.begin(), automaton.length.end(), length);
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t to = child(label, first_edge, kRoot, static_cast<uint8_t>(byte));
      from_root[byte] = to == kNoState ? kRoot : to;
    }
  }
  AddedMatcher matcher;
  matcher.n_states_ = static_cast<uint32_t>(n);
  matcher.label_ = label;
  matcher.first_edge_ = first_edge;
  matcher.fail_ = fail;
  matcher.id_ = id;
  matcher.length_ = length;
  matcher.from_root_ = from_root;
  return matcher;
}

AddedMatcher::Match AddedMatcher::next(std::string_view text, size_t from) const noexcept {
  Match found = {text.size(), text.size(), -1};
  if (n_states_ <= 1) return found;
  uint32_t state = kRoot;
  for (size_t i = from; i < text.size(); ++i) {
    const auto byte = static_cast<uint8_t>(text[i]);
    uint32_t to = kRoot;
    while (state != kRoot) {
      to = child(label_, first_edge_, state, byte);
      if (to != kNoState) break;
      state = fail_[state];
      if (state == kNoState) return found;
    }
    state = state == kRoot ? from_root_[byte] : to;
    if (id_[state] >= 0) found = {i + 1 - length_[state], i + 1, id_[state]};
  }
  return found;
}

}  // namespace fathom::io
