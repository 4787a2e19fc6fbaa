// The layer functions and the buffers they share.  forward.cc strings them together.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "../io/arena.h"
#include "fathom/backend.hpp"
#include "fathom/config.hpp"
#include "fathom/model_config.hpp"
#include "fathom/placement.hpp"
#include "fathom/status.hpp"
#include "rope.h"
#include "weights.h"

namespace fathom::nn {

// Rows of queries that the absorbed form takes at a time: its latent queries are 576 columns per
// head, so longer blocks would cost more scratch than they save time.
inline constexpr int64_t kAbsorbedRows = 32;
// Attention over the rows of a text goes section by section, each from an empty state; what they
// give is merged in their order.  So devices that hold rows of one layer work side by side, with
// the bits of one.
inline constexpr int64_t kSectionRows = 32768;
static_assert(kSectionRows % kKvSplitRows == 0);
// Passes that may be under way at once in buffers of one session (pass_steps.h).
inline constexpr int64_t kMostInFlight = 4;
// Longer passes do without copies of experts: they read nearly all of them wherever they are.
inline constexpr int64_t kCopyPairs = 256;
// Rows of logits computed at a time when all positions are wanted.
inline constexpr int64_t kLogitRows = 8;

// What a device does in a pass, and so which buffers it needs.
struct DeviceRoles {
  bool embed = false;   // looks the tokens up
  bool layers = false;  // attention and what goes with it
  bool guests = false;  // routed experts of layers that live elsewhere
  bool head = false;    // final norm and logits
  bool copies = false;  // experts of a layer that keeps copies of those elsewhere, there or here
  bool rows = false;    // cache rows of layers that live elsewhere

  static DeviceRoles of(const Placement& placement, int device) noexcept;
  static constexpr DeviceRoles all() noexcept { return {true, true, true, true, false, false}; }
};

// Buffers of one pass over n_tokens rows on one device; those that its roles do not need are empty.
// All f32 but the ids.  Nothing here has a factor of the context length.
struct Scratch {
  float* logits;          // [min(n_tokens, kLogitRows), vocab_size]; first: outlives the pass
  TokenLogit* likeliest;  // [kMaxTopK + 1] of the last row of logits
  float* x;       // [n_tokens, hidden_size] residual stream; [min(n_tokens, kLogitRows), ...] where
                  // only the head is
  float* x_norm;  // the same shape
  float* cos_sin;  // [n_tokens, qk_rope_head_dim / 2, 2]

  // Attention; of a device that holds rows alone, a block of queries.
  float* q_latent;            // [n_tokens, q_lora_rank]
  float* q;                   // [n_tokens, n_heads, qk_head_dim]
  float* kv;                  // [n_tokens, kv_lora_rank + qk_rope_head_dim]
  float* attn;                // [n_tokens, n_heads, v_head_dim]
  AttentionState attn_state;  // [n_tokens, n_heads] each
  // Only absorbed attention; they share their bytes with x_norm and q_latent.
  int64_t block_rows;  // min(max(n_tokens, 2), kAbsorbedRows)
  float* q_absorbed;   // [block_rows, n_heads, kv_lora_rank]
  // The same for what attention gives, and its state; where a block of queries has fewer rows, the
  // sections that are not merged yet lie behind them (attention_rows.cc).
  float* attn_absorbed;  // [block_rows, n_heads, kv_lora_rank + 2]

  // Feed-forward; shares its bytes with the attention buffers.
  float* scores;          // [n_tokens, n_routed_experts]
  int32_t* expert_ids;    // [n_tokens, num_experts_per_tok]
  float* expert_weights;  // [n_tokens, num_experts_per_tok]
  float* routed;          // [n_tokens, hidden_size] sum over the routed experts
  // Passes of up to kCopyPairs (token, k) pairs, where experts have copies.
  float* expert_rows;   // [n_tokens, num_experts_per_tok, hidden_size] before they are added up
  int32_t* copied_ids;  // [n_tokens, num_experts_per_tok] -1: not among the copies

  static Scratch carve(Arena& arena, const ModelConfig& config, int64_t n_tokens,
                       const DeviceRoles& roles = DeviceRoles::all());
  // For `n` in [1, kMostInFlight] passes that take turns on the device: each has its own of what it
  // needs after its turn - x, x_norm, cos_sin, expert_ids, expert_weights, routed -, the rest is
  // that of the first.
  using InFlight = std::array<Scratch, kMostInFlight>;
  static InFlight carve_in_flight(Arena& arena, const ModelConfig& config, int64_t n_tokens,
                                  const DeviceRoles& roles, int64_t n);
};

// A device's part of a pass.
struct Stage {
  Backend* device = nullptr;
  OpContext op;
  Scratch scratch{};
};

class RowSourceOf;

// Rows of a pass that belong to one text: [first_row, first_row + n_tokens), at positions from
// first_position on.
struct Sequence {
  const RowSourceOf* cache;
  int64_t first_row, n_tokens;
  int64_t first_position;
};

// One pass over n_tokens rows on one device: everything a layer needs to know.
struct Step {
  Backend& device;
  OpContext op;
  const ModelConfig& config;
  const Rope& rope;
  const Scratch& scratch;
  int64_t n_tokens;
  std::span<const Sequence> sequences;  // all rows, in order; more than one only when absorbed
  AttentionForm form;
  // All stages of the pass, for layers whose cache rows lie on several, and staging: see
  // transfer.h.
  std::span<const Stage> stages = {};
  std::byte* staging = nullptr;
  int64_t section_rows = kSectionRows;  // another number for tests
};

// Rows that attention can take at once, and the stage on which they are.
struct RowPiece {
  KvRows rows;
  int stage = 0;
};
// Whether attention goes to rows on other devices, or wants them brought to its own.
enum class Where : uint8_t { kAnywhere, kHere };

// Where the rows of a layer are: implemented by the session's cache.  `stage` counts the devices of
// a pass, `layer_slot` the layers of that device.
class RowSourceOf {
 public:
  // Rows [0, n_rows) of a cache whose pages are all resident.
  virtual KvRows rows(int stage, int64_t layer_slot, int64_t n_rows) const noexcept = 0;
  // The rows to attend to next, from `first_row` (0, or where the piece before ended) to `end_row`
  // at most, all resident on one stage.  Pieces meet at multiples of kKvSplitRows; each is good
  // until the next is asked for, which may wait for `op`.  No rows: they could not be brought in,
  // and status() says why.  A cache whose pages are all resident has one piece.
  virtual RowPiece piece(int stage, int64_t layer_slot, const OpContext& op, int64_t first_row,
                         int64_t end_row, Where where) const noexcept {
    (void)where;
    return {room(stage, layer_slot, op, first_row, end_row), stage};
  }
  // Rows [0, end_row) where all of them are resident on this stage and stay in their places while
  // the pass queues, so that several texts can be attended at once; else no rows.
  virtual KvRows resident(int stage, int64_t layer_slot, int64_t end_row) const noexcept {
    (void)stage, (void)layer_slot, (void)end_row;
    return {};
  }
  // The stage on which rows [first_row, end_row) all are and stay while the pass lasts, so that
  // piece() may be asked for them at any time and has all of them; -1: none, or it is not known.
  virtual int lies_on(int stage, int64_t first_row, int64_t end_row) const noexcept {
    (void)first_row, (void)end_row;
    return stage;
  }
  // Where the rows from `first_row` on can be written, `end_row` at most, on this stage; written()
  // then takes them where they belong, if that is elsewhere.  No rows: as above.
  virtual KvRows room(int stage, int64_t layer_slot, const OpContext& op, int64_t first_row,
                      int64_t end_row) const noexcept {
    (void)op;
    KvRows part = rows(stage, layer_slot, end_row);
    part.first_row = first_row;
    part.n_rows = end_row - first_row;
    return part;
  }
  virtual void written(int stage, int64_t layer_slot, const OpContext& op,
                       const KvRows& rows) const noexcept {
    (void)stage, (void)layer_slot, (void)op, (void)rows;
  }
  // What went wrong since the pass began.
  virtual Status status() const noexcept { return {}; }

 protected:
  ~RowSourceOf() = default;
};

// One layer on one device, as RowSourceOf counts them.
struct LayerSlot {
  int stage;
  int64_t slot;
};

// Chunks of at least this many rows are cheaper in expanded form: expanding a row costs
// kv_lora_rank * (nope + v) once per chunk and head, and saves (2 kv_lora_rank + rope) -
// (nope + rope + v) per query and head.  max int64 where absorbed is always cheaper.
int64_t expanded_crossover_rows(const ModelConfig& config) noexcept;

// x += W_o attention(norm(x)).  Writes the rows of each sequence into its cache and attends over
// all that are there, in the absorbed form on the devices where they lie.  What is left in x is of
// no use when a cache's status() tells of a failure.  Errors: kDevice, of copies between devices.
Status mla_attention(const Step& step, const LayerWeights& weights, LayerSlot layer) noexcept;
// The absorbed form over the rows of one text (attention_rows.cc): rows [first, first + n) of the
// pass, all of one sequence, whose latent queries lie in b.q_absorbed behind those of their block,
// into the same place of b.attn_absorbed.  False when the cache could not bring its rows in.
// Errors: kDevice.
struct BlockOfRows {
  int64_t first, n;  // of the pass
};
Result<bool> attend_rows(const Step& step, const Sequence& sequence, LayerSlot layer,
                         const BlockOfRows& block, int64_t first, int64_t n) noexcept;
// What attention over rows at home, all of one section, takes for the same rows of the pass.
AttendAbsorbedParams params_at_home(const Step& step, const BlockOfRows& block, int64_t first,
                                    int64_t n, const KvRows& rows, int64_t position) noexcept;
// The share of a device that only holds rows: attention of a block of n queries, for measuring.
void attend_as_guest(const Step& step, const KvRows& rows, int64_t n) noexcept;

// x += ffn(norm(x)): dense, or routed and shared experts, all on this device.
void feed_forward(const Step& step, const LayerWeights& weights, bool moe) noexcept;

// The parts of it, for layers whose experts live on several devices (experts_apart.cc).
//   choose_experts   x_norm, expert_ids and expert_weights from x
//   add_experts      routed (+)= experts of one span; `begin` starts the sum
//   add_own_network  x += the dense network or the shared experts of x_norm
//   add_routed       x += routed
void choose_experts(const Step& step, const LayerWeights& weights) noexcept;
void add_experts(const Step& step, const ExpertWeights& experts, bool begin) noexcept;
void add_own_network(const Step& step, const LayerWeights& weights) noexcept;
void add_routed(const Step& step) noexcept;

// Copies of routed experts on the device of their layer, beside the experts that the placement put
// elsewhere; who keeps them: lib/run/expert_cache.h.
class ExpertCopies {
 public:
  // The copies of a layer as all its experts, of which only those may be used that has() names;
  // null: the layer keeps none.
  virtual const ExpertWeights* copies(size_t layer) const noexcept = 0;
  virtual bool has(size_t layer, int32_t expert) const noexcept = 0;
  // What a pass has chosen in a layer, -1s aside; `looked`: whether copies were looked for, and how
  // many of these were found.
  virtual void used(size_t layer, std::span<const int32_t> ids, bool looked,
                    int64_t n_found) noexcept = 0;

 protected:
  ~ExpertCopies() = default;
};

// feed_forward() of a MoE layer on stage `home` whose experts are where their spans say: hidden
// rows and choices go over, the sum comes back, handed on from span to span in ascending order, so
// that its bits are those of one device.  The shared experts run meanwhile.  `stages` are counted
// as the devices of the placement; `staging`: see transfer.h.
//
// Where the layer keeps copies of chosen experts, all devices work at once: each keeps the rows of
// its (token, k) pairs apart, they are brought home and added up in the same order.  Errors:
// kDevice.
Status feed_forward_apart(const Step& step, const LayerWeights& weights, size_t layer,
                          const LayerPlacement& placement, std::span<const Stage> stages,
                          std::byte* staging, ExpertCopies* copies = nullptr) noexcept;

// Tells the copies what a pass that does without them has chosen; its device has been waited for.
// Errors: kDevice.
Status tell_choices(const Step& step, size_t layer, ExpertCopies& copies) noexcept;

// scratch.logits[i, :] = head . norm(x[first_row + i, :]) for n_rows <= kLogitRows rows.
void logits(const Step& step, const Weights& weights, int64_t first_row, int64_t n_rows) noexcept;

// scratch.likeliest = the k likeliest tokens of scratch.logits[0, :], where the device finds them.
void likeliest(const Step& step, int64_t k) noexcept;

}  // namespace fathom::nn
