// What is read of a machine's memory nodes: usual ones, odd ones, and files that make no sense.
#include "cpu/numa_topology.h"

#include <catch2/catch.hpp>

#include "support/fake_machine.h"

using namespace fathom;
using namespace fathom::cpu;
using Ids = std::vector<int>;
using test::FakeMachine;

namespace {
constexpr int64_t kMiB = 1 << 20;
}

TEST_CASE("lists of processors") {
  const auto ids = [](std::string_view text) {
    Ids out{-1};
    return parse_id_list(text, out) ? out : Ids{-2};
  };
  CHECK(ids("0\n") == Ids{0});
  CHECK(ids("0-3,8\n") == Ids{0, 1, 2, 3, 8});
  CHECK(ids("") == Ids{});
  CHECK(ids("\n") == Ids{});
  CHECK(ids("65535") == Ids{65535});
  for (const char* bad : {"x", "0-", "-1", "3-1", "0,0", "1,0", "0-3,2", "0,", ",0", "0 1", "0-3x",
                          "65536", "0-99999999", "99999999999999999999"}) {
    INFO(bad);
    CHECK(ids(bad) == Ids{-2});
  }
}

TEST_CASE("two sockets") {
  FakeMachine machine;
  machine.node(0, "0-3,8-11", 1000, 600, "10 21");
  machine.node(1, "4-7,12-15", 2000, 50, "21 10");
  machine.write("/proc/meminfo", "MemTotal: 3072000 kB\nMemAvailable: 409600 kB\n");
  const NumaTopology t = read_numa_topology(machine.path());
  CHECK(t.doubt.empty());
  REQUIRE(t.nodes.size() == 2);
  CHECK(t.nodes[0].id == 0);
  CHECK(t.nodes[0].cpus == Ids{0, 1, 2, 3, 8, 9, 10, 11});
  CHECK(t.nodes[0].total_bytes == 1000 * kMiB);
  CHECK(t.nodes[0].free_bytes == 601 * kMiB);
  CHECK(t.nodes[0].distances == Ids{10, 21});
  CHECK(t.nodes[1].cpus == Ids{4, 5, 6, 7, 12, 13, 14, 15});
  CHECK(t.nodes[1].free_bytes == 51 * kMiB);
  CHECK(t.nodes[1].distances == Ids{21, 10});
  // The machine has less free than the node says: a control group, or a limit.
  CHECK(node_memory_state(0, machine.path()).free_bytes == 400 * kMiB);
  CHECK(node_memory_state(1, machine.path()).free_bytes == 51 * kMiB);
  CHECK(node_memory_state(7, machine.path()).total_bytes == 0);
}

TEST_CASE("only what the process may use") {
  FakeMachine machine;
  machine.node(0, "0-3", 1000, 600, "10 21 31");
  machine.node(1, "4-7", 1000, 600, "21 10 41");
  machine.node(2, "8-11", 1000, 600, "31 41 10");
  SECTION("processors of two nodes, memory of one") {
    machine.allow("2-3,8", "0");
    const NumaTopology t = read_numa_topology(machine.path());
    REQUIRE(t.nodes.size() == 2);
    CHECK(t.nodes[0].cpus == Ids{2, 3});
    CHECK(t.nodes[1].id == 2);
    CHECK(t.nodes[1].cpus == Ids{8});
    CHECK(t.nodes[1].total_bytes == 0);
    CHECK(t.nodes[0].distances == Ids{10, 31});
    CHECK(t.nodes[1].distances == Ids{31, 10});
  }
  SECTION("processors of one node, memory of all") {
    machine.allow("4-7", "0-2");
    const NumaTopology t = read_numa_topology(machine.path());
    REQUIRE(t.nodes.size() == 3);
    CHECK(t.nodes[0].cpus.empty());
    CHECK(t.nodes[1].cpus == Ids{4, 5, 6, 7});
    CHECK(t.nodes[2].total_bytes == 1000 * kMiB);
  }
  SECTION("a processor that is in no node") {
    machine.allow("0-3,12", "0-2");
    const NumaTopology t = read_numa_topology(machine.path());
    REQUIRE(t.nodes.size() == 1);
    CHECK(t.nodes[0].cpus == Ids{0, 1, 2, 3, 12});
    CHECK(t.doubt == "processor 12 is in no node");
  }
}

TEST_CASE("memory without processors, processors without memory, gaps in the numbers") {
  FakeMachine machine;
  machine.node(0, "0-1", 1000, 600, "10 21 17 99");
  machine.node(2, "2-3", 0, 0, "21 10 28 99");
  machine.node(5, "", 4000, 3999, "17 28 10 99");  // CXL
  machine.node(9, "", 0, 0, "99 99 99 10");        // nothing at all
  machine.write("/sys/devices/system/node/possible", "0-9\n");
  machine.write("/sys/devices/system/node/nodes", "no number");
  machine.write("/sys/devices/system/node/node12x/cpulist", "77\n");
  const NumaTopology t = read_numa_topology(machine.path());
  REQUIRE(t.nodes.size() == 3);
  CHECK(t.nodes[0].id == 0);
  CHECK(t.nodes[1].id == 2);
  CHECK(t.nodes[1].total_bytes == 0);
  CHECK(t.nodes[1].cpus == Ids{2, 3});
  CHECK(t.nodes[2].id == 5);
  CHECK(t.nodes[2].cpus.empty());
  CHECK(t.nodes[2].total_bytes == 4000 * kMiB);
  CHECK(t.nodes[0].distances == Ids{10, 21, 17});
  CHECK(t.nodes[2].distances == Ids{17, 28, 10});
}

TEST_CASE("a machine that does not tell is one node") {
  FakeMachine machine;
  SECTION("no /sys at all") {}
  SECTION("no /sys, but a mask") {
    machine.allow("1,3", "0");
  }
  SECTION("a folder without nodes") {
    machine.write("/sys/devices/system/node/possible", "0\n");
  }
  const NumaTopology t = read_numa_topology(machine.path());
  REQUIRE(t.nodes.size() == 1);
  CHECK(t.doubt.empty());
  CHECK(t.nodes[0].id == 0);
  CHECK_FALSE(t.nodes[0].cpus.empty());
  CHECK(t.nodes[0].distances == Ids{10});
}

TEST_CASE("files that make no sense") {
  FakeMachine machine;
  machine.node(0, "0-1", 1000, 600, "10 21");
  machine.node(1, "2-3", 1000, 600, "21 10");
  const std::string node1 = "/sys/devices/system/node/node1/";
  SECTION("processors") {
    std::string why;
    SECTION("no file") {
      std::filesystem::remove(machine.path() + node1 + "cpulist");
      why = "node 1 has no list of processors that can be read";
    }
    SECTION("no list") {
      machine.write(node1 + "cpulist", "two and three\n");
      why = "node 1 has no list of processors that can be read";
    }
    SECTION("in two nodes") {
      machine.write(node1 + "cpulist", "1-3\n");
      why = "processor 1 is in two nodes";
    }
    SECTION("nowhere") {
      machine.write(node1 + "cpulist", "\n");
      machine.write("/sys/devices/system/node/node0/cpulist", "\n");
      why = "no node has a processor";
    }
    const NumaTopology t = read_numa_topology(machine.path());
    CHECK(t.nodes.size() == 1);
    CHECK(t.doubt == why);
  }
  SECTION("memory: none that can be counted on") {
    machine.write(node1 + "meminfo", "Node 1 MemTotal: much kB\nNode 1 MemFree: -5 kB\n");
    const NumaTopology t = read_numa_topology(machine.path());
    REQUIRE(t.nodes.size() == 2);
    CHECK(t.nodes[1].total_bytes == 0);
    CHECK(t.nodes[1].free_bytes == 0);
  }
  SECTION("distances: the usual ones") {
    for (const char* text : {"", "10", "10 21 31", "10 x", "21 -1", "5 10"}) {
      INFO(text);
      machine.write(node1 + "distance", text);
      const NumaTopology t = read_numa_topology(machine.path());
      REQUIRE(t.nodes.size() == 2);
      CHECK(t.nodes[0].distances == Ids{10, 21});
      CHECK(t.nodes[1].distances == Ids{20, 10});
    }
  }
  SECTION("a mask that is none") {
    machine.allow("many", "some");
    CHECK(read_numa_topology(machine.path()).nodes.size() == 2);
  }
}

TEST_CASE("this machine has a node with processors") {
  const std::vector<NumaNode> nodes = numa_nodes();
  REQUIRE_FALSE(nodes.empty());
  size_t n_cpus = 0;
  for (const NumaNode& node : nodes) {
    n_cpus += node.cpus.size();
    REQUIRE(node.distances.size() == nodes.size());
  }
  CHECK(n_cpus > 0);
}
