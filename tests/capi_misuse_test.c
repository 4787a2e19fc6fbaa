/* Misuse of the C interface gets a code: NULL for every pointer in turn, sizes of structs, tokens
 * and counts out of range, calls inside callbacks, handles inherited over fork().  C99. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

#include "capi_support.h"

static fathom_error error_storage;
static fathom_error* const err = &error_storage;

/* The call names the argument that is NULL. */
#define CHECK_NULL(argument, call)                                                   \
  do {                                                                               \
    EXPECT_CODE(FATHOM_E_ARGUMENT, call);                                            \
    EXPECT(strcmp(err->key, argument) == 0 && strstr(err->message, "NULL") != NULL); \
  } while (0)

static void test_null(const Fixture* f) {
  fathom_config* config = NULL;
  fathom_sampler* sampler = NULL;
  fathom_plan* plan;
  fathom_model* model;
  fathom_session* session;
  fathom_tokenizer* tokenizer;
  fathom_plan_summary summary = {.struct_size = sizeof summary};
  fathom_plan_item item = {.struct_size = sizeof item};
  fathom_model_info model_info = {.struct_size = sizeof model_info};
  fathom_session_info session_info = {.struct_size = sizeof session_info};
  fathom_device_info device_info = {.struct_size = sizeof device_info};
  fathom_memory_item items[8] = {{.struct_size = sizeof items[0]}};
  fathom_generate_params params = {.struct_size = sizeof params, .max_new_tokens = 1};
  fathom_token ids[8] = {2, 3, 4, 5, 6, 7, 8, 9};
  const char *roles[] = {"user"}, *contents[] = {"Hi"}, *holes[] = {NULL};
  const float* view;
  float logits[4] = {1, 2, 3, 4};
  char buf[4096];
  uint64_t len;
  uint32_t count;
  fathom_token id;
  fathom_engine* engine = NULL;

  CHECK_NULL("len", fathom_capabilities_json(buf, sizeof buf, NULL, err));
  CHECK_NULL("buf", fathom_capabilities_json(NULL, 4, &len, err));

  CHECK_NULL("out", fathom_config_create(NULL, err));
  EXPECT_OK(fathom_config_create(&config, err));
  CHECK_NULL("cfg", fathom_config_set(NULL, "threads", "1", err));
  CHECK_NULL("key", fathom_config_set(config, NULL, "1", err));
  CHECK_NULL("value", fathom_config_set(config, "threads", NULL, err));
  CHECK_NULL("cfg", fathom_config_merge_json(NULL, "{}", FATHOM_NTS, err));
  CHECK_NULL("json", fathom_config_merge_json(config, NULL, FATHOM_NTS, err));
  CHECK_NULL("json", fathom_config_merge_json(config, NULL, 0, err));
  CHECK_NULL("cfg", fathom_config_get(NULL, "threads", buf, sizeof buf, &len, err));
  CHECK_NULL("key", fathom_config_get(config, NULL, buf, sizeof buf, &len, err));
  CHECK_NULL("buf", fathom_config_get(config, "threads", NULL, 1, &len, err));
  CHECK_NULL("len", fathom_config_get(config, "threads", buf, sizeof buf, NULL, err));
  CHECK_NULL("len", fathom_config_schema_json(buf, sizeof buf, NULL, err));
  CHECK_NULL("buf", fathom_config_schema_json(NULL, 1, &len, err));

  CHECK_NULL("out", fathom_engine_create(config, NULL, NULL, err));
  CHECK_NULL("machine_json", fathom_engine_simulate(NULL, FATHOM_NTS, config, NULL, &engine, err));
  CHECK_NULL("out", fathom_engine_simulate("{}", FATHOM_NTS, config, NULL, NULL, err));
  CHECK_NULL("eng", fathom_engine_device(NULL, 0, &device_info, &count, err));
  CHECK_NULL("info", fathom_engine_device(f->engine, 0, NULL, NULL, err));
  CHECK_NULL("eng", fathom_engine_set_budget(NULL, 0, 1, err));
  CHECK_NULL("eng", fathom_engine_set_host_budget(NULL, 1, err));
  CHECK_NULL("eng", fathom_engine_machine_json(NULL, buf, sizeof buf, &len, err));
  CHECK_NULL("out", fathom_cancel_create(NULL, err));

  CHECK_NULL("eng", fathom_plan_create(NULL, FATHOM_EXAMPLE_MODEL, NULL, &plan, err));
  EXPECT(plan == NULL);
  CHECK_NULL("model_path", fathom_plan_create(f->engine, NULL, NULL, &plan, err));
  CHECK_NULL("out", fathom_plan_create(f->engine, FATHOM_EXAMPLE_MODEL, NULL, NULL, err));
  CHECK_NULL("plan", fathom_plan_get_summary(NULL, &summary, err));
  CHECK_NULL("out", fathom_plan_get_summary(f->plan, NULL, err));
  CHECK_NULL("plan", fathom_plan_get_item(NULL, 0, &item, err));
  CHECK_NULL("out", fathom_plan_get_item(f->plan, 0, NULL, err));
  CHECK_NULL("plan", fathom_plan_alternative(NULL, 0, &plan, err));
  CHECK_NULL("out", fathom_plan_alternative(f->plan, 0, NULL, err));
  CHECK_NULL("plan", fathom_plan_json(NULL, buf, sizeof buf, &len, err));
  CHECK_NULL("buf", fathom_plan_json(f->plan, NULL, 1, &len, err));
  CHECK_NULL("len", fathom_plan_json(f->plan, NULL, 0, NULL, err));

  model = (fathom_model*)buf;
  CHECK_NULL("eng", fathom_model_load(NULL, f->plan, NULL, &model, err));
  EXPECT(model == NULL);
  CHECK_NULL("plan", fathom_model_load(f->engine, NULL, NULL, &model, err));
  CHECK_NULL("out", fathom_model_load(f->engine, f->plan, NULL, NULL, err));
  CHECK_NULL("model", fathom_model_get_info(NULL, &model_info, err));
  CHECK_NULL("out", fathom_model_get_info(f->model, NULL, err));
  CHECK_NULL("model", fathom_model_metadata(NULL, "k", buf, sizeof buf, &len, err));
  CHECK_NULL("key", fathom_model_metadata(f->model, NULL, buf, sizeof buf, &len, err));
  CHECK_NULL("buf", fathom_model_metadata(f->model, "general.architecture", NULL, 1, &len, err));
  CHECK_NULL("len", fathom_model_metadata(f->model, "general.architecture", buf, 99, NULL, err));

  tokenizer = (fathom_tokenizer*)buf;
  CHECK_NULL("path", fathom_tokenizer_open(NULL, &tokenizer, err));
  EXPECT(tokenizer == NULL);
  CHECK_NULL("out", fathom_tokenizer_open(FATHOM_EXAMPLE_MODEL, NULL, err));
  CHECK_NULL("model", fathom_tokenizer_of(NULL, &tokenizer, err));
  CHECK_NULL("out", fathom_tokenizer_of(f->model, NULL, err));
  CHECK_NULL("tok", fathom_tokenize(NULL, "a", 1, 0, ids, 8, &len, err));
  CHECK_NULL("utf8", fathom_tokenize(f->tokenizer, NULL, 1, 0, ids, 8, &len, err));
  CHECK_NULL("buf", fathom_tokenize(f->tokenizer, "a", 1, 0, NULL, 8, &len, err));
  CHECK_NULL("n", fathom_tokenize(f->tokenizer, "a", 1, 0, ids, 8, NULL, err));
  CHECK_NULL("tok", fathom_detokenize(NULL, ids, 8, 0, buf, sizeof buf, &len, err));
  CHECK_NULL("ids", fathom_detokenize(f->tokenizer, NULL, 8, 0, buf, sizeof buf, &len, err));
  CHECK_NULL("buf", fathom_detokenize(f->tokenizer, ids, 8, 0, NULL, 1, &len, err));
  CHECK_NULL("len", fathom_detokenize(f->tokenizer, ids, 8, 0, buf, sizeof buf, NULL, err));
  CHECK_NULL("tok", fathom_chat_prompt(NULL, roles, contents, 1, NULL, 0, ids, 8, &len, err));
  CHECK_NULL("roles",
             fathom_chat_prompt(f->tokenizer, NULL, contents, 1, NULL, 0, ids, 8, &len, err));
  CHECK_NULL("roles",
             fathom_chat_prompt(f->tokenizer, holes, contents, 1, NULL, 0, ids, 8, &len, err));
  CHECK_NULL("contents",
             fathom_chat_prompt(f->tokenizer, roles, NULL, 1, NULL, 0, ids, 8, &len, err));
  CHECK_NULL("contents",
             fathom_chat_prompt(f->tokenizer, roles, holes, 1, NULL, 0, ids, 8, &len, err));
  CHECK_NULL("buf", fathom_chat_prompt(f->tokenizer, roles, contents, 1, "deepseek-v2", 0, NULL, 8,
                                       &len, err));
  CHECK_NULL("n", fathom_chat_prompt(f->tokenizer, roles, contents, 1, "deepseek-v2", 0, ids, 8,
                                     NULL, err));

  CHECK_NULL("out", fathom_sampler_create(NULL, NULL, err));
  EXPECT_OK(fathom_sampler_create(NULL, &sampler, err));
  CHECK_NULL("s", fathom_sampler_pick(NULL, logits, 4, NULL, 0, &id, err));
  CHECK_NULL("logits", fathom_sampler_pick(sampler, NULL, 4, NULL, 0, &id, err));
  CHECK_NULL("logits", fathom_sampler_pick(sampler, NULL, 0, NULL, 0, &id, err));
  CHECK_NULL("history", fathom_sampler_pick(sampler, logits, 4, NULL, 1, &id, err));
  CHECK_NULL("out", fathom_sampler_pick(sampler, logits, 4, NULL, 0, NULL, err));
  CHECK_NULL("s", fathom_sampler_reset(NULL, 0, err));

  session = (fathom_session*)buf;
  CHECK_NULL("model", fathom_session_create(NULL, NULL, &session, err));
  EXPECT(session == NULL);
  CHECK_NULL("out", fathom_session_create(f->model, NULL, NULL, err));
  CHECK_NULL("s", fathom_session_get_info(NULL, &session_info, err));
  CHECK_NULL("out", fathom_session_get_info(f->session, NULL, err));
  CHECK_NULL("s", fathom_session_reserve(NULL, 1, err));
  CHECK_NULL("s", fathom_session_prefill(NULL, ids, 8, NULL, err));
  CHECK_NULL("ids", fathom_session_prefill(f->session, NULL, 8, NULL, err));
  CHECK_NULL("ids", fathom_session_prefill(f->session, NULL, 0, NULL, err));
  CHECK_NULL("s", fathom_session_step(NULL, 1, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, 8, NULL, err));
  CHECK_NULL("s", fathom_session_generate(NULL, sampler, &params, NULL, NULL, err));
  params.n_stop_ids = 1;
  CHECK_NULL("stop_ids", fathom_session_generate(f->session, sampler, &params, NULL, NULL, err));
  params.n_stop_ids = 0;
  params.n_stop_strings = 1;
  CHECK_NULL("stop_strings", fathom_session_generate(f->session, NULL, &params, NULL, NULL, err));
  params.stop_strings = holes;
  CHECK_NULL("stop_strings", fathom_session_generate(f->session, NULL, &params, NULL, NULL, err));
  CHECK_NULL("s", fathom_session_logits(NULL, logits, 4, &len, err));
  CHECK_NULL("buf", fathom_session_logits(f->session, NULL, 4, &len, err));
  CHECK_NULL("n", fathom_session_logits(f->session, logits, 4, NULL, err));
  CHECK_NULL("s", fathom_session_logits_view(NULL, &view, &len, err));
  CHECK_NULL("out", fathom_session_logits_view(f->session, NULL, &len, err));
  CHECK_NULL("n", fathom_session_logits_view(f->session, &view, NULL, err));
  CHECK_NULL("s", fathom_session_tokens(NULL, 0, ids, 8, &len, err));
  CHECK_NULL("buf", fathom_session_tokens(f->session, 0, NULL, 8, &len, err));
  CHECK_NULL("n", fathom_session_tokens(f->session, 0, ids, 8, NULL, err));
  CHECK_NULL("s", fathom_session_truncate(NULL, 0, err));
  CHECK_NULL("s", fathom_session_trim(NULL, &len, err));
  CHECK_NULL("s", fathom_session_save(NULL, "f", NULL, err));
  CHECK_NULL("path", fathom_session_save(f->session, NULL, NULL, err));
  CHECK_NULL("s", fathom_session_save_io(NULL, NULL, NULL, NULL, err));
  CHECK_NULL("write", fathom_session_save_io(f->session, NULL, NULL, NULL, err));
  session = (fathom_session*)buf;
  CHECK_NULL("model", fathom_session_restore(NULL, "f", NULL, NULL, &session, err));
  EXPECT(session == NULL);
  CHECK_NULL("path", fathom_session_restore(f->model, NULL, NULL, NULL, &session, err));
  CHECK_NULL("out", fathom_session_restore(f->model, "f", NULL, NULL, NULL, err));
  CHECK_NULL("read", fathom_session_restore_io(f->model, NULL, NULL, 1, NULL, NULL, &session, err));
  CHECK_NULL("out", fathom_session_restore_io(f->model, NULL, NULL, 1, NULL, NULL, NULL, err));
  CHECK_NULL("eng", fathom_memory_snapshot(NULL, items, 8, &len, err));
  CHECK_NULL("items", fathom_memory_snapshot(f->engine, NULL, 8, &len, err));
  CHECK_NULL("n", fathom_memory_snapshot(f->engine, items, 8, NULL, err));
  CHECK_NULL("s", fathom_session_forecast(NULL, NULL, 0, &len, NULL, err));
  CHECK_NULL("n", fathom_session_forecast(f->session, NULL, 0, NULL, NULL, err));
  CHECK_NULL("items", fathom_session_forecast(f->session, NULL, 1, &len, NULL, err));
  CHECK_NULL("eng", fathom_timeline_start(NULL, 0, err));
  CHECK_NULL("eng", fathom_timeline_write(NULL, "x.svg", NULL, err));
  CHECK_NULL("path", fathom_timeline_write(f->engine, NULL, "svg", err));
  CHECK_NULL("eng", fathom_timeline_stop(NULL, err));
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));

  /* No error struct at all is fine. */
  EXPECT(fathom_config_set(config, "no.such", "1", NULL) == FATHOM_E_CONFIG);
  EXPECT(fathom_session_step(f->session, -1, NULL) == FATHOM_E_ARGUMENT);
  fathom_config_free(NULL);
  fathom_engine_free(NULL);
  fathom_plan_free(NULL);
  fathom_model_free(NULL);
  fathom_tokenizer_free(NULL);
  fathom_sampler_free(NULL);
  fathom_session_free(NULL);
  fathom_sampler_free(sampler);
  fathom_config_free(config);
}

/* struct_size 0, 1 and huge; shorter and longer than ours.  `call` uses `object`. */
#define CHECK_SIZES(object, call)                                 \
  do {                                                            \
    static const uint32_t wrong[] = {0, 1, 7, 4097, 0xffffffffu}; \
    size_t i_;                                                    \
    for (i_ = 0; i_ < sizeof wrong / sizeof *wrong; ++i_) {       \
      (object)->struct_size = wrong[i_];                          \
      EXPECT_CODE(FATHOM_E_ARGUMENT, call);                       \
      EXPECT(strstr(err->message, "struct_size") != NULL);        \
    }                                                             \
  } while (0)

/* An options struct as a later version might have it. */
#define NEWER(type) \
  struct {          \
    type known;     \
    uint64_t more;  \
  }
#define CHECK_IN(type, call)                  \
  do {                                        \
    NEWER(type) newer;                        \
    type* const in = &newer.known;            \
    memset(&newer, 0, sizeof newer);          \
    CHECK_SIZES(in, call);                    \
    in->struct_size = (uint32_t)sizeof newer; \
    EXPECT_OK(call);                          \
    newer.more = 1;                           \
    EXPECT_CODE(FATHOM_E_VERSION, call);      \
    in->struct_size = 8;                      \
    EXPECT_OK(call);                          \
  } while (0)
#define CHECK_OUT(type, call)                                                        \
  do {                                                                               \
    NEWER(type) newer;                                                               \
    type* const out = &newer.known;                                                  \
    CHECK_SIZES(out, call);                                                          \
    memset(&newer, 0x5a, sizeof newer);                                              \
    out->struct_size = (uint32_t)sizeof newer;                                       \
    EXPECT_OK(call);                                                                 \
    EXPECT(newer.more == 0 && out->struct_size == sizeof newer);                     \
    memset(&newer, 0x5a, sizeof newer);                                              \
    out->struct_size = 8;                                                            \
    EXPECT_OK(call);                                                                 \
    EXPECT(((unsigned char*)out)[8] == 0x5a && newer.more == 0x5a5a5a5a5a5a5a5aull); \
  } while (0)

static void test_sizes(const Fixture* f) {
  fathom_token ids[2] = {2, 3};
  fathom_sampler* sampler = NULL;
  fathom_engine* engine = NULL;
  fathom_session* session = NULL;
  uint64_t n;
  EXPECT_OK(fathom_session_prefill(f->session, ids, 2, NULL, err));
  CHECK_IN(fathom_host, (fathom_engine_free(engine), fathom_engine_create(NULL, in, &engine, err)));
  CHECK_IN(fathom_run, fathom_session_prefill(f->session, ids, 2, in, err));
  CHECK_IN(fathom_sampler_params,
           (fathom_sampler_free(sampler), fathom_sampler_create(in, &sampler, err)));
  CHECK_IN(fathom_session_params,
           (fathom_session_free(session), fathom_session_create(f->model, in, &session, err)));
  CHECK_IN(fathom_generate_params,
           (fathom_session_truncate(f->session, 1, NULL), fathom_session_step(f->session, 3, NULL),
            fathom_session_generate(f->session, NULL, in, NULL, NULL, err)));
  fathom_engine_free(engine);
  fathom_sampler_free(sampler);
  fathom_session_free(session);

  CHECK_OUT(fathom_device_info, fathom_engine_device(f->engine, 0, out, NULL, err));
  CHECK_OUT(fathom_plan_summary, fathom_plan_get_summary(f->plan, out, err));
  CHECK_OUT(fathom_plan_item, fathom_plan_get_item(f->plan, 0, out, err));
  CHECK_OUT(fathom_model_info, fathom_model_get_info(f->model, out, err));
  CHECK_OUT(fathom_session_info, fathom_session_get_info(f->session, out, err));
  CHECK_OUT(fathom_generate_result,
            (fathom_session_truncate(f->session, 1, NULL), fathom_session_step(f->session, 3, NULL),
             fathom_session_generate(f->session, NULL, NULL, NULL, out, err)));
  {
    fathom_memory_item items[8];
    fathom_memory_item* const first = items;
    CHECK_SIZES(first, fathom_memory_snapshot(f->engine, items, 8, &n, err));
  }
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
}

static void test_error_struct(void) {
  fathom_error e;
  fathom_config* config = NULL;
  char key[200];
  EXPECT_OK(fathom_config_create(&config, err));
  /* Too small to be one: left alone. */
  memset(&e, 0x5a, sizeof e);
  e.struct_size = 4;
  EXPECT(fathom_config_set(config, "no.such", "1", &e) == FATHOM_E_CONFIG);
  EXPECT(e.code == 0x5a5a5a5a);
  /* An older, shorter one: its text ends with NUL, nothing is written behind it. */
  e.struct_size = 40 + 64 + 16;
  EXPECT(fathom_config_set(config, "no.such", "1", &e) == FATHOM_E_CONFIG);
  EXPECT(e.code == FATHOM_E_CONFIG && strcmp(e.key, "no.such") == 0);
  EXPECT(strlen(e.message) == 15 && e.message[16] == 'Z');
  /* Garbage for a size never makes us write more than we have. */
  e.struct_size = 0xfffffff0u;
  EXPECT(fathom_config_set(config, "no.such", "1", &e) == FATHOM_E_CONFIG);
  EXPECT(e.struct_size == 0xfffffff0u && e.message[0] == 'u');
  /* Long names are cut at a character. */
  memset(key, 'a', sizeof key);
  memcpy(key + 62, "\xc3\xa4", 2);
  key[199] = '\0';
  EXPECT_CODE(FATHOM_E_CONFIG, fathom_config_set(config, key, "1", err));
  EXPECT(strlen(err->key) == 62);
  fathom_config_free(config);
}

static void test_values(const Fixture* f) {
  const uint64_t huge = (uint64_t)1 << 63;
  fathom_sampler_params sampling = {.struct_size = sizeof sampling};
  fathom_session_params session_params = {.struct_size = sizeof session_params};
  fathom_generate_params params = {.struct_size = sizeof params};
  fathom_run run = {.struct_size = sizeof run};
  fathom_sampler* sampler = NULL;
  fathom_session* session = NULL;
  fathom_engine* other = NULL;
  fathom_model* model = NULL;
  fathom_token ids[3] = {2, 3, 4}, id;
  const float logits[1] = {0};
  const float bad_temperatures[] = {NAN, -1, INFINITY, 1000};
  char buf[16];
  uint64_t n, len;
  size_t i;
  for (i = 0; i < 4; ++i) {
    sampling.temperature = bad_temperatures[i];
    EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_sampler_create(&sampling, &sampler, err));
    EXPECT(strcmp(err->key, "temperature") == 0 && sampler == NULL);
  }
  sampling.temperature = 0;
  sampling.repeat_window = 0xffffffffu;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_sampler_create(&sampling, &sampler, err));
  EXPECT_OK(fathom_sampler_create(NULL, &sampler, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_sampler_pick(sampler, logits, 0, NULL, 0, &id, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_sampler_pick(sampler, logits, huge, NULL, 0, &id, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_sampler_pick(sampler, logits, 1, ids, huge, &id, err));
  fathom_sampler_free(sampler);

  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_prefill(f->session, ids, 0, NULL, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_prefill(f->session, ids, huge, NULL, err));
  ids[2] = -1;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_prefill(f->session, ids, 3, NULL, err));
  EXPECT(strstr(err->message, "-1") && strstr(err->message, "2048"));
  ids[2] = 2048;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_prefill(f->session, ids, 3, NULL, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_step(f->session, -1, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_step(f->session, 2048, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_step(f->session, INT32_MIN, err));
  run.flags = 1;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_prefill(f->session, ids, 2, &run, err));
  run.flags = 0;
  run.chunk = huge;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_prefill(f->session, ids, 2, &run, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_truncate(f->session, 1, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_truncate(f->session, huge, err));
  EXPECT_CODE(FATHOM_E_CONTEXT_FULL, fathom_session_reserve(f->session, 257, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_reserve(f->session, huge, err));
  EXPECT_CODE(FATHOM_E_CONTEXT_FULL, fathom_session_reserve(f->session, INT64_MAX, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_tokens(f->session, huge, NULL, 0, &n, err));

  session_params.max_tokens = 257;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_create(f->model, &session_params, &session, err));
  session_params.max_tokens = huge;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_create(f->model, &session_params, &session, err));
  session_params.max_tokens = 0;
  session_params.reserve_tokens = huge;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_create(f->model, &session_params, &session, err));
  session_params.reserve_tokens = 0;
  session_params.flags = 1;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_create(f->model, &session_params, &session, err));

  EXPECT_OK(fathom_session_prefill(f->session, ids, 2, NULL, err));
  params.flags = 4;
  EXPECT_CODE(FATHOM_E_ARGUMENT,
              fathom_session_generate(f->session, NULL, &params, NULL, NULL, err));
  params.flags = 0;
  params.max_new_tokens = huge;
  EXPECT_CODE(FATHOM_E_ARGUMENT,
              fathom_session_generate(f->session, NULL, &params, NULL, NULL, err));
  params.max_new_tokens = 0;
  params.stop_ids = &ids[2];
  params.n_stop_ids = 1;
  EXPECT_CODE(FATHOM_E_ARGUMENT,
              fathom_session_generate(f->session, NULL, &params, NULL, NULL, err));
  params.n_stop_ids = huge;
  EXPECT_CODE(FATHOM_E_ARGUMENT,
              fathom_session_generate(f->session, NULL, &params, NULL, NULL, err));
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));

  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_tokenize(f->tokenizer, "a", huge, 0, ids, 3, &n, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_tokenize(f->tokenizer, "a", 1, 4, ids, 3, &n, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_detokenize(f->tokenizer, ids, 1, 1, buf, 16, &len, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_detokenize(f->tokenizer, ids, huge, 0, buf, 16, &len, err));
  EXPECT_CODE(FATHOM_E_BUFFER_TOO_SMALL,
              fathom_detokenize(f->tokenizer, ids, 0, 0, buf, 0, &len, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_config_merge_json((fathom_config*)NULL, "{}", huge, err));

  /* A plan belongs to its engine. */
  EXPECT_OK(fathom_engine_create(NULL, NULL, &other, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_model_load(other, f->plan, NULL, &model, err));
  fathom_engine_free(other);
}

/* Inside a callback all but a few functions answer BUSY, and frees do nothing. */
typedef struct Inside {
  const Fixture* f;
  fathom_session* other;
  fathom_cancel* cancel;
  fathom_sampler* sampler;
  int calls;
} Inside;

static int32_t try_all(void* user, int32_t phase, uint64_t done, uint64_t total) {
  Inside* in = user;
  const Fixture* f = in->f;
  fathom_config* config = (fathom_config*)in;
  fathom_session_info info = {.struct_size = sizeof info};
  fathom_model_info model_info = {.struct_size = sizeof model_info};
  fathom_device_info device = {.struct_size = sizeof device};
  fathom_token id = 2;
  uint64_t n;
  (void)phase, (void)done, (void)total;
  if (in->calls++ > 0) return 0;
  EXPECT_CODE(FATHOM_E_BUSY, fathom_session_step(f->session, 2, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_session_step(in->other, 2, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_session_prefill(in->other, &id, 1, NULL, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_session_truncate(in->other, 0, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_session_tokens(in->other, 0, NULL, 0, &n, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_engine_device(f->engine, 0, &device, NULL, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_engine_set_budget(f->engine, 0, 1, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_memory_snapshot(f->engine, NULL, 0, &n, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_timeline_start(f->engine, 0, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_timeline_write(f->engine, "x.svg", NULL, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_timeline_stop(f->engine, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_tokenize(f->tokenizer, "a", 1, 0, NULL, 0, &n, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_sampler_reset(in->sampler, 1, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_config_create(&config, err));
  /* Allowed: */
  EXPECT_OK(fathom_session_get_info(in->other, &info, err));
  EXPECT_OK(fathom_model_get_info(f->model, &model_info, err));
  EXPECT_CODE(FATHOM_E_BUSY, fathom_session_get_info(f->session, &info, err)); /* in use */
  EXPECT(fathom_version() != 0 && fathom_version_string() != NULL);
  /* These must not pull the ground from under the running call. */
  fathom_session_free(f->session);
  fathom_session_free(in->other);
  fathom_model_free(f->model);
  fathom_plan_free(f->plan);
  fathom_engine_free(f->engine);
  fathom_tokenizer_free(f->tokenizer);
  fathom_sampler_free(in->sampler);
  fathom_cancel_free(in->cancel);
  fathom_cancel_request(in->cancel);
  return 0;
}

static void test_inside_callback(const Fixture* f) {
  Inside in = {f, NULL, NULL, NULL, 0};
  fathom_run run = {.struct_size = sizeof run};
  fathom_token ids[40];
  int i;
  for (i = 0; i < 40; ++i) ids[i] = i + 2;
  EXPECT_OK(fathom_session_create(f->model, NULL, &in.other, err));
  EXPECT_OK(fathom_cancel_create(&in.cancel, err));
  EXPECT_OK(fathom_sampler_create(NULL, &in.sampler, err));
  run.progress = try_all;
  run.user = &in;
  run.cancel = in.cancel;
  EXPECT_CODE(FATHOM_E_CANCELLED, fathom_session_prefill(f->session, ids, 40, &run, err));
  EXPECT(in.calls > 0);
  /* All still there and usable. */
  EXPECT_OK(fathom_session_step(in.other, 2, err));
  EXPECT_OK(fathom_sampler_reset(in.sampler, 1, err));
  fathom_cancel_reset(in.cancel);
  EXPECT_OK(fathom_session_prefill(f->session, ids, 40, &run, err));
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  fathom_session_free(in.other);
  fathom_cancel_free(in.cancel);
  fathom_sampler_free(in.sampler);
}

/* The observer may refuse growth: the call fails, nothing is kept, and later it works. */
static int refuse;
static int32_t refuse_memory(void* user, int32_t device, int32_t category, int64_t delta,
                             uint64_t total) {
  (void)user, (void)device, (void)category, (void)total;
  return refuse && delta > 0;
}

static void test_observer_refuses(void) {
  fathom_host host = {.struct_size = sizeof host};
  fathom_session_info info = {.struct_size = sizeof info};
  fathom_session* session = NULL;
  fathom_model* model = NULL;
  Fixture f;
  host.memory = refuse_memory;
  f = open_fixture(FATHOM_EXAMPLE_MODEL, &host);
  refuse = 1;
  EXPECT_CODE(FATHOM_E_CALLBACK, fathom_model_load(f.engine, f.plan, NULL, &model, err));
  EXPECT_CODE(FATHOM_E_CALLBACK, fathom_session_create(f.model, NULL, &session, err));
  EXPECT_CODE(FATHOM_E_CALLBACK, fathom_session_step(f.session, 2, err));
  EXPECT_OK(fathom_session_get_info(f.session, &info, err));
  EXPECT(info.n_tokens == 0 && info.capacity_tokens == 0 && !model && !session);
  refuse = 0;
  EXPECT_OK(fathom_session_step(f.session, 2, err));
  close_fixture(&f);
}

/* Budgets are met before the system is asked. */
static void test_budget(const Fixture* f) {
  fathom_device_info info = {.struct_size = sizeof info};
  fathom_session* session = NULL;
  uint64_t now;
  EXPECT_OK(fathom_engine_device(f->engine, 0, &info, NULL, err));
  now = info.bytes_now;
  EXPECT_OK(fathom_engine_set_budget(f->engine, 0, now, err));
  EXPECT_CODE(FATHOM_E_BUDGET, fathom_session_create(f->model, NULL, &session, err));
  EXPECT(session == NULL && err->bytes_needed > err->bytes_available);
  EXPECT_OK(fathom_engine_device(f->engine, 0, &info, NULL, err));
  EXPECT(info.bytes_now == now && info.bytes_peak >= now);
  EXPECT_OK(fathom_engine_set_budget(f->engine, 0, now * 4, err));
  EXPECT_OK(fathom_session_create(f->model, NULL, &session, err));
  fathom_session_free(session);
}

static void test_fork(const Fixture* f) {
  int status = 0;
  fathom_config* config = NULL;
  fathom_sampler* sampler = NULL;
  pid_t child;
  EXPECT_OK(fathom_config_create(&config, err));
  EXPECT_OK(fathom_sampler_create(NULL, &sampler, err));
  child = fork();
  if (child == 0) {
    fathom_session_info session_info = {.struct_size = sizeof session_info};
    fathom_model_info model_info = {.struct_size = sizeof model_info};
    fathom_plan_summary summary = {.struct_size = sizeof summary};
    fathom_plan* plan = NULL;
    fathom_token id = 2;
    uint64_t n;
    failures = 0;
    EXPECT_CODE(FATHOM_E_FORKED, fathom_session_step(f->session, 2, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_session_prefill(f->session, &id, 1, NULL, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_session_get_info(f->session, &session_info, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_model_get_info(f->model, &model_info, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_plan_get_summary(f->plan, &summary, err));
    EXPECT_CODE(FATHOM_E_FORKED,
                fathom_plan_create(f->engine, FATHOM_EXAMPLE_MODEL, NULL, &plan, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_memory_snapshot(f->engine, NULL, 0, &n, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_timeline_start(f->engine, 0, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_timeline_write(f->engine, "x.svg", NULL, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_timeline_stop(f->engine, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_tokenize(f->tokenizer, "a", 1, 0, NULL, 0, &n, err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_config_set(config, "threads", "1", err));
    EXPECT_CODE(FATHOM_E_FORKED, fathom_sampler_reset(sampler, 1, err));
    fathom_session_free(f->session); /* would wait for threads that are not in this process */
    fathom_model_free(f->model);
    fathom_engine_free(f->engine);
    fathom_config_free(config);
    fathom_sampler_free(sampler);
    _exit(failures != 0);
  }
  waitpid(child, &status, 0);
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_OK(fathom_config_set(config, "threads", "1", err));
  fathom_config_free(config);
  fathom_sampler_free(sampler);
}

int main(void) {
  Fixture f = open_fixture(FATHOM_EXAMPLE_MODEL, NULL);
  test_null(&f);
  test_sizes(&f);
  test_error_struct();
  test_values(&f);
  test_inside_callback(&f);
  test_observer_refuses();
  test_budget(&f);
  test_fork(&f);
  close_fixture(&f);
  if (failures == 0) puts("all passed");
  return failures != 0;
}
