// Planner: from an opened model file to a Plan.  The sizes come from the functions that also
// allocate: WeightMap::carve, Scratch::carve, measure_workspace, KvLayout, TokenizerBuilder.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../io/tensor_file.h"
#include "../io/tokenizer.h"
#include "../nn/layers.h"
#include "../nn/weights.h"
#include "engine_state.h"
#include "fathom/kv_cache.hpp"
#include "fathom/plan.hpp"
#include "placement_pins.h"

namespace fathom::run {

inline size_t index(Phase phase) noexcept {
  return static_cast<size_t>(phase);
}
inline size_t index(Purpose purpose) noexcept {
  return static_cast<size_t>(purpose);
}

// Scratch of one session on one device, for passes of up to `chunk` tokens; all but the chunk is as
// planned.  Staging is the host's, for copies between devices that it cannot read.
struct SessionScratch {
  int64_t activations_bytes = 0;
  int64_t workspace_bytes = 0;
  int64_t staging_bytes = 0;
};
// Buffers of one session on one device: those of the pass, and on the host a place for logits that
// the head's device keeps where the host cannot read them.
struct SessionBuffers {
  nn::Scratch::InFlight scratch{};  // of the plan's prefill_in_flight passes
  float* host_logits = nullptr;     // [min(chunk, kLogitRows), vocab_size], or null
};
SessionBuffers carve_session(Arena& arena, const EngineState& engine, int device, const Plan& plan,
                             int64_t chunk);
SessionScratch session_scratch(const EngineState& engine, int device, const Plan& plan,
                               const nn::Weights& weights, int64_t chunk);

// Host bytes of one session beside cache and scratch: token history and the cache's page tables.
int64_t session_runtime_bytes(int64_t max_tokens, int64_t page_tokens, int64_t n_tables,
                              int64_t granularity) noexcept;
int64_t token_history_bytes(int64_t max_tokens) noexcept;
int64_t page_table_bytes(int64_t max_tokens, int64_t page_tokens, int64_t n_tables) noexcept;

class Planner {
 public:
  // Opens the file and counts its tokenizer; a bare config.json becomes a list of tensors of
  // `config`'s weights.type.  `engine` must outlive the planner.  Errors: those of opening; kConfig
  // for a weights.type where there are weights.
  static Result<Planner> open(const EngineState& engine, const std::string& model_path,
                              const Config& config);

  // Never fails for lack of memory: that is an infeasible plan.  Errors: kConfig (a key that
  // only a new engine can change), kFormat, kUnsupported.
  Result<Plan> plan(const Config& config);

  io::TensorFile& file() noexcept { return *file_; }
  // Null when the file has no tokenizer; taken by the loader.
  std::unique_ptr<io::TokenizerBuilder>& tokenizer() noexcept { return tokenizer_; }
  // By device, what the model that is planned anew holds: it does not count as others'.
  void set_own(std::vector<int64_t> bytes) noexcept { own_ = std::move(bytes); }
  // A device on which nothing is to be placed.
  void close(int device) { closed_.push_back(device); }
  // For those who read from the file later.
  std::unique_ptr<io::TensorFile> take_file() noexcept { return std::move(file_); }

 private:
  Planner() = default;
  Status check_spill_folder(const Config& config) const;
  // For an alternative only a plan that fits is of use: one that cannot is kBudget at once.
  enum class Wanted : bool { kAny, kFeasible };
  Result<Plan> plan_once(const Config& config, Wanted wanted = Wanted::kAny,
                         bool with_copies = true) const;
  Status place(const Config& config, Wanted wanted, Plan& plan) const;
  Status place_model(const Config& config, const PlacementPins& pins, Wanted wanted,
                     Plan& plan) const;
  // planner_kv.cc: spans of placement.kv as pinned; or so that n_tokens fit, with the longest chunk
  // that leaves room - false where there is none; a line for each.
  Status pin_cache(const PlacementPins& pins, Plan& plan) const;
  bool spread_cache(Plan& plan, const nn::WeightMap& map, int64_t n_tokens,
                    int64_t longest_chunk) const;
  // Whether cards that bring their cold rows from the host, step by step, are faster at n_tokens
  // than attention on the devices on which `spread` has put these rows.  `remark` says the figures.
  bool streams_faster(const Plan& plan, const Plan& spread, const nn::WeightMap& map,
                      int64_t n_tokens, std::string& remark) const;
  bool share_rows(Plan& plan, int64_t n_tokens) const;
  void tell_cache(Plan& plan) const;
  void choose_chunk_and_context(Plan& plan, const nn::WeightMap& map) const;
  // The longest context, at most `limit`, with a chunk that leaves room for it.
  int64_t choose_chunk(Plan& plan, const nn::WeightMap& map, int64_t limit, int64_t wanted,
                       int64_t shortest) const;
  // Chunks under way at once, and how long they are, where experts live on other devices.
  void choose_in_flight(Plan& plan, const nn::WeightMap& map) const;
  void set_cache(Plan& plan, int64_t n_tokens) const;
  void set_copies(Plan& plan, const nn::WeightMap& map) const;
  int64_t host_limit(const Plan& plan) const;
  void tell_ladder(Plan& plan) const;
  void set_scratch(Plan& plan, const nn::WeightMap& map, int64_t chunk) const;
  void set_context(Plan& plan, int64_t n_tokens) const;
  bool fits(const Plan& plan) const;
  // A context that is left to the plan should hold at least this much.
  static constexpr int64_t kHopedContext = 8192;
  // The chunk to begin with.  A window of recent 16-bit pages holds at least a chunk, so that what
  // is cold depends on the number of tokens alone and not on how they were cut.
  static int64_t default_chunk(const Config& config, int64_t context);
  int64_t longest_context(Plan plan, int64_t limit) const;
  void name_what_binds(Plan& plan) const;
  // alternatives.cc
  using Changes = std::vector<std::pair<std::string, std::string>>;  // keys and values
  std::optional<Plan> try_changes(const Config& config, const Changes& changes) const;
  void add_alternatives(Plan& plan) const;
  void add_budgets(const Plan& plan,
                   const std::function<void(const Changes&, const Plan&)>& add) const;
  int64_t budget(const Plan& plan, int device) const;

  const EngineState* engine_ = nullptr;
  std::unique_ptr<io::TensorFile> file_;
  std::unique_ptr<io::TokenizerBuilder> tokenizer_;
  int64_t tokenizer_bytes_ = 0;
  std::string path_, tokenizer_remark_;
  std::vector<int64_t> own_;
  std::vector<int> closed_;
};

}  // namespace fathom::run
