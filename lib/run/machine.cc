// Machine files: JSON to MachineDescription and back.
#include "fathom/machine.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "../io/json.h"
#include "../io/text.h"
#include "config_schema.h"
#include "fathom/config.hpp"
#include "known_devices.h"

namespace fathom {
namespace {

using io::JsonMember;
using io::JsonValue;
using run::shown;

constexpr io::JsonLimits kLimits = {
    .max_bytes = int64_t{1} << 20, .max_depth = 8, .max_values = 16384};
constexpr size_t kMaxDevices = 64;
constexpr int64_t kMaxBytes = int64_t{1} << 50;
constexpr double kMaxRate = 1e18;   // a thousand times what a card does today
constexpr double kMaxLatency = 10;  // seconds
constexpr double kMaxSkew = 4;

Status bad(std::string_view key, const std::string& message) {
  return Status(Code::kConfig, message).about(key);
}

// Every member is one of `known`.
Status check_keys(JsonValue object, std::string_view where,
                  std::initializer_list<std::string_view> known) {
  for (const JsonMember member : object.members()) {
    if (std::find(known.begin(), known.end(), member.key) != known.end()) continue;
    const std::string_view nearest =
        *std::min_element(known.begin(), known.end(), [&](std::string_view a, std::string_view b) {
          return io::edit_distance(member.key, a) < io::edit_distance(member.key, b);
        });
    return bad(member.key, fmt::format("{}: unknown key {}; the nearest is {}", where,
                                       shown(member.key), nearest))
        .at(member.value.offset());
  }
  return {};
}

// A configuration is wrong, not a file: errors of the typed getters keep all but their code.
Status as_config(const Status& status, std::string_view where) {
  return Status(Code::kConfig, fmt::format("{}: {}", where, status.message()))
      .about(status.key())
      .at(status.offset());
}

Status read_text(JsonValue object, std::string_view where, std::string_view key, std::string& out) {
  if (object.find(key).is_null_or_absent()) return {};
  Result<std::string_view> text = io::json_string(object, key);
  if (!text.ok()) return as_config(text.status(), where);
  out = *text;
  return {};
}

Status read_number(JsonValue object, std::string_view where, std::string_view key, double most,
                   double& out) {
  if (object.find(key).is_null_or_absent()) return {};
  Result<double> number = io::json_number(object, key, 0, most);
  if (!number.ok()) return as_config(number.status(), where);
  out = *number;
  return {};
}

// A number, or text with a unit: 25769803776, "24G".
Status read_bytes(JsonValue object, std::string_view where, std::string_view key, int64_t& out) {
  const JsonValue value = object.find(key);
  if (value.is_null_or_absent()) return {};
  if (value.is_string()) {
    Result<int64_t> bytes = parse_bytes(value.string());
    if (!bytes.ok()) return as_config(bytes.status(), fmt::format("{}: {}", where, key));
    out = *bytes;
  } else {
    Result<int64_t> bytes = io::json_integer(object, key, 0, kMaxBytes);
    if (!bytes.ok()) return as_config(bytes.status(), where);
    out = *bytes;
  }
  return {};
}

Status read_source(JsonValue object, std::string_view where, RateSource& out) {
  std::string source;
  FATHOM_TRY(read_text(object, where, "source", source));
  if (source.empty()) return {};
  for (const RateSource known :
       {RateSource::kDocumented, RateSource::kDeclared, RateSource::kMeasured})
    if (source == rate_source_name(known)) {
      out = known;
      return {};
    }
  return bad("source", fmt::format("{}: source = {}: must be documented, declared or measured",
                                   where, shown(source)));
}

Result<DType> weight_type(std::string_view name, std::string_view where) {
  std::string upper(name);
  for (char& c : upper)
    if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
  if (upper == "FP8") upper = dtype_info(DType::kF8E4M3).name;
  for (int i = 0; i < kDTypeCount; ++i)
    if (const auto type = static_cast<DType>(i);
        is_weight_dtype(type) && dtype_info(type).name == upper)
      return type;
  return bad("read_bytes_per_s_by_type",
             fmt::format("{}: read_bytes_per_s_by_type: {} is no type of weights; types are like "
                         "q4_k, q8_0, bf16, fp8",
                         where, shown(name)));
}

Result<MachineDevice> read_device(JsonValue object, size_t index) {
  std::string where = fmt::format("devices[{}]", index);
  if (!object.is_object())
    return bad("devices", fmt::format("{} must be an object, found {}", where,
                                      io::json_type_name(object.type())))
        .at(object.offset());
  FATHOM_TRY(
      check_keys(object, where,
                 {"name", "kind", "like", "bytes", "budget_bytes", "runtime_bytes", "threads",
                  "read_bytes_per_s", "read_bytes_per_s_by_type", "quantised_flops_per_s",
                  "dense_flops_per_s", "attention_flops_per_s", "operation_s", "source"}));
  MachineDevice device;
  std::string kind;
  FATHOM_TRY(read_text(object, where, "name", device.name));
  if (!device.name.empty()) where += fmt::format(" ({})", shown(device.name));
  FATHOM_TRY(read_text(object, where, "kind", kind));
  // "cpu:1" and "cuda:0" say their kind.
  if (kind.empty()) kind = device.name.substr(0, device.name.find(':'));
  if (kind != "cpu" && kind != "cuda")
    return bad("kind", fmt::format("{}: kind = {}: must be cpu or cuda", where, shown(kind)))
        .at(object.offset());
  device.kind = kind == "cpu" ? DeviceKind::kCpu : DeviceKind::kCuda;
  FATHOM_TRY(read_text(object, where, "like", device.like));
  FATHOM_TRY(read_bytes(object, where, "bytes", device.bytes));
  FATHOM_TRY(read_bytes(object, where, "budget_bytes", device.budget_bytes));
  FATHOM_TRY(read_bytes(object, where, "runtime_bytes", device.runtime_bytes));
  Result<int64_t> threads = io::json_integer_or(object, "threads", 0, 0, 1024);
  if (!threads.ok()) return as_config(threads.status(), where);
  device.threads = static_cast<int>(*threads);
  const std::pair<const char*, double*> rates[] = {
      {"read_bytes_per_s", &device.read_bytes_per_s},
      {"quantised_flops_per_s", &device.quantised_flops_per_s},
      {"dense_flops_per_s", &device.dense_flops_per_s},
      {"attention_flops_per_s", &device.attention_flops_per_s}};
  for (const auto& [key, rate] : rates) {
    FATHOM_TRY(read_number(object, where, key, kMaxRate, *rate));
    if (*rate > 0) device.source = RateSource::kDeclared;
  }
  FATHOM_TRY(read_number(object, where, "operation_s", kMaxLatency, device.operation_s));
  const JsonValue by_type = object.find("read_bytes_per_s_by_type");
  if (!by_type.is_null_or_absent() && !by_type.is_object())
    return bad("read_bytes_per_s_by_type",
               fmt::format("{}: read_bytes_per_s_by_type must be an object of types", where))
        .at(by_type.offset());
  for (const JsonMember member : by_type.members()) {
    FATHOM_TRY_ASSIGN(const DType type, weight_type(member.key, where));
    FATHOM_TRY(
        read_number(by_type, where, member.key, kMaxRate, device.read_bytes_per_s_by_type[type]));
  }
  FATHOM_TRY(read_source(object, where, device.source));
  return device;
}

Result<MachineLink> read_link(JsonValue object, size_t index, const MachineDescription& machine) {
  const std::string where = fmt::format("links[{}]", index);
  if (!object.is_object())
    return bad("links", fmt::format("{} must be an object, found {}", where,
                                    io::json_type_name(object.type())))
        .at(object.offset());
  FATHOM_TRY(check_keys(object, where, {"from", "to", "bytes_per_s", "latency_s", "source"}));
  MachineLink link;
  link.source = RateSource::kDeclared;
  int* const ends[] = {&link.from, &link.to};
  for (int end = 0; end < 2; ++end) {
    const char* key = end == 0 ? "from" : "to";
    std::string name;
    FATHOM_TRY(read_text(object, where, key, name));
    *ends[end] = machine.find(name);
    if (*ends[end] < 0)
      return bad(key, fmt::format("{}: {} = {}: no device of this name", where, key, shown(name)))
          .at(object.offset());
  }
  if (link.from > link.to) std::swap(link.from, link.to);
  FATHOM_TRY(read_number(object, where, "bytes_per_s", kMaxRate, link.bytes_per_s));
  FATHOM_TRY(read_number(object, where, "latency_s", kMaxLatency, link.latency_s));
  FATHOM_TRY(read_source(object, where, link.source));
  return link;
}

// A rate as the shortest text that gives it back.
std::string rate_text(double rate) {
  return fmt::format("{}", rate);
}

}  // namespace

Result<MachineDescription> MachineDescription::parse(std::string_view json) {
  Result<io::JsonDocument> document = io::JsonDocument::parse(json, kLimits);
  if (!document.ok()) return as_config(document.status(), "machine");
  const JsonValue root = document->root();
  if (!root.is_object())
    return Status(Code::kConfig, fmt::format("a machine is a JSON object, found {}",
                                             io::json_type_name(root.type())))
        .at(root.offset());
  FATHOM_TRY(check_keys(root, "machine", {"name", "devices", "links", "file", "expert_skew"}));
  MachineDescription machine;
  FATHOM_TRY(read_text(root, "machine", "name", machine.name));
  FATHOM_TRY(read_number(root, "machine", "expert_skew", kMaxSkew, machine.expert_skew));
  const JsonValue devices = root.find("devices");
  if (!devices.is_array() || devices.size() == 0)
    return bad("devices", "machine: devices must be an array of at least one device")
        .at(root.offset());
  if (devices.size() > static_cast<int64_t>(kMaxDevices))
    return bad("devices", fmt::format("machine: {} devices, at most {} are taken", devices.size(),
                                      kMaxDevices));
  for (const JsonValue device : devices) {
    FATHOM_TRY_ASSIGN(MachineDevice read, read_device(device, machine.devices.size()));
    machine.devices.push_back(std::move(read));
  }
  if (const JsonValue file = root.find("file"); !file.is_null_or_absent()) {
    if (!file.is_object()) return bad("file", "machine: file must be an object").at(file.offset());
    FATHOM_TRY(check_keys(file, "file", {"bytes_per_s", "source"}));
    FATHOM_TRY(read_number(file, "file", "bytes_per_s", kMaxRate, machine.file_bytes_per_s));
    machine.file_source = RateSource::kDeclared;
    FATHOM_TRY(read_source(file, "file", machine.file_source));
  }
  const JsonValue links = root.find("links");
  if (!links.is_null_or_absent() && !links.is_array())
    return bad("links", "machine: links must be an array").at(links.offset());
  for (const JsonValue link : links) {
    FATHOM_TRY_ASSIGN(const MachineLink read, read_link(link, machine.links.size(), machine));
    machine.links.push_back(read);
  }
  FATHOM_TRY(machine.complete());
  return machine;
}

Result<MachineDescription> MachineDescription::read(const std::string& path) {
  FATHOM_TRY_ASSIGN(const std::string text, io::read_text_file(path, kLimits.max_bytes));
  Result<MachineDescription> machine = parse(text);
  if (!machine.ok()) return std::move(machine).status().in(path);
  return machine;
}

Status MachineDescription::complete() {
  if (devices.empty()) return bad("devices", "a machine has at least one device");
  if (!(expert_skew >= 0 && expert_skew <= kMaxSkew))
    return bad("expert_skew",
               fmt::format("machine: expert_skew = {}: must be in [0, {}]", expert_skew, kMaxSkew));
  for (size_t d = 0; d < devices.size(); ++d) {
    MachineDevice& device = devices[d];
    Result<std::vector<std::string>> names = run::parse_devices(device.name);
    if (!names.ok()) return as_config(names.status(), fmt::format("devices[{}]: name", d));
    if (names->size() != 1 || device.name == "host")
      return bad("name", fmt::format("devices[{}]: name = {}: one name such as \"cuda:0\"", d,
                                     shown(device.name)));
    if (find(device.name) != static_cast<int>(d))
      return bad("name", fmt::format("device {} is described twice", device.name));
    if (device.kind != DeviceKind::kCpu && device.kind != DeviceKind::kCuda)
      return bad("kind", fmt::format("{}: kind must be cpu or cuda", device.name));
    if (!run::fill_documented(device)) {
      std::string known, nearest;
      size_t least = SIZE_MAX;
      for (const KnownDevice& candidate : known_devices()) {
        if (candidate.kind != device.kind) continue;
        known += (known.empty() ? "" : ", ") + candidate.name;
        if (const size_t distance = io::edit_distance(device.like, candidate.name);
            distance < least)
          least = distance, nearest = candidate.name;
      }
      return bad("like", fmt::format("{}: like = {}: not known; the nearest is {} (known: {})",
                                     device.name, shown(device.like), nearest, known));
    }
    if (device.bytes < 1 || device.bytes > kMaxBytes)
      return bad("bytes", fmt::format("{}: bytes = {}: must be in [1, {}]", device.name,
                                      device.bytes, kMaxBytes));
    if (device.budget_bytes == 0) device.budget_bytes = device.bytes;
    if (device.budget_bytes < 0 || device.budget_bytes > device.bytes)
      return bad("budget_bytes", fmt::format("{}: budget_bytes = {}: must be in [1, bytes = {}]",
                                             device.name, device.budget_bytes, device.bytes));
    if (device.runtime_bytes < 0 || device.runtime_bytes > device.bytes)
      return bad("runtime_bytes", fmt::format("{}: runtime_bytes = {}: must be in [0, bytes = {}]",
                                              device.name, device.runtime_bytes, device.bytes));
    std::vector<std::pair<std::string_view, double>> rates = {
        {"read_bytes_per_s", device.read_bytes_per_s},
        {"quantised_flops_per_s", device.quantised_flops_per_s},
        {"dense_flops_per_s", device.dense_flops_per_s},
        {"attention_flops_per_s", device.attention_flops_per_s}};
    for (const auto& [type, rate] : device.read_bytes_per_s_by_type)
      rates.push_back({"read_bytes_per_s_by_type", rate});
    for (const auto& [key, rate] : rates)
      if (!(rate >= 1 && rate <= kMaxRate))
        return bad(key, fmt::format("{}: {} = {}: must be in [1, {:g}]", device.name, key, rate,
                                    kMaxRate));
    if (!(device.operation_s >= 0 && device.operation_s <= kMaxLatency))
      return bad("operation_s", fmt::format("{}: operation_s = {}: must be in [0, {}]", device.name,
                                            device.operation_s, kMaxLatency));
  }

  if (file_bytes_per_s == 0) {
    file_bytes_per_s = run::kDocumentedFileRate;
    file_source = RateSource::kDocumented;
  }
  if (!(file_bytes_per_s >= 1 && file_bytes_per_s <= kMaxRate))
    return bad("file", fmt::format("file: bytes_per_s = {}: must be in [1, {:g}]", file_bytes_per_s,
                                   kMaxRate));

  std::vector<MachineLink> all;
  for (int a = 0; a < static_cast<int>(devices.size()); ++a)
    for (int b = a + 1; b < static_cast<int>(devices.size()); ++b) {
      MachineLink link = run::documented_link(devices[static_cast<size_t>(a)].kind,
                                              devices[static_cast<size_t>(b)].kind);
      link.from = a, link.to = b;
      all.push_back(link);
    }
  std::vector<bool> given(all.size());
  for (const MachineLink& link : links) {
    const auto end = static_cast<int>(devices.size());
    if (link.from < 0 || link.to < 0 || link.from >= end || link.to >= end || link.from == link.to)
      return bad("links", fmt::format("a link from device {} to device {} of {}", link.from,
                                      link.to, devices.size()));
    const auto at = std::find_if(all.begin(), all.end(), [&](const MachineLink& other) {
      return other.from == std::min(link.from, link.to) && other.to == std::max(link.from, link.to);
    });
    const auto index = static_cast<size_t>(at - all.begin());
    const std::string where =
        fmt::format("link {} - {}", devices[static_cast<size_t>(link.from)].name,
                    devices[static_cast<size_t>(link.to)].name);
    if (given[index]) return bad("links", where + " is described twice");
    given[index] = true;
    if (link.bytes_per_s != 0) at->bytes_per_s = link.bytes_per_s;
    if (link.latency_s != 0) at->latency_s = link.latency_s;
    at->source = link.source;
    if (!(at->bytes_per_s >= 1 && at->bytes_per_s <= kMaxRate) ||
        !(at->latency_s >= 0 && at->latency_s <= kMaxLatency))
      return bad("links",
                 fmt::format("{}: bytes_per_s = {}, latency_s = {}: must be in [1, {:g}] "
                             "and [0, {}]",
                             where, at->bytes_per_s, at->latency_s, kMaxRate, kMaxLatency));
  }
  links = std::move(all);
  return {};
}

const MachineLink& MachineDescription::link(int a, int b) const {
  // links holds the pairs (0,1), (0,2), ..., (1,2), ...: row `low` starts after those before it.
  const auto n = static_cast<int>(devices.size());
  const int low = std::min(a, b), high = std::max(a, b);
  return links[static_cast<size_t>(low * (2 * n - low - 1) / 2 + high - low - 1)];
}

int MachineDescription::find(std::string_view device_name) const noexcept {
  for (size_t d = 0; d < devices.size(); ++d)
    if (devices[d].name == device_name) return static_cast<int>(d);
  return -1;
}

int MachineDescription::host() const noexcept {
  for (size_t d = 0; d < devices.size(); ++d)
    if (devices[d].kind == DeviceKind::kCpu) return static_cast<int>(d);
  return -1;
}

std::string MachineDescription::to_json() const {
  std::string out = fmt::format("{{\n  \"name\": {},\n  \"devices\": [", run::json_quote(name));
  for (const MachineDevice& device : devices) {
    out += fmt::format("{}\n    {{\"name\": {}, \"kind\": \"{}\", ",
                       &device == &devices.front() ? "" : ",", run::json_quote(device.name),
                       device.kind == DeviceKind::kCpu ? "cpu" : "cuda");
    if (!device.like.empty()) out += fmt::format("\"like\": {}, ", run::json_quote(device.like));
    out += fmt::format(
        "\"bytes\": {}, \"budget_bytes\": {}, \"runtime_bytes\": {}, \"threads\": {},\n     "
        "\"read_bytes_per_s\": {}, \"quantised_flops_per_s\": {}, \"dense_flops_per_s\": {},\n     "
        "\"attention_flops_per_s\": {}, \"operation_s\": {}",
        device.bytes, device.budget_bytes, device.runtime_bytes, device.threads,
        rate_text(device.read_bytes_per_s), rate_text(device.quantised_flops_per_s),
        rate_text(device.dense_flops_per_s), rate_text(device.attention_flops_per_s),
        rate_text(device.operation_s));
    if (!device.read_bytes_per_s_by_type.empty()) {
      std::string types;
      for (const auto& [type, rate] : device.read_bytes_per_s_by_type)
        types += fmt::format("{}{}: {}", types.empty() ? "" : ", ",
                             run::json_quote(dtype_info(type).name), rate_text(rate));
      out += fmt::format(",\n     \"read_bytes_per_s_by_type\": {{{}}}", types);
    }
    out += fmt::format(", \"source\": \"{}\"}}", rate_source_name(device.source));
  }
  out += "\n  ],\n  \"links\": [";
  for (const MachineLink& link : links)
    out += fmt::format(
        "{}\n    {{\"from\": {}, \"to\": {}, \"bytes_per_s\": {}, \"latency_s\": {}, "
        "\"source\": \"{}\"}}",
        &link == &links.front() ? "" : ",",
        run::json_quote(devices[static_cast<size_t>(link.from)].name),
        run::json_quote(devices[static_cast<size_t>(link.to)].name), rate_text(link.bytes_per_s),
        rate_text(link.latency_s), rate_source_name(link.source));
  return out + fmt::format(
                   "\n  ],\n  \"file\": {{\"bytes_per_s\": {}, \"source\": \"{}\"}},\n  "
                   "\"expert_skew\": {}\n}}",
                   rate_text(file_bytes_per_s), rate_source_name(file_source),
                   rate_text(expert_skew));
}

}  // namespace fathom
