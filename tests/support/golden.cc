// Reader of golden .safetensors files and comparisons; contracts in golden.h.
#include "support/golden.h"

#include <fmt/format.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace fathom::test {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what);
}

void require_same_size(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) fail(fmt::format("{} values against {}", a.size(), b.size()));
}

double difference(float expected, float got) {
  if (std::isnan(expected) || std::isnan(got)) {
    const bool same = std::isnan(expected) && std::isnan(got);
    return same ? 0.0 : std::numeric_limits<double>::infinity();
  }
  if (expected == got) return 0.0;  // equal infinities as well
  return std::fabs(static_cast<double>(expected) - static_cast<double>(got));
}

template <class T>
std::vector<T> copy_values(std::span<const std::byte> bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

}  // namespace

std::vector<std::byte> read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  if (!in) fail(path + ": cannot be opened");
  std::vector<std::byte> bytes(static_cast<size_t>(in.tellg()));
  in.seekg(0);
  in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!in) fail(path + ": cannot be read");
  return bytes;
}

Golden Golden::load(const std::string& path) {
  const std::vector<std::byte> bytes = read_file(path);
  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof header_bytes) fail(path + ": shorter than its header");
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  if (header_bytes > bytes.size() - 8) fail(path + ": shorter than its header");
  const char* header = reinterpret_cast<const char*>(bytes.data()) + 8;
  const std::span<const std::byte> data = std::span(bytes).subspan(8 + header_bytes);

  Golden golden;
  golden.path_ = path;
  const auto entries = nlohmann::json::parse(header, header + header_bytes);
  for (const auto& [name, entry] : entries.items()) {
    if (name == "__metadata__") continue;
    const auto begin = entry.at("data_offsets").at(0).get<size_t>();
    const auto end = entry.at("data_offsets").at(1).get<size_t>();
    if (begin > end || end > data.size()) fail(fmt::format("{}: {} lies outside", path, name));
    Tensor tensor;
    tensor.shape = entry.at("shape").get<std::vector<int64_t>>();
    size_t elements = 1;
    for (const int64_t dim : tensor.shape) elements *= static_cast<size_t>(dim);
    if (elements * 4 != end - begin) fail(fmt::format("{}: size of {} is wrong", path, name));
    const auto dtype = entry.at("dtype").get<std::string>();
    if (dtype == "F32") {
      tensor.f32 = copy_values<float>(data.subspan(begin, end - begin));
    } else if (dtype == "I32") {
      tensor.i32 = copy_values<int32_t>(data.subspan(begin, end - begin));
    } else {
      fail(fmt::format("{}: {} has type {}", path, name, dtype));
    }
    golden.tensors_.emplace(name, std::move(tensor));
  }
  return golden;
}

const Golden::Tensor& Golden::at(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail(fmt::format("{} has no tensor {}", path_, name));
  return found->second;
}

std::span<const float> Golden::f32(const std::string& name) const {
  const Tensor& tensor = at(name);
  if (tensor.f32.empty()) fail(fmt::format("{}: {} is not F32", path_, name));
  return tensor.f32;
}

std::span<const int32_t> Golden::i32(const std::string& name) const {
  const Tensor& tensor = at(name);
  if (tensor.i32.empty()) fail(fmt::format("{}: {} is not I32", path_, name));
  return tensor.i32;
}

std::span<const float> Golden::row(const std::string& name, int64_t row) const {
  const std::span<const float> all = f32(name);
  const auto width = static_cast<size_t>(at(name).shape.back());
  const auto first = static_cast<size_t>(row) * width;
  if (row < 0 || first + width > all.size()) {
    fail(fmt::format("{}: {} has no row {}", path_, name, row));
  }
  return all.subspan(first, width);
}

std::string describe(const Difference& d) {
  if (d.index < 0) return "none";
  return fmt::format("index {}: expected {:.9g}, got {:.9g} (difference {:.3g})", d.index,
                     d.expected, d.got, d.value);
}

Difference max_abs_diff(std::span<const float> expected, std::span<const float> got) {
  require_same_size(expected, got);
  Difference worst;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = difference(expected[i], got[i]);
    if (value > worst.value) worst = {static_cast<int64_t>(i), expected[i], got[i], value};
  }
  return worst;
}

Difference first_bit_difference(std::span<const float> expected, std::span<const float> got) {
  require_same_size(expected, got);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::bit_cast<uint32_t>(expected[i]) != std::bit_cast<uint32_t>(got[i])) {
      return {static_cast<int64_t>(i), expected[i], got[i], difference(expected[i], got[i])};
    }
  }
  return {};
}

double cosine(std::span<const float> a, std::span<const float> b) {
  require_same_size(a, b);
  double dot = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = a[i], y = b[i];
    dot += x * y;
    aa += x * x;
    bb += y * y;
  }
  if (aa == 0 && bb == 0) return 1.0;
  if (aa == 0 || bb == 0) return 0.0;
  return dot / std::sqrt(aa * bb);
}

int64_t argmax(std::span<const float> values) {
  int64_t best = values.empty() ? -1 : 0;
  for (size_t i = 1; i < values.size(); ++i) {
    if (values[i] > values[static_cast<size_t>(best)]) best = static_cast<int64_t>(i);
  }
  return best;
}

}  // namespace fathom::test
