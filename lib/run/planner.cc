#include "planner.h"

#include <fmt/format.h>

#include <algorithm>

#include "../io/spill_file.h"
#include "../io/tensor_listing.h"
#include "../nn/forward.h"
#include "../nn/transfer.h"
#include "expert_cache.h"
#include "kv_pages.h"
#include "kv_parts.h"
#include "ladder.h"
#include "pipeline.h"
#include "placement_problem.h"
#include "placement_reasons.h"
#include "predict.h"

namespace fathom::run {
namespace {

constexpr int64_t kPageTargetBytes = int64_t{2} << 20;
constexpr int64_t kMinPageTokens = 64, kMaxAutoPageTokens = 256, kMaxCoarsePageTokens = 1024;
constexpr int64_t kCoarse = int64_t{64} << 10;  // granularity from which on padding counts

KvLayout layout_of(const Plan& plan) {
  return {plan.kv_page_tokens, plan.model.kv_lora_rank, plan.model.qk_rope_head_dim};
}

// Tokens per page: enough for about 2 MiB, few enough that a short text takes little.  Devices that
// map memory in coarse pieces (cards: 2 MiB) want pages that fill theirs: with the layers shared by
// `n_coarse` of them, the smallest page that leaves at most a twelfth of it empty.
int64_t auto_page_tokens(const ModelConfig& c, KvType type, int64_t granularity, int64_t n_coarse,
                         int64_t context) {
  const auto layout = [&](int64_t tokens) {
    return KvLayout{tokens, c.kv_lora_rank, c.qk_rope_head_dim};
  };
  int64_t tokens = kMinPageTokens;
  while (tokens < kMaxAutoPageTokens &&
         layout(tokens * 2).page_bytes(type, c.num_hidden_layers) <= kPageTargetBytes)
    tokens *= 2;
  if (n_coarse == 0) return tokens;
  const int64_t layers = (c.num_hidden_layers + n_coarse - 1) / n_coarse;
  int64_t best = tokens;
  double least = 1e300;
  for (; tokens <= kMaxCoarsePageTokens && (best == tokens || tokens < 2 * context); tokens *= 2) {
    const int64_t bytes = layout(tokens).page_bytes(type, layers);
    const double empty = static_cast<double>(committed_bytes(bytes, granularity) - bytes) /
                         static_cast<double>(bytes);
    if (empty < least) least = empty, best = tokens;
    if (empty <= 1.0 / 12) break;
  }
  return best;
}

// Pages that a policy keeps in 16 bits are f16, or what they would be anyway if that is larger.
KvType hot_type(KvType type) {
  const bool smaller = type == KvType::kF8 || type == KvType::kQ8_0 || type == KvType::kQ4_0;
  return smaller ? KvType::kF16 : type;
}

}  // namespace

SessionBuffers carve_session(Arena& arena, const EngineState& engine, int device, const Plan& plan,
                             int64_t chunk) {
  SessionBuffers buffers;
  const Backend& head = *engine.devices[static_cast<size_t>(plan.placement.head_device)];
  if (device == engine.host_device && !head.host_accessible())  // first, as it outlives the pass
    buffers.host_logits =
        arena.take<float>(std::min(chunk, nn::kLogitRows) * plan.model.vocab_size);
  buffers.scratch = nn::Scratch::carve_in_flight(arena, plan.model, chunk,
                                                 nn::DeviceRoles::of(plan.placement, device),
                                                 plan.prefill_in_flight);
  return buffers;
}

SessionScratch session_scratch(const EngineState& engine, int device, const Plan& plan,
                               const nn::Weights& weights, int64_t chunk) {
  SessionScratch bytes;
  Arena arena;
  carve_session(arena, engine, device, plan, chunk);
  bytes.activations_bytes = arena.peak_bytes();
  bytes.workspace_bytes =
      nn::measure_workspace(*engine.devices[static_cast<size_t>(device)], device, plan.model,
                            weights, plan.placement, chunk, plan.kv_type, plan.kv_page_tokens);
  if (device == engine.host_device) {
    std::vector<const Backend*> devices;
    for (const auto& backend : engine.devices) devices.push_back(backend.get());
    bytes.staging_bytes = nn::staging_bytes(plan.placement, devices, plan.model, chunk);
  }
  return bytes;
}

int64_t token_history_bytes(int64_t max_tokens) noexcept {
  return max_tokens * static_cast<int64_t>(sizeof(int32_t));
}

int64_t page_table_bytes(int64_t max_tokens, int64_t page_tokens, int64_t n_tables) noexcept {
  const int64_t pages = (max_tokens + page_tokens - 1) / page_tokens;
  return pages * n_tables * static_cast<int64_t>(sizeof(KvPage));
}

int64_t session_runtime_bytes(int64_t max_tokens, int64_t page_tokens, int64_t n_tables,
                              int64_t granularity) noexcept {
  return committed_bytes(token_history_bytes(max_tokens), granularity) +
         committed_bytes(page_table_bytes(max_tokens, page_tokens, n_tables), granularity);
}

Result<Planner> Planner::open(const EngineState& engine, const std::string& model_path,
                              const Config& config) {
  Planner planner;
  planner.engine_ = &engine;
  planner.path_ = model_path;
  const bool listed = io::is_config_only(model_path);
  if (config.weights_type && !listed)
    return Status(Code::kConfig,
                  fmt::format("weights.type = {}: {} has weights, whose types are its own",
                              weights_type_name(*config.weights_type), model_path))
        .about("weights.type");
  FATHOM_TRY_ASSIGN(io::TensorFile file, listed ? io::list_tensors(model_path, config.weights_type)
                                                : io::TensorFile::open(model_path));
  if (!file.has_config())
    return Status(Code::kFormat,
                  fmt::format("{}: no model configuration (config.json)", model_path));
  planner.file_ = std::make_unique<io::TensorFile>(std::move(file));

  // A model without a tokenizer, or with one of another kind, still runs on token ids.
  auto builder = io::TokenizerBuilder::parse(planner.file_->tokenizer());
  if (builder.ok()) {
    planner.tokenizer_ = std::make_unique<io::TokenizerBuilder>(std::move(builder).value());
    planner.tokenizer_bytes_ = planner.tokenizer_->size_bytes();
  } else if (builder.status().code() == Code::kNotFound ||
             builder.status().code() == Code::kUnsupported) {
    planner.tokenizer_remark_ = fmt::format("no tokenizer: {}", builder.status().message());
  } else {
    return std::move(builder).status();
  }
  return planner;
}

Result<Plan> Planner::plan(const Config& config) {
  FATHOM_TRY(config.validate());
  const Config& fixed = engine_->config;
  for (const char* key : {"devices", "threads", "isa", "numerics"}) {
    FATHOM_TRY_ASSIGN(const std::string asked, config.get(key));
    FATHOM_TRY_ASSIGN(const std::string has, fixed.get(key));
    if (asked != has)
      return Status(Code::kConfig,
                    fmt::format("{}={}: the engine was made with {}; make another engine", key,
                                asked, has))
          .about(key);
  }
  FATHOM_TRY(check_spill_folder(config));
  FATHOM_TRY_ASSIGN(Plan plan, plan_once(config));
  if (!plan.feasible) add_alternatives(plan);
  return plan;
}

// Of this machine's folders; those of a described one cannot be asked.
Status Planner::check_spill_folder(const Config& config) const {
  if (engine_->simulation || config.kv_tiers.back() != KvTier::kFile ||
      config.kv_spill_tmpfs == SpillTmpfs::kAllow || !io::lies_in_memory(config.kv_spill_folder))
    return {};
  return io::refuse_memory(config.kv_spill_folder);
}

Result<Plan> Planner::plan_once(const Config& config, Wanted wanted, bool with_copies) const {
  Plan plan;
  plan.model_path = path_;
  plan.fingerprint_lo = file_->fingerprint().lo;
  plan.fingerprint_hi = file_->fingerprint().hi;
  plan.model = file_->config();
  plan.config = config;
  plan.remarks = plan.model.remarks;
  if (!engine_->simulation && config.kv_tiers.back() == KvTier::kFile &&
      io::lies_in_memory(config.kv_spill_folder))
    plan.remarks.push_back(
        fmt::format("kv.spill_folder: {} lies in memory: pages that are moved there take the "
                    "machine's memory, outside the budgets",
                    config.kv_spill_folder));
  if (!tokenizer_remark_.empty()) plan.remarks.push_back(tokenizer_remark_);

  const ModelConfig& c = plan.model;
  plan.kv_type =
      config.kv_type.value_or(config.numerics == Numerics::kExact ? KvType::kF32 : KvType::kF16);
  int64_t granularity = 1, n_coarse = 0;
  for (const auto& device : engine_->devices) {
    granularity = std::max(granularity, device->granularity());
    n_coarse += device->granularity() >= kCoarse;
  }
  plan.kv_page_tokens = config.kv_page_tokens.value_or(
      auto_page_tokens(c, plan.kv_type, granularity, n_coarse,
                       config.context_max.value_or(c.max_position_embeddings)));
  const KvLayout layout = layout_of(plan);
  plan.kv_policy = {.type = plan.kv_type,
                    .hot_type = hot_type(plan.kv_type),
                    .page_tokens = plan.kv_page_tokens,
                    .first_tokens = config.kv_first_16bit,
                    .recent_tokens = config.kv_recent_16bit};
  plan.kv_bytes_per_token = c.num_hidden_layers * (layout.latent_row_bytes(plan.kv_type) +
                                                   layout.rope_row_bytes(plan.kv_type));

  FATHOM_TRY(place(config, wanted, plan));
  FATHOM_TRY_ASSIGN(nn::WeightMap map,
                    nn::WeightMap::create(*file_, plan.placement, engine_->devices));
  plan.remarks.insert(plan.remarks.end(), map.remarks.begin(), map.remarks.end());

  if (with_copies) plan.placement.keeps_copies = keeps_copies(*engine_, plan, map.weights());
  const CopyTables copies = copy_tables(plan.placement, c, map);

  for (size_t d = 0; d < plan.devices.size(); ++d) {
    PlanDevice& device = plan.devices[d];
    const bool host = static_cast<int>(d) == engine_->host_device;
    if (host) {
      device.copy_runtime_bytes = committed_bytes(copies.runtime_bytes, device.granularity);
      device.copy_staging_bytes = committed_bytes(copies.staging_bytes, device.granularity);
    }
    for (Purpose purpose : {Purpose::kWeights, Purpose::kExperts}) {
      Arena arena;
      map.carve(static_cast<int>(d), purpose, arena);
      const int64_t bytes = committed_bytes(arena.peak_bytes(), device.granularity);
      for (auto& phase : device.bytes) phase[index(purpose)] = bytes;
    }
    const int64_t runtime = engine_->devices[d]->runtime_bytes() + device.copy_runtime_bytes;
    for (auto& phase : device.bytes) {
      phase[index(Purpose::kRuntime)] = runtime;
      if (host)
        phase[index(Purpose::kTokenizer)] = committed_bytes(tokenizer_bytes_, device.granularity);
    }
    if (host)
      device.bytes[index(Phase::kLoad)][index(Purpose::kStaging)] =
          committed_bytes(map.staging_bytes(), device.granularity);
  }
  plan.prefill_in_flight = config.prefill_in_flight.value_or(1);
  choose_chunk_and_context(plan, map);
  choose_in_flight(plan, map);
  // Their buffers must not be what makes a plan fail.
  if (!plan.feasible && !plan.placement.keeps_copies.empty())
    return plan_once(config, wanted, false);
  set_copies(plan, map);
  predict(plan, engine_->machine, map.weights());
  tell_balance(plan);
  return plan;
}

Status Planner::place(const Config& config, Wanted wanted, Plan& plan) const {
  for (int d = 0; d < static_cast<int>(engine_->devices.size()); ++d) {
    PlanDevice device;
    const Backend& backend = *engine_->devices[static_cast<size_t>(d)];
    device.name = backend.name();
    device.kind = engine_->machine.devices[static_cast<size_t>(d)].kind;
    device.granularity = backend.granularity();
    const auto it = config.budget.find(device.name);
    device.budget_bytes = it == config.budget.end() ? engine_->ledger.budget(d) : it->second;
    plan.devices.push_back(std::move(device));
  }
  std::vector<std::string> names;
  for (int d = 0; d < engine_->n_computing(); ++d)
    names.push_back(plan.devices[static_cast<size_t>(d)].name);
  FATHOM_TRY_ASSIGN(const PlacementPins pins, read_pins(config, plan.model, names));
  FATHOM_TRY(place_model(config, pins, wanted, plan));
  FATHOM_TRY(pin_cache(pins, plan));
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d) {
    PlanDevice& device = plan.devices[static_cast<size_t>(d)];
    device.n_layers = plan.placement.layers_on(d);
    device.n_experts = plan.placement.experts_on(d);
    const auto page_bytes = [&](KvType type) {
      return committed_bytes(layout_of(plan).page_bytes(type, device.n_layers), device.granularity);
    };
    device.kv_page_bytes = page_bytes(plan.kv_type);
    device.kv_hot_page_bytes = page_bytes(plan.kv_policy.hot_type);
  }
  return {};
}

// One device holds all; for several the solver decides, with room for the chunk and context that
// choose_chunk_and_context() will begin with, or for less where that finds no place.
Status Planner::place_model(const Config& config, const PlacementPins& pins, Wanted wanted,
                            Plan& plan) const {
  const ModelConfig& c = plan.model;
  if (engine_->n_computing() == 1) {
    plan.placement =
        Placement::by_layer(c, std::vector<int>(static_cast<size_t>(c.num_hidden_layers), 0));
    return {};
  }
  const int64_t limit = config.context_max.value_or(c.max_position_embeddings);
  PlacementInputs inputs{
      .engine = *engine_, .file = *file_, .plan = plan, .pins = pins, .available = {}};
  for (size_t d = 0; d < plan.devices.size(); ++d)
    inputs.available.push_back(budget(plan, static_cast<int>(d)));
  inputs.host_available = host_limit(plan);
  inputs.tokenizer_bytes = tokenizer_bytes_;

  // Rooms to ask for: what is wanted, and for where that does not fit the least, then from large to
  // small what lies between.
  struct Room {
    int64_t chunk, context;
  };
  const int64_t hoped = config.context_max.value_or(std::min(limit, kHopedContext));
  std::vector<Room> rooms{{config.prefill_chunk.value_or(default_chunk(config, limit)), hoped}};
  while (!config.prefill_chunk && rooms.back().chunk > 1)
    rooms.push_back({std::max<int64_t>(1, rooms.back().chunk / 8),
                     config.context_max
                         ? hoped
                         : std::min(rooms.back().context,
                                    std::max(rooms.back().context / 8, plan.kv_page_tokens))});
  if (rooms.size() > 2) std::rotate(rooms.begin() + 1, rooms.end() - 1, rooms.end());

  const auto problem_of = [&](const Room& room) -> Result<SolverProblem> {
    inputs.chunk = room.chunk;
    inputs.context = room.context;
    FATHOM_TRY_ASSIGN(SolverProblem made, placement_problem(inputs));
    for (const int d : closed_) {
      int64_t& room_there = made.budget[static_cast<size_t>(d)];
      room_there = std::min<int64_t>(room_there, 0);
    }
    return made;
  };
  const Room& least = rooms.size() > 1 ? rooms[1] : rooms[0];
  if (wanted == Wanted::kFeasible) {
    FATHOM_TRY_ASSIGN(const SolverProblem problem, problem_of(least));
    if (const int64_t over = least_bytes_over(problem); over > 0)
      return Status(Code::kBudget, fmt::format("no placement fits: {} bytes too many", over));
  }
  FATHOM_TRY_ASSIGN(SolverProblem problem, problem_of(rooms[0]));
  Solution solution = solve_placement(problem);
  const auto fits = [&] { return cost_of(problem, solution.placement).bytes_over == 0; };
  // Takes the placement for another room where there is one.
  Room taken = rooms[0];
  const auto settle_for = [&](const Room& room) -> Result<bool> {
    FATHOM_TRY_ASSIGN(SolverProblem other, problem_of(room));
    if (least_bytes_over(other) > 0) return false;
    Solution solved = solve_placement(other);
    if (cost_of(other, solved.placement).bytes_over > 0) return false;
    solution = std::move(solved);
    taken = room;
    problem = std::move(other);
    return true;
  };
  if (!fits() && rooms.size() > 1) {
    FATHOM_TRY_ASSIGN(bool found, settle_for(least));
    for (size_t i = 2; i < rooms.size() && fits(); ++i) {
      FATHOM_TRY_ASSIGN(found, settle_for(rooms[i]));
      if (found) break;
    }
  }
  plan.balance = weigh(problem, solution);
  plan.balance.chunk_tokens = taken.chunk;
  plan.balance.context_tokens = taken.context;
  plan.placement = std::move(solution.placement);
  for (std::string& line : explain_placement(problem, plan))
    plan.remarks.push_back(std::move(line));
  return {};
}

// What this plan may take of a device: its budget without what others on the engine hold.
int64_t Planner::budget(const Plan& plan, int device) const {
  const MemorySnapshot now = engine_->ledger.snapshot();
  const int64_t others = now.devices[static_cast<size_t>(device)].bytes_now -
                         now.item(device, Purpose::kExpertCache).bytes_now -
                         engine_->devices[static_cast<size_t>(device)]->runtime_bytes() -
                         (own_.empty() ? 0 : own_[static_cast<size_t>(device)]);
  return plan.devices[static_cast<size_t>(device)].budget_bytes - others;
}

int64_t Planner::host_limit(const Plan& plan) const {
  const auto it = plan.config.budget.find("host");
  const int64_t asked = it == plan.config.budget.end() ? Ledger::kUnlimited : it->second;
  return std::min(asked, engine_->ledger.host_budget());
}

bool Planner::fits(const Plan& plan) const {
  int64_t host = 0;
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    const int64_t peak = plan.devices[d].peak_bytes();
    // What a device holds for its own life is the engine's matter where the model is not on it.
    const bool used =
        plan.placement.uses(static_cast<int>(d)) || static_cast<int>(d) == engine_->host_device;
    if (used && peak > budget(plan, static_cast<int>(d))) return false;
    if (plan.devices[d].kind == DeviceKind::kCpu) host += peak;
  }
  return host <= host_limit(plan);
}

void Planner::set_scratch(Plan& plan, const nn::WeightMap& map, int64_t chunk) const {
  plan.prefill_chunk = chunk;
  if (chunk_flow(plan) != ChunkFlow::kTurns) plan.prefill_in_flight = 1;
  plan.attention_form = plan.config.attention_form.value_or(
      chunk >= nn::expanded_crossover_rows(plan.model) ? AttentionForm::kExpanded
                                                       : AttentionForm::kAbsorbed);
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    PlanDevice& device = plan.devices[d];
    const SessionScratch scratch =
        session_scratch(*engine_, static_cast<int>(d), plan, map.weights(), chunk);
    device.transfer_bytes = scratch.staging_bytes;
    for (Phase phase : {Phase::kPrefill, Phase::kDecode}) {
      auto& bytes = device.bytes[index(phase)];
      bytes[index(Purpose::kActivations)] =
          plan.config.sessions_max * committed_bytes(scratch.activations_bytes, device.granularity);
      bytes[index(Purpose::kWorkspace)] =
          plan.config.sessions_max * committed_bytes(scratch.workspace_bytes, device.granularity);
    }
  }
}

void Planner::set_context(Plan& plan, int64_t n_tokens) const {
  plan.max_context = n_tokens;
  bool all_host = true;
  for (const auto& device : engine_->devices) all_host &= device->host_accessible();
  const bool spread = !plan.placement.kv.empty();
  const TierBytes tiers =
      tier_bytes(plan.config.kv_tiers, spread, plan.kv_policy, layout_of(plan), all_host);
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    PlanDevice& device = plan.devices[d];
    int64_t runtime = engine_->devices[d]->runtime_bytes() + device.copy_runtime_bytes;
    if (static_cast<int>(d) == engine_->host_device) {
      device.session_runtime_bytes =
          session_runtime_bytes(n_tokens, plan.kv_page_tokens,
                                static_cast<int64_t>(plan.devices.size()) *
                                    tables_per_device(plan.config.kv_tiers, spread),
                                device.granularity);
      runtime += plan.config.sessions_max * device.session_runtime_bytes;
    }
    for (Phase phase : {Phase::kPrefill, Phase::kDecode}) {
      auto& bytes = device.bytes[index(phase)];
      bytes[index(Purpose::kRuntime)] = runtime;
      bytes[index(Purpose::kStaging)] =
          plan.config.sessions_max *
              (committed_bytes(device.n_layers > 0 ? tiers.staging : 0, device.granularity) +
               committed_bytes(device.transfer_bytes, device.granularity) +
               (static_cast<int>(d) == engine_->host_device
                    ? committed_bytes(tiers.bounce, device.granularity)
                    : 0)) +
          device.copy_staging_bytes;
    }
  }
  set_cache(plan, n_tokens);
}

// What the budget leaves for copies of experts: beside a full cache, and beside an empty one.
void Planner::set_copies(Plan& plan, const nn::WeightMap& map) const {
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d) {
    if (!plan.feasible || !plan.placement.has_copies(d)) continue;
    PlanDevice& device = plan.devices[static_cast<size_t>(d)];
    const CopyLayout layout = copy_layout(*engine_->devices[static_cast<size_t>(d)], d,
                                          plan.placement, plan.model, map.weights());
    const int64_t most =
        std::min(layout.most_bytes, plan.config.experts_cache.value_or(layout.most_bytes));
    int64_t left = budget(plan, d) - device.peak_bytes();
    if (device.kind == DeviceKind::kCpu) {
      int64_t host = 0;
      for (const PlanDevice& other : plan.devices)
        if (other.kind == DeviceKind::kCpu) host += other.peak_bytes();
      left = std::min(left, host_limit(plan) - host);
    }
    const auto whole = [&](int64_t bytes) {
      return std::clamp<int64_t>(bytes, 0, most) / device.granularity * device.granularity;
    };
    const int64_t cache = device.bytes[index(Phase::kDecode)][index(Purpose::kKv)];
    const int64_t stays = whole(left);
    device.expert_cache_bytes = whole(stays + cache);
    for (Phase phase : {Phase::kPrefill, Phase::kDecode})
      device.bytes[index(phase)][index(Purpose::kExpertCache)] = stays;
    int64_t n = 0, largest = 1;
    for (const CopyLayout::Layer& layer : layout.layers) {
      n += layer.n_elsewhere;
      largest = std::max(largest, layer.expert_bytes);
    }
    plan.remarks.push_back(
        fmt::format("experts.cache: {}: copies of up to {} of the {} experts of its layers that "
                    "live elsewhere, "
                    "{} at {} tokens",
                    device.name, std::min(n, device.expert_cache_bytes / largest), n,
                    std::min(n, stays / largest), plan.max_context));
  }
}

void Planner::name_what_binds(Plan& plan) const {
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    const PlanDevice& device = plan.devices[d];
    const int64_t short_by = device.peak_bytes() - std::min(budget(plan, static_cast<int>(d)),
                                                            engine_->ledger.host_budget());
    if (short_by <= plan.bytes_short && plan.binding_device >= 0) continue;
    plan.binding_device = static_cast<int>(d);
    plan.bytes_short = std::max<int64_t>(short_by, 0);
    int64_t most = -1;  // the purpose that takes most
    for (int p = 0; p < kPurposeCount; ++p)
      if (const int64_t bytes = device.planned(static_cast<Purpose>(p)); bytes > most) {
        most = bytes;
        plan.binding_purpose = static_cast<Purpose>(p);
      }
  }
}

}  // namespace fathom::run
