// pair_kernels.h in plain loops: the oracle of the vector kernels.  Sums are kept in double.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/pair_kernels.h"
#include "fathom/tensor.hpp"

namespace fathom::cpu {
namespace {

uint32_t pair(float even, float odd) noexcept {
  return f32_to_bf16(even) | static_cast<uint32_t>(f32_to_bf16(odd)) << 16;
}
double dot_pair(uint32_t a, uint32_t b) noexcept {
  const auto value = [](uint32_t bits) {
    return static_cast<double>(bf16_to_f32(static_cast<uint16_t>(bits)));
  };
  return value(a) * value(b) + value(a >> 16) * value(b >> 16);
}
uint32_t load_pair(const uint16_t* p) noexcept {
  return p[0] | static_cast<uint32_t>(p[1]) << 16;
}

void pack_columns(const PackColumns& p) {
  const int64_t n_cols = (p.n_columns + kPairUnit - 1) / kPairUnit * kPairUnit;
  for (int64_t c = 0; c < n_cols; ++c)
    for (int64_t i = 0; i < p.n; i += 2) {
      uint32_t& out = p.out[c / kPairUnit * p.unit_stride + i / 2 * kPairUnit + c % kPairUnit];
      const float* column = c < p.n_columns ? p.columns[c] : nullptr;
      out = column == nullptr
                ? 0
                : pair(p.scale * column[i], i + 1 < p.n ? p.scale * column[i + 1] : 0.0f);
    }
}

float stored_value(const PackRows& p, int64_t row, int64_t col) noexcept {
  if (row >= p.n_rows || col >= p.n_cols) return 0;
  const char* x = static_cast<const char*>(p.x) + row * p.x_bytes;
  if (p.type == kRowF32) {
    float value;
    std::memcpy(&value, x + 4 * col, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, x + 2 * col, sizeof bits);
  return p.type == kRowF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

void pack_rows(const PackRows& p) {
  const int64_t n_cols = (p.n_cols + kPairUnit - 1) / kPairUnit * kPairUnit;
  for (int64_t r = 0; r < p.n_rows; ++r)
    for (int64_t c = 0; c < n_cols; ++c) {
      const float value = stored_value(p, r, c);
      if (p.rows != nullptr) p.rows[r * p.row_stride + c] = f32_to_bf16(value);
      if (p.pairs != nullptr && r % 2 == 0)
        p.pairs[c / kPairUnit * p.panel_stride + r / 2 * kPairUnit + c % kPairUnit] =
            pair(value, stored_value(p, r + 1, c));
    }
}

float expanded(const ExpandPairs& p, int64_t row, int64_t col) noexcept {
  if (row >= p.n_rows) return 0;
  const uint32_t* panel = p.weights + col / kPairUnit * p.weight_stride + col % kPairUnit;
  double sum = 0;
  for (int64_t i = 0; i < p.k / 2; ++i)
    sum += dot_pair(load_pair(p.x + row * p.x_stride + 2 * i), panel[i * kPairUnit]);
  return static_cast<float>(sum);
}

void expand(const ExpandPairs& p) {
  for (int64_t row = 0; row < p.n_rows; ++row)
    for (int64_t col = 0; col < p.n_panels * kPairUnit; ++col) {
      if (p.rows != nullptr) p.rows[row * p.row_stride + col] = f32_to_bf16(expanded(p, row, col));
      if (p.pairs != nullptr && row % 2 == 0)
        p.pairs[col / kPairUnit * p.panel_stride + row / 2 * kPairUnit + col % kPairUnit] =
            pair(expanded(p, row, col), expanded(p, row + 1, col));
    }
}

void attend(const AttendPairs& p) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  for (int64_t col = 0; col < p.n_cols; ++col) {
    const uint32_t* query = p.queries + col / kPairUnit * p.query_stride + col % kPairUnit;
    float top = p.max[col];
    for (int64_t row = 0; row < p.n_rows; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < p.k / 2; ++i)
        sum += dot_pair(load_pair(p.keys + row * p.key_stride + 2 * i), query[i * kPairUnit]);
      const bool seen = p.limits == nullptr || row < p.limits[col];
      const float score = seen ? static_cast<float>(sum) : kLowest;
      p.scores[row * p.n_cols + col] = score;
      if (!(score <= top)) top = score;  // a NaN comes through
    }
    const float base = top == kLowest ? 0.0f : top;
    const float decay = std::exp(p.max[col] - base);
    double total = 0;
    for (int64_t row = 0; row < p.n_rows; row += 2) {
      const float even = std::exp(p.scores[row * p.n_cols + col] - base);
      const float odd =
          row + 1 < p.n_rows ? std::exp(p.scores[(row + 1) * p.n_cols + col] - base) : 0.0f;
      p.weights[row / 2 * p.n_cols + col] = pair(even, odd);
      total += static_cast<double>(even) + odd;
    }
    p.decay[col] = decay;
    p.sum[col] = static_cast<float>(p.sum[col] * static_cast<double>(decay) + total);
    p.max[col] = top;
    if (col >= p.n_used) continue;
    for (int64_t i = 0; i < p.n_values; ++i) {
      float& out = p.out[col * p.out_stride + i];
      const uint32_t* values = p.values + i / kPairUnit * p.value_stride + i % kPairUnit;
      double sum = static_cast<double>(out) * decay;
      for (int64_t row = 0; row < p.n_rows; row += 2)
        sum += dot_pair(p.weights[row / 2 * p.n_cols + col], values[row / 2 * kPairUnit]);
      out = static_cast<float>(sum);
    }
  }
}

}  // namespace

const PairKernels& pair_kernels_scalar() noexcept {
  static constexpr PairKernels kKernels = {.name = "scalar pairs",
                                           .pack_columns = pack_columns,
                                           .pack_rows = pack_rows,
                                           .expand = expand,
                                           .attend = attend};
  return kKernels;
}

}  // namespace fathom::cpu
