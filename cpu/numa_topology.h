// The machine's memory nodes as the system describes them: /sys/devices/system/node, and what this
// process may use of them, /proc/thread-self/status (affinity mask, cpusets, memory policies).
//
// What is done with nodes is in node_memory.h (memory) and threads.h (threads).
#pragma once

#include <string>
#include <vector>

#include "fathom/backend.hpp"

namespace fathom::cpu {

// Nodes of one device at most; a machine with more of them has its CPU device without nodes.
inline constexpr int kMaxNodes = 64;

struct NumaTopology {
  std::vector<NumaNode> nodes;  // ascending by id; at least one
  // Why there is one node where the system lists nodes: the list does not make sense.  Else empty.
  std::string doubt;
};
// Files that cannot be read or understood never fail: without a list that gives each processor one
// node, all is one node.  `root` as for numa_nodes().
NumaTopology read_numa_topology(const std::string& root = {});

// What one node has and could give now without swapping.  Zeros where the system does not tell.
MemoryState node_memory_state(int id, const std::string& root = {}) noexcept;

// "0-3,8" -> 0 1 2 3 8.  False, and nothing changed, for other text than ascending ranges below
// 65536; white space at the end and an empty list are fine.
bool parse_id_list(std::string_view text, std::vector<int>& ids);

}  // namespace fathom::cpu
