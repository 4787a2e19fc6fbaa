// The C interface under C++ hosts: exceptions from callbacks, two threads on one handle, a failing
// allocator of the process.
#include <atomic>
#include <catch2/catch.hpp>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "capi_fixture.h"

namespace {

// Countdown of operator new on this thread; at zero it fails once.
thread_local int64_t allocations_left = -1;

}  // namespace

// Not inlined: the compiler would see malloc paired with delete and warn.
[[gnu::noinline]] void* operator new(size_t n) {
  if (allocations_left >= 0 && allocations_left-- == 0) throw std::bad_alloc();
  if (void* p = std::malloc(n ? n : 1)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t n, const std::nothrow_t&) noexcept {
  return std::malloc(n ? n : 1);
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

namespace {

struct Error : fathom_error {
  Error() : fathom_error{} { struct_size = sizeof(fathom_error); }
};

// A context of 256 tokens on the example model; freed at the end of the test.
struct Host {
  explicit Host(const fathom_host* hooks = nullptr)
      : fixture(open_fixture(FATHOM_EXAMPLE_MODEL, hooks)) {}
  ~Host() { close_fixture(&fixture); }
  uint64_t n_tokens() const {
    fathom_session_info info{};
    info.struct_size = sizeof info;
    REQUIRE(fathom_session_get_info(fixture.session, &info, nullptr) == FATHOM_OK);
    return info.n_tokens;
  }
  int32_t prefill(const fathom_run* run = nullptr, fathom_error* err = nullptr) const {
    return fathom_session_prefill(fixture.session, ids.data(), ids.size(), run, err);
  }
  Fixture fixture;
  std::vector<fathom_token> ids = std::vector<fathom_token>(40, 7);  // three chunks
};

fathom_run make_run(void* user) {
  fathom_run run{};
  run.struct_size = sizeof run;
  run.user = user;
  return run;
}

}  // namespace

TEST_CASE("an exception from a callback ends the call with E_CALLBACK and its text") {
  Host host;
  Error err;
  int countdown = 1;
  fathom_run run = make_run(&countdown);

  SECTION("progress, after a chunk") {
    run.progress = [](void* user, int32_t, uint64_t, uint64_t) -> int32_t {
      if ((*static_cast<int*>(user))-- == 0) throw std::runtime_error("no more, please");
      return 0;
    };
    CHECK(host.prefill(&run, &err) == FATHOM_E_CALLBACK);
    CHECK(err.code == FATHOM_E_CALLBACK);
    CHECK(std::string(err.message) == "a callback threw: no more, please");
    CHECK(host.n_tokens() == 16);
  }
  SECTION("logits") {
    run.on_logits = [](void*, uint64_t, const float*, uint64_t) -> int32_t { throw 42; };
    CHECK(host.prefill(&run, &err) == FATHOM_E_CALLBACK);
    CHECK(std::string(err.message) == "a callback threw an exception");
    CHECK(host.n_tokens() == 0);
  }
  SECTION("tokens") {
    REQUIRE(host.prefill() == FATHOM_OK);
    fathom_generate_params params{};
    params.struct_size = sizeof params;
    params.max_new_tokens = 8;
    params.on_token = [](void*, fathom_token, const char*, uint64_t, uint64_t) -> int32_t {
      throw std::string("odd");
    };
    CHECK(fathom_session_generate(host.fixture.session, nullptr, &params, nullptr, nullptr, &err) ==
          FATHOM_E_CALLBACK);
    CHECK(host.n_tokens() == 41);
  }
  SECTION("a text longer than the error struct") {
    run.progress = [](void*, int32_t, uint64_t, uint64_t) -> int32_t {
      throw std::runtime_error(std::string(5000, 'x'));
    };
    CHECK(host.prefill(&run, &err) == FATHOM_E_CALLBACK);
    CHECK(std::string(err.message).size() < sizeof err.message);
  }
  // Afterwards the session works, and nothing of the exception is left over.
  const uint64_t before = host.n_tokens();
  CHECK(host.prefill(nullptr, &err) == FATHOM_OK);
  CHECK(host.n_tokens() == before + 40);
}

TEST_CASE("exceptions from the hooks of an engine") {
  struct Hooks {
    bool throws = false;
    int logs = 0;
  } state;
  fathom_host hooks{};
  hooks.struct_size = sizeof hooks;
  hooks.user = &state;
  hooks.log_level = FATHOM_LOG_DEBUG;
  hooks.log = [](void* user, int32_t level, const char* utf8, uint64_t len) {
    CHECK(level >= FATHOM_LOG_ERROR);
    CHECK(level <= FATHOM_LOG_DEBUG);
    CHECK(!std::string(utf8, len).empty());
    auto* s = static_cast<Hooks*>(user);
    ++s->logs;
    if (s->throws) throw std::runtime_error("log is full");
  };
  hooks.memory = [](void* user, int32_t, int32_t, int64_t, uint64_t) -> int32_t {
    if (static_cast<Hooks*>(user)->throws) throw std::runtime_error("ledger is full");
    return 0;
  };
  Host host(&hooks);
  CHECK(state.logs > 0);
  state.throws = true;
  Error err;
  CHECK(host.prefill(nullptr, &err) == FATHOM_E_CALLBACK);
  CHECK(std::string(err.message) == "a callback threw: ledger is full");
  CHECK(host.n_tokens() == 0);
  // Releasing memory asks the hook as well; its exception goes nowhere.
  fathom_session* session = nullptr;
  state.throws = false;
  REQUIRE(fathom_session_create(host.fixture.model, nullptr, &session, &err) == FATHOM_OK);
  state.throws = true;
  fathom_session_free(session);
  fathom_engine* engine = nullptr;
  CHECK(fathom_engine_create(nullptr, &hooks, &engine, &err) == FATHOM_E_CALLBACK);
  CHECK(engine == nullptr);
  state.throws = false;
  CHECK(host.prefill() == FATHOM_OK);
}

TEST_CASE("a second thread on a session, a sampler or a config gets E_BUSY") {
  Host host;
  struct Gate {
    std::mutex mutex;
    std::condition_variable changed;
    bool inside = false, may_go = false;
  } gate;
  fathom_run run = make_run(&gate);
  run.progress = [](void* user, int32_t, uint64_t, uint64_t) -> int32_t {
    auto& g = *static_cast<Gate*>(user);
    std::unique_lock lock(g.mutex);
    g.inside = true;
    g.changed.notify_all();
    g.changed.wait(lock, [&] { return g.may_go; });
    return 0;
  };
  int32_t first = -99;
  std::thread worker([&] { first = host.prefill(&run); });
  {
    std::unique_lock lock(gate.mutex);
    gate.changed.wait(lock, [&] { return gate.inside; });
  }
  Error err;
  fathom_session* const s = host.fixture.session;
  fathom_session_info info{};
  info.struct_size = sizeof info;
  const float* view = nullptr;
  uint64_t n = 0;
  CHECK(host.prefill(nullptr, &err) == FATHOM_E_BUSY);
  CHECK(fathom_session_step(s, 1, nullptr) == FATHOM_E_BUSY);
  CHECK(fathom_session_generate(s, nullptr, nullptr, nullptr, nullptr, nullptr) == FATHOM_E_BUSY);
  CHECK(fathom_session_get_info(s, &info, nullptr) == FATHOM_E_BUSY);
  CHECK(fathom_session_logits_view(s, &view, &n, nullptr) == FATHOM_E_BUSY);
  CHECK(fathom_session_truncate(s, 0, nullptr) == FATHOM_E_BUSY);
  fathom_session_free(s);  // in use: nothing happens
  // Another session of the same model is free to run meanwhile.
  fathom_session* other = nullptr;
  CHECK(fathom_session_create(host.fixture.model, nullptr, &other, &err) == FATHOM_OK);
  CHECK(fathom_session_step(other, 1, &err) == FATHOM_OK);
  fathom_session_free(other);
  {
    const std::lock_guard lock(gate.mutex);
    gate.may_go = true;
  }
  gate.changed.notify_all();
  worker.join();
  CHECK(first == FATHOM_OK);
  CHECK(host.n_tokens() == 40);
}

TEST_CASE("many threads on one engine, model and tokenizer") {
  Host host;
  std::vector<std::thread> threads;
  std::atomic<int> failed{0};
  std::vector<std::vector<fathom_token>> results(4);
  for (auto& result : results)
    threads.emplace_back([&] {
      fathom_session* session = nullptr;
      fathom_generate_params params{};
      params.struct_size = sizeof params;
      params.max_new_tokens = 6;
      params.flags = FATHOM_GENERATE_IGNORE_EOS;
      uint64_t n = 0;
      result.resize(46);
      fathom_token ids[64];
      const bool ok =
          fathom_tokenize(host.fixture.tokenizer, "The fox", FATHOM_NTS, 0, ids, 64, &n, nullptr) ==
              0 &&
          fathom_session_create(host.fixture.model, nullptr, &session, nullptr) == 0 &&
          fathom_session_prefill(session, host.ids.data(), host.ids.size(), nullptr, nullptr) ==
              0 &&
          fathom_session_generate(session, nullptr, &params, nullptr, nullptr, nullptr) == 0 &&
          fathom_session_tokens(session, 0, result.data(), result.size(), &n, nullptr) == 0 &&
          fathom_memory_snapshot(host.fixture.engine, nullptr, 0, &n, nullptr) == 0;
      failed += !ok;
      fathom_session_free(session);
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(failed == 0);
  for (const auto& result : results) CHECK(result == results.front());
}

TEST_CASE("an allocation that fails is E_MEMORY, and the next try works") {
  Host host;
  Error err;
  const auto fails_somewhere = [&](const std::function<int32_t(fathom_error*)>& work) {
    int64_t n = 0;
    int32_t code = FATHOM_E_MEMORY;
    for (; code != FATHOM_OK && n < 100000; ++n) {
      allocations_left = n;
      code = work(&err);
      const bool reached = allocations_left < 0;
      allocations_left = -1;
      if (code == FATHOM_OK && reached)
        code = FATHOM_E_MEMORY;  // did without that one
      else if (code != FATHOM_OK)
        REQUIRE(code == FATHOM_E_MEMORY);
    }
    return n;
  };
  fathom_config* config = nullptr;
  CHECK(fails_somewhere([&](fathom_error* e) {
          fathom_config_free(config);
          return fathom_config_create(&config, e);
        }) > 1);
  CHECK(fails_somewhere([&](fathom_error* e) {
          return fathom_config_merge_json(
              config, R"({"devices": "cpu:0,cpu:1,cpu:2", "kv": {"type": "bf16"}, "threads": 1})",
              FATHOM_NTS, e);
        }) > 5);
  fathom_config_free(config);
  fathom_sampler* sampler = nullptr;
  fathom_sampler_params sampling{};
  sampling.struct_size = sizeof sampling;
  sampling.temperature = 1;
  REQUIRE(fathom_sampler_create(&sampling, &sampler, &err) == FATHOM_OK);
  const std::vector<float> logits(100, 1.0f);
  fathom_token id = 0;
  CHECK(fails_somewhere([&](fathom_error* e) {
          return fathom_sampler_pick(sampler, logits.data(), 100, nullptr, 0, &id, e);
        }) > 1);
  fathom_sampler_free(sampler);
  uint64_t n = 0;
  fathom_token ids[64];
  CHECK(fails_somewhere([&](fathom_error* e) {
          return fathom_tokenize(host.fixture.tokenizer, "Once upon a time", FATHOM_NTS,
                                 FATHOM_TOK_ADD_BOS, ids, 64, &n, e);
        }) > 1);
  fathom_session* session = nullptr;
  CHECK(fails_somewhere([&](fathom_error* e) {
          fathom_session_free(session);
          return fathom_session_create(host.fixture.model, nullptr, &session, e);
        }) > 3);
  CHECK(fathom_session_step(session, 5, &err) == FATHOM_OK);
  fathom_session_free(session);
}

TEST_CASE("a model without a tokenizer takes token ids") {
  namespace fs = std::filesystem;
  const fs::path source = fs::path(FATHOM_TEST_DATA) / "models" / "tiny-v3";
  const fs::path folder = fs::path(FATHOM_BINARY_DIR) / "tests" / "capi_no_tokenizer";
  fs::create_directories(folder);
  for (const char* name : {"config.json", "model.safetensors"})
    fs::copy_file(source / name, folder / name, fs::copy_options::overwrite_existing);

  Error err;
  fathom_engine* engine = nullptr;
  fathom_plan* plan = nullptr;
  fathom_model* model = nullptr;
  fathom_tokenizer* tokenizer = nullptr;
  fathom_session* session = nullptr;
  REQUIRE(fathom_engine_create(nullptr, nullptr, &engine, &err) == FATHOM_OK);
  REQUIRE(fathom_plan_create(engine, folder.c_str(), nullptr, &plan, &err) == FATHOM_OK);
  REQUIRE(fathom_model_load(engine, plan, nullptr, &model, &err) == FATHOM_OK);
  CHECK(fathom_tokenizer_of(model, &tokenizer, &err) == FATHOM_E_NOT_FOUND);
  CHECK(tokenizer == nullptr);
  CHECK(fathom_tokenizer_open(folder.c_str(), &tokenizer, &err) == FATHOM_E_NOT_FOUND);
  REQUIRE(fathom_session_create(model, nullptr, &session, &err) == FATHOM_OK);
  const fathom_token ids[] = {1, 2, 3};
  fathom_generate_params params{};
  params.struct_size = sizeof params;
  params.max_new_tokens = 3;
  params.flags = FATHOM_GENERATE_IGNORE_EOS;
  fathom_generate_result result{};
  result.struct_size = sizeof result;
  CHECK(fathom_session_prefill(session, ids, 3, nullptr, &err) == FATHOM_OK);
  CHECK(fathom_session_generate(session, nullptr, &params, nullptr, &result, &err) == FATHOM_OK);
  CHECK(result.n_new_tokens == 3);
  CHECK(result.stop_reason == FATHOM_STOP_LENGTH);
  fathom_session_free(session);
  fathom_model_free(model);
  fathom_plan_free(plan);
  fathom_engine_free(engine);
}
