/* Continues a text:  hello_c examples/models/trained.Q8_0.gguf "Once upon a time"
 * Build:  cc hello.c -lfathom */
#include <fathom.h>
#include <stdio.h>

static int32_t print(void* user, fathom_token id, const char* utf8, uint64_t len, uint64_t pos) {
  (void)user, (void)id, (void)pos;
  return fwrite(utf8, 1, (size_t)len, stdout) != len; /* non-zero would stop */
}

int main(int argc, char** argv) {
  fathom_engine* engine = NULL;
  fathom_plan* plan = NULL;
  fathom_model* model = NULL;
  fathom_tokenizer* tokenizer = NULL;
  fathom_session* session = NULL;
  fathom_generate_params params = {
      .struct_size = sizeof params, .max_new_tokens = 64, .on_token = print};
  fathom_error err = {.struct_size = sizeof err};
  fathom_token ids[4096];
  uint64_t n = 0;
  if (argc != 3) return fprintf(stderr, "usage: %s MODEL TEXT\n", argv[0]), 2;

  int32_t code = fathom_engine_create(NULL, NULL, &engine, &err);
  if (code == 0) code = fathom_plan_create(engine, argv[1], NULL, &plan, &err);
  if (code == 0) code = fathom_model_load(engine, plan, NULL, &model, &err);
  if (code == 0) code = fathom_tokenizer_of(model, &tokenizer, &err);
  if (code == 0)
    code = fathom_tokenize(tokenizer, argv[2], FATHOM_NTS, FATHOM_TOK_ADD_BOS, ids, 4096, &n, &err);
  if (code == 0) code = fathom_session_create(model, NULL, &session, &err);
  if (code == 0) code = fathom_session_prefill(session, ids, n, NULL, &err);
  if (code == 0) code = fathom_session_generate(session, NULL, &params, NULL, NULL, &err);
  if (code != 0)
    fprintf(stderr, "%s: %s\n", fathom_status_name(code), err.message);
  else
    puts("");

  fathom_session_free(session); /* in any order; NULL is fine */
  fathom_tokenizer_free(tokenizer);
  fathom_model_free(model);
  fathom_plan_free(plan);
  fathom_engine_free(engine);
  return code != 0;
}
