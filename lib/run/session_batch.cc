// Session::step_batch: one pass over the next tokens of several texts.  Products with weights take
// all rows at once; each row has its own position and attends to its own cache.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <numeric>

#include "cost_model.h"
#include "pipeline.h"
#include "predict.h"
#include "session_state.h"

namespace fathom {
namespace run {
namespace {

using Sessions = std::span<Session* const>;

// The pass of a batch runs in the buffers of its first session.
SessionState& leader(Sessions sessions) noexcept {
  return sessions.front()->state();
}

Status check_room(Sessions sessions) {
  const int64_t most = leader(sessions).chunk;
  if (static_cast<int64_t>(sessions.size()) <= most) return {};
  return Status(Code::kInvalidArgument,
                fmt::format("a batch of {} sessions: the plan's chunk has room for {}",
                            sessions.size(), most));
}

Status check_batch(Sessions sessions, std::span<const int32_t> tokens) {
  if (sessions.empty() || sessions.size() != tokens.size())
    return Status(Code::kInvalidArgument, fmt::format("a batch of {} sessions and {} tokens",
                                                      sessions.size(), tokens.size()));
  for (size_t i = 0; i < sessions.size(); ++i) {
    if (sessions[i] == nullptr)
      return Status(Code::kInvalidArgument, fmt::format("session {} of the batch is null", i));
    if (std::count(sessions.begin(), sessions.end(), sessions[i]) > 1)
      return Status(Code::kInvalidArgument,
                    fmt::format("session {} of the batch is there twice", i));
    if (sessions[i]->state().model.state() != leader(sessions).model.state())
      return Status(Code::kMismatch,
                    fmt::format("session {} of the batch is of another model than session 0", i));
  }
  FATHOM_TRY(check_room(sessions));
  FATHOM_TRY(leader(sessions).check_tokens(tokens));
  for (size_t i = 0; i < sessions.size(); ++i) {
    const SessionState& s = sessions[i]->state();
    if (s.n_tokens == s.cache.max_tokens())
      return Status(Code::kContextFull, fmt::format("session {} of the batch holds {} tokens, its "
                                                    "most",
                                                    i, s.n_tokens));
  }
  return {};
}

// Logits of `count` rows from `row` on, which lie in the buffer of the first session, into those of
// theirs.
void hand_out_logits(Sessions sessions, int64_t row, int64_t count) {
  const SessionState& first = leader(sessions);
  const int64_t vocab = first.model.config().vocab_size;
  for (int64_t i = 0; i < count; ++i)
    if (row + i > 0)
      std::copy_n(first.logits + i * vocab, vocab,
                  sessions[static_cast<size_t>(row + i)]->state().logits);
}

// Logits of row i into the buffer of session i.  The leader's own buffer takes kLogitRows rows at a
// time; the first ones come last, so that row 0 stays.
Status batch_logits(const nn::ForwardParams& params, Sessions sessions) {
  const auto n = static_cast<int64_t>(sessions.size());
  for (int64_t row = (n - 1) / nn::kLogitRows * nn::kLogitRows; row >= 0; row -= nn::kLogitRows) {
    const int64_t count = std::min(nn::kLogitRows, n - row);
    FATHOM_TRY(leader(sessions).compute_logits(params, row, count));
    hand_out_logits(sessions, row, count);
  }
  return {};
}

// A part of a batch, in one pass.
struct Group {
  Sessions sessions;
  std::span<const int32_t> tokens;
  std::vector<nn::Sequence> sequences;
};

nn::ForwardParams params_of(const Group& group, const RunControl& control) {
  const SessionState& first = leader(group.sessions);
  return {.config = first.model.config(),
          .rope = first.model.state()->rope,
          .weights = *first.model.state()->weights,
          .placement = first.model.plan().placement,
          .stages = first.stages,
          .staging = first.staging.data(),
          .tokens = group.tokens,
          .sequences = group.sequences,
          .form = AttentionForm::kAbsorbed,
          .cancelled = RunControl::cancelled,
          .cancelled_arg = const_cast<RunControl*>(&control),
          .trace = nullptr,
          .section_rows = first.section_rows,
          .copies = first.model.state()->copies.get()};
}

void logits_change(const Group& group) noexcept {
  for (Session* session : group.sessions)
    session->state().has_logits = session->state().has_likeliest = false;
}

// One group after the other through the devices, so that these work at once, in waves or in turns.
// A group's logits are the work of the last device of a wave, where that has the head.
Status groups_at_once(std::span<const Group> groups, std::span<const LayerRun> runs,
                      const RunControl& control) {
  const auto group_of = [&](int64_t index) -> const Group& {
    return groups[static_cast<size_t>(index)];
  };
  const auto rows = [](const Group& group) { return static_cast<int64_t>(group.tokens.size()); };
  const Placement& placement = leader(groups.front().sessions).model.plan().placement;
  const bool waves = can_overlap(placement, runs);
  const bool queued = waves && placement.head_device == runs.back().device &&
                      rows(groups.front()) <= nn::kLogitRows;  // the first is the largest
  Passes passes{.count = static_cast<int64_t>(groups.size()), .params = {}, .finish = {}};
  passes.params = [&](int64_t index) { return params_of(group_of(index), control); };
  if (queued)
    passes.queue_end = [&](const nn::ForwardParams& params, int64_t index) {
      logits_change(group_of(index));
      return nn::queue_logits(params, 0, rows(group_of(index)));
    };
  passes.finish = [&](const nn::ForwardParams& params, int64_t index) -> Status {
    const Group& group = group_of(index);
    logits_change(group);
    if (!queued) return batch_logits(params, group.sessions);
    FATHOM_TRY(leader(group.sessions).fetch_logits(params, rows(group)));
    hand_out_logits(group.sessions, 0, rows(group));
    return {};
  };
  return waves ? run_in_waves(runs, passes) : run_in_turns(placement, passes.count, passes);
}

Status batch_pass(Sessions sessions, std::span<const int32_t> tokens, const RunControl& control) {
  const auto n = static_cast<int64_t>(sessions.size());
  SessionState& first = leader(sessions);
  const std::vector<LayerRun> runs = layer_runs(first.model.plan().placement);
  const int64_t n_groups = first.batch_groups(n);
  std::vector<Group> groups;
  for (int64_t g = 0, at = 0; g < n_groups; ++g) {
    const auto size = static_cast<size_t>((n - at + n_groups - g - 1) / (n_groups - g));
    const auto begin = static_cast<size_t>(at);
    Group group{sessions.subspan(begin, size), tokens.subspan(begin, size), {}};
    for (Session* session : group.sessions) {
      const SessionState& s = session->state();
      group.sequences.push_back({&s, static_cast<int64_t>(group.sequences.size()), 1, s.n_tokens});
    }
    groups.push_back(std::move(group));
    at += static_cast<int64_t>(size);
  }
  if (n_groups > 1) return groups_at_once(groups, runs, control);
  const nn::ForwardParams params = params_of(groups.front(), control);
  FATHOM_TRY(first.run_pass(params));
  logits_change(groups.front());  // they are being overwritten
  return batch_logits(params, sessions);
}

// Seconds of a pass of n rows in each run's device, by the cost model.
std::vector<double> run_seconds(const SessionState& s, std::span<const LayerRun> runs, int64_t n) {
  const Plan& plan = s.model.plan();
  const nn::Weights& weights = *s.model.state()->weights;
  const MachineDescription& machine = s.model.engine().machine();
  const PassShape pass{.n_tokens = n,
                       .first_position = s.n_tokens,
                       .form = AttentionForm::kAbsorbed,
                       .kv_type = plan.kv_type,
                       .page_tokens = plan.kv_page_tokens};
  std::vector<double> seconds;
  for (const LayerRun& run : runs) {
    const MachineDevice& device = machine.devices[static_cast<size_t>(run.device)];
    double sum =
        plan.placement.head_device == run.device ? head_seconds(device, plan.model, weights) : 0;
    for (size_t l = run.first; l < run.end; ++l)
      sum += layer_seconds(device, plan.model, weights.layers[l],
                           plan.model.is_moe_layer(static_cast<int64_t>(l)), pass)
                 .total();
    seconds.push_back(sum);
  }
  return seconds;
}

}  // namespace

// More groups keep more devices busy, and read the weights more often: as many as the cost model
// finds fastest, by more than it can be trusted to tell apart.
int64_t SessionState::batch_groups(int64_t n) {
  if (groups_of_batch.size() <= static_cast<size_t>(n))
    groups_of_batch.resize(static_cast<size_t>(n) + 1);
  int64_t& best = groups_of_batch[static_cast<size_t>(n)];
  if (best > 0) return best;
  const Placement& placement = model.plan().placement;
  const std::vector<LayerRun> runs = layer_runs(placement);
  const bool waves = can_overlap(placement, runs);
  // Groups that take turns do without copies of experts.
  const bool turns = !waves && model.plan().devices.size() > 1 && can_take_turns(placement) &&
                     model.state()->copies == nullptr;
  const int64_t most = waves ? static_cast<int64_t>(runs.size()) : turns ? kChunksInTurns : 1;
  double least = 0;
  for (int64_t groups = 1; groups <= std::min(n, most); ++groups) {
    double all = 0;
    if (waves) {
      const std::vector<double> t = run_seconds(*this, runs, (n + groups - 1) / groups);
      all = std::accumulate(t.begin(), t.end(), 0.0) +
            static_cast<double>(groups - 1) * *std::max_element(t.begin(), t.end());
    } else if (turns) {
      all = turns_seconds(model.plan(), model.engine().machine(), *model.state()->weights, n,
                          n_tokens, groups);
    }
    constexpr double kTellApart = 0.97;
    if (groups == 1 || all < kTellApart * least) best = groups, least = all;
  }
  return best;
}

}  // namespace run

Status Session::step_batch(std::span<Session* const> sessions, std::span<const int32_t> tokens,
                           const RunOptions& options) {
  return run::guarded([&]() -> Status {
    FATHOM_TRY(run::check_batch(sessions, tokens));
    const auto start = std::chrono::steady_clock::now();
    run::leader(sessions).timeline().begin(TimelinePhase::kDecode);
    std::vector<int64_t> capacities;
    for (const Session* session : sessions)
      capacities.push_back(session->state_->cache.capacity_tokens());
    Status status;
    for (size_t i = 0; i < sessions.size() && status.ok(); ++i) {
      run::SessionState& s = *sessions[i]->state_;
      status = s.grow(s.n_tokens + 1, /*in_passes=*/false);
      s.cache.pages().begin_pass();
    }
    // The ladder may have taken scratch away.
    if (status.ok()) status = run::check_room(sessions);
    const run::RunControl control(options);
    if (status.ok()) status = run::batch_pass(sessions, tokens, control);
    if (!status.ok()) {
      for (const Session* session : sessions) session->state_->wait_for_devices();
      for (size_t i = 0; i < sessions.size(); ++i) {
        run::SessionState& s = *sessions[i]->state_;
        s.cache.truncate(s.n_tokens, capacities[i]);  // pages as before
      }
      return status;
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    for (size_t i = 0; i < sessions.size(); ++i) {
      run::SessionState& s = *sessions[i]->state_;
      s.append(tokens.subspan(i, 1));
      s.has_logits = true;
      ++s.times.decode_tokens;
      s.times.decode_seconds += elapsed.count() / static_cast<double>(sessions.size());
    }
    if (run::ExpertCache* copies = run::leader(sessions).model.state()->copies.get())
      copies->after_pass(static_cast<int64_t>(sessions.size()));
    bool go_on = true;
    for (Session* session : sessions)
      if (options.on_step)
        go_on =
            session->state_->report(options.on_step, Phase::kDecode, 1, elapsed.count()) && go_on;
    if (!go_on) return Status(Code::kCallback, "the step callback asked to stop");
    return {};
  });
}

}  // namespace fathom
