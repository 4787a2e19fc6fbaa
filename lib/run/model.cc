// Model: file -> plan -> memory -> weights.
#include "fathom/model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "config_schema.h"
#include "model_state.h"
#include "planner.h"
#include "run_control.h"

namespace fathom {
namespace {

using run::ModelState;

// The tokenizer in a ledger block of its own, which lives as long as any copy of it.
Status load_tokenizer(ModelState& model, std::unique_ptr<io::TokenizerBuilder> builder) {
  if (!builder) return {};
  struct Block {
    std::shared_ptr<run::EngineState> engine;
    run::MemoryRange range;
  };
  auto block = std::make_shared<Block>();
  block->engine = model.engine.state();
  FATHOM_TRY_ASSIGN(block->range,
                    block->engine->allocate(block->engine->host_device, Purpose::kTokenizer,
                                            builder->size_bytes()));
  model.tokenizer_bytes = block->range.size_bytes();
  const std::span<std::byte> storage(block->range.data(),
                                     static_cast<size_t>(builder->size_bytes()));
  model.tokenizer = std::move(*builder).build(storage, block);
  return {};
}

Status load_weights(ModelState& model, const io::TensorFile& file, nn::WeightMap& map,
                    const RunOptions& options) {
  run::EngineState& engine = *model.engine.state();
  for (int d = 0; d < static_cast<int>(engine.devices.size()); ++d)
    for (Purpose purpose : {Purpose::kWeights, Purpose::kExperts}) {
      Arena counting;
      map.carve(d, purpose, counting);
      FATHOM_TRY_ASSIGN(auto range, engine.allocate(d, purpose, counting.peak_bytes()));
      Arena arena(range.data(), range.size_bytes());
      if (counting.peak_bytes() > 0) map.carve(d, purpose, arena);
      const int64_t bytes = range.size_bytes();
      if (bytes > 0) model.blocks.push_back({d, purpose, std::move(range), {{0, bytes}}});
    }

  FATHOM_TRY_ASSIGN(auto staging,
                    engine.allocate(engine.host_device, Purpose::kStaging, map.staging_bytes()));
  run::RunControl control(options);
  const int64_t total = map.file_bytes();
  if (engine.simulation) return control.check(ProgressPhase::kLoad, total, total);
  int64_t done = 0;
  Status why;
  const auto on_bytes = [&](int64_t n) {
    done += n;
    why = control.check(ProgressPhase::kLoad, done, total);
    return why.ok();
  };
  for (const nn::WeightItem& item : map.items()) {
    Status s = map.load(file, item, *engine.devices[static_cast<size_t>(item.device)],
                        {staging.data(), static_cast<size_t>(staging.size_bytes())}, on_bytes);
    if (!s.ok()) return why.ok() ? std::move(s).in(item.name) : std::move(why);
  }
  return {};
}

Result<Model> load_model(const Engine& engine, const Plan& plan, const RunOptions& options) {
  if (!plan.feasible) return run::infeasible(plan);
  FATHOM_TRY_ASSIGN(auto planner,
                    run::Planner::open(*engine.state(), plan.model_path, plan.config));
  const io::TensorFile& file = planner.file();
  if (file.fingerprint().lo != plan.fingerprint_lo ||
      file.fingerprint().hi != plan.fingerprint_hi ||
      plan.devices.size() != engine.state()->devices.size())
    return Status(
        Code::kMismatch,
        fmt::format("{}: not the file or engine that was planned; plan again", plan.model_path));

  if (!file.has_weights() && !engine.simulated())
    return Status(Code::kNotFound,
                  fmt::format("{}: only the model's configuration is there, no weights to load",
                              plan.model_path));

  const size_t name = plan.model_path.find_last_of('/') + 1;  // 0 when there is none
  engine.state()->timeline.begin_load(run::shown(std::string_view(plan.model_path).substr(name)));
  auto model = std::make_shared<ModelState>(engine);
  model->plan = plan;
  model->metadata = file.metadata();
  model->rope = nn::make_rope(plan.model);
  FATHOM_TRY_ASSIGN(auto map, nn::WeightMap::create(file, plan.placement, engine.state()->devices));
  FATHOM_TRY(load_tokenizer(*model, std::move(planner.tokenizer())));
  FATHOM_TRY(load_weights(*model, file, map, options));

  if (run::keeps_any_copies(plan)) {
    FATHOM_TRY_ASSIGN(model->copies, run::ExpertCache::create(*engine.state(), model->gate, plan,
                                                              planner.take_file(), map));
  }
  model->n_params = map.n_params();
  model->n_params_active = map.n_params_active(plan.model);
  model->load_report = plan.remarks;
  for (const auto& device : engine.state()->devices)
    for (std::string& remark : device->remarks()) {
      engine.state()->timeline.mark("numa", remark, 0, 0);
      model->load_report.push_back(std::move(remark));
    }
  model->weights = std::move(map).take_weights();
  model->book_plan(1);
  for (const std::string& line : model->load_report) engine.state()->log(LogLevel::kInfo, line);
  return Model(std::move(model));
}

}  // namespace

Status run::infeasible(const Plan& plan) {
  const PlanDevice& device = plan.devices[static_cast<size_t>(std::max(plan.binding_device, 0))];
  std::string message =
      fmt::format("{}: needs {} bytes at its peak, {} more than the budget of {}; most of it is {}",
                  device.name, device.peak_bytes(), plan.bytes_short, device.budget_bytes,
                  purpose_name(plan.binding_purpose));
  const size_t n = std::min<size_t>(plan.alternatives.size(), 3);
  for (size_t i = 0; i < n; ++i)
    message +=
        fmt::format("{}[{}] {}", i == 0 ? ". Would fit: " : "; ", i + 1, plan.alternatives[i].text);
  return Status(Code::kBudget, message)
      .on_device(plan.binding_device)
      .about(purpose_name(plan.binding_purpose))
      .bytes(device.peak_bytes(), device.budget_bytes);
}

int64_t run::ModelState::bytes_on(int device) const noexcept {
  int64_t bytes = copies ? copies->bytes_on(device) : 0;
  if (device == engine.state()->host_device) bytes += tokenizer_bytes;
  for (const WeightBlock& block : blocks) bytes += block.range.bytes_on(device);
  return bytes;
}

void run::ModelState::book_plan(int sign) noexcept {
  Ledger& ledger = engine.state()->ledger;
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d) {
    const PlanDevice& device = plan.devices[static_cast<size_t>(d)];
    for (int p = 0; p < kPurposeCount; ++p)
      ledger.add_planned(d, static_cast<Purpose>(p),
                         sign * device.planned(static_cast<Purpose>(p)));
    ledger.add_planned_peak(d, sign * device.peak_bytes());
  }
  plan_booked = sign > 0;
}

run::ModelState::~ModelState() {
  if (plan_booked) book_plan(-1);
}

Model::Model(std::shared_ptr<run::ModelState> state) noexcept : state_(std::move(state)) {}

Result<Model> Model::load(const std::string& path, const Config& config) {
  FATHOM_TRY_ASSIGN(Engine engine, Engine::create(config));
  FATHOM_TRY_ASSIGN(const Plan plan, engine.plan(path));
  return load(engine, plan);
}

Result<Model> Model::load(const Engine& engine, const Plan& plan, const RunOptions& options) {
  return run::guarded([&] { return load_model(engine, plan, options); });
}

const ModelConfig& Model::config() const noexcept {
  return state_->plan.model;
}
const Plan& Model::plan() const noexcept {
  return state_->plan;
}
const Engine& Model::engine() const noexcept {
  return state_->engine;
}
const Tokenizer* Model::tokenizer() const noexcept {
  return state_->tokenizer ? &*state_->tokenizer : nullptr;
}
const std::vector<std::string>& Model::load_report() const noexcept {
  return state_->load_report;
}
const std::vector<std::pair<std::string, std::string>>& Model::metadata() const noexcept {
  return state_->metadata;
}
int64_t Model::n_params() const noexcept {
  return state_->n_params;
}
int64_t Model::n_params_active() const noexcept {
  return state_->n_params_active;
}
ExpertCacheStats Model::expert_cache() const noexcept {
  return state_->copies ? state_->copies->stats() : ExpertCacheStats{};
}
int64_t Model::weight_bytes() const noexcept {
  int64_t bytes = 0;
  for (const run::WeightBlock& block : state_->blocks) bytes += block.range.size_bytes();
  return bytes;
}

}  // namespace fathom
