// Session: prefill in chunks, steps, truncation.  Generation is in generate.cc.
#include "fathom/session.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "planner.h"
#include "session_state.h"

namespace fathom {
namespace run {

Status SessionState::check_tokens(std::span<const int32_t> ids) const {
  const int64_t vocab = model.config().vocab_size;
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= vocab)
      return Status(Code::kInvalidArgument,
                    fmt::format("token {} has id {}, which is not in [0, {})", i, ids[i], vocab));
  return {};
}

AttentionForm SessionState::form_of(int64_t n) const noexcept {
  const std::optional<AttentionForm> pinned = model.plan().config.attention_form;
  if (pinned) return *pinned;
  return n >= nn::expanded_crossover_rows(model.config()) ? AttentionForm::kExpanded
                                                          : AttentionForm::kAbsorbed;
}

bool SessionState::report(const StepFunction& on_step, Phase phase, int64_t n_new, double seconds) {
  const Ledger& ledger = model.engine().state()->ledger;
  if (memory.devices.empty()) memory = ledger.snapshot();
  ledger.refresh(memory);
  return on_step({phase, n_new, n_tokens, seconds, cache.size_bytes(), memory});
}

Status SessionState::run_pass(const nn::ForwardParams& params, nn::PassEnd end) {
  const PassGate::Pass pass(model.state()->gate);
  Status status = nn::forward(params, end);
  if (!status.ok()) wait_for_devices();
  return status;
}

Status SessionState::compute_logits(const nn::ForwardParams& params, int64_t first_row,
                                    int64_t n_rows) {
  FATHOM_TRY(nn::queue_logits(params, first_row, n_rows));
  return fetch_logits(params, n_rows);
}

Status SessionState::fetch_logits(const nn::ForwardParams& params, int64_t n_rows) {
  const nn::Stage& head = stages[static_cast<size_t>(params.placement.head_device)];
  return nn::fetch_logits(params, n_rows, head.scratch.logits == logits ? nullptr : logits);
}

void SessionState::wait_for_devices() const noexcept {
  for (const nn::Stage& stage : stages) (void)stage.device->sync(stage.op);
}

bool SessionState::bring_likeliest(int64_t k) {
  const nn::Stage& head = stages[static_cast<size_t>(model.plan().placement.head_device)];
  const int64_t found = std::min(k, model.config().vocab_size);
  likeliest.clear();
  if (found < 1 || found > head.device->max_top_k()) return false;
  likeliest.resize(static_cast<size_t>(found) + 1);
  return true;
}

Status SessionState::bring_logits() {
  if (!has_likeliest || has_logits) return {};
  const nn::Stage& head = stages[static_cast<size_t>(model.plan().placement.head_device)];
  FATHOM_TRY(
      head.device->download(logits, head.scratch.logits,
                            model.config().vocab_size * static_cast<int64_t>(sizeof(float))));
  has_logits = true;
  return {};
}

Status SessionState::all_logits(const nn::ForwardParams& params, const RunOptions& options) {
  const auto n = static_cast<int64_t>(params.tokens.size());
  const int64_t vocab = model.config().vocab_size;
  for (int64_t row = 0; row < n; row += nn::kLogitRows) {
    const int64_t count = std::min(nn::kLogitRows, n - row);
    FATHOM_TRY(compute_logits(params, row, count));
    for (int64_t i = 0; i < count; ++i)
      if (!options.on_logits(params.sequences.front().first_position + row + i,
                             {logits + i * vocab, static_cast<size_t>(vocab)}))
        return Status(Code::kCallback,
                      fmt::format("the logits callback stopped at position {}",
                                  params.sequences.front().first_position + row + i));
    // logits() is the view of the first row: leave the last position's there.
    if (row + count == n && count > 1) std::copy_n(logits + (count - 1) * vocab, vocab, logits);
  }
  return {};
}

Result<int64_t> SessionState::pass(std::span<const int32_t> ids, int64_t longest,
                                   const RunControl& control, const RunOptions& options,
                                   Decoding decoding) {
  const int64_t capacity = cache.capacity_tokens();
  const auto left = static_cast<int64_t>(ids.size());
  FATHOM_TRY(grow(n_tokens + std::min(left, longest), /*in_passes=*/true));
  const int64_t n = std::min({left, longest, chunk});
  const std::span<const int32_t> taken = ids.first(static_cast<size_t>(n));
  const bool want_logits = n == left;
  pages_.begin_pass();
  const nn::Sequence sequence{this, 0, n, n_tokens};
  const nn::ForwardParams params{
      .config = model.config(),
      .rope = model.state()->rope,
      .weights = *model.state()->weights,
      .placement = model.plan().placement,
      .stages = stages,
      .staging = staging.data(),
      .tokens = taken,
      .sequences = {&sequence, 1},
      .form = decoding == Decoding::kYes ? AttentionForm::kAbsorbed : form_of(n),
      .cancelled = RunControl::cancelled,
      .cancelled_arg = const_cast<RunControl*>(&control),
      .trace = trace,
      .section_rows = section_rows,
      .copies = model.state()->copies.get()};
  const bool any_logits = want_logits || options.on_logits;
  const bool few = want_logits && !options.on_logits && !likeliest.empty();
  // Asking for logits waits as well; copies of experts may change between passes.
  Status status = run_pass(
      params, any_logits && params.copies == nullptr ? nn::PassEnd::kLeave : nn::PassEnd::kWait);
  if (status.ok() && any_logits) has_logits = has_likeliest = false;  // being overwritten
  if (status.ok() && options.on_logits)
    status = all_logits(params, options);
  else if (status.ok() && few)
    status = nn::forward_likeliest(params, n - 1, static_cast<int64_t>(likeliest.size()) - 1,
                                   likeliest.data());
  else if (status.ok() && want_logits)
    status = compute_logits(params, n - 1, 1);
  if (!status.ok()) {
    wait_for_devices();
    cache.truncate(n_tokens, capacity);  // rows written but never committed; pages as before
    return status;
  }
  append(taken);
  has_likeliest = few;
  has_logits = any_logits && !few;
  if (ExpertCache* copies = model.state()->copies.get()) copies->after_pass(n);
  return n;
}

void SessionState::append(std::span<const int32_t> ids) noexcept {
  std::copy(ids.begin(), ids.end(), tokens + n_tokens);
  n_tokens += static_cast<int64_t>(ids.size());
  cache.commit_rows(n_tokens);
  timeline().tokens(static_cast<int64_t>(ids.size()));
}

}  // namespace run

Session::Session(std::unique_ptr<run::SessionState> state) noexcept : state_(std::move(state)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

Result<Session> Session::create(const Model& model, const SessionOptions& options) {
  return run::guarded([&]() -> Result<Session> {
    const Plan& plan = model.plan();
    run::EngineState& engine = *model.engine().state();
    const int64_t max_tokens = options.max_tokens == 0 ? plan.max_context : options.max_tokens;
    if (max_tokens < 1 || max_tokens > plan.max_context)
      return Status(Code::kInvalidArgument,
                    fmt::format("max_tokens {} is not in [1, {}], what was planned", max_tokens,
                                plan.max_context));
    if (options.reserve_tokens < 0 || options.reserve_tokens > max_tokens)
      return Status(Code::kInvalidArgument, fmt::format("reserve_tokens {} is not in [0, {}]",
                                                        options.reserve_tokens, max_tokens));
    KVCacheOptions cache_options{
        .policy = plan.kv_policy,
        .layout = {plan.kv_page_tokens, plan.model.kv_lora_rank, plan.model.qk_rope_head_dim},
        .layers_on_device = {},
        .max_tokens = max_tokens,
        .tiers = plan.config.kv_tiers,
        .spill_folder = plan.config.kv_spill_folder,
        .spill_to_memory = plan.config.kv_spill_tmpfs == SpillTmpfs::kAllow,
        .floor_type = run::ladder_reach(plan.config).floor_type,
        .spans = plan.placement.kv};
    for (const PlanDevice& device : plan.devices)
      cache_options.layers_on_device.push_back(device.n_layers);
    FATHOM_TRY_ASSIGN(KVCache cache, KVCache::create(model.engine().state(), cache_options));
    auto state = std::make_unique<run::SessionState>(model, std::move(cache));

    FATHOM_TRY_ASSIGN(state->history, engine.allocate(engine.host_device, Purpose::kRuntime,
                                                      run::token_history_bytes(max_tokens)));
    state->tokens = reinterpret_cast<int32_t*>(state->history.data());
    FATHOM_TRY(state->take_scratch());
    const int64_t reserve =
        std::max(options.reserve_tokens, std::min(plan.config.context_reserve, max_tokens));
    FATHOM_TRY(state->grow(reserve, /*in_passes=*/false));
    return Session(std::move(state));
  });
}

Status Session::prefill(std::span<const int32_t> tokens, const RunOptions& options) {
  return run::guarded([&]() -> Status {
    run::SessionState& s = *state_;
    if (tokens.empty()) return Status(Code::kInvalidArgument, "prefill of no tokens");
    if (s.lost) return s.lost_error();
    FATHOM_TRY(s.check_tokens(tokens));
    const auto total = static_cast<int64_t>(tokens.size());
    const int64_t planned = s.model.plan().prefill_chunk;
    if (options.chunk < 0 || options.chunk > planned)
      return Status(
          Code::kInvalidArgument,
          fmt::format("chunk {} is not in [0, {}], what was planned", options.chunk, planned));
    if (total > s.cache.max_tokens() - s.n_tokens)
      return Status(Code::kContextFull,
                    fmt::format("{} tokens do not fit: the session holds {} of at most {}", total,
                                s.n_tokens, s.cache.max_tokens()));
    const int64_t longest = options.chunk > 0 ? options.chunk : planned;
    const run::RunControl control(options);

    FATHOM_TRY(control.check(ProgressPhase::kPrefill, 0, total));
    s.timeline().begin(TimelinePhase::kPrefill);
    s.raise_chunk(s.n_tokens + total);
    // Where the whole prompt finds room: else chunk by chunk, as far as there is room.
    const int64_t capacity = s.cache.capacity_tokens();
    const int64_t chunk = std::min(longest, s.chunk);
    if (total > chunk && s.chunks_overlap(options) && s.cache.reserve(s.n_tokens + total).ok()) {
      Status status = s.prefill_overlapped(tokens, chunk, control, options);
      // Rows of unfinished chunks are forgotten, with the pages that only they needed.
      if (!status.ok()) s.cache.truncate(s.n_tokens, std::max(capacity, s.n_tokens));
      return status;
    }
    for (int64_t done = 0; done < total;) {
      const double chunk_start = s.seconds();
      FATHOM_TRY_ASSIGN(const int64_t n, s.pass(tokens.subspan(static_cast<size_t>(done)), longest,
                                                control, options, run::Decoding::kNo));
      done += n;
      s.times.prefill_tokens += n;
      const double seconds = s.seconds() - chunk_start;
      s.times.prefill_seconds += seconds;
      if (options.on_step && !s.report(options.on_step, Phase::kPrefill, n, seconds))
        return Status(Code::kCallback, "the step callback asked to stop");
      if (done < total || options.progress)
        FATHOM_TRY(control.check(ProgressPhase::kPrefill, done, total));
    }
    return {};
  });
}

Status Session::step(int32_t token) {
  return run::guarded([&]() -> Status {
    run::SessionState& s = *state_;
    FATHOM_TRY(s.check_tokens({&token, 1}));
    if (s.n_tokens == s.cache.max_tokens())
      return Status(Code::kContextFull,
                    fmt::format("the session holds {} tokens, its most", s.n_tokens));
    static const RunOptions kNone;
    const double start = s.seconds();
    s.timeline().begin(TimelinePhase::kDecode);
    FATHOM_TRY_ASSIGN([[maybe_unused]] const int64_t n,
                      s.pass({&token, 1}, 1, run::RunControl(kNone), kNone, run::Decoding::kYes));
    ++s.times.decode_tokens;
    s.times.decode_seconds += s.seconds() - start;
    return {};
  });
}

std::span<const float> Session::logits() const noexcept {
  if (!state_->bring_logits().ok() || !state_->has_logits) return {};
  return {state_->logits, static_cast<size_t>(state_->model.config().vocab_size)};
}
std::span<const int32_t> Session::tokens() const noexcept {
  return {state_->tokens, static_cast<size_t>(state_->n_tokens)};
}
int64_t Session::n_tokens() const noexcept {
  return state_->n_tokens;
}
int64_t Session::max_tokens() const noexcept {
  return state_->cache.max_tokens();
}

Status Session::truncate(int64_t n_tokens) {
  run::SessionState& s = *state_;
  if (n_tokens < 0 || n_tokens > s.n_tokens)
    return Status(
        Code::kInvalidArgument,
        fmt::format("truncate to {}: not in [0, {}], the tokens held", n_tokens, s.n_tokens));
  const int64_t forgotten = s.n_tokens - n_tokens;
  if (forgotten > 0) s.has_logits = s.has_likeliest = false;
  s.n_tokens = n_tokens;
  s.cache.truncate(n_tokens);
  if (forgotten > 0) {
    s.timeline().tokens(-forgotten);
    s.timeline().mark("truncate", "", n_tokens, 0);
  }
  return {};
}

Status Session::reserve(int64_t n_tokens) {
  if (n_tokens < 0)
    return Status(Code::kInvalidArgument, fmt::format("reserve of {} tokens", n_tokens));
  return run::guarded([&] { return state_->grow(n_tokens, /*in_passes=*/false); });
}

const KVCache& Session::cache() const noexcept {
  return state_->cache;
}
const Model& Session::model() const noexcept {
  return state_->model;
}
const SessionTimes& Session::times() const noexcept {
  return state_->times;
}
const std::vector<Event>& Session::events() const noexcept {
  return state_->events;
}

}  // namespace fathom
