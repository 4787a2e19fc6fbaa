// Model: loaded weights and tokenizer.  Changes after load by replan() only; threads share it
// freely.
//
//   Result<Model> model = Model::load("model.gguf");            // with an engine of its own
//   Result<Model> model = Model::load(engine, plan, {.progress = bar});
//
// A handle: copies share the weights; sessions keep them alive.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "fathom/engine.hpp"
#include "fathom/model_config.hpp"
#include "fathom/plan.hpp"
#include "fathom/tokenizer.hpp"

namespace fathom {

class Session;

namespace run {
class ModelState;
}

// What copies of experts have done for a model since it was loaded (experts.cache).
struct ExpertCacheStats {
  int64_t n_experts = 0, bytes = 0;  // copies held now
  // Experts chosen by tokens in layers that keep copies, in passes short enough to look for them
  // (steps, batches, short prompts), and how many of them were computed from copies.
  int64_t choices = 0, hits = 0;
  int64_t copied = 0, dropped = 0;  // experts, a replaced one in both
};

class Model {
 public:
  // Plans and loads with an engine made for `config`.  `path`: a .gguf (the first of a split), a
  // .safetensors folder.  Errors: as below, and kBudget with the remedies when the plan is not
  // feasible.
  static Result<Model> load(const std::string& path, const Config& config = {});
  // Loads what was planned.  Errors: kBudget / kMemory (nothing is held), kMismatch (the file is
  // not the one planned), kFormat, kIo, kCancelled.
  static Result<Model> load(const Engine& engine, const Plan& plan, const RunOptions& options = {});

  // Moves the model and all its sessions to the placement that is planned now: after a budget was
  // changed (Engine::set_budget) so that the present one no longer fits or could be better, or when
  // a device was lost - calls answer kDevice - and its budget was set to 0.  `config` is that of
  // the new plan, for pins; its budgets are those of the engine.  Weights that stay on their device
  // stay where they are, others are read from the file again; sessions go through a file without a
  // name in kv.spill_folder and go on with the same bits.  Rows that were lost with a device are
  // computed again from the session's tokens.
  //
  // What a device gets must fit beside what it holds until the move is done.  On an error the model
  // and its sessions are as before, but for sessions whose rows are lost: they keep their tokens()
  // and answer kDevice until another replan() succeeds.
  //
  // Meanwhile no other thread uses the model or its sessions, and no callback of theirs calls this;
  // plan() changes.  Costs the reading of what moves and a pass over the sessions' rows.  Errors:
  // kState (not all sessions were given), kBudget (what would help), kMemory, kMismatch (the file
  // changed), kConfig, kNotFound, kIo, kCancelled, kDevice.
  Status replan(std::span<Session* const> sessions, const Config& config,
                const RunOptions& options = {});

  const ModelConfig& config() const noexcept;
  const Plan& plan() const noexcept;
  const Engine& engine() const noexcept;
  // Null when the file has no tokenizer: sessions still take token ids.
  const Tokenizer* tokenizer() const noexcept;
  // One line each: layout found, values taken from published models, layers skipped, types.
  const std::vector<std::string>& load_report() const noexcept;
  // All scalar metadata of the file as text.
  const std::vector<std::pair<std::string, std::string>>& metadata() const noexcept;
  int64_t n_params() const noexcept;               // all weights
  int64_t n_params_active() const noexcept;        // those a token passes through
  int64_t weight_bytes() const noexcept;           // held, all devices
  ExpertCacheStats expert_cache() const noexcept;  // zeros where nothing is copied

  explicit Model(std::shared_ptr<run::ModelState>) noexcept;
  const std::shared_ptr<run::ModelState>& state() const noexcept { return state_; }

 private:
  std::shared_ptr<run::ModelState> state_;  // shared with sessions
};

}  // namespace fathom
