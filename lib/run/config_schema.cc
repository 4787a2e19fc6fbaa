// The table of keys, and how each type of field is read from text and written back.
#include "lib/run/config_schema.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <map>
#include <optional>
#include <type_traits>
#include <vector>

#include "lib/io/text.h"
#include "placement_pins.h"

namespace fathom::run {
namespace {

constexpr std::string_view kAuto = "auto", kNone = "none";
constexpr std::string_view kFolder = "folder";
constexpr std::string_view kPins = "placement", kDevice = "device";
constexpr std::string_view kFile = "file";
constexpr int64_t kMaxBudget = int64_t{1} << 50;
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;

constexpr std::array<std::string_view, kKvTypeCount> kKvTypes = [] {
  std::array<std::string_view, kKvTypeCount> names;
  for (int i = 0; i < kKvTypeCount; ++i)
    names[static_cast<size_t>(i)] = kv_type_name(static_cast<KvType>(i));
  return names;
}();
// In the order of the enumerators.
constexpr std::string_view kWeightsTypes[] = {"bf16", "f16", "fp8", "q8_0", "q4_k"};
constexpr std::string_view kMissingDevices[] = {"refuse", "skip"};
constexpr std::string_view kSpillTmpfs[] = {"refuse", "allow"};
constexpr std::string_view kTiers[] = {"device", "host", "file"};
constexpr std::string_view kLadderSteps[] = {"chunk", "spill", "requantise", "file"};
constexpr std::string_view kAttentionForms[] = {"absorbed", "expanded"};
constexpr std::string_view kGoals[] = {"decode", "prefill", "mix"};
constexpr std::string_view kNumerics[] = {"fast", "exact"};
constexpr std::string_view kNumaModes[] = {"auto", "off", "rows"};
constexpr std::string_view kIsas[] = {"auto", "scalar", "avx2", "avx512", "amx"};

Status refuse(const Setting& setting, std::string_view key, std::string_view value) {
  return Status(Code::kConfig,
                fmt::format("{} = {}: must be {}", key, shown(value), setting.range_text()))
      .about(key);
}

// ---- text -> value, by the type of the field ----

Status parse(const Setting& setting, std::string_view key, std::string_view text, int64_t& out) {
  int64_t value = 0;
  if (setting.unit == "bytes") {
    Result<int64_t> bytes = parse_bytes(text);
    if (!bytes.ok()) {
      const Status& why = bytes.status();
      return Status(why.code(), fmt::format("{}: {}{}", key, why.message(),
                                            setting.takes_auto ? ", or auto" : ""))
          .about(key);
    }
    value = *bytes;
  } else {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) return refuse(setting, key, text);
  }
  if (value < setting.min || value > setting.max ||
      (setting.power_of_two && !std::has_single_bit(static_cast<uint64_t>(value))))
    return refuse(setting, key, text);
  out = value;
  return {};
}

template <class Enum>
requires std::is_enum_v<Enum> Status parse(const Setting& setting, std::string_view key,
                                           std::string_view text, Enum& out) {
  const auto found = std::find(setting.choices.begin(), setting.choices.end(), text);
  if (found == setting.choices.end()) return refuse(setting, key, text);
  out = static_cast<Enum>(found - setting.choices.begin());
  return {};
}

// Words separated by commas, each at most once; "none" is the empty list.
template <class Enum>
Status parse(const Setting& setting, std::string_view key, std::string_view text,
             std::vector<Enum>& out) {
  std::vector<Enum> list;
  for (size_t at = 0; text != kNone && at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    const auto found =
        std::find(setting.choices.begin(), setting.choices.end(), text.substr(at, comma - at));
    if (found == setting.choices.end()) return refuse(setting, key, text);
    const auto word = static_cast<Enum>(found - setting.choices.begin());
    if (std::find(list.begin(), list.end(), word) != list.end())
      return Status(Code::kConfig,
                    fmt::format("{} = {}: {} is named twice", key, shown(text), *found))
          .about(key);
    list.push_back(word);
    at = comma + 1;
  }
  out = std::move(list);
  return {};
}

Status parse(const Setting& setting, std::string_view key, std::string_view text,
             std::string& out) {
  if (setting.unit == kFolder || setting.unit == kFile) {
    constexpr size_t kMost = 1024;
    const bool printable =
        std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 || c < 0; });
    if (!text.starts_with('/') || text.size() > kMost || !printable)
      return refuse(setting, key, text);
  } else if (setting.unit == kPins) {
    if (Status s = setting.key.ends_with("kv") ? check_kv_pins(text)
                                               : check_pins(text, setting.key.ends_with("experts"));
        !s.ok())
      return std::move(s).in(key).about(key);
  } else if (setting.unit == kDevice && text == kAuto) {
    // Left to the plan.
  } else if (!setting.choices.empty()) {
    if (std::find(setting.choices.begin(), setting.choices.end(), text) == setting.choices.end())
      return refuse(setting, key, text);
  } else if (Result<std::vector<std::string>> devices = parse_devices(text); !devices.ok()) {
    return std::move(devices).status().in(key).about(key);
  } else if (setting.unit == kDevice && devices->size() != 1) {
    return refuse(setting, key, text);
  }
  out = text;
  return {};
}

// ---- value -> text ----

std::string text_of(const Setting&, int64_t value) {
  return fmt::format("{}", value);
}

template <class Enum>
requires std::is_enum_v<Enum> std::string text_of(const Setting& setting, Enum value) {
  const auto index = static_cast<size_t>(value);
  // A value that is no enumerator becomes text that set() refuses.
  return index < setting.choices.size() ? std::string(setting.choices[index])
                                        : fmt::format("{}", index);
}

template <class Enum>
std::string text_of(const Setting& setting, const std::vector<Enum>& list) {
  std::string out;
  for (const Enum value : list) {
    if (!out.empty()) out += ',';
    out += text_of(setting, value);
  }
  return out.empty() ? std::string(kNone) : out;
}

std::string text_of(const Setting&, const std::string& value) {
  return value;
}

// ---- a row's functions, by the type of its field ----

template <class T>
struct IsList : std::false_type {};
template <class T>
struct IsList<std::vector<T>> : std::true_type {};

template <class T>
struct IsOptional : std::false_type {};
template <class T>
struct IsOptional<std::optional<T>> : std::true_type {};

template <auto Member>
using FieldOf = std::remove_reference_t<decltype(std::declval<Config&>().*Member)>;

template <auto Member>
Status set_field(const Setting& setting, Config& config, std::string_view key,
                 std::string_view text) {
  auto& field = config.*Member;
  if constexpr (IsOptional<FieldOf<Member>>::value) {
    if (text == kAuto) {
      field.reset();
      return {};
    }
    typename FieldOf<Member>::value_type value{};
    FATHOM_TRY(parse(setting, key, text, value));
    field = value;
    return {};
  } else if constexpr (std::is_same_v<FieldOf<Member>, std::map<std::string, int64_t>>) {
    const std::string name(key.substr(setting.key.size()));
    if (Result<std::vector<std::string>> device = parse_devices(name); !device.ok())
      return std::move(device).status().in(shown(key)).about(key);
    else if (device->size() != 1)
      return Status(Code::kConfig, fmt::format("{}: one device, not a list", shown(key)))
          .about(key);
    if (text == kAuto) {
      field.erase(name);
      return {};
    }
    int64_t value = 0;
    FATHOM_TRY(parse(setting, key, text, value));
    field[name] = value;
    return {};
  } else {
    return parse(setting, key, text, field);
  }
}

template <auto Member>
std::string get_field(const Setting& setting, const Config& config, std::string_view key) {
  const auto& field = config.*Member;
  if constexpr (IsOptional<FieldOf<Member>>::value) {
    return field ? text_of(setting, *field) : std::string(kAuto);
  } else if constexpr (std::is_same_v<FieldOf<Member>, std::map<std::string, int64_t>>) {
    const auto found = field.find(std::string(key.substr(setting.key.size())));
    return found == field.end() ? std::string(kAuto) : text_of(setting, found->second);
  } else {
    return text_of(setting, field);
  }
}

template <auto Member>
constexpr Setting row(Setting setting) {
  using Field = FieldOf<Member>;
  setting.takes_auto = IsOptional<Field>::value ||
                       std::is_same_v<Field, std::map<std::string, int64_t>> ||
                       setting.unit == kPins || setting.unit == kDevice;
  setting.type = IsList<Field>::value                               ? "list"
                 : !setting.choices.empty()                         ? "choice"
                 : setting.unit == kFolder || setting.unit == kFile ? setting.unit
                 : setting.unit == kPins                            ? "placement"
                 : setting.unit == kDevice                          ? "device"
                 : setting.unit == "bytes"                          ? "bytes"
                 : setting.unit.empty()                             ? "devices"
                                                                    : "integer";
  setting.set = set_field<Member>;
  setting.get = get_field<Member>;
  return setting;
}

// Defaults are those of Config's fields.
constexpr Setting kSettings[] = {
    row<&Config::devices>(
        {.key = "devices",
         .memory = "each device holds its layers' weights and cache, within a budget of its own",
         .text = "Devices to use, in order, separated by commas; \"cpu:0,cpu:1\" declares two CPU "
                 "devices, \"numa\" one per memory node (cpu:<node>), \"cuda:0,cpu\" names a GPU; "
                 "without a CPU the host holds tables alone."}),
    row<&Config::devices_missing>(
        {.key = "devices.missing",
         .choices = kMissingDevices,
         .memory = "none",
         .text = "What to do about a device that cannot be had (no driver, no plug-in, no such "
                 "GPU): refuse, or skip it with a warning so long as another is left."}),
    row<&Config::cuda_plugin>(
        {.key = "cuda.plugin",
         .unit = kFile,
         .memory = "none",
         .text = "File of the plug-in for GPUs; auto: libfathom_cuda.so beside the library."}),
    row<&Config::budget>(
        {.key = "budget.",
         .unit = "bytes",
         .max = kMaxBudget,
         .memory = "the most this device may hold; what would exceed it is refused",
         .text = "Bytes the device may hold, with K, M, G or T for powers of 1024; \"host\" bounds "
                 "all CPU devices together; auto: what is free when the engine is made."}),
    row<&Config::context_max>(
        {.key = "context.max",
         .unit = "tokens",
         .min = 1,
         .max = kMaxTokens,
         .memory = "none by itself: the cache grows as tokens arrive; the plan counts it full",
         .text = "Tokens a session may hold; auto: what fits the budgets, at most what the model "
                 "was trained for."}),
    row<&Config::context_reserve>(
        {.key = "context.reserve",
         .unit = "tokens",
         .max = kMaxTokens,
         .memory = "cache of this many tokens is taken when a session starts",
         .text = "Tokens of cache taken at once, so that they cannot be refused later; at most "
                 "context.max."}),
    row<&Config::kv_type>(
        {.key = "kv.type",
         .choices = kKvTypes,
         .memory = "bytes per token of the cache: f32 4, bf16 and f16 2, fp8 and q8_0 about 1, "
                   "q4_0 about 0.6 per latent value",
         .text = "Type of the cached latent columns; auto: f32 with numerics exact, else f16."}),
    row<&Config::kv_recent_16bit>(
        {.key = "kv.recent_16bit",
         .unit = "tokens",
         .max = kMaxTokens,
         .memory = "pages with one of the last so many tokens take 16 bits per value whatever "
                   "kv.type is",
         .text = "Tokens at the end whose pages stay in f16 and are rewritten in kv.type when they "
                 "leave the window; at least prefill.chunk; 0: none."}),
    row<&Config::kv_first_16bit>(
        {.key = "kv.first_16bit",
         .unit = "tokens",
         .max = kMaxTokens,
         .memory = "pages with one of the first so many tokens take 16 bits per value whatever "
                   "kv.type is",
         .text = "Tokens at the beginning whose pages stay in f16; 0: none."}),
    row<&Config::kv_page_tokens>(
        {.key = "kv.page_tokens",
         .unit = "tokens",
         .min = 16,
         .max = 4096,
         .power_of_two = true,
         .memory = "the cache grows and shrinks by whole pages; on average half a page is unused",
         .text = "Tokens per cache page; auto: 64, or what makes a page about 2 MiB."}),
    row<&Config::kv_tiers>(
        {.key = "kv.tiers",
         .choices = kTiers,
         .memory = "beyond device: a staging buffer per session; pages in the file take no memory",
         .text = "Where cache pages may live, best first; host is for devices with memory of their "
                 "own."}),
    row<&Config::kv_spill_folder>(
        {.key = "kv.spill_folder",
         .unit = kFolder,
         .memory = "none, if it is on a disk",
         .text = "Where the file tier keeps one nameless file per session, gone with the process "
                 "however it ends."}),
    row<&Config::kv_spill_tmpfs>(
        {.key = "kv.spill_tmpfs",
         .choices = kSpillTmpfs,
         .memory = "allow: spilled pages in such a folder take the machine's memory, outside every "
                   "budget",
         .text = "What to do about a kv.spill_folder whose files lie in memory (tmpfs, ramfs): "
                 "refuse, or allow with a remark."}),
    row<&Config::kv_ladder>(
        {.key = "kv.ladder",
         .choices = kLadderSteps,
         .memory = "the plan of a context that does not fit counts on it",
         .text = "What a session does, in this order, when memory ends: prefill in shorter passes, "
                 "cold pages to the host, into a smaller type, to the file; then its context is "
                 "full. none: the budget ends it at once."}),
    row<&Config::kv_ladder_type>(
        {.key = "kv.ladder_type",
         .choices = kKvTypes,
         .memory = "bytes per token of pages that were requantised",
         .text = "The smallest type that requantise may rewrite cold pages in."}),
    row<&Config::prefill_chunk>(
        {.key = "prefill.chunk",
         .unit = "tokens",
         .min = 1,
         .max = 8192,
         .memory = "activations and workspace grow with it; the context does not matter",
         .text = "Tokens per pass of prefill; auto: 512, or fewer when the budget asks for it."}),
    row<&Config::prefill_in_flight>(
        {.key = "prefill.in_flight",
         .unit = "chunks",
         .min = 1,
         .max = 4,
         .memory = "hidden rows of a chunk on every device, for each",
         .text = "Chunks of a prompt under way at once where routed experts live on other devices "
                 "than their layers; auto: 3 where it pays and there is room, else 1."}),
    row<&Config::attention_form>(
        {.key = "attention.form",
         .choices = kAttentionForms,
         .memory = "expanded needs workspace for a tile of keys and values",
         .text = "Form of attention in prefill, decode is always absorbed; auto: expanded for "
                 "chunks above the crossover."}),
    row<&Config::placement_layers>(
        {.key = "placement.layers",
         .unit = kPins,
         .memory = "attention weights, cache pages and scratch of the layers move to the device",
         .text =
             "Pins layers to devices, such as cuda:0=0-29,cuda:1=*; auto: the plan places them."}),
    row<&Config::placement_experts>(
        {.key = "placement.experts",
         .unit = kPins,
         .memory = "routed experts move to the device, and to no other",
         .text = "Pins routed experts by layer or by expert of a layer, such as "
                 "cpu=*,cuda:0=1-9,cuda:1=10:0-79; auto: the plan places them."}),
    row<&Config::placement_embed>({.key = "placement.embed",
                                   .unit = kDevice,
                                   .memory = "the embedding moves to the device",
                                   .text = "Device of the embedding; auto: the plan places it."}),
    row<&Config::placement_head>(
        {.key = "placement.head",
         .unit = kDevice,
         .memory = "output head and logits move to the device",
         .text = "Device of the final norm and the output head; auto: the plan places them."}),
    row<&Config::placement_kv>(
        {.key = "placement.kv",
         .unit = kPins,
         .memory = "pages of the cache move to the devices named, with buffers for queries",
         .text = "Devices that hold a text's cache rows, in order, such as home=65536,cpu=* (home: "
                 "the layer's own); auto: home, and several where one cannot hold them."}),
    row<&Config::placement_goal>(
        {.key = "placement.goal",
         .choices = kGoals,
         .memory = "which device holds what",
         .text = "What the placement over several devices makes fast: a step of decode, the prompt "
                 "(prefill), or both (mix)."}),
    row<&Config::experts_cache>(
        {.key = "experts.cache",
         .unit = "bytes",
         .max = kMaxBudget,
         .memory = "what is idle of a device's budget, given back as the text grows",
         .text = "Bytes of copies of the most used routed experts that a device may keep of layers "
                 "whose experts live elsewhere; auto: all that is idle on devices with memory of "
                 "their own; 0: none."}),
    row<&Config::experts_cache_window>(
        {.key = "experts.cache_window",
         .unit = "tokens",
         .min = 16,
         .max = kMaxTokens,
         .memory = "none",
         .text = "Tokens after which the counts of the experts' use are halved."}),
    row<&Config::weights_type>(
        {.key = "weights.type",
         .choices = kWeightsTypes,
         .memory = "the bytes that a plan counts for weights it cannot see",
         .text = "Type to assume for the weights of a model of which only config.json is there "
                 "(q4_k: the Q4_K_M mixture); auto: what config.json says, bf16 or fp8."}),
    row<&Config::sessions_max>(
        {.key = "sessions.max",
         .unit = "sessions",
         .min = 1,
         .max = 4096,
         .memory = "the plan makes room for the cache and activations of so many",
         .text = "Sessions that may be open at once."}),
    row<&Config::threads>(
        {.key = "threads",
         .unit = "threads",
         .max = 1024,
         .memory = "a stack and a little scratch per thread",
         .text = "Threads per CPU device; 0: the processors this process may use."}),
    row<&Config::numa>(
        {.key = "numa",
         .choices = kNumaModes,
         .memory = "none: one copy, whose pages lie on the nodes that read them",
         .text =
             "What a CPU device makes of several memory nodes; rows: each matrix is cut by rows "
             "over them, memory and threads alike; auto: rows where there are several."}),
    row<&Config::isa>(
        {.key = "isa",
         .choices = kIsas,
         .memory = "none",
         .text = "Instruction set of the CPU kernels; auto: the best this machine has; others are "
                 "refused when it lacks them."}),
    row<&Config::numerics>(
        {.key = "numerics",
         .choices = kNumerics,
         .memory = "exact: f32 cache unless kv.type says otherwise, and scratch for dequantised "
                   "weights",
         .text = "fast: activations rounded to int8 or bf16 where a kernel wants them; exact: f32 "
                 "activations and dequantised weights."}),
};

bool is_device_name(std::string_view name) {
  const size_t colon = name.find(':');
  const std::string_view word = name.substr(0, colon);
  const auto lower = [](char c) { return c >= 'a' && c <= 'z'; };
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  if (word.empty() || word.size() > 16 || !std::all_of(word.begin(), word.end(), lower))
    return false;
  if (colon == name.npos) return true;
  const std::string_view number = name.substr(colon + 1);
  return !number.empty() && number.size() <= 4 && std::all_of(number.begin(), number.end(), digit);
}

}  // namespace

std::string Setting::name() const {
  return is_family() ? fmt::format("{}<device>", key) : std::string(key);
}

std::string Setting::range_text() const {
  const std::string_view either = takes_auto ? "auto or " : "";
  if (type == "list")
    return fmt::format("none, or some of {}, separated by commas", fmt::join(choices, ", "));
  if (type == "placement")
    return "auto or device=layers, separated by commas; layers are *, or numbers and ranges such "
           "as "
           "0-3+8; of experts: device=layers:experts; of kv: device=tokens, the last one device=*";
  if (type == "device") return "auto or the name of one device";
  if (type == kFolder || type == kFile)
    return fmt::format("{}an absolute path of at most 1024 bytes", either);
  if (!choices.empty()) {
    const std::string words = fmt::format("{}", fmt::join(choices, ", "));
    return takes_auto ? fmt::format("auto, {}", words) : words;
  }
  if (unit == "bytes") return fmt::format("{}in [{}, {}] bytes", either, min, max);
  if (is_number())
    return fmt::format("{}{} in [{}, {}]", either, power_of_two ? "a power of two" : "an integer",
                       min, max);
  return "names of devices, separated by commas";
}

std::span<const Setting> settings() noexcept {
  return kSettings;
}

const Setting* find_setting(std::string_view key) noexcept {
  for (const Setting& setting : kSettings)
    if (setting.is_family() ? key.starts_with(setting.key) : key == setting.key) return &setting;
  return nullptr;
}

std::string nearest_setting(std::string_view key) {
  const Setting* nearest = nullptr;
  size_t least = 0;
  for (const Setting& setting : kSettings) {
    const size_t distance = io::edit_distance(key, setting.key);
    if (nearest == nullptr || distance < least) nearest = &setting, least = distance;
  }
  return nearest->name();
}

Result<std::vector<std::string>> parse_devices(std::string_view list) {
  constexpr size_t kMaxDevices = 64;
  std::vector<std::string> names;
  for (size_t at = 0; at <= list.size();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    const std::string_view name = list.substr(at, comma - at);
    at = comma + 1;
    if (!is_device_name(name))
      return Status(Code::kConfig,
                    fmt::format("{} is no name of a device; names are like \"cpu\" or \"cpu:1\"",
                                shown(name)));
    if (std::find(names.begin(), names.end(), name) != names.end())
      return Status(Code::kConfig, fmt::format("device {} is named twice", name));
    if (names.size() == kMaxDevices)
      return Status(Code::kConfig, fmt::format("more than {} devices", kMaxDevices));
    names.emplace_back(name);
  }
  return names;
}

std::string shown(std::string_view text) {
  constexpr size_t kMost = 64;
  std::string out = "\"";
  for (const char c : text.substr(0, kMost)) out += c >= 0x20 && c < 0x7f ? c : '?';
  if (text.size() > kMost) out += "...";
  return out + '"';
}

std::string json_quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace fathom::run
