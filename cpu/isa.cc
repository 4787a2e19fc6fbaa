// Detection and choice of the instruction set.
// CPUID leaves: Intel SDM volume 2A, CPUID; AMX permission: Linux
// Documentation/arch/x86/xstate.rst.
#include "cpu/isa.h"

#include <fmt/format.h>

#include <utility>

#include "fathom/backend.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fathom::cpu {
namespace {

constexpr std::string_view kNames[kIsaCount] = {"scalar", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
constexpr bool kX86KernelsBuilt = true;
#else
constexpr bool kX86KernelsBuilt = false;
#endif

#if defined(__x86_64__)
constexpr long kArchGetXcompSupp = 0x1021;
constexpr long kArchReqXcompPerm = 0x1023;
constexpr long kXfeatureTileData = 18;

uint64_t read_xcr0() noexcept {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Linux hands out the tile registers on request; systems that save them have the bits in XCR0 too.
bool system_offers_tiles(uint64_t xcr0) noexcept {
  constexpr uint64_t kTileBits = 3u << 17;
  if ((xcr0 & kTileBits) != kTileBits) return false;
#if defined(__linux__)
  uint64_t features = 0;
  if (syscall(SYS_arch_prctl, kArchGetXcompSupp, &features) != 0) return false;
  return (features & kTileBits) == kTileBits;
#else
  return false;
#endif
}

bool request_tiles() noexcept {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() noexcept {
  CpuFeatures f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c >> 27 & 1;
  if (!osxsave) return f;
  f.fma = c >> 12 & 1;
  f.f16c = c >> 29 & 1;
  const uint64_t xcr0 = read_xcr0();
  f.os_ymm = (xcr0 & 0x6) == 0x6;
  f.os_zmm = (xcr0 & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint32_t max_subleaf = a;
  f.avx2 = b >> 5 & 1;
  f.avx512f = b >> 16 & 1;
  f.avx512dq = b >> 17 & 1;
  f.avx512bw = b >> 30 & 1;
  f.avx512vl = b >> 31 & 1;
  f.avx512_vbmi = c >> 1 & 1;
  f.avx512_vnni = c >> 11 & 1;
  f.amx_bf16 = d >> 22 & 1;
  f.amx_tile = d >> 24 & 1;
  f.amx_int8 = d >> 25 & 1;
  if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = a >> 5 & 1;
  if (f.amx_tile) f.os_tiles = system_offers_tiles(xcr0);
  return f;
}
#else
bool request_tiles() noexcept {
  return false;
}
CpuFeatures detect() noexcept {
  return {};
}
#endif

std::string joined_names() {
  std::string names = "auto";
  for (std::string_view name : kNames) names += fmt::format(", {}", name);
  return names;
}

}  // namespace

std::string_view isa_name(Isa isa) noexcept {
  return kNames[static_cast<int>(isa)];
}

const CpuFeatures& cpu_features() noexcept {
  static const CpuFeatures features = detect();
  return features;
}

std::string isa_refusal(Isa isa, const CpuFeatures& f) {
  if (isa == Isa::kScalar) return {};
  if (!kX86KernelsBuilt) return "not built in: this library was not compiled for x86-64";
  struct Need {
    Isa since;
    bool met;
    std::string_view name;
  };
  const Need needs[] = {
      {Isa::kAvx2, f.avx2, "AVX2"},
      {Isa::kAvx2, f.fma, "FMA"},
      {Isa::kAvx2, f.f16c, "F16C"},
      {Isa::kAvx512, f.avx512f, "AVX512F"},
      {Isa::kAvx512, f.avx512bw, "AVX512BW"},
      {Isa::kAvx512, f.avx512vl, "AVX512VL"},
      {Isa::kAvx512, f.avx512dq, "AVX512DQ"},
      {Isa::kAvx512, f.avx512_vnni, "AVX512_VNNI"},
      {Isa::kAmx, f.avx512_bf16, "AVX512_BF16"},
      {Isa::kAmx, f.amx_tile, "AMX_TILE"},
      {Isa::kAmx, f.amx_int8, "AMX_INT8"},
      {Isa::kAmx, f.amx_bf16, "AMX_BF16"},
  };
  std::string lacking;
  for (const Need& need : needs)
    if (isa >= need.since && !need.met)
      lacking += fmt::format("{}{}", lacking.empty() ? "" : ", ", need.name);
  if (!lacking.empty()) return "the processor lacks " + lacking;
  if (!f.os_ymm) return "the operating system does not save the AVX registers";
  if (isa >= Isa::kAvx512 && !f.os_zmm)
    return "the operating system does not save the AVX-512 registers";
  if (isa >= Isa::kAmx && !f.os_tiles)
    return "the operating system does not hand out the AMX tile registers";
  return {};
}

Result<Isa> choose_isa(std::string_view name) {
  if (name == "auto") {
    for (int i = kIsaCount - 1; i > 0; --i) {
      const Isa isa = static_cast<Isa>(i);
      if (!isa_refusal(isa, cpu_features()).empty()) continue;
      if (isa == Isa::kAmx && !request_tiles()) continue;
      return isa;
    }
    return Isa::kScalar;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    if (name != kNames[i]) continue;
    const Isa isa = static_cast<Isa>(i);
    if (std::string reason = isa_refusal(isa, cpu_features()); !reason.empty())
      return Status(Code::kUnsupported, fmt::format("isa \"{}\": {}", name, reason)).about("isa");
    if (isa == Isa::kAmx && !request_tiles())
      return Status(Code::kUnsupported,
                    "isa \"amx\": the operating system refused the AMX tile registers")
          .about("isa");
    return isa;
  }
  return Status(Code::kConfig,
                fmt::format("isa is \"{}\", but must be one of {}", name, joined_names()))
      .about("isa");
}

}  // namespace fathom::cpu

namespace fathom {

std::vector<IsaInfo> cpu_isas() {
  std::vector<IsaInfo> infos;
  for (int i = cpu::kIsaCount - 1; i >= 0; --i) {
    const auto isa = static_cast<cpu::Isa>(i);
    std::string reason = cpu::isa_refusal(isa, cpu::cpu_features());
    const bool available = reason.empty();
    infos.push_back({std::string(cpu::isa_name(isa)), available, std::move(reason)});
  }
  return infos;
}

}  // namespace fathom
