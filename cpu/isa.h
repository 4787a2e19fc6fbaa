// Instruction sets: which are compiled in, which this machine runs, and which one is used.
// The kernels of each live in files of their own (kernels_<name>*.cc); nothing here needs them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/status.hpp"

namespace fathom::cpu {

// In ascending order: each one includes those before it.
//   kAvx2    AVX2, FMA, F16C                 kAvx512  AVX-512 F, BW, VL, DQ, VNNI
//   kAmx     AMX tiles with int8 and bf16, AVX512_BF16
enum class Isa : uint8_t { kScalar, kAvx2, kAvx512, kAmx };
inline constexpr int kIsaCount = 4;

// "scalar", "avx2", "avx512", "amx": the values of the configuration key `isa`.
std::string_view isa_name(Isa) noexcept;

// Features of this machine, as far as the operating system lets programs use them.
struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false;
  bool avx512_vnni = false, avx512_bf16 = false, avx512_vbmi = false;
  bool amx_tile = false, amx_int8 = false, amx_bf16 = false;
  bool os_ymm = false, os_zmm = false, os_tiles = false;  // register state the system saves
};
// Asked once by CPUID, XGETBV and arch_prctl; the same afterwards.
const CpuFeatures& cpu_features() noexcept;

// Why `isa` cannot run with these features ("the processor lacks AVX512_VNNI"); empty: it can.
std::string isa_refusal(Isa isa, const CpuFeatures& features);

// The instruction set for a value of the configuration key: "auto" is the best that runs.
// Choosing kAmx asks the system for the tile registers, once per process.
// Errors: kConfig (unknown name), kUnsupported (with what the machine lacks).
Result<Isa> choose_isa(std::string_view name);

}  // namespace fathom::cpu
