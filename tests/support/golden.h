// Reference values for tests: a reader of the golden .safetensors files (F32 and I32 only) that
// shares no code with lib/io, and the comparisons that a failing test prints.
// A file that is missing or malformed throws std::runtime_error, which fails the test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fathom::test {

// Path of a file of the golden tree: test_data("quant/blocks.gguf").
#ifdef FATHOM_TEST_DATA
inline std::string test_data(std::string_view relative) {
  return std::string(FATHOM_TEST_DATA "/").append(relative);
}
#endif

// The whole file; throws when it cannot be read.
std::vector<std::byte> read_file(const std::string& path);

class Golden {
 public:
  struct Tensor {
    std::vector<int64_t> shape;
    std::vector<float> f32;    // filled when the file says F32
    std::vector<int32_t> i32;  // filled when the file says I32
  };

  static Golden load(const std::string& path);

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  const Tensor& at(const std::string& name) const;  // throws when absent
  std::span<const float> f32(const std::string& name) const;
  std::span<const int32_t> i32(const std::string& name) const;
  // Row `row` of a tensor seen as [rows, last dimension].
  std::span<const float> row(const std::string& name, int64_t row) const;
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }

 private:
  std::string path_;
  std::map<std::string, Tensor> tensors_;
};

struct Difference {
  int64_t index = -1;  // -1: none
  float expected = 0, got = 0;
  double value = 0;  // |expected - got|; infinite when exactly one of them is NaN
};

// "index 17: expected 1.5, got 1.25 (difference 0.25)", or "none".
std::string describe(const Difference&);

// The largest absolute difference, the first of equals.  Both spans have the same size (throws).
Difference max_abs_diff(std::span<const float> expected, std::span<const float> got);
// The first element whose 32 bits differ.
Difference first_bit_difference(std::span<const float> expected, std::span<const float> got);
// Cosine of the angle between the two vectors; 1 when both are zero.
double cosine(std::span<const float> a, std::span<const float> b);
// Index of the largest value, the first of equals; -1 when empty.
int64_t argmax(std::span<const float> values);

}  // namespace fathom::test
