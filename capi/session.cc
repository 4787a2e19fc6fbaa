// The C interface: sampler and session.
#include <fmt/format.h>

#include <deque>
#include <vector>

#include "capi/handles.h"

using namespace fathom;        // NOLINT: this file forwards to it, line by line
using namespace fathom::capi;  // NOLINT

namespace {

Status logits_of(const fathom_session* s, std::span<const float>& logits) {
  logits = s->session.logits();
  if (logits.empty()) return Status(Code::kState, "there are no logits: prefill or step first");
  return {};
}

Result<GenerateOptions> to_generate(const fathom_generate_params& p) {
  GenerateOptions options;
  FATHOM_TRY(check_flags(p.flags, FATHOM_GENERATE_IGNORE_EOS | FATHOM_GENERATE_SHOW_SPECIAL));
  options.stop_at_eos = (p.flags & FATHOM_GENERATE_IGNORE_EOS) == 0;
  options.skip_special = (p.flags & FATHOM_GENERATE_SHOW_SPECIAL) == 0;
  if (p.max_new_tokens != 0 && p.max_new_tokens != FATHOM_ALL) {
    FATHOM_TRY_ASSIGN(options.max_new_tokens, to_int64("max_new_tokens", p.max_new_tokens));
  }
  FATHOM_TRY_ASSIGN(const auto ids, to_span("stop_ids", p.stop_ids, p.n_stop_ids));
  options.stop_tokens.assign(ids.begin(), ids.end());
  FATHOM_TRY_ASSIGN(const auto strings, to_span("stop_strings", p.stop_strings, p.n_stop_strings));
  for (const char* string : strings) {
    FATHOM_TRY_ASSIGN(const std::string_view text, to_text("stop_strings", string));
    options.stop_strings.emplace_back(text);
  }
  return options;
}

}  // namespace

// ---- sampler ----

int32_t fathom_sampler_create(const fathom_sampler_params* params, fathom_sampler** out,
                              fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY_ASSIGN(const SamplingOptions options, to_sampling(params));
    FATHOM_TRY_ASSIGN(Sampler sampler, Sampler::create(options));
    *out = new fathom_sampler(std::move(sampler));
    return {};
  });
}

int32_t fathom_sampler_pick(fathom_sampler* s, const float* logits, uint64_t n_vocab,
                            const fathom_token* history, uint64_t n_history, fathom_token* out,
                            fathom_error* err) {
  return call(err, [&]() -> Status {
    Use use;
    FATHOM_TRY(use.begin(s, "s"));
    if (logits == nullptr) return null_argument("logits");
    if (out == nullptr) return null_argument("out");
    FATHOM_TRY_ASSIGN(const auto all_logits, to_span("logits", logits, n_vocab));
    FATHOM_TRY_ASSIGN(const auto text, to_span("history", history, n_history));
    FATHOM_TRY_ASSIGN(*out, s->sampler.pick(all_logits, text));
    return {};
  });
}

int32_t fathom_sampler_reset(fathom_sampler* s, uint64_t seed, fathom_error* err) {
  return call(err, [&]() -> Status {
    Use use;
    FATHOM_TRY(use.begin(s, "s"));
    s->sampler.reset(seed);
    return {};
  });
}

void fathom_sampler_free(fathom_sampler* s) {
  free_handle(s);
}

// ---- session ----

int32_t fathom_session_create(fathom_model* model, const fathom_session_params* params,
                              fathom_session** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY(check_handle(model, "model"));
    FATHOM_TRY_ASSIGN(const SessionOptions options, to_session(params));
    FATHOM_TRY_ASSIGN(Session session, Session::create(model->model, options));
    *out = new fathom_session(std::move(session));
    return {};
  });
}

int32_t fathom_session_get_info(const fathom_session* s, fathom_session_info* out,
                                fathom_error* err) {
  const auto work = [&]() -> Status {
    FATHOM_TRY(check_out(out, "out"));
    const Session& session = s->session;
    const SessionTimes& times = session.times();
    fathom_session_info info{};
    info.has_logits = !session.logits().empty();
    info.n_tokens = static_cast<uint64_t>(session.n_tokens());
    info.capacity_tokens = static_cast<uint64_t>(session.cache().capacity_tokens());
    info.max_tokens = static_cast<uint64_t>(session.max_tokens());
    info.bytes_kv = static_cast<uint64_t>(session.cache().size_bytes());
    info.kv_bytes_per_token = static_cast<uint64_t>(session.model().plan().kv_bytes_per_token);
    info.n_prefilled = static_cast<uint64_t>(times.prefill_tokens);
    info.n_decoded = static_cast<uint64_t>(times.decode_tokens);
    info.prefill_ms = times.prefill_seconds * 1e3;
    info.decode_ms = times.decode_seconds * 1e3;
    to_caller(info, out);
    return {};
  };
  return session_call(err, s, work, InCallback::kAllowed);
}

int32_t fathom_session_reserve(fathom_session* s, uint64_t n_tokens, fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    FATHOM_TRY_ASSIGN(const int64_t n, to_int64("n_tokens", n_tokens));
    return s->session.reserve(n);
  });
}

int32_t fathom_session_prefill(fathom_session* s, const fathom_token* ids, uint64_t n,
                               const fathom_run* run, fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    if (ids == nullptr) return null_argument("ids");
    FATHOM_TRY_ASSIGN(const auto tokens, to_span("ids", ids, n));
    FATHOM_TRY_ASSIGN(const RunArguments arguments, to_run(run));
    return s->session.prefill(tokens, arguments.options);
  });
}

int32_t fathom_session_step(fathom_session* s, fathom_token id, fathom_error* err) {
  return session_call(err, s, [&] { return s->session.step(id); });
}

int32_t fathom_model_replan(fathom_model* model, const fathom_config* cfg, fathom_session* const* s,
                            uint64_t n, const fathom_run* run, fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(model, "model"));
    if (s == nullptr && n > 0) return null_argument("s");
    FATHOM_TRY_ASSIGN(const auto handles, to_span("s", s, n));
    FATHOM_TRY_ASSIGN(const RunArguments arguments, to_run(run));
    Use config_use;
    if (cfg != nullptr) FATHOM_TRY(config_use.begin(cfg, "cfg"));
    std::deque<Use> uses;  // a Use stays where it is
    std::vector<Session*> sessions;
    for (fathom_session* handle : handles) {
      FATHOM_TRY(uses.emplace_back().begin(handle, "s", Use::Poisoned::kTaken));
      sessions.push_back(&handle->session);
    }
    FATHOM_TRY(model->model.replan(sessions, cfg ? cfg->config : model->model.plan().config,
                                   arguments.options));
    for (fathom_session* handle : handles) handle->poisoned.store(false, std::memory_order_relaxed);
    return {};
  });
}

int32_t fathom_session_step_batch(fathom_session* const* s, const fathom_token* ids, uint64_t n,
                                  const fathom_run* run, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (s == nullptr) return null_argument("s");
    if (ids == nullptr) return null_argument("ids");
    FATHOM_TRY_ASSIGN(const auto handles, to_span("s", s, n));
    FATHOM_TRY_ASSIGN(const auto tokens, to_span("ids", ids, n));
    FATHOM_TRY_ASSIGN(const RunArguments arguments, to_run(run));
    std::deque<Use> uses;  // a Use stays where it is
    std::vector<Session*> sessions;
    for (fathom_session* handle : handles) {
      FATHOM_TRY(uses.emplace_back().begin(handle, "s"));
      sessions.push_back(&handle->session);
    }
    Status status = Session::step_batch(sessions, tokens, arguments.options);
    if (status.code() == Code::kDevice)
      for (fathom_session* handle : handles)
        handle->poisoned.store(true, std::memory_order_relaxed);
    return status;
  });
}

int32_t fathom_session_generate(fathom_session* s, fathom_sampler* smp,
                                const fathom_generate_params* params, const fathom_run* run,
                                fathom_generate_result* out, fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    if (out != nullptr) FATHOM_TRY(check_out(out, "out"));
    FATHOM_TRY_ASSIGN(const fathom_generate_params p, from_caller(params, "params"));
    FATHOM_TRY_ASSIGN(GenerateOptions options, to_generate(p));
    FATHOM_TRY_ASSIGN(RunArguments arguments, to_run(run));
    options.run = arguments.options;
    Use use;
    if (smp != nullptr) {
      FATHOM_TRY(use.begin(smp, "smp"));
      options.sampler = &smp->sampler;
    }
    TokenFunction on_token;
    if (p.on_token != nullptr)
      on_token = [&p](const GeneratedToken& t) {
        return host_callback(false, [&] {
          return p.on_token(p.user, t.id, t.text.data(), t.text.size(),
                            static_cast<uint64_t>(t.position)) == 0;
        });
      };
    FATHOM_TRY_ASSIGN(const GenerateResult result, s->session.generate(options, on_token));
    fathom_generate_result r{};
    r.stop_reason = static_cast<int32_t>(result.reason);
    r.end_code = static_cast<int32_t>(result.status.code());
    r.n_new_tokens = result.tokens.size();
    r.bytes_needed = static_cast<uint64_t>(result.status.bytes_needed());
    r.bytes_available = static_cast<uint64_t>(result.status.bytes_available());
    if (out != nullptr) to_caller(r, out);
    return {};
  });
}

int32_t fathom_session_logits(fathom_session* s, float* dst, uint64_t cap, uint64_t* n,
                              fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    std::span<const float> logits;
    FATHOM_TRY(logits_of(s, logits));
    return give_array(logits, dst, cap, n);
  });
}

int32_t fathom_session_logits_view(const fathom_session* s, const float** out, uint64_t* n,
                                   fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    if (n == nullptr) return null_argument("n");
    *out = nullptr;
    *n = 0;
    std::span<const float> logits;
    FATHOM_TRY(logits_of(s, logits));
    *out = logits.data();
    *n = logits.size();
    return {};
  });
}

int32_t fathom_session_tokens(const fathom_session* s, uint64_t from, fathom_token* ids,
                              uint64_t cap, uint64_t* n, fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    const std::span<const int32_t> tokens = s->session.tokens();
    if (from > tokens.size()) return bad_count("from", from, tokens.size());
    return give_array(tokens.subspan(static_cast<size_t>(from)), ids, cap, n);
  });
}

int32_t fathom_session_truncate(fathom_session* s, uint64_t keep_first, fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    FATHOM_TRY_ASSIGN(const int64_t n, to_int64("keep_first", keep_first));
    return s->session.truncate(n);
  });
}

int32_t fathom_session_trim(fathom_session* s, uint64_t* freed_bytes, fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    const int64_t before = s->session.cache().size_bytes();
    FATHOM_TRY(s->session.truncate(s->session.n_tokens()));
    if (freed_bytes != nullptr)
      *freed_bytes = static_cast<uint64_t>(before - s->session.cache().size_bytes());
    return {};
  });
}

void fathom_session_free(fathom_session* s) {
  free_handle(s);
}
