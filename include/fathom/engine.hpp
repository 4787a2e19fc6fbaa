// Engine: devices, the ledger with its budgets, threads and host hooks.  Everything else lives on
// one.  There is no global state: two engines in one process know nothing of each other.
//
// Lifetime: an Engine is a handle; models and sessions hold the engine they live on, so handles may
// be dropped in any order.  Any thread may use an engine at any time.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "fathom/config.hpp"
#include "fathom/machine.hpp"
#include "fathom/memory.hpp"
#include "fathom/plan.hpp"
#include "fathom/status.hpp"
#include "fathom/timeline.hpp"

namespace fathom {

namespace run {
class EngineState;
}

enum class LogLevel : uint8_t { kError, kWarn, kInfo, kDebug };
using LogFunction = std::function<void(LogLevel, std::string_view text)>;

// One operation of a forward pass, as a device has done it.
struct OpTime {
  int device;           // index in the engine
  std::string_view op;  // "matmul", "experts", ...: the name of the Backend's function
  double seconds;
};
using OpObserver = std::function<void(const OpTime&)>;

// What the host may hook.  Called only on the thread that made the call.
struct HostHooks {
  LogFunction log = {};        // none: silent; the library never prints
  MemoryObserver memory = {};  // none: every change within the budgets is allowed
  // Called after each operation of each pass; every operation is then waited for before the next,
  // which costs devices that queue them.  None: nothing is measured.
  OpObserver op = {};
  HostAllocator allocator = {};  // none: the system's memory
};

// A flag that a long call watches.  request() may be called from any thread or a signal handler.
class CancelToken {
 public:
  void request() noexcept { requested_.store(true, std::memory_order_relaxed); }
  void reset() noexcept { requested_.store(false, std::memory_order_relaxed); }
  bool requested() const noexcept { return requested_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> requested_{false};
};

enum class ProgressPhase : uint8_t { kLoad, kPrefill, kGenerate, kSave, kRestore };
// done and total in tokens (prefill, generate) or bytes (load, save, restore).  Returning false
// stops the call with kCancelled.
using ProgressFunction = std::function<bool(ProgressPhase phase, int64_t done, int64_t total)>;

// What a session and its engine hold after one prefill pass or one generated token.
struct StepReport {
  Phase phase = Phase::kDecode;  // kPrefill or kDecode
  int64_t n_new = 0;             // tokens of this pass
  int64_t n_tokens = 0;          // in the session
  double seconds = 0;            // that the pass took
  int64_t kv_bytes = 0;          // of this session's cache, all devices
  const MemorySnapshot& memory;  // of the whole engine; valid during the call
};
using StepFunction = std::function<bool(const StepReport&)>;

// Taken by every long call.
struct RunOptions {
  ProgressFunction progress = {};
  const CancelToken* cancel = nullptr;  // must outlive the call
  int64_t deadline_ms = 0;              // 0: none; else the call stops with kCancelled after it
  int64_t chunk = 0;  // prefill: tokens per pass; 0: the plan's; at most the plan's
  // prefill: called for every position in order with its logits [vocab_size]; the view is valid
  // during the call.  None: only the last position's logits are computed.  Returning false stops
  // with kCallback.
  std::function<bool(int64_t position, std::span<const float> logits)> on_logits = {};
  // prefill, generate, and step_batch for each session: called after each pass and each token.
  // Costs the copy of devices x purposes; nothing is allocated after the first call.  Returning
  // false stops: generate with that reason, the others with kCallback; what is done is kept.
  StepFunction on_step = {};
};

class Engine {
 public:
  // Makes the devices that config.devices names.  `rates`, when given, is what measure() of such an
  // engine answered before: devices and links found in it by name have its rates.  Errors: kConfig,
  // kUnsupported, kMemory.
  static Result<Engine> create(const Config& config = {}, const HostHooks& hooks = {},
                               const MachineDescription* rates = nullptr);

  // Makes simulated devices: the machine's bytes and speeds, this library's plans, ledger,
  // scheduler and cache, and no arithmetic.  A model of any size "loads" from its header or bare
  // config.json and runs for any number of tokens in seconds: memory is counted, not touched,
  // logits are zeros, and times - SessionTimes, seconds() - are those of the machine's clock.  All
  // devices of the machine are used unless config.devices names some of them; a CPU device must be
  // among them. Budgets that `config` leaves out are the machine's.  Errors: kConfig, kMemory.
  static Result<Engine> simulate(const MachineDescription& machine, const Config& config = {},
                                 const HostHooks& hooks = {});
  bool simulated() const noexcept;

  const Config& config() const noexcept;
  // Devices in the order of config.devices.
  int n_devices() const noexcept;
  const Backend& device(int index) const noexcept;  // 0 <= index < n_devices()
  // The same devices as a description: kinds, bytes, rates and links.  Rates of real devices are
  // the documented ones of their kind until they are measured.
  const MachineDescription& machine() const noexcept;
  // Measures the rates of the devices and of the links between them by running operations, for
  // about so many seconds per device (a few more under 1) and with 64 MiB per second, given back;
  // and that of the spill folder's disk with a file of as much, where kv.tiers has files.
  // Errors: kInvalidArgument, kBudget, kMemory, kDevice, kIo; kState for simulated devices.
  Result<MachineDescription> measure(double seconds_per_device = 2) const;
  // Seconds since the engine was made: on the wall, or on the clock of simulated devices.
  double seconds() const noexcept;
  // Seconds that a simulated device has worked so far; 0 for real ones.
  double busy_seconds(int device) const noexcept;

  // Plans a model file from its header for `config` (default: the engine's).  Reads no weights; a
  // bare config.json is enough, with weights.type for what its weights are taken to be.
  // A plan that does not fit is a value with feasible == false.  Errors: as TensorFile::open,
  // kConfig for settings that cannot be met by any budget (both keys named).
  Result<Plan> plan(const std::string& model_path) const;
  Result<Plan> plan(const std::string& model_path, const Config& config) const;

  MemorySnapshot memory() const;
  // Peaks restart from what is held now.
  void reset_peaks() noexcept;
  // Changes a device's budget from now on.  Below what is held: copies of experts (experts.cache)
  // are dropped, at once or, when a pass uses them, before the next; nothing else is taken away,
  // but the next growth of a session climbs its ladder (kv.ladder) until it fits, or is refused.
  // Errors: kInvalidArgument.
  Status set_budget(int device, int64_t bytes);
  // The same for the sum of all devices whose memory is the host's.
  Status set_host_budget(int64_t bytes);

  // Records what the memory of this engine does from now on; see timeline.hpp.  Takes 180 KiB per
  // device, which the ledger counts as runtime.  Errors: kInvalidArgument (max_points), kState (a
  // recorder runs already), kBudget, kMemory.
  Status start_timeline(const TimelineOptions& options = {});
  // What was recorded until now.  Errors: kState without a recorder.
  Result<Timeline> timeline() const;
  // The same into a file: written beside its place and renamed.  Errors: kState; those of files:
  // kInvalidArgument (a link, folder or device stands there), kNotFound (no such folder), kIo.
  Status write_timeline(const std::string& path, TimelineFormat format) const;
  // Forgets what was recorded and gives the memory back.  Errors: kState.
  Status stop_timeline();

  explicit Engine(std::shared_ptr<run::EngineState>) noexcept;
  const std::shared_ptr<run::EngineState>& state() const noexcept { return state_; }

 private:
  std::shared_ptr<run::EngineState> state_;  // shared with models and sessions
};

}  // namespace fathom
