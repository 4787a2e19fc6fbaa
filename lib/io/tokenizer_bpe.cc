#include "tokenizer_bpe.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace fathom::io {

MergeTable MergeTable::carve(Arena& arena, std::span<const Merge> merges, uint64_t seed) noexcept {
  const auto n = static_cast<int64_t>(merges.size());
  const int64_t n_slots = hash_slots(n);
  MergeTable table;
  table.slots_ = arena.take<Slot>(n_slots);
  table.merged_ = arena.take<uint32_t>(n);
  table.mask_ = static_cast<uint64_t>(n_slots) - 1;
  table.seed_ = seed;
  if (arena.counting()) return table;

  std::fill_n(table.slots_, n_slots, Slot{0, 0, kNone});
  for (uint32_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& merge = merges[rank];
    table.slots_[table.find(merge.left, merge.right)] = {merge.left, merge.right, rank};
    table.merged_[rank] = merge.merged;
  }
  return table;
}

void BpeEncoder::encode(std::string_view piece, std::vector<int32_t>& ids) {
  if (piece.size() <= kShort)
    encode_short(piece, ids);
  else
    encode_long(piece, ids);
}

// A word: looking at all pairs for each merge is quicker than keeping them in order.
void BpeEncoder::encode_short(std::string_view piece, std::vector<int32_t>& ids) const {
  uint32_t symbols[kShort];
  uint32_t ranks[kShort];  // of symbols i and i + 1
  size_t n = piece.size();
  for (size_t i = 0; i < n; ++i)
    symbols[i] = static_cast<uint32_t>(byte_token_[static_cast<unsigned char>(piece[i])]);
  for (size_t i = 0; i + 1 < n; ++i) ranks[i] = merges_.rank(symbols[i], symbols[i + 1]);

  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i)
      if (ranks[i] < ranks[best]) best = i;
    if (ranks[best] == MergeTable::kNone) break;
    symbols[best] = merges_.merged(ranks[best]);
    std::memmove(symbols + best + 1, symbols + best + 2, (n - best - 2) * sizeof(uint32_t));
    --n;
    if (best + 1 < n) {
      std::memmove(ranks + best + 1, ranks + best + 2, (n - best - 2) * sizeof(uint32_t));
      ranks[best] = merges_.rank(symbols[best], symbols[best + 1]);
    }
    if (best > 0) ranks[best - 1] = merges_.rank(symbols[best - 1], symbols[best]);
  }
  for (size_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>(symbols[i]));
}

// The symbols are a doubly linked list inside an array; the pairs that merge wait in a heap as
// (rank, place of the left symbol).  An entry is stale when the pair at its place is another one by
// now: then its rank differs, since a rank belongs to one pair.
void BpeEncoder::encode_long(std::string_view piece, std::vector<int32_t>& ids) {
  const auto n = static_cast<uint32_t>(piece.size());
  constexpr uint32_t kGone = UINT32_MAX;  // as an id: merged into its left neighbour
  symbols_.clear();
  symbols_.reserve(n);
  for (uint32_t i = 0; i < n; ++i)
    symbols_.push_back(
        {static_cast<uint32_t>(byte_token_[static_cast<unsigned char>(piece[i])]), i - 1, i + 1});
  const auto rank_at = [&](uint32_t place) {
    const Symbol& symbol = symbols_[place];
    if (symbol.id == kGone || symbol.next == n) return MergeTable::kNone;
    return merges_.rank(symbol.id, symbols_[symbol.next].id);
  };

  heap_.clear();
  for (uint32_t i = 0; i + 1 < n; ++i)
    if (const uint32_t rank = rank_at(i); rank != MergeTable::kNone)
      heap_.push_back(static_cast<uint64_t>(rank) << 32 | i);
  constexpr std::greater<uint64_t> kLowestFirst;
  std::make_heap(heap_.begin(), heap_.end(), kLowestFirst);
  const auto offer = [&](uint32_t place) {
    const uint32_t rank = rank_at(place);
    if (rank == MergeTable::kNone) return;
    heap_.push_back(static_cast<uint64_t>(rank) << 32 | place);
    std::push_heap(heap_.begin(), heap_.end(), kLowestFirst);
  };

  while (!heap_.empty()) {
    const uint64_t entry = heap_.front();
    std::pop_heap(heap_.begin(), heap_.end(), kLowestFirst);
    heap_.pop_back();
    const auto rank = static_cast<uint32_t>(entry >> 32);
    const auto place = static_cast<uint32_t>(entry);
    if (rank_at(place) != rank) continue;
    Symbol& left = symbols_[place];
    Symbol& right = symbols_[left.next];
    left.id = merges_.merged(rank);
    left.next = right.next;
    right.id = kGone;
    if (left.next != n) symbols_[left.next].previous = place;
    offer(place);
    if (place > 0) offer(left.previous);
  }
  for (uint32_t place = 0; place != n; place = symbols_[place].next)
    ids.push_back(static_cast<int32_t>(symbols_[place].id));
}

}  // namespace fathom::io
