// The schema of the configuration: one row per key, from which set, get, JSON, validation, the
// command line's help and the bindings' enumerations come.  To add a key, add a field to Config
// and a row to the table in config_schema.cc; nothing else changes.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "fathom/config.hpp"

namespace fathom::run {

struct Setting {
  std::string_view key;        // a family ends in a dot: "budget." + name of a device
  std::string_view unit = {};  // "tokens", "bytes", "threads"; empty for words
  int64_t min = 0, max = 0;    // numbers: both included
  bool power_of_two = false;   // numbers
  std::span<const std::string_view> choices = {};  // words: the only ones taken
  std::string_view memory;                         // effect on memory
  std::string_view text;                           // meaning, one sentence

  // Filled in by the type of the field.
  std::string_view type = {};  // "integer", "bytes", "choice", "list", "folder", "placement",
                               // "device", "devices"
  bool takes_auto = false;     // "auto" leaves the value to the plan
  // `key` is the whole key, for families.  set changes nothing when it fails.
  Status (*set)(const Setting&, Config&, std::string_view key, std::string_view value) = nullptr;
  std::string (*get)(const Setting&, const Config&, std::string_view key) = nullptr;

  bool is_family() const noexcept { return key.ends_with('.'); }
  bool is_number() const noexcept { return type == "integer" || type == "bytes"; }
  std::string name() const;        // "kv.type", "budget.<device>"
  std::string range_text() const;  // "auto or a power of two in [16, 4096]", "auto, scalar, avx2"
};

std::span<const Setting> settings() noexcept;

// The row of a key, null when there is none.  A family's row stands for its prefix and any suffix.
const Setting* find_setting(std::string_view key) noexcept;

// Name of the row whose key takes the fewest changes of a character to become `key`.
std::string nearest_setting(std::string_view key);

// In a list of devices: one CPU device per memory node.
inline constexpr std::string_view kNodeDevices = "numa";

// Names in a list such as "cpu:0,cpu:1", in order.  Errors: kConfig; the message says which part
// is wrong and why: empty, twice, not of the form word or word:number.
Result<std::vector<std::string>> parse_devices(std::string_view list);

// `text` for a message: quoted, at most 64 bytes, without bytes that could harm a terminal.
std::string shown(std::string_view text);

// Text as a JSON string, quotes included.  `text` is UTF-8.
std::string json_quote(std::string_view text);

}  // namespace fathom::run
