// Micro-benchmarks of products with stored weights (Google Benchmark):
//   read loop    the bandwidth that weights could be read with at best
//   gemv         one row of activations, weights from memory; bytes/s to compare with the read loop
//   gemm         many rows; items/s are multiply-adds times two
//
//   cmake --preset bench && cmake --build --preset bench && build-bench/bin/kernels_bench
//
// On a machine that others use, compare CPU time: --benchmark_repetitions=6, best of each.
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/cpu_context.h"
#include "cpu/isa.h"
#include "cpu/matmul.h"
#include "cpu/matmul_kernels.h"
#include "cpu/threads.h"
#include "fathom/quant.hpp"

namespace {

using namespace fathom;

// Memory in huge pages, as the ledger's blocks are.
struct Pages {
  explicit Pages(int64_t n) : bytes(static_cast<size_t>((n + (2 << 20) - 1) & ~((2 << 20) - 1))) {
    data = ::mmap(nullptr, bytes + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                  -1, 0);
    const auto at = (reinterpret_cast<uintptr_t>(data) + (2 << 20) - 1) &
                    ~static_cast<uintptr_t>((2 << 20) - 1);
    base = reinterpret_cast<void*>(at);
    ::madvise(base, bytes, MADV_HUGEPAGE);
    std::memset(base, 0, bytes);
  }
  ~Pages() { ::munmap(data, bytes + (2 << 20)); }
  size_t bytes;
  void* data;
  void* base;
};

// Weights of random bytes with small scales; values do not matter, denormals would.
void fill(Weight& w, std::mt19937& rng) {
  auto* bytes = static_cast<uint8_t*>(w.data);
  for (int64_t i = 0; i + 4 <= w.matrix_bytes * w.count; i += 4) {
    const uint32_t v = rng() & 0x3f3f3f3fu;  // as f16, bf16 or f32: below 2, no NaN
    std::memcpy(bytes + i, &v, 4);
  }
}

cpu::CpuContext context(cpu::ThreadPool& pool, cpu::Isa isa) {
  return {.threads = &pool,
          .isa = isa,
          .numerics = Numerics::kFast,
          .matmul = &cpu::matmul_kernels(isa),
          .rows = nullptr};
}

void read_loop(benchmark::State& state, int n_threads) {
  auto pool = cpu::ThreadPool::create(n_threads);
  const Pages pages(256 << 20);
  std::vector<uint64_t> sums(64 * 8);
  for (auto _ : state) {
    constexpr int64_t kPiece = 64 << 10;
    pool.value()->parallel_for((256 << 20) / kPiece, [&](int64_t task, int worker) {
      const auto* p =
          reinterpret_cast<const uint64_t*>(static_cast<const char*>(pages.base) + task * kPiece);
      uint64_t a = 0, b = 0, c = 0, d = 0;
      for (int64_t i = 0; i < kPiece / 8; i += 4) {
        a += p[i];
        b += p[i + 1];
        c += p[i + 2];
        d += p[i + 3];
      }
      sums[static_cast<size_t>(worker) * 8] += a + b + c + d;
    });
  }
  benchmark::DoNotOptimize(sums.data());
  state.SetBytesProcessed(state.iterations() * (256ll << 20));
}

// Enough matrices in turn that none is in a cache.
void matmul(benchmark::State& state, cpu::Isa isa, DType dtype, int64_t n_rows, bool exact,
            int n_threads) {
  auto pool = cpu::ThreadPool::create(n_threads);
  const cpu::CpuContext ctx = context(*pool.value(), isa);
  Weight w{.dtype = dtype, .rows = 1408, .cols = 2048};
  static_cast<void>(cpu::weight_layout(w).ok());
  const int64_t count = n_rows == 1 ? (192 << 20) / w.matrix_bytes + 1 : 1;
  w.count = count;
  const Pages pages(w.matrix_bytes * count);
  w.data = pages.base;
  std::mt19937 rng(1);
  fill(w, rng);
  std::vector<float> x(static_cast<size_t>(n_rows * w.cols)),
      out(static_cast<size_t>(n_rows * w.rows));
  std::normal_distribution<float> normal;
  for (float& v : x) v = normal(rng);
  Weight one = w;
  one.count = 1;
  MatmulParams p{.x = x.data(),
                 .x_stride = w.cols,
                 .n_rows = n_rows,
                 .w = &one,
                 .out = out.data(),
                 .out_stride = w.rows,
                 .exact = exact};
  const int64_t need = cpu::workspace_bytes(ctx, p);
  const Pages workspace(need + 64);
  int64_t at = 0;
  for (auto _ : state) {
    one.data = w.matrix(at++ % count);
    cpu::matmul(ctx, {workspace.base, need}, p);
  }
  state.SetBytesProcessed(state.iterations() * w.matrix_bytes);
  state.SetItemsProcessed(state.iterations() * 2 * n_rows * w.rows * w.cols);
}

void register_all() {
  for (const int n : {1, 2})
    benchmark::RegisterBenchmark(("read_loop/threads:" + std::to_string(n)).c_str(), read_loop, n)
        ->UseRealTime();
  for (const cpu::Isa isa : {cpu::Isa::kAvx2, cpu::Isa::kAvx512, cpu::Isa::kAmx}) {
    if (!cpu::isa_refusal(isa, cpu::cpu_features()).empty()) continue;
    for (const DType dtype :
         {DType::kQ8_0, DType::kQ4_0, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K, DType::kF16,
          DType::kBF16, DType::kF32, DType::kF8E4M3, DType::kIQ4_NL}) {
      for (const int64_t n_rows : {1, 4, 16, 48, 128, 512}) {
        for (const bool exact : {false, true}) {
          for (const int n_threads : {1, 2}) {
            const std::string name =
                std::string(n_rows == 1 ? "gemv/" : "gemm/") + std::string(cpu::isa_name(isa)) +
                "/" + std::string(dtype_info(dtype).name) + "/rows:" + std::to_string(n_rows) +
                (exact ? "/exact" : "") + "/threads:" + std::to_string(n_threads);
            benchmark::RegisterBenchmark(name.c_str(), matmul, isa, dtype, n_rows, exact, n_threads)
                ->UseRealTime();
          }
        }
      }
    }
  }
}

// Before main(), which is Google Benchmark's.
[[maybe_unused]] const bool registered = (register_all(), true);

}  // namespace
