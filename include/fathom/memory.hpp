// Memory as a host sees it: purposes, snapshots of the ledger, and events.
//
// The ledger is the one door to memory: every block above 64 KiB that the library takes (weights,
// cache pages, scratch, staging, tokenizer tables, thread stacks) has a device and a purpose and is
// refused before the system is asked when a budget would be exceeded.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace fathom {

// Same numbers as FATHOM_CAT_* in capi/fathom.h.
enum class Purpose : uint8_t {
  kWeights,      // attention, norms, dense and shared feed-forward, embeddings, output head
  kExperts,      // routed experts
  kKv,           // cache pages
  kActivations,  // named buffers of the forward pass, logits
  kWorkspace,    // scratch inside operations, oneDNN and cuBLAS workspaces
  kStaging,      // file and transfer buffers while loading or streaming
  kTokenizer,    // vocabulary and merge tables
  kRuntime,      // thread stacks, device contexts, token history
  kExpertCache,  // copies of routed experts in memory that nothing else needs yet (experts.cache)
};
inline constexpr int kPurposeCount = 9;

constexpr std::string_view purpose_name(Purpose purpose) noexcept {
  constexpr std::string_view kNames[] = {"weights",     "experts",   "kv",
                                         "activations", "workspace", "staging",
                                         "tokenizer",   "runtime",   "expert_cache"};
  return kNames[static_cast<int>(purpose)];
}

struct MemoryItem {
  int device = 0;
  Purpose purpose = Purpose::kWeights;
  int64_t bytes_now = 0;
  int64_t bytes_peak = 0;     // since the engine was made or reset_peaks()
  int64_t bytes_planned = 0;  // what the plan in force says at most; 0 without a plan
};

struct DeviceMemory {
  std::string name;
  int64_t budget_bytes = 0;
  int64_t bytes_now = 0, bytes_peak = 0;  // over all purposes
  int64_t bytes_planned = 0;  // peak over the plan's phases; less than the sum of the items, since
                              // the purposes do not all peak at once
};

// A consistent picture of the ledger at one moment.
struct MemorySnapshot {
  std::vector<DeviceMemory> devices;
  std::vector<MemoryItem> items;  // devices x purposes, device-major, all purposes present
  // The sum over the devices whose memory is the host's, and what bounds it ("budget.host").
  int64_t host_budget_bytes = 0, host_bytes_now = 0;
  const MemoryItem& item(int device, Purpose purpose) const {
    return items[static_cast<size_t>(device * kPurposeCount + static_cast<int>(purpose))];
  }
};

// Something the library decided at run time that a user should be able to see.
struct Event {
  // "chunk_lowered", "spilled" (to host memory), "requantised", "spilled_to_file"; "chunk_raised"
  // and "returned" (pages) when memory is there again.  Stable names.  Steps of a kind in a row are
  // one event that grows.
  std::string kind;
  std::string text;      // for people
  int64_t position = 0;  // tokens in the session when it happened
  int64_t bytes = 0;     // memory freed or moved
  // By how much every pass is expected to take longer from now on, with the rates of
  // Engine::machine(); of pages that came back, what is left of it.  0 for steps without copies.
  double pass_seconds = 0;
};

// The host's own memory instead of the system's, for all large blocks on CPU devices (the thread
// stacks excepted): addresses first, memory behind them when it is needed.  All four or none.
// Called on the thread that asks, while the library may hold locks: do not call it.  What they
// throw counts as a refusal.
struct HostAllocator {
  // Addresses for `bytes`, a multiple of the system's page and aligned to it; null refuses.
  std::function<void*(int64_t bytes)> reserve = {};
  // Backs [offset, offset + bytes) with zeroed memory, all or nothing; false refuses.
  std::function<bool(void* base, int64_t offset, int64_t bytes)> commit = {};
  // Takes the memory back; the addresses stay.
  std::function<void(void* base, int64_t offset, int64_t bytes)> decommit = {};
  // Ends a reservation, committed or not.
  std::function<void(void* base, int64_t bytes)> release = {};

  explicit operator bool() const noexcept { return static_cast<bool>(reserve); }
};

// Sees every change before it is made; `delta` is positive for growth, `total` the device's bytes
// after it.  Returning false refuses a growth (kCallback); for a release the answer is ignored.
// Called under the ledger's lock on the thread that asks: be quick, do not call the library.
using MemoryObserver =
    std::function<bool(int device, Purpose purpose, int64_t delta, int64_t total)>;

}  // namespace fathom
