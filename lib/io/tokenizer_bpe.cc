#include "tokenizer_bpe.h"

#include <algorithm>
#include <cstring>

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

// The symbols are a doubly linked list inside an array.  Where two neighbours merge, the place of
// the left one waits under the pair's rank.  All places of a rank are taken in one sweep from left
// to right, so memory is walked in order however long the piece is.  A place is stale when the pair
// there is another one by now; then its rank differs, since a rank belongs to one pair.
void BpeEncoder::encode_long(std::string_view piece, std::vector<int32_t>& ids) {
  const auto n = static_cast<uint32_t>(piece.size());
  symbols_.clear();
  symbols_.reserve(n);
  for (uint32_t i = 0; i < n; ++i)
    symbols_.push_back(
        {static_cast<uint32_t>(byte_token_[static_cast<unsigned char>(piece[i])]), i - 1, i + 1});
  for (uint32_t i = 0; i + 1 < n; ++i)
    if (const uint32_t rank = rank_at(i); rank != MergeTable::kNone) waiting_.add(rank, i);

  std::vector<uint32_t> sweep;
  while (!waiting_.empty()) {
    const uint32_t rank = waiting_.take_lowest(sweep);
    if (!std::is_sorted(sweep.begin(), sweep.end())) std::sort(sweep.begin(), sweep.end());
    // What a merge makes possible usually has a higher rank and waits for its own sweep.  A token
    // that several merges make can bring up a lower rank: that comes before the rest of this one.
    size_t next = 0;
    while (next < sweep.size() || !urgent_.empty()) {
      uint64_t entry = next < sweep.size() ? key(rank, sweep[next]) : UINT64_MAX;
      if (!urgent_.empty() && urgent_.top() < entry) {
        entry = urgent_.top();
        urgent_.pop();
      } else {
        ++next;
      }
      merge(static_cast<uint32_t>(entry >> 32), static_cast<uint32_t>(entry), rank);
    }
  }
  for (uint32_t place = 0; place < n; place = symbols_[place].next)
    ids.push_back(static_cast<int32_t>(symbols_[place].id));
}

uint32_t BpeEncoder::rank_at(uint32_t place) const noexcept {
  const Symbol& symbol = symbols_[place];
  if (symbol.id == kGone || symbol.next >= symbols_.size()) return MergeTable::kNone;
  return merges_.rank(symbol.id, symbols_[symbol.next].id);
}

// Merges the symbol at `place` with its right neighbour if they still have this rank.
void BpeEncoder::merge(uint32_t rank, uint32_t place, uint32_t sweep_rank) {
  if (rank_at(place) != rank) return;
  Symbol& left = symbols_[place];
  Symbol& right = symbols_[left.next];
  left.id = merges_.merged(rank);
  left.next = right.next;
  right.id = kGone;
  if (left.next < symbols_.size()) symbols_[left.next].previous = place;

  const auto offer = [&](uint32_t at) {
    const uint32_t new_rank = rank_at(at);
    if (new_rank == MergeTable::kNone) return;
    if (new_rank > sweep_rank)
      waiting_.add(new_rank, at);
    else
      urgent_.push(key(new_rank, at));
  };
  if (place > 0) offer(left.previous);
  offer(place);
}

void BpeEncoder::Waiting::add(uint32_t rank, uint32_t place) {
  if (rank >= list_of_.size()) list_of_.resize(rank + 1, kNoList);
  uint32_t& list = list_of_[rank];
  if (list == kNoList) {
    if (free_.empty()) {
      free_.push_back(static_cast<uint32_t>(lists_.size()));
      lists_.emplace_back();
    }
    list = free_.back();
    free_.pop_back();
    ranks_.push(rank);
  }
  lists_[list].push_back(place);
}

uint32_t BpeEncoder::Waiting::take_lowest(std::vector<uint32_t>& places) {
  const uint32_t rank = ranks_.top();
  ranks_.pop();
  const uint32_t list = list_of_[rank];
  list_of_[rank] = kNoList;
  places = std::move(lists_[list]);
  lists_[list] = {};
  free_.push_back(list);
  return rank;
}

}  // namespace fathom::io
