// What a Model handle shares with its sessions.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../nn/rope.h"
#include "../nn/weights.h"
#include "engine_state.h"
#include "expert_cache.h"
#include "fathom/engine.hpp"
#include "fathom/plan.hpp"
#include "fathom/tokenizer.hpp"

namespace fathom::run {

// Weights of one purpose on one device, in one range of which parts may have been given back.
struct WeightBlock {
  struct Span {
    int64_t offset = 0, bytes = 0;
    int64_t end() const noexcept { return offset + bytes; }
  };
  int device = 0;
  Purpose purpose = Purpose::kWeights;
  MemoryRange range;
  std::vector<Span> held;  // ascending
};

class ModelState {
 public:
  explicit ModelState(Engine engine) : engine(std::move(engine)) {}
  ~ModelState();

  Engine engine;  // outlives the ranges below
  Plan plan;
  nn::Rope rope;
  std::vector<WeightBlock> blocks;
  std::unique_ptr<nn::Weights> weights;
  std::optional<Tokenizer> tokenizer;
  int64_t tokenizer_bytes = 0;  // held on the engine's host
  std::atomic<int64_t> n_sessions{0};
  std::vector<std::string> load_report;
  std::vector<std::pair<std::string, std::string>> metadata;
  int64_t n_params = 0, n_params_active = 0;
  bool plan_booked = false;             // the plan's bytes stand in the ledger
  PassGate gate;                        // around every forward pass
  std::unique_ptr<ExpertCache> copies;  // null: the plan keeps none

  int64_t bytes_on(int device) const noexcept;  // held, without sessions and copies of experts
  void book_plan(int sign) noexcept;            // 1: adds them there, -1: takes them back
};

// The error of a plan that does not fit: what is short, and what would help.
Status infeasible(const Plan& plan);

}  // namespace fathom::run
