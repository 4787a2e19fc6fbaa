// The queue of launches: what becomes a graph, what of it is updated, what happens when the driver
// refuses - and that a decode step through graphs computes what it computes without.
#include <cstdlib>
#include <new>
#include <random>

#include "cuda/launch_queue.h"
#include "cuda_test.h"

using namespace fathom;
using namespace fathom::cuda_test;
using cuda::GraphDriver;
using cuda::KernelLaunch;
using cuda::LaunchQueue;
using Why = cuda::LaunchQueue::Why;

namespace {

// Writes down what it is asked for.
class FakeDriver final : public GraphDriver {
 public:
  std::string log;  // "a1" a launch of kernel a with parameter 1; "[a1b2]" a run of a graph
  bool makes = true, updates = true;
  int n_graphs = 0, n_updates = 0, fails_at = -1;

  int run(const KernelLaunch& l) noexcept override {
    if (fails_at >= 0 && fails_at-- == 0) return 7;
    log += text(l);
    return 0;
  }
  void* make(std::span<const KernelLaunch> launches) noexcept override {
    if (!makes) return nullptr;
    auto* graph = new std::vector<std::string>;
    for (const KernelLaunch& l : launches) graph->push_back(text(l));
    ++n_graphs;
    return graph;
  }
  int update(void* graph, size_t index, const KernelLaunch& l) noexcept override {
    if (!updates) return 9;
    ++n_updates;
    nodes(graph)[index] = text(l);
    return 0;
  }
  int run(void* graph) noexcept override {
    log += '[';
    for (const std::string& node : nodes(graph)) log += node;
    log += ']';
    return 0;
  }
  void destroy(void* graph) noexcept override {
    --n_graphs;
    delete &nodes(graph);
  }

 private:
  static std::vector<std::string>& nodes(void* graph) {
    return *static_cast<std::vector<std::string>*>(graph);
  }
  static std::string text(const KernelLaunch& l) {
    int64_t parameter;
    std::memcpy(&parameter, l.params, sizeof parameter);
    std::string text(1, *static_cast<const char*>(l.kernel));
    text += std::to_string(parameter);
    if (l.grid[0] != 1) text += "x" + std::to_string(l.grid[0]);
    return text;
  }
};

struct Queue {
  FakeDriver driver;
  LaunchQueue queue{driver};
  int launch(const char* kernel, int64_t parameter, uint32_t grid = 1, size_t params_bytes = 8) {
    std::vector<int64_t> params((params_bytes + 7) / 8, parameter);
    return queue.launch({kernel, {grid, 1, 1}, 32, 0, params.data(), params_bytes, nullptr});
  }
  // A step of the kernels of `names`, each told `parameter`, the last one with `grid`.
  int step(const std::vector<const char*>& names, int64_t parameter, uint32_t grid = 1) {
    queue.begin();
    for (const char* name : names) launch(name, parameter, name == names.back() ? grid : 1);
    return queue.flush(Why::kStep);
  }
  std::string take() { return std::exchange(driver.log, {}); }
};

const char kA[] = "a", kB[] = "b", kC[] = "c";

}  // namespace

TEST_CASE("launches outside a step go straight to the device", "[cuda][graph]") {
  Queue q;
  CHECK(q.launch(kA, 1) == 0);
  CHECK(q.take() == "a1");
  CHECK(q.queue.flush(Why::kStep) == 0);
  CHECK(q.take() == "");
  CHECK(q.queue.counts().graphs_made == 0);
}

TEST_CASE("a step becomes a graph the second time, and is told only what changed",
          "[cuda][graph]") {
  Queue q;
  q.step({kA, kB, kC}, 1);
  CHECK(q.take() == "a1b1c1");
  q.step({kA, kB, kC}, 1);
  CHECK(q.take() == "[a1b1c1]");
  CHECK(q.driver.n_updates == 0);
  q.queue.begin();
  q.launch(kA, 1);
  q.launch(kB, 5, 3);  // parameters and grid
  q.launch(kC, 1);
  CHECK(q.take() == "");  // nothing before the end of the step
  q.queue.flush(Why::kStep);
  CHECK(q.take() == "[a1b5x3c1]");
  CHECK(q.driver.n_updates == 1);
  q.step({kA, kB}, 2);  // other kernels
  CHECK(q.take() == "a2b2");
  const LaunchQueue::Counts counts = q.queue.counts();
  CHECK(counts.graphs_made == 1);
  CHECK(counts.graph_runs == 2);
  CHECK(counts.nodes_updated == 1);
  CHECK_FALSE(counts.off);
}

TEST_CASE("two texts that take turns have a graph each", "[cuda][graph]") {
  Queue q;
  for (const int64_t parameter : {100, 200, 100, 200}) q.step({kA, kB, kC}, parameter);
  q.take();
  CHECK(q.driver.n_graphs == 2);
  const int before = q.driver.n_updates;
  for (const int64_t parameter : {100, 200, 100, 200}) q.step({kA, kB, kC}, parameter, 7);
  CHECK(q.take() == "[a100b100c100x7][a200b200c200x7][a100b100c100x7][a200b200c200x7]");
  CHECK(q.driver.n_updates - before == 2);
  // More of them than graphs are kept: each is still right.
  for (int round = 0; round < 3; ++round)
    for (int64_t parameter = 0; parameter < 12; ++parameter) {
      q.take();
      q.step({kA, kB, kC}, parameter);
      const std::string n = std::to_string(parameter), list = "a" + n + "b" + n + "c" + n;
      const std::string ran = q.take();
      CHECK((ran == list || ran == "[" + list + "]"));
    }
  CHECK(q.driver.n_graphs <= int(LaunchQueue::kMaxGraphs));
}

TEST_CASE("a copy within a step keeps the order and ends the list", "[cuda][graph]") {
  Queue q;
  for (int i = 0; i < 3; ++i) {
    q.queue.begin();
    q.launch(kA, i);
    CHECK(q.take() == "");
    q.queue.flush(Why::kOrder);
    CHECK(q.take() == "a" + std::to_string(i));
    q.launch(kB, i);  // no longer kept
    CHECK(q.take() == "b" + std::to_string(i));
  }
  CHECK(q.driver.n_graphs == 0);
}

TEST_CASE("more than a step holds goes on launch by launch, in order", "[cuda][graph]") {
  Queue q;
  for (const size_t bytes : {size_t{8}, size_t{4000}}) {  // too many launches, too many bytes
    q.queue.begin();
    std::string expected;
    for (int64_t i = 0; i < 5000; ++i) {
      q.launch(kA, i, 1, bytes);
      expected += "a" + std::to_string(i);
    }
    CHECK_FALSE(q.driver.log.empty());  // the device did not wait for the end
    q.queue.flush(Why::kStep);
    CHECK(q.take() == expected);
  }
}

TEST_CASE("a driver that makes or updates no graph gets launches", "[cuda][graph]") {
  Queue makes_none;
  makes_none.driver.makes = false;
  Queue updates_none;
  updates_none.driver.updates = false;
  for (Queue* q : {&makes_none, &updates_none}) {
    for (int64_t i = 0; i < 5; ++i) {
      q->take();
      // One of three changes, as in a text's next step.
      q->queue.begin();
      q->launch(kA, 1);
      q->launch(kB, 1);
      q->launch(kC, i);
      CHECK(q->queue.flush(Why::kStep) == 0);
      const std::string list = "a1b1c" + std::to_string(i), ran = q->take();
      CHECK((ran == list || ran == "[" + list + "]"));
    }
    CHECK(q->queue.counts().off);
    CHECK(q->driver.n_graphs == 0);
  }
}

TEST_CASE("a refused launch is told at the end of the step, and once", "[cuda][graph]") {
  Queue q;
  q.driver.fails_at = 1;
  CHECK(q.step({kA, kB, kC}, 1) == 7);
  CHECK(q.take() == "a1");
  CHECK(q.step({kA, kB, kC}, 2) == 0);
}

// ---- a decode step of the backend ---------------------------------------------------------------

namespace {

// A step as the library queues it, small: embedding, norm, product, rotations, append, attention.
class Step {
 public:
  Step(TestGpu& gpu, Rng& rng)
      : gpu_(gpu),
        table_(gpu.store(cpu_test::random_weight(rng, DType::kQ8_0, 40, kHidden))),
        project_(gpu.store(cpu_test::random_weight(rng, DType::kQ4_K, kRow, kHidden))),
        weight_(random_values(rng, kHidden)),
        pages_(kPages),
        memory_(cpu_test::aligned_bytes(kPages * kLayout.page_bytes(KvType::kF16, 1))) {
    for (int64_t i = 0; i < kPages; ++i)
      pages_[static_cast<size_t>(i)] = {memory_.get() + i * kLayout.page_bytes(KvType::kF16, 1),
                                        KvType::kF16};
    AttendAbsorbedParams p = attention(0);
    space_ = std::make_unique<cpu_test::GuardedWorkspace>(gpu->workspace_bytes(p));
  }

  // Row `position` of the text; returns what attention makes of it.
  std::vector<float> run(int32_t token, int64_t position) {
    const OpContext op = space_->op();
    gpu_->embed(op, {&token, 1, &table_.weight, x_.data()});
    gpu_->rope_table(op, {inv_freq_.data(), 1.0, kRope, position, 1, cos_sin_.data()});
    gpu_->rms_norm(op, {x_.data(), kHidden, weight_.data(), 1e-6f, 1, kHidden, x_.data(), kHidden});
    gpu_->matmul(op, {x_.data(), kHidden, 1, &project_.weight, kv_.data(), kRow});
    gpu_->kv_append(op, {kv_.data(),
                         kRow,
                         weight_.data(),
                         1e-6f,
                         cos_sin_.data(),
                         {pages_.data(), kLayout, 0, position, 1}});
    gpu_->attend_absorbed(op, attention(position));
    token = 1 << 30;  // read at the call
    gpu_.finish(op);
    return out_;
  }

 private:
  static constexpr int64_t kHidden = 256, kRank = 64, kRope = 16, kRow = kRank + kRope, kHeads = 3,
                           kPages = 24;
  static constexpr KvLayout kLayout{16, kRank, kRope};

  AttendAbsorbedParams attention(int64_t position) {
    return {.q_latent = kv_.data(),
            .q_latent_token_stride = 0,
            .q_latent_head_stride = 0,
            .q_rope = kv_.data() + kRank,
            .q_rope_token_stride = 0,
            .q_rope_head_stride = 0,
            .n_tokens = 1,
            .n_heads = kHeads,
            .first_position = position,
            .scale = 0.2f,
            .rows = {pages_.data(), kLayout, 0, 0, position + 1},
            .state = {max_.data(), sum_.data()},
            .out = out_.data()};
  }

  TestGpu& gpu_;
  TestGpu::Stored table_, project_;
  std::vector<float> weight_, x_ = std::vector<float>(kHidden), kv_ = std::vector<float>(kRow),
                              cos_sin_ = std::vector<float>(kRope),
                              max_ = std::vector<float>(kHeads), sum_ = std::vector<float>(kHeads),
                              out_ = std::vector<float>(kHeads * kRank);
  std::vector<double> inv_freq_ = {1, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.001};
  std::vector<KvPage> pages_;
  cpu_test::AlignedBytes memory_;
  std::unique_ptr<cpu_test::GuardedWorkspace> space_;
};

}  // namespace

TEST_CASE("a decode step through graphs has the bits of one without", "[cuda][graph]") {
  TestGpu with(Numerics::kFast, Order::kMixed), without(Numerics::kFast, Order::kMixed);
  without.device().graphs.makes_graphs = false;
  Rng a(5), b(5);
  Step first(with, a), second(without, b);
  // Beyond 256 rows a second split of the rows gets a block: another grid.
  for (int64_t position = 0; position < 270; ++position) {
    const auto token = static_cast<int32_t>(position * 7 % 40);
    REQUIRE(first.run(token, position) == second.run(token, position));
  }
  const LaunchQueue::Counts counts = with.device().queue().counts();
  // A second one where more than half of so few nodes change at once: at the second split.
  CHECK(counts.graphs_made <= 2);
  CHECK(counts.graph_runs == 269);
  CHECK(counts.nodes_updated <= 270 * 5);  // embed, rotations, append, partial, merge
  CHECK(without.device().queue().counts().graphs_made == 0);
}

namespace {
thread_local int64_t allocations = 0;
}
// Not inlined: the compiler would see malloc paired with delete and warn.
[[gnu::noinline]] void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes != 0 ? bytes : 1)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes != 0 ? bytes : 1);
}
[[gnu::noinline]] void operator delete(void* p) noexcept {
  std::free(p);
}
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

TEST_CASE("steps allocate nothing once their graph is made", "[cuda][graph]") {
  // A driver that allocates nothing either.
  struct Silent final : GraphDriver {
    int n_runs = 0;
    int run(const KernelLaunch&) noexcept override { return 0; }
    void* make(std::span<const KernelLaunch>) noexcept override { return this; }
    int update(void*, size_t, const KernelLaunch&) noexcept override { return 0; }
    int run(void*) noexcept override { return ++n_runs, 0; }
    void destroy(void*) noexcept override {}
  } driver;
  LaunchQueue queue(driver);
  int64_t parameter[40] = {};
  const auto step = [&](int64_t value) {
    queue.begin();
    for (int i = 0; i < 600; ++i) {
      parameter[0] = i % 3 == 0 ? value : 0;
      queue.launch({kA, {1, 1, 1}, 32, 0, parameter, sizeof parameter, nullptr});
    }
    queue.flush(Why::kStep);
  };
  step(0);
  step(1);
  const int64_t before = allocations;
  for (int64_t i = 0; i < 50; ++i) step(i);
  CHECK(allocations == before);
  CHECK(driver.n_runs == 51);
}
