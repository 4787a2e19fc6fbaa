// Formats: Linux Documentation/ABI/stable/sysfs-devices-node, Documentation/filesystems/proc.rst.
#include "cpu/numa_topology.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <optional>
#include <thread>

#include "cpu/host_memory.h"

namespace fathom::cpu {
namespace {

constexpr int kMaxId = 65536;
constexpr int kHere = 10, kElsewhere = 20;  // distances where the firmware does not tell
constexpr const char* kFolder = "/sys/devices/system/node";

// The beginning of a small file; none when it cannot be read.
std::optional<std::string> read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(64 * 1024, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(text.size())) && !file.eof()) return {};
  text.resize(static_cast<size_t>(file.gcount()));
  return text;
}

// What follows `key` on its line.
std::optional<std::string_view> after(std::string_view text, std::string_view key) {
  for (size_t at = text.find(key); at != text.npos; at = text.find(key, at + 1)) {
    // "Active:" is not the end of "Inactive:".
    if (at > 0 && text[at - 1] != '\n' && text[at - 1] != ' ') continue;
    const size_t begin = text.find_first_not_of(" \t", at + key.size());
    if (begin == text.npos) return std::string_view();
    return text.substr(begin, text.find('\n', begin) - begin);
  }
  return {};
}

// Bytes of a line "key:  123 kB"; 0 without it.
int64_t kib_after(std::string_view text, std::string_view key) {
  const auto line = after(text, key);
  int64_t kib = 0;
  if (!line) return 0;
  const auto [end, error] = std::from_chars(line->data(), line->data() + line->size(), kib);
  return error == std::errc() && kib > 0 && kib < INT64_MAX / 1024 ? kib * 1024 : 0;
}

// Ids that a line of /proc/thread-self/status allows; none: it does not tell.
std::optional<std::vector<int>> allowed(const std::string& root, std::string_view key) {
  auto status = read_text(root + "/proc/thread-self/status");
  if (!status) status = read_text(root + "/proc/self/status");
  std::vector<int> ids;
  if (!status) return {};
  const auto line = after(*status, key);
  if (!line || !parse_id_list(*line, ids) || ids.empty()) return {};
  return ids;
}

// The affinity mask of the calling thread, asked of the system.
std::vector<int> affinity() {
  std::vector<int> cpus;
  for (int capacity = 1024; capacity <= kMaxId; capacity *= 2) {
    cpu_set_t* set = CPU_ALLOC(capacity);
    if (set == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(capacity);
    const bool answered = sched_getaffinity(0, size, set) == 0;
    const bool too_small = !answered && errno == EINVAL;
    for (int cpu = 0; answered && cpu < capacity; ++cpu)
      if (CPU_ISSET_S(cpu, size, set)) cpus.push_back(cpu);
    CPU_FREE(set);
    if (!too_small) break;
  }
  for (int cpu = 0; cpus.empty() && cpu < static_cast<int>(std::thread::hardware_concurrency());)
    cpus.push_back(cpu++);
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

// N of every folder nodeN.
std::vector<int> listed_nodes(const std::string& root) {
  std::vector<int> ids;
  std::error_code error_code;
  std::filesystem::directory_iterator entry(root + kFolder, error_code);
  for (; !error_code && entry != std::filesystem::directory_iterator();
       entry.increment(error_code)) {
    const std::string name = entry->path().filename().string();
    int id = 0;
    if (!name.starts_with("node")) continue;
    const auto [end, error] = std::from_chars(name.data() + 4, name.data() + name.size(), id);
    if (error == std::errc() && end == name.data() + name.size() && id >= 0 && id < kMaxId)
      ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

std::string node_file(const std::string& root, int id, const char* name) {
  return fmt::format("{}{}/node{}/{}", root, kFolder, id, name);
}

MemoryState memory_of(int id, const std::string& root) {
  const auto text = read_text(node_file(root, id, "meminfo"));
  if (!text) return {};
  MemoryState state;
  state.total_bytes = kib_after(*text, "MemTotal:");
  // As for control groups, file pages that nobody used lately count as free.
  state.free_bytes = std::min(state.total_bytes,
                              kib_after(*text, "MemFree:") + kib_after(*text, "Inactive(file):"));
  return state;
}

// Distances from a node to all listed ones: a number each, as many as there are nodes.
std::vector<int> distances_of(const std::string& root, int id, const std::vector<int>& listed) {
  std::vector<int> numbers;
  if (const auto text = read_text(node_file(root, id, "distance"))) {
    const char *at = text->data(), *end = at + text->size();
    for (int number = 0; at != end;) {
      if (*at == ' ' || *at == '\n' || *at == '\t') {
        ++at;
        continue;
      }
      const auto [next, error] = std::from_chars(at, end, number);
      if (error != std::errc() || number < kHere) {
        numbers.clear();
        break;
      }
      numbers.push_back(number);
      at = next;
    }
  }
  if (numbers.size() == listed.size()) return numbers;
  numbers.clear();
  for (const int other : listed) numbers.push_back(other == id ? kHere : kElsewhere);
  return numbers;
}

bool contains(const std::optional<std::vector<int>>& ids, int id) {
  return !ids || std::binary_search(ids->begin(), ids->end(), id);
}

NumaTopology one_node(const std::string& root, const std::optional<std::vector<int>>& cpus,
                      std::string doubt) {
  const MemoryState memory = host_memory_state(root.c_str());
  NumaNode node;
  node.cpus = cpus ? *cpus : affinity();
  node.total_bytes = memory.total_bytes;
  node.free_bytes = memory.free_bytes;
  node.distances = {kHere};
  return {{std::move(node)}, std::move(doubt)};
}

}  // namespace

bool parse_id_list(std::string_view text, std::vector<int>& ids) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ' || text.back() == '\0'))
    text.remove_suffix(1);
  std::vector<int> found;
  for (size_t at = 0; at < text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    const char *begin = text.data() + at, *end = text.data() + comma;
    int first = 0, last = 0;
    auto [next, error] = std::from_chars(begin, end, first);
    if (error != std::errc()) return false;
    last = first;
    if (next != end) {
      if (*next != '-') return false;
      const auto range = std::from_chars(next + 1, end, last);
      if (range.ec != std::errc() || range.ptr != end) return false;
    }
    if (first < 0 || last < first || last >= kMaxId || (!found.empty() && first <= found.back()))
      return false;
    for (int id = first; id <= last; ++id) found.push_back(id);
    at = comma + 1;
    if (comma + 1 == text.size()) return false;  // a comma at the end
  }
  ids = std::move(found);
  return true;
}

NumaTopology read_numa_topology(const std::string& root) {
  const auto cpus_allowed = allowed(root, "Cpus_allowed_list:");
  const auto nodes_allowed = allowed(root, "Mems_allowed_list:");
  const std::vector<int> listed = listed_nodes(root);
  if (listed.size() < 2) {
    NumaTopology one = one_node(root, cpus_allowed, {});
    if (!listed.empty()) one.nodes.front().id = listed.front();
    return one;
  }

  NumaTopology topology;
  std::vector<int> seen;       // processors of all nodes
  std::vector<size_t> places;  // in `listed`, of the nodes that are kept
  for (size_t i = 0; i < listed.size(); ++i) {
    NumaNode node;
    node.id = listed[i];
    std::vector<int> cpus;
    const auto text = read_text(node_file(root, node.id, "cpulist"));
    if (!text || !parse_id_list(*text, cpus))
      return one_node(root, cpus_allowed,
                      fmt::format("node {} has no list of processors that can be read", node.id));
    for (const int cpu : cpus)
      if (contains(cpus_allowed, cpu)) node.cpus.push_back(cpu);
    seen.insert(seen.end(), node.cpus.begin(), node.cpus.end());
    if (contains(nodes_allowed, node.id)) {
      const MemoryState memory = memory_of(node.id, root);
      node.total_bytes = memory.total_bytes;
      node.free_bytes = memory.free_bytes;
    }
    if (node.cpus.empty() && node.total_bytes == 0) continue;
    node.distances = distances_of(root, node.id, listed);
    topology.nodes.push_back(std::move(node));
    places.push_back(i);
  }
  std::sort(seen.begin(), seen.end());
  if (seen.empty()) return one_node(root, cpus_allowed, "no node has a processor");
  if (const auto twice = std::adjacent_find(seen.begin(), seen.end()); twice != seen.end())
    return one_node(root, cpus_allowed, fmt::format("processor {} is in two nodes", *twice));
  for (const int cpu : cpus_allowed.value_or(std::vector<int>()))
    if (!std::binary_search(seen.begin(), seen.end(), cpu))
      return one_node(root, cpus_allowed, fmt::format("processor {} is in no node", cpu));
  // Distances to the nodes that are left.
  for (NumaNode& node : topology.nodes) {
    std::vector<int> all = std::move(node.distances);
    node.distances.clear();
    for (const size_t place : places) node.distances.push_back(all[place]);
  }
  return topology;
}

MemoryState node_memory_state(int id, const std::string& root) noexcept try {
  MemoryState node = memory_of(id, root);
  const MemoryState host = host_memory_state(root.c_str());
  if (host.total_bytes > 0) {  // control groups and limits hold for all nodes together
    node.total_bytes = std::min(node.total_bytes, host.total_bytes);
    node.free_bytes = std::min(node.free_bytes, host.free_bytes);
  }
  return node;
} catch (const std::exception&) {
  return {};
}

}  // namespace fathom::cpu

namespace fathom {

std::vector<NumaNode> numa_nodes(const std::string& root) {
  return cpu::read_numa_topology(root).nodes;
}
MemoryState host_memory(const std::string& root) noexcept {
  return cpu::host_memory_state(root.c_str());
}

}  // namespace fathom
