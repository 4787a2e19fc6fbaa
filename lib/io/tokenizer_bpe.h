// Byte-pair merging: the table of pairs that merge, and the merging of one piece of text.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <span>
#include <string_view>
#include <vector>

#include "arena.h"
#include "tokenizer_index.h"

namespace fathom::io {

// Two neighbouring tokens become one.  Its place in the file's list is its rank: low ranks first.
struct Merge {
  uint32_t left, right, merged;
};

// (left, right) -> rank.  A view; the arrays stand in the tokenizer's block.
class MergeTable {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  // Takes the arrays for `merges.size()` merges and, unless the arena counts, fills them.  A pair
  // that stands twice in the list has the later rank, as in the reference.
  static MergeTable carve(Arena& arena, std::span<const Merge> merges, uint64_t seed) noexcept;

  uint32_t rank(uint32_t left, uint32_t right) const noexcept {
    const Slot& slot = slots_[find(left, right)];
    return slot.rank;
  }
  uint32_t merged(uint32_t rank) const noexcept { return merged_[rank]; }

 private:
  struct Slot {
    uint32_t left, right, rank;  // rank kNone: empty
  };
  uint64_t find(uint32_t left, uint32_t right) const noexcept {
    uint64_t at = mix_bits((static_cast<uint64_t>(left) << 32 | right) ^ seed_) & mask_;
    while (slots_[at].rank != kNone && (slots_[at].left != left || slots_[at].right != right))
      at = (at + 1) & mask_;
    return at;
  }

  Slot* slots_ = nullptr;       // [mask_ + 1]
  uint32_t* merged_ = nullptr;  // [n_merges] the token that a merge of this rank makes
  uint64_t mask_ = 0;
  uint64_t seed_ = 0;
};

// Merges pieces, one after the other; keeps its scratch memory between them.
class BpeEncoder {
 public:
  // `byte_token`: [256] the token of each single byte.  Both outlive the encoder.
  BpeEncoder(const MergeTable& merges, const int32_t* byte_token) noexcept
      : merges_(merges), byte_token_(byte_token) {}

  // Appends the tokens of `piece` (shorter than 2^32 - 1 bytes): of all neighbours that merge, the
  // pair of the lowest rank first, of equals the leftmost.  O(n log n) for any table of merges.
  // A piece of more than kShort bytes takes about 20 bytes of scratch per byte.
  void encode(std::string_view piece, std::vector<int32_t>& ids);

 private:
  static constexpr size_t kShort = 64;
  static constexpr uint32_t kGone = UINT32_MAX;  // id of what was merged into its left neighbour
  struct Symbol {
    uint32_t id, previous, next;  // places; next == n: the last one
  };
  // Places by rank; the lists of few ranks are alive at a time.
  class Waiting {
   public:
    bool empty() const noexcept { return ranks_.empty(); }
    void add(uint32_t rank, uint32_t place);
    // The lowest rank, whose places are moved to `places`.
    uint32_t take_lowest(std::vector<uint32_t>& places);

   private:
    static constexpr uint32_t kNoList = UINT32_MAX;
    std::vector<uint32_t> list_of_;  // by rank
    std::vector<std::vector<uint32_t>> lists_;
    std::vector<uint32_t> free_;  // lists without a rank
    std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> ranks_;
  };

  void encode_short(std::string_view piece, std::vector<int32_t>& ids) const;
  void encode_long(std::string_view piece, std::vector<int32_t>& ids);
  static uint64_t key(uint32_t rank, uint32_t place) noexcept {
    return static_cast<uint64_t>(rank) << 32 | place;
  }
  uint32_t rank_at(uint32_t place) const noexcept;
  void merge(uint32_t rank, uint32_t place, uint32_t sweep_rank);

  const MergeTable& merges_;
  const int32_t* byte_token_;
  std::vector<Symbol> symbols_;
  Waiting waiting_;
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> urgent_;
};

}  // namespace fathom::io
