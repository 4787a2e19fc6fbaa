// The C interface: memory as it is now, after each step, and over time.
#include <fmt/format.h>

#include "capi/handles.h"

using namespace fathom;        // NOLINT: this file forwards to it, line by line
using namespace fathom::capi;  // NOLINT

fathom_memory_item fathom::capi::to_item(const MemorySnapshot& snapshot, const MemoryItem& item) {
  fathom_memory_item out{};
  out.struct_size = sizeof out;
  out.device = item.device;
  out.category = static_cast<int32_t>(item.purpose);
  out.bytes_now = static_cast<uint64_t>(item.bytes_now);
  out.bytes_peak = static_cast<uint64_t>(item.bytes_peak);
  out.bytes_planned = static_cast<uint64_t>(item.bytes_planned);
  out.bytes_budget =
      static_cast<uint64_t>(snapshot.devices[static_cast<size_t>(item.device)].budget_bytes);
  return out;
}

StepFunction fathom::capi::to_step(fathom_step_fn on_step, void* user) {
  // The items stay from call to call, so that only the first allocates.
  return
      [on_step, user, items = std::vector<fathom_memory_item>()](const StepReport& report) mutable {
        items.clear();
        for (const MemoryItem& item : report.memory.items)
          items.push_back(to_item(report.memory, item));
        fathom_step step{};
        step.struct_size = sizeof step;
        step.phase = report.phase == Phase::kPrefill ? FATHOM_PHASE_PREFILL : FATHOM_PHASE_GENERATE;
        step.n_new = static_cast<uint64_t>(report.n_new);
        step.n_tokens = static_cast<uint64_t>(report.n_tokens);
        step.bytes_kv = static_cast<uint64_t>(report.kv_bytes);
        step.ms = report.seconds * 1e3;
        step.n_items = items.size();
        step.items = items.data();
        return host_callback(false, [&] { return on_step(user, &step) == 0; });
      };
}

int32_t fathom_memory_snapshot(const fathom_engine* eng, fathom_memory_item* items, uint64_t cap,
                               uint64_t* n, fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(eng, "eng"));
    if (n == nullptr) return null_argument("n");
    if (items == nullptr && cap > 0) return null_argument("items");
    if (items != nullptr && cap > 0) FATHOM_TRY(check_out(items, "items"));
    const MemorySnapshot snapshot = eng->engine.memory();
    *n = snapshot.items.size();
    if (items == nullptr) return {};
    if (cap < *n) return too_small(*n, cap);
    const uint32_t stride = items->struct_size;
    char* at = reinterpret_cast<char*>(items);
    for (const MemoryItem& item : snapshot.items) {
      std::memcpy(at, &stride, sizeof stride);
      to_caller(to_item(snapshot, item), reinterpret_cast<fathom_memory_item*>(at));
      at += stride;
    }
    return {};
  });
}

int32_t fathom_session_forecast(const fathom_session* s, fathom_budget_forecast* items,
                                uint64_t cap, uint64_t* n, uint64_t* n_tokens_end,
                                fathom_error* err) {
  return session_call(err, s, [&]() -> Status {
    if (n == nullptr) return null_argument("n");
    if (items == nullptr && cap > 0) return null_argument("items");
    if (items != nullptr && cap > 0) FATHOM_TRY(check_out(items, "items"));
    const Forecast forecast = s->session.forecast();
    *n = forecast.budgets.size();
    if (n_tokens_end != nullptr) *n_tokens_end = static_cast<uint64_t>(forecast.n_tokens_end);
    if (items == nullptr) return {};
    if (cap < *n) return too_small(*n, cap);
    const uint32_t stride = items->struct_size;
    char* at = reinterpret_cast<char*>(items);
    for (const BudgetForecast& budget : forecast.budgets) {
      fathom_budget_forecast out{};
      out.device = budget.device;
      out.bytes_budget = static_cast<uint64_t>(budget.budget_bytes);
      out.bytes_now = static_cast<uint64_t>(budget.bytes_now);
      out.n_tokens_end = static_cast<uint64_t>(budget.n_tokens_end);
      out.then =
          budget.then ? FATHOM_THEN_CHUNK + static_cast<int32_t>(*budget.then) : FATHOM_THEN_FULL;
      copy_text(budget.budget, out.name);
      std::memcpy(at, &stride, sizeof stride);
      to_caller(out, reinterpret_cast<fathom_budget_forecast*>(at));
      at += stride;
    }
    return {};
  });
}

int32_t fathom_timeline_start(fathom_engine* eng, uint64_t max_points, fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(eng, "eng"));
    TimelineOptions options;
    if (max_points != 0) {
      FATHOM_TRY_ASSIGN(options.max_points, to_int64("max_points", max_points));
    }
    return eng->engine.start_timeline(options);
  });
}

int32_t fathom_timeline_write(const fathom_engine* eng, const char* path, const char* format,
                              fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(eng, "eng"));
    FATHOM_TRY_ASSIGN(const std::string_view name, to_text("path", path));
    FATHOM_TRY_ASSIGN(const TimelineFormat f,
                      format ? parse_timeline_format(format) : timeline_format_of(name));
    return eng->engine.write_timeline(std::string(name), f);
  });
}

int32_t fathom_timeline_stop(fathom_engine* eng, fathom_error* err) {
  return call(err, [&]() -> Status {
    FATHOM_TRY(check_handle(eng, "eng"));
    return eng->engine.stop_timeline();
  });
}
