// rows_kernels.h in plain C++: the oracle of the other tables and the code for machines without
// them.  Long sums run in double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/page_codec.h"
#include "cpu/rows_kernels.h"
#include "fathom/tensor.hpp"

namespace fathom::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

double sum_squares(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += double{x[i]} * x[i];
  return sum;
}

void scale(const float* x, float factor, const float* weight, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void rotate(const float* x, const float* cos_sin, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 2) {
    const float a = x[i], b = x[i + 1], c = cos_sin[i], s = cos_sin[i + 1];
    out[i] = a * c - b * s;
    out[i + 1] = b * c + a * s;
  }
}

void pack_f16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

void decode(const DecodeRows& a) {
  const auto* row = static_cast<const std::byte*>(a.rows);
  for (int64_t i = 0; i < a.n_rows; ++i)
    decode_row(a.type, row + i * a.row_bytes, a.n_cols, a.out + i * a.out_stride);
}

void expand(const ExpandRows& a) {
  for (int64_t i = 0; i < a.n_rows; ++i) {
    const float* x = a.x + i * a.x_stride;
    for (int64_t p = 0; p < a.n_panels; ++p) {
      const float* panel = a.panels + p * a.panel_stride;
      double sums[kRowUnit] = {};
      for (int64_t k = 0; k < a.k; ++k)
        for (int c = 0; c < kRowUnit; ++c) sums[c] += double{x[k]} * panel[k * kRowUnit + c];
      for (int c = 0; c < kRowUnit; ++c)
        a.out[i * a.out_stride + p * kRowUnit + c] = static_cast<float>(sums[c]);
    }
  }
}

void attend_tile(const AttendTile& t) {
  for (int64_t row = 0; row < t.n_rows; ++row) {
    double sums[kAttendMaxCols] = {};
    for (int64_t k = 0; k < t.k; ++k)
      for (int64_t col = 0; col < t.n_cols; ++col)
        sums[col] += double{t.keys[row * t.key_stride + k]} * t.queries[k * t.n_cols + col];
    for (int64_t col = 0; col < t.n_cols; ++col) {
      const bool seen = t.limits == nullptr || row < t.limits[col];
      t.scores[row * t.n_cols + col] = seen ? static_cast<float>(sums[col]) : kLowest;
    }
  }
  for (int64_t col = 0; col < t.n_cols; ++col) {
    float top = t.max[col];
    for (int64_t row = 0; row < t.n_rows; ++row) {
      const float score = t.scores[row * t.n_cols + col];
      if (!(score <= top)) top = score;  // a NaN comes through
    }
    const float base = top == kLowest ? 0.0f : top;
    double total = 0;
    for (int64_t row = 0; row < t.n_rows; ++row) {
      float& score = t.scores[row * t.n_cols + col];
      score = std::exp(score - base);
      total += score;
    }
    t.decay[col] = std::exp(t.max[col] - base);
    t.sum[col] = static_cast<float>(double{t.sum[col]} * t.decay[col] + total);
    t.max[col] = top;
  }
  for (int64_t col = 0; col < t.n_used; ++col)
    for (int64_t first = 0; first < t.n_values; first += kRowUnit) {
      float* out = t.out + col * t.out_stride + first;
      double sums[kRowUnit];
      for (int c = 0; c < kRowUnit; ++c) sums[c] = double{out[c]} * t.decay[col];
      for (int64_t row = 0; row < t.n_rows; ++row)
        for (int c = 0; c < kRowUnit; ++c)
          sums[c] +=
              double{t.scores[row * t.n_cols + col]} * t.values[row * t.value_stride + first + c];
      for (int c = 0; c < kRowUnit; ++c) out[c] = static_cast<float>(sums[c]);
    }
}

void merge(const MergeColumns& a) {
  for (int64_t col = 0; col < a.n_cols; ++col) {
    const float part_max = a.part_max[col];
    if (part_max == kLowest) continue;
    float* out = a.out + col * a.out_stride;
    const float* part = a.part_out + col * a.part_stride;
    if (a.max[col] == kLowest) {
      a.max[col] = part_max;
      a.sum[col] = a.part_sum[col];
      std::memcpy(out, part, static_cast<size_t>(a.n_values) * sizeof(float));
      continue;
    }
    const float top = std::max(a.max[col], part_max);
    const double keep = std::exp(a.max[col] - top), take = std::exp(part_max - top);
    a.sum[col] = static_cast<float>(a.sum[col] * keep + a.part_sum[col] * take);
    a.max[col] = top;
    for (int64_t i = 0; i < a.n_values; ++i)
      out[i] = static_cast<float>(out[i] * keep + part[i] * take);
  }
}

}  // namespace

const RowKernels& row_kernels_scalar() noexcept {
  static constexpr RowKernels kKernels = {.name = "scalar",
                                          .lanes = 1,
                                          .sum_squares = sum_squares,
                                          .scale = scale,
                                          .rotate = rotate,
                                          .pack_f16 = pack_f16,
                                          .decode = decode,
                                          .expand = expand,
                                          .attend_tile = attend_tile,
                                          .merge = merge};
  return kKernels;
}

}  // namespace fathom::cpu
