// Config: setting, reading, merging and checking, all driven by the schema (config_schema.cc).
#include "fathom/config.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <vector>

#include "lib/io/json.h"
#include "lib/run/config_schema.h"

namespace fathom {
namespace {

using run::find_setting;
using run::Setting;
using run::shown;

constexpr io::JsonLimits kJsonLimits = {
    .max_bytes = int64_t{1} << 20, .max_depth = 16, .max_values = 16384};

Result<const Setting*> known(std::string_view key) {
  if (const Setting* setting = find_setting(key)) return setting;
  return Status(Code::kConfig, fmt::format("unknown key {}; the nearest is {}", shown(key),
                                           run::nearest_setting(key)))
      .about(key);
}

// Whole keys of a row: one, or for a family those of the declared devices and of all values set.
std::vector<std::string> keys_of(const Setting& setting, const Config& config) {
  if (!setting.is_family()) return {std::string(setting.key)};
  std::vector<std::string> names;
  if (Result<std::vector<std::string>> devices = run::parse_devices(config.devices); devices.ok())
    names = std::move(*devices);
  std::erase(names, run::kNodeDevices);
  for (const auto& [name, bytes] : config.budget)
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  for (std::string& name : names) name.insert(0, setting.key);
  return names;
}

// The text that set() takes for a JSON value: scalars, and arrays of strings for lists.
Result<std::string> setting_text(std::string_view key, io::JsonValue value) {
  switch (value.type()) {
    case io::JsonType::kBool:
    case io::JsonType::kInteger:
    case io::JsonType::kUnsigned:
    case io::JsonType::kReal:
    case io::JsonType::kString:
      return io::json_text(value);
    case io::JsonType::kArray: {
      std::string list;
      bool strings = true;
      for (const io::JsonValue element : value) {
        strings &= element.is_string();
        if (!list.empty()) list += ',';
        list += element.string();
      }
      if (strings) return list;
      break;
    }
    default:
      break;
  }
  return Status(Code::kConfig, fmt::format("{}: {} is no value; text, a number or \"auto\" is",
                                           shown(key), io::json_type_name(value.type())))
      .about(key);
}

// Sets all members of `object`, whose keys begin with `prefix`.  `seen` are the keys set so far:
// a key given flat and nested in one text would be a guess.
Status merge_object(Config& config, std::string_view prefix, io::JsonValue object,
                    std::vector<std::string>& seen) {
  for (const io::JsonMember member : object.members()) {
    std::string key = fmt::format("{}{}", prefix, member.key);
    if (member.value.is_object()) {
      FATHOM_TRY(merge_object(config, key + ".", member.value, seen));
      continue;
    }
    const uint64_t offset = member.value.offset();
    if (std::find(seen.begin(), seen.end(), key) != seen.end())
      return Status(Code::kConfig, fmt::format("key {} appears twice", shown(key)))
          .about(key)
          .at(offset);
    Result<const Setting*> setting = known(key);
    if (!setting.ok()) return std::move(setting).status().at(offset);
    Result<std::string> text = setting_text(key, member.value);
    if (!text.ok()) return std::move(text).status().at(offset);
    if (Status status = (*setting)->set(**setting, config, key, *text); !status.ok())
      return std::move(status).at(offset);
    seen.push_back(std::move(key));
  }
  return {};
}

Status conflict(std::string_view key, std::string_view message) {
  return Status(Code::kConfig, message).about(key);
}

}  // namespace

Status Config::set(std::string_view key, std::string_view value) {
  FATHOM_TRY_ASSIGN(const Setting* setting, known(key));
  return setting->set(*setting, *this, key, value);
}

Result<std::string> Config::get(std::string_view key) const {
  FATHOM_TRY_ASSIGN(const Setting* setting, known(key));
  return setting->get(*setting, *this, key);
}

Status Config::merge_json(std::string_view json) {
  Result<io::JsonDocument> document = io::JsonDocument::parse(json, kJsonLimits);
  if (!document.ok()) {
    const Status& why = document.status();
    return Status(Code::kConfig, why.message()).at(why.offset()).about(why.key());
  }
  const io::JsonValue root = document->root();
  if (!root.is_object())
    return Status(Code::kConfig, fmt::format("a configuration is a JSON object, found {}",
                                             io::json_type_name(root.type())))
        .at(root.offset());
  Config merged = *this;
  std::vector<std::string> seen;
  FATHOM_TRY(merge_object(merged, "", root, seen));
  *this = std::move(merged);
  return {};
}

Status Config::validate() const {
  // Fields can be assigned without set(): each value must survive the way through its text.
  Config scratch;
  for (const Setting& setting : run::settings())
    for (const std::string& key : keys_of(setting, *this))
      FATHOM_TRY(setting.set(setting, scratch, key, setting.get(setting, *this, key)));

  if (context_max && context_reserve > *context_max)
    return conflict("context.reserve",
                    fmt::format("context.reserve = {} is more than context.max = {}",
                                context_reserve, *context_max));
  if (kv_recent_16bit > 0 && prefill_chunk && *prefill_chunk > kv_recent_16bit)
    return conflict("kv.recent_16bit",
                    fmt::format("kv.recent_16bit = {} is less than prefill.chunk = {}",
                                kv_recent_16bit, *prefill_chunk));
  for (size_t i = 0; i < kv_tiers.size() || i == 0; ++i)
    if (kv_tiers.empty() || kv_tiers.front() != KvTier::kDevice ||
        (i > 0 && kv_tiers[i] <= kv_tiers[i - 1]))
      return conflict("kv.tiers", fmt::format("kv.tiers = {}: the order is device, host, file, and "
                                              "it begins with device",
                                              *get("kv.tiers")));
  FATHOM_TRY_ASSIGN(const std::vector<std::string> names, run::parse_devices(devices));
  // The names of the nodes are known when the engine is made.
  const bool nodes = std::find(names.begin(), names.end(), run::kNodeDevices) != names.end();
  if (nodes && numa != NumaMode::kAuto)
    return conflict("numa", fmt::format("numa = {} is about one device over all nodes, devices = "
                                        "\"{}\" makes one of each",
                                        *get("numa"), devices));
  for (const auto& [name, bytes] : budget)
    if (name != "host" && !(nodes && name.starts_with("cpu:")) &&
        std::find(names.begin(), names.end(), name) == names.end())
      return conflict(fmt::format("budget.{}", name),
                      fmt::format("budget.{} = {}: devices = \"{}\" has no device of this name",
                                  name, bytes, devices));
  return {};
}

std::string Config::to_json() const {
  std::string out = "{";
  for (const Setting& setting : run::settings()) {
    for (const std::string& key : keys_of(setting, *this)) {
      const std::string text = setting.get(setting, *this, key);
      const bool bare = setting.is_number() && text != "auto";
      if (out.size() > 1) out += ", ";
      out += fmt::format("{}: {}", run::json_quote(key), bare ? text : run::json_quote(text));
    }
  }
  return out + "}";
}

std::string Config::schema_json() {
  const Config defaults;
  std::string out = "[";
  for (const Setting& setting : run::settings()) {
    if (out.size() > 1) out += ",";
    out += fmt::format(
        "\n{{\"key\": {}, \"type\": {}, \"unit\": {}, \"default\": {}, \"range\": {}",
        run::json_quote(setting.name()), run::json_quote(setting.type),
        run::json_quote(setting.unit), run::json_quote(setting.get(setting, defaults, setting.key)),
        run::json_quote(setting.range_text()));
    if (setting.is_number())
      out += fmt::format(", \"min\": {}, \"max\": {}", setting.min, setting.max);
    if (!setting.choices.empty()) {
      out += ", \"choices\": [";
      if (setting.takes_auto) out += "\"auto\", ";
      for (const std::string_view& choice : setting.choices)
        out += fmt::format("{}{}", &choice == &setting.choices.front() ? "" : ", ",
                           run::json_quote(choice));
      out += "]";
    }
    out += fmt::format(", \"memory\": {}, \"text\": {}}}", run::json_quote(setting.memory),
                       run::json_quote(setting.text));
  }
  return out + "\n]";
}

Result<int64_t> parse_bytes(std::string_view text) {
  const auto bad = [text] {
    return Status(Code::kConfig,
                  fmt::format("{} is no number of bytes; write 1073741824, 512M, 24G or 1.5T, in "
                              "powers of 1024 and at most 2^63 - 1",
                              shown(text)));
  };
  std::string_view digits = text;
  if (digits.ends_with("iB")) digits.remove_suffix(2);
  int shift = 0;
  if (!digits.empty()) {
    constexpr std::string_view kUnits = "KMGT";
    const char last = digits.back();
    const size_t unit = kUnits.find(last >= 'a' ? static_cast<char>(last - 'a' + 'A') : last);
    if (unit != kUnits.npos) {
      shift = 10 * (static_cast<int>(unit) + 1);
      digits.remove_suffix(1);
    }
  }
  if (shift == 0 && digits.size() != text.size()) return bad();  // "12iB"
  const char* const end = digits.data() + digits.size();
  int64_t whole = 0;
  if (const auto [at, error] = std::from_chars(digits.data(), end, whole);
      error == std::errc() && at == end) {
    if (whole < 0 || whole > INT64_MAX >> shift) return bad();
    return whole << shift;
  }
  // A fraction makes sense with a unit only; it is rounded down to whole bytes.
  double number = 0;
  const auto [at, error] = std::from_chars(digits.data(), end, number, std::chars_format::fixed);
  if (shift == 0 || error != std::errc() || at != end || !(number >= 0)) return bad();
  const double bytes = std::floor(std::ldexp(number, shift));
  if (!(bytes < 0x1p63)) return bad();
  return static_cast<int64_t>(bytes);
}

}  // namespace fathom
