// Absorbed attention of a block of queries over the rows of one text, on the devices where these
// lie.
//
//   rows       0 ........ section ........ section ....      sections of Step::section_rows
//   devices    home: s0, s1, s2 |  guest: s2, s3, s4         a section may be cut
//
// A section is attended from an empty state; what the sections give is merged at home, in their
// order, wherever and whenever they were computed.  Sections that lie on one device whole are
// queued there first, so that all devices work at once; in a cut one the running sums are handed on
// with the rows.
#include <algorithm>
#include <array>

#include "layers.h"
#include "transfer.h"

namespace fathom::nn {
namespace {

// Queries and sums on one device.
struct Queries {
  const float* latent;  // [n, n_heads, kv_lora_rank]
  const float* q;       // [n, n_heads, qk_head_dim], of which the RoPE columns are read
};
struct Sums {
  AttentionState state;  // [n, n_heads] each
  float* out;            // [n, n_heads, kv_lora_rank]
};

AttendAbsorbedParams params_of(const Step& s, const Queries& queries, const Sums& sums,
                               const KvRows& rows, int64_t n, int64_t position, bool begin,
                               bool finish) noexcept {
  const ModelConfig& c = s.config;
  const int64_t heads = c.num_attention_heads, rank = c.kv_lora_rank;
  return {.q_latent = queries.latent,
          .q_latent_token_stride = heads * rank,
          .q_latent_head_stride = rank,
          .q_rope = queries.q + c.qk_nope_head_dim,
          .q_rope_token_stride = heads * c.qk_head_dim(),
          .q_rope_head_stride = c.qk_head_dim(),
          .n_tokens = n,
          .n_heads = heads,
          .first_position = position,
          .scale = static_cast<float>(s.rope.softmax_scale),
          .rows = rows,
          .state = sums.state,
          .begin = begin,
          .finish = finish,
          .out = sums.out};
}

// Rows from `first` on of the pass, at home.
Queries queries_at_home(const Step& s, const BlockOfRows& block, int64_t first) noexcept {
  const int64_t heads = s.config.num_attention_heads;
  return {s.scratch.q_absorbed + (first - block.first) * heads * s.config.kv_lora_rank,
          s.scratch.q + first * heads * s.config.qk_head_dim()};
}
Sums sums_at_home(const Step& s, const BlockOfRows& block, int64_t first) noexcept {
  const Scratch& b = s.scratch;
  const int64_t at = (first - block.first) * s.config.num_attention_heads;
  return {{b.attn_state.max + at, b.attn_state.sum + at},
          b.attn_absorbed + at * s.config.kv_lora_rank};
}

class BlockAttention {
 public:
  BlockAttention(const Step& s, const Sequence& sequence, LayerSlot layer, const BlockOfRows& block,
                 int64_t first, int64_t n) noexcept
      : s_(s),
        cache_(*sequence.cache),
        layer_(layer),
        block_(block),
        first_(first),
        n_(n),
        position_(sequence.first_position + first - sequence.first_row),
        end_row_(position_ + n),  // rows beyond the last query would be masked anyway
        n_sections_((end_row_ + s.section_rows - 1) / s.section_rows) {}

  // False when the cache could not bring its rows in.
  Result<bool> run() noexcept {
    if (n_sections_ == 1) return section(0, total(), /*finish=*/true);
    FATHOM_TRY_ASSIGN(bool attended, queue_ahead());
    for (int64_t i = 0; i < n_sections_ && attended; ++i) {
      const Sums into = i == 0 ? total() : slot_on(layer_.stage, 0);
      Sums part = into;
      const int stage = i < kMostAhead ? ahead_[static_cast<size_t>(i)] : kNotAhead;
      if (stage == kNotAhead) {
        FATHOM_TRY_ASSIGN(attended, section(i, into, /*finish=*/false));
      } else if (stage == layer_.stage) {
        part = slot_on(layer_.stage, slot_of(i));
      } else {
        FATHOM_TRY(hand_on(stage, slot_on(stage, slot_of(i)), layer_.stage, into, true));
      }
      if (i > 0)
        s_.device.merge_attention(s_.op, {.n_tokens = n_,
                                          .n_heads = s_.config.num_attention_heads,
                                          .kv_lora_rank = s_.config.kv_lora_rank,
                                          .state = total().state,
                                          .out = total().out,
                                          .part = part.state,
                                          .part_out = part.out,
                                          .finish = i + 1 == n_sections_});
    }
    return attended;
  }

 private:
  // Sections that may be under way; those behind are attended in their turn.
  static constexpr int64_t kMostAhead = 32;
  static constexpr int kNotAhead = -1;
  static constexpr int64_t kValue = sizeof(float);

  const Stage& stage_of(int stage) const noexcept { return s_.stages[static_cast<size_t>(stage)]; }
  bool is_home(int stage) const noexcept { return stage == layer_.stage; }
  Backend& device_of(int stage) const noexcept {
    return is_home(stage) ? s_.device : *stage_of(stage).device;
  }
  const OpContext& op_of(int stage) const noexcept {
    return is_home(stage) ? s_.op : stage_of(stage).op;
  }
  int64_t heads() const noexcept { return s_.config.num_attention_heads; }

  // At home the block's sums are where its queries are, and slots behind the block; on other
  // devices there are slots alone.  Slot 0 is for the section whose turn it is.  A slot is one
  // piece of memory: out, max, sum.
  Sums total() const noexcept { return sums_at_home(s_, block_, first_); }
  int64_t slot_values() const noexcept { return n_ * heads() * (s_.config.kv_lora_rank + 2); }
  bool is_slot(const Sums& sums) const noexcept {
    return sums.state.max == sums.out + n_ * heads() * s_.config.kv_lora_rank;
  }
  Sums slot_on(int stage, int64_t slot) const noexcept {
    const int64_t values = n_ * heads() * s_.config.kv_lora_rank;
    float* out = is_home(stage)
                     ? s_.scratch.attn_absorbed + block_.n * heads() * s_.config.kv_lora_rank
                     : stage_of(stage).scratch.attn_absorbed;
    out += slot * slot_values();
    return {{out + values, out + values + n_ * heads()}, out};
  }
  int64_t n_slots(int stage) const noexcept {
    const Scratch& b = is_home(stage) ? s_.scratch : stage_of(stage).scratch;
    const int64_t rank = s_.config.kv_lora_rank, taken = is_home(stage) ? block_.n * rank : 0;
    return (b.block_rows * (rank + 2) - taken) * heads() / slot_values();
  }
  Queries queries_on(int stage) const noexcept {
    if (is_home(stage)) return queries_at_home(s_, block_, first_);
    return {stage_of(stage).scratch.q_absorbed, stage_of(stage).scratch.q};
  }
  void attend(int stage, const Sums& sums, const KvRows& rows, bool begin,
              bool finish) const noexcept {
    device_of(stage).attend_absorbed(
        op_of(stage), params_of(s_, queries_on(stage), sums, rows, n_, position_, begin, finish));
  }
  // The slot of a section that was queued ahead: from 1 on by device.
  int64_t slot_of(int64_t section) const noexcept {
    const auto end = ahead_.begin() + section;
    return 1 + std::count(ahead_.begin(), end, *end);
  }

  // Takes the queries to another device, once.
  Status send_queries(int stage) noexcept {
    const uint64_t bit = stage < 64 ? uint64_t{1} << stage : 0;
    if (is_home(stage) || (sent_ & bit) != 0) return {};
    sent_ |= bit;
    const Stage& guest = stage_of(stage);
    const Queries from = queries_on(layer_.stage);
    const int64_t values = n_ * heads() * kValue;
    FATHOM_TRY(s_.device.sync(s_.op));
    FATHOM_TRY(guest.device->sync(guest.op));  // of what it did before
    FATHOM_TRY(transfer(s_.device, from.latent, *guest.device, guest.scratch.q_absorbed,
                        values * s_.config.kv_lora_rank, s_.staging));
    return transfer(s_.device, from.q, *guest.device, guest.scratch.q,
                    values * s_.config.qk_head_dim(), s_.staging);
  }

  // Takes sums from device to device; `whole`: with the state, so that rows can be added.
  Status hand_on(int from, const Sums& source, int to, const Sums& target, bool whole) noexcept {
    Backend &a = device_of(from), &b = device_of(to);
    const int64_t values = n_ * heads() * kValue;
    FATHOM_TRY(a.sync(op_of(from)));
    FATHOM_TRY(b.sync(op_of(to)));
    if (whole && is_slot(source) && is_slot(target))
      return transfer(a, source.out, b, target.out, slot_values() * kValue, s_.staging);
    if (whole) {
      FATHOM_TRY(transfer(a, source.state.max, b, target.state.max, values, s_.staging));
      FATHOM_TRY(transfer(a, source.state.sum, b, target.state.sum, values, s_.staging));
    }
    return transfer(a, source.out, b, target.out, values * s_.config.kv_lora_rank, s_.staging);
  }

  int64_t first_row_of(int64_t section) const noexcept { return section * s_.section_rows; }
  int64_t end_row_of(int64_t section) const noexcept {
    return std::min(first_row_of(section + 1), end_row_);
  }

  // A section into `sums` at home, from device to device as its rows lie.
  Result<bool> section(int64_t index, const Sums& sums, bool finish) noexcept {
    const int64_t first = first_row_of(index), end = end_row_of(index);
    const auto sums_on = [&](int stage) { return is_home(stage) ? sums : slot_on(stage, 0); };
    int stage = layer_.stage;
    for (int64_t row = first; row < end;) {
      const RowPiece piece =
          cache_.piece(layer_.stage, layer_.slot, s_.op, row, end, Where::kAnywhere);
      if (piece.rows.n_rows == 0) return false;
      if (piece.stage != stage) {
        FATHOM_TRY(send_queries(piece.stage));
        if (row > first)
          FATHOM_TRY(hand_on(stage, sums_on(stage), piece.stage, sums_on(piece.stage), true));
        stage = piece.stage;
      }
      const int64_t next = row + piece.rows.n_rows;
      attend(stage, sums_on(stage), piece.rows, row == first, finish && next == end);
      row = next;
    }
    if (!is_home(stage))
      FATHOM_TRY(hand_on(stage, sums_on(stage), layer_.stage, sums, /*whole=*/!finish));
    return true;
  }

  // Queues the sections that lie on other devices whole, then those of this one that come behind
  // them.
  Result<bool> queue_ahead() noexcept {
    ahead_.fill(kNotAhead);
    if (s_.stages.size() < 2) return true;
    const int64_t n = std::min(n_sections_, kMostAhead);
    bool behind_guests = false;
    for (int64_t i = 0; i < n; ++i) {
      const int stage = cache_.lies_on(layer_.stage, first_row_of(i), end_row_of(i));
      if (stage < 0) continue;
      behind_guests = behind_guests || !is_home(stage);
      if (!behind_guests) continue;  // its turn is now
      ahead_[static_cast<size_t>(i)] = stage;
      if (slot_of(i) >= n_slots(stage)) ahead_[static_cast<size_t>(i)] = kNotAhead;
    }
    for (const bool at_home : {false, true})
      for (int64_t i = 0; i < n; ++i) {
        const int stage = ahead_[static_cast<size_t>(i)];
        if (stage == kNotAhead || is_home(stage) != at_home) continue;
        FATHOM_TRY(send_queries(stage));
        const RowPiece piece = cache_.piece(layer_.stage, layer_.slot, s_.op, first_row_of(i),
                                            end_row_of(i), Where::kAnywhere);
        if (piece.rows.n_rows == 0) return false;
        attend(stage, slot_on(stage, slot_of(i)), piece.rows, /*begin=*/true, /*finish=*/false);
      }
    return true;
  }

  const Step& s_;
  const RowSourceOf& cache_;
  const LayerSlot layer_;
  const BlockOfRows block_;
  const int64_t first_, n_;  // rows of the pass
  const int64_t position_, end_row_, n_sections_;
  uint64_t sent_ = 0;                  // devices that have the queries
  std::array<int, kMostAhead> ahead_;  // by section: where it was queued
};

}  // namespace

Result<bool> attend_rows(const Step& s, const Sequence& sequence, LayerSlot layer,
                         const BlockOfRows& block, int64_t first, int64_t n) noexcept {
  return BlockAttention(s, sequence, layer, block, first, n).run();
}

AttendAbsorbedParams params_at_home(const Step& s, const BlockOfRows& block, int64_t first,
                                    int64_t n, const KvRows& rows, int64_t position) noexcept {
  return params_of(s, queries_at_home(s, block, first), sums_at_home(s, block, first), rows, n,
                   position, /*begin=*/true, /*finish=*/true);
}

void attend_as_guest(const Step& s, const KvRows& rows, int64_t n) noexcept {
  const Scratch& b = s.scratch;
  s.device.attend_absorbed(s.op, params_of(s, {b.q_absorbed, b.q}, {b.attn_state, b.attn_absorbed},
                                           rows, n, 0, /*begin=*/true, /*finish=*/true));
}

}  // namespace fathom::nn
