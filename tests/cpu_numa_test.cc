// Rows, pages and threads over memory nodes.  The nodes are pretended ones: the files that describe
// them are ours, and what the system would be asked is written down instead.
#include <atomic>
#include <catch2/catch.hpp>
#include <cerrno>
#include <map>
#include <set>
#include <thread>

#include "cpu/cpu_backend.h"
#include "cpu/host_memory.h"
#include "cpu/node_memory.h"
#include "cpu/product.h"
#include "cpu/threads.h"
#include "support/cpu_test.h"
#include "support/fake_machine.h"
#include "support/recorded_numa.h"

using namespace fathom;
using namespace fathom::cpu;
using Policy = NumaSystem::Policy;
using test::FakeMachine;
using test::RecordedNuma;

namespace {

// Nodes 0, 1, ... with so many processors each and memory.
std::vector<NumaNode> make_nodes(const std::vector<int>& sizes) {
  std::vector<NumaNode> nodes;
  int cpu = 0;
  for (const int size : sizes) {
    NumaNode node;
    node.id = static_cast<int>(nodes.size());
    node.total_bytes = node.free_bytes = int64_t{1} << 30;
    for (int i = 0; i < size; ++i) node.cpus.push_back(cpu++);
    nodes.push_back(std::move(node));
  }
  for (size_t a = 0; a < nodes.size(); ++a)
    for (size_t b = 0; b < nodes.size(); ++b) nodes[a].distances.push_back(a == b ? 10 : 20);
  return nodes;
}

const std::vector<std::vector<int>> kMachines = {
    {1}, {1, 1}, {2, 1}, {1, 1, 1}, {32, 32, 16, 1, 7}};

// Machines of as many nodes as processors, one each.
std::unique_ptr<FakeMachine> small_machine(int n_nodes) {
  auto machine = std::make_unique<FakeMachine>();
  for (int node = 0; node < n_nodes; ++node) machine->node(node, std::to_string(node), 1000, 900);
  return machine;
}

std::unique_ptr<CpuBackend> make_backend(const FakeMachine& machine, RecordedNuma& system,
                                         const CpuOptions& options) {
  auto backend = CpuBackend::create(options, {machine.path(), &system});
  INFO(backend.status().message());
  REQUIRE(backend.ok());
  return std::move(backend).value();
}

}  // namespace

TEST_CASE("every row group has one node, in order, in proportion to the processors", "[numa]") {
  for (const std::vector<int>& sizes : kMachines) {
    const std::vector<NumaNode> nodes = make_nodes(sizes);
    const NodeShares shares(nodes);
    const int n = shares.n_nodes();
    REQUIRE(n == static_cast<int>(sizes.size()));
    int64_t n_cpus = 0;
    for (const int size : sizes) n_cpus += size;
    for (const int64_t groups : {0, 1, 2, 3, 7, 64, 65, 448, 6400}) {
      CHECK(shares.begin(groups, 0) == 0);
      CHECK(shares.begin(groups, n) == groups);
      for (int node = 0; node < n; ++node) {
        const int64_t mine = shares.begin(groups, node + 1) - shares.begin(groups, node);
        const double share = double(groups) * sizes[size_t(node)] / double(n_cpus);
        INFO(groups << " groups, node " << node << " of " << n << ": " << mine);
        CHECK(mine >= 0);
        CHECK(std::abs(double(mine) - share) < 1);
      }
      // Slices of any number of groups: each is one node's.
      for (const int64_t slice : {1, 2, 4, 16}) {
        const NodeCut cut = slice_cut(shares, groups, slice);
        CHECK(cut.n_slices == (groups + slice - 1) / slice);
        CHECK(cut.first[0] == 0);
        CHECK(cut.first[n] == cut.n_slices);
        for (int node = 0; node < n; ++node) {
          CHECK(cut.first[node] <= cut.first[node + 1]);
          for (int64_t s = cut.first[node]; s < cut.first[node + 1]; ++s) {
            CHECK(s * slice >= shares.begin(groups, node));
            CHECK(s * slice < shares.begin(groups, node + 1));
          }
        }
      }
    }
  }
}

TEST_CASE("threads are divided in proportion to the processors", "[numa]") {
  const auto divide = [](int n_threads, const std::vector<int>& sizes) {
    return divide_threads(n_threads, make_nodes(sizes));
  };
  using Counts = std::vector<int>;
  CHECK(divide(64, {32, 32}) == Counts{32, 32});
  CHECK(divide(3, {32, 32}) == Counts{2, 1});
  CHECK(divide(12, {4, 8}) == Counts{4, 8});
  CHECK(divide(2, {100, 1}) == Counts{1, 1});
  CHECK(divide(5, {4, 4, 4}) == Counts{2, 2, 1});
  CHECK(divide(1, {4, 4}) == Counts{1, 0});
}

TEST_CASE("pages of a matrix: each once, on the node of the row that it begins in", "[numa]") {
  const int64_t page = host_page_bytes();
  struct Shape {
    DType dtype;
    bool scaled;
    int64_t rows, cols, count;
  };
  const Shape shapes[] = {{DType::kQ4_K, false, 1, 256, 1},    {DType::kQ4_K, false, 16, 512, 3},
                          {DType::kQ8_0, false, 17, 96, 5},    {DType::kQ8_0, false, 1408, 2048, 2},
                          {DType::kQ6_K, false, 100, 2048, 2}, {DType::kF32, false, 40, 130, 3},
                          {DType::kF32, false, 3, 5, 7},       {DType::kBF16, false, 576, 640, 1},
                          {DType::kF8E4M3, true, 300, 1000, 2}};
  for (const std::vector<int>& sizes : kMachines) {
    if (sizes.size() < 2) continue;
    const std::vector<NumaNode> nodes = make_nodes(sizes);
    for (const Shape& shape : shapes)
      for (const int64_t offset : {0, 64, 4032})
        for (const int64_t step : {16, 96, 100'000}) {
          INFO(sizes.size() << " nodes, " << dtype_info(shape.dtype).name << " " << shape.rows
                            << " x " << shape.cols << " x " << shape.count << " at " << offset
                            << ", " << step << " rows at a time");
          RecordedNuma system;
          NodeMemory memory(system, nodes, nodes);
          system.take_calls();
          Weight w;
          w.dtype = shape.dtype;
          w.block_scaled = shape.scaled;
          w.rows = shape.rows;
          w.cols = shape.cols;
          w.count = shape.count;
          REQUIRE(weight_layout(w).ok());
          // Addresses are only computed with.
          w.data = reinterpret_cast<void*>(uintptr_t{1} << 32 | static_cast<uintptr_t>(offset));

          std::map<uintptr_t, int> placed;  // page -> node while it was stored
          std::set<uintptr_t> given_back;   // that are spread again behind the storing
          for (int64_t i = 0; i < w.count; ++i)
            for (int64_t row = 0; row < w.rows; row += step) {
              const int64_t n = std::min(step, w.rows - row);
              memory.begin_rows(w, i, row, n);
              for (const auto& call : system.take_calls()) {
                REQUIRE(call.policy == Policy::kPrefer);
                REQUIRE(call.nodes.size() == 1);
                REQUIRE(call.begin % uintptr_t(page) == 0);
                REQUIRE(call.bytes % page == 0);
                for (int64_t at = 0; at < call.bytes; at += page)
                  REQUIRE(placed.emplace(call.begin + uintptr_t(at), call.nodes[0]).second);
              }
              memory.end_rows(w, i, row, n);
              const auto calls = system.take_calls();
              REQUIRE(calls.size() <= 1);
              for (const auto& call : calls) {
                CHECK(call.policy == Policy::kSpread);
                CHECK(call.nodes.size() == nodes.size());
                for (int64_t at = 0; at < call.bytes; at += page)
                  given_back.insert(call.begin + uintptr_t(at));
              }
            }

          std::map<uintptr_t, int> expected;
          const NodeShares shares(nodes);
          for (int64_t i = 0; i < w.count; ++i)
            for (int64_t row = 0; row < w.rows; ++row) {
              // Packed rows lie interleaved in their group, whose bytes are its node's.
              const int64_t group = row / kGroupRows;
              if (is_packed(w) && row % kGroupRows != 0) continue;
              const int64_t bytes = is_packed(w) ? group_bytes(w) : row_bytes(w.dtype, w.cols);
              const auto begin = reinterpret_cast<uintptr_t>(w.matrix(i)) +
                                 uintptr_t((is_packed(w) ? group : row) * bytes);
              int node = 0;
              while (group >= shares.begin(row_groups(w), node + 1)) ++node;
              for (uintptr_t at = (begin + uintptr_t(page) - 1) / uintptr_t(page) * uintptr_t(page);
                   at < begin + uintptr_t(bytes); at += uintptr_t(page))
                expected.emplace(at, node);
            }
          CHECK(placed == expected);
          std::set<uintptr_t> pages;
          for (const auto& [at, node] : expected) pages.insert(at);
          CHECK(given_back == pages);
        }
  }
}

TEST_CASE("a node without memory uses that of the nearest one", "[numa]") {
  std::vector<NumaNode> machine = make_nodes({1, 1, 0, 1});
  machine[1].total_bytes = 0;
  machine[1].distances = {30, 10, 15, 40};  // node 2 has memory alone
  const std::vector<NumaNode> working = {machine[0], machine[1], machine[3]};
  RecordedNuma system;
  NodeMemory memory(system, working, machine);
  system.take_calls();
  memory.place(reinterpret_cast<void*>(1 << 20), 1 << 20);
  const auto calls = system.take_calls();
  REQUIRE(calls.size() == 1);
  CHECK(calls[0].policy == Policy::kSpread);
  CHECK(calls[0].nodes == std::vector<int>{0, 2, 3});
}

TEST_CASE("every task of a cut call runs once, whichever nodes have threads", "[numa]") {
  for (const std::vector<int>& sizes : kMachines)
    for (const int n_threads : {1, 2, 3, 7}) {
      const std::vector<NumaNode> nodes = make_nodes(sizes);
      RecordedNuma system;
      auto made = ThreadPool::create(n_threads, nodes, system);
      REQUIRE(made.ok());
      ThreadPool& pool = **made;
      CHECK(system.bound().size() == static_cast<size_t>(n_threads - 1));
      for (const auto& cpus : system.bound())
        CHECK(std::any_of(nodes.begin(), nodes.end(),
                          [&](const NumaNode& node) { return node.cpus == cpus; }));
      const NodeShares shares(nodes);
      for (const bool own : {false, true})
        for (const int64_t groups : {1, 2, 5, 40})
          for (const int64_t n_outer : {1, 3}) {
            const Hand hand = n_outer == 1 ? Hand::kRuns : Hand::kOneByOne;
            INFO(sizes.size() << " nodes, " << n_threads << " threads, " << groups << " groups");
            NodeCut cut = slice_cut(shares, groups, 1);
            cut.own_threads_only = own;
            std::vector<std::atomic<int>> runs(static_cast<size_t>(groups * n_outer));
            std::atomic<int> strangers{0};
            system.cpu = static_cast<int>(groups) % 3;
            const auto run = [&](int64_t task, int worker) {
              ++runs[static_cast<size_t>(task)];
              int node = 0;
              while (task % groups >= cut.first[node + 1]) ++node;
              if (worker > 0 && pool.node_of(worker) != node) ++strangers;
            };
            pool.parallel_for(groups * n_outer, cut, run, hand);
            for (const auto& times : runs) REQUIRE(times == 1);
            if (own) CHECK(strangers == 0);
          }
      int64_t total = 0;  // a plain call of the same pool
      std::atomic<int64_t> sum{0};
      pool.parallel_for(100, [&](int64_t task, int) { sum += task; });
      total = sum;
      CHECK(total == 4950);
    }
}

TEST_CASE("threads take their own node's tasks first", "[numa]") {
  const std::vector<NumaNode> nodes = make_nodes({1, 1});
  RecordedNuma system;
  auto pool = std::move(ThreadPool::create(2, nodes, system)).value();
  const NodeCut cut = slice_cut(NodeShares(nodes), 2, 1);
  // With both threads in the call each finds its own task, wherever the caller is.
  for (const int cpu : {0, 1})
    for (int round = 0; round < 20; ++round) {
      system.cpu = cpu;
      if (pool->node_of(0) != cpu) continue;  // else both are of the same node
      std::atomic<int> inside{0};
      std::atomic<int> workers[2] = {-1, -1};
      pool->parallel_for(2, cut, [&](int64_t task, int worker) {
        workers[task] = worker;
        ++inside;
        while (inside < 2) std::this_thread::yield();
      });
      CHECK(pool->node_of(workers[0]) == 0);
      CHECK(pool->node_of(workers[1]) == 1);
    }
}

TEST_CASE("what a device makes of the nodes", "[numa]") {
  RecordedNuma system;
  const auto machine = small_machine(2);
  SECTION("auto with a thread for each: rows") {
    auto cpu = make_backend(*machine, system, {.threads = 3});
    CHECK_THAT(cpu->describe(), Catch::Contains("rows of weights are cut over them"));
    CHECK_THAT(cpu->describe(), Catch::Contains("node 1: 1 processors, 1 threads"));
    CHECK(cpu->context().nodes != nullptr);
    CHECK(system.bound().size() == 2);
    system.take_calls();
    // What is reserved is spread, again where it was given back.
    const int64_t bytes = 64 * cpu->granularity();
    auto base = cpu->reserve(bytes);
    REQUIRE(base.ok());
    REQUIRE(cpu->commit(*base, 0, bytes).ok());
    cpu->decommit(*base, cpu->granularity(), 2 * cpu->granularity());
    const auto calls = system.take_calls();
    REQUIRE(calls.size() == 2);
    CHECK(calls[0].begin == reinterpret_cast<uintptr_t>(*base));
    CHECK(calls[0].bytes == bytes);
    CHECK(calls[1].begin == calls[0].begin + uintptr_t(cpu->granularity()));
    CHECK(calls[1].bytes == 2 * cpu->granularity());
    for (const auto& call : calls) {
      CHECK(call.policy == Policy::kSpread);
      CHECK(call.nodes == std::vector<int>{0, 1});
    }
    cpu->release(*base, bytes);
  }
  SECTION("fewer threads than nodes, or off: nothing") {
    for (const CpuOptions& options :
         {CpuOptions{.threads = 1}, CpuOptions{.threads = 3, .numa = NumaMode::kOff},
          CpuOptions{.threads = 1, .numa = NumaMode::kRows}}) {
      auto cpu = make_backend(*machine, system, options);
      CHECK(cpu->context().nodes == nullptr);
      auto base = cpu->reserve(1 << 20);
      REQUIRE(base.ok());
      cpu->release(*base, 1 << 20);
    }
    CHECK(system.take_calls().empty());
    CHECK(system.bound().empty());
  }
  SECTION("one node of its own") {
    auto cpu = make_backend(*machine, system, {.name = "cpu:1", .threads = 3, .node = 1});
    CHECK(cpu->context().nodes == nullptr);
    CHECK(cpu->memory().total_bytes == int64_t{1000} << 20);
    CHECK(system.bound() == std::vector<std::vector<int>>{{1}, {1}});
    cpu->adopt_thread();
    CHECK(system.bound().size() == 3);
    system.take_calls();
    auto base = cpu->reserve(1 << 20);
    REQUIRE(base.ok());
    const auto calls = system.take_calls();
    REQUIRE(calls.size() == 1);
    CHECK(calls[0].policy == Policy::kPrefer);
    CHECK(calls[0].nodes == std::vector<int>{1});
    cpu->release(*base, 1 << 20);
    const auto none = CpuBackend::create({.name = "cpu:7", .node = 7}, {machine->path(), &system});
    CHECK(none.status().code() == Code::kConfig);
    CHECK_THAT(std::string(none.status().message()), Catch::Contains("node 7 has no processor"));
  }
  SECTION("a host's allocator: its memory is left alone") {
    CpuOptions options{.threads = 2};
    options.allocator = {
        [](int64_t bytes) { return std::aligned_alloc(4096, static_cast<size_t>(bytes)); },
        [](void*, int64_t, int64_t) { return true; }, [](void*, int64_t, int64_t) {},
        [](void* base, int64_t) { std::free(base); }};
    auto cpu = make_backend(*machine, system, options);
    auto base = cpu->reserve(1 << 20);
    REQUIRE(base.ok());
    cpu->release(*base, 1 << 20);
    CHECK(system.take_calls().empty());
    CHECK(cpu->remarks().empty());
  }
}

TEST_CASE("what the system refuses is told, and nothing else changes", "[numa]") {
  RecordedNuma system;
  const auto machine = small_machine(2);
  SECTION("all of it, from the beginning") {
    system.memory_error = EPERM;
    system.thread_error = EINVAL;
    auto cpu = make_backend(*machine, system, {.threads = 2});
    const std::vector<std::string> remarks = cpu->remarks();
    REQUIRE(remarks.size() == 2);
    CHECK_THAT(remarks[0], Catch::Contains("memory be bound to nodes (Operation not permitted)"));
    CHECK_THAT(remarks[1], Catch::Contains("threads be bound"));
    CHECK_THAT(cpu->describe(), Catch::Contains(remarks[0]));
    system.take_calls();
    auto base = cpu->reserve(1 << 20);
    REQUIRE(base.ok());
    cpu->release(*base, 1 << 20);
    CHECK(system.take_calls().empty());  // not asked again
  }
  SECTION("some of it, later") {
    auto cpu = make_backend(*machine, system, {.threads = 2});
    CHECK(cpu->remarks().empty());
    system.memory_error = ENOMEM;
    auto base = cpu->reserve(1 << 20);
    REQUIRE(base.ok());
    cpu->release(*base, 1 << 20);
    REQUIRE(cpu->remarks().size() == 1);
    CHECK_THAT(cpu->remarks()[0], Catch::Contains("1 pieces of memory could not be bound"));
  }
  SECTION("files that make no sense") {
    machine->write("/sys/devices/system/node/node1/cpulist", "0\n");
    auto cpu = make_backend(*machine, system, {.threads = 2});
    REQUIRE(cpu->remarks().size() == 1);
    CHECK_THAT(cpu->remarks()[0], Catch::Contains("processor 0 is in two nodes"));
  }
}

TEST_CASE("the real calls: this machine's own node", "[numa]") {
  const std::vector<NumaNode> nodes = numa_nodes();
  const auto it = std::find_if(nodes.begin(), nodes.end(),
                               [](const NumaNode& n) { return !n.cpus.empty() && n.total_bytes; });
  if (it == nodes.end()) {
    WARN("skipped: the system does not tell of its nodes");
    return;
  }
  auto cpu = CpuBackend::create({.name = "node", .threads = 2, .node = it->id});
  INFO(cpu.status().message());
  REQUIRE(cpu.ok());
  auto base = (*cpu)->reserve(1 << 20);
  REQUIRE(base.ok());
  REQUIRE((*cpu)->commit(*base, 0, 1 << 20).ok());
  std::memset(*base, 1, 1 << 20);
  (*cpu)->release(*base, 1 << 20);
  for (const std::string& remark : (*cpu)->remarks()) WARN(remark);  // a container that forbids it
}
