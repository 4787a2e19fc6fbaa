#include "cuda/launch_queue.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace fathom::cuda {
namespace {

constexpr size_t kAlignment = 16;  // of parameter structs

bool same_kernel(const KernelLaunch& a, const KernelLaunch& b) noexcept {
  return a.kernel == b.kernel && a.threads == b.threads && a.shared_bytes == b.shared_bytes &&
         a.params_bytes == b.params_bytes;
}
bool same_call(const KernelLaunch& a, const KernelLaunch& b) noexcept {
  return std::memcmp(a.grid, b.grid, sizeof a.grid) == 0 &&
         std::memcmp(a.params, b.params, a.params_bytes) == 0;
}

uint64_t mix(uint64_t hash, uint64_t value) noexcept {  // FNV-1a, a word at a time
  return (hash ^ value) * 0x100000001b3u;
}
constexpr uint64_t kHashStart = 0xcbf29ce484222325u;

}  // namespace

// ---- lists --------------------------------------------------------------------------------------

bool LaunchQueue::List::append(const KernelLaunch& l) noexcept {
  const size_t at = (params.size() + kAlignment - 1) / kAlignment * kAlignment;
  if (launches.size() == launches.capacity() || at + l.params_bytes > params.capacity())
    return false;
  params.resize(at + l.params_bytes);
  std::memcpy(params.data() + at, l.params, l.params_bytes);
  launches.push_back(l);
  launches.back().params = reinterpret_cast<const void*>(at);
  hash = mix(mix(mix(hash, reinterpret_cast<uintptr_t>(l.kernel)), l.threads), l.shared_bytes);
  return true;
}

KernelLaunch LaunchQueue::List::at(size_t index) const noexcept {
  KernelLaunch l = launches[index];
  l.params = params.data() + reinterpret_cast<uintptr_t>(l.params);
  return l;
}

void LaunchQueue::List::clear() noexcept {
  launches.clear();
  params.clear();
  hash = kHashStart;
}

// ---- the queue ----------------------------------------------------------------------------------

LaunchQueue::LaunchQueue(GraphDriver& driver) : driver_(driver) {
  list_.launches.reserve(kMaxLaunches);
  list_.params.reserve(kParamsBytes);
  list_.clear();
  graphs_.reserve(kMaxGraphs);
}

LaunchQueue::~LaunchQueue() {
  for (Graph& graph : graphs_) driver_.destroy(graph.handle);
}

void LaunchQueue::begin() noexcept {
  const std::lock_guard lock(mutex_);
  recording_ = true;
}

int LaunchQueue::launch(const KernelLaunch& l) noexcept {
  const std::lock_guard lock(mutex_);
  if (!recording_) return driver_.run(l);
  if (list_.append(l)) return 0;
  // More than a step: the device waits no longer.
  recording_ = false;
  const int earlier = run_all(), now = driver_.run(l);
  return earlier != 0 ? earlier : now;
}

int LaunchQueue::flush(Why why) noexcept {
  const std::lock_guard lock(mutex_);
  recording_ = false;
  if (list_.launches.empty()) return 0;
  if (why == Why::kOrder || counts_.off) return run_all();
  Graph* graph = find();
  if (graph == nullptr) {
    if (!seen_before(list_.hash)) {
      ++counts_.steps_without;
      return run_all();
    }
    try {
      graph = make();
    } catch (const std::bad_alloc&) {
      graph = nullptr;
    }
    if (graph == nullptr) return run_all();
  }
  return run_graph(*graph);
}

int LaunchQueue::run_all() noexcept {
  int error = 0;
  for (size_t i = 0; i < list_.launches.size() && error == 0; ++i) error = driver_.run(list_.at(i));
  list_.clear();
  return error;
}

// A graph that cannot be updated is no loss: the step goes launch by launch, and so do all others.
int LaunchQueue::run_graph(Graph& graph) noexcept {
  graph.used = ++clock_;
  for (size_t i = 0; i < list_.launches.size(); ++i) {
    const KernelLaunch fresh = list_.at(i), told = graph.list.at(i);
    if (same_call(fresh, told)) continue;
    if (driver_.update(graph.handle, i, fresh) != 0) {
      counts_.off = true;
      drop(graph);
      return run_all();
    }
    std::memcpy(const_cast<void*>(told.params), fresh.params, fresh.params_bytes);
    std::copy_n(fresh.grid, 3, graph.list.launches[i].grid);
    ++counts_.nodes_updated;
  }
  list_.clear();
  ++counts_.graph_runs;
  return driver_.run(graph.handle);
}

LaunchQueue::Graph* LaunchQueue::find() noexcept {
  Graph* best = nullptr;
  size_t fewest = list_.launches.size() + 1;
  for (Graph& graph : graphs_) {
    if (graph.list.hash != list_.hash || graph.list.launches.size() != list_.launches.size())
      continue;
    bool same = true;
    size_t changed = 0;
    for (size_t i = 0; i < list_.launches.size() && same && changed < fewest; ++i) {
      const KernelLaunch fresh = list_.at(i), told = graph.list.at(i);
      same = same_kernel(fresh, told);
      changed += same && !same_call(fresh, told);
    }
    if (same && changed < fewest) {
      fewest = changed;
      best = &graph;
    }
  }
  // Another session's graph: to tell it everything anew costs more than a graph of one's own.
  return best != nullptr && (fewest <= list_.launches.size() / 2 || graphs_.size() == kMaxGraphs)
             ? best
             : nullptr;
}

LaunchQueue::Graph* LaunchQueue::make() {
  const size_t n = list_.launches.size();
  if (n > kMaxNodes) return nullptr;
  size_t nodes = n;
  for (const Graph& graph : graphs_) nodes += graph.list.launches.size();
  while (graphs_.size() == kMaxGraphs || nodes > kMaxNodes) {
    Graph& oldest =
        *std::min_element(graphs_.begin(), graphs_.end(),
                          [](const Graph& a, const Graph& b) { return a.used < b.used; });
    nodes -= oldest.list.launches.size();
    drop(oldest);
  }
  Graph graph;
  graph.list = list_;
  std::vector<KernelLaunch> launches(n);
  for (size_t i = 0; i < n; ++i) launches[i] = graph.list.at(i);
  graph.handle = driver_.make(launches);
  if (graph.handle == nullptr) {
    counts_.off = true;
    return nullptr;
  }
  ++counts_.graphs_made;
  graphs_.push_back(std::move(graph));
  return &graphs_.back();
}

bool LaunchQueue::seen_before(uint64_t hash) noexcept {
  if (std::find(std::begin(seen_), std::end(seen_), hash) != std::end(seen_)) return true;
  seen_[next_seen_++ % kSeen] = hash;
  return false;
}

void LaunchQueue::drop(Graph& graph) noexcept {
  driver_.destroy(graph.handle);
  if (&graph != &graphs_.back()) std::swap(graph, graphs_.back());
  graphs_.pop_back();
}

LaunchQueue::Counts LaunchQueue::counts() noexcept {
  const std::lock_guard lock(mutex_);
  return counts_;
}

}  // namespace fathom::cuda
