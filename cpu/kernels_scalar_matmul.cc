// Products with stored weights in plain loops: what every machine runs, and the oracle of the
// vector kernels.  Sums are kept in double.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/matmul_kernels.h"
#include "fathom/quant.hpp"
#include "fathom/tensor.hpp"

namespace fathom::cpu {
namespace {

float load_f16(const uint8_t* p) noexcept {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return f16_to_f32(bits);
}

// One weight of a packed block: value = scale * code - min.
struct PackedValue {
  float scale, min;
  int code;
};

// Code of (row, col % 32) in the nibbles of 32 columns.
int nibble(const uint8_t* codes, int row, int col) noexcept {
  const int quad = col / 4;
  const int pair = codes[64 * (quad % 4) + 4 * row + col % 4];
  return quad < 4 ? pair & 15 : pair >> 4;
}

PackedValue read_q8_0(const uint8_t* block, int row, int col) noexcept {
  const uint8_t code = block[PackedQ8_0::kCodes + 64 * (col / 4) + 4 * row + col % 4];
  return {load_f16(block + 2 * row), 0, static_cast<int8_t>(code)};
}

PackedValue read_q4_0(const uint8_t* block, int row, int col) noexcept {
  return {load_f16(block + 2 * row), 0, nibble(block + PackedQ4_0::kCodes, row, col) - 8};
}

// Bit col / 4 of the vector that holds single bits of 32 columns.
int single_bit(const uint8_t* bits, int row, int col) noexcept {
  return bits[4 * row + col % 4] >> (col / 4) & 1;
}
// The two bits of a column in the vectors that hold pairs of bits of 32 columns.
int bit_pair(const uint8_t* bits, int row, int col) noexcept {
  const int quad = col / 4;
  return bits[64 * (quad / 4) + 4 * row + col % 4] >> (2 * (quad % 4)) & 3;
}
// Scale `index` of the 16 n of six bits of all rows.
int six_bits(const uint8_t* low, const uint8_t* high, int n, int index) noexcept {
  return (low[index % (8 * n)] >> (4 * (index / (8 * n))) & 15) |
         (high[index % (4 * n)] >> (2 * (index / (4 * n))) & 3) << 4;
}
// The code of a column of 32; see PackedQ2_K.
int two_bits(const uint8_t* codes, int row, int col) noexcept {
  const int quad = col / 4;
  const int shift = 4 * (quad % 2) + 2 * (quad / 4);
  return codes[64 * (quad % 4 / 2) + 4 * row + col % 4] >> shift & 3;
}
// The same; see PackedQ3_K.
int three_bits(const uint8_t* codes, int row, int col) noexcept {
  const int quad = col / 4, last = quad / 4;
  const uint8_t* byte = codes + 4 * row + col % 4;
  if (quad % 4 < 3) return byte[64 * (quad % 4)] >> (3 * last) & 7;
  return byte[64 * last] >> 6 | (byte[128] >> (6 + last) & 1) << 2;
}

PackedValue read_q4_1(const uint8_t* block, int row, int col) noexcept {
  return {load_f16(block + 2 * row), -load_f16(block + PackedQ4_1::kMinFactors + 2 * row),
          nibble(block + PackedQ4_1::kCodes, row, col)};
}

PackedValue read_q5_0(const uint8_t* block, int row, int col) noexcept {
  const uint8_t* codes = block + PackedQ5_0::kCodes;
  const int code = nibble(codes, row, col) | single_bit(codes + PackedQ5_0::kHigh, row, col) << 4;
  return {load_f16(block + 2 * row), 0, code - 16};
}

PackedValue read_q5_1(const uint8_t* block, int row, int col) noexcept {
  const uint8_t* codes = block + PackedQ5_1::kCodes;
  return {load_f16(block + 2 * row), -load_f16(block + PackedQ5_1::kMinFactors + 2 * row),
          nibble(codes, row, col) | single_bit(codes + PackedQ5_1::kHigh, row, col) << 4};
}

PackedValue read_iq4_nl(const uint8_t* block, int row, int col) noexcept {
  return {load_f16(block + 2 * row), 0, kIQ4Values[nibble(block + PackedIQ4_NL::kCodes, row, col)]};
}

PackedValue read_iq4_xs(const uint8_t* block, int row, int col) noexcept {
  const int sub = col / 32;
  const int scale = six_bits(block + PackedIQ4_XS::kScales, block + PackedIQ4_XS::kHighScales, 8,
                             16 * sub + row) -
                    32;
  const uint8_t* codes = block + PackedIQ4_XS::kCodes + PackedIQ4_XS::kSubBytes * sub;
  return {load_f16(block + 2 * row) * static_cast<float>(scale), 0,
          kIQ4Values[nibble(codes, row, col % 32)]};
}

PackedValue read_q2_k(const uint8_t* block, int row, int col) noexcept {
  const int scales = block[PackedQ2_K::kScales + 32 * (col / 32) + 2 * row + col / 16 % 2];
  const uint8_t* codes = block + PackedQ2_K::kCodes + PackedQ2_K::kSubBytes * (col / 32);
  return {load_f16(block + 2 * row) * static_cast<float>(scales & 15),
          load_f16(block + PackedQ2_K::kMinFactors + 2 * row) * static_cast<float>(scales >> 4),
          two_bits(codes, row, col % 32)};
}

PackedValue read_q3_k(const uint8_t* block, int row, int col) noexcept {
  const int scale = six_bits(block + PackedQ3_K::kScales, block + PackedQ3_K::kHighScales, 16,
                             32 * (col / 32) + 2 * row + col / 16 % 2) -
                    32;
  const uint8_t* codes = block + PackedQ3_K::kCodes + PackedQ3_K::kSubBytes * (col / 32);
  return {load_f16(block + 2 * row) * static_cast<float>(scale), 0,
          three_bits(codes, row, col % 32) - 4};
}

// What Q4_K and Q5_K share: all but the fifth bit.
template <class Type>
PackedValue read_k(const uint8_t* block, int row, int col) noexcept {
  const int sub = col / 32;
  const float scale = block[Type::kScales + 16 * sub + row];
  const float min = block[Type::kMins + 16 * sub + row];
  return {load_f16(block + 2 * row) * scale, load_f16(block + Type::kMinFactors + 2 * row) * min,
          nibble(block + Type::kCodes + Type::kSubBytes * sub, row, col % 32)};
}

PackedValue read_q4_k(const uint8_t* block, int row, int col) noexcept {
  return read_k<PackedQ4_K>(block, row, col);
}

PackedValue read_q5_k(const uint8_t* block, int row, int col) noexcept {
  PackedValue value = read_k<PackedQ5_K>(block, row, col);
  const uint8_t* codes = block + PackedQ5_K::kCodes + PackedQ5_K::kSubBytes * (col / 32);
  value.code |= single_bit(codes + PackedQ5_K::kHigh, row, col % 32) << 4;
  return value;
}

PackedValue read_q6_k(const uint8_t* block, int row, int col) noexcept {
  const auto scale = static_cast<int8_t>(block[PackedQ6_K::kScales + 16 * (col / 16) + row]);
  const uint8_t* codes = block + PackedQ6_K::kCodes + PackedQ6_K::kSubBytes * (col / 32);
  const int high = bit_pair(codes + PackedQ6_K::kHigh, row, col % 32);
  return {load_f16(block + 2 * row) * static_cast<float>(scale), 0,
          (nibble(codes, row, col % 32) | high << 4) - 32};
}

using ReadPacked = PackedValue (*)(const uint8_t* block, int row, int col) noexcept;

template <class Type, ReadPacked kRead>
void int8_product(const Int8Product& p) {
  constexpr int kCols = Type::kBlock.cols;
  for (int64_t c = 0; c < p.n_cols; ++c) {
    const uint8_t* group = p.weights + c / kGroupRows * p.n_blocks * Type::kBlock.bytes;
    const int row = static_cast<int>(c % kGroupRows);
    for (int64_t i = 0; i < p.n_rows; ++i) {
      const XBlock* x = p.x + (p.rows ? p.rows[i] : i) * p.x_stride;
      double sum = 0;
      for (int64_t col = 0; col < p.n_blocks * kCols; col += 16) {  // one scale per 16 columns
        const uint8_t* block = group + col / kCols * Type::kBlock.bytes;
        const XBlock& xb = x[col / 32];
        int dot = 0, x_sum = 0;
        PackedValue value{};
        for (int k = 0; k < 16; ++k) {
          value = kRead(block, row, static_cast<int>(col % kCols) + k);
          const int8_t q = xb.q[col % 32 + k];
          dot += value.code * q;
          x_sum += q;
        }
        sum += xb.scale *
               (static_cast<double>(value.scale) * dot - static_cast<double>(value.min) * x_sum);
      }
      float& out = p.out[i * p.out_stride + c];
      out = p.add ? out + static_cast<float>(sum) : static_cast<float>(sum);
    }
  }
}

template <class Type, ReadPacked kRead>
void unpack(const uint8_t* group, int64_t col0, int64_t n_cols, float* panel) {
  for (int64_t k = 0; k < n_cols; ++k) {
    const int64_t col = col0 + k;
    const uint8_t* block = group + col / Type::kBlock.cols * Type::kBlock.bytes;
    for (int row = 0; row < kGroupRows; ++row) {
      const PackedValue v = kRead(block, row, static_cast<int>(col % Type::kBlock.cols));
      panel[k * kGroupRows + row] = v.scale * static_cast<float>(v.code) - v.min;
    }
  }
}

void quantize(const float* x, int64_t n, XBlock* out) {
  for (int64_t b = 0; b < n / 32; ++b, x += 32) {
    float max = 0, probe = 0;
    for (int i = 0; i < 32; ++i) {
      if (std::fabs(x[i]) > max) max = std::fabs(x[i]);
      probe += x[i] * 0.0f;  // NaN if any value is not finite
    }
    XBlock& block = out[b];
    block.scale = max / 127.0f + probe;
    // Below 2^-120 the inverse would overflow; such values count as zero.
    const float inverse = max > 0x1p-120f ? 127.0f / max : 0.0f;
    int sum[2] = {0, 0};
    for (int i = 0; i < 32; ++i) {
      const float scaled = x[i] * inverse;
      block.q[i] = std::isfinite(scaled) ? static_cast<int8_t>(std::nearbyintf(scaled)) : int8_t{0};
      sum[i / 16] += block.q[i];
    }
    block.scaled_sum = block.scale * static_cast<float>(sum[0] + sum[1]);
    block.bias = -128 * (sum[0] + sum[1]);
    block.sums[0] = static_cast<int16_t>(sum[0]);
    block.sums[1] = static_cast<int16_t>(sum[1]);
  }
}

float read_f32(const uint8_t* p, int64_t i) noexcept {
  float v;
  std::memcpy(&v, p + 4 * i, sizeof v);
  return v;
}
float read_f16(const uint8_t* p, int64_t i) noexcept {
  return load_f16(p + 2 * i);
}
float read_bf16(const uint8_t* p, int64_t i) noexcept {
  uint16_t bits;
  std::memcpy(&bits, p + 2 * i, sizeof bits);
  return bf16_to_f32(bits);
}
float read_f8(const uint8_t* p, int64_t i) noexcept {
  return e4m3_to_f32(p[i]);
}

using ReadPlain = float (*)(const uint8_t* p, int64_t i) noexcept;

template <ReadPlain kRead>
void widen(const void* weights, int64_t n, float scale, float* out) {
  const auto* w = static_cast<const uint8_t*>(weights);
  for (int64_t i = 0; i < n; ++i) out[i] = kRead(w, i) * scale;
}

// out (+)= the sums of term(row of weights, column, its scale, activation).
template <class Term>
void sum_terms(const PlainDot& p, Term&& term) {
  for (int64_t c = 0; c < p.n_outputs; ++c) {
    const auto* w = static_cast<const uint8_t*>(p.weights) + c * p.weight_bytes;
    for (int64_t i = 0; i < p.n_rows; ++i) {
      const float* x = p.x + (p.rows ? p.rows[i] : i) * p.x_stride;
      double sum = 0;
      for (int64_t k = 0; k < p.n; ++k)
        sum += term(w, k, p.scales == nullptr ? 1.0f : p.scales[k / kScaleColumns], x[k]);
      float& out = p.out[i * p.out_stride + c];
      out = p.add ? out + static_cast<float>(sum) : static_cast<float>(sum);
    }
  }
}

template <ReadPlain kRead>
void plain_dot(const PlainDot& p) {
  sum_terms(p, [](const uint8_t* w, int64_t k, float scale, float x) {
    return static_cast<double>(kRead(w, k)) * scale * x;
  });
}

void f8_pair_dot(const PlainDot& p) {
  sum_terms(p, [](const uint8_t* w, int64_t k, float scale, float x) {
    return static_cast<double>(read_f8(w, k)) * bf16_to_f32(f32_to_bf16(x * scale));
  });
}

void transpose16(const float* rows, int64_t row_stride, int64_t n, float* panel) {
  for (int64_t k = 0; k < n; ++k)
    for (int r = 0; r < kGroupRows; ++r) panel[k * kGroupRows + r] = rows[r * row_stride + k];
}

void untranspose16(const float* panel, int64_t n, float* rows, int64_t row_stride) {
  for (int64_t k = 0; k < n; ++k)
    for (int r = 0; r < kGroupRows; ++r) rows[r * row_stride + k] = panel[k * kGroupRows + r];
}

void panel_product(const PanelProduct& p) {
  for (int64_t i = 0; i < p.n_rows; ++i) {
    const float* x = p.x + (p.rows ? p.rows[i] : i) * p.x_stride;
    double sum[kGroupRows] = {};
    for (int64_t k = 0; k < p.k; ++k) {
      const double value = x[k];
      for (int c = 0; c < kGroupRows; ++c) sum[c] += value * p.panel[k * p.panel_stride + c];
    }
    float* out = p.out + i * p.out_stride;
    for (int c = 0; c < p.n_cols; ++c)
      out[c] = static_cast<float>(p.add ? out[c] + sum[c] : sum[c]);
  }
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void to_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_to_bf16(x[i]);
}

void add_scaled(float a, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

}  // namespace

const F8PairKernels& f8_pair_kernels_scalar() noexcept {
  static constexpr F8PairKernels kTable = {.name = "scalar", .dot = f8_pair_dot};
  return kTable;
}

const MatmulKernels& matmul_kernels_scalar() noexcept {
  static constexpr MatmulKernels kTable = {
      .name = "scalar",
      .int8_max_rows = INT64_MAX,
      .panel_rows = 1,
      .quantize = quantize,
      .int8_product = {int8_product<PackedQ8_0, read_q8_0>, int8_product<PackedQ4_0, read_q4_0>,
                       int8_product<PackedQ4_1, read_q4_1>, int8_product<PackedQ5_0, read_q5_0>,
                       int8_product<PackedQ5_1, read_q5_1>, int8_product<PackedIQ4_NL, read_iq4_nl>,
                       int8_product<PackedQ2_K, read_q2_k>, int8_product<PackedQ3_K, read_q3_k>,
                       int8_product<PackedQ4_K, read_q4_k>, int8_product<PackedQ5_K, read_q5_k>,
                       int8_product<PackedQ6_K, read_q6_k>,
                       int8_product<PackedIQ4_XS, read_iq4_xs>},
      .unpack = {unpack<PackedQ8_0, read_q8_0>, unpack<PackedQ4_0, read_q4_0>,
                 unpack<PackedQ4_1, read_q4_1>, unpack<PackedQ5_0, read_q5_0>,
                 unpack<PackedQ5_1, read_q5_1>, unpack<PackedIQ4_NL, read_iq4_nl>,
                 unpack<PackedQ2_K, read_q2_k>, unpack<PackedQ3_K, read_q3_k>,
                 unpack<PackedQ4_K, read_q4_k>, unpack<PackedQ5_K, read_q5_k>,
                 unpack<PackedQ6_K, read_q6_k>, unpack<PackedIQ4_XS, read_iq4_xs>},
      .widen = {widen<read_f32>, widen<read_f16>, widen<read_bf16>, widen<read_f8>},
      .plain_dot = {plain_dot<read_f32>, plain_dot<read_f16>, plain_dot<read_bf16>,
                    plain_dot<read_f8>},
      .transpose16 = transpose16,
      .untranspose16 = untranspose16,
      .panel_product = panel_product,
      .swiglu = swiglu,
      .to_bf16 = to_bf16,
      .add_scaled = add_scaled,
  };
  return kTable;
}

}  // namespace fathom::cpu
