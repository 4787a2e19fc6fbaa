// What would make a plan fit: for each direction in which a configuration can give way, the
// smallest step that is enough, tried out by planning it.  Directions are ranked by what they cost
// the user: speed, other sessions, precision of the cache, length, precision of the weights,
// memory.
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <optional>

#include "ladder.h"
#include "planner.h"

namespace fathom::run {
namespace {

// Cache types by how much they lose, weights by size with their bits.
constexpr const char* kSmallerKvTypes[] = {"f16", "q8_0", "fp8", "q4_0"};
constexpr std::pair<WeightsType, double> kWeightBits[] = {{WeightsType::kBF16, 16},
                                                          {WeightsType::kF16, 16},
                                                          {WeightsType::kQ8_0, 8.5},
                                                          {WeightsType::kF8, 8},
                                                          {WeightsType::kQ4_K, 4.8}};
constexpr int64_t kMiB = int64_t{1} << 20, kGiB = int64_t{1} << 30;

double bits_of(WeightsType type) {
  for (const auto& [known, bits] : kWeightBits)
    if (known == type) return bits;
  return 0;
}

std::string text_of(const std::vector<std::pair<std::string, std::string>>& changes) {
  std::string text;
  for (const auto& [key, value] : changes)
    text += fmt::format("{}{}={}", text.empty() ? "" : " ", key, value);
  return text;
}

double gib(int64_t bytes) {
  return static_cast<double>(bytes) / static_cast<double>(int64_t{1} << 30);
}

}  // namespace

// Plans `config` with changes; no value when they cannot be made or do not fit.
std::optional<Plan> Planner::try_changes(const Config& config, const Changes& changes) const {
  Config changed = config;
  for (const auto& [key, value] : changes)
    if (!changed.set(key, value).ok()) return std::nullopt;
  if (!changed.validate().ok() || !check_spill_folder(changed).ok()) return std::nullopt;
  Result<Plan> plan = Status(Code::kInternal, "not planned");
  if (changed.weights_type != config.weights_type) {  // other tensors
    Result<Planner> other = open(*engine_, path_, changed);
    if (other.ok()) plan = other->plan_once(changed, Wanted::kFeasible);
  } else {
    plan = plan_once(changed, Wanted::kFeasible);
  }
  if (!plan.ok() || !plan->feasible) return std::nullopt;
  return std::move(plan).value();
}

void Planner::add_alternatives(Plan& plan) const {
  const Config& config = plan.config;
  const auto add = [&](const Changes& changes, const Plan& other) {
    PlanAlternative alternative;
    alternative.changes = changes;
    alternative.max_context = other.max_context;
    int64_t peak = 0;
    for (const PlanDevice& device : other.devices) peak += device.peak_bytes();
    alternative.text =
        fmt::format("{}: peak {:.2f} GiB, {} tokens, decode {:.3g} tokens/s", text_of(changes),
                    gib(peak), other.max_context, other.speed.decode_last);
    plan.alternatives.push_back(std::move(alternative));
  };
  // The first of these that fits.
  const auto add_first = [&](const std::vector<Changes>& steps) {
    for (const Changes& changes : steps)
      if (const auto other = try_changes(config, changes)) return add(changes, *other);
  };

  // What no cache, chunk or context changes: where it alone is too much, only smaller weights or
  // more memory help.
  int64_t fixed = 0, budgets = 0;
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d) {
    fixed += plan.devices[static_cast<size_t>(d)].total(Phase::kLoad) -
             plan.devices[static_cast<size_t>(d)]
                 .bytes[static_cast<size_t>(Phase::kLoad)][static_cast<size_t>(Purpose::kStaging)];
    budgets += budget(plan, d);
  }
  if (fixed < budgets) {
    if (config.prefill_chunk && *config.prefill_chunk > 1) add_first({{{"prefill.chunk", "auto"}}});

    // The most sessions that fit.
    int64_t low = 0, high = config.sessions_max - 1;
    std::optional<Plan> fewer;
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (auto other = try_changes(config, {{"sessions.max", std::to_string(middle)}}))
        low = middle, fewer = std::move(other);
      else
        high = middle - 1;
    }
    if (fewer) add({{"sessions.max", std::to_string(low)}}, *fewer);

    // Cold pages in a file cost speed alone.
    if (config.kv_tiers.back() != KvTier::kFile && ladder_has(config, LadderStep::kFile))
      add_first({{{"kv.tiers", *config.get("kv.tiers") + ",file"}}});

    std::vector<Changes> steps;
    const KvLayout layout{plan.kv_page_tokens, plan.model.kv_lora_rank,
                          plan.model.qk_rope_head_dim};
    for (const char* type : kSmallerKvTypes) {
      Config other;
      if (!other.set("kv.type", type).ok() ||
          layout.latent_row_bytes(*other.kv_type) >= layout.latent_row_bytes(plan.kv_type))
        continue;
      steps.push_back({{"kv.type", type}});
      if (config.prefill_chunk) steps.push_back({{"kv.type", type}, {"prefill.chunk", "auto"}});
    }
    add_first(steps);

    if (plan.max_context_feasible > 0)
      add_first({{{"context.max", std::to_string(plan.max_context_feasible)}}});
  }

  if (!file_->has_weights()) {
    const WeightsType now = config.weights_type.value_or(
        file_->format() == io::FileFormat::kSafetensors ? WeightsType::kF8 : WeightsType::kBF16);
    std::vector<Changes> steps;
    for (const WeightsType type : {WeightsType::kQ8_0, WeightsType::kQ4_K}) {
      if (bits_of(type) >= bits_of(now)) continue;
      steps.push_back({{"weights.type", std::string(weights_type_name(type))}});
    }
    add_first(steps);
  }
  add_budgets(plan, add);
}

// More memory: where it is short, and on one device at a time, the host first, then the cards.  The
// smallest amount, to an eighth, by trying.
void Planner::add_budgets(const Plan& plan,
                          const std::function<void(const Changes&, const Plan&)>& add) const {
  int64_t short_by = 0;
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d)
    short_by +=
        std::max<int64_t>(plan.devices[static_cast<size_t>(d)].peak_bytes() - budget(plan, d), 0);
  short_by = std::max(short_by, plan.bytes_short);
  std::vector<size_t> order;
  for (size_t d = 0; d < plan.devices.size(); ++d) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return (plan.devices[a].kind == DeviceKind::kCpu) > (plan.devices[b].kind == DeviceKind::kCpu);
  });
  // All that are short, together, each by what it lacks.
  Changes together;
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    const PlanDevice& device = plan.devices[d];
    const int64_t lacks = device.peak_bytes() - budget(plan, static_cast<int>(d));
    if (lacks > 0)
      together.push_back({"budget." + device.name,
                          std::to_string((device.budget_bytes + lacks + kMiB) / kMiB * kMiB)});
  }
  if (together.size() > 1)
    if (const auto fits = try_changes(plan.config, together)) add(together, *fits);

  for (const size_t d : order) {
    const PlanDevice& device = plan.devices[d];
    // The cards of a kind would say the same: one of each size is asked about.
    const bool seen =
        std::any_of(order.begin(), std::find(order.begin(), order.end(), d), [&](size_t other) {
          return plan.devices[other].kind == device.kind &&
                 plan.devices[other].budget_bytes == device.budget_bytes;
        });
    if (seen) continue;
    const auto with = [&](int64_t more) {
      // Whole MiB where it is an estimate anyway.
      int64_t bytes = device.budget_bytes + more;
      if (plan.devices.size() > 1) bytes = (bytes + kMiB - 1) / kMiB * kMiB;
      Changes changes{{"budget." + device.name, std::to_string(bytes)}};
      if (device.kind == DeviceKind::kCpu)
        if (const auto host = plan.config.budget.find("host"); host != plan.config.budget.end())
          changes.push_back({"budget.host", std::to_string(host->second + more)});
      return changes;
    };
    // One device alone: exactly what is short.  Several: what moves in is padded anew.
    const bool alone = plan.devices.size() == 1;
    int64_t more = short_by;
    std::optional<Plan> fits = try_changes(plan.config, with(more));
    for (int i = 0; i < 3 && !fits && !alone; ++i) {
      more += std::max(short_by / 8, kGiB / 2);
      fits = try_changes(plan.config, with(more));
    }
    if (fits) add(with(more), *fits);
  }
}

}  // namespace fathom::run
