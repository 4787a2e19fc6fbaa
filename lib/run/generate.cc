// Generation: sample, hand out, append, until a stop.
#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "fathom/session.hpp"
#include "session_state.h"
#include "stop_matcher.h"

namespace fathom {
namespace {

class Generation {
 public:
  Generation(Session& session, const GenerateOptions& options, Sampler& sampler,
             const TokenFunction& on_token)
      : session_(session),
        options_(options),
        sampler_(sampler),
        on_token_(on_token),
        control_(options.run),
        matcher_(options.stop_strings) {
    if (const Tokenizer* tokenizer = session.model().tokenizer())
      decoder_.emplace(*tokenizer, options.skip_special);
  }

  Result<GenerateResult> run() {
    run::SessionState& state = session_.state();
    state.bring_likeliest(sampler_.n_deciding());
    Result<bool> more = true;
    while (more.ok() && *more) more = next();
    state.likeliest.clear();
    FATHOM_TRY(more.status().clone());
    FATHOM_TRY(state.bring_logits());
    return std::move(result_);
  }

 private:
  // One token; false when the result is complete.
  Result<bool> next() {
    const auto count = static_cast<int64_t>(result_.tokens.size());
    if (options_.max_new_tokens >= 0 && count >= options_.max_new_tokens)
      return end(StopReason::kLength);
    if (options_.run.cancel && options_.run.cancel->requested()) return end(StopReason::kCancelled);
    if (control_.past_deadline()) return end(StopReason::kDeadline);
    // Room first: no token is sampled that could not be appended.
    if (Status room = session_.reserve(session_.n_tokens() + 1); !room.ok())
      return end_of_memory(std::move(room));

    FATHOM_TRY_ASSIGN(const int32_t token, pick());
    const double before = session_.times().decode_seconds;
    if (Status s = session_.step(token); !s.ok()) {
      if (s.code() == Code::kBudget || s.code() == Code::kMemory || s.code() == Code::kContextFull)
        return end_of_memory(std::move(s));
      return s;
    }
    result_.tokens.push_back(token);
    const bool eos = options_.stop_at_eos && token == eos_id();
    const bool stop = std::find(options_.stop_tokens.begin(), options_.stop_tokens.end(), token) !=
                      options_.stop_tokens.end();
    std::string text;
    bool matched = false;
    // Rows that only pad the vocabulary have no text.
    const bool has_text = decoder_ && token < session_.model().tokenizer()->n_tokens();
    if (has_text && !eos && !stop) {
      std::string decoded;
      FATHOM_TRY(decoder_->push(token, decoded));
      matched = matcher_.push(decoded, text);
    }
    if (eos || stop) finish_text(text);
    if (!hand_out(token, text)) return end(StopReason::kCallback);
    if (options_.run.on_step && !session_.state().report(options_.run.on_step, Phase::kDecode, 1,
                                                         session_.times().decode_seconds - before))
      return end(StopReason::kCallback);
    if (options_.run.progress &&
        !options_.run.progress(ProgressPhase::kGenerate, count + 1, options_.max_new_tokens))
      return end(StopReason::kCancelled);
    if (eos) return end(StopReason::kEos);
    if (stop || matched) return end(StopReason::kStop);
    return true;
  }

  Result<int32_t> pick() {
    const run::SessionState& state = session_.state();
    if (!state.has_likeliest) return sampler_.pick(session_.logits(), session_.tokens());
    return sampler_.pick_from(std::span(state.likeliest).first(state.likeliest.size() - 1),
                              session_.model().config().vocab_size, state.likeliest.back());
  }

  bool hand_out(int32_t token, const std::string& text) {
    result_.text += text;
    return !on_token_ || on_token_({token, text, session_.n_tokens() - 1});
  }

  // What decoder and matcher still hold belongs to the text unless a stop string was found.
  void finish_text(std::string& text) {
    if (!decoder_) return;
    std::string rest;
    decoder_->finish(rest);
    matcher_.push(rest, text);
    matcher_.finish(text);
  }

  bool end(StopReason reason) {
    result_.reason = reason;
    if (reason == StopReason::kLength || reason == StopReason::kContextFull ||
        reason == StopReason::kBudget) {
      // The text simply ends here: what was held back as the possible beginning of a stop is text.
      std::string text;
      finish_text(text);
      if (!text.empty() && !result_.tokens.empty()) hand_out(result_.tokens.back(), text);
    }
    return false;
  }

  bool end_of_memory(Status why) {
    const bool context = why.code() == Code::kContextFull;
    result_.status = std::move(why);
    return end(context ? StopReason::kContextFull : StopReason::kBudget);
  }

  int32_t eos_id() const {
    if (const Tokenizer* tokenizer = session_.model().tokenizer())
      if (tokenizer->eos() >= 0) return tokenizer->eos();
    return static_cast<int32_t>(session_.model().config().eos_token_id);
  }

  Session& session_;
  const GenerateOptions& options_;
  Sampler& sampler_;
  const TokenFunction& on_token_;
  run::RunControl control_;
  run::StopMatcher matcher_;
  std::optional<StreamDecoder> decoder_;
  GenerateResult result_;
};

}  // namespace

Result<GenerateResult> Session::generate(const GenerateOptions& options,
                                         const TokenFunction& on_token) {
  return run::guarded([&]() -> Result<GenerateResult> {
    if (logits().empty())
      return Status(Code::kState, "generate needs logits: prefill or step first");
    const int64_t vocab = model().config().vocab_size;
    for (int32_t id : options.stop_tokens)
      if (id < 0 || id >= vocab)
        return Status(Code::kInvalidArgument,
                      fmt::format("stop token {} is not in [0, {})", id, vocab));
    if (options.sampler) return Generation(*this, options, *options.sampler, on_token).run();
    FATHOM_TRY_ASSIGN(Sampler sampler, Sampler::create(options.sampling));
    return Generation(*this, options, sampler, on_token).run();
  });
}

}  // namespace fathom
