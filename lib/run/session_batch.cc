// Session::step_batch: one pass over the next tokens of several texts.  Products with weights take
// all rows at once; each row has its own position and attends to its own cache.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>

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

// Logits of row i into the buffer of session i.  The leader's own buffer takes kLogitRows rows at a
// time; the first ones come last, so that row 0 stays.
Status batch_logits(const nn::ForwardParams& params, Sessions sessions) {
  const auto n = static_cast<int64_t>(sessions.size());
  const int64_t vocab = params.config.vocab_size;
  SessionState& first = leader(sessions);
  for (int64_t row = (n - 1) / nn::kLogitRows * nn::kLogitRows; row >= 0; row -= nn::kLogitRows) {
    const int64_t count = std::min(nn::kLogitRows, n - row);
    FATHOM_TRY(first.compute_logits(params, row, count));
    for (int64_t i = 0; i < count; ++i)
      if (row + i > 0)
        std::copy_n(first.logits + i * vocab, vocab,
                    sessions[static_cast<size_t>(row + i)]->state().logits);
  }
  return {};
}

Status batch_pass(Sessions sessions, std::span<const int32_t> tokens, const RunControl& control) {
  std::vector<nn::Sequence> sequences;
  for (const Session* session : sessions) {
    const SessionState& s = const_cast<Session*>(session)->state();
    sequences.push_back({&s, static_cast<int64_t>(sequences.size()), 1, s.n_tokens});
  }
  SessionState& first = leader(sessions);
  const nn::ForwardParams params{.config = first.model.config(),
                                 .rope = first.model.state()->rope,
                                 .weights = *first.model.state()->weights,
                                 .placement = first.model.plan().placement,
                                 .stages = first.stages,
                                 .staging = first.staging.data(),
                                 .tokens = tokens,
                                 .sequences = sequences,
                                 .form = AttentionForm::kAbsorbed,
                                 .cancelled = RunControl::cancelled,
                                 .cancelled_arg = const_cast<RunControl*>(&control),
                                 .trace = nullptr,
                                 .copies = first.model.state()->copies.get()};
  FATHOM_TRY(first.run_pass(params));
  for (Session* session : sessions) session->state().has_logits = false;  // being overwritten
  return batch_logits(params, sessions);
}

}  // namespace
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
