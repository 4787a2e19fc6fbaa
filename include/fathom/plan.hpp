// Plan: what a model will need, before a weight is read, from the file's header alone - bytes per
// device, purpose and phase.  The same layout functions that allocate compute it, so at run time
// the ledger's bytes equal the plan's bytes, to the byte.
//
//   auto plan = engine.plan("model.gguf");
//   if (!plan->feasible) for (auto& a : plan->alternatives) print(a.text);
//   auto model = Model::load(engine, *plan);
//
// A value: copyable, printable, comparable through to_json().  Infeasible is not an error.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "fathom/config.hpp"
#include "fathom/machine.hpp"
#include "fathom/memory.hpp"
#include "fathom/model_config.hpp"
#include "fathom/placement.hpp"

namespace fathom {

enum class Phase : uint8_t { kLoad, kPrefill, kDecode };
inline constexpr int kPhaseCount = 3;
constexpr std::string_view phase_name(Phase phase) noexcept {
  constexpr std::string_view kNames[] = {"load", "prefill", "decode"};
  return kNames[static_cast<int>(phase)];
}

struct PlanDevice {
  std::string name;
  DeviceKind kind = DeviceKind::kCpu;
  int64_t budget_bytes = 0;
  int64_t granularity = 1;            // commits are multiples of it
  int64_t n_layers = 0;               // layers whose attention and cache live here
  int64_t n_experts = 0;              // routed experts that live here, over all layers
  int64_t transfer_bytes = 0;         // staging of one session for copies between other devices
  int64_t kv_page_bytes = 0;          // committed per page of one session, all its layers
  int64_t kv_hot_page_bytes = 0;      // the same for pages that the policy keeps in 16 bits
  int64_t session_runtime_bytes = 0;  // host bookkeeping of one session at max_context
  // Predicted seconds of work in a full prefill chunk and in a decode step at the end of the
  // context.
  double prefill_seconds = 0, decode_seconds = 0;
  // The most that copies of experts may take, while the text is short; `bytes` has what of it stays
  // at max_context.  0: the device keeps none.
  int64_t expert_cache_bytes = 0;
  // On the host: what that cache takes for its tables, and for reading.
  int64_t copy_runtime_bytes = 0, copy_staging_bytes = 0;
  // With by_ladder: cache bytes at max_context that the budget does not hold; the ladder moves
  // them to other tiers or saves them by rewriting pages.  All sessions.
  int64_t kv_moved_bytes = 0;
  // Of them, what every pass at max_context fetches, one session's: from host memory (to a card),
  // and from the file.
  int64_t kv_host_bytes = 0, kv_file_bytes = 0;
  // Bytes by phase and purpose with max_context tokens in each of sessions.max sessions.
  std::array<std::array<int64_t, kPurposeCount>, kPhaseCount> bytes{};

  int64_t total(Phase phase) const noexcept {
    int64_t sum = 0;
    for (int64_t b : bytes[static_cast<size_t>(phase)]) sum += b;
    return sum;
  }
  int64_t peak_bytes() const noexcept {
    int64_t peak = 0;
    for (int p = 0; p < kPhaseCount; ++p) peak = std::max(peak, total(static_cast<Phase>(p)));
    return peak;
  }
  int64_t planned(Purpose purpose) const noexcept {  // the most over the phases
    int64_t most = purpose == Purpose::kExpertCache ? expert_cache_bytes : 0;
    for (const auto& phase : bytes) most = std::max(most, phase[static_cast<size_t>(purpose)]);
    return most;
  }
};

// Predicted tokens per second of one session: roofline over the rates of Engine::machine(), hence
// no better than those are (`source`: of the least certain device).
struct PlanSpeed {
  double prefill_first = 0, prefill_last = 0;  // of the first and the last chunk of max_context
  double decode_first = 0, decode_last = 0;    // behind no token, and at the end of the context
  RateSource source = RateSource::kDocumented;
};

// A change of configuration that makes an infeasible plan feasible, verified by planning it.
struct PlanAlternative {
  std::vector<std::pair<std::string, std::string>> changes;  // config keys and values
  std::string text;  // "prefill.chunk=128: 22.1 of 24.0 GiB, 16,384 tokens"
  int64_t max_context = 0;
};

struct Plan {
  std::string model_path;
  uint64_t fingerprint_lo = 0, fingerprint_hi = 0;  // of the file that was planned
  ModelConfig model;
  Config config;  // as asked for

  // Chosen, where the configuration said auto.
  int64_t max_context = 0;    // tokens per session
  int64_t prefill_chunk = 0;  // tokens
  // Chunks of one prompt under way at once, each with buffers of its own.
  int64_t prefill_in_flight = 1;
  AttentionForm attention_form = AttentionForm::kExpanded;  // for full chunks
  KvType kv_type = KvType::kF16;
  KvPolicy kv_policy;  // which pages have kv_type
  int64_t kv_page_tokens = 0;
  int64_t kv_bytes_per_token = 0;  // all layers, without page rounding

  bool feasible = false;
  int64_t max_context_feasible = 0;  // longest context that fits, all else kept; 0: none
  // The context fits by kv.ladder only: from max_context_resident tokens on its steps are taken.
  // Then the cache's planned bytes are what the budgets leave for it.
  bool by_ladder = false;
  int64_t max_context_resident = 0;  // longest context that fits without the ladder
  // When infeasible: where the budget binds.
  int binding_device = -1;
  Purpose binding_purpose = Purpose::kKv;
  int64_t bytes_short = 0;
  std::vector<PlanAlternative> alternatives;

  std::vector<PlanDevice> devices;
  PlanSpeed speed;
  Placement placement;               // what lives on which of them
  PlacementBalance balance;          // how evenly, and why not more so
  std::vector<std::string> remarks;  // what was chosen and why; what the file lacked

  // Cache bytes of one session on a device, in whole pages, its own layers' and those that
  // placement.kv puts there: the most on the way to `n_tokens` tokens.
  int64_t kv_bytes(int device, int64_t n_tokens) const;
  std::string to_json() const;
  // A table for people: device, purpose, phases, GiB; then what binds and the alternatives.
  std::string describe() const;
};

}  // namespace fathom
