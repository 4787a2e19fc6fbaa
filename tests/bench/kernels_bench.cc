// Micro-benchmarks of products with stored weights (Google Benchmark):
//   read loop    the bandwidth that weights could be read with at best
//   gemv         one row of activations, matrices in random order from memory, in turn with reading
//                the same bytes: `share` is what counts
//   gemm         many rows; items/s are multiply-adds times two
//   attend       one token's absorbed attention over 8,192 cached rows from memory; ns per row
//
//   cmake --preset bench && cmake --build --preset bench && build-bench/bin/kernels_bench
//
// On a machine that others use, compare CPU time: --benchmark_repetitions=6, best of each.
// Shorter: --benchmark_filter='gemv/avx512.*threads:2'.
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <ctime>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/cpu_context.h"
#include "cpu/isa.h"
#include "cpu/matmul.h"
#include "cpu/matmul_kernels.h"
#include "cpu/pair_kernels.h"
#include "cpu/rows.h"
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
          .rows = nullptr,
          .f8_pairs = cpu::f8_pair_kernels(isa, Numerics::kFast)};
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

// Reads [p, p + bytes) as fast as it comes.
uint64_t read_bytes(const std::byte* p, int64_t bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(p);
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (int64_t i = 0; i + 4 <= bytes / 8; i += 4) {
    a += words[i];
    b += words[i + 1];
    c += words[i + 2];
    d += words[i + 3];
  }
  return a + b + c + d;
}

// One thread: its own time, so that other programs on the machine count less.
double now(int n_threads) {
  timespec t;
  clock_gettime(n_threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Products with matrices in random order, as experts are chosen, and reading of the same bytes in
// the same order, in turn.  `share` is the better of all sweeps against the better of all reads.
void gemv(benchmark::State& state, cpu::Isa isa, DType dtype, int n_threads) {
  auto pool = cpu::ThreadPool::create(n_threads);
  const cpu::CpuContext ctx = context(*pool.value(), isa);
  Weight w{.dtype = dtype, .rows = 1408, .cols = 2048};
  static_cast<void>(cpu::weight_layout(w).ok());
  w.count = (96 << 20) / w.matrix_bytes + 1;
  const Pages pages(w.matrix_bytes * w.count);
  w.data = pages.base;
  std::mt19937 rng(1);
  fill(w, rng);
  std::vector<int64_t> order(static_cast<size_t>(w.count));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), rng);
  std::vector<float> x(static_cast<size_t>(w.cols)), out(static_cast<size_t>(w.rows));
  std::normal_distribution<float> normal;
  for (float& v : x) v = normal(rng);
  Weight one = w;
  one.count = 1;
  const MatmulParams p{.x = x.data(),
                       .x_stride = w.cols,
                       .n_rows = 1,
                       .w = &one,
                       .out = out.data(),
                       .out_stride = w.rows};
  const int64_t need = cpu::workspace_bytes(ctx, p);
  const Pages workspace(need + 64);
  double best = 1e9, best_read = 1e9;
  std::vector<uint64_t> sums(64 * 8);
  for (auto _ : state) {
    double start = now(n_threads);
    for (const int64_t index : order) {
      one.data = w.matrix(index);
      cpu::matmul(ctx, {workspace.base, need}, p);
    }
    const double seconds = now(n_threads) - start;
    state.SetIterationTime(seconds);
    best = std::min(best, seconds);
    start = now(n_threads);
    constexpr int64_t kPiece = 64 << 10;
    const int64_t pieces = (w.matrix_bytes + kPiece - 1) / kPiece;
    pool.value()->parallel_for(w.count * pieces, [&](int64_t task, int worker) {
      const int64_t at = task % pieces * kPiece;
      sums[static_cast<size_t>(worker) * 8] +=
          read_bytes(w.matrix(order[static_cast<size_t>(task / pieces)]) + at,
                     std::min(kPiece, w.matrix_bytes - at));
    });
    best_read = std::min(best_read, now(n_threads) - start);
  }
  benchmark::DoNotOptimize(sums.data());
  const double gb = 1e-9 * static_cast<double>(w.matrix_bytes * w.count);
  state.counters["GB/s"] = gb / best;
  state.counters["read"] = gb / best_read;
  state.counters["share"] = best_read / best;
}

// The product of one matrix with many rows.
void gemm(benchmark::State& state, cpu::Isa isa, DType dtype, int64_t n_rows, bool exact,
          int n_threads) {
  auto pool = cpu::ThreadPool::create(n_threads);
  const cpu::CpuContext ctx = context(*pool.value(), isa);
  Weight w{.dtype = dtype, .rows = 1408, .cols = 2048};
  static_cast<void>(cpu::weight_layout(w).ok());
  const Pages pages(w.matrix_bytes);
  w.data = pages.base;
  std::mt19937 rng(1);
  fill(w, rng);
  std::vector<float> x(static_cast<size_t>(n_rows * w.cols)),
      out(static_cast<size_t>(n_rows * w.rows));
  std::normal_distribution<float> normal;
  for (float& v : x) v = normal(rng);
  const MatmulParams p{.x = x.data(),
                       .x_stride = w.cols,
                       .n_rows = n_rows,
                       .w = &w,
                       .out = out.data(),
                       .out_stride = w.rows,
                       .exact = exact};
  const int64_t need = cpu::workspace_bytes(ctx, p);
  const Pages workspace(need + 64);
  for (auto _ : state) cpu::matmul(ctx, {workspace.base, need}, p);
  state.SetItemsProcessed(state.iterations() * 2 * n_rows * w.rows * w.cols);
}

// A decode step's attention, layer after layer, so that the rows come from memory.
void attend(benchmark::State& state, cpu::Isa isa, bool pairs, KvType type, int64_t n_heads,
            int n_threads) {
  constexpr int64_t kRows = 8192, kLayers = 16;
  auto pool = cpu::ThreadPool::create(n_threads);
  cpu::CpuContext ctx = context(*pool.value(), isa);
  ctx.rows = &cpu::row_kernels(isa);
  ctx.pairs = pairs ? cpu::pair_kernels(isa, Numerics::kFast) : nullptr;
  const KvLayout layout{.page_tokens = 64, .kv_lora_rank = 512, .qk_rope_head_dim = 64};
  const int64_t page_bytes = layout.page_bytes(type, kLayers);
  const Pages memory(kRows / layout.page_tokens * page_bytes);
  auto* bytes = static_cast<std::byte*>(memory.base);
  std::mt19937 rng(1);
  for (int64_t i = 0; i + 4 <= kRows / layout.page_tokens * page_bytes; i += 4) {
    const uint32_t v = rng() & 0x3d3d3d3du;  // no large values, no NaN
    std::memcpy(bytes + i, &v, 4);
  }
  std::vector<KvPage> table;
  for (int64_t i = 0; i < kRows / layout.page_tokens; ++i)
    table.push_back({bytes + i * page_bytes, type});
  std::vector<float> q(static_cast<size_t>(n_heads * 576), 0.01f),
      out(static_cast<size_t>(n_heads * 512)), max(static_cast<size_t>(n_heads)),
      sum(static_cast<size_t>(n_heads));
  AttendAbsorbedParams p{.q_latent = q.data(),
                         .q_latent_token_stride = 576 * n_heads,
                         .q_latent_head_stride = 576,
                         .q_rope = q.data() + 512,
                         .q_rope_token_stride = 576 * n_heads,
                         .q_rope_head_stride = 576,
                         .n_tokens = 1,
                         .n_heads = n_heads,
                         .first_position = kRows - 1,
                         .scale = 0.1f,
                         .rows = {table.data(), layout, 0, 0, kRows},
                         .state = {max.data(), sum.data()},
                         .out = out.data()};
  const int64_t need = cpu::workspace_bytes(ctx, p);
  const Pages workspace(need + 64);
  double best = 1e9;
  for (auto _ : state) {
    double seconds = 0;
    for (p.rows.layer_slot = 0; p.rows.layer_slot < kLayers; ++p.rows.layer_slot) {
      const double start = now(n_threads);
      cpu::attend_absorbed(ctx, {workspace.base, need}, p);
      const double one = now(n_threads) - start;
      seconds += one;
      best = std::min(best, one);
    }
    state.SetIterationTime(seconds);
  }
  benchmark::DoNotOptimize(out.data());
  const double flops = 2.0 * static_cast<double>(kRows * n_heads) * (576 + 512);
  state.counters["ns/row"] = 1e9 * best / kRows;
  state.counters["GF"] = 1e-9 * flops / best;
  state.counters["GB/s"] =
      1e-9 * static_cast<double>(layout.layer_bytes(type) / layout.page_tokens * kRows) / best;
}

constexpr DType kTypes[] = {
    DType::kQ8_0,   DType::kQ4_0, DType::kQ4_1, DType::kQ5_0,   DType::kQ5_1, DType::kIQ4_NL,
    DType::kIQ4_XS, DType::kQ2_K, DType::kQ3_K, DType::kQ4_K,   DType::kQ5_K, DType::kQ6_K,
    DType::kF16,    DType::kBF16, DType::kF32,  DType::kF8E4M3, DType::kMXFP4};

void register_all() {
  for (const int n : {1, 2})
    benchmark::RegisterBenchmark(("read_loop/threads:" + std::to_string(n)).c_str(), read_loop, n)
        ->UseRealTime();
  for (const cpu::Isa isa : {cpu::Isa::kAvx2, cpu::Isa::kAvx512, cpu::Isa::kAmx}) {
    if (!cpu::isa_refusal(isa, cpu::cpu_features()).empty()) continue;
    for (const bool pairs : {false, true}) {
      if (pairs && cpu::pair_kernels(isa, Numerics::kFast) == nullptr) continue;
      for (const KvType type : {KvType::kBF16, KvType::kF16, KvType::kQ8_0, KvType::kQ4_0})
        for (const int64_t n_heads : {16, 128})
          for (const int n_threads : {1, 2})
            benchmark::RegisterBenchmark(
                ("attend/" + std::string(cpu::isa_name(isa)) + (pairs ? "+bf16/" : "/") +
                 std::string(kv_type_name(type)) + "/heads:" + std::to_string(n_heads) +
                 "/threads:" + std::to_string(n_threads))
                    .c_str(),
                attend, isa, pairs, type, n_heads, n_threads)
                ->UseManualTime()
                ->Iterations(4);
    }
    for (const DType dtype : kTypes) {
      const std::string what =
          std::string(cpu::isa_name(isa)) + "/" + std::string(dtype_info(dtype).name);
      for (const int n_threads : {1, 2}) {
        const std::string threads = "/threads:" + std::to_string(n_threads);
        benchmark::RegisterBenchmark(("gemv/" + what + threads).c_str(), gemv, isa, dtype,
                                     n_threads)
            ->UseManualTime()
            ->Iterations(12);
        for (const int64_t n_rows : {1, 2, 4, 8, 16, 48, 128, 512})
          for (const bool exact : {false, true})
            benchmark::RegisterBenchmark(("gemm/" + what + "/rows:" + std::to_string(n_rows) +
                                          (exact ? "/exact" : "") + threads)
                                             .c_str(),
                                         gemm, isa, dtype, n_rows, exact, n_threads)
                ->UseRealTime();
      }
    }
  }
}

// Before main(), which is Google Benchmark's.
[[maybe_unused]] const bool registered = (register_all(), true);

}  // namespace
