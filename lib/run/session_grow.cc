// Room for a session's next rows: the ladder is climbed when memory ends, and when it has ended the
// session says what would help.  Decisions: ladder.h; pages: kv_pages.h.
#include <fmt/format.h>

#include <algorithm>

#include "ladder.h"
#include "planner.h"
#include "session_state.h"

namespace fathom::run {
namespace {

// Shorter passes than these save little: from here on scratch is what one token needs.
constexpr int64_t kShortestChunk = nn::kAbsorbedRows;

int64_t committed_scratch(const SessionScratch& bytes, int64_t granularity) noexcept {
  return committed_bytes(bytes.activations_bytes, granularity) +
         committed_bytes(bytes.workspace_bytes, granularity) +
         committed_bytes(bytes.staging_bytes, granularity);
}

// Refusals that free memory cures.
bool is_of_memory(const Status& status) noexcept {
  return status.device() >= 0 &&
         (status.code() == Code::kBudget || status.code() == Code::kMemory ||
          status.code() == Code::kCallback);
}

const char* event_kind(LadderStep step) noexcept {
  switch (step) {
    case LadderStep::kChunk:
      return "chunk_lowered";
    case LadderStep::kSpill:
      return "spilled";
    case LadderStep::kRequantise:
      return "requantised";
    case LadderStep::kFile:
      return "spilled_to_file";
  }
  return "";
}

}  // namespace

SessionScratch SessionState::scratch_bytes(int device, int64_t n) const {
  return session_scratch(*model.engine().state(), device, model.plan(), *model.state()->weights, n);
}

std::vector<SessionScratch> SessionState::all_scratch(int64_t n) const {
  std::vector<SessionScratch> all;
  for (int d = 0; d < static_cast<int>(model.plan().devices.size()); ++d)
    all.push_back(scratch_bytes(d, n));
  return all;
}

// Addresses are for the plan's chunk, memory is for n tokens, so that a chunk can be lowered and
// come back where it is.
Status SessionState::try_scratch(int64_t n) {
  EngineState& engine = *model.engine().state();
  const std::vector<SessionScratch> most = all_scratch(model.plan().prefill_chunk);
  const std::vector<SessionScratch> wanted =
      n == model.plan().prefill_chunk ? most : all_scratch(n);
  const auto take = [&](int d, Purpose purpose, int64_t addresses,
                        int64_t bytes) -> Result<MemoryRange> {
    FATHOM_TRY_ASSIGN(MemoryRange range, engine.reserve(d, purpose, std::max(addresses, bytes)));
    FATHOM_TRY(range.resize(bytes));
    return range;
  };
  std::vector<MemoryRange> ranges;
  MemoryRange copies;
  for (int d = 0; d < static_cast<int>(wanted.size()); ++d) {
    const SessionScratch &bytes = wanted[static_cast<size_t>(d)],
                         &planned = most[static_cast<size_t>(d)];
    FATHOM_TRY_ASSIGN(auto activations, take(d, Purpose::kActivations, planned.activations_bytes,
                                             bytes.activations_bytes));
    FATHOM_TRY_ASSIGN(auto workspace,
                      take(d, Purpose::kWorkspace, planned.workspace_bytes, bytes.workspace_bytes));
    if (d == engine.host_device) {
      FATHOM_TRY_ASSIGN(copies,
                        take(d, Purpose::kStaging, planned.staging_bytes, bytes.staging_bytes));
    }
    ranges.push_back(std::move(activations));
    ranges.push_back(std::move(workspace));
  }
  scratch = std::move(ranges);
  staging = std::move(copies);
  return {};
}

// The last logits lie first and stay where they are.
void SessionState::carve_scratch(int64_t n) {
  const Plan& plan = model.plan();
  for (auto& others : other_stages) others = stages;
  for (size_t i = 0; i < stages.size(); ++i) {
    const MemoryRange &activations = scratch[2 * i], &workspace = scratch[2 * i + 1];
    Arena arena(activations.data(), activations.size_bytes());
    const SessionBuffers buffers =
        carve_session(arena, *model.engine().state(), static_cast<int>(i), plan, n);
    stages[i].scratch = buffers.scratch[0];
    stages[i].op = {workspace.data(), workspace.size_bytes()};
    for (size_t k = 0; k < other_stages.size(); ++k) {
      other_stages[k][i] = stages[i];
      other_stages[k][i].scratch = buffers.scratch[k + 1];
    }
    if (buffers.host_logits != nullptr) logits = buffers.host_logits;
  }
  if (model.engine()
          .state()
          ->devices[static_cast<size_t>(plan.placement.head_device)]
          ->host_accessible())
    logits = stages[static_cast<size_t>(plan.placement.head_device)].scratch.logits;
  chunk = n;
}

Status SessionState::take_scratch() {
  const Plan& plan = model.plan();
  const bool may_lower = ladder_has(plan.config, LadderStep::kChunk);
  chunk = plan.prefill_chunk;
  Status refused = try_scratch(chunk);
  while (is_of_memory(refused) && may_lower && shorter_chunk() < chunk) {
    chunk = shorter_chunk();
    refused = try_scratch(chunk);
  }
  if (!refused.ok()) {
    const int64_t missing = refused.bytes_needed() - refused.bytes_available();
    const int64_t shorter = std::max(chunk / 4, int64_t{1});
    if (refused.device() < 0 || missing <= 0) return refused;
    const SessionScratch now = scratch_bytes(refused.device(), chunk);
    const SessionScratch then = scratch_bytes(refused.device(), shorter);
    return Status(
               refused.code(),
               fmt::format("{}. Helps: [1] prefill.chunk={} takes {} bytes less; [2] budget.{} +{} "
                           "bytes; [3] ending another session",
                           refused.message(), shorter,
                           now.activations_bytes + now.workspace_bytes - then.activations_bytes -
                               then.workspace_bytes,
                           plan.devices[static_cast<size_t>(refused.device())].name, missing))
        .on_device(refused.device())
        .about(refused.key())
        .bytes(refused.bytes_needed(), refused.bytes_available());
  }
  for (size_t d = 0; d < plan.devices.size(); ++d)
    stages.push_back({.device = model.engine().state()->devices[d].get(), .op = {}, .scratch = {}});
  carve_scratch(chunk);
  if (chunk < plan.prefill_chunk) tell_chunk(plan.prefill_chunk, 0);
  return {};
}

int64_t SessionState::shorter_chunk() const noexcept {
  if (model.plan().config.prefill_chunk) return chunk;  // pinned
  return std::min(chunk, std::max(chunk / 2, kShortestChunk));
}

int64_t SessionState::owed_bytes(int device, int64_t n_then) const noexcept {
  const Plan& plan = model.plan();
  const KvPages& pages = cache.pages();
  return plan.devices[static_cast<size_t>(device)].planned(Purpose::kKv) /
             plan.config.sessions_max -
         pages.held_bytes(device) - pages.growth_bytes(device, n_then);
}

int64_t SessionState::scratch_now(int device) const noexcept {
  const auto stage = static_cast<size_t>(device);
  return scratch[2 * stage].size_bytes() + scratch[2 * stage + 1].size_bytes() +
         (device == model.engine().state()->host_device ? staging.size_bytes() : 0);
}

int64_t SessionState::chunk_gain(int device, int64_t n_then) const {
  const int64_t shorter = shorter_chunk();
  if (lost || shorter == chunk || owed_bytes(device, n_then) < 0) return 0;
  const int64_t granularity = stages[static_cast<size_t>(device)].device->granularity();
  return scratch_now(device) - committed_scratch(scratch_bytes(device, shorter), granularity);
}

bool SessionState::has_room(const std::vector<SessionScratch>& wanted, int64_t n_then) const {
  const Ledger& ledger = model.engine().state()->ledger;
  int64_t on_host = 0;
  for (int d = 0; d < static_cast<int>(wanted.size()); ++d) {
    // The cache may still grow to what was planned for it, or by what this prompt needs.
    const int64_t growth = cache.pages().growth_bytes(d, n_then);
    const int64_t more = committed_scratch(wanted[static_cast<size_t>(d)],
                                           stages[static_cast<size_t>(d)].device->granularity()) -
                         scratch_now(d) +
                         std::clamp<int64_t>(growth + owed_bytes(d, n_then), 0, growth);
    if (more > ledger.available(d)) return false;
    if (ledger.is_host(d)) on_host += more;
  }
  return on_host <= ledger.host_available();
}

Status SessionState::resize_scratch(const std::vector<SessionScratch>& bytes) {
  const auto host = static_cast<size_t>(model.engine().state()->host_device);
  std::vector<std::pair<MemoryRange*, int64_t>> before;
  const auto resize = [&](MemoryRange& range, int64_t wanted) {
    before.emplace_back(&range, range.size_bytes());
    return range.resize(wanted);
  };
  before.reserve(2 * bytes.size() + 1);
  Status status;
  for (size_t i = 0; i < bytes.size() && status.ok(); ++i) {
    status = resize(scratch[2 * i], bytes[i].activations_bytes);
    if (status.ok()) status = resize(scratch[2 * i + 1], bytes[i].workspace_bytes);
    if (status.ok() && i == host) status = resize(staging, bytes[i].staging_bytes);
  }
  // Growth that was made before another was refused is given back; that does not fail.
  if (!status.ok())
    for (const auto& [range, size] : before) (void)range->resize(size);
  return status;
}

void SessionState::raise_chunk(int64_t n_then) {
  const int64_t planned = model.plan().prefill_chunk, before = chunk;
  for (int64_t n = planned; n > before; n /= 2) {
    const std::vector<SessionScratch> wanted = all_scratch(n);
    if (!has_room(wanted, n_then)) continue;
    int64_t bytes = 0;
    for (int d = 0; d < static_cast<int>(wanted.size()); ++d) bytes -= scratch_now(d);
    if (!resize_scratch(wanted).ok()) continue;
    for (int d = 0; d < static_cast<int>(wanted.size()); ++d) bytes += scratch_now(d);
    carve_scratch(n);
    tell("chunk_raised", bytes,
         fmt::format("memory is there again: prefill in passes of {} tokens instead of {}", n,
                     before));
    return;
  }
}

void SessionState::tell_chunk(int64_t before, int64_t freed) {
  tell(event_kind(LadderStep::kChunk), freed,
       fmt::format(
           "prefill in passes of {} tokens instead of {}; a long prompt reads the weights {} "
           "times as often",
           chunk, before, before / chunk));
}

LadderGains SessionState::ladder_gains(int device, int64_t n_then) const {
  LadderGains gains = cache.pages().gains(device, n_then);
  if (ladder_has(model.plan().config, LadderStep::kChunk))
    gains[LadderStep::kChunk] = chunk_gain(device, n_then);
  return gains;
}

// A run of the same kind is one event, which grows.
void SessionState::tell(const char* kind, int64_t bytes, std::string text, double pass_seconds) {
  if (pass_seconds > 0) text += fmt::format(", about {:.3g} ms", pass_seconds * 1e3);
  timeline().mark(kind, text, n_tokens, bytes);
  if (!events.empty() && events.back().kind == kind) {
    events.back().bytes += bytes;
    events.back().text = std::move(text);
    events.back().pass_seconds = pass_seconds;
    return;
  }
  model.engine().state()->log(LogLevel::kWarn,
                              fmt::format("{} at token {}: {}", kind, n_tokens, text));
  events.push_back({.kind = kind,
                    .text = std::move(text),
                    .position = n_tokens,
                    .bytes = bytes,
                    .pass_seconds = pass_seconds});
}

// Read-ahead may hide some of it behind the arithmetic.
double SessionState::moved_seconds() const {
  const KvPages& pages = cache.pages();
  const EngineState& engine = *model.engine().state();
  double s = static_cast<double>(pages.bytes_in(KvTier::kFile)) / engine.machine.file_bytes_per_s;
  for (int d = 0; d < pages.n_devices(); ++d)
    if (const int64_t bytes = pages.host_bytes_of(d); bytes > 0)
      s += static_cast<double>(bytes) / engine.machine.link(d, engine.host_device).bytes_per_s;
  return s;
}

Status SessionState::take_step(LadderStep step, int device, int64_t n_then, int64_t bytes) {
  KvPages& pages = cache.pages();
  const int64_t page_tokens = cache.page_tokens();
  KvPages::Moved moved;
  Status status;
  switch (step) {
    case LadderStep::kChunk: {
      const int64_t before = chunk, held = scratch_now(device), shorter = shorter_chunk();
      FATHOM_TRY(resize_scratch(all_scratch(shorter)));  // gives back only
      carve_scratch(shorter);
      tell_chunk(before, held - scratch_now(device));
      return {};
    }
    case LadderStep::kSpill:
      status = pages.spill(device, n_then, bytes, moved);
      break;
    case LadderStep::kRequantise:
      pages.requantise(device, n_then, bytes, moved);
      break;
    case LadderStep::kFile:
      status = pages.to_file(device, n_then, bytes, moved);
      break;
  }
  if (moved.pages == 0) return status;
  if (step == LadderStep::kRequantise)
    tell(
        event_kind(step), moved.freed,
        fmt::format("cold pages rewritten up to token {}, the last {} in {}; no slower, less exact",
                    n_tokens, moved.pages, kv_type_name(moved.type)));
  else
    tell(
        event_kind(step), moved.freed,
        step == LadderStep::kSpill
            ? fmt::format("{} cold tokens are in host memory; every pass moves {} bytes to {}",
                          pages.pages_in(device, KvTier::kHost) * page_tokens,
                          pages.bytes_in(KvTier::kHost),
                          stages[static_cast<size_t>(device)].device->name())
            : fmt::format("{} cold tokens are in the spill file; every pass reads {} bytes from it",
                          pages.pages_in(device, KvTier::kFile) * page_tokens,
                          pages.bytes_in(KvTier::kFile)),
        moved_seconds());
  return status;
}

Result<bool> SessionState::climb(const Status& refused, int64_t n_then, int64_t bytes,
                                 bool same_bits, Status& trouble) {
  const int device = refused.device();
  std::vector<LadderStep> ladder = model.plan().config.kv_ladder;
  if (same_bits) std::erase(ladder, LadderStep::kRequantise);
  for (;;) {
    const std::optional<LadderStep> step = next_step(ladder, ladder_gains(device, n_then));
    if (!step) return false;
    Status status = take_step(*step, device, n_then, bytes);
    if (status.ok()) return true;
    if (status.code() == Code::kDevice) return status;
    trouble = std::move(status);  // a full disk, say: the next step may still help
    std::erase(ladder, *step);
  }
}

// The last step of the ladder is the first that is taken back: pages elsewhere cost every pass.
// Room for the next passes is left, so that a page does not come and go.
void SessionState::return_pages(int64_t n_then) {
  KvPages& pages = cache.pages();
  if (!pages.any_moved()) return;
  const KvPages::Moved back = pages.come_back(
      std::min(std::max(n_then, n_tokens + model.plan().prefill_chunk), cache.max_tokens()));
  if (back.pages > 0)
    tell(
        "returned", back.freed,
        fmt::format("memory is there again: {} pages came back, {} bytes are in host memory and {} "
                    "in the file",
                    back.pages, pages.bytes_in(KvTier::kHost), pages.bytes_in(KvTier::kFile)),
        moved_seconds());
}

Status SessionState::grow(int64_t n_then, bool in_passes) {
  if (lost) return lost_error();
  return_pages(n_then);
  Status trouble;
  if (ExpertCache* copies = model.state()->copies.get()) {
    // Copies of experts go before anything else suffers.
    const int64_t next = in_passes ? std::min(n_then, n_tokens + chunk) : n_then;
    for (int d = 0; d < cache.pages().n_devices(); ++d)
      copies->make_room(d, cache.pages().growth_bytes(d, next));
  }
  for (;;) {
    if (in_passes) n_then = std::min(n_then, n_tokens + chunk);
    Status refused = cache.reserve(n_then);
    // A refusal that could not even be told apart from others: the heap has ended, too.
    if (refused.code() == Code::kBudget && refused.device() < 0)
      return Status(Code::kMemory, refused.message());
    if (refused.ok() || !is_of_memory(refused)) return refused;
    if (model.plan().config.kv_ladder.empty()) return ended(std::move(refused), n_then, trouble);
    const int64_t growth = cache.pages().growth_bytes(refused.device(), n_then);
    const int64_t free = refused.code() == Code::kBudget
                             ? model.engine().state()->ledger.available(refused.device())
                             : 0;
    FATHOM_TRY_ASSIGN(const bool climbed,
                      climb(refused, n_then, std::max<int64_t>(growth - free, 1),
                            /*same_bits=*/false, trouble));
    if (!climbed) return ended(std::move(refused), n_then, trouble);
  }
}

template <class Take>
Status SessionState::restore_by(Take&& take, int64_t n_then) {
  Status trouble;
  for (;;) {
    Status refused = take();
    if (refused.ok() || !is_of_memory(refused) || model.plan().config.kv_ladder.empty())
      return refused;
    FATHOM_TRY_ASSIGN(const bool climbed, climb(refused, n_then, refused.bytes_needed(),
                                                /*same_bits=*/true, trouble));
    if (!climbed) return refused;
  }
}

Status SessionState::restore_page(KvType type, int64_t n_then) {
  return restore_by([&] { return cache.add_page(type); }, n_then);
}

Status SessionState::restore_room(int64_t n_room, int64_t n_then) {
  return restore_by([&] { return cache.pages().map(n_room); }, n_then);
}

// What would have made room, by what it costs: speed or exactness, text, memory.
Status SessionState::ended(Status refused, int64_t n_then, const Status& trouble) const {
  const Config& config = model.plan().config;
  const int device = refused.device();
  const KvPages& pages = cache.pages();
  const LadderGains gains = ladder_gains(device, n_then);
  const auto climbs = [&](LadderStep step) { return ladder_has(config, step); };
  std::vector<std::string> remedies;
  const int64_t movable = pages.movable_bytes(device, n_then);
  if (const int64_t gain = climbs(LadderStep::kChunk) ? 0 : chunk_gain(device, n_then); gain > 0)
    remedies.push_back(fmt::format("kv.ladder with chunk frees {} bytes of scratch", gain));
  else if (!climbs(LadderStep::kFile) && gains[LadderStep::kFile] > 0)
    remedies.push_back(
        fmt::format("kv.ladder with file moves {} bytes of pages out", gains[LadderStep::kFile]));
  else if (pages.options().tiers.back() != KvTier::kFile && movable > 0)
    remedies.push_back(fmt::format("kv.tiers={},file lets {} bytes of pages leave memory",
                                   pages.options().tiers.size() > 1 ? "device,host" : "device",
                                   movable));
  else if (!climbs(LadderStep::kRequantise) &&
           config.kv_type.value_or(KvType::kF16) <= KvType::kF16)
    remedies.push_back(
        fmt::format("kv.ladder with requantise, or kv.type=q8_0, takes {} instead of "
                    "{} bytes per token",
                    kv_bytes_of(KvType::kQ8_0), model.plan().kv_bytes_per_token));
  const int64_t missing = std::max<int64_t>(refused.bytes_needed() - refused.bytes_available(), 0);
  if (const int64_t keep = pages.tokens_freeing(device, missing); keep > 0)
    remedies.push_back(fmt::format("truncate to {} tokens", keep));
  if (missing > 0)
    remedies.push_back(fmt::format("budget.{} +{} bytes",
                                   stages[static_cast<size_t>(device)].device->name(), missing));

  const bool climbed = !config.kv_ladder.empty();
  std::string text =
      climbed ? fmt::format("memory and ladder end at {} tokens: {}", n_tokens, refused.message())
              : std::string(refused.message());
  if (!trouble.ok()) text += fmt::format(" ({})", trouble.message());
  for (size_t i = 0; i < remedies.size(); ++i)
    text += fmt::format("{}[{}] {}", i == 0 ? ". Helps: " : "; ", i + 1, remedies[i]);
  return Status(climbed && refused.code() == Code::kBudget ? Code::kContextFull : refused.code(),
                text)
      .on_device(device)
      .about(refused.key())
      .bytes(refused.bytes_needed(), refused.bytes_available());
}

int64_t SessionState::kv_bytes_of(KvType type) const noexcept {
  const KvLayout& layout = cache.pages().options().layout;
  return model.config().num_hidden_layers *
         (layout.latent_row_bytes(type) + layout.rope_row_bytes(type));
}

}  // namespace fathom::run
