// Runs a fuzz target without a fuzzer: every file of the folders named on the command line, and a
// fixed number of damaged copies of each (cut short, bytes and little-endian words overwritten).
// The damage depends on the file alone, so a failure repeats.  A folder without files is an error.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr int kDamagedCopies = 200;

// Values that sizes and counts in files must survive.
constexpr uint64_t kAwkward[] = {
    0, 1, 0x7f, 0xff, 0x7fff, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fffffffffffffff, UINT64_MAX};

// An exact allocation, so that the address sanitizer sees the first byte behind it.
void run(const std::vector<uint8_t>& input) {
  std::vector<uint8_t> copy(input);
  copy.shrink_to_fit();
  LLVMFuzzerTestOneInput(copy.data(), copy.size());
}

std::vector<uint8_t> damage(std::vector<uint8_t> input, std::mt19937& random) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  if (input.empty()) return input;
  // Headers are at the front and matter most: half of all damage goes to the first 512 bytes.
  const size_t reach = random() % 2 ? input.size() : std::min<size_t>(input.size(), 512);
  switch (random() % 4) {
    case 0:
      input.resize(below(reach));
      break;
    case 1:
      for (size_t n = 1 + below(4); n > 0; --n)
        input[below(reach)] = static_cast<uint8_t>(random());
      break;
    case 2:
      input[below(reach)] ^= static_cast<uint8_t>(1u << (random() % 8));
      break;
    case 3: {
      const size_t width = random() % 2 ? 8 : 4;
      if (input.size() < width) break;
      const uint64_t value = kAwkward[below(std::size(kAwkward))];
      const size_t at = below(std::min(reach, input.size() - width + 1));
      for (size_t i = 0; i < width; ++i) input[at + i] = static_cast<uint8_t>(value >> (8 * i));
      break;
    }
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  namespace fs = std::filesystem;
  size_t runs = 0;
  for (int i = 1; i < argc; ++i) {
    std::vector<fs::path> files;
    if (fs::is_directory(argv[i])) {
      for (const auto& entry : fs::directory_iterator(argv[i])) files.push_back(entry.path());
    } else if (fs::exists(argv[i])) {
      files.push_back(argv[i]);
    }
    if (files.empty()) {
      std::fprintf(stderr, "%s: no inputs\n", argv[i]);
      return 1;
    }
    std::sort(files.begin(), files.end());
    for (const fs::path& path : files) {
      std::ifstream file(path, std::ios::binary);
      const std::vector<uint8_t> input((std::istreambuf_iterator<char>(file)), {});
      std::fprintf(stderr, "%s: %zu bytes\n", path.c_str(), input.size());
      run(input);
      std::mt19937 random(static_cast<uint32_t>(input.size()));
      for (int n = 0; n < kDamagedCopies; ++n) run(damage(input, random));
      runs += 1 + kDamagedCopies;
    }
  }
  std::printf("%zu inputs\n", runs);
  return runs > 0 ? 0 : 1;
}
