// Kernel launches as data, and the queue they go through: straight to the device, or, in a step of
// few rows, into a list that is handed over as one graph.
//
//   step     begin() ... launches ... flush(kStep)
//   graph    made of a list whose like was seen before; run again for every list of the same
//            kernels, after the nodes whose parameters changed were updated
//
// A decode step is some hundred small kernels, and starting each by itself takes the host longer
// than many of them run.  From one step to the next only positions, pages and the token change.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

namespace fathom::cuda {

// One launch.  The parameter struct is copied by whoever keeps the launch.
struct KernelLaunch {
  const void* kernel;
  uint32_t grid[3];
  uint32_t threads;
  size_t shared_bytes;
  const void* params;
  size_t params_bytes;
  void (*emulate)(const KernelLaunch&);  // runs it on the host; null under nvcc
};

// Where launch functions put their work.  Thread-safe.
class LaunchSink {
 public:
  virtual ~LaunchSink() = default;
  // 0, or the error of a launch that the device refused.
  virtual int launch(const KernelLaunch&) noexcept = 0;
};

// What a queue needs of the driver.  Errors as those of launches.
class GraphDriver {
 public:
  virtual ~GraphDriver() = default;
  virtual int run(const KernelLaunch&) noexcept = 0;
  // A graph of these launches, each behind the one before it; null when none can be made.
  virtual void* make(std::span<const KernelLaunch>) noexcept = 0;
  // Node `index` gets another grid and other parameters: the next run has them.
  virtual int update(void* graph, size_t index, const KernelLaunch&) noexcept = 0;
  virtual int run(void* graph) noexcept = 0;
  virtual void destroy(void* graph) noexcept = 0;
};

// Allocates when it is made, and when a graph is.
class LaunchQueue final : public LaunchSink {
 public:
  // Of all graphs together; what they take of the device is kGraphBytes at most.
  static constexpr size_t kMaxNodes = 8192;
  static constexpr size_t kMaxGraphs = 8;

  // Errors of construction: std::bad_alloc.
  explicit LaunchQueue(GraphDriver& driver);
  ~LaunchQueue() override;

  // Launches are kept from here to the next flush().  Without effect when they are already.
  void begin() noexcept;
  int launch(const KernelLaunch&) noexcept override;
  // Hands over what is kept.  kStep: the list is a whole step, and may become a graph.
  enum class Why { kStep, kOrder };
  int flush(Why) noexcept;

  struct Counts {
    int64_t graphs_made = 0, graph_runs = 0, nodes_updated = 0, steps_without = 0;
    bool off = false;  // the driver failed to make or update one
  };
  Counts counts() noexcept;

 private:
  static constexpr size_t kMaxLaunches = 4096;
  static constexpr size_t kParamsBytes = size_t{2} << 20;
  static constexpr size_t kSeen = 16;

  // Launches with their parameters in one block.
  struct List {
    std::vector<KernelLaunch> launches;  // params: offsets until they are read through at()
    std::vector<std::byte> params;
    uint64_t hash = 0;                          // of the kernels, not of what they are told
    bool append(const KernelLaunch&) noexcept;  // false: no room
    KernelLaunch at(size_t index) const noexcept;
    void clear() noexcept;
  };
  struct Graph {
    void* handle = nullptr;
    List list;  // what its nodes were told last
    uint64_t used = 0;
  };

  int run_all() noexcept;
  int run_graph(Graph&) noexcept;
  Graph* find() noexcept;  // the graph of the same kernels that has the fewest nodes to update
  Graph* make();
  bool seen_before(uint64_t hash) noexcept;
  void drop(Graph&) noexcept;

  GraphDriver& driver_;
  std::mutex mutex_;
  bool recording_ = false;
  List list_;
  std::vector<Graph> graphs_;
  uint64_t seen_[kSeen] = {};
  size_t next_seen_ = 0;
  uint64_t clock_ = 0;
  Counts counts_;
};

// Booked with the device's runtime: nodes with their parameters are below two KiB on average; those
// of attention, one or two of some twenty of a layer, have three.
inline constexpr int64_t kGraphBytes = int64_t{LaunchQueue::kMaxNodes} * 2048;

}  // namespace fathom::cuda
