// MachineDescription: what a machine's devices hold and how fast they are - measured here, or read
// from a JSON file that describes a machine that is somewhere else.
//
//   auto machine = MachineDescription::read("two-cards.json");
//   auto engine = Engine::simulate(*machine);          // plans and runs, without that machine
//
// The smallest file:
//
//   {"devices": [{"name": "cpu", "kind": "cpu", "bytes": "256G"},
//                {"name": "cuda:0", "kind": "cuda", "bytes": "24G"}]}
//
// Everything else has a documented default: by device ("like": "rtx-4090", see known_devices()),
// else by kind; links by the kinds of their ends.  A value: copyable, printable.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/backend.hpp"
#include "fathom/status.hpp"
#include "fathom/tensor.hpp"

namespace fathom {

// Where the rates of a device or link come from.
enum class RateSource : uint8_t { kDocumented, kDeclared, kMeasured };
constexpr std::string_view rate_source_name(RateSource source) noexcept {
  constexpr std::string_view kNames[] = {"documented", "declared", "measured"};
  return kNames[static_cast<int>(source)];
}

// One device.  Rates are those that can be sustained, not those of a data sheet.
struct MachineDevice {
  std::string name;                    // "cpu", "cpu:1", "cuda:0"
  DeviceKind kind = DeviceKind::kCpu;  // kCpu or kCuda
  std::string like;                    // a known device; empty: its kind's default
  int64_t bytes = 0;                   // of memory
  int64_t budget_bytes = 0;            // what the library may hold of it; 0: all of it
  int64_t runtime_bytes = 0;           // taken by the driver and libraries before anything of ours
  int threads = 0;                     // CPU: threads that work
  double read_bytes_per_s = 0;         // of its memory
  std::map<DType, double> read_bytes_per_s_by_type;  // weights of a type, where another rate holds
  double quantised_flops_per_s = 0;  // products with quantised weights (a multiply-add is two)
  double dense_flops_per_s = 0;      // products with 32 and 16 bit and FP8 weights
  double attention_flops_per_s = 0;
  double operation_s = 0;  // fixed cost of each operation: launch, waking threads
  RateSource source = RateSource::kDocumented;

  // Bytes per second at which weights of `type` are read.
  double read_rate(DType type) const {
    const auto it = read_bytes_per_s_by_type.find(type);
    return it == read_bytes_per_s_by_type.end() ? read_bytes_per_s : it->second;
  }
};

// The way between two devices, the same in both directions.
struct MachineLink {
  int from = 0, to = 0;  // indices of devices, from < to
  double bytes_per_s = 0;
  double latency_s = 0;  // of one transfer
  RateSource source = RateSource::kDocumented;
};

// A device that is known by name: what `like` takes.
struct KnownDevice {
  std::string name;  // "rtx-4090", "ddr5-12ch"
  DeviceKind kind = DeviceKind::kCpu;
  int64_t bytes = 0;  // of memory; 0: varies
  std::string text;   // the published figures that the rates are taken from
};

struct MachineDescription {
  std::string name;                    // for people; may be empty
  std::vector<MachineDevice> devices;  // at least one; the first CPU device is the host
  std::vector<MachineLink> links;      // every pair of devices once, by (from, to)
  double file_bytes_per_s = 0;  // at which moved cache pages are read back from the spill file
  RateSource file_source = RateSource::kDocumented;
  // Of a simulated text: how unlike the experts of a layer are used; the r-th most used is chosen
  // with a weight of 1 / r^expert_skew.  0: all alike.  Read where copies of experts are simulated.
  double expert_skew = 0;

  // Reads a description.  Keys of a device: name, kind, like, bytes, budget_bytes, runtime_bytes,
  // threads, read_bytes_per_s, read_bytes_per_s_by_type ({"q4_k": ...}), quantised_flops_per_s,
  // dense_flops_per_s, attention_flops_per_s, operation_s.  Bytes are numbers or text as "24G"; a
  // `like` of known size makes `bytes` optional.  Keys of a link ("links": [...]): from, to
  // (names), bytes_per_s, latency_s.  Beside the lists: "name", "file": {"bytes_per_s": ...} and
  // "expert_skew".  Errors: kConfig, naming the key, the value and its range, and for an unknown
  // key the nearest known one; with the byte offset for malformed text.
  static Result<MachineDescription> parse(std::string_view json);
  // The same from a file.  Errors: also kNotFound, kIo.
  static Result<MachineDescription> read(const std::string& path);
  // What parse() reads, with every rate spelled out; `source` is kept beside them.
  std::string to_json() const;

  // Rates that are 0 become the documented ones, missing links likewise; then everything is
  // checked.  parse() ends with it.  Errors: kConfig.
  Status complete();

  // The link between two different devices; direction does not matter.
  const MachineLink& link(int a, int b) const;
  int find(std::string_view device_name) const noexcept;  // -1: none
  int host() const noexcept;                              // the first CPU device; -1: none
};

// All known devices, CPUs ("ddr4-8ch" and the like, by their memory) and cards.  The first of a
// kind is its default.
std::vector<KnownDevice> known_devices();

}  // namespace fathom
