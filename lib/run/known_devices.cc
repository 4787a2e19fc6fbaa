// Published figures: memory bandwidth and dense matrix throughput (16-bit inputs, f32 sums, no
// sparsity) from the vendors' data sheets; CPUs by their memory channels.  Code reaches a part of
// them: the shares below are what good kernels sustain, one number for all, so that comparisons
// between cards keep the order of the data sheets.
#include "known_devices.h"

#include <fmt/format.h>

#include <type_traits>

namespace fathom {
namespace {

constexpr double kReadShare = 0.8;        // of the published bandwidth
constexpr double kFlopsShare = 0.5;       // of the published throughput
constexpr double kAttentionShare = 0.35;  // softmax between the two products

struct Published {
  const char* name;
  DeviceKind kind;
  int gib;          // 0: varies
  double gb_per_s;  // memory bandwidth
  double tflops;    // 16-bit products
  int threads;      // CPUs
};
// The first of a kind is the kind's default.
constexpr Published kPublished[] = {
    {"ddr4-8ch", DeviceKind::kCpu, 0, 204.8, 6, 32},    // EPYC 7003 class: AVX2
    {"ddr4-2ch", DeviceKind::kCpu, 0, 51.2, 1.5, 8},    // desktop
    {"ddr5-2ch", DeviceKind::kCpu, 0, 89.6, 3, 16},     // desktop
    {"ddr5-4ch", DeviceKind::kCpu, 0, 179.2, 6, 24},    // workstation
    {"ddr5-8ch", DeviceKind::kCpu, 0, 307.2, 60, 32},   // Xeon with AMX
    {"ddr5-12ch", DeviceKind::kCpu, 0, 460.8, 24, 64},  // EPYC 9004 class: AVX-512
    {"rtx-3090", DeviceKind::kCuda, 24, 936, 71, 0},
    {"rtx-3060", DeviceKind::kCuda, 12, 360, 25.6, 0},
    {"rtx-4060ti-16g", DeviceKind::kCuda, 16, 288, 44, 0},
    {"rtx-4090", DeviceKind::kCuda, 24, 1008, 165, 0},
    {"rtx-5090", DeviceKind::kCuda, 32, 1792, 209, 0},
    {"rtx-a6000", DeviceKind::kCuda, 48, 768, 155, 0},
    {"t4", DeviceKind::kCuda, 16, 320, 65, 0},
    {"l40s", DeviceKind::kCuda, 48, 864, 362, 0},
    {"v100-32g", DeviceKind::kCuda, 32, 900, 125, 0},
    {"a100-40g", DeviceKind::kCuda, 40, 1555, 312, 0},
    {"a100-80g", DeviceKind::kCuda, 80, 2039, 312, 0},
    {"h100-80g", DeviceKind::kCuda, 80, 3350, 989, 0},
    {"h200-141g", DeviceKind::kCuda, 141, 4800, 989, 0},
};

constexpr int64_t kGiB = int64_t{1} << 30;
// A driver's context and cuBLAS's handle on a card.
constexpr int64_t kCudaRuntimeBytes = int64_t{512} << 20;
// A kernel launch; waking a pool of threads and meeting again.
constexpr double kCudaOperationSeconds = 4e-6, kCpuOperationSeconds = 8e-6;

const Published* find_published(const MachineDevice& device) {
  for (const Published& known : kPublished)
    if (known.kind == device.kind && (device.like.empty() || device.like == known.name))
      return &known;
  return nullptr;
}

}  // namespace

std::vector<KnownDevice> known_devices() {
  std::vector<KnownDevice> devices;
  for (const Published& known : kPublished)
    devices.push_back(
        {known.name, known.kind, known.gib * kGiB,
         fmt::format("{} GB/s, {} TFLOP/s in 16 bits", known.gb_per_s, known.tflops)});
  return devices;
}

namespace run {

bool fill_documented(MachineDevice& device) {
  const Published* known = find_published(device);
  if (known == nullptr) return false;
  const bool cuda = device.kind == DeviceKind::kCuda;
  const auto fill = [](auto& value, auto documented) {
    if (value == 0) value = static_cast<std::remove_reference_t<decltype(value)>>(documented);
  };
  fill(device.bytes, known->gib * kGiB);
  fill(device.runtime_bytes, cuda ? kCudaRuntimeBytes : 0);
  fill(device.threads, known->threads);
  fill(device.read_bytes_per_s, known->gb_per_s * 1e9 * kReadShare);
  const double flops = known->tflops * 1e12;
  fill(device.quantised_flops_per_s, flops * kFlopsShare);
  fill(device.dense_flops_per_s, flops * kFlopsShare);
  fill(device.attention_flops_per_s, flops * kAttentionShare);
  fill(device.operation_s, cuda ? kCudaOperationSeconds : kCpuOperationSeconds);
  return true;
}

MachineLink documented_link(DeviceKind a, DeviceKind b) noexcept {
  MachineLink link;
  if (a == DeviceKind::kCpu && b == DeviceKind::kCpu) {  // between sockets
    link.bytes_per_s = 40e9;
    link.latency_s = 1e-6;
  } else if (a == b) {  // two cards through the host: PCIe 4.0 x16 twice
    link.bytes_per_s = 12e9;
    link.latency_s = 20e-6;
  } else {  // PCIe 4.0 x16
    link.bytes_per_s = 25e9;
    link.latency_s = 10e-6;
  }
  return link;
}

}  // namespace run
}  // namespace fathom
