/* Every function of the C interface does what its comment says.  C99, on the shared library and the
 * example model; misuse is in capi_misuse_test.c, callbacks that throw in capi_callback_test.cc. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <math.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "capi_support.h"

#define N_CATEGORIES (FATHOM_CAT_EXPERT_CACHE + 1)

static fathom_error error_storage;
static fathom_error* const err = &error_storage;

static const char kText[] = "Once upon a time there was a small fox. The fox lived in the wood.";

/* Tokens of a text, bos first. */
static uint64_t tokens_of(const Fixture* f, const char* text, fathom_token* ids, uint64_t cap) {
  uint64_t n = 0;
  EXPECT_OK(fathom_tokenize(f->tokenizer, text, FATHOM_NTS, FATHOM_TOK_ADD_BOS, ids, cap, &n, err));
  return n;
}

static fathom_token best_of(const float* logits, uint64_t n) {
  uint64_t i, best = 0;
  for (i = 1; i < n; ++i)
    if (logits[i] > logits[best]) best = i;
  return (fathom_token)best;
}

static void test_library(void) {
  char buf[4096];
  uint64_t len = 0, whole = 0;
  int32_t code;
  EXPECT(fathom_version() ==
         (uint32_t)(FATHOM_VERSION_MAJOR << 16 | FATHOM_VERSION_MINOR << 8 | FATHOM_VERSION_PATCH));
  snprintf(buf, sizeof buf, "%d.%d.%d", FATHOM_VERSION_MAJOR, FATHOM_VERSION_MINOR,
           FATHOM_VERSION_PATCH);
  EXPECT(strcmp(fathom_version_string(), buf) == 0);
  EXPECT(strcmp(fathom_status_name(0), "FATHOM_OK") == 0);
  EXPECT(strcmp(fathom_status_name(FATHOM_E_BUDGET), "FATHOM_E_BUDGET") == 0);
  for (code = 0; code >= FATHOM_E_INTERNAL; --code)
    EXPECT(strncmp(fathom_status_name(code), "FATHOM_", 7) == 0);
  EXPECT(strcmp(fathom_status_name(12345), "unknown code") == 0);

  EXPECT_OK(fathom_capabilities_json(NULL, 0, &whole, err));
  EXPECT_OK(fathom_capabilities_json(buf, sizeof buf, &len, err));
  EXPECT(len == whole && strlen(buf) == len);
  EXPECT(strstr(buf, "\"scalar\"") != NULL && strstr(buf, "\"version\": \"0.") != NULL);
  /* One byte short for the NUL: refused, the need is told, the buffer is not touched. */
  memset(buf, 'x', sizeof buf);
  len = 0;
  EXPECT_CODE(FATHOM_E_BUFFER_TOO_SMALL, fathom_capabilities_json(buf, whole, &len, err));
  EXPECT(len == whole && buf[0] == 'x' && err->bytes_needed == whole + 1 &&
         err->bytes_available == whole);
  EXPECT_OK(fathom_capabilities_json(buf, whole + 1, &len, err));
}

static void test_config(void) {
  fathom_config* config = NULL;
  char buf[64];
  char* schema;
  uint64_t len = 0;
  EXPECT_OK(fathom_config_create(&config, err));
  EXPECT_OK(fathom_config_set(config, "context.max", "4096", err));
  EXPECT_OK(fathom_config_get(config, "context.max", buf, sizeof buf, &len, err));
  EXPECT(len == 4 && strcmp(buf, "4096") == 0);
  EXPECT_CODE(FATHOM_E_CONFIG, fathom_config_set(config, "contxt.max", "1", err));
  EXPECT(strstr(err->message, "context.max") != NULL && strcmp(err->key, "contxt.max") == 0);
  EXPECT_CODE(FATHOM_E_CONFIG, fathom_config_set(config, "kv.page_tokens", "48", err));
  EXPECT_CODE(FATHOM_E_CONFIG, fathom_config_get(config, "no.such", buf, sizeof buf, &len, err));
  EXPECT_CODE(FATHOM_E_CONFIG, fathom_config_merge_json(
                                   config, "{\"threads\": 2, \"isa\": \"z80\"}", FATHOM_NTS, err));
  EXPECT_OK(fathom_config_get(config, "threads", buf, sizeof buf, &len, err));
  EXPECT(strcmp(buf, "0") == 0);
  EXPECT_CODE(FATHOM_E_CONFIG, fathom_config_merge_json(config, "{\"threads\": 2", 13, err));
  EXPECT(err->offset >= 13);
  /* The length counts, not the NUL. */
  EXPECT_OK(fathom_config_merge_json(config, "{\"threads\": 2}garbage", 14, err));
  EXPECT_OK(fathom_config_get(config, "threads", buf, sizeof buf, &len, err));
  EXPECT(strcmp(buf, "2") == 0);
  fathom_config_free(config);

  EXPECT_OK(fathom_config_schema_json(NULL, 0, &len, err));
  schema = malloc((size_t)len + 1);
  EXPECT_OK(fathom_config_schema_json(schema, len + 1, &len, err));
  EXPECT(strlen(schema) == len && strstr(schema, "\"key\": \"kv.type\"") != NULL);
  free(schema);
}

static void test_engine(void) {
  fathom_config* config = NULL;
  fathom_engine* engine = NULL;
  fathom_device_info info = {.struct_size = sizeof info};
  uint32_t count = 0;
  EXPECT_OK(fathom_config_create(&config, err));
  EXPECT_OK(fathom_config_merge_json(
      config, "{\"devices\": \"cpu:0,cpu:1\", \"budget.cpu:0\": \"64M\", \"threads\": 1}",
      FATHOM_NTS, err));
  EXPECT_OK(fathom_engine_create(config, NULL, &engine, err));
  EXPECT_OK(fathom_engine_device(engine, 0, &info, &count, err));
  EXPECT(count == 2 && info.index == 0 && info.kind == 0);
  EXPECT(strcmp(info.name, "cpu:0") == 0 && info.bytes_budget == (uint64_t)64 << 20);
  EXPECT(info.bytes_total > info.bytes_free / 2 && info.bytes_free > 0);
  EXPECT(info.bytes_now <= info.bytes_peak && info.bytes_peak <= info.bytes_budget);
  EXPECT_OK(fathom_engine_device(engine, 1, &info, NULL, err));
  EXPECT(strcmp(info.name, "cpu:1") == 0);
  count = 0;
  EXPECT_CODE(FATHOM_E_NOT_FOUND, fathom_engine_device(engine, 2, &info, &count, err));
  EXPECT(count == 2);
  EXPECT_OK(fathom_engine_device(engine, 99, NULL, &count, err));

  EXPECT_OK(fathom_engine_set_budget(engine, 1, 12345678, err));
  EXPECT_OK(fathom_engine_device(engine, 1, &info, NULL, err));
  EXPECT(info.bytes_budget == 12345678);
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_engine_set_budget(engine, 2, 1, err));
  EXPECT_OK(fathom_engine_set_host_budget(engine, (uint64_t)1 << 40, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_engine_set_host_budget(engine, (uint64_t)1 << 63, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_engine_set_budget(engine, -1, 1, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_engine_set_budget(engine, 0, (uint64_t)1 << 63, err));
  fathom_engine_free(engine);

  /* Refusals leave NULL behind. */
  EXPECT_OK(fathom_config_merge_json(
      config, "{\"devices\": \"warp:0\", \"budget.cpu:0\": \"auto\"}", FATHOM_NTS, err));
  engine = (fathom_engine*)&info;
  EXPECT_CODE(FATHOM_E_UNSUPPORTED, fathom_engine_create(config, NULL, &engine, err));
  EXPECT(engine == NULL);
  EXPECT_OK(fathom_config_merge_json(
      config, "{\"devices\": \"cpu\", \"context.max\": 10, \"context.reserve\": 11}", FATHOM_NTS,
      err));
  EXPECT_CODE(FATHOM_E_CONFIG, fathom_engine_create(config, NULL, &engine, err));
  EXPECT(strstr(err->message, "context.max") && strstr(err->message, "context.reserve"));
  fathom_config_free(config);
}

static void test_plan(const Fixture* f) {
  fathom_plan_summary summary = {.struct_size = sizeof summary};
  fathom_plan_item item = {.struct_size = sizeof item};
  fathom_plan *plan = NULL, *better = NULL;
  fathom_config* config = NULL;
  fathom_model* model = NULL;
  uint64_t peak = 0, decode = 0, phase_bytes[3] = {0, 0, 0}, len = 0;
  uint32_t i;
  char* json;
  EXPECT_OK(fathom_plan_get_summary(f->plan, &summary, err));
  EXPECT(summary.feasible == 1 && summary.binding_device == -1 && summary.bytes_short == 0);
  EXPECT(summary.max_tokens == 256 && summary.prefill_chunk == 16 && summary.n_devices == 1);
  EXPECT(summary.kv_bytes_per_token > 0 && summary.max_tokens_feasible >= 256);
  EXPECT(summary.n_items == 3 * N_CATEGORIES);
  for (i = 0; i < summary.n_items; ++i) {
    EXPECT_OK(fathom_plan_get_item(f->plan, i, &item, err));
    EXPECT(item.device == 0 && strcmp(item.device_name, "cpu") == 0);
    EXPECT(item.phase == (int32_t)(i / N_CATEGORIES) && item.category == (int32_t)(i % N_CATEGORIES));
    phase_bytes[item.phase] += item.bytes;
  }
  for (i = 0; i < 3; ++i) peak = phase_bytes[i] > peak ? phase_bytes[i] : peak;
  decode = phase_bytes[2];
  EXPECT(peak == summary.bytes_peak && decode == summary.bytes_decode && peak > 0);
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_plan_get_item(f->plan, 3 * N_CATEGORIES, &item, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_plan_alternative(f->plan, 1000, &better, err));
  EXPECT_OK(fathom_plan_json(f->plan, NULL, 0, &len, err));
  json = malloc((size_t)len + 1);
  EXPECT_OK(fathom_plan_json(f->plan, json, len + 1, &len, err));
  EXPECT(strstr(json, "\"feasible\"") && strstr(json, "\"devices\""));
  free(json);

  /* Too long a context for a small budget: a value with alternatives, the first of which fits. */
  EXPECT_OK(fathom_config_create(&config, err));
  EXPECT_OK(fathom_config_merge_json(
      config, "{\"budget.cpu\": \"40M\", \"context.max\": 1000000, \"threads\": 1}", FATHOM_NTS,
      err));
  EXPECT_OK(fathom_plan_create(f->engine, FATHOM_EXAMPLE_MODEL, config, &plan, err));
  EXPECT_OK(fathom_plan_get_summary(plan, &summary, err));
  EXPECT(summary.feasible == 0 && summary.binding_device == 0 && summary.bytes_short > 0);
  EXPECT_CODE(FATHOM_E_BUDGET, fathom_model_load(f->engine, plan, NULL, &model, err));
  EXPECT(model == NULL && err->bytes_needed > err->bytes_available);
  EXPECT(summary.n_alternatives > 0);
  if (summary.n_alternatives > 0) {
    EXPECT_OK(fathom_plan_alternative(plan, 0, &better, err));
    EXPECT_OK(fathom_plan_get_summary(better, &summary, err));
    EXPECT(summary.feasible == 1);
  }
  fathom_plan_free(better);
  fathom_plan_free(plan);
  fathom_config_free(config);

  plan = (fathom_plan*)&summary;
  EXPECT_CODE(FATHOM_E_NOT_FOUND, fathom_plan_create(f->engine, "/no/such.gguf", NULL, &plan, err));
  EXPECT(plan == NULL && strstr(err->message, "/no/such.gguf") != NULL);
}

static void test_model(const Fixture* f) {
  fathom_model_info info = {.struct_size = sizeof info};
  fathom_expert_cache cache = {.struct_size = sizeof cache};
  char buf[128];
  uint64_t len = 0;
  EXPECT_OK(fathom_model_get_info(f->model, &info, err));
  EXPECT_OK(fathom_model_expert_cache(f->model, &cache, err));
  EXPECT(cache.n_experts == 0 && cache.choices == 0 && cache.copied == 0);
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_model_replan(f->model, NULL, NULL, 1, NULL, err));
  EXPECT_CODE(FATHOM_E_STATE, fathom_model_replan(f->model, NULL, NULL, 0, NULL, err));
  EXPECT_OK(fathom_model_replan(f->model, NULL, &f->session, 1, NULL, err));
  EXPECT(info.n_layers == 5 && info.n_heads == 4 && info.n_experts == 8 &&
         info.n_experts_used == 2);
  EXPECT(info.kv_lora_rank == 96 && info.rope_dim == 32 && info.n_vocab == 2048);
  EXPECT(info.bos == 0 && info.eos == 1);
  EXPECT(info.n_params > 6000000 && info.n_params < 6200000 &&
         info.n_params_active < info.n_params);
  EXPECT(info.bytes_weights > 4000000 && info.context_train > 0);
  EXPECT(info.fingerprint_lo != 0 || info.fingerprint_hi != 0);
  EXPECT(strcmp(info.arch, "deepseek2") == 0);
  EXPECT_OK(fathom_model_metadata(f->model, "general.architecture", buf, sizeof buf, &len, err));
  EXPECT(strcmp(buf, "deepseek2") == 0 && len == 9);
  EXPECT_CODE(FATHOM_E_NOT_FOUND,
              fathom_model_metadata(f->model, "no.such", buf, sizeof buf, &len, err));
}

static void test_tokenizer(const Fixture* f) {
  fathom_tokenizer* tokenizer = NULL;
  fathom_token ids[256], again[256];
  const char* roles[] = {"system", "user", "assistant", "user"};
  const char* contents[] = {"Be brief.", "Hello", "Hi.", "Who?"};
  const char* wrong[] = {"oracle"};
  char text[512];
  uint64_t n = 0, m = 0, len = 0;
  EXPECT_OK(fathom_tokenizer_open(FATHOM_EXAMPLE_MODEL, &tokenizer, err));
  EXPECT_OK(fathom_tokenize(tokenizer, kText, FATHOM_NTS, FATHOM_TOK_ADD_BOS, NULL, 0, &n, err));
  EXPECT(n > 5 && n < 100);
  EXPECT_OK(fathom_tokenize(tokenizer, kText, FATHOM_NTS, FATHOM_TOK_ADD_BOS, ids, n, &n, err));
  EXPECT(ids[0] == 0);
  EXPECT_CODE(FATHOM_E_BUFFER_TOO_SMALL, fathom_tokenize(tokenizer, kText, FATHOM_NTS,
                                                         FATHOM_TOK_ADD_BOS, ids, n - 1, &m, err));
  EXPECT(m == n);
  EXPECT_OK(fathom_tokenize(f->tokenizer, kText, strlen(kText), 0, again, 256, &m, err));
  EXPECT(m == n - 1 && memcmp(again, ids + 1, (size_t)m * sizeof *ids) == 0);
  EXPECT_OK(
      fathom_detokenize(tokenizer, ids, n, FATHOM_TOK_SKIP_SPECIAL, text, sizeof text, &len, err));
  EXPECT(len == strlen(kText) && strcmp(text, kText) == 0);
  EXPECT_CODE(FATHOM_E_BUFFER_TOO_SMALL,
              fathom_detokenize(tokenizer, ids, n, FATHOM_TOK_SKIP_SPECIAL, text, len, &len, err));
  EXPECT_OK(fathom_detokenize(tokenizer, ids, n, 0, NULL, 0, &m, err));
  EXPECT(m > len); /* bos has text of its own */
  EXPECT_OK(fathom_detokenize(tokenizer, NULL, 0, 0, text, 1, &len, err));
  EXPECT(len == 0 && text[0] == '\0');
  EXPECT_OK(fathom_tokenize(tokenizer, "", FATHOM_NTS, 0, NULL, 0, &n, err));
  EXPECT(n == 0);
  ids[0] = -1;
  EXPECT_CODE(FATHOM_E_ARGUMENT,
              fathom_detokenize(tokenizer, ids, 1, 0, text, sizeof text, &len, err));
  ids[0] = 2048;
  EXPECT_CODE(FATHOM_E_ARGUMENT,
              fathom_detokenize(tokenizer, ids, 1, 0, text, sizeof text, &len, err));

  EXPECT_OK(fathom_chat_prompt(tokenizer, roles, contents, 4, "deepseek-v2", 0, ids, 256, &n, err));
  EXPECT_OK(fathom_chat_prompt(tokenizer, roles, contents, 4, "deepseek-v2",
                               FATHOM_CHAT_NO_GENERATION_PROMPT, again, 256, &m, err));
  EXPECT(n > m && memcmp(ids, again, (size_t)m * sizeof *ids) == 0 && ids[0] == 0);
  EXPECT_OK(
      fathom_detokenize(tokenizer, ids, n, FATHOM_TOK_SKIP_SPECIAL, text, sizeof text, &len, err));
  EXPECT(strstr(text, "Be brief.") && strstr(text, "User: Hello") && strstr(text, "Assistant:"));
  EXPECT_CODE(FATHOM_E_UNSUPPORTED,
              fathom_chat_prompt(tokenizer, roles, contents, 4, "jinja", 0, ids, 256, &n, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_chat_prompt(tokenizer, wrong, contents, 1, "deepseek-v2", 0,
                                                    ids, 256, &n, err));
  fathom_tokenizer_free(tokenizer);
  EXPECT_CODE(FATHOM_E_NOT_FOUND, fathom_tokenizer_open("/no/such", &tokenizer, err));
  EXPECT(tokenizer == NULL);
}

/* ---- memory of the host ---- */
typedef struct Pool {
  int64_t held;
  int refusing; /* commit says no */
} Pool;
static void* pool_reserve(void* user, uint64_t bytes) {
  void* base = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  (void)user;
  return base == MAP_FAILED ? NULL : base;
}
static int32_t pool_commit(void* user, void* base, uint64_t offset, uint64_t bytes) {
  Pool* pool = (Pool*)user;
  if (pool->refusing) return 1;
  if (mprotect((char*)base + offset, bytes, PROT_READ | PROT_WRITE) != 0) return 1;
  pool->held += (int64_t)bytes;
  return 0;
}
static void pool_decommit(void* user, void* base, uint64_t offset, uint64_t bytes) {
  ((Pool*)user)->held -= (int64_t)bytes;
  mmap((char*)base + offset, bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
static void pool_release(void* user, void* base, uint64_t bytes) {
  (void)user;
  munmap(base, bytes);
}

static void test_allocator(void) {
  Pool pool = {0, 0};
  fathom_host host = {.struct_size = sizeof host,
                      .user = &pool,
                      .reserve = pool_reserve,
                      .commit = pool_commit,
                      .decommit = pool_decommit,
                      .release = pool_release};
  fathom_token ids[256];
  fathom_session* other = NULL;
  int64_t before;
  uint64_t n;
  Fixture f = open_fixture(FATHOM_EXAMPLE_MODEL, &host);
  EXPECT(pool.held > 1 << 20); /* the weights, at least */
  n = tokens_of(&f, kText, ids, 256);
  EXPECT_OK(fathom_session_prefill(f.session, ids, n, NULL, err));
  before = pool.held;
  pool.refusing = 1;
  EXPECT_CODE(FATHOM_E_MEMORY, fathom_session_create(f.model, NULL, &other, err));
  EXPECT(other == NULL && pool.held == before);
  pool.refusing = 0;
  EXPECT_OK(fathom_session_step(f.session, 7, err));
  close_fixture(&f);

  host.release = NULL;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_engine_create(NULL, &host, &f.engine, err));
}

/* Coder-V2 236B on a card and a host that are elsewhere: plan, load and generation, from its
 * config.json. */
static void test_simulation(void) {
  static const char kMachine[] =
      "{\"devices\": [{\"name\": \"cpu\", \"bytes\": \"256G\"}, {\"name\": \"cuda:0\", \"bytes\": "
      "\"24G\"}]}";
  const char* const path = FATHOM_TEST_SOURCE_DATA "/configs/v2.json";
  char json[8192];
  uint64_t len = 0;
  uint32_t count = 0;
  fathom_config* config = NULL;
  fathom_engine* engine = (fathom_engine*)json;
  fathom_plan* plan = NULL;
  fathom_model* model = NULL;
  fathom_session* session = NULL;
  fathom_plan_summary summary = {.struct_size = sizeof summary};
  fathom_session_info info = {.struct_size = sizeof info};
  fathom_device_info device = {.struct_size = sizeof device};
  static fathom_token text[4000];
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_engine_simulate(NULL, 0, NULL, NULL, &engine, err));
  EXPECT(engine == NULL);
  EXPECT_CODE(FATHOM_E_CONFIG, fathom_engine_simulate("{\"devices\": [{\"name\": \"cpu\"}]}",
                                                      FATHOM_NTS, NULL, NULL, &engine, err));
  EXPECT(strstr(err->message, "bytes") != NULL);
  EXPECT_OK(fathom_config_create(&config, err));
  EXPECT_OK(fathom_config_merge_json(config, "{\"weights.type\": \"q8_0\", \"context.max\": 16384}",
                                     FATHOM_NTS, err));
  EXPECT_OK(fathom_engine_simulate(kMachine, FATHOM_NTS, config, NULL, &engine, err));
  EXPECT_OK(fathom_engine_machine_json(engine, json, sizeof json, &len, err));
  EXPECT(strlen(json) == len && strstr(json, "\"cuda:0\"") && strstr(json, "read_bytes_per_s"));
  EXPECT_OK(fathom_plan_create(engine, path, NULL, &plan, err));
  EXPECT_OK(fathom_plan_get_summary(plan, &summary, err));
  EXPECT(summary.feasible == 1 && summary.n_devices == 2 && summary.max_tokens == 16384);
  EXPECT_OK(fathom_model_load(engine, plan, NULL, &model, err));
  EXPECT_OK(fathom_session_create(model, NULL, &session, err));
  EXPECT_OK(fathom_session_prefill(session, text, 4000, NULL, err));
  EXPECT_OK(fathom_session_step(session, 7, err));
  EXPECT_OK(fathom_session_get_info(session, &info, err));
  EXPECT(info.n_tokens == 4001 && info.prefill_ms > 1000 && info.decode_ms > 1);
  EXPECT_OK(fathom_engine_device(engine, 0, &device, &count, err));
  EXPECT(count == 2 && device.bytes_peak <= device.bytes_budget);
  /* What the engine says of its machine makes the same machine. */
  fathom_session_free(session);
  fathom_model_free(model);
  fathom_plan_free(plan);
  fathom_engine_free(engine);
  EXPECT_OK(fathom_engine_simulate(json, len, config, NULL, &engine, err));
  fathom_engine_free(engine);
  fathom_config_free(config);
}

static void test_sampler(void) {
  fathom_sampler_params params = {.struct_size = sizeof params};
  fathom_sampler* sampler = NULL;
  const float logits[] = {1, 3, 2, 3};
  const float none[] = {-INFINITY, -INFINITY};
  const float nan_logits[] = {1, NAN};
  const fathom_token history[] = {1};
  fathom_token first[16], id = -7;
  int i;
  EXPECT_OK(fathom_sampler_create(NULL, &sampler, err));
  EXPECT_OK(fathom_sampler_pick(sampler, logits, 4, NULL, 0, &id, err));
  EXPECT(id == 1);
  EXPECT_CODE(FATHOM_E_NUMERIC, fathom_sampler_pick(sampler, none, 2, NULL, 0, &id, err));
  EXPECT_CODE(FATHOM_E_NUMERIC, fathom_sampler_pick(sampler, nan_logits, 2, NULL, 0, &id, err));
  EXPECT(id == 1);
  fathom_sampler_free(sampler);

  params.repeat_penalty = 2;
  EXPECT_OK(fathom_sampler_create(&params, &sampler, err));
  EXPECT_OK(fathom_sampler_pick(sampler, logits, 4, history, 1, &id, err));
  EXPECT(id == 3);
  fathom_sampler_free(sampler);

  params.repeat_penalty = 0;
  params.temperature = 1.5f;
  params.seed = 9;
  EXPECT_OK(fathom_sampler_create(&params, &sampler, err));
  for (i = 0; i < 16; ++i)
    EXPECT_OK(fathom_sampler_pick(sampler, logits, 4, NULL, 0, &first[i], err));
  EXPECT_OK(fathom_sampler_reset(sampler, 9, err));
  for (i = 0; i < 16; ++i) {
    EXPECT_OK(fathom_sampler_pick(sampler, logits, 4, NULL, 0, &id, err));
    EXPECT(id == first[i]);
  }
  fathom_sampler_free(sampler);
}

typedef struct Seen {
  uint64_t calls, last, stop_after;
  int32_t phase;
  float sum;
  char text[1024];
  fathom_token ids[64];
} Seen;

static int32_t on_progress(void* user, int32_t phase, uint64_t done, uint64_t total) {
  Seen* seen = user;
  EXPECT(done <= total && done >= seen->last);
  seen->phase = phase;
  seen->last = done;
  return ++seen->calls == seen->stop_after;
}

static int32_t on_logits(void* user, uint64_t position, const float* logits, uint64_t n_vocab) {
  Seen* seen = user;
  EXPECT(n_vocab == 2048 && position == seen->calls);
  seen->ids[position] = best_of(logits, n_vocab);
  return ++seen->calls == seen->stop_after;
}

static int32_t on_token(void* user, fathom_token id, const char* utf8, uint64_t len,
                        uint64_t position) {
  Seen* seen = user;
  strncat(seen->text, utf8, (size_t)len);
  if (seen->calls < 64) seen->ids[seen->calls] = id;
  seen->last = position;
  return ++seen->calls == seen->stop_after;
}

static void test_session(const Fixture* f) {
  fathom_session_info info = {.struct_size = sizeof info};
  fathom_session_params params = {
      .struct_size = sizeof params, .max_tokens = 64, .reserve_tokens = 32};
  fathom_session* s = NULL;
  fathom_token ids[128], held[128];
  static float all[2048], copy[2048];
  const float* view = NULL;
  uint64_t n_ids, n = 0, freed = 0, i;
  EXPECT_OK(fathom_session_create(f->model, &params, &s, err));
  EXPECT_OK(fathom_session_get_info(s, &info, err));
  EXPECT(info.n_tokens == 0 && info.max_tokens == 64 && info.has_logits == 0);
  EXPECT(info.capacity_tokens >= 32 && info.bytes_kv > 0 && info.kv_bytes_per_token > 0);
  EXPECT_CODE(FATHOM_E_STATE, fathom_session_logits_view(s, &view, &n, err));
  EXPECT_CODE(FATHOM_E_STATE, fathom_session_logits(s, all, 2048, &n, err));

  n_ids = tokens_of(f, kText, ids, 128);
  EXPECT_OK(fathom_session_prefill(s, ids, n_ids, NULL, err));
  EXPECT_OK(fathom_session_logits_view(s, &view, &n, err));
  EXPECT(n == 2048);
  EXPECT_OK(fathom_session_logits(s, NULL, 0, &n, err));
  EXPECT_OK(fathom_session_logits(s, all, 2048, &n, err));
  EXPECT(n == 2048 && memcmp(view, all, sizeof all) == 0);
  EXPECT_CODE(FATHOM_E_BUFFER_TOO_SMALL, fathom_session_logits(s, all, 2047, &n, err));
  EXPECT_OK(fathom_session_get_info(s, &info, err));
  EXPECT(info.n_tokens == n_ids && info.has_logits == 1 && info.n_prefilled == n_ids &&
         info.prefill_ms > 0 && info.n_decoded == 0);

  /* The same text token by token gives about the same logits. */
  EXPECT_OK(fathom_session_truncate(s, 0, err));
  for (i = 0; i < n_ids; ++i) EXPECT_OK(fathom_session_step(s, ids[i], err));
  EXPECT_OK(fathom_session_logits(s, copy, 2048, &n, err));
  EXPECT(best_of(copy, 2048) == best_of(all, 2048));
  EXPECT_OK(fathom_session_get_info(s, &info, err));
  EXPECT(info.n_decoded == n_ids && info.decode_ms > 0);

  EXPECT_OK(fathom_session_tokens(s, 0, held, 128, &n, err));
  EXPECT(n == n_ids && memcmp(held, ids, (size_t)n * sizeof *ids) == 0);
  EXPECT_OK(fathom_session_tokens(s, n_ids - 2, held, 2, &n, err));
  EXPECT(n == 2 && held[1] == ids[n_ids - 1]);
  EXPECT_OK(fathom_session_tokens(s, n_ids, held, 128, &n, err));
  EXPECT(n == 0);
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_tokens(s, n_ids + 1, held, 128, &n, err));

  EXPECT_OK(fathom_session_truncate(s, 3, err));
  EXPECT_CODE(FATHOM_E_STATE, fathom_session_logits(s, all, 2048, &n, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_truncate(s, 4, err));
  EXPECT_OK(fathom_session_reserve(s, 64, err));
  EXPECT_CODE(FATHOM_E_CONTEXT_FULL, fathom_session_reserve(s, 65, err));
  EXPECT_OK(fathom_session_trim(s, &freed, err));
  EXPECT_OK(fathom_session_trim(s, NULL, err));
  EXPECT_OK(fathom_session_get_info(s, &info, err));
  EXPECT(info.n_tokens == 3);

  /* The context ends at 64: nothing changes, and the session goes on. */
  EXPECT_OK(fathom_session_prefill(s, ids, 16, NULL, err));
  for (i = 0; i < 128; ++i) held[i] = 5;
  EXPECT_CODE(FATHOM_E_CONTEXT_FULL, fathom_session_prefill(s, held, 128, NULL, err));
  EXPECT_OK(fathom_session_get_info(s, &info, err));
  EXPECT(info.n_tokens == 19);
  EXPECT_OK(fathom_session_prefill(s, held, 45, NULL, err));
  EXPECT_CODE(FATHOM_E_CONTEXT_FULL, fathom_session_step(s, 5, err));
  fathom_session_free(s);
}

static void test_run(const Fixture* f) {
  fathom_run run = {.struct_size = sizeof run};
  fathom_session_info info = {.struct_size = sizeof info};
  fathom_cancel* cancel = NULL;
  fathom_model* model = NULL;
  fathom_token ids[64];
  Seen seen;
  uint64_t n;
  memset(&seen, 0, sizeof seen);
  n = tokens_of(f, kText, ids, 64);
  EXPECT(n > 16); /* more than a chunk */

  run.user = &seen;
  run.progress = on_progress;
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n, &run, err));
  EXPECT(seen.phase == FATHOM_PHASE_PREFILL && seen.last == n && seen.calls >= 2);
  /* Stopped after the first chunk: that chunk is kept. */
  memset(&seen, 0, sizeof seen);
  seen.stop_after = 2;
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_CODE(FATHOM_E_CANCELLED, fathom_session_prefill(f->session, ids, n, &run, err));
  EXPECT_OK(fathom_session_get_info(f->session, &info, err));
  EXPECT(info.n_tokens == 16);
  /* Every position's logits. */
  memset(&seen, 0, sizeof seen);
  run.progress = NULL;
  run.on_logits = on_logits;
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n, &run, err));
  EXPECT(seen.calls == n);
  seen.calls = 0;
  seen.stop_after = 3;
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_CODE(FATHOM_E_CALLBACK, fathom_session_prefill(f->session, ids, n, &run, err));
  run.on_logits = NULL;
  run.chunk = 17;
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_prefill(f->session, ids, n, &run, err));
  run.chunk = 3;
  run.deadline_ms = FATHOM_ALL;
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n, &run, err));

  EXPECT_OK(fathom_cancel_create(&cancel, err));
  run.cancel = cancel;
  fathom_cancel_request(cancel);
  fathom_cancel_request(cancel);
  EXPECT_CODE(FATHOM_E_CANCELLED, fathom_session_prefill(f->session, ids, n, &run, err));
  EXPECT_CODE(FATHOM_E_CANCELLED, fathom_model_load(f->engine, f->plan, &run, &model, err));
  EXPECT(model == NULL);
  fathom_cancel_reset(cancel);
  EXPECT_OK(fathom_session_prefill(f->session, ids, n, &run, err));
  fathom_cancel_free(cancel);
  fathom_cancel_request(NULL);
  fathom_cancel_reset(NULL);
  fathom_cancel_free(NULL);

  memset(&run, 0, sizeof run);
  memset(&seen, 0, sizeof seen);
  run.struct_size = sizeof run;
  run.user = &seen;
  run.progress = on_progress;
  EXPECT_OK(fathom_model_load(f->engine, f->plan, &run, &model, err));
  EXPECT(seen.phase == FATHOM_PHASE_LOAD && seen.last > 4000000);
  fathom_model_free(model);
}

static void test_generate(const Fixture* f) {
  fathom_generate_params params = {.struct_size = sizeof params};
  fathom_generate_result result = {.struct_size = sizeof result};
  fathom_sampler_params sampling = {.struct_size = sizeof sampling, .temperature = 1, .seed = 4};
  fathom_run run = {.struct_size = sizeof run};
  fathom_cancel* cancel = NULL;
  fathom_sampler* sampler = NULL;
  fathom_token ids[64], expected[12], got[12], sampled[12];
  const char* stops[1];
  const float* logits = NULL;
  char word[64];
  Seen seen;
  uint64_t n_prompt, n = 0, len = 0, i;
  n_prompt = tokens_of(f, kText, ids, 64);

  /* By hand: pick and step. */
  EXPECT_OK(fathom_sampler_create(NULL, &sampler, err));
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_CODE(FATHOM_E_STATE, fathom_session_generate(f->session, NULL, NULL, NULL, &result, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n_prompt, NULL, err));
  for (i = 0; i < 12; ++i) {
    EXPECT_OK(fathom_session_logits_view(f->session, &logits, &n, err));
    EXPECT_OK(fathom_sampler_pick(sampler, logits, n, NULL, 0, &expected[i], err));
    EXPECT_OK(fathom_session_step(f->session, expected[i], err));
  }
  fathom_sampler_free(sampler);

  /* The same by generate, in two calls. */
  memset(&seen, 0, sizeof seen);
  params.max_new_tokens = 5;
  params.flags = FATHOM_GENERATE_IGNORE_EOS;
  params.on_token = on_token;
  params.user = &seen;
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n_prompt, NULL, err));
  EXPECT_OK(fathom_session_generate(f->session, NULL, &params, NULL, &result, err));
  EXPECT(result.stop_reason == FATHOM_STOP_LENGTH && result.n_new_tokens == 5);
  EXPECT(seen.calls >= 5 && seen.last == n_prompt + 4 && result.end_code == FATHOM_OK);
  params.max_new_tokens = 7;
  EXPECT_OK(fathom_session_generate(f->session, NULL, &params, NULL, NULL, err));
  EXPECT_OK(fathom_session_tokens(f->session, n_prompt, got, 12, &n, err));
  EXPECT(n == 12 && memcmp(got, expected, sizeof got) == 0);
  EXPECT(strlen(seen.text) > 10);

  /* Stops: a token, a string, the callback, a cancel, the deadline. */
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n_prompt, NULL, err));
  params.stop_ids = &expected[2];
  params.n_stop_ids = 1;
  EXPECT_OK(fathom_session_generate(f->session, NULL, &params, NULL, &result, err));
  EXPECT(result.stop_reason == FATHOM_STOP_STOP && result.n_new_tokens <= 3);
  params.n_stop_ids = 0;
  EXPECT_OK(fathom_detokenize(f->tokenizer, &expected[3], 1, 0, word, sizeof word, &len, err));
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n_prompt, NULL, err));
  memset(&seen, 0, sizeof seen);
  stops[0] = word;
  params.stop_strings = stops;
  params.n_stop_strings = 1;
  EXPECT_OK(fathom_session_generate(f->session, NULL, &params, NULL, &result, err));
  EXPECT(result.stop_reason == FATHOM_STOP_STOP && result.n_new_tokens <= 4);
  EXPECT(strstr(seen.text, word) == NULL);
  params.n_stop_strings = 0;
  memset(&seen, 0, sizeof seen);
  seen.stop_after = 2;
  EXPECT_OK(fathom_session_generate(f->session, NULL, &params, NULL, &result, err));
  EXPECT(result.stop_reason == FATHOM_STOP_CALLBACK && result.n_new_tokens == 2);
  EXPECT_OK(fathom_cancel_create(&cancel, err));
  fathom_cancel_request(cancel);
  run.cancel = cancel;
  EXPECT_OK(fathom_session_generate(f->session, NULL, &params, &run, &result, err));
  EXPECT(result.stop_reason == FATHOM_STOP_CANCELLED && result.n_new_tokens == 0);
  fathom_cancel_free(cancel);
  run.cancel = NULL;
  run.deadline_ms = 1;
  params.max_new_tokens = FATHOM_ALL;
  params.on_token = NULL;
  EXPECT_OK(fathom_session_generate(f->session, NULL, &params, &run, &result, err));
  EXPECT(result.stop_reason == FATHOM_STOP_DEADLINE ||
         result.stop_reason == FATHOM_STOP_CONTEXT_FULL);
  /* To the end of the context. */
  EXPECT_OK(fathom_session_generate(f->session, NULL, &params, NULL, &result, err));
  EXPECT(result.stop_reason == FATHOM_STOP_CONTEXT_FULL &&
         result.end_code == FATHOM_E_CONTEXT_FULL);

  /* A sampler's stream goes on over calls: 12 tokens at once are 5 and 7. */
  params.max_new_tokens = 12;
  EXPECT_OK(fathom_sampler_create(&sampling, &sampler, err));
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n_prompt, NULL, err));
  EXPECT_OK(fathom_session_generate(f->session, sampler, &params, NULL, &result, err));
  EXPECT_OK(fathom_session_tokens(f->session, n_prompt, sampled, 12, &n, err));
  EXPECT_OK(fathom_sampler_reset(sampler, 4, err));
  EXPECT_OK(fathom_session_truncate(f->session, 0, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, n_prompt, NULL, err));
  for (params.max_new_tokens = 5; params.max_new_tokens <= 7; params.max_new_tokens += 2)
    EXPECT_OK(fathom_session_generate(f->session, sampler, &params, NULL, &result, err));
  EXPECT_OK(fathom_session_tokens(f->session, n_prompt, got, 12, &n, err));
  EXPECT(n == 12 && memcmp(got, sampled, sizeof got) == 0);
  fathom_sampler_free(sampler);
}

static void test_memory(const Fixture* f) {
  fathom_memory_item items[N_CATEGORIES];
  struct {
    fathom_memory_item item;
    uint64_t future;
  } newer[N_CATEGORIES];
  uint64_t n = 0;
  int i;
  memset(items, 0, sizeof items);
  items[0].struct_size = sizeof items[0];
  EXPECT_OK(fathom_memory_snapshot(f->engine, NULL, 0, &n, err));
  EXPECT(n == N_CATEGORIES);
  EXPECT_OK(fathom_memory_snapshot(f->engine, items, N_CATEGORIES, &n, err));
  for (i = 0; i < N_CATEGORIES; ++i) {
    EXPECT(items[i].struct_size == sizeof items[0] && items[i].device == 0 &&
           items[i].category == i);
    EXPECT(items[i].bytes_now <= items[i].bytes_peak && items[i].bytes_budget > 0);
  }
  EXPECT(items[FATHOM_CAT_WEIGHTS].bytes_now > 0 && items[FATHOM_CAT_EXPERTS].bytes_now > 0);
  EXPECT(items[FATHOM_CAT_KV].bytes_peak > 0 && items[FATHOM_CAT_KV].bytes_planned > 0);
  EXPECT_CODE(FATHOM_E_BUFFER_TOO_SMALL, fathom_memory_snapshot(f->engine, items, N_CATEGORIES - 1, &n, err));
  EXPECT(n == N_CATEGORIES);
  /* A header of a later version: its struct is the stride, what we do not know is zero. */
  memset(newer, 0x77, sizeof newer);
  newer[0].item.struct_size = sizeof newer[0];
  EXPECT_OK(fathom_memory_snapshot(f->engine, &newer[0].item, N_CATEGORIES, &n, err));
  for (i = 0; i < N_CATEGORIES; ++i)
    EXPECT(newer[i].item.category == i && newer[i].future == 0 &&
           newer[i].item.bytes_peak == items[i].bytes_peak);
}

/* Steps seen by on_step, and what each said. */
typedef struct StepLog {
  int n_prefill, n_generate, stop_after;
  uint64_t n_new, last_tokens, bytes_now;
} StepLog;

static int32_t FATHOM_CALL log_step(void* user, const fathom_step* step) {
  StepLog* log = (StepLog*)user;
  uint64_t i;
  EXPECT(step->struct_size == sizeof *step && step->n_items == N_CATEGORIES && step->ms >= 0);
  EXPECT(step->bytes_kv > 0);
  log->bytes_now = 0;
  for (i = 0; i < step->n_items; ++i) {
    const fathom_memory_item* item =
        (const fathom_memory_item*)((const char*)step->items + i * step->items->struct_size);
    EXPECT(item->category == (int32_t)i && item->bytes_budget > 0);
    log->bytes_now += item->bytes_now;
  }
  if (step->phase == FATHOM_PHASE_PREFILL)
    ++log->n_prefill;
  else
    ++log->n_generate;
  log->n_new += step->n_new;
  log->last_tokens = step->n_tokens;
  return log->n_prefill + log->n_generate == log->stop_after;
}

static void test_steps(const Fixture* f) {
  fathom_error error = {.struct_size = sizeof error}, *err = &error;
  StepLog log = {0, 0, 0, 0, 0, 0};
  fathom_run run = {.struct_size = sizeof run, .user = &log, .on_step = log_step};
  fathom_generate_params params = {
      .struct_size = sizeof params, .max_new_tokens = 9, .flags = FATHOM_GENERATE_IGNORE_EOS};
  fathom_generate_result result = {.struct_size = sizeof result};
  fathom_memory_item items[N_CATEGORIES];
  fathom_token ids[40] = {0};
  uint64_t n, now = 0;
  int i;
  fathom_session* session = NULL;
  EXPECT_OK(fathom_session_create(f->model, NULL, &session, err));
  EXPECT_OK(fathom_session_prefill(session, ids, 40, &run, err));
  EXPECT(log.n_prefill == 3 && log.n_new == 40 && log.last_tokens == 40); /* chunks of 16 */
  EXPECT_OK(fathom_session_generate(session, NULL, &params, &run, &result, err));
  EXPECT(log.n_generate == 9 && log.n_new == 49 && log.last_tokens == 49);
  memset(items, 0, sizeof items);
  items[0].struct_size = sizeof items[0];
  EXPECT_OK(fathom_memory_snapshot(f->engine, items, N_CATEGORIES, &n, err));
  for (i = 0; i < N_CATEGORIES; ++i) now += items[i].bytes_now;
  EXPECT(now == log.bytes_now); /* the last report is what is held now */

  log.stop_after = 14;
  EXPECT_OK(fathom_session_generate(session, NULL, &params, &run, &result, err));
  EXPECT(result.stop_reason == FATHOM_STOP_CALLBACK && result.n_new_tokens == 2);
  log.stop_after = 15;
  EXPECT_CODE(FATHOM_E_CALLBACK, fathom_session_prefill(session, ids, 40, &run, err));
  EXPECT(log.last_tokens == 51 + 16);
  fathom_session_free(session);
}

static void test_forecast(const Fixture* f) {
  fathom_error error = {.struct_size = sizeof error}, *err = &error;
  fathom_budget_forecast items[2];
  fathom_device_info device = {.struct_size = sizeof device};
  fathom_token ids[40] = {0};
  uint64_t n = 0, end = 0;
  fathom_session* session = NULL;
  int32_t code = 0;
  EXPECT_OK(fathom_session_create(f->model, NULL, &session, err));
  EXPECT_OK(fathom_session_prefill(session, ids, 40, NULL, err));
  EXPECT_OK(fathom_session_forecast(session, NULL, 0, &n, &end, err));
  EXPECT(n == 2 && end == 256);
  EXPECT_OK(fathom_engine_device(f->engine, 0, &device, NULL, err));
  EXPECT_OK(fathom_engine_set_budget(f->engine, 0, device.bytes_now, err));
  memset(items, 0, sizeof items);
  items[0].struct_size = sizeof items[0];
  EXPECT_CODE(FATHOM_E_BUFFER_TOO_SMALL,
              fathom_session_forecast(session, items, 1, &n, NULL, err));
  EXPECT_OK(fathom_session_forecast(session, items, 2, &n, &end, err));
  EXPECT(items[0].device == 0 && strcmp(items[0].name, "cpu") == 0);
  EXPECT(items[0].bytes_budget == device.bytes_now && items[0].bytes_now == device.bytes_now);
  EXPECT(items[1].device == -1 && strcmp(items[1].name, "host") == 0);
  EXPECT(items[1].n_tokens_end == 256 && items[1].then == FATHOM_THEN_FULL);
  EXPECT(items[0].n_tokens_end == end && end >= 40 && end < 256);
  while (n < 300 && code == 0) {
    code = fathom_session_step(session, 3, err);
    n += code == 0;
  }
  EXPECT(code == FATHOM_E_CONTEXT_FULL || code == FATHOM_E_BUDGET);
  EXPECT(n - 2 + 40 == end);
  EXPECT_OK(fathom_engine_set_budget(f->engine, 0, device.bytes_budget, err));
  fathom_session_free(session);
}

static void test_timeline(const Fixture* f) {
  fathom_error error = {.struct_size = sizeof error}, *err = &error;
  const fathom_token ids[] = {5, 6, 7};
  char path[64], start[16] = "";
  FILE* file;
  EXPECT_CODE(FATHOM_E_STATE, fathom_timeline_write(f->engine, "/tmp/x.html", NULL, err));
  EXPECT_CODE(FATHOM_E_STATE, fathom_timeline_stop(f->engine, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_timeline_start(f->engine, 2001, err));
  EXPECT_OK(fathom_timeline_start(f->engine, 0, err));
  EXPECT_CODE(FATHOM_E_STATE, fathom_timeline_start(f->engine, 100, err));
  EXPECT_OK(fathom_session_prefill(f->session, ids, 3, NULL, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_timeline_write(f->engine, "/tmp/x.png", NULL, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_timeline_write(f->engine, "/tmp/x", "trace", err));
  EXPECT_CODE(FATHOM_E_NOT_FOUND,
              fathom_timeline_write(f->engine, "/no/such/folder/x.svg", NULL, err));
  snprintf(path, sizeof path, "/tmp/fathom-capi-%p.html", (void*)f->engine);
  EXPECT_OK(fathom_timeline_write(f->engine, path, NULL, err));
  file = fopen(path, "r");
  EXPECT(file && fread(start, 1, 15, file) == 15 && strcmp(start, "<!doctype html>") == 0);
  if (file) fclose(file);
  EXPECT_OK(fathom_timeline_write(f->engine, path, "csv", err)); /* the name decides nothing now */
  file = fopen(path, "r");
  EXPECT(file && fread(start, 1, 15, file) == 15 && strcmp(start, "seconds,device,") == 0);
  if (file) fclose(file);
  remove(path);
  EXPECT_OK(fathom_timeline_stop(f->engine, err));
}

static int32_t count_memory(void* user, int32_t device, int32_t category, int64_t delta,
                            uint64_t total) {
  int64_t* held = user;
  EXPECT(device == 0 && category >= 0 && category < 8);
  *held += delta;
  EXPECT(*held >= 0 && (uint64_t)*held == total);
  return 0;
}

static void test_parents_first(void) {
  fathom_host host = {.struct_size = sizeof host};
  fathom_token ids[64];
  int64_t held = 0;
  uint64_t n;
  Fixture f;
  host.user = &held;
  host.memory = count_memory;
  f = open_fixture(FATHOM_EXAMPLE_MODEL, &host);
  EXPECT(held > 4000000);
  n = tokens_of(&f, kText, ids, 64);
  fathom_engine_free(f.engine);
  fathom_plan_free(f.plan);
  fathom_model_free(f.model);
  fathom_tokenizer_free(f.tokenizer);
  EXPECT_OK(fathom_session_prefill(f.session, ids, n, NULL, err));
  EXPECT_OK(fathom_session_generate(f.session, NULL, NULL, NULL, NULL, err));
  fathom_session_free(f.session);
  /* What the engine itself holds goes without asking; all the rest has been given back. */
  EXPECT(held >= 0 && held < 4000000);
}

/* Runs `work` in a child whose stdout and stderr are a file or closed; returns the bytes written
 * there, or -1 when the child failed. */
static long in_quiet_child(void (*work)(void), int close_them) {
  char path[] = "/tmp/fathom_capi_XXXXXX";
  const int file = mkstemp(path);
  struct stat state;
  int status = 0;
  pid_t child = fork();
  if (child == 0) {
    if (close_them) {
      close(1);
      close(2);
    } else {
      dup2(file, 1);
      dup2(file, 2);
    }
    close(file);
    work();
    fflush(NULL);
    _exit(failures != 0);
  }
  waitpid(child, &status, 0);
  fstat(file, &state);
  close(file);
  unlink(path);
  return status == 0 ? (long)state.st_size : -1;
}

static void whole_life(void) {
  Fixture f = open_fixture(FATHOM_EXAMPLE_MODEL, NULL);
  fathom_plan* plan = NULL;
  fathom_token ids[64];
  const uint64_t n = tokens_of(&f, kText, ids, 64);
  EXPECT_OK(fathom_session_prefill(f.session, ids, n, NULL, err));
  EXPECT_OK(fathom_session_generate(f.session, NULL, NULL, NULL, NULL, err));
  EXPECT_CODE(FATHOM_E_NOT_FOUND, fathom_plan_create(f.engine, "/no/such", NULL, &plan, err));
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_step(f.session, -1, err));
  close_fixture(&f);
}

static void test_quiet(void) {
  EXPECT(in_quiet_child(whole_life, 0) == 0);
  EXPECT(in_quiet_child(whole_life, 1) == 0);
}

/* A saved session in memory; both functions move at most 1,000 bytes at a time. */
static unsigned char saved_bytes[1 << 20];
static uint64_t n_saved;

static int64_t FATHOM_CALL write_some(void* user, const void* src, uint64_t n) {
  (void)user;
  if (n > 1000) n = 1000;
  if (n_saved + n > sizeof saved_bytes) return -28; /* ENOSPC */
  memcpy(saved_bytes + n_saved, src, n);
  n_saved += n;
  return (int64_t)n;
}
static int64_t FATHOM_CALL read_some(void* user, uint64_t offset, void* dst, uint64_t n) {
  (void)user;
  if (n > 1000) n = 1000;
  memcpy(dst, saved_bytes + offset, n);
  return (int64_t)n;
}
static int64_t FATHOM_CALL write_full(void* user, const void* src, uint64_t n) {
  (void)user, (void)src, (void)n;
  return -28;
}

static void test_save_restore(const Fixture* f) {
  fathom_error error = {.struct_size = sizeof error}, *err = &error;
  const fathom_token ids[] = {5, 6, 7, 8, 9};
  const float *before, *after;
  uint64_t n_before, n_after;
  fathom_session *session = NULL, *again = NULL;
  EXPECT_OK(fathom_session_create(f->model, NULL, &session, err));
  EXPECT_OK(fathom_session_prefill(session, ids, 5, NULL, err));
  n_saved = 0;
  EXPECT_OK(fathom_session_save_io(session, write_some, NULL, NULL, err));
  EXPECT_OK(fathom_session_restore_io(f->model, read_some, NULL, n_saved, NULL, NULL, &again, err));
  EXPECT_OK(fathom_session_step(session, 3, err));
  EXPECT_OK(fathom_session_step(again, 3, err));
  EXPECT_OK(fathom_session_logits_view(session, &before, &n_before, err));
  EXPECT_OK(fathom_session_logits_view(again, &after, &n_after, err));
  EXPECT(n_before == n_after && memcmp(before, after, n_before * sizeof *before) == 0);
  {
    fathom_session* both[2];
    const fathom_token next[2] = {4, 4};
    both[0] = session, both[1] = again;
    EXPECT_OK(fathom_session_step_batch(both, next, 2, NULL, err));
    EXPECT_OK(fathom_session_logits_view(session, &before, &n_before, err));
    EXPECT_OK(fathom_session_logits_view(again, &after, &n_after, err));
    EXPECT(n_before == n_after && memcmp(before, after, n_before * sizeof *before) == 0);
    both[1] = session;
    EXPECT_CODE(FATHOM_E_BUSY, fathom_session_step_batch(both, next, 2, NULL, err));
    EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_step_batch(both, next, 0, NULL, err));
    EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_step_batch(NULL, next, 2, NULL, err));
    EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_step_batch(both, NULL, 2, NULL, err));
  }
  fathom_session_free(again);

  EXPECT_CODE(FATHOM_E_IO, fathom_session_save_io(session, write_full, NULL, NULL, err));
  EXPECT(err->sys_errno == 28);
  saved_bytes[n_saved / 2] ^= 1;
  EXPECT_CODE(FATHOM_E_CHECKSUM, fathom_session_restore_io(f->model, read_some, NULL, n_saved, NULL,
                                                           NULL, &again, err));
  EXPECT(again == NULL);
  EXPECT_CODE(FATHOM_E_ARGUMENT, fathom_session_save(session, "/dev/full", NULL, err));
  EXPECT_CODE(FATHOM_E_NOT_FOUND,
              fathom_session_restore(f->model, "/no/such", NULL, NULL, &again, err));
  fathom_session_free(session);
}

int main(void) {
  Fixture f;
  test_quiet(); /* before this process has threads */
  test_library();
  test_config();
  test_engine();
  test_simulation();
  test_sampler();
  f = open_fixture(FATHOM_EXAMPLE_MODEL, NULL);
  test_plan(&f);
  test_model(&f);
  test_tokenizer(&f);
  test_session(&f);
  test_run(&f);
  test_generate(&f);
  test_memory(&f);
  test_steps(&f);
  test_forecast(&f);
  test_timeline(&f);
  test_save_restore(&f);
  close_fixture(&f);
  test_allocator();
  test_parents_first();
  if (failures == 0) puts("all passed");
  return failures != 0;
}
