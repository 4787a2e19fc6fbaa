// Session: one growing text on a model, with its own KVCache.
//
//   auto session = Session::create(*model);
//   session->prefill(ids);
//   session->generate({.max_new_tokens = 200}, [](const GeneratedToken& t) { print(t.text); return true; });
//
// One thread at a time; different sessions of a model may run at once.  A failed call leaves the
// session as it was, but for prefill, which keeps whole finished chunks (n_tokens() says where).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/kv_cache.hpp"
#include "fathom/model.hpp"
#include "fathom/sampling.hpp"

namespace fathom {

namespace run {
class SessionState;
}

struct SessionOptions {
  int64_t max_tokens = 0;      // at most the plan's max_context; 0: the plan's
  int64_t reserve_tokens = 0;  // cache taken now
};

struct GenerateOptions {
  int64_t max_new_tokens = -1;  // -1: until a stop
  SamplingOptions sampling = {};
  Sampler* sampler = nullptr;  // used instead of `sampling` when set; its state goes on over calls
  bool stop_at_eos = true;
  std::vector<int32_t> stop_tokens = {};
  // Text at which to stop; it is not handed out, not even in part.  UTF-8.
  std::vector<std::string> stop_strings = {};
  bool skip_special = true;  // special tokens give no text
  RunOptions run = {};
};

enum class StopReason : uint8_t {
  kEos, kStop, kLength, kCallback, kCancelled, kDeadline, kContextFull, kBudget
};
constexpr std::string_view stop_reason_name(StopReason reason) noexcept {
  constexpr std::string_view kNames[] = {"eos",       "stop",     "length",       "callback",
                                         "cancelled", "deadline", "context_full", "budget"};
  return kNames[static_cast<int>(reason)];
}

struct GeneratedToken {
  int32_t id;             // the last call of a generation may repeat the last id, to hand out text
                          // that was held back as the possible beginning of a stop string
  std::string_view text;  // UTF-8 that became complete with this token; may be empty
  int64_t position;       // of the token in the session
};
// Returning false stops cleanly (kCallback).
using TokenFunction = std::function<bool(const GeneratedToken&)>;

struct GenerateResult {
  StopReason reason = StopReason::kLength;
  std::vector<int32_t> tokens;  // new tokens, a stop token included
  std::string text;             // what was handed out
  // For kContextFull and kBudget: the status that ended it, with bytes and remedies.
  Status status;
};

struct SessionTimes {
  int64_t prefill_tokens = 0, decode_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
};

class Session {
 public:
  // Takes activations and workspace for the plan's chunk.  Errors: kBudget, kMemory,
  // kInvalidArgument (max_tokens beyond the plan).
  static Result<Session> create(const Model& model, const SessionOptions& options = {});
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  // Appends tokens, in chunks.  Afterwards logits() are those of the last one.  Errors:
  // kInvalidArgument (id out of range: index, id, bound; empty), kContextFull, kBudget, kMemory,
  // kCancelled (finished chunks are kept), kCallback, kDevice.
  Status prefill(std::span<const int32_t> tokens, const RunOptions& options = {});
  // Appends one token.  Same errors; all or nothing.
  Status step(int32_t token);
  // Samples from logits() and appends, until a stop; afterwards the session is as if the prompt
  // and all of result.tokens had been prefilled, so that calling again goes on seamlessly.  Needs
  // logits (kState before any prefill).  The end of the context or of a budget is a reason, not an
  // error, and is met before a token is sampled that could not be appended.
  Result<GenerateResult> generate(const GenerateOptions& options, const TokenFunction& on_token = {});

  // Logits of the last token [vocab_size]; empty before the first prefill and after truncate.
  // Valid until the next call that changes the session.
  std::span<const float> logits() const noexcept;
  std::span<const int32_t> tokens() const noexcept;  // all tokens held, in order
  int64_t n_tokens() const noexcept;
  int64_t max_tokens() const noexcept;

  // Forgets tokens from `n_tokens` on; the memory of free pages goes back to the system.
  // Errors: kInvalidArgument beyond n_tokens().
  Status truncate(int64_t n_tokens);
  // Takes cache memory for `n_tokens` tokens in all now.  Errors: kContextFull, kBudget, kMemory.
  Status reserve(int64_t n_tokens);

  const KVCache& cache() const noexcept;
  const Model& model() const noexcept;
  const SessionTimes& times() const noexcept;
  const std::vector<Event>& events() const noexcept;

  explicit Session(std::unique_ptr<run::SessionState>) noexcept;
  run::SessionState& state() noexcept { return *state_; }

 private:
  std::unique_ptr<run::SessionState> state_;
};

}  // namespace fathom
