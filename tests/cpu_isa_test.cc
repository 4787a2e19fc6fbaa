// Instruction sets: names, order, refusals, and that the one asked for is the one that is used.
#include "cpu/isa.h"

#include <catch2/catch.hpp>
#include <fstream>
#include <string>

#include "cpu/matmul_kernels.h"
#include "cpu/rows_kernels.h"
#include "support/cpu_test.h"

using namespace fathom;
using cpu::CpuFeatures;
using cpu::Isa;

namespace {

CpuFeatures everything() {
  CpuFeatures f;
  f.avx2 = f.fma = f.f16c = true;
  f.avx512f = f.avx512bw = f.avx512vl = f.avx512dq = f.avx512_vnni = f.avx512_bf16 = true;
  f.amx_tile = f.amx_int8 = f.amx_bf16 = true;
  f.os_ymm = f.os_zmm = f.os_tiles = true;
  return f;
}

}  // namespace

TEST_CASE("the list names every set, best first, with a reason where it cannot run") {
  const std::vector<IsaInfo> infos = cpu_isas();
  REQUIRE(infos.size() == 4);
  CHECK(infos[0].name == "amx");
  CHECK(infos[1].name == "avx512");
  CHECK(infos[2].name == "avx2");
  CHECK(infos[3].name == "scalar");
  CHECK(infos[3].available);
  for (const IsaInfo& info : infos) CHECK(info.available == info.reason.empty());
}

#if defined(__x86_64__)
TEST_CASE("refusals name every feature that is missing") {
  CHECK(cpu::isa_refusal(Isa::kAmx, everything()).empty());
  CHECK(cpu::isa_refusal(Isa::kScalar, CpuFeatures{}).empty());
  CpuFeatures f = everything();
  f.fma = f.f16c = false;
  CHECK(cpu::isa_refusal(Isa::kAvx2, f) == "the processor lacks FMA, F16C");
  CHECK(cpu::isa_refusal(Isa::kAvx512, f) == "the processor lacks FMA, F16C");
  f = everything();
  f.avx512_vnni = false;
  CHECK(cpu::isa_refusal(Isa::kAvx2, f).empty());
  CHECK(cpu::isa_refusal(Isa::kAvx512, f) == "the processor lacks AVX512_VNNI");
  f = everything();
  f.os_zmm = false;
  CHECK(cpu::isa_refusal(Isa::kAvx2, f).empty());
  CHECK(cpu::isa_refusal(Isa::kAvx512, f).find("operating system") != std::string::npos);
  f = everything();
  f.os_tiles = false;
  CHECK(cpu::isa_refusal(Isa::kAvx512, f).empty());
  CHECK(cpu::isa_refusal(Isa::kAmx, f).find("tile") != std::string::npos);
}

TEST_CASE("the features agree with what the system says of the processor") {
  std::ifstream file("/proc/cpuinfo");
  std::string line, flags;
  while (std::getline(file, line))
    if (line.rfind("flags", 0) == 0) flags = line + " ";
  if (flags.empty()) {
    WARN("skipped: /proc/cpuinfo has no flags");
    return;
  }
  const auto has = [&](const char* flag) {
    return flags.find(" " + std::string(flag) + " ") != std::string::npos;
  };
  const CpuFeatures& f = cpu::cpu_features();
  CHECK(f.avx2 == has("avx2"));
  CHECK(f.fma == has("fma"));
  CHECK(f.f16c == has("f16c"));
  CHECK(f.avx512f == has("avx512f"));
  CHECK(f.avx512bw == has("avx512bw"));
  CHECK(f.avx512vl == has("avx512vl"));
  CHECK(f.avx512dq == has("avx512dq"));
  CHECK(f.avx512_vnni == has("avx512_vnni"));
  CHECK(f.avx512_bf16 == has("avx512_bf16"));
  CHECK(f.avx512_vbmi == has("avx512vbmi"));
  CHECK(f.amx_tile == has("amx_tile"));
  CHECK(f.amx_int8 == has("amx_int8"));
  CHECK(f.amx_bf16 == has("amx_bf16"));
}
#endif

TEST_CASE("the set that was asked for is the one that is used; others are refused in words") {
  for (const IsaInfo& info : cpu_isas()) {
    const auto isa = cpu::choose_isa(info.name);
    REQUIRE(isa.ok() == info.available);
    if (!info.available) {
      CHECK(isa.status().code() == Code::kUnsupported);
      CHECK(isa.status().message().find(info.reason) != std::string_view::npos);
      CHECK(isa.status().key() == "isa");
      continue;
    }
    CHECK(cpu::isa_name(*isa) == info.name);
    auto backend = cpu_test::make_backend(info.name, 1);
    CHECK(backend->context().isa == *isa);
    CHECK(std::string(backend->context().rows->name) == info.name);
    CHECK(backend->describe().find("instruction set " + info.name) != std::string::npos);
  }
  for (const char* name : {"", "avx", "AVX2", "avx2 "}) {
    const auto isa = cpu::choose_isa(name);
    REQUIRE_FALSE(isa.ok());
    CHECK(isa.status().code() == Code::kConfig);
    CHECK(isa.status().message().find("auto, scalar, avx2, avx512, amx") != std::string_view::npos);
  }
}

TEST_CASE("auto is the best that runs") {
  const auto isa = cpu::choose_isa("auto");
  REQUIRE(isa.ok());
  CHECK(std::string(cpu::isa_name(*isa)) == cpu_test::runnable_isas().front());
}
