// Config: the one configuration.  The same keys in C++ fields, set("key", "value"), JSON and on
// the command line (--set key=value); one schema (lib/run/config.cc) says for each key its type,
// unit, default, range and effect on memory, and schema_json() prints it.
//
// A setting is a constraint of the plan: it is obeyed or refused with a reason, never changed.
// Fields of type optional are `auto` when empty: the plan chooses, and says what it chose.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/backend.hpp"
#include "fathom/kv_page.hpp"
#include "fathom/status.hpp"

namespace fathom {

// Form of attention in prefill (decode is always absorbed).
enum class AttentionForm : uint8_t { kAbsorbed, kExpanded };

// What the weights of a model are assumed to be when only its config.json is there.
enum class WeightsType : uint8_t { kBF16, kF16, kF8, kQ8_0, kQ4_K };
constexpr std::string_view weights_type_name(WeightsType type) noexcept {
  constexpr std::string_view kNames[] = {"bf16", "f16", "fp8", "q8_0", "q4_k"};
  return kNames[static_cast<int>(type)];
}

// Where cache pages may live, best first.
enum class KvTier : uint8_t { kDevice, kHost, kFile };
constexpr std::string_view kv_tier_name(KvTier tier) noexcept {
  constexpr std::string_view kNames[] = {"device", "host", "file"};
  return kNames[static_cast<int>(tier)];
}

// What a session may do when a page or a pass does not fit its budget.
//   kChunk       prefill in shorter passes, which frees scratch for the cache that was planned; the
//                text takes longer to read
//   kSpill       cold pages to host memory; same bits
//   kRequantise  cold pages into a smaller type, down to kv.ladder_type; costs quality
//   kFile        cold pages to the session's spill file; same bits, every later token reads them
enum class LadderStep : uint8_t { kChunk, kSpill, kRequantise, kFile };
inline constexpr int kLadderStepCount = 4;
constexpr std::string_view ladder_step_name(LadderStep step) noexcept {
  constexpr std::string_view kNames[] = {"chunk", "spill", "requantise", "file"};
  return kNames[static_cast<int>(step)];
}

// What a placement over several devices is made for: the time of a step of generation, of a prompt,
// or of both in the proportion of a usual text (2048 tokens read, 512 written).
enum class PlacementGoal : uint8_t { kDecode, kPrefill, kMix };
constexpr std::string_view placement_goal_name(PlacementGoal goal) noexcept {
  constexpr std::string_view kNames[] = {"decode", "prefill", "mix"};
  return kNames[static_cast<int>(goal)];
}

enum class MissingDevice : uint8_t { kRefuse, kSkip };
enum class SpillTmpfs : uint8_t { kRefuse, kAllow };

struct Config {
  // devices: comma-separated names, in order; default "cpu".  "cpu:0,cpu:1" declares several CPU
  // devices with budgets of their own.
  // "numa" stands for one CPU device per memory node with processors, named cpu:<node>, with its
  // node's threads, memory and free bytes as its budget.
  // "cuda:0,cpu" names a GPU, whose plug-in is opened (backend_plugin.hpp); one device is a CPU.
  std::string devices = "cpu";
  // devices.missing: what to do about a device that cannot be had (no driver, no plug-in, no such
  // GPU): refuse, or skip it with a warning in the log, so long as one is left.
  MissingDevice devices_missing = MissingDevice::kRefuse;
  // cuda.plugin: the plug-in for GPUs, an absolute path.  auto: libfathom_cuda.so beside this
  // library, in ../lib of there, or where the system looks for libraries.
  std::optional<std::string> cuda_plugin;
  // budget.<device>: bytes that the ledger lets this device hold; auto: what is free when the
  // engine is made.  Suffixes K, M, G, T (powers of 1024).  "host" limits the sum of all CPU
  // devices.
  std::map<std::string, int64_t> budget;

  // context.max: tokens a session may hold.  auto: what fits the budgets, at most what the model
  // was trained for.  A limit, not an allocation.  [1, 2^31)
  std::optional<int64_t> context_max;
  // context.reserve: tokens of cache taken when a session starts.  Default 0.  [0, context.max]
  int64_t context_reserve = 0;

  // kv.type: f32, bf16, f16, fp8, q8_0, q4_0 for the latent columns.  auto: f32 with numerics
  // exact, else f16 (latents are normed, so its range suffices, and it keeps 8 times the precision
  // of bf16 in the same bytes).  Bytes per token follow it.
  std::optional<KvType> kv_type;
  // kv.recent_16bit, kv.first_16bit: with kv.type fp8, q8_0 or q4_0, pages that hold one of the
  // last or first so many tokens stay in f16; a page is rewritten in kv.type when it leaves the
  // window. The window is at least prefill.chunk.  Default 0: all pages are written in kv.type at
  // once.
  int64_t kv_recent_16bit = 0;
  int64_t kv_first_16bit = 0;
  // kv.page_tokens: tokens per page, a power of two in [16, 4096].  auto: 64 or what makes a page
  // about 2 MiB.
  std::optional<int64_t> kv_page_tokens;

  // kv.tiers: where cache pages may live: device, then host (memory of the host, for devices that
  // have their own), then file.  Beyond `device` the plan adds a staging buffer per session,
  // through which attention reads what was moved.  Default: device.
  std::vector<KvTier> kv_tiers = {KvTier::kDevice};
  // kv.spill_folder: where the file tier keeps one file per session, without a name, so that it is
  // gone with the process however that ends.  Absolute path on a disk.  Default: /var/tmp.
  std::string kv_spill_folder = "/var/tmp";
  // kv.spill_tmpfs: what to do about a spill folder whose files lie in memory (tmpfs, ramfs):
  // moving pages there would free a budget and fill the machine.  Default: refuse.
  SpillTmpfs kv_spill_tmpfs = SpillTmpfs::kRefuse;
  // kv.ladder: what is done, in this order, when memory ends: any of chunk, spill, requantise,
  // file; after the last one the session is full (kContextFull) and intact.  Steps that do not
  // apply are passed over: spill and file without their tier, chunk with a pinned prefill.chunk.
  // none: a budget that ends is kBudget at once.  Default: the steps that cost no quality.
  std::vector<LadderStep> kv_ladder = {LadderStep::kChunk, LadderStep::kSpill, LadderStep::kFile};
  // kv.ladder_type: the smallest type that requantise may reach.  Default: q8_0.
  KvType kv_ladder_type = KvType::kQ8_0;

  // prefill.chunk: tokens per prefill pass; activations and workspace grow with it.  auto: 512, or
  // less when the budget asks for it.  [1, 8192]
  std::optional<int64_t> prefill_chunk;
  // prefill.in_flight: chunks of one prompt under way at once where routed experts live on other
  // devices than their layers, so that these devices work at the same time.  Each takes hidden rows
  // of a chunk on every device, beyond what one needs.  auto: 3 where the plan finds room and the
  // prediction says that it pays, else 1.  [1, 4]
  std::optional<int64_t> prefill_in_flight;
  // attention.form: absorbed or expanded.  auto: expanded for chunks above the crossover.
  std::optional<AttentionForm> attention_form;

  // placement.layers: pins layers to devices: "cuda:0=0-29,cuda:1=30-59", "*" for all others.  What
  // lives on a layer's device: attention, its cache pages, norms, router, dense network and shared
  // experts.  placement.experts: pins routed experts, by layer or by expert of a layer: "cpu=*",
  // "cuda:1=3-10,cpu=11-59:0-79"; numbers win over "*".  What is not pinned the plan places.
  std::string placement_layers = "auto";
  std::string placement_experts = "auto";
  // placement.embed, placement.head: the device of the embedding, and of the final norm and output
  // head.
  std::string placement_embed = "auto";
  std::string placement_head = "auto";
  // placement.kv: which devices hold the rows of the cache, in the order of the text: "home=65536,
  // cpu=*" leaves the first 65,536 tokens with their layer's device (home) and puts the others on
  // cpu; what no part names stays home.  Attention is computed where the rows lie.  Multiples of
  // 512 and of the page.  auto: with their layer, and on several devices where one cannot hold
  // them.
  std::string placement_kv = "auto";
  // placement.goal: what the placement makes fast.
  PlacementGoal placement_goal = PlacementGoal::kDecode;

  // experts.cache: bytes of copies of routed experts that each device may keep of its layers'
  // experts that live on other devices, in memory that nothing else needs yet; the most used ones,
  // and as the text grows they are given back before anything else is done.  The results do not
  // change.  auto: all that is idle, on devices whose memory is not the host's.  0: none.
  std::optional<int64_t> experts_cache;
  // experts.cache_window: tokens after which the counts of use are halved, so that what was used
  // lately counts most.  Default 1024.  [16, 2^31)
  int64_t experts_cache_window = 1024;

  // weights.type: for plans from a bare config.json, what its weights are taken to be: bf16, f16,
  // fp8, q8_0, q4_k (llama.cpp's Q4_K_M mixture).  auto: what config.json says.  Refused for a
  // model that has weights.
  std::optional<WeightsType> weights_type;

  int64_t sessions_max = 1;  // sessions.max: sessions the plan makes room for.  [1, 4096]
  int64_t threads = 0;       // threads: 0 = the processors this process may use.  [0, 1024]
  // numa: what a CPU device makes of several memory nodes: auto (rows where the process may use
  // several), off, rows (NumaMode).  One copy of the weights, the same results, the same bytes.
  NumaMode numa = NumaMode::kAuto;
  std::string isa = "auto";             // isa: auto, scalar, avx2, avx512, amx
  Numerics numerics = Numerics::kFast;  // numerics: fast, exact

  // Sets one key from text.  Errors: kConfig; the message names the key, the value and the range,
  // and for an unknown key the nearest known one.  On error nothing changes.
  Status set(std::string_view key, std::string_view value);
  // Sets the keys of a JSON object, flat ("kv.type": "q8_0") or nested ({"kv": {"type": ...}}),
  // all or none.  Errors: kConfig, with the byte offset for malformed text.
  Status merge_json(std::string_view json);
  // The value as text that set() takes; "auto" for auto.  Errors: kConfig for an unknown key.
  Result<std::string> get(std::string_view key) const;
  // Conflicts between keys (both are named).  Called by Engine::create and plan().
  Status validate() const;

  std::string to_json() const;  // one flat object, every key
  // An array of {key, type, unit, default, range, memory, text}.
  static std::string schema_json();
};

// "24G", "512M", "1073741824" -> bytes.  Errors: kConfig.
Result<int64_t> parse_bytes(std::string_view text);

}  // namespace fathom
