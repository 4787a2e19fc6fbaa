// One session: its cache, its scratch on every device, its tokens.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "../nn/forward.h"
#include "fathom/session.hpp"
#include "kv_pages.h"
#include "model_state.h"
#include "planner.h"
#include "run_control.h"

namespace fathom::run {

// Decoding is absorbed whatever attention.form says of prefill.
enum class Decoding : bool { kNo, kYes };

class SessionState final : public nn::RowSourceOf {
 public:
  SessionState(const Model& model, KVCache pages)
      : model(model), cache(std::move(pages)), pages_(cache.pages()) {
    ++model.state()->n_sessions;
  }
  ~SessionState() {
    timeline().tokens(-n_tokens);
    --model.state()->n_sessions;
  }

  // Appends one pass, all or nothing: the first of `ids`, at most `longest` and what the scratch
  // has room for; says how many.  A pass that takes the last of ids computes its logits; those of
  // all rows when options.on_logits is set.
  Result<int64_t> pass(std::span<const int32_t> ids, int64_t longest, const RunControl& control,
                       const RunOptions& options, Decoding decoding);
  // After a pass: the rows it wrote count, and these are their tokens.
  void append(std::span<const int32_t> ids) noexcept;
  // Prefill with chunks on several devices at once (session_pipeline.cc): whether it can be done
  // here, and doing it for a prompt of more than one chunk, for which the cache has room.  Finished
  // chunks stay after a failure.
  bool chunks_overlap(const RunOptions& options) const;
  Status prefill_overlapped(std::span<const int32_t> prompt, int64_t chunk,
                            const RunControl& control, const RunOptions& options);
  // Of pass number `index` of those under way at once.
  std::span<const nn::Stage> stages_of(int64_t index) const noexcept {
    return index == 0 ? stages : other_stages[static_cast<size_t>(index - 1)];
  }
  // In how many groups a batch of n sessions goes through the devices, where passes can overlap
  // (session_batch.cc).
  int64_t batch_groups(int64_t n);
  // Errors: kInvalidArgument for an id out of range, naming index, id and bound.
  Status check_tokens(std::span<const int32_t> ids) const;
  AttentionForm form_of(int64_t n_tokens) const noexcept;
  // nn::forward(), during which the model's copies of experts stay.
  Status run_pass(const nn::ForwardParams& params, nn::PassEnd end = nn::PassEnd::kWait);
  // Logits of rows of the pass, into `logits`.
  Status compute_logits(const nn::ForwardParams& params, int64_t first_row, int64_t n_rows);
  // While `likeliest` has room for k tokens and one more, steps bring the k likeliest instead of
  // all logits from a device that finds them; false where it does not, or not so many.
  bool bring_likeliest(int64_t k);
  // The last token's logits, where only the likeliest were brought.  Errors: kDevice.
  Status bring_logits();
  // The same of rows whose logits were queued.
  Status fetch_logits(const nn::ForwardParams& params, int64_t n_rows);
  // After a pass that failed half-way: until then its rows and buffers are in use.
  void wait_for_devices() const noexcept;
  double seconds() const noexcept { return model.engine().seconds(); }  // the engine's clock

  // ---- memory that ends: session_grow.cc ----
  // Activations and workspace for the plan's chunk, or for a shorter one where the ladder allows
  // it.  Errors: kBudget, kMemory, kCallback, with the remedies.
  Status take_scratch();
  // Room for n_then tokens in all, by the ladder where it must be; in passes: for the first pass
  // towards them.  Errors: as KVCache::reserve, with the remedies; where a ladder has ended kBudget
  // becomes kContextFull.
  Status grow(int64_t n_then, bool in_passes);
  // A page of a saved session of n_then tokens, by those steps of the ladder that keep its bits.
  Status restore_page(KvType type, int64_t n_then);
  // Room for n_room >= n_then tokens once its pages are there.
  Status restore_room(int64_t n_room, int64_t n_then);
  // What each step of the ladder could free on a device towards n_then tokens.
  LadderGains ladder_gains(int device, int64_t n_then) const;
  // Bytes that the next shorter chunk frees.  0 where the cache, with n_then tokens, takes more
  // than was planned for it: room beyond the plan is made by the other steps.
  int64_t chunk_gain(int device, int64_t n_then) const;
  // A chunk that was lowered comes back, before a prompt that makes n_then tokens, as far as there
  // is room for it beside the cache that was planned.
  void raise_chunk(int64_t n_then);

  // ---- for replan.cc ----
  int64_t bytes_on(int device) const noexcept;  // held
  // Gives cache and scratch back and keeps the tokens; nothing but tokens() is of use then.
  void lose_memory() noexcept;
  Status lost_error() const;  // what calls answer then

  // Calls on_step; its answer.
  bool report(const StepFunction& on_step, Phase phase, int64_t n_new, double seconds);
  // The engine's; n_tokens of all sessions are counted there.
  TimelineRecorder& timeline() const noexcept { return model.engine().state()->timeline; }

  KvRows rows(int stage, int64_t layer_slot, int64_t n_rows) const noexcept override {
    return cache.rows(stage, layer_slot, 0, n_rows);
  }
  KvRows resident(int stage, int64_t layer_slot, int64_t end_row) const noexcept override {
    return pages_.resident(stage, layer_slot, end_row);
  }
  nn::RowPiece piece(int stage, int64_t layer_slot, const OpContext& op, int64_t first_row,
                     int64_t end_row, nn::Where where) const noexcept override {
    return pages_.piece(stage, layer_slot, op, first_row, end_row, where);
  }
  int lies_on(int stage, int64_t first_row, int64_t end_row) const noexcept override {
    return pages_.lies_on(stage, first_row, end_row);
  }
  KvRows room(int stage, int64_t layer_slot, const OpContext& op, int64_t first_row,
              int64_t end_row) const noexcept override {
    return pages_.room(stage, layer_slot, op, first_row, end_row);
  }
  void written(int stage, int64_t layer_slot, const OpContext& op,
               const KvRows& rows) const noexcept override {
    pages_.written(stage, layer_slot, op, rows);
  }
  Status status() const noexcept override { return pages_.stream_status(); }

  Model model;  // keeps weights and engine alive; outlives the ranges below
  KVCache cache;
  std::vector<MemoryRange> scratch;  // activations and workspace of each stage
  std::vector<nn::Stage> stages;     // one per device of the engine
  // The same of passes that are under way beside the one in `stages`.
  std::array<std::vector<nn::Stage>, nn::kMostInFlight - 1> other_stages;
  MemoryRange staging;      // for copies between devices
  float* logits = nullptr;  // host memory; the first row is that of the last token
  MemoryRange history;      // int32_t [max_tokens]
  int32_t* tokens = nullptr;
  int64_t n_tokens = 0;
  int64_t chunk = 0;                     // longest pass that the scratch has room for
  std::vector<int64_t> groups_of_batch;  // what batch_groups() found; 0: not asked yet
  bool has_logits = false;
  bool lost = false;                  // lose_memory() was called
  std::vector<TokenLogit> likeliest;  // as TopKParams::out; empty: steps bring logits
  bool has_likeliest = false;         // of the last token, whose logits are on the device alone
  SessionTimes times;
  std::vector<Event> events;
  MemorySnapshot memory;                    // what report() shows, kept so that it allocates once
  const nn::Trace* trace = nullptr;         // for tests
  int64_t section_rows = nn::kSectionRows;  // for tests

 private:
  Status all_logits(const nn::ForwardParams& params, const RunOptions& options);
  SessionScratch scratch_bytes(int device, int64_t n) const;
  Status try_scratch(int64_t n);
  void carve_scratch(int64_t n);
  int64_t shorter_chunk() const noexcept;
  // What the plan left for the cache on a device and n_then tokens do not take yet; negative where
  // they take more.
  int64_t owed_bytes(int device, int64_t n_then) const noexcept;
  int64_t scratch_now(int device) const noexcept;
  bool has_room(const std::vector<SessionScratch>& scratch, int64_t n_then) const;
  // All devices' scratch; as before when the system refuses.
  Status resize_scratch(const std::vector<SessionScratch>& bytes);
  std::vector<SessionScratch> all_scratch(int64_t n) const;
  void tell_chunk(int64_t before, int64_t freed);
  // Pages that were moved come back when memory does.
  void return_pages(int64_t n_then);
  int64_t kv_bytes_of(KvType type) const noexcept;  // per token, all layers
  void tell(const char* kind, int64_t bytes, std::string text, double pass_seconds = 0);
  // What every pass spends on fetching moved pages, by the rates of Engine::machine().
  double moved_seconds() const;
  Status take_step(LadderStep step, int device, int64_t n_then, int64_t bytes);
  // Climbs one step that frees memory on the device that refused; false at the end of the ladder.
  // A step that failed is passed over and told in `trouble`.  Errors: kDevice.
  Result<bool> climb(const Status& refused, int64_t n_then, int64_t bytes, bool same_bits,
                     Status& trouble);
  template <class Take>
  Status restore_by(Take&& take, int64_t n_then);
  Status ended(Status refused, int64_t n_then, const Status& trouble) const;

  KvPages& pages_;  // the cache's
};

}  // namespace fathom::run
