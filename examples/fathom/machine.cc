#include "machine.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "terminal.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cli {
namespace {

#if defined(__x86_64__)
// Twelve independent sums hide the latency; the asm keeps the compiler from folding the loop.
#define FATHOM_MULTIPLY_LOOP(vector, set, fma, reduce)                                 \
  vector sums[12];                                                                     \
  for (vector & sum : sums) sum = set(0.0f);                                           \
  vector factor = set(0.5f);                                                           \
  for (int64_t i = 0; i < n; ++i) {                                                    \
    asm volatile("" : "+x"(factor));                                                   \
    _Pragma("GCC unroll 12") for (vector & sum : sums) sum = fma(sum, factor, factor); \
  }                                                                                    \
  float total = 0;                                                                     \
  for (const vector& sum : sums) total += reduce(sum);                                 \
  return total

__attribute__((target("avx512f"))) float multiply_avx512(int64_t n) {
#define FATHOM_FIRST(v) _mm512_cvtss_f32(v)
  FATHOM_MULTIPLY_LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps, FATHOM_FIRST);
#undef FATHOM_FIRST
}
__attribute__((target("avx2,fma"))) float multiply_avx2(int64_t n) {
#define FATHOM_FIRST(v) _mm256_cvtss_f32(v)
  FATHOM_MULTIPLY_LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps, FATHOM_FIRST);
#undef FATHOM_FIRST
}
#undef FATHOM_MULTIPLY_LOOP
#endif

int64_t status_kib(std::string_view key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, key.size(), key) == 0)
      return std::strtoll(line.c_str() + key.size(), nullptr, 10);
  return 0;
}

// Eight independent sums: the loads, not the additions, are what takes the time.
uint64_t read_all(const uint64_t* words, int64_t n_words) {
  uint64_t sum[8] = {};
  for (int64_t i = 0; i + 8 <= n_words; i += 8)
    for (int64_t k = 0; k < 8; ++k) sum[k] += words[i + k];
  uint64_t total = 0;
  for (uint64_t s : sum) total += s;
  return total;
}

int64_t buffer_size() {
  const long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
  const int64_t wanted =
      std::clamp<int64_t>(8 * std::max<int64_t>(l3, 0), int64_t{256} << 20, int64_t{1} << 30);
  const int64_t free_bytes = int64_t{sysconf(_SC_AVPHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  return std::min(wanted, free_bytes / 2) / (1 << 21) * (1 << 21);
}

}  // namespace

int64_t rss_peak_bytes() {
  return status_kib("VmHWM:") * 1024;
}
int64_t rss_bytes() {
  return status_kib("VmRSS:") * 1024;
}

int usable_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

double process_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double measure_multiply_rate(int threads) {
#if defined(__x86_64__)
  const bool wide = __builtin_cpu_supports("avx512f");
  if (!wide && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
  constexpr int64_t kLoops = 500'000;
  constexpr int kPasses = 8;
  std::vector<double> times(kPasses);
  std::atomic<float> sink{0};
  std::barrier barrier(threads);
  const auto work = [&](int index) {
    for (int pass = 0; pass < kPasses; ++pass) {
      barrier.arrive_and_wait();
      const double start = now_seconds();
      sink.store(wide ? multiply_avx512(kLoops) : multiply_avx2(kLoops));
      barrier.arrive_and_wait();
      if (index == 0) times[static_cast<size_t>(pass)] = now_seconds() - start;
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work, i);
  work(0);
  for (std::thread& thread : pool) thread.join();
  const double operations = 2.0 * 12 * (wide ? 16 : 8) * kLoops * threads;
  return operations / *std::min_element(times.begin(), times.end());
#else
  static_cast<void>(threads);
  return 0;
#endif
}

ReadBandwidth measure_read_bandwidth(int threads) {
  ReadBandwidth result;
  result.threads = threads;
  result.buffer_bytes = buffer_size();
  if (result.buffer_bytes <= 0) return result;
  void* memory = mmap(nullptr, static_cast<size_t>(result.buffer_bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return result;
  madvise(memory, static_cast<size_t>(result.buffer_bytes), MADV_HUGEPAGE);

  constexpr int kPasses = 5;
  const int64_t share = result.buffer_bytes / 8 / threads;  // words
  std::vector<double> times(kPasses);
  std::atomic<uint64_t> sink{0};
  std::barrier barrier(threads);
  const auto work = [&](int index) {
    uint64_t* part = static_cast<uint64_t*>(memory) + index * share;
    std::memset(part, index + 1, static_cast<size_t>(share) * 8);
    for (int pass = 0; pass < kPasses; ++pass) {
      barrier.arrive_and_wait();
      const double start = now_seconds();
      sink += read_all(part, share);
      barrier.arrive_and_wait();
      if (index == 0) times[static_cast<size_t>(pass)] = now_seconds() - start;
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work, i);
  work(0);
  for (std::thread& thread : pool) thread.join();
  munmap(memory, static_cast<size_t>(result.buffer_bytes));

  const double bytes = static_cast<double>(share * 8 * threads);
  const auto [fastest, slowest] = std::minmax_element(times.begin(), times.end());
  result.best = bytes / *fastest;
  result.worst = bytes / *slowest;
  return result;
}

}  // namespace cli
