// Hash tables of the tokenizer: open addressing over flat arrays, a power of two of slots at most
// half full.  The hash is seeded with a hash of the file's own content, so that a file cannot be
// made whose names all fall into one slot.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace fathom::io {

inline uint64_t mix_bits(uint64_t x) noexcept {
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93u;
  x ^= x >> 32;
  x *= 0xD6E8FEB86659FD93u;
  x ^= x >> 32;
  return x;
}

inline uint64_t hash_text(std::string_view text, uint64_t seed) noexcept {
  uint64_t hash = mix_bits(seed ^ text.size());
  while (text.size() >= 8) {
    uint64_t word;
    std::memcpy(&word, text.data(), 8);
    hash = mix_bits(hash ^ word);
    text.remove_prefix(8);
  }
  uint64_t rest = 0;
  if (!text.empty()) std::memcpy(&rest, text.data(), text.size());
  return mix_bits(hash ^ rest);
}

// Slots for `n` entries: at least twice as many, a power of two.
inline int64_t hash_slots(int64_t n) noexcept {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n) * 2 + 1));
}

// Text -> number of an entry.  The texts stand elsewhere: text_of(entry) gives them back.
class TextIndex {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  TextIndex() noexcept = default;
  // `slots` has `n_slots` (from hash_slots) entries and outlives the index.
  TextIndex(uint32_t* slots, int64_t n_slots, uint64_t seed) noexcept
      : slots_(slots), mask_(static_cast<uint64_t>(n_slots) - 1), seed_(seed) {}
  void clear() noexcept { std::memset(slots_, 0xFF, (mask_ + 1) * sizeof(uint32_t)); }

  template <class TextOf>
  uint32_t find(std::string_view text, TextOf&& text_of) const noexcept {
    return slots_ == nullptr ? kNone : slots_[slot(text, text_of)];
  }
  // The entry that already has this text, else `entry`, which now stands for it.
  template <class TextOf>
  uint32_t insert(std::string_view text, uint32_t entry, TextOf&& text_of) noexcept {
    uint32_t& place = slots_[slot(text, text_of)];
    if (place == kNone) place = entry;
    return place;
  }

 private:
  template <class TextOf>
  uint64_t slot(std::string_view text, TextOf&& text_of) const noexcept {
    uint64_t at = hash_text(text, seed_) & mask_;
    while (slots_[at] != kNone && text_of(slots_[at]) != text) at = (at + 1) & mask_;
    return at;
  }

  uint32_t* slots_ = nullptr;
  uint64_t mask_ = 0;
  uint64_t seed_ = 0;
};

}  // namespace fathom::io
