/* What the tests of the C interface share: checks that go on and count, and handles of the example
 * model.  C99 and C++. */
#ifndef FATHOM_TESTS_CAPI_SUPPORT_H
#define FATHOM_TESTS_CAPI_SUPPORT_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "capi/fathom.h"

static int failures = 0;

#define CHECK_THAT(condition)                                                           \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      ++failures;                                                                       \
      fprintf(stderr, "%s:%d: %s: not %s\n", __FILE__, __LINE__, __func__, #condition); \
    }                                                                                   \
  } while (0)

/* The call returns this code and fills *err accordingly. */
#define CHECK_CODE(expected, call)                                                              \
  do {                                                                                          \
    const int32_t expected_code = (expected);                                                   \
    int32_t returned_code;                                                                      \
    memset(err, 0x5a, sizeof *err);                                                             \
    err->struct_size = (uint32_t)sizeof *err;                                                   \
    returned_code = (call);                                                                     \
    if (returned_code != expected_code) {                                                       \
      ++failures;                                                                               \
      fprintf(stderr, "%s:%d: %s: %s is %s, not %s: %s\n", __FILE__, __LINE__, __func__, #call, \
              fathom_status_name(returned_code), fathom_status_name(expected_code),             \
              returned_code < 0 ? err->message : "");                                           \
    }                                                                                           \
    if (returned_code < 0) {                                                                    \
      CHECK_THAT(err->code == returned_code);                                                   \
      CHECK_THAT(err->message[0] != 'Z' && strlen(err->message) < sizeof err->message);         \
    } else {                                                                                    \
      CHECK_THAT(err->code == 0x5a5a5a5a);                                                      \
    }                                                                                           \
  } while (0)

#define CHECK_OK(call) CHECK_CODE(FATHOM_OK, call)

typedef struct Fixture {
  fathom_engine* engine;
  fathom_plan* plan;
  fathom_model* model;
  fathom_tokenizer* tokenizer;
  fathom_session* session;
} Fixture;

/* Engine to session of a model, with a small context.  Stops the program when it fails. */
static Fixture open_fixture(const char* path, const fathom_host* host) {
  Fixture f = {NULL, NULL, NULL, NULL, NULL};
  fathom_config* config = NULL;
  fathom_error err;
  int32_t code;
  memset(&err, 0, sizeof err);
  err.struct_size = (uint32_t)sizeof err;
  code = fathom_config_create(&config, &err);
  if (code == 0)
    code = fathom_config_merge_json(
        config, "{\"context.max\": 256, \"prefill.chunk\": 16, \"threads\": 1}", FATHOM_NTS, &err);
  if (code == 0) code = fathom_engine_create(config, host, &f.engine, &err);
  if (code == 0) code = fathom_plan_create(f.engine, path, NULL, &f.plan, &err);
  if (code == 0) code = fathom_model_load(f.engine, f.plan, NULL, &f.model, &err);
  if (code == 0) code = fathom_tokenizer_of(f.model, &f.tokenizer, &err);
  if (code == 0) code = fathom_session_create(f.model, NULL, &f.session, &err);
  if (code != 0) {
    fprintf(stderr, "%s: %s: %s\n", path, fathom_status_name(code), err.message);
    exit(1);
  }
  fathom_config_free(config);
  return f;
}

static void close_fixture(Fixture* f) {
  fathom_session_free(f->session);
  fathom_tokenizer_free(f->tokenizer);
  fathom_model_free(f->model);
  fathom_plan_free(f->plan);
  fathom_engine_free(f->engine);
}

#endif
