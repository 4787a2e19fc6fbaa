// The C interface: library, configuration, engine, cancellation, memory.
#include <fmt/format.h>

#include "capi/handles.h"

using namespace fathom;        // NOLINT: this file forwards to it, line by line
using namespace fathom::capi;  // NOLINT

namespace {

std::string json_quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
      continue;
    }
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

Status new_handle(auto** out, auto&&... arguments) {
  *out =
      new std::remove_reference_t<decltype(**out)>(std::forward<decltype(arguments)>(arguments)...);
  return {};
}

}  // namespace

// ---- library ----

uint32_t fathom_version(void) {
  return FATHOM_VERSION_MAJOR << 16 | FATHOM_VERSION_MINOR << 8 | FATHOM_VERSION_PATCH;
}

const char* fathom_version_string(void) {
  return version().data();  // a literal
}

const char* fathom_status_name(int32_t code) {
  switch (code) {
    case FATHOM_OK:
      return "FATHOM_OK";
    case FATHOM_E_ARGUMENT:
      return "FATHOM_E_ARGUMENT";
    case FATHOM_E_STATE:
      return "FATHOM_E_STATE";
    case FATHOM_E_BUSY:
      return "FATHOM_E_BUSY";
    case FATHOM_E_BUFFER_TOO_SMALL:
      return "FATHOM_E_BUFFER_TOO_SMALL";
    case FATHOM_E_NOT_FOUND:
      return "FATHOM_E_NOT_FOUND";
    case FATHOM_E_UNSUPPORTED:
      return "FATHOM_E_UNSUPPORTED";
    case FATHOM_E_CONFIG:
      return "FATHOM_E_CONFIG";
    case FATHOM_E_FORMAT:
      return "FATHOM_E_FORMAT";
    case FATHOM_E_CHECKSUM:
      return "FATHOM_E_CHECKSUM";
    case FATHOM_E_VERSION:
      return "FATHOM_E_VERSION";
    case FATHOM_E_MISMATCH:
      return "FATHOM_E_MISMATCH";
    case FATHOM_E_BUDGET:
      return "FATHOM_E_BUDGET";
    case FATHOM_E_MEMORY:
      return "FATHOM_E_MEMORY";
    case FATHOM_E_DEVICE:
      return "FATHOM_E_DEVICE";
    case FATHOM_E_IO:
      return "FATHOM_E_IO";
    case FATHOM_E_CONTEXT_FULL:
      return "FATHOM_E_CONTEXT_FULL";
    case FATHOM_E_CANCELLED:
      return "FATHOM_E_CANCELLED";
    case FATHOM_E_CALLBACK:
      return "FATHOM_E_CALLBACK";
    case FATHOM_E_NUMERIC:
      return "FATHOM_E_NUMERIC";
    case FATHOM_E_FORKED:
      return "FATHOM_E_FORKED";
    case FATHOM_E_INTERNAL:
      return "FATHOM_E_INTERNAL";
    default:
      return "unknown code";
  }
}

int32_t fathom_capabilities_json(char* buf, uint64_t cap, uint64_t* len, fathom_error* err) {
  return call(err, [&]() -> Status {
    std::string isas;
    for (const IsaInfo& isa : cpu_isas())
      isas += fmt::format("{}{{\"name\": {}, \"available\": {}, \"reason\": {}}}",
                          isas.empty() ? "" : ", ", json_quote(isa.name), isa.available,
                          json_quote(isa.reason));
    return give_text(
        fmt::format("{{\"version\": {}, \"isas\": [{}]}}", json_quote(version()), isas), buf, cap,
        len);
  });
}

// ---- configuration ----

int32_t fathom_config_create(fathom_config** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    return new_handle(out);
  });
}

int32_t fathom_config_set(fathom_config* cfg, const char* key, const char* value,
                          fathom_error* err) {
  return call(err, [&]() -> Status {
    Use use;
    FATHOM_TRY(use.begin(cfg, "cfg"));
    FATHOM_TRY_ASSIGN(const std::string_view k, to_text("key", key));
    FATHOM_TRY_ASSIGN(const std::string_view v, to_text("value", value));
    return cfg->config.set(k, v);
  });
}

int32_t fathom_config_merge_json(fathom_config* cfg, const char* json, uint64_t len,
                                 fathom_error* err) {
  return call(err, [&]() -> Status {
    Use use;
    FATHOM_TRY(use.begin(cfg, "cfg"));
    FATHOM_TRY_ASSIGN(const std::string_view text, to_text("json", json, len));
    return cfg->config.merge_json(text);
  });
}

int32_t fathom_config_get(const fathom_config* cfg, const char* key, char* buf, uint64_t cap,
                          uint64_t* len, fathom_error* err) {
  return call(err, [&]() -> Status {
    Use use;
    FATHOM_TRY(use.begin(cfg, "cfg"));
    FATHOM_TRY_ASSIGN(const std::string_view k, to_text("key", key));
    FATHOM_TRY_ASSIGN(const std::string value, cfg->config.get(k));
    return give_text(value, buf, cap, len);
  });
}

int32_t fathom_config_schema_json(char* buf, uint64_t cap, uint64_t* len, fathom_error* err) {
  return call(err, [&] { return give_text(Config::schema_json(), buf, cap, len); });
}

void fathom_config_free(fathom_config* cfg) {
  free_handle(cfg);
}

// ---- engine ----

namespace {

HostHooks hooks_of(const fathom_host& h) {
  HostHooks hooks;
  if (h.log != nullptr)
    hooks.log = [h](LogLevel level, std::string_view text) {
      if (static_cast<int32_t>(level) > h.log_level) return;
      host_callback(0, [&] {
        h.log(h.user, static_cast<int32_t>(level), text.data(), text.size());
        return 0;
      });
    };
  if (h.memory != nullptr)
    hooks.memory = [h](int device, Purpose purpose, int64_t delta, int64_t total) {
      return host_callback(false, [&] {
        return h.memory(h.user, device, static_cast<int32_t>(purpose), delta,
                        static_cast<uint64_t>(total)) == 0;
      });
    };
  if (h.reserve != nullptr)
    hooks.allocator.reserve = [h](int64_t bytes) -> void* {
      return host_callback(static_cast<void*>(nullptr),
                           [&] { return h.reserve(h.user, static_cast<uint64_t>(bytes)); });
    };
  if (h.commit != nullptr)
    hooks.allocator.commit = [h](void* base, int64_t offset, int64_t bytes) {
      return host_callback(false, [&] {
        return h.commit(h.user, base, static_cast<uint64_t>(offset),
                        static_cast<uint64_t>(bytes)) == 0;
      });
    };
  if (h.decommit != nullptr)
    hooks.allocator.decommit = [h](void* base, int64_t offset, int64_t bytes) {
      host_callback(0, [&] {
        h.decommit(h.user, base, static_cast<uint64_t>(offset), static_cast<uint64_t>(bytes));
        return 0;
      });
    };
  if (h.release != nullptr)
    hooks.allocator.release = [h](void* base, int64_t bytes) {
      host_callback(0, [&] {
        h.release(h.user, base, static_cast<uint64_t>(bytes));
        return 0;
      });
    };
  return hooks;
}

// Makes an engine by make(config, hooks).
template <class Make>
int32_t new_engine(const fathom_config* cfg, const fathom_host* host, fathom_engine** out,
                   fathom_error* err, Make&& make) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    FATHOM_TRY_ASSIGN(const fathom_host h, from_caller(host, "host"));
    Use use;
    if (cfg != nullptr) FATHOM_TRY(use.begin(cfg, "cfg"));
    FATHOM_TRY_ASSIGN(Engine engine, make(cfg ? cfg->config : Config(), hooks_of(h)));
    return new_handle(out, std::move(engine));
  });
}

}  // namespace

int32_t fathom_engine_create(const fathom_config* cfg, const fathom_host* host, fathom_engine** out,
                             fathom_error* err) {
  return new_engine(cfg, host, out, err, [](const Config& config, const HostHooks& hooks) {
    return Engine::create(config, hooks);
  });
}

int32_t fathom_engine_simulate(const char* machine_json, uint64_t len, const fathom_config* cfg,
                               const fathom_host* host, fathom_engine** out, fathom_error* err) {
  return new_engine(
      cfg, host, out, err, [&](const Config& config, const HostHooks& hooks) -> Result<Engine> {
        FATHOM_TRY_ASSIGN(const std::string_view text, to_text("machine_json", machine_json, len));
        FATHOM_TRY_ASSIGN(const MachineDescription machine, MachineDescription::parse(text));
        return Engine::simulate(machine, config, hooks);
      });
}

int32_t fathom_engine_machine_json(const fathom_engine* eng, char* buf, uint64_t cap, uint64_t* len,
                                   fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(eng, "eng"));
    return give_text(eng->engine.machine().to_json(), buf, cap, len);
  });
}

int32_t fathom_engine_device(const fathom_engine* eng, uint32_t index, fathom_device_info* info,
                             uint32_t* count, fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(eng, "eng"));
    if (info == nullptr && count == nullptr) return null_argument("info");
    if (info != nullptr) FATHOM_TRY(check_out(info, "info"));
    const int n = eng->engine.n_devices();
    if (count != nullptr) *count = static_cast<uint32_t>(n);
    if (info == nullptr) return {};
    if (index >= static_cast<uint32_t>(n))
      return Status(Code::kNotFound, fmt::format("device {} is not in [0, {})", index, n));
    const Backend& device = eng->engine.device(static_cast<int>(index));
    const MemoryState memory = device.memory();
    const MemorySnapshot snapshot = eng->engine.memory();
    const DeviceMemory& held = snapshot.devices[index];
    fathom_device_info out{};
    out.index = static_cast<int32_t>(index);
    out.kind = static_cast<int32_t>(device.kind());
    out.bytes_total = static_cast<uint64_t>(memory.total_bytes);
    out.bytes_free = static_cast<uint64_t>(memory.free_bytes);
    out.bytes_budget = static_cast<uint64_t>(held.budget_bytes);
    out.bytes_now = static_cast<uint64_t>(held.bytes_now);
    out.bytes_peak = static_cast<uint64_t>(held.bytes_peak);
    copy_text(held.name, out.name);
    to_caller(out, info);
    return {};
  });
}

int32_t fathom_engine_set_budget(fathom_engine* eng, int32_t device, uint64_t bytes,
                                 fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(eng, "eng"));
    FATHOM_TRY_ASSIGN(const int64_t budget, to_int64("bytes", bytes));
    return eng->engine.set_budget(device, budget);
  });
}

int32_t fathom_engine_set_host_budget(fathom_engine* eng, uint64_t bytes, fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(eng, "eng"));
    FATHOM_TRY_ASSIGN(const int64_t budget, to_int64("bytes", bytes));
    return eng->engine.set_host_budget(budget);
  });
}

void fathom_engine_free(fathom_engine* eng) {
  free_handle(eng);
}

// ---- cancellation ----

int32_t fathom_cancel_create(fathom_cancel** out, fathom_error* err) {
  return call(err, [&]() -> Status {
    if (out == nullptr) return null_argument("out");
    *out = nullptr;
    return new_handle(out);
  });
}

void fathom_cancel_request(fathom_cancel* c) {
  if (c != nullptr) c->token->request();
}

void fathom_cancel_reset(fathom_cancel* c) {
  if (c != nullptr && !inside_callback()) c->token->reset();
}

void fathom_cancel_free(fathom_cancel* c) {
  free_handle(c);
}
