// make_model: writes a random model of a named shape, for benchmarks without a download.
//
//   make_model --shape v2-lite --type Q4_K_M --out v2-lite.Q4_K_M.gguf [--layers 8]
//              [--layout new|mid|old] [--seed N] [--holes]
//   make_model --shape v3 --type F8_E4M3 --out folder --layers 2      (Hugging Face checkpoint)
//
// Shapes: v2-lite v2 v3 kimi-k2, tiny-v2-lite tiny-v2 tiny-v3.  Types: any weight type of GGUF or
// Q4_K_M, llama.cpp's mixture; a folder is written for F8_E4M3 and when --hf is given.
// --holes writes no data: a sparse file of true size, for plans.  Weights are random valid blocks
// with sane magnitudes; the text such a model writes is noise, its speed is that of a real one.
#include <fmt/format.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>

#include "support/random_model.h"

using namespace fathom;
using namespace fathom::test;

namespace {

struct Arguments {
  std::string shape, type = "Q8_0", out, layout = "new";
  int64_t layers = 0;  // 0: all
  uint64_t seed = 1;
  bool holes = false, hf = false;
};

int64_t number(std::string_view option, std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) {
    throw std::runtime_error(fmt::format("{} takes a number from 1, not '{}'", option, text));
  }
  return value;
}

Arguments parse(int argc, char** argv) {
  Arguments a;
  for (int i = 1; i < argc; ++i) {
    const std::string_view option = argv[i];
    if (option == "--holes") {
      a.holes = true;
      continue;
    }
    if (option == "--hf") {
      a.hf = true;
      continue;
    }
    if (i + 1 == argc) throw std::runtime_error(fmt::format("{} needs a value", option));
    const std::string_view value = argv[++i];
    if (option == "--shape")
      a.shape = value;
    else if (option == "--type")
      a.type = value;
    else if (option == "--out")
      a.out = value;
    else if (option == "--layout")
      a.layout = value;
    else if (option == "--layers")
      a.layers = number(option, value);
    else if (option == "--seed")
      a.seed = static_cast<uint64_t>(number(option, value));
    else
      throw std::runtime_error(fmt::format("unknown option {}", option));
  }
  if (a.shape.empty() || a.out.empty()) throw std::runtime_error("--shape and --out are needed");
  return a;
}

GgufLayout layout_named(std::string_view name) {
  if (name == "new") return GgufLayout::kNew;
  if (name == "mid") return GgufLayout::kMid;
  if (name == "old") return GgufLayout::kOld;
  throw std::runtime_error(fmt::format("no layout is named '{}'; there are new, mid, old", name));
}

void run(const Arguments& a) {
  ModelConfig config = named_shape(a.shape);
  if (a.layers > 0) config.num_hidden_layers = a.layers;
  const Contents contents = a.holes ? Contents::kHoles : Contents::kBlocks;
  int64_t bytes = 0, weights = 0;
  const auto count = [&](const std::vector<TensorSpec>& tensors) {
    for (const TensorSpec& tensor : tensors) {
      bytes += tensor.bytes();
      weights += tensor.elements();
    }
  };
  const auto start = std::chrono::steady_clock::now();
  if (a.hf || a.type == "F8_E4M3") {
    const DType dtype = dtype_named(a.type);
    count(hf_tensors(config, dtype));
    write_hf_model(a.out, config, {.dtype = dtype, .contents = contents, .seed = a.seed});
  } else {
    const GgufLayout layout = layout_named(a.layout);
    count(gguf_tensors(config, layout, a.type));
    write_gguf_model(a.out, config,
                     {.layout = layout, .type = a.type, .contents = contents, .seed = a.seed});
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  fmt::print("{}: {} layers, {:.2f} G weights, {:.2f} GB in {:.1f} s ({:.0f} MB/s)\n", a.out,
             config.num_hidden_layers, static_cast<double>(weights) * 1e-9,
             static_cast<double>(bytes) * 1e-9, elapsed.count(),
             static_cast<double>(bytes) * 1e-6 / elapsed.count());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr,
               "make_model: {}\nusage: make_model --shape NAME --out PATH [--type Q8_0] "
               "[--layers N] [--layout new] [--seed N] [--hf] [--holes]\n",
               error.what());
    return 2;
  }
}
