// Weights of every type, eight neighbouring values at a time (formulas: fathom/quant.hpp).
#pragma once

#include "cuda/numbers.cuh"
#include "fathom/quant.hpp"

namespace fathom::cuda {

// A row of a matrix in its two planes; scales: those of its block row, or null.
struct WeightRow {
  const uint8_t* codes;
  const uint8_t* meta;
  const float* scales;
};

__device__ inline WeightRow weight_row(const WeightView& w, int64_t matrix, int64_t row) {
  const uint8_t* data = w.data + matrix * w.matrix_bytes;
  const auto* scales = reinterpret_cast<const float*>(data + w.scales_at);
  return {data + row * w.code_stride, data + w.meta_at + row * w.meta_stride,
          w.block_scaled
              ? scales + row / kF8ScaleBlock * ((w.cols + kF8ScaleBlock - 1) / kF8ScaleBlock)
              : nullptr};
}

struct Bytes8 {
  uint32_t word[2];
  __device__ int operator[](int i) const { return int(word[i >> 2] >> (8 * (i & 3)) & 255); }
};
__device__ inline Bytes8 load_bytes8(const uint8_t* p) {  // aligned to 8
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return {{v.x, v.y}};
}

// Tables of 16 signed bytes, packed so that device code needs no array in memory.
constexpr uint64_t pack_table(const int8_t* table, int first) {
  uint64_t packed = 0;
  for (int i = 0; i < 8; ++i) packed |= uint64_t(uint8_t(table[first + i])) << (8 * i);
  return packed;
}
template <uint64_t kLow, uint64_t kHigh>
__device__ inline int table_value(int i) {
  return int8_t((i & 8 ? kHigh : kLow) >> (8 * (i & 7)));
}
__device__ inline int iq4_value(int code) {
  return table_value<pack_table(kIQ4Values, 0), pack_table(kIQ4Values, 8)>(code);
}
__device__ inline int mxfp4_value(int code) {
  return table_value<pack_table(kMXFP4Values, 0), pack_table(kMXFP4Values, 8)>(code);
}

// The codes of group `group` where a block of 32 keeps values j and j + 16 in byte j.
struct Nibbles8 {
  Bytes8 bytes;
  int shift;
  __device__ int operator[](int i) const { return bytes[i] >> shift & 15; }
};
__device__ inline Nibbles8 nibbles32(const uint8_t* codes, int group) {
  return {load_bytes8(codes + group / 4 * 16 + group % 2 * 8), group % 4 / 2 * 4};
}

struct ScaleMin {
  int scale, min;
};
// Pair j of the eight packed 6-bit pairs of Q4_K and Q5_K.
__device__ inline ScaleMin scale_min(const uint8_t* packed, int j) {
  if (j < 4) return {packed[j] & 63, packed[4 + j] & 63};
  return {(packed[4 + j] & 15) | (packed[j - 4] >> 6 << 4),
          (packed[4 + j] >> 4) | (packed[j] >> 6 << 4)};
}

// v[i] = value 8 * group + i of the row.
template <DType kType>
__device__ inline void dequantize8(const WeightRow& row, int group, float (&v)[8]) {
  if constexpr (kType == DType::kF32) {
    const auto* p = reinterpret_cast<const float4*>(row.codes) + 2 * group;
    const float4 a = p[0], b = p[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else if constexpr (kType == DType::kF16 || kType == DType::kBF16) {
    const uint4 p = reinterpret_cast<const uint4*>(row.codes)[group];
    const uint32_t words[4] = {p.x, p.y, p.z, p.w};
    for (int i = 0; i < 8; ++i) {
      const auto bits = uint16_t(words[i / 2] >> (16 * (i & 1)));
      v[i] = kType == DType::kF16 ? f16_value(bits) : bf16_value(bits);
    }
  } else if constexpr (kType == DType::kF8E4M3) {
    const Bytes8 codes = load_bytes8(row.codes + 8 * group);
    const float d = row.scales != nullptr ? row.scales[group / (kF8ScaleBlock / 8)] : 1.0f;
    e4m3_values8(codes.word, v);
    for (int i = 0; i < 8; ++i) v[i] *= d;
  } else if constexpr (kType == DType::kQ8_0) {
    const Bytes8 codes = load_bytes8(row.codes + 8 * group);
    const float d = load_f16(row.meta + 2 * (group / 4));
    for (int i = 0; i < 8; ++i) v[i] = d * float(int8_t(codes[i]));
  } else if constexpr (kType == DType::kQ4_0) {
    const Nibbles8 codes = nibbles32(row.codes, group);
    const float d = load_f16(row.meta + 2 * (group / 4));
    for (int i = 0; i < 8; ++i) v[i] = d * float(codes[i] - 8);
  } else if constexpr (kType == DType::kQ4_1) {
    const Nibbles8 codes = nibbles32(row.codes, group);
    const uint8_t* meta = row.meta + 4 * (group / 4);
    const float d = load_f16(meta), m = load_f16(meta + 2);
    for (int i = 0; i < 8; ++i) v[i] = d * float(codes[i]) + m;
  } else if constexpr (kType == DType::kQ5_0 || kType == DType::kQ5_1) {
    constexpr bool kOne = kType == DType::kQ5_1;
    const Nibbles8 codes = nibbles32(row.codes, group);
    const uint8_t* meta = row.meta + (kOne ? 8 : 6) * (group / 4);
    const uint8_t* high = meta + (kOne ? 4 : 2) + group % 4;  // a byte has the fifth bits of eight
    const float d = load_f16(meta), m = kOne ? load_f16(meta + 2) : 0.0f;
    for (int i = 0; i < 8; ++i) {
      const int code = codes[i] | (*high >> i & 1) << 4;
      v[i] = kOne ? d * float(code) + m : d * float(code - 16);
    }
  } else if constexpr (kType == DType::kIQ4_NL) {
    const Nibbles8 codes = nibbles32(row.codes, group);
    const float d = load_f16(row.meta + 2 * (group / 4));
    for (int i = 0; i < 8; ++i) v[i] = d * float(iq4_value(codes[i]));
  } else if constexpr (kType == DType::kMXFP4) {
    const Nibbles8 codes = nibbles32(row.codes, group);
    const uint32_t e = row.meta[group / 4];
    const float d = float_of_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    for (int i = 0; i < 8; ++i) v[i] = d * float(mxfp4_value(codes[i]));
  } else if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
    constexpr bool kFive = kType == DType::kQ5_K;
    const int block = group / 32, g = group % 32, j = g / 4, k = g % 4 * 8;
    const uint8_t* codes = row.codes + block * (kFive ? 160 : 128);
    const uint8_t* meta = row.meta + block * 16;
    const ScaleMin sm = scale_min(meta + 4, j);
    const float d = load_f16(meta) * float(sm.scale), m = load_f16(meta + 2) * float(sm.min);
    const Nibbles8 low{load_bytes8(codes + (kFive ? 32 : 0) + j / 2 * 32 + k), j % 2 * 4};
    Bytes8 high{};
    if constexpr (kFive) high = load_bytes8(codes + k);
    for (int i = 0; i < 8; ++i) v[i] = d * float(low[i] | (high[i] >> j & 1) << 4) - m;
  } else if constexpr (kType == DType::kQ6_K) {
    const int block = group / 32, g = group % 32, half = g / 16, quarter = g % 16 / 4,
              k = g % 4 * 8;
    const uint8_t* codes = row.codes + block * 192;
    const uint8_t* meta = row.meta + block * 18;
    const float d = load_f16(meta + 16) * float(int8_t(meta[g / 2]));
    const Nibbles8 low{load_bytes8(codes + 64 * half + quarter % 2 * 32 + k), quarter / 2 * 4};
    const Bytes8 high = load_bytes8(codes + 128 + 32 * half + k);
    for (int i = 0; i < 8; ++i)
      v[i] = d * float((low[i] | (high[i] >> (2 * quarter) & 3) << 4) - 32);
  } else if constexpr (kType == DType::kQ2_K) {
    const int block = group / 32, g = group % 32, j = g / 2;
    const uint8_t* meta = row.meta + block * 20;
    const float d = load_f16(meta + 16) * float(meta[j] & 15);
    const float m = load_f16(meta + 18) * float(meta[j] >> 4);
    const Bytes8 codes = load_bytes8(row.codes + block * 64 + j / 8 * 32 + j % 2 * 16 + g % 2 * 8);
    for (int i = 0; i < 8; ++i) v[i] = d * float(codes[i] >> (j % 8 / 2 * 2) & 3) - m;
  } else if constexpr (kType == DType::kQ3_K) {
    const int block = group / 32, g = group % 32, j = g / 2, k = j % 2 * 16 + g % 2 * 8;
    const uint8_t* meta = row.meta + block * 14;
    const int low = meta[j % 8] >> (j / 8 * 4) & 15, high = meta[8 + j % 4] >> (j / 4 * 2) & 3;
    const float d = load_f16(meta + 12) * float((low | high << 4) - 32);
    const uint8_t* codes = row.codes + block * 96;
    const Bytes8 mask = load_bytes8(codes + k);
    const Bytes8 two = load_bytes8(codes + 32 + j / 8 * 32 + k);
    for (int i = 0; i < 8; ++i)
      v[i] = d * float((two[i] >> (j % 8 / 2 * 2) & 3) + (mask[i] >> (j / 2) & 1) * 4 - 4);
  } else if constexpr (kType == DType::kIQ4_XS) {
    const int block = group / 32, g = group % 32, j = g / 4;
    const uint8_t* meta = row.meta + block * 8;
    const int scale = (meta[4 + j / 2] >> (j % 2 * 4) & 15) | (load16(meta + 2) >> (2 * j) & 3)
                                                                  << 4;
    const float d = load_f16(meta) * float(scale - 32);
    const Nibbles8 codes = nibbles32(row.codes + block * 128, g);
    for (int i = 0; i < 8; ++i) v[i] = d * float(iq4_value(codes[i]));
  }
}

// The types that have kernels; block_shape() in weights.cc has the same.
// clang-format off
#define FATHOM_CUDA_WEIGHT_TYPES(X)                                                             \
  X(kF32)                                                                                       \
  X(kF16) X(kBF16) X(kF8E4M3) X(kQ4_0) X(kQ4_1) X(kQ5_0) X(kQ5_1) X(kQ8_0) X(kIQ4_NL) X(kMXFP4) \
      X(kQ2_K) X(kQ3_K) X(kQ4_K) X(kQ5_K) X(kQ6_K) X(kIQ4_XS)
// clang-format on

// The type chosen at run time; the same for all threads, so the branches cost little.
__device__ inline void dequantize8(DType type, const WeightRow& row, int group, float (&v)[8]) {
  switch (type) {
#define FATHOM_CASE(name) \
  case DType::name:       \
    return dequantize8<DType::name>(row, group, v);
    FATHOM_CUDA_WEIGHT_TYPES(FATHOM_CASE)
#undef FATHOM_CASE
    default:
      return;
  }
}

}  // namespace fathom::cuda
