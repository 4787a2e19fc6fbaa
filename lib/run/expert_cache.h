// ExpertCache: copies of the routed experts that a model uses most, in memory of their layer's
// device that nothing else needs yet, for layers whose experts live on another device.
//
//   addresses of a device:   | layer a: expert 0 | expert 1 | ... | layer b: expert 0 | ...
//   an expert:               gate | up | down, up to a multiple of the device's granularity
//
// Every expert has its place, of which only copies that are held take memory, so that a layer's
// copies are a Weight like any other.  Which ones: counts of use, halved every experts.cache_window
// tokens; ties go to the lower layer and expert, so that the same tokens give the same copies.
//
// Made with a model and used by all its sessions: passes look copies up, changes are made between
// passes.  A copy is read from the model's file again, in the layout of its device.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../io/tensor_file.h"
#include "../nn/layers.h"
#include "../nn/weights.h"
#include "engine_state.h"
#include "fathom/model.hpp"
#include "fathom/plan.hpp"
#include "pass_gate.h"

namespace fathom::run {

// Where the copies of one device would lie.
struct CopyLayout {
  struct Layer {
    size_t layer = 0;
    int64_t offset = 0, expert_bytes = 0;  // of its first expert; from expert to expert
    nn::ExpertWeights weights;             // all experts of the layer, data null
    int64_t n_elsewhere = 0;               // experts that may be copied
  };
  std::vector<Layer> layers;
  int64_t address_bytes = 0;
  int64_t most_bytes = 0;  // all experts that live elsewhere
};
CopyLayout copy_layout(const Backend& device, int index, const Placement& placement,
                       const ModelConfig& config, const nn::Weights& weights);

// Which devices keep copies (Placement::keeps_copies): those that experts.cache allows, that have
// layers whose experts live elsewhere, and whose backends can.
std::vector<bool> keeps_copies(const EngineState& engine, const Plan& plan,
                               const nn::Weights& weights);
// What the cache takes of the host for its tables and for reading: in plan and allocation alike.
struct CopyTables {
  int64_t runtime_bytes = 0, staging_bytes = 0;
};
CopyTables copy_tables(const Placement& placement, const ModelConfig& config,
                       const nn::WeightMap& map);

bool keeps_any_copies(const Plan& plan) noexcept;

class ExpertCache final : public nn::ExpertCopies, public LedgerLender {
 public:
  // For a plan whose placement keeps copies.  Reserves addresses, takes the tables; copies nothing
  // yet.  `file` and `map` are those that the model was loaded from.  Errors: kBudget, kMemory.
  static Result<std::unique_ptr<ExpertCache>> create(EngineState& engine, PassGate& gate,
                                                     const Plan& plan,
                                                     std::unique_ptr<io::TensorFile> file,
                                                     const nn::WeightMap& map);
  ~ExpertCache();

  // After a pass of n_tokens tokens, on its thread: ages the counts, and while no other pass runs
  // copies the most used experts, as many as the pass had tokens and at most 16.  Waits for other
  // passes only when several had none of that.
  void after_pass(int64_t n_tokens);
  // Drops the least used copies until `bytes` more fit the device's budget and its plan.
  void make_room(int device, int64_t bytes) noexcept;
  void drop_all() noexcept;
  int64_t bytes_on(int device) const noexcept;  // of its tables, without copies
  ExpertCacheStats stats() const noexcept;

  // As nn::ExpertCopies.
  const nn::ExpertWeights* copies(size_t layer) const noexcept override;
  bool has(size_t layer, int32_t expert) const noexcept override;
  void used(size_t layer, std::span<const int32_t> ids, bool looked,
            int64_t n_found) noexcept override;
  // As LedgerLender.
  int64_t give_back(int device, int64_t bytes, bool wait) noexcept override;

 private:
  struct Layer {
    size_t layer = 0;
    int64_t offset = 0, expert_bytes = 0;
    nn::ExpertWeights weights;
    // Where an expert is in the file: [span], ascending.
    struct Source {
      int64_t first = 0;
      std::array<nn::WeightItem, 3> items;  // gate, up, down
    };
    std::vector<Source> sources;              // only of spans that live elsewhere
    std::atomic<uint32_t>* counts = nullptr;  // [n_experts]
    bool* held = nullptr;                     // [n_experts]
    bool may_copy(int64_t expert) const noexcept;
  };
  struct Device {
    int index = 0;
    Backend* backend = nullptr;
    MemoryRange range;
    std::vector<Layer> layers;
    int64_t most_bytes = 0;  // by experts.cache and the plan
    int64_t page_bytes = 0;  // kept free for the next page of each session
    int64_t held_bytes = 0;
  };
  struct Place {
    Layer* layer = nullptr;
    int64_t expert = 0;
    uint32_t count = 0;
  };

  ExpertCache(EngineState& engine, PassGate& gate) : engine_(engine), gate_(gate) {}
  const Layer* find(size_t layer) const noexcept;
  // The most used expert without a copy; the least used copy.
  Place most_wanted(Device& device) noexcept;
  Place least_used(Device& device) noexcept;
  bool copy_one(Device& device);
  Status copy(Device& device, Layer& layer, int64_t expert);
  void drop(Device& device, const Place& place) noexcept;
  // Drops copies until done(); what that released.
  template <class Done>
  int64_t drop_until(Device& device, Done&& done) noexcept;
  void age() noexcept;

  EngineState& engine_;
  PassGate& gate_;
  std::unique_ptr<io::TensorFile> file_;
  std::vector<Device> devices_;
  std::vector<const Layer*> by_layer_;  // [num_hidden_layers], null: no copies
  MemoryRange tables_, staging_;
  int64_t n_experts_ = 0, window_ = 0, aged_ = 0;
  std::atomic<int> n_missed_{0};  // passes since the last change
  bool failed_ = false;           // the file could not be read: no more copies are made
  std::atomic<int64_t> tokens_{0}, choices_{0}, hits_{0}, n_held_{0}, held_bytes_{0}, copied_{0},
      dropped_{0};
};

}  // namespace fathom::run
