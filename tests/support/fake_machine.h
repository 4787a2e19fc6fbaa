// A tree of files that stands for /proc and /sys of a machine with memory nodes.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace fathom::test {

class FakeMachine {
 public:
  FakeMachine() {
    char name[] = "/tmp/fathom-nodes-XXXXXX";
    if (mkdtemp(name) == nullptr) std::abort();
    path_ = name;
  }
  ~FakeMachine() { std::filesystem::remove_all(path_); }
  FakeMachine(const FakeMachine&) = delete;
  FakeMachine& operator=(const FakeMachine&) = delete;

  void write(const std::string& file, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(path_ + file).parent_path());
    std::ofstream(path_ + file) << text;
  }
  // As Linux writes them; 0 bytes: a node without memory.
  void node(int id, const std::string& cpus, int64_t total_mib, int64_t free_mib,
            const std::string& distance = {}) const {
    const std::string folder = "/sys/devices/system/node/node" + std::to_string(id);
    const std::string start = "Node " + std::to_string(id) + " ";
    write(folder + "/cpulist", cpus + "\n");
    write(folder + "/meminfo",
          start + "MemTotal:       " + std::to_string(total_mib * 1024) + " kB\n" + start +
              "MemFree:        " + std::to_string(free_mib * 1024) + " kB\n" + start +
              "Inactive(anon):  77 kB\n" + start + "Inactive(file):  1024 kB\n");
    if (!distance.empty()) write(folder + "/distance", distance + "\n");
  }
  void allow(const std::string& cpus, const std::string& nodes) const {
    write("/proc/thread-self/status", "Name:\tfathom\nCpus_allowed:\t3\nCpus_allowed_list:\t" +
                                          cpus + "\nMems_allowed:\t3\nMems_allowed_list:\t" +
                                          nodes + "\n");
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace fathom::test
