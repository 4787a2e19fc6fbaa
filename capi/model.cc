// The C interface: plan, model, tokenizer.
#include <fmt/format.h>

#include "capi/handles.h"

using namespace fathom;        // NOLINT: this file forwards to it, line by line
using namespace fathom::capi;  // NOLINT

// ---- plan ----

int32_t fathom_plan_create(fathom_engine* eng, const char* model_path, const fathom_config* cfg,
                           fathom_plan** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY(check_handle(eng, "eng"));
    FATHOM_TRY_ASSIGN(const std::string_view path, to_text("model_path", model_path));
    Use use;
    if (cfg != nullptr) FATHOM_TRY(use.begin(cfg, "cfg"));
    FATHOM_TRY_ASSIGN(
        Plan plan, eng->engine.plan(std::string(path), cfg ? cfg->config : eng->engine.config()));
    *out = new fathom_plan(eng->engine, std::move(plan));
    return {};
  });
}

int32_t fathom_plan_get_summary(const fathom_plan* plan, fathom_plan_summary* out,
                                fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(plan, "plan"));
    FATHOM_TRY(check_out(out, "out"));
    const Plan& p = plan->plan;
    fathom_plan_summary s{};
    s.feasible = p.feasible;
    s.binding_device = p.feasible ? -1 : p.binding_device;
    s.binding_category = p.feasible ? -1 : static_cast<int32_t>(p.binding_purpose);
    s.bytes_short = static_cast<uint64_t>(p.bytes_short);
    for (const PlanDevice& device : p.devices) {
      s.bytes_peak += static_cast<uint64_t>(device.peak_bytes());
      s.bytes_decode += static_cast<uint64_t>(device.total(Phase::kDecode));
    }
    s.max_tokens = static_cast<uint64_t>(p.max_context);
    s.max_tokens_feasible = static_cast<uint64_t>(p.max_context_feasible);
    s.kv_bytes_per_token = static_cast<uint64_t>(p.kv_bytes_per_token);
    s.prefill_chunk = static_cast<uint64_t>(p.prefill_chunk);
    s.n_devices = static_cast<uint32_t>(p.devices.size());
    s.n_items = s.n_devices * kPhaseCount * kPurposeCount;
    s.n_alternatives = static_cast<uint32_t>(p.alternatives.size());
    to_caller(s, out);
    return {};
  });
}

int32_t fathom_plan_get_item(const fathom_plan* plan, uint32_t index, fathom_plan_item* out,
                             fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(plan, "plan"));
    FATHOM_TRY(check_out(out, "out"));
    constexpr size_t kPerDevice = size_t{kPhaseCount} * kPurposeCount;
    const size_t n = plan->plan.devices.size() * kPerDevice;
    if (index >= n)
      return Status(Code::kInvalidArgument, fmt::format("item {} is not in [0, {})", index, n));
    const PlanDevice& device = plan->plan.devices[index / kPerDevice];
    const size_t phase = index % kPerDevice / kPurposeCount, category = index % kPurposeCount;
    fathom_plan_item item{};
    item.device = static_cast<int32_t>(index / kPerDevice);
    item.category = static_cast<int32_t>(category);
    item.phase = static_cast<int32_t>(phase);
    item.bytes = static_cast<uint64_t>(device.bytes[phase][category]);
    copy_text(device.name, item.device_name);
    to_caller(item, out);
    return {};
  });
}

int32_t fathom_plan_alternative(const fathom_plan* plan, uint32_t index, fathom_plan** out,
                                fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY(check_handle(plan, "plan"));
    const std::vector<PlanAlternative>& all = plan->plan.alternatives;
    if (index >= all.size())
      return Status(Code::kInvalidArgument,
                    fmt::format("alternative {} is not in [0, {})", index, all.size()));
    Config config = plan->plan.config;
    for (const auto& [key, value] : all[index].changes) FATHOM_TRY(config.set(key, value));
    FATHOM_TRY_ASSIGN(Plan changed, plan->engine.plan(plan->plan.model_path, config));
    *out = new fathom_plan(plan->engine, std::move(changed));
    return {};
  });
}

int32_t fathom_plan_json(const fathom_plan* plan, char* buf, uint64_t cap, uint64_t* len,
                         fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(plan, "plan"));
    return give_text(plan->plan.to_json(), buf, cap, len);
  });
}

void fathom_plan_free(fathom_plan* plan) {
  free_handle(plan);
}

// ---- model ----

int32_t fathom_model_load(fathom_engine* eng, const fathom_plan* plan, const fathom_run* run,
                          fathom_model** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY(check_handle(eng, "eng"));
    FATHOM_TRY(check_handle(plan, "plan"));
    if (plan->engine.state() != eng->engine.state())
      return Status(Code::kInvalidArgument, "plan was made by another engine than eng")
          .about("plan");
    FATHOM_TRY_ASSIGN(const RunArguments arguments, to_run(run));
    FATHOM_TRY_ASSIGN(Model model, Model::load(eng->engine, plan->plan, arguments.options));
    *out = new fathom_model(std::move(model));
    return {};
  });
}

int32_t fathom_model_get_info(const fathom_model* model, fathom_model_info* out,
                              fathom_error* err) {
  const auto work = [&]() -> Status {
    FATHOM_TRY(check_handle(model, "model"));
    FATHOM_TRY(check_out(out, "out"));
    const Model& m = model->model;
    const ModelConfig& c = m.config();
    fathom_model_info info{};
    const Tokenizer* tokenizer = m.tokenizer();
    info.bos = tokenizer ? tokenizer->bos() : static_cast<int32_t>(c.bos_token_id);
    info.eos = tokenizer ? tokenizer->eos() : static_cast<int32_t>(c.eos_token_id);
    info.n_layers = static_cast<uint32_t>(c.num_hidden_layers);
    info.n_heads = static_cast<uint32_t>(c.num_attention_heads);
    info.n_experts = static_cast<uint32_t>(c.n_routed_experts);
    info.n_experts_used = static_cast<uint32_t>(c.num_experts_per_tok);
    info.kv_lora_rank = static_cast<uint32_t>(c.kv_lora_rank);
    info.rope_dim = static_cast<uint32_t>(c.qk_rope_head_dim);
    info.n_vocab = static_cast<uint32_t>(c.vocab_size);
    info.n_params = static_cast<uint64_t>(m.n_params());
    info.n_params_active = static_cast<uint64_t>(m.n_params_active());
    info.context_train = static_cast<uint64_t>(c.max_position_embeddings);
    info.bytes_weights = static_cast<uint64_t>(m.weight_bytes());
    info.fingerprint_lo = m.plan().fingerprint_lo;
    info.fingerprint_hi = m.plan().fingerprint_hi;
    copy_text(c.architecture, info.arch);
    copy_text(c.name, info.name);
    to_caller(info, out);
    return {};
  };
  return call(err, work, InCallback::kAllowed);
}

int32_t fathom_model_expert_cache(const fathom_model* model, fathom_expert_cache* out,
                                  fathom_error* err) {
  const auto work = [&]() -> Status {
    FATHOM_TRY(check_handle(model, "model"));
    FATHOM_TRY(check_out(out, "out"));
    const ExpertCacheStats stats = model->model.expert_cache();
    fathom_expert_cache cache{};
    cache.n_experts = static_cast<uint64_t>(stats.n_experts);
    cache.bytes = static_cast<uint64_t>(stats.bytes);
    cache.choices = static_cast<uint64_t>(stats.choices);
    cache.hits = static_cast<uint64_t>(stats.hits);
    cache.copied = static_cast<uint64_t>(stats.copied);
    cache.dropped = static_cast<uint64_t>(stats.dropped);
    to_caller(cache, out);
    return {};
  };
  return call(err, work, InCallback::kAllowed);
}

int32_t fathom_model_metadata(const fathom_model* model, const char* key, char* buf, uint64_t cap,
                              uint64_t* len, fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(model, "model"));
    FATHOM_TRY_ASSIGN(const std::string_view k, to_text("key", key));
    for (const auto& [name, value] : model->model.metadata())
      if (name == k) return give_text(value, buf, cap, len);
    return Status(Code::kNotFound, fmt::format("the model file has no scalar value \"{}\"", k))
        .about(k);
  });
}

void fathom_model_free(fathom_model* model) {
  free_handle(model);
}

// ---- tokenizer ----

int32_t fathom_tokenizer_open(const char* path, fathom_tokenizer** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY_ASSIGN(const std::string_view p, to_text("path", path));
    FATHOM_TRY_ASSIGN(Tokenizer tokenizer, Tokenizer::open(std::string(p)));
    *out = new fathom_tokenizer(std::move(tokenizer));
    return {};
  });
}

int32_t fathom_tokenizer_of(const fathom_model* model, fathom_tokenizer** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY(check_handle(model, "model"));
    const Tokenizer* tokenizer = model->model.tokenizer();
    if (tokenizer == nullptr) return Status(Code::kNotFound, "the model file has no tokenizer");
    *out = new fathom_tokenizer(*tokenizer);
    return {};
  });
}

int32_t fathom_tokenize(const fathom_tokenizer* tok, const char* utf8, uint64_t len, uint32_t flags,
                        fathom_token* ids, uint64_t cap, uint64_t* n, fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(tok, "tok"));
    FATHOM_TRY_ASSIGN(const std::string_view text, to_text("utf8", utf8, len));
    FATHOM_TRY(check_flags(flags, FATHOM_TOK_ADD_BOS | FATHOM_TOK_PARSE_SPECIAL));
    if (n == nullptr) return null_argument("n");
    std::vector<int32_t> tokens;
    FATHOM_TRY(tok->tokenizer.encode(text,
                                     {.add_bos = (flags & FATHOM_TOK_ADD_BOS) != 0,
                                      .parse_special = (flags & FATHOM_TOK_PARSE_SPECIAL) != 0},
                                     tokens));
    return give_array(std::span<const int32_t>(tokens), ids, cap, n);
  });
}

int32_t fathom_detokenize(const fathom_tokenizer* tok, const fathom_token* ids, uint64_t n,
                          uint32_t flags, char* buf, uint64_t cap, uint64_t* len,
                          fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(tok, "tok"));
    FATHOM_TRY_ASSIGN(const auto tokens, to_span("ids", ids, n));
    FATHOM_TRY(check_flags(flags, FATHOM_TOK_SKIP_SPECIAL));
    if (len == nullptr) return null_argument("len");
    std::string text;
    FATHOM_TRY(tok->tokenizer.decode(tokens, (flags & FATHOM_TOK_SKIP_SPECIAL) != 0, text));
    return give_text(text, buf, cap, len);
  });
}

int32_t fathom_chat_prompt(const fathom_tokenizer* tok, const char* const* roles,
                           const char* const* contents, uint64_t n_messages, const char* format,
                           uint32_t flags, fathom_token* ids, uint64_t cap, uint64_t* n,
                           fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(tok, "tok"));
    FATHOM_TRY_ASSIGN(const auto all_roles, to_span("roles", roles, n_messages));
    FATHOM_TRY_ASSIGN(const auto all_contents, to_span("contents", contents, n_messages));
    FATHOM_TRY(check_flags(flags, FATHOM_CHAT_NO_GENERATION_PROMPT));
    if (n == nullptr) return null_argument("n");
    ChatFormat chat = ChatFormat::kNone;
    if (format != nullptr) {
      const std::string_view name = format;
      if (name == "deepseek-v2") chat = ChatFormat::kDeepSeekV2;
      if (name == "deepseek-v3") chat = ChatFormat::kDeepSeekV3;
      if (name == "deepseek-r1") chat = ChatFormat::kDeepSeekR1;
      if (chat == ChatFormat::kNone)
        return Status(Code::kUnsupported,
                      "format must be deepseek-v2, deepseek-v3 or deepseek-r1, or NULL")
            .about("format");
    }
    std::vector<ChatMessage> messages;
    for (size_t i = 0; i < all_roles.size(); ++i) {
      FATHOM_TRY_ASSIGN(const std::string_view role, to_text("roles", all_roles[i]));
      FATHOM_TRY_ASSIGN(const std::string_view content, to_text("contents", all_contents[i]));
      messages.push_back({std::string(role), std::string(content)});
    }
    FATHOM_TRY_ASSIGN(const std::string text,
                      tok->tokenizer.render_chat(
                          messages, (flags & FATHOM_CHAT_NO_GENERATION_PROMPT) == 0, chat));
    std::vector<int32_t> tokens;
    FATHOM_TRY(tok->tokenizer.encode(text, {.add_bos = false, .parse_special = true}, tokens));
    return give_array(std::span<const int32_t>(tokens), ids, cap, n);
  });
}

void fathom_tokenizer_free(fathom_tokenizer* tok) {
  free_handle(tok);
}
