// One session: its cache, its scratch on every device, its tokens.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "../nn/forward.h"
#include "fathom/session.hpp"
#include "model_state.h"
#include "run_control.h"

namespace fathom::run {

class SessionState final : public nn::RowSourceOf {
 public:
  SessionState(const Model& model, KVCache cache) : model(model), cache(std::move(cache)) {}

  // Appends one pass of at most the plan's chunk; all or nothing.  `want_logits`: of the last row,
  // or of all rows when options.on_logits is set.
  Status pass(std::span<const int32_t> chunk, AttentionForm form, const RunControl& control,
              const RunOptions& options, bool want_logits);
  // After a pass: the rows it wrote count, and these are their tokens.
  void append(std::span<const int32_t> ids) noexcept;
  // Errors: kInvalidArgument for an id out of range, naming index, id and bound.
  Status check_tokens(std::span<const int32_t> ids) const;
  AttentionForm form_of(int64_t n_tokens) const noexcept;
  double seconds() const noexcept { return model.engine().seconds(); }  // the engine's clock

  KvRows rows(int stage, int64_t layer_slot, int64_t n_rows) const noexcept override {
    return cache.rows(stage, layer_slot, 0, n_rows);
  }

  Model model;  // keeps weights and engine alive; outlives the ranges below
  KVCache cache;
  std::vector<MemoryRange> scratch;  // activations and workspace of each stage
  std::vector<nn::Stage> stages;
  MemoryRange history;  // int32_t [max_tokens]
  int32_t* tokens = nullptr;
  int64_t n_tokens = 0;
  bool has_logits = false;
  SessionTimes times;
  std::vector<Event> events;
  const nn::Trace* trace = nullptr;  // for tests

 private:
  Status all_logits(const nn::ForwardParams& params, const RunOptions& options);
};

}  // namespace fathom::run
