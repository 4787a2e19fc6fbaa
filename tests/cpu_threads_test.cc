// The thread pool: every task once, whoever calls and however often; asleep when there is nothing
// to do; refusals in words.
#include "cpu/threads.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

using namespace fathom;
using cpu::ThreadPool;

namespace {

std::atomic<int64_t> g_allocations{0};

std::unique_ptr<ThreadPool> make_pool(int n) {
  auto pool = ThreadPool::create(n);
  REQUIRE(pool.ok());
  return std::move(pool).value();
}

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) { return double(t.tv_sec) + double(t.tv_usec) * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

void* operator new(size_t size) {
  ++g_allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  ++g_allocations;
  return std::malloc(size);
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

TEST_CASE("every task runs exactly once, on a worker of the pool") {
  for (const int n_threads : {1, 2, 3, 8}) {
    auto pool = make_pool(n_threads);
    CHECK(pool->size() == n_threads);
    for (const int64_t n_tasks : {0, 1, 2, 7, 1000}) {
      for (const cpu::Hand hand : {cpu::Hand::kOneByOne, cpu::Hand::kRuns}) {
        std::vector<std::atomic<int>> runs(static_cast<size_t>(n_tasks));
        std::atomic<bool> worker_ok{true};
        const auto task = [&](int64_t task, int worker) {
          ++runs[static_cast<size_t>(task)];
          if (worker < 0 || worker >= n_threads) worker_ok = false;
        };
        pool->parallel_for(n_tasks, task, hand);
        CHECK(worker_ok);
        for (const auto& n : runs) CHECK(n == 1);
      }
    }
  }
}

TEST_CASE("in runs, a thread takes half of its share of what is left") {
  // One thread takes all of them, in order.
  auto pool = make_pool(1);
  std::vector<int64_t> order;
  pool->parallel_for(
      7, [&](int64_t task, int) { order.push_back(task); }, cpu::Hand::kRuns);
  CHECK(order == std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6});

  // With two, one of them held up in its first run, the other does everything else.
  pool = make_pool(2);
  std::array<std::atomic<int>, 64> by{};
  std::atomic<bool> other_began{false};
  pool->parallel_for(
      64,
      [&](int64_t task, int worker) {
        by[static_cast<size_t>(task)] = worker + 1;
        if (task == 0)
          while (!other_began) std::this_thread::yield();
        if (task == 63) other_began = true;
      },
      cpu::Hand::kRuns);
  for (int i = 0; i < 16; ++i) CHECK(by[static_cast<size_t>(i)] == by[0]);
  for (int i = 16; i < 64; ++i) CHECK(by[static_cast<size_t>(i)] == 3 - by[0]);
}

TEST_CASE("a worker number is never used by two tasks at once") {
  auto pool = make_pool(4);
  std::atomic<int> inside[4] = {};
  std::atomic<bool> shared{false};
  for (int round = 0; round < 200; ++round)
    pool->parallel_for(16, [&](int64_t, int worker) {
      if (++inside[worker] != 1) shared = true;
      std::this_thread::yield();
      --inside[worker];
    });
  CHECK_FALSE(shared);
}

TEST_CASE("what tasks wrote is seen by the caller, and by later calls") {
  auto pool = make_pool(3);
  std::vector<int64_t> values(64);  // plain memory: a data race would be seen by TSan
  for (int round = 1; round <= 3000; ++round) {
    pool->parallel_for(64, [&](int64_t task, int) { values[size_t(task)] += task; });
    if (round % 500 != 0) continue;
    for (int64_t i = 0; i < 64; ++i) REQUIRE(values[size_t(i)] == i * round);
  }
}

TEST_CASE("no wake-up is lost: short calls with pauses of every length") {
  auto pool = make_pool(3);
  std::atomic<int64_t> total{0};
  for (int round = 0; round < 2000; ++round) {
    pool->parallel_for(3, [&](int64_t, int) { ++total; });
    if (round % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(round % 40));
  }
  CHECK(total == 6000);
}

TEST_CASE("many threads may call at once") {
  auto pool = make_pool(3);
  constexpr int kCallers = 6, kRounds = 300;
  std::vector<std::thread> callers;
  std::atomic<int64_t> wrong{0};
  for (int c = 0; c < kCallers; ++c)
    callers.emplace_back([&, c] {
      std::vector<int64_t> mine(17);
      for (int round = 0; round < kRounds; ++round)
        pool->parallel_for(17, [&](int64_t task, int) { mine[size_t(task)] += c + 1; });
      for (const int64_t v : mine)
        if (v != int64_t{kRounds} * (c + 1)) ++wrong;
    });
  for (std::thread& t : callers) t.join();
  CHECK(wrong == 0);
}

TEST_CASE("a call inside a task runs its tasks on the calling thread") {
  auto pool = make_pool(3);
  std::atomic<int64_t> inner{0};
  std::atomic<bool> moved{false};
  pool->parallel_for(5, [&](int64_t, int worker) {
    const auto thread = std::this_thread::get_id();
    pool->parallel_for(4, [&](int64_t, int inner_worker) {
      ++inner;
      if (inner_worker != worker || std::this_thread::get_id() != thread) moved = true;
    });
  });
  CHECK(inner == 20);
  CHECK_FALSE(moved);
  // Another pool is not "inside", even under a task of the first.
  auto other = make_pool(2);
  std::atomic<int64_t> crossed{0};
  pool->parallel_for(3, [&](int64_t, int) {
    other->parallel_for(2, [&](int64_t, int) { ++crossed; });
    pool->parallel_for(2, [&](int64_t, int) { ++crossed; });
  });
  CHECK(crossed == 12);
}

TEST_CASE("after fork() the child can use and destroy the pool, alone") {
  auto pool = make_pool(3);
  pool->parallel_for(8, [](int64_t, int) {});
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang ends as a signal
    int64_t sum = 0;
    pool->parallel_for(100, [&](int64_t task, int) { sum += task; });
    pool.reset();
    _exit(sum == 4950 ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  std::atomic<int64_t> total{0};
  pool->parallel_for(100, [&](int64_t task, int) { total += task; });  // the parent's still works
  CHECK(total == 4950);
}

TEST_CASE("a worker that is late is not waited for") {
  // More threads than processors: with waiting for each worker's wake-up every call would cost
  // scheduling rounds; the bound is generous for a loaded machine.
  auto pool = make_pool(64);
  const auto begin = std::chrono::steady_clock::now();
  for (int round = 0; round < 50; ++round) pool->parallel_for(64, [](int64_t, int) {});
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(20));
}

TEST_CASE("idle threads use no processor time") {
  auto pool = make_pool(4);
  pool->parallel_for(64, [](int64_t, int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  CHECK(cpu_seconds() - before < 0.02);
}

TEST_CASE("a call allocates nothing") {
  auto pool = make_pool(3);
  std::atomic<int64_t> total{0};
  pool->parallel_for(8, [&](int64_t, int) { ++total; });
  const int64_t before = g_allocations;
  for (int i = 0; i < 100; ++i) pool->parallel_for(8, [&](int64_t, int) { ++total; });
  CHECK(g_allocations == before);
  CHECK(total == 808);
}

TEST_CASE("sizes that make no sense are refused, and threads that cannot start") {
  for (const int n : {0, -1, ThreadPool::kMaxThreads + 1}) {
    const auto pool = ThreadPool::create(n);
    REQUIRE_FALSE(pool.ok());
    CHECK(pool.status().code() == Code::kInvalidArgument);
    CHECK(pool.status().message().find(std::to_string(n)) != std::string_view::npos);
  }
  CHECK(make_pool(1)->runtime_bytes() < 4096);
  CHECK(make_pool(5)->runtime_bytes() >= 4 * ThreadPool::kStackBytes);
}
