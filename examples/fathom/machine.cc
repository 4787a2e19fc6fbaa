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

namespace cli {
namespace {

#if defined(__x86_64__)
// n > 0 times twelve multiply-adds of zeros; twelve independent sums hide the latency.  A loop of
// its own in assembly, which every compiler takes without the instruction set's flags.
// clang-format off
#define CLI_ZERO(i) "vxorps %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n"
#define CLI_ADD(width, i) "vfmadd231ps %%" width "mm12, %%" width "mm12, %%" width "mm" #i "\n"
#define CLI_TWELVE(STEP) \
  STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#define CLI_MULTIPLY_ADDS(STEP)                                                                \
  asm volatile(CLI_TWELVE(CLI_ZERO) CLI_ZERO(12) "1:\n" CLI_TWELVE(STEP)                       \
               "dec %0\n jnz 1b\n vzeroupper"                                                  \
               : "+r"(n) : : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",     \
               "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")
#define CLI_ADD_8(i) CLI_ADD("y", i)
#define CLI_ADD_16(i) CLI_ADD("z", i)
// clang-format on
void multiply_avx2(int64_t n) {
  CLI_MULTIPLY_ADDS(CLI_ADD_8);
}
void multiply_avx512(int64_t n) {
  CLI_MULTIPLY_ADDS(CLI_ADD_16);
}
#undef CLI_MULTIPLY_ADDS
#undef CLI_TWELVE
#undef CLI_ADD_16
#undef CLI_ADD_8
#undef CLI_ADD
#undef CLI_ZERO
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

// Work that all threads begin together, timed from the first one's start to the last one's end: a
// thread that wakes late from the barrier must not make a pass look shorter than it was.
class Passes {
 public:
  Passes(int threads, int passes)
      : barrier_(threads),
        threads_(threads),
        start_(static_cast<size_t>(threads * passes)),
        end_(static_cast<size_t>(threads * passes)) {}

  template <class Work>
  void run(int index, int pass, Work&& work) {
    barrier_.arrive_and_wait();
    const auto at = static_cast<size_t>(pass * threads_ + index);
    start_[at] = now_seconds();
    work();
    end_[at] = now_seconds();
  }
  double fastest() const {
    const std::vector<double> all = times();
    return *std::min_element(all.begin(), all.end());
  }
  double slowest() const {
    const std::vector<double> all = times();
    return *std::max_element(all.begin(), all.end());
  }

 private:
  std::vector<double> times() const {
    std::vector<double> all;
    for (auto i = start_.begin(), j = end_.begin(); i != start_.end(); i += threads_, j += threads_)
      all.push_back(*std::max_element(j, j + threads_) - *std::min_element(i, i + threads_));
    return all;
  }

  std::barrier<> barrier_;
  int threads_;
  std::vector<double> start_, end_;  // [pass][thread]
};

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
  Passes passes(threads, kPasses);
  const auto work = [&](int index) {
    for (int pass = 0; pass < kPasses; ++pass)
      passes.run(index, pass, [&] {
        if (wide)
          multiply_avx512(kLoops);
        else
          multiply_avx2(kLoops);
      });
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work, i);
  work(0);
  for (std::thread& thread : pool) thread.join();
  const double operations = 2.0 * 12 * (wide ? 16 : 8) * kLoops * threads;
  return operations / passes.fastest();
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
  // As weights are read: the threads share every stretch of the memory.  Where one half each lies
  // in memory of its own controller, they would find twice what any matrix can be read with.
  constexpr int64_t kPiece = (256 << 10) / 8;                         // words
  const int64_t pieces = result.buffer_bytes / 8 / kPiece / threads;  // of each thread
  Passes passes(threads, kPasses);
  std::atomic<uint64_t> sink{0};
  const auto work = [&](int index) {
    uint64_t* const first = static_cast<uint64_t*>(memory) + index * kPiece;
    for (int64_t i = 0; i < pieces; ++i)
      std::memset(first + i * threads * kPiece, index + 1, kPiece * 8);
    for (int pass = 0; pass < kPasses; ++pass)
      passes.run(index, pass, [&] {
        uint64_t sum = 0;
        for (int64_t i = 0; i < pieces; ++i) sum += read_all(first + i * threads * kPiece, kPiece);
        sink += sum;
      });
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work, i);
  work(0);
  for (std::thread& thread : pool) thread.join();
  munmap(memory, static_cast<size_t>(result.buffer_bytes));

  const double bytes = static_cast<double>(pieces * kPiece * 8 * threads);
  result.best = bytes / passes.fastest();
  result.worst = bytes / passes.slowest();
  return result;
}

}  // namespace cli
