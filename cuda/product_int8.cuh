// Products for few rows, rounded: rows of x as signed bytes with a scale for each 16 values, codes
// of the weights as bytes, four products and their sum in one instruction (dp4a).
//
//   sum_c w[c] x[c]  =  sum over segments of 16:  scale * d * sum(code * q)  -  min * d * sum(q)
//
// with w = scale * code - min and x = d * q.  Eight values cost two instructions for the products
// and a few to unpack; converting each weight and multiplying in f32 costs some twenty, which no
// longer hides behind the memory of the newest GPUs.
//
// A warp takes four rows of weights (of pairs, two and two); a lane takes units of 32 values whose
// codes lie together: two segments, which in files are not always neighbours.
#pragma once

#include "cuda/product_groups.cuh"

namespace fathom::cuda {

inline constexpr int kSegment = 16;

__device__ inline int dot4(uint32_t a, uint32_t b, int sum) {
  return __dp4a(int(a), int(b), sum);
}

struct Unit {
  uint32_t codes[2][4];  // 16 bytes of each segment, in order
  float scale[2], min[2];
};

__device__ inline uint4 load_words(const uint8_t* p) {  // aligned to 16
  return *reinterpret_cast<const uint4*>(p);
}
// The low or the high nibbles of 16 bytes.
__device__ inline void nibbles(const uint4& v, int shift, uint32_t (&codes)[4]) {
  codes[0] = v.x >> shift & 0x0f0f0f0fu;
  codes[1] = v.y >> shift & 0x0f0f0f0fu;
  codes[2] = v.z >> shift & 0x0f0f0f0fu;
  codes[3] = v.w >> shift & 0x0f0f0f0fu;
}
// Bit i of `bits` goes to bit `to` of byte i; four bits.
__device__ inline uint32_t spread(uint32_t bits, int to) {
  return ((bits & 15) * 0x00204081u & 0x01010101u) << to;
}

// Four nibbles of four bytes each as the signed bytes of a table of 16.
template <uint64_t kLow, uint64_t kHigh>
__device__ inline uint32_t table4(uint32_t codes) {
  // The selector of a byte permutation is four nibbles: bring those of four bytes together.
  const uint32_t low3 = codes & 0x07070707u;
  const uint32_t selector =
      (low3 & 7) | (low3 >> 4 & 0x70) | (low3 >> 8 & 0x700) | (low3 >> 12 & 0x7000);
  const uint32_t low = __byte_perm(uint32_t(kLow), uint32_t(kLow >> 32), selector);
  const uint32_t high = __byte_perm(uint32_t(kHigh), uint32_t(kHigh >> 32), selector);
  const uint32_t is_high = (codes >> 3 & 0x01010101u) * 0xffu;  // all bits of the bytes of 8 .. 15
  return (low & ~is_high) | (high & is_high);
}
__device__ inline void iq4_codes(uint32_t (&codes)[4]) {
  for (int i = 0; i < 4; ++i)
    codes[i] = table4<pack_table(kIQ4Values, 0), pack_table(kIQ4Values, 8)>(codes[i]);
}

template <DType kType>
inline constexpr bool kIsSuper =
    kType == DType::kQ4_K || kType == DType::kQ5_K || kType == DType::kQ6_K;

// Segment `which` of a unit, counted over the row.
template <DType kType>
__device__ inline int segment_of(int unit, int which) {
  if constexpr (kIsSuper<kType>) {
    const int block = unit / 8, u = unit % 8, half = u % 2;
    if constexpr (kType == DType::kQ6_K)  // quarters 0 and 2, or 1 and 3, of 128 values
      return block * 16 + u / 4 * 8 + u % 4 / 2 * 2 + half + which * 4;
    return block * 16 + u / 2 * 4 + half + which * 2;
  }
  return 2 * unit + which;
}

// Pair j of the packed 6-bit pairs of Q4_K and Q5_K, from three words.
__device__ inline ScaleMin scale_min_of(const uint4& meta, int j) {
  const int shift = 8 * (j & 3);
  const uint32_t a = meta.y >> shift, b = meta.z >> shift, c = meta.w >> shift;
  if (j < 4) return {int(a & 63), int(b & 63)};
  return {int((c & 15) | (a >> 6 & 3) << 4), int((c >> 4 & 15) | (b >> 6 & 3) << 4)};
}

template <DType kType>
__device__ inline void load_unit(const WeightRow& row, int unit, Unit& u) {
  if constexpr (kType == DType::kQ8_0) {
    const float d = load_f16(row.meta + 2 * unit);
    const uint4 a = load_words(row.codes + 32 * unit), b = load_words(row.codes + 32 * unit + 16);
    u.codes[0][0] = a.x, u.codes[0][1] = a.y, u.codes[0][2] = a.z, u.codes[0][3] = a.w;
    u.codes[1][0] = b.x, u.codes[1][1] = b.y, u.codes[1][2] = b.z, u.codes[1][3] = b.w;
    u.scale[0] = u.scale[1] = d;
    u.min[0] = u.min[1] = 0;
  } else if constexpr (kType == DType::kQ4_0 || kType == DType::kQ4_1 || kType == DType::kQ5_0 ||
                       kType == DType::kQ5_1 || kType == DType::kIQ4_NL) {
    constexpr bool kFive = kType == DType::kQ5_0 || kType == DType::kQ5_1;
    constexpr bool kOne = kType == DType::kQ4_1 || kType == DType::kQ5_1;
    const uint8_t* meta = row.meta + unit * ((kOne ? 4 : 2) + (kFive ? 4 : 0));
    const uint4 v = load_words(row.codes + 16 * unit);
    nibbles(v, 0, u.codes[0]);
    nibbles(v, 4, u.codes[1]);
    if constexpr (kFive) {
      const uint8_t* high = meta + (kOne ? 4 : 2);
      const uint32_t bits = load16(high) | uint32_t(load16(high + 2)) << 16;
      for (int i = 0; i < 4; ++i) {
        u.codes[0][i] |= spread(bits >> (4 * i), 4);
        u.codes[1][i] |= spread(bits >> (16 + 4 * i), 4);
      }
    }
    if constexpr (kType == DType::kIQ4_NL) {
      iq4_codes(u.codes[0]);
      iq4_codes(u.codes[1]);
    }
    const float d = load_f16(meta);
    u.scale[0] = u.scale[1] = d;
    u.min[0] = u.min[1] = kType == DType::kQ4_0   ? 8 * d
                          : kType == DType::kQ5_0 ? 16 * d
                          : kOne                  ? -load_f16(meta + 2)
                                                  : 0.0f;
  } else if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K) {
    constexpr bool kFive = kType == DType::kQ5_K;
    const int block = unit / 8, pair = unit % 8 / 2, half = unit % 2;
    const uint8_t* codes = row.codes + block * (kFive ? 160 : 128);
    const uint4 v = load_words(codes + (kFive ? 32 : 0) + pair * 32 + half * 16);
    nibbles(v, 0, u.codes[0]);
    nibbles(v, 4, u.codes[1]);
    if constexpr (kFive) {
      const uint4 high = load_words(codes + half * 16);
      const uint32_t words[4] = {high.x, high.y, high.z, high.w};
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = words[i] >> (2 * pair);
        u.codes[0][i] |= (bits & 0x01010101u) << 4;
        u.codes[1][i] |= (bits >> 1 & 0x01010101u) << 4;
      }
    }
    const uint4 meta = load_words(row.meta + block * 16);
    const float d = f16_value(uint16_t(meta.x)), m = f16_value(uint16_t(meta.x >> 16));
    for (int s = 0; s < 2; ++s) {
      const ScaleMin sm = scale_min_of(meta, 2 * pair + s);
      u.scale[s] = d * float(sm.scale);
      u.min[s] = m * float(sm.min);
    }
  } else if constexpr (kType == DType::kQ6_K) {
    const int block = unit / 8, n = unit % 8, part = n / 4, odd = n % 4 / 2, half = n % 2;
    const uint8_t* codes = row.codes + block * 192;
    const uint8_t* meta = row.meta + block * 18;
    const uint4 v = load_words(codes + 64 * part + odd * 32 + half * 16);
    const uint4 high = load_words(codes + 128 + 32 * part + half * 16);
    const uint32_t words[4] = {high.x, high.y, high.z, high.w};
    nibbles(v, 0, u.codes[0]);
    nibbles(v, 4, u.codes[1]);
    for (int i = 0; i < 4; ++i) {
      u.codes[0][i] |= (words[i] >> (2 * odd) & 0x03030303u) << 4;
      u.codes[1][i] |= (words[i] >> (2 * odd + 4) & 0x03030303u) << 4;
    }
    const float d = load_f16(meta + 16);
    for (int s = 0; s < 2; ++s) {
      u.scale[s] = d * float(int8_t(meta[8 * part + 2 * (odd + 2 * s) + half]));
      u.min[s] = 32 * u.scale[s];
    }
  } else if constexpr (kType == DType::kIQ4_XS) {
    const int block = unit / 8, j = unit % 8;
    const uint8_t* meta = row.meta + block * 8;
    const uint4 v = load_words(row.codes + 16 * unit);
    nibbles(v, 0, u.codes[0]);
    nibbles(v, 4, u.codes[1]);
    iq4_codes(u.codes[0]);
    iq4_codes(u.codes[1]);
    const int scale = (meta[4 + j / 2] >> (j % 2 * 4) & 15) | (load16(meta + 2) >> (2 * j) & 3)
                                                                  << 4;
    u.scale[0] = u.scale[1] = load_f16(meta) * float(scale - 32);
    u.min[0] = u.min[1] = 0;
  }
}

struct Int8Args {
  ProductParams p;
  Int8Rows x;
};

// kRows rows of x at a time; the sums of a row do not depend on how many.
template <DType kType, int kRows>
__global__ void product_int8_kernel(Int8Args args) {
  const ProductParams& p = args.p;
  const int lane = int(threadIdx.x % 32);
  const int64_t warp = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const GroupRows group = group_rows(p);
  const bool pairs = p.up.data != nullptr;
  const int64_t first_row = warp * (pairs ? kSlots / 2 : kSlots);
  if (first_row >= p.w.rows || group.n_rows == 0) return;

  WeightRow slots[kSlots];
  for (int s = 0; s < kSlots; ++s) {  // beyond the last row: the last again, never written
    const int64_t row = first_row + (pairs ? s % 2 : s);
    slots[s] =
        weight_row(pairs && s >= 2 ? p.up : p.w, group.matrix, row < p.w.rows ? row : p.w.rows - 1);
  }
  const auto n_units = int(p.w.cols / (2 * kSegment));
  const int64_t n_segments = p.w.cols / kSegment;
  for (int64_t t = 0; t < group.n_rows; t += kRows) {
    const int64_t left = group.n_rows - t;
    int64_t x_row[kRows];
    for (int n = 0; n < kRows; ++n) {
      const int64_t sorted = group.first + t + (n < left ? n : 0);
      x_row[n] = p.groups.tokens != nullptr ? p.groups.tokens[sorted] : sorted;
    }
    float sum[kRows][kSlots] = {};
    for (int unit = lane; unit < n_units; unit += 32) {
      Unit w[kSlots];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) load_unit<kType>(slots[s], unit, w[s]);
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        if (n >= left) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int segment = segment_of<kType>(unit, half);
          const uint4 q = load_words(args.x.codes + x_row[n] * p.w.cols + segment * kSegment);
          const Int8Scale scale = args.x.scales[x_row[n] * n_segments + segment];
#pragma unroll
          for (int s = 0; s < kSlots; ++s) {
            const uint32_t(&c)[4] = w[s].codes[half];
            const int dot = dot4(c[3], q.w, dot4(c[2], q.z, dot4(c[1], q.y, dot4(c[0], q.x, 0))));
            sum[n][s] += w[s].scale[half] * (scale.d * float(dot)) - w[s].min[half] * scale.sum;
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n)
      if (n < left) store_sums(p, group, t + n, first_row, sum[n]);
  }
}

template <DType kType>
int launch_product_int8(Stream stream, const ProductParams& p, const Int8Rows& x) {
  constexpr unsigned kThreads = 128;
  const int64_t rows_per_block = (p.up.data != nullptr ? 2 : 4) * (kThreads / 32);
  const dim3 grid{static_cast<unsigned>((p.w.rows + rows_per_block - 1) / rows_per_block),
                  static_cast<unsigned>(group_count(p)), 1};
  const auto kernel = p.n_rows == 1 || (p.groups.active != nullptr && p.n_rows <= p.w.count / 4)
                          ? product_int8_kernel<kType, 1>
                          : product_int8_kernel<kType, 8>;
  return launch(kernel, grid, kThreads, 0, stream, Int8Args{p, x});
}

int product_int8_blocks(Stream, const ProductParams&, const Int8Rows&);
int product_int8_super(Stream, const ProductParams&, const Int8Rows&);

}  // namespace fathom::cuda
