// Session: one growing text on a model, with its own KVCache.
//
//   auto session = Session::create(*model);
//   session->prefill(ids);
//   session->generate({.max_new_tokens = 200}, [](const GeneratedToken& t) {
//     print(t.text);
//     return true;
//   });
//
// A session can be saved and restored, in another process and on other devices too:
//
//   session->save("chat.session");
//   auto again = Session::restore(*model, "chat.session");      // continues with the same bits
//
// One thread at a time; different sessions of a model may run at once.  A failed call leaves the
// session as it was, but for prefill, which keeps whole finished chunks (n_tokens() says where).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
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
  // clang-format off
  kEos, kStop, kLength, kCallback, kCancelled, kDeadline, kContextFull, kBudget
  // clang-format on
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

// Where one budget ends for one session.
struct BudgetForecast {
  std::string budget;  // "cpu", "cuda:0"; "host": the sum of the devices whose memory is the host's
  int device = -1;     // -1: the host's sum
  int64_t budget_bytes = 0, bytes_now = 0;
  // The most tokens that this session can hold under it as things stand: it grows token by token,
  // nobody else takes or gives back memory, and no step of kv.ladder is taken.
  int64_t n_tokens_end = 0;
  // The step of the ladder that is taken then.  None: the session is full, or its context ends
  // first.
  std::optional<LadderStep> then = std::nullopt;
  std::string text = {};  // the same for people
};

struct Forecast {
  int64_t n_tokens = 0, max_tokens = 0;
  int64_t n_tokens_end = 0;             // the least of max_tokens and of all budgets
  std::vector<BudgetForecast> budgets;  // of each device, then "host"
};

// Storage of the host's own.  A write function takes the next bytes of a saved session, a read
// function fills `out` from byte `offset` of one; offsets rise without gaps.  At most 64 KiB at a
// time.  What either returns as an error is what save_to or restore_from returns.
using WriteFunction = std::function<Status(std::span<const std::byte> bytes)>;
using ReadFunction = std::function<Status(int64_t offset, std::span<std::byte> out)>;

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
  // Appends tokens[i] to sessions[i], in one pass that reads the weights once for all: several
  // texts of one model, each at its own position.  Afterwards each has its logits.  All or nothing.
  // Bits: those of single steps, when all weights are quantised to integers, or f32 for up to 64
  // sessions; other weights give the same up to rounding of f32 sums beyond 4.
  // The pass runs in the buffers of sessions[0], on the calling thread; no other thread may use any
  // of the sessions meanwhile.  Errors: kInvalidArgument (no sessions, counts that differ, null or
  // one twice, more than the plan's chunk, an id out of range), kMismatch (another model),
  // kContextFull (naming the session), kBudget, kMemory, kCancelled, kDevice.
  static Status step_batch(std::span<Session* const> sessions, std::span<const int32_t> tokens,
                           const RunOptions& options = {});
  // Samples from logits() and appends, until a stop; afterwards the session is as if the prompt
  // and all of result.tokens had been prefilled, so that calling again goes on seamlessly.  Needs
  // logits (kState before any prefill).  The end of the context or of a budget is a reason, not an
  // error, and is met before a token is sampled that could not be appended.
  Result<GenerateResult> generate(const GenerateOptions& options,
                                  const TokenFunction& on_token = {});

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

  // Where the budgets end: growing further is what reserve() would refuse, without taking anything.
  // Exact for growth token by token; a prefill pass that rewrites pages as they leave the window of
  // kv.recent_16bit needs up to a pass more.  Cost: a pass over the table of pages.
  Forecast forecast() const;

  // Writes the session to one file: tokens, logits, and the cache's rows in the types they have.
  // Cost: one pass over the rows in use; 64 KiB of memory.  Progress (kSave, bytes) and
  // cancellation as in `options`; chunk and on_logits have no meaning here.
  //
  // The file is written beside its place, synced and renamed: at every moment `path` is the old
  // file or the whole new one, and on any error the old one.  What a killed save to the same path
  // left beside it is removed.  Readable by this user alone: it holds the text.  Two savers at once
  // each write a whole file; the later rename stays.  Errors: kInvalidArgument (a symbolic link,
  // folder or device stands there), kNotFound (no such folder), kIo with errno, kCancelled,
  // kDevice.
  Status save(const std::string& path, const RunOptions& options = {}) const;
  // The same bytes to a function of the host.
  Status save_to(const WriteFunction& write, const RunOptions& options = {}) const;

  // A new session that goes on where the saved one was, with the same bits.  Threads, devices, page
  // size and context limit may be others; times and events start anew.  A sampler's state is not
  // part of a session.
  //
  // A file is believed in nothing: a bad one gives an error and leaves nothing behind.  Errors:
  // kNotFound, kIo; kFormat (offset and field), kChecksum (a damaged byte), kVersion (saved by a
  // newer library); kMismatch (another model file, layer count, kv.type: the message names both);
  // kContextFull (more tokens than options.max_tokens); kBudget, kMemory; kCancelled.
  static Result<Session> restore(const Model& model, const std::string& path,
                                 const SessionOptions& options = {}, const RunOptions& run = {});
  static Result<Session> restore_from(const Model& model, const ReadFunction& read,
                                      int64_t size_bytes, const SessionOptions& options = {},
                                      const RunOptions& run = {});

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
