/* Handles of a model with a small context, for the tests of the C interface.  C99 and C++. */
#ifndef FATHOM_TESTS_CAPI_FIXTURE_H
#define FATHOM_TESTS_CAPI_FIXTURE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "capi/fathom.h"

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
        config,
        "{\"context.max\": 256, \"prefill.chunk\": 16, \"threads\": 1, \"kv.page_tokens\": 64}",
        FATHOM_NTS, &err);
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
