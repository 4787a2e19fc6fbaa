// What a Model handle shares with its sessions.
#pragma once

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

class ModelState {
 public:
  explicit ModelState(Engine engine) : engine(std::move(engine)) {}
  ~ModelState();

  Engine engine;  // outlives the ranges below
  Plan plan;
  nn::Rope rope;
  std::vector<MemoryRange> ranges;  // weights and experts of each device
  std::unique_ptr<nn::Weights> weights;
  std::optional<Tokenizer> tokenizer;
  std::vector<std::string> load_report;
  std::vector<std::pair<std::string, std::string>> metadata;
  int64_t n_params = 0, n_params_active = 0;
  bool plan_booked = false;  // the plan's bytes stand in the ledger
  PassGate gate;             // around every forward pass
  std::unique_ptr<ExpertCache> copies;  // null: the plan keeps none

  void book_plan(int sign) noexcept;  // 1: adds them there, -1: takes them back
};

}  // namespace fathom::run
