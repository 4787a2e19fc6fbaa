/* clang-format off */
/* fathom.h - the C interface of Fathom: DeepSeek-family models, long text without memory surprises.
 * One header, C89 to C17 and C++98 to C++20, nothing needed but <stdint.h>.  Read it from top to
 * bottom: what every call has in common, then library, configuration, engine, cancellation, plan,
 * model, tokenizer, sampler, session, memory.  examples/hello.c is a whole program.
 *
 * THE CONTRACT
 *
 *  1. Return.  Every function that can fail returns int32_t: FATHOM_OK (0) or a negative
 *     FATHOM_E_*.  Its last argument is "fathom_error *err", which may be NULL: caller-owned, written
 *     completely on failure, left alone on success.  Nothing in it needs freeing.
 *  2. Handles are returned through an out-argument, which is set to NULL before anything can fail.
 *     A NULL handle or NULL required pointer is FATHOM_E_ARGUMENT, never a crash.
 *  3. A failed call leaves every handle as it was, except: FATHOM_E_DEVICE (the session is poisoned,
 *     only its free works, all else answers FATHOM_E_STATE), and prefill and generate, which keep
 *     the chunks and tokens that were finished (fathom_session_get_info says how many).
 *  4. Lifetime.  Children hold their parents: an engine may be freed while its models live.  Every
 *     free accepts NULL.  There is no init and no shutdown call, and no global state.
 *  5. Threads.  Engine, plan, model, tokenizer: any number of threads at once.  Config, sampler,
 *     session: one thread at a time, any thread; a second one gets FATHOM_E_BUSY.  Different
 *     sessions of one model may run at once.  fathom_cancel_request: from anywhere, signal handlers
 *     included.
 *  6. Callbacks run only on the thread that made the call, with "user" as their first argument.
 *     Inside one, only fathom_cancel_request, the *_get_info functions of handles not in use,
 *     fathom_version, fathom_version_string and fathom_status_name may be called: all else returns
 *     FATHOM_E_BUSY, and frees do nothing.  A callback must not longjmp.  A C++ exception thrown by
 *     one is caught; the call stops and returns FATHOM_E_CALLBACK.
 *  7. The library never writes to stdout or stderr, reads no environment variable, and changes no
 *     locale, signal handler, working directory or floating-point mode; numbers in text have a
 *     decimal point in every locale; no thread outlives its engine.
 *  8. Structs start with struct_size, the caller's sizeof.  Set all else to zero, then what you
 *     need: zero always means the default.
 *       C99:  fathom_run run = {.struct_size = sizeof run};
 *       C++:  fathom_run run = {}; run.struct_size = sizeof run;
 *     An older, shorter struct: what is missing has its default.  A newer, longer one: accepted when
 *     the part we do not know is zero, else FATHOM_E_VERSION; in structs we fill, that part becomes
 *     zero.  Unknown flags are refused.  Fields are never removed, moved or reused.  Values of
 *     enumerations may be added: tolerate those you do not know.
 *  9. Memory.  No block above 64 KiB bypasses the accounting.  FATHOM_E_BUDGET is a limit you set;
 *     FATHOM_E_MEMORY is the system's.
 * 10. A cancelled call returns after at most one layer of one chunk.
 * 11. Strings in: UTF-8, with a length where there is a length argument (FATHOM_NTS: ends with NUL).
 *     Strings and arrays out: (buf, cap, *len).  *len becomes the whole length, for strings without
 *     the NUL, which needs one more in cap.  buf NULL and cap 0 only asks for the length; a cap that
 *     is too small gives FATHOM_E_BUFFER_TOO_SMALL and leaves buf alone.
 * 12. After fork() the child's handles answer FATHOM_E_FORKED and their frees do nothing.
 *
 * Errors that any function may return are not repeated below: E_ARGUMENT, E_BUSY, E_FORKED,
 * E_MEMORY, E_VERSION, E_CALLBACK (a hook threw or refused), E_INTERNAL.
 */
#ifndef FATHOM_H
#define FATHOM_H

#include <stdint.h>

#if defined(_WIN32)
#if defined(FATHOM_BUILD)
#define FATHOM_API __declspec(dllexport)
#elif defined(FATHOM_STATIC)
#define FATHOM_API
#else
#define FATHOM_API __declspec(dllimport)
#endif
#define FATHOM_CALL __cdecl
#else
#if defined(__GNUC__)
#define FATHOM_API __attribute__((visibility("default")))
#else
#define FATHOM_API
#endif
#define FATHOM_CALL
#endif

#define FATHOM_VERSION_MAJOR 0
#define FATHOM_VERSION_MINOR 1
#define FATHOM_VERSION_PATCH 0
#define FATHOM_NTS (~(uint64_t)0) /* this string ends with NUL */
#define FATHOM_ALL (~(uint64_t)0) /* no limit */

#ifdef __cplusplus
extern "C" {
#endif

/* ---- codes; never renumbered --------------------------------------------------------------- */
#define FATHOM_OK 0
#define FATHOM_E_ARGUMENT (-1)         /* NULL, out of range, bad struct_size, unknown flag */
#define FATHOM_E_STATE (-2)            /* order of calls; poisoned handle */
#define FATHOM_E_BUSY (-3)             /* in use by another thread, or called in a callback */
#define FATHOM_E_BUFFER_TOO_SMALL (-4) /* *len says what is needed */
#define FATHOM_E_NOT_FOUND (-5)        /* file, metadata key, device */
#define FATHOM_E_UNSUPPORTED (-6)      /* known, but not in this build or on this machine */
#define FATHOM_E_CONFIG (-7)           /* unknown key, bad value, conflict; key names it */
#define FATHOM_E_FORMAT (-8)           /* malformed file; offset and key say where */
#define FATHOM_E_CHECKSUM (-9)
#define FATHOM_E_VERSION (-10)  /* file or header newer than this library */
#define FATHOM_E_MISMATCH (-11) /* not the file that was planned; session of another model */
#define FATHOM_E_BUDGET (-12)   /* a budget would be exceeded; bytes_needed, bytes_available */
#define FATHOM_E_MEMORY (-13)   /* the system refused memory */
#define FATHOM_E_DEVICE (-14)   /* driver or device error; the session is poisoned */
#define FATHOM_E_IO (-15)       /* sys_errno is set */
#define FATHOM_E_CONTEXT_FULL (-16)
#define FATHOM_E_CANCELLED (-17) /* by a cancel handle, a deadline or the progress callback */
#define FATHOM_E_CALLBACK (-18)  /* a callback refused or threw */
#define FATHOM_E_NUMERIC (-19)   /* NaN or infinity in the logits */
#define FATHOM_E_FORKED (-20)
#define FATHOM_E_INTERNAL (-21) /* a defect of ours */

/* What went wrong, for people and programs.  512 bytes; put it on the stack. */
typedef struct fathom_error {
  uint32_t struct_size;     /* below 8: nothing is written */
  int32_t code;             /* as returned */
  int32_t sys_errno;        /* errno, 0 if none */
  int32_t device;           /* index, -1 if none */
  uint64_t bytes_needed;    /* BUDGET, MEMORY, BUFFER_TOO_SMALL */
  uint64_t bytes_available; /* BUDGET, MEMORY */
  uint64_t offset;          /* FORMAT, CONFIG: byte in the file or JSON text */
  char key[64];             /* config key, tensor or metadata name; "" if none */
  char message[408];        /* names the thing, the value and the bound; UTF-8, ends with NUL */
} fathom_error;

/* ---- handles; opaque ------------------------------------------------------------------------- */
typedef struct fathom_config fathom_config;
typedef struct fathom_engine fathom_engine;
typedef struct fathom_cancel fathom_cancel;
typedef struct fathom_plan fathom_plan;
typedef struct fathom_model fathom_model;
typedef struct fathom_tokenizer fathom_tokenizer;
typedef struct fathom_sampler fathom_sampler;
typedef struct fathom_session fathom_session;
typedef int32_t fathom_token; /* 0 .. n_vocab - 1 */

/* ---- what memory is for ------------------------------------------------------------------------ */
#define FATHOM_CAT_WEIGHTS 0     /* all weights but the routed experts */
#define FATHOM_CAT_EXPERTS 1     /* routed experts */
#define FATHOM_CAT_KV 2          /* cache pages */
#define FATHOM_CAT_ACTIVATIONS 3 /* buffers of the forward pass, logits */
#define FATHOM_CAT_WORKSPACE 4   /* scratch inside operations */
#define FATHOM_CAT_STAGING 5     /* file and transfer buffers */
#define FATHOM_CAT_TOKENIZER 6   /* vocabulary and merges */
#define FATHOM_CAT_RUNTIME 7     /* thread stacks, device contexts, token history */
#define FATHOM_CAT_EXPERT_CACHE 8 /* copies of routed experts in idle memory (experts.cache) */

/* Bytes of one category on one device. */
typedef struct fathom_memory_item {
  uint32_t struct_size;
  int32_t device;
  int32_t category; /* FATHOM_CAT_* */
  uint32_t reserved;
  uint64_t bytes_now;
  uint64_t bytes_peak;    /* since the engine was made */
  uint64_t bytes_planned; /* what the plan in force says at most; 0 without one */
  uint64_t bytes_budget;  /* of the whole device */
} fathom_memory_item;

/* ---- 1. library ------------------------------------------------------------------------------- */

/* Version of the library: major << 16 | minor << 8 | patch.  Since 0.1. */
FATHOM_API uint32_t FATHOM_CALL fathom_version(void);

/* The same as text, "0.1.0"; static.  Since 0.1. */
FATHOM_API const char *FATHOM_CALL fathom_version_string(void);

/* Name of a code, "FATHOM_E_BUDGET"; static, never NULL, also for unknown codes.  Since 0.1. */
FATHOM_API const char *FATHOM_CALL fathom_status_name(int32_t code);

/* What this build and this machine can do, as JSON: {"version", "isas": [{"name", "available",
 * "reason"}]}, best instruction set first.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_capabilities_json(char *buf, uint64_t cap, uint64_t *len,
                                                        fathom_error *err);

/* ---- 2. configuration: keys and values as text ---------------------------------------------------
 * fathom_config_schema_json lists all keys.  A setting is obeyed or refused, never changed. */

/* A configuration with every key at its default.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_config_create(fathom_config **out, fathom_error *err);

/* Sets one key: ("context.max", "16384"), ("budget.cpu", "24G"), ("kv.type", "auto").
 * E_CONFIG: the message names key, value and range; for an unknown key the nearest one.
 * Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_config_set(fathom_config *cfg, const char *key,
                                                 const char *value, fathom_error *err);

/* Sets the keys of a JSON object, flat or nested, all or none.  E_CONFIG with the byte offset.
 * Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_config_merge_json(fathom_config *cfg, const char *json,
                                                        uint64_t len, fathom_error *err);

/* The value of a key as text that fathom_config_set takes.  E_CONFIG: unknown key.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_config_get(const fathom_config *cfg, const char *key,
                                                 char *buf, uint64_t cap, uint64_t *len,
                                                 fathom_error *err);

/* JSON array with one object per key: key, type, unit, default, range, memory, text; numbers also
 * min and max, words also choices.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_config_schema_json(char *buf, uint64_t cap, uint64_t *len,
                                                         fathom_error *err);

/* Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_config_free(fathom_config *cfg);

/* ---- 3. engine: devices, budgets, threads, hooks ------------------------------------------------ */
#define FATHOM_LOG_ERROR 0
#define FATHOM_LOG_WARN 1
#define FATHOM_LOG_INFO 2
#define FATHOM_LOG_DEBUG 3

/* A line for the host's log; not NUL-terminated. */
typedef void(FATHOM_CALL *fathom_log_fn)(void *user, int32_t level, const char *utf8,
                                         uint64_t len);
/* Sees every change of memory before it is made: delta > 0 is growth, total the device's bytes
 * after it.  Non-zero refuses a growth: the call fails with E_CALLBACK.  Runs under a lock: be
 * quick. */
typedef int32_t(FATHOM_CALL *fathom_memory_fn)(void *user, int32_t device, int32_t category,
                                               int64_t delta, uint64_t total);

/* The host's own memory for all large blocks on CPU devices: addresses first, memory behind them
 * when it is needed.  reserve: "bytes", a multiple of the system's page and aligned to it; NULL
 * refuses.  commit: backs a part with zeroed memory, all or nothing; non-zero refuses.  decommit
 * takes the memory back, release ends a reservation, committed or not. */
typedef void *(FATHOM_CALL *fathom_reserve_fn)(void *user, uint64_t bytes);
typedef int32_t(FATHOM_CALL *fathom_commit_fn)(void *user, void *base, uint64_t offset,
                                               uint64_t bytes);
typedef void(FATHOM_CALL *fathom_decommit_fn)(void *user, void *base, uint64_t offset,
                                              uint64_t bytes);
typedef void(FATHOM_CALL *fathom_release_fn)(void *user, void *base, uint64_t bytes);

/* Hooks for the whole life of an engine and all that lives on it. */
typedef struct fathom_host {
  uint32_t struct_size;
  int32_t log_level;       /* least important level to hand to log: FATHOM_LOG_* */
  void *user;              /* first argument of all hooks */
  fathom_log_fn log;       /* NULL: silent */
  fathom_memory_fn memory; /* NULL: budgets alone decide */
  fathom_reserve_fn reserve; /* all four or none: the system's memory */
  fathom_commit_fn commit;
  fathom_decommit_fn decommit;
  fathom_release_fn release;
} fathom_host;

typedef struct fathom_device_info {
  uint32_t struct_size;
  int32_t index;
  int32_t kind; /* 0 CPU, 1 CUDA, 2 simulated */
  uint32_t reserved;
  uint64_t bytes_total;  /* of the device; CPU: of the machine or its cgroup */
  uint64_t bytes_free;   /* what could be had now */
  uint64_t bytes_budget; /* what the library may hold */
  uint64_t bytes_now;    /* what it holds */
  uint64_t bytes_peak;   /* the most it held */
  char name[64];         /* "cpu", "cuda:0" */
} fathom_device_info;

/* Makes the devices that "devices" names and their threads.
 * cfg   NULL: defaults; copied.      host   NULL: no hooks; copied.
 * E_CONFIG (conflict, both keys named), E_UNSUPPORTED (device or instruction set).  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_engine_create(const fathom_config *cfg,
                                                    const fathom_host *host, fathom_engine **out,
                                                    fathom_error *err);

/* Makes simulated devices instead: the bytes and speeds that machine_json tells of ({"devices":
 * [{"name": "cpu", "kind": "cpu", "bytes": "256G"}, ...]}; every key: include/fathom/machine.hpp),
 * real plans, budgets, caches and schedules, and no arithmetic.  A model of any size loads from its
 * header or bare config.json and runs for any number of tokens in seconds: logits are zeros, and
 * the milliseconds of fathom_session_info and fathom_step are those of that machine. cfg, host   as
 * above; a CPU device must be among the machine's. E_CONFIG names the key of the description, its
 * value and range.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_engine_simulate(const char* machine_json, uint64_t len,
                                                      const fathom_config* cfg,
                                                      const fathom_host* host, fathom_engine** out,
                                                      fathom_error* err);

/* What fathom_engine_simulate() reads, of this engine's devices: bytes, rates and links, with where
 * each rate comes from.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_engine_machine_json(const fathom_engine* eng, char* buf,
                                                          uint64_t cap, uint64_t* len,
                                                          fathom_error* err);

/* One device, index < *count.  info or count may be NULL, not both.  E_NOT_FOUND: no such index
 * (*count is set all the same).  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_engine_device(const fathom_engine *eng, uint32_t index,
                                                    fathom_device_info *info, uint32_t *count,
                                                    fathom_error *err);

/* Changes a device's budget from now on.  Below what is held: nothing is taken away at once; the
 * next growth of a session climbs its ladder ("kv.ladder") until it fits, or is refused.
 * Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_engine_set_budget(fathom_engine *eng, int32_t device,
                                                        uint64_t bytes, fathom_error *err);

/* The same for the sum of all devices whose memory is the host's ("budget.host").  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_engine_set_host_budget(fathom_engine *eng, uint64_t bytes,
                                                             fathom_error *err);

/* Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_engine_free(fathom_engine *eng);

/* ---- 4. cancellation ------------------------------------------------------------------------------ */

/* A flag that long calls watch, through fathom_run.cancel.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_cancel_create(fathom_cancel **out, fathom_error *err);
/* Stops the calls that watch it; later ones too, until it is reset.  From any thread or signal
 * handler, as often as you like; NULL does nothing.  Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_cancel_request(fathom_cancel *c);
/* Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_cancel_reset(fathom_cancel *c);
/* A running call that watches it goes on, uncancelled.  Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_cancel_free(fathom_cancel *c);

/* ---- 5. plan: every byte before a weight is read ---------------------------------------------------
 * What was planned is what is loaded: the same code lays out the memory. */

typedef struct fathom_plan_summary {
  uint32_t struct_size;
  int32_t feasible;             /* 1: fits the budgets; 0: see below */
  int32_t binding_device;       /* where the budget binds; -1 if feasible */
  int32_t binding_category;     /* FATHOM_CAT_*; -1 if feasible */
  uint64_t bytes_short;         /* there */
  uint64_t bytes_peak;          /* sum of the devices' peaks */
  uint64_t bytes_decode;        /* sum over the devices while decoding, context full */
  uint64_t max_tokens;          /* per session, as planned */
  uint64_t max_tokens_feasible; /* longest context that fits, all else kept; 0: none */
  uint64_t kv_bytes_per_token;  /* all layers, without page rounding */
  uint64_t prefill_chunk;       /* tokens */
  uint32_t n_devices;
  uint32_t n_items;        /* for fathom_plan_get_item */
  uint32_t n_alternatives; /* for fathom_plan_alternative */
  uint32_t reserved;
} fathom_plan_summary;

/* Bytes of one device, category and phase. */
typedef struct fathom_plan_item {
  uint32_t struct_size;
  int32_t device;
  int32_t category; /* FATHOM_CAT_* */
  int32_t phase;    /* 0 load, 1 prefill, 2 decode */
  uint64_t bytes;
  char device_name[64];
} fathom_plan_item;

/* Plans a model from its header; reads no weights.  A plan that does not fit is FATHOM_OK with
 * feasible 0 and alternatives.
 * model_path   a .gguf (the first of a split) or a folder with config.json and .safetensors
 * cfg          NULL: the engine's
 * E_NOT_FOUND, E_IO, E_FORMAT, E_UNSUPPORTED, E_CONFIG.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_plan_create(fathom_engine *eng, const char *model_path,
                                                  const fathom_config *cfg, fathom_plan **out,
                                                  fathom_error *err);

/* Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_plan_get_summary(const fathom_plan *plan,
                                                       fathom_plan_summary *out,
                                                       fathom_error *err);

/* index < n_items: by device, then phase, then category; all are present, zeros too.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_plan_get_item(const fathom_plan *plan, uint32_t index,
                                                    fathom_plan_item *out, fathom_error *err);

/* A plan of its own with the changes of alternative index < n_alternatives, ready to be loaded;
 * the best alternative is the first.  What it changes: fathom_plan_json.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_plan_alternative(const fathom_plan *plan, uint32_t index,
                                                       fathom_plan **out, fathom_error *err);

/* The whole plan: feasible, kv_bytes_per_token, max_context, prefill_chunk, devices[{name,
 * budget_bytes, peak_bytes, purposes{}}], alternatives[].  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_plan_json(const fathom_plan *plan, char *buf, uint64_t cap,
                                                uint64_t *len, fathom_error *err);

/* Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_plan_free(fathom_plan *plan);

/* ---- 6. model: weights and tokenizer; never changes --------------------------------------------------- */
#define FATHOM_PHASE_LOAD 0     /* done and total are bytes */
#define FATHOM_PHASE_PREFILL 1  /* tokens */
#define FATHOM_PHASE_GENERATE 2 /* tokens */
#define FATHOM_PHASE_SAVE 3     /* bytes */
#define FATHOM_PHASE_RESTORE 4  /* bytes */

/* Non-zero stops the call with E_CANCELLED. */
typedef int32_t(FATHOM_CALL *fathom_progress_fn)(void *user, int32_t phase, uint64_t done,
                                                 uint64_t total);
/* Logits [n_vocab] of one position of a prefill, valid during the callback.  Non-zero stops the
 * call with E_CALLBACK. */
typedef int32_t(FATHOM_CALL *fathom_logits_fn)(void *user, uint64_t position, const float *logits,
                                               uint64_t n_vocab);

/* What a session and its engine hold after one prefill pass or one generated token. */
typedef struct fathom_step {
  uint32_t struct_size;
  int32_t phase;     /* FATHOM_PHASE_PREFILL or FATHOM_PHASE_GENERATE */
  uint64_t n_new;    /* tokens of this pass */
  uint64_t n_tokens; /* in the session */
  uint64_t bytes_kv; /* of this session's cache, all devices */
  double ms;         /* that the pass took */
  uint64_t n_items;
  const fathom_memory_item *items; /* [n_items], one every items->struct_size bytes: every category
                                      of every device, by device */
} fathom_step;

/* After each pass and each token; step is valid during the callback.  Non-zero stops: generate with
 * FATHOM_STOP_CALLBACK, the others with E_CALLBACK; what is done is kept. */
typedef int32_t(FATHOM_CALL *fathom_step_fn)(void *user, const fathom_step *step);

/* Taken by every long call; NULL: defaults. */
typedef struct fathom_run {
  uint32_t struct_size;
  uint32_t flags; /* none yet: 0 */
  void *user;     /* first argument of the callbacks */
  fathom_progress_fn progress;
  fathom_logits_fn on_logits; /* prefill: gets every position, in order; NULL: only the last
                                 position's logits are computed */
  fathom_cancel *cancel;
  uint64_t deadline_ms; /* from now; the call then stops as if cancelled; 0: none */
  uint64_t chunk;       /* prefill: tokens per pass, at most the plan's; 0: the plan's */
  fathom_step_fn on_step; /* prefill, generate, step_batch for each session; may be NULL */
} fathom_run;

typedef struct fathom_model_info {
  uint32_t struct_size;
  int32_t bos, eos; /* tokens; -1: none */
  uint32_t n_layers, n_heads, n_experts, n_experts_used;
  uint32_t kv_lora_rank, rope_dim, n_vocab;
  uint64_t n_params, n_params_active; /* all; those a token passes through */
  uint64_t context_train;             /* tokens the model was trained for */
  uint64_t bytes_weights;             /* held, all devices */
  uint64_t fingerprint_lo, fingerprint_hi; /* of the file */
  char arch[32];                           /* "deepseek2" */
  char name[96];                           /* may be "" */
} fathom_model_info;

/* Loads what was planned on this engine.  Progress: FATHOM_PHASE_LOAD.
 * run   may be NULL.
 * E_BUDGET (the plan is not feasible, or memory is held by others now; nothing is kept),
 * E_MISMATCH (the file changed), E_FORMAT, E_IO, E_CANCELLED.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_model_load(fathom_engine *eng, const fathom_plan *plan,
                                                 const fathom_run *run, fathom_model **out,
                                                 fathom_error *err);

/* Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_model_get_info(const fathom_model *model,
                                                     fathom_model_info *out, fathom_error *err);

/* What copies of experts have done for a model since it was loaded ("experts.cache"); zeros where
 * nothing is copied. */
typedef struct fathom_expert_cache {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t n_experts, bytes; /* copies held now */
  uint64_t choices, hits;    /* experts chosen by tokens in passes short enough to look for copies,
                                in layers that keep some; of these computed from copies */
  uint64_t copied, dropped;  /* experts; a replaced one is in both */
} fathom_expert_cache;

/* Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_model_expert_cache(const fathom_model *model,
                                                         fathom_expert_cache *out,
                                                         fathom_error *err);

/* Moves a model and all its sessions to the placement that is planned now: after a budget was changed
 * (fathom_engine_set_budget) or a device was lost and its budget was set to 0.  Weights that stay are
 * kept, others are read again; the sessions go on with the same bits, or, where rows were lost with a
 * device, are read again from their tokens, and can be used again after E_DEVICE.  No other thread uses
 * the model or its sessions meanwhile.  What a device gets must fit beside what it holds until then.
 * cfg    the new plan's, whose budgets are the engine's; NULL: as loaded
 * s, n   all sessions of the model
 * On failure everything is as before, but that sessions whose rows are lost keep only their tokens.
 * E_STATE (not all sessions), E_BUDGET, E_MEMORY, E_MISMATCH (the file changed), E_CONFIG, E_IO,
 * E_CANCELLED, E_DEVICE.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_model_replan(fathom_model *model, const fathom_config *cfg,
                                                   fathom_session *const *s, uint64_t n,
                                                   const fathom_run *run, fathom_error *err);

/* A scalar metadata value of the file as text ("general.name").  E_NOT_FOUND.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_model_metadata(const fathom_model *model, const char *key,
                                                     char *buf, uint64_t cap, uint64_t *len,
                                                     fathom_error *err);

/* Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_model_free(fathom_model *model);

/* ---- 7. tokenizer ------------------------------------------------------------------------------------- */
#define FATHOM_TOK_ADD_BOS 1u       /* tokenize: begin with bos, never twice */
#define FATHOM_TOK_PARSE_SPECIAL 2u /* tokenize: special tokens written in the text become tokens */
#define FATHOM_TOK_SKIP_SPECIAL 4u  /* detokenize: special tokens give no text */
#define FATHOM_CHAT_NO_GENERATION_PROMPT 8u /* chat_prompt: do not open the assistant's turn */

/* From a .gguf, a tokenizer.json, or a folder that holds one.
 * E_NOT_FOUND, E_IO, E_FORMAT, E_UNSUPPORTED (another kind of tokenizer).  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_tokenizer_open(const char *path, fathom_tokenizer **out,
                                                     fathom_error *err);

/* The model's own.  E_NOT_FOUND when its file has none.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_tokenizer_of(const fathom_model *model,
                                                   fathom_tokenizer **out, fathom_error *err);

/* Text -> ids [*n].  Invalid UTF-8 is read as U+FFFD.  flags: ADD_BOS, PARSE_SPECIAL.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_tokenize(const fathom_tokenizer *tok, const char *utf8,
                                               uint64_t len, uint32_t flags, fathom_token *ids,
                                               uint64_t cap, uint64_t *n, fathom_error *err);

/* ids [n] -> text; what is not valid UTF-8 becomes U+FFFD.  flags: SKIP_SPECIAL.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_detokenize(const fathom_tokenizer *tok,
                                                 const fathom_token *ids, uint64_t n,
                                                 uint32_t flags, char *buf, uint64_t cap,
                                                 uint64_t *len, fathom_error *err);

/* A conversation -> ids [*n], bos included, as the published template renders it.
 * roles, contents   [n_messages] NUL-terminated; a role is "system", "user" or "assistant"
 * format            "deepseek-v2", "deepseek-v3", "deepseek-r1"; NULL: as the file's template,
 *                   which is recognised, never executed
 * flags             NO_GENERATION_PROMPT
 * E_UNSUPPORTED: unknown template or format.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_chat_prompt(const fathom_tokenizer *tok,
                                                  const char *const *roles,
                                                  const char *const *contents, uint64_t n_messages,
                                                  const char *format, uint32_t flags,
                                                  fathom_token *ids, uint64_t cap, uint64_t *n,
                                                  fathom_error *err);

/* Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_tokenizer_free(fathom_tokenizer *tok);

/* ---- 8. sampler: from logits to a token --------------------------------------------------------------- */

/* Applied in this order: repetition penalty, temperature, top-k, top-p, min-p, draw.  Same seed,
 * logits and history: same tokens, on every machine. */
typedef struct fathom_sampler_params {
  uint32_t struct_size;
  int32_t top_k; /* keep the k most likely; 0: off */
  uint64_t seed;
  float temperature;      /* [0, 100]; 0: greedy, lowest id among equals */
  float top_p;            /* (0, 1]; 0: off, as 1 */
  float min_p;            /* [0, 1]; 0: off */
  float repeat_penalty;   /* (0, 100]; 0: off, as 1 */
  uint32_t repeat_window; /* last tokens that are penalised; 0: 64; at most 2^20 */
  uint32_t reserved;
} fathom_sampler_params;

/* params   NULL: greedy.   E_ARGUMENT names the field, its value and range.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_sampler_create(const fathom_sampler_params *params,
                                                     fathom_sampler **out, fathom_error *err);

/* Picks a token from logits [n_vocab], which stay unchanged.
 * history   [n_history] the text so far, for the repetition penalty; may be NULL with 0.
 * E_NUMERIC: a logit is NaN or +infinity, or all are -infinity.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_sampler_pick(fathom_sampler *s, const float *logits,
                                                   uint64_t n_vocab, const fathom_token *history,
                                                   uint64_t n_history, fathom_token *out,
                                                   fathom_error *err);

/* Begins the stream of a seed again.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_sampler_reset(fathom_sampler *s, uint64_t seed,
                                                    fathom_error *err);

/* Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_sampler_free(fathom_sampler *s);

/* ---- 9. session: one growing text on a model ----------------------------------------------------------- */
typedef struct fathom_session_params {
  uint32_t struct_size;
  uint32_t flags;          /* none yet: 0 */
  uint64_t max_tokens;     /* at most the plan's; 0: the plan's */
  uint64_t reserve_tokens; /* cache taken now; 0: "context.reserve" */
} fathom_session_params;

typedef struct fathom_session_info {
  uint32_t struct_size;
  uint32_t has_logits;      /* 1 when fathom_session_logits has an answer */
  uint64_t n_tokens;        /* held */
  uint64_t capacity_tokens; /* that fit the cache pages taken */
  uint64_t max_tokens;
  uint64_t bytes_kv;           /* cache pages, all devices */
  uint64_t kv_bytes_per_token; /* without page rounding */
  uint64_t n_prefilled, n_decoded;
  double prefill_ms, decode_ms;
} fathom_session_info;

/* A generated token: the UTF-8 text that became complete with it (len may be 0; not
 * NUL-terminated) and its position in the session.  The last call of a generation may repeat the
 * last token, with text that was held back as the possible beginning of a stop string.  Non-zero
 * stops cleanly. */
typedef int32_t(FATHOM_CALL *fathom_token_fn)(void *user, fathom_token id, const char *utf8,
                                              uint64_t len, uint64_t position);

#define FATHOM_GENERATE_IGNORE_EOS 1u   /* do not stop at the end-of-text token */
#define FATHOM_GENERATE_SHOW_SPECIAL 2u /* special tokens give text */

#define FATHOM_STOP_EOS 0
#define FATHOM_STOP_STOP 1     /* a stop token or string */
#define FATHOM_STOP_LENGTH 2   /* max_new_tokens */
#define FATHOM_STOP_CALLBACK 3 /* on_token asked for it */
#define FATHOM_STOP_CANCELLED 4
#define FATHOM_STOP_DEADLINE 5
#define FATHOM_STOP_CONTEXT_FULL 6 /* the session is intact: truncate it or end it */
#define FATHOM_STOP_BUDGET 7       /* likewise */

typedef struct fathom_generate_params {
  uint32_t struct_size;
  uint32_t flags;                        /* FATHOM_GENERATE_* */
  uint64_t max_new_tokens;               /* 0 or FATHOM_ALL: until a stop */
  fathom_token_fn on_token;              /* may be NULL */
  void *user;                            /* its first argument */
  const fathom_token *stop_ids; /* [n_stop_ids] */
  uint64_t n_stop_ids;
  const char *const *stop_strings; /* [n_stop_strings] NUL-terminated; never handed out, not even
                                      in part */
  uint64_t n_stop_strings;
} fathom_generate_params;

typedef struct fathom_generate_result {
  uint32_t struct_size;
  int32_t stop_reason; /* FATHOM_STOP_* */
  int32_t end_code;    /* FATHOM_E_* behind CONTEXT_FULL and BUDGET, else FATHOM_OK */
  uint32_t reserved;
  uint64_t n_new_tokens;    /* a stop token included */
  uint64_t bytes_needed;    /* BUDGET */
  uint64_t bytes_available; /* BUDGET */
} fathom_generate_result;

/* Takes activations and workspace for the plan's chunk.  params may be NULL.
 * E_BUDGET; E_ARGUMENT: max_tokens beyond the plan.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_create(fathom_model *model,
                                                     const fathom_session_params *params,
                                                     fathom_session **out, fathom_error *err);

/* Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_get_info(const fathom_session *s,
                                                       fathom_session_info *out,
                                                       fathom_error *err);

/* Takes cache memory for n_tokens tokens in all now.  E_CONTEXT_FULL, E_BUDGET.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_reserve(fathom_session *s, uint64_t n_tokens,
                                                      fathom_error *err);

/* Appends ids [n], n >= 1, in chunks; afterwards the logits are those of the last one.
 * E_ARGUMENT (index, id, bound), E_CONTEXT_FULL, E_BUDGET, E_CANCELLED, E_CALLBACK, E_DEVICE.
 * Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_prefill(fathom_session *s, const fathom_token *ids,
                                                      uint64_t n, const fathom_run *run,
                                                      fathom_error *err);

/* Appends one token, all or nothing.  Errors as prefill.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_step(fathom_session *s, fathom_token id,
                                                   fathom_error *err);

/* Appends ids[i] to s[i] for n different sessions of one model, in one pass that reads the weights
 * once for all; afterwards each has its logits.  All or nothing.
 * n   in [1, the plan's prefill chunk]     run   may be NULL; progress and chunk have no meaning
 * E_ARGUMENT, E_MISMATCH (another model), E_CONTEXT_FULL (names the session), E_BUSY, and as
 * prefill.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_step_batch(fathom_session *const *s,
                                                         const fathom_token *ids, uint64_t n,
                                                         const fathom_run *run, fathom_error *err);

/* Samples and appends until a stop; calling again goes on seamlessly.  The new tokens are the last
 * n_new_tokens of fathom_session_tokens.
 * smp      NULL: greedy; its stream goes on from call to call
 * params   NULL: until a stop     run   may be NULL     out   may be NULL
 * E_STATE: no logits yet.  E_NUMERIC.  A cancel, deadline, full context or spent budget is a
 * stop_reason, not an error.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_generate(fathom_session *s, fathom_sampler *smp,
                                                       const fathom_generate_params *params,
                                                       const fathom_run *run,
                                                       fathom_generate_result *out,
                                                       fathom_error *err);

/* Copies the logits of the last token, *n = n_vocab.  E_STATE before the first prefill and after
 * tokens were truncated.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_logits(fathom_session *s, float *dst, uint64_t cap,
                                                     uint64_t *n, fathom_error *err);

/* The same without a copy: *out [*n] is valid until the next call that changes the session.
 * Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_logits_view(const fathom_session *s,
                                                          const float **out, uint64_t *n,
                                                          fathom_error *err);

/* The tokens held from position "from" on, in order.  E_ARGUMENT: from > n_tokens.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_tokens(const fathom_session *s, uint64_t from,
                                                     fathom_token *ids, uint64_t cap, uint64_t *n,
                                                     fathom_error *err);

/* Forgets all but the first tokens; the memory of free pages goes back to the system.
 * E_ARGUMENT: more than there are.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_truncate(fathom_session *s, uint64_t keep_first,
                                                       fathom_error *err);

/* Gives back reserved cache pages that hold no token; *freed_bytes (may be NULL) says how much.
 * Tokens and logits stay.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_trim(fathom_session *s, uint64_t *freed_bytes,
                                                   fathom_error *err);

/* Storage of the host's own.  write takes src [n], read fills dst [n] from byte "offset" of a saved
 * session; n is at most 64 KiB and offsets rise without gaps.  Both answer how many bytes they took
 * or gave, which may be fewer; 0 (nothing more to be had) or -errno ends the call with E_IO. */
typedef int64_t(FATHOM_CALL *fathom_write_fn)(void *user, const void *src, uint64_t n);
typedef int64_t(FATHOM_CALL *fathom_read_fn)(void *user, uint64_t offset, void *dst, uint64_t n);

/* Writes the session to one file: beside its place, synced, renamed.  At every moment path is the
 * old file or the whole new one, on any error the old one.
 * E_ARGUMENT (a link, folder or device stands there), E_NOT_FOUND (no such folder), E_IO,
 * E_CANCELLED, E_DEVICE.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_save(const fathom_session *s, const char *path,
                                                   const fathom_run *run, fathom_error *err);

/* A new session that goes on where the saved one was, with the same bits.  A bad file gives an
 * error and changes nothing.  params and run may be NULL.
 * E_NOT_FOUND, E_IO, E_FORMAT (offset, key), E_CHECKSUM, E_VERSION (saved by a newer library),
 * E_MISMATCH (another model file or kv.type), E_CONTEXT_FULL (more tokens than max_tokens),
 * E_BUDGET, E_CANCELLED.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_restore(fathom_model *model, const char *path,
                                                      const fathom_session_params *params,
                                                      const fathom_run *run, fathom_session **out,
                                                      fathom_error *err);

/* The same to a function of the host.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_save_io(const fathom_session *s,
                                                      fathom_write_fn write, void *user,
                                                      const fathom_run *run, fathom_error *err);

/* The same from a function of the host; size is that of the saved session in bytes.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_restore_io(fathom_model *model, fathom_read_fn read,
                                                         void *user, uint64_t size,
                                                         const fathom_session_params *params,
                                                         const fathom_run *run,
                                                         fathom_session **out, fathom_error *err);

/* Since 0.1. */
FATHOM_API void FATHOM_CALL fathom_session_free(fathom_session *s);

/* ---- 10. memory, as it is now ---------------------------------------------------------------------------- */
/* A consistent picture of one moment: every category of every device, by device.
 * items   [cap]; struct_size is read from the first and is the stride of the array.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_memory_snapshot(const fathom_engine *eng,
                                                      fathom_memory_item *items, uint64_t cap,
                                                      uint64_t *n, fathom_error *err);

#define FATHOM_THEN_FULL 0       /* the session is full, unless its context ends first */
#define FATHOM_THEN_CHUNK 1      /* steps of "kv.ladder": prefill passes become shorter, */
#define FATHOM_THEN_SPILL 2      /* cold pages move to host memory, */
#define FATHOM_THEN_REQUANTISE 3 /* are rewritten in a smaller type, */
#define FATHOM_THEN_FILE 4       /* move to the spill file */

/* Where one budget ends for one session. */
typedef struct fathom_budget_forecast {
  uint32_t struct_size;
  int32_t device; /* -1: the sum of the devices whose memory is the host's */
  uint64_t bytes_budget;
  uint64_t bytes_now;    /* held under it, by all */
  uint64_t n_tokens_end; /* the most tokens the session can hold under it, growing token by token
                            while nobody else takes or gives back memory */
  int32_t then;          /* FATHOM_THEN_*: what happens at the next token */
  uint32_t reserved;
  char name[64]; /* "cpu", "cuda:0", "host" */
} fathom_budget_forecast;

/* The token at which each budget ends: of every device, then the host's sum.
 * items          [cap]; struct_size is read from the first and is the stride of the array
 * n_tokens_end   may be NULL: the least of all budgets and of the session's max_tokens.
 * Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_session_forecast(const fathom_session *s,
                                                       fathom_budget_forecast *items, uint64_t cap,
                                                       uint64_t *n, uint64_t *n_tokens_end,
                                                       fathom_error *err);

/* Records what the memory of an engine does from now on: per device at most max_points states, of
 * which none is invented and no extreme is lost however long it takes.  0: 2000, the most.  The
 * recorder's memory, some 180 KiB per device, is counted as FATHOM_CAT_RUNTIME.
 * E_ARGUMENT, E_STATE (one runs already), E_BUDGET.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_timeline_start(fathom_engine *eng, uint64_t max_points,
                                                     fathom_error *err);

/* Writes what was recorded until now; recording goes on.  The file is written beside its place and
 * renamed.
 * format   "json", "csv", "svg", "html" (one page that needs nothing else); NULL: by the path's
 *          suffix
 * E_ARGUMENT (format; a link, folder or device stands there), E_STATE (no recorder), E_NOT_FOUND (no
 * such folder), E_IO.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_timeline_write(const fathom_engine *eng, const char *path,
                                                     const char *format, fathom_error *err);

/* Forgets what was recorded and gives its memory back.  E_STATE: no recorder.  Since 0.1. */
FATHOM_API int32_t FATHOM_CALL fathom_timeline_stop(fathom_engine *eng, fathom_error *err);

/* clang-format on */
#ifdef __cplusplus
}
#endif

#endif /* FATHOM_H */
