// Rows of the cache where they lie, in the type of their page (formats: fathom/kv_page.hpp).
#pragma once

#include "cuda/numbers.cuh"
#include "fathom/quant.hpp"

namespace fathom::cuda {

struct KvRow {
  uint8_t* latent;
  uint8_t* rope;
  KvType type;
};

// Of the text whose segments are [first, end).
__device__ inline KvRow kv_row(const KvTable& v, int first, int end, int64_t row) {
  const auto page = int32_t(row / v.page_tokens);
  int s = first;
  while (s + 1 < end && page >= v.segments[s + 1].first_page) ++s;
  const KvSegment& segment = v.segments[s];
  const int64_t in_page = row % v.page_tokens;
  uint8_t* slot = segment.latent + (page - segment.first_page) * segment.page_stride;
  return {slot + in_page * segment.latent_bytes,
          slot + segment.rope_at + in_page * segment.rope_bytes, segment.type};
}
__device__ inline KvRow kv_row(const KvView& v, int64_t row) {
  return kv_row(v, 0, v.n_segments, row);
}
__device__ inline KvRow kv_row(const PartialParams& p, const AttendPiece& piece, int64_t row) {
  return kv_row(p.rows, piece.first_segment, piece.end_segment, row);
}

// All pages of rows [first, end) of the piece are f16.
__device__ inline bool is_f16_split(const KvTable& v, const AttendPiece& piece, int64_t first,
                                    int64_t end) {
  const auto first_page = int32_t(first / v.page_tokens),
             last_page = int32_t((end - 1) / v.page_tokens);
  for (int s = piece.first_segment; s < piece.end_segment; ++s) {
    const KvSegment& segment = v.segments[s];
    const bool covers =
        segment.first_page <= last_page && segment.first_page + segment.n_pages > first_page;
    if (covers && segment.type != KvType::kF16) return false;
  }
  return true;
}

// The piece of a block of attention, blockIdx.x counting the splits of all.
__device__ inline AttendPiece block_piece(const PartialParams& p) {
  int i = 0;
  while (i + 1 < p.n_pieces && int(blockIdx.x) >= p.pieces[i + 1].first_split) ++i;
  return p.pieces[i];
}

// Four bytes at any alignment.
__device__ inline float load_f32_bytes(const uint8_t* p) {
  return float_of_bits(p[0] | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24);
}

// Column `c` of a plain row: f32, bf16 or f16, which is what RoPE columns are in every type.
__device__ inline float plain_value(KvType type, const uint8_t* row, int c) {
  if (type == KvType::kF32) return reinterpret_cast<const float*>(row)[c];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[c];
  return type == KvType::kBF16 ? bf16_value(bits) : f16_value(bits);
}

__device__ inline int f8_scales(int rank) {
  return (rank + int(kKvF8ScaleColumns) - 1) / int(kKvF8ScaleColumns);
}

__device__ inline float latent_value(KvType type, const uint8_t* row, int rank, int c) {
  switch (type) {
    case KvType::kF8:
      return load_f32_bytes(row + c / int(kKvF8ScaleColumns) * 4) *
             e4m3_value(row[4 * f8_scales(rank) + c]);
    case KvType::kQ8_0: {
      const uint8_t* block = row + c / 32 * 34;
      return load_f16(block) * float(int8_t(block[2 + c % 32]));
    }
    case KvType::kQ4_0: {
      const uint8_t* block = row + c / 32 * 18;
      return load_f16(block) * float((block[2 + c % 16] >> (c % 32 / 16 * 4) & 15) - 8);
    }
    default:
      return plain_value(type, row, c);
  }
}

// Columns 8 * group .. + 7 of rows whose length is a multiple of 8; rows are aligned to 16 in plain
// types then, and to 2 in the others.
__device__ inline void plain_values8(KvType type, const uint8_t* row, int group, float (&v)[8]) {
  if (type == KvType::kF32) {
    const auto* p = reinterpret_cast<const float4*>(row) + 2 * group;
    const float4 a = p[0], b = p[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
  const uint4 p = reinterpret_cast<const uint4*>(row)[group];
  const uint32_t words[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto bits = uint16_t(words[i / 2] >> (16 * (i & 1)));
    v[i] = type == KvType::kBF16 ? bf16_value(bits) : f16_value(bits);
  }
}
__device__ inline void latent_values8(KvType type, const uint8_t* row, int rank, int group,
                                      float (&v)[8]) {
  switch (type) {
    case KvType::kF8: {
      const float d = load_f32_bytes(row + group / int(kKvF8ScaleColumns / 8) * 4);
      const auto* codes = reinterpret_cast<const uint32_t*>(row + 4 * f8_scales(rank) + 8 * group);
      const uint32_t words[2] = {codes[0], codes[1]};
      e4m3_values8(words, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= d;
      return;
    }
    case KvType::kQ8_0: {
      const uint8_t* block = row + group / 4 * 34;
      const float d = load_f16(block);
      const uint8_t* codes = block + 2 + group % 4 * 8;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const uint16_t pair = load16(codes + i);
        v[i] = d * float(int8_t(pair & 255));
        v[i + 1] = d * float(int8_t(pair >> 8));
      }
      return;
    }
    case KvType::kQ4_0: {
      const uint8_t* block = row + group / 4 * 18;
      const float d = load_f16(block);
      const uint8_t* codes = block + 2 + group % 2 * 8;
      const int shift = group % 4 / 2 * 4;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int pair = load16(codes + i) >> shift;
        v[i] = d * float((pair & 15) - 8);
        v[i + 1] = d * float((pair >> 8 & 15) - 8);
      }
      return;
    }
    default:
      plain_values8(type, row, group, v);
  }
}

// ---- encoding: a warp writes 128 columns, lane l those at first + 32 i + l ----

inline constexpr int kEncodeColumns = 128;
static_assert(kEncodeColumns == kKvF8ScaleColumns);

__device__ inline void encode_plain(KvType type, const float (&v)[4], int first, int n_cols,
                                    uint8_t* row) {
  const int lane = int(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    const int c = first + 32 * i + lane;
    if (c >= n_cols) continue;
    if (type == KvType::kF32)
      reinterpret_cast<float*>(row)[c] = v[i];
    else
      reinterpret_cast<uint16_t*>(row)[c] =
          type == KvType::kBF16 ? bf16_bits(v[i]) : f16_bits(v[i]);
  }
}

// 1 / d, or 0 where that is no finite number.
__device__ inline float inverse(float d) {
  const float id = d != 0 ? 1.0f / d : 0.0f;
  return is_finite(id) ? id : 0.0f;
}

// v is 0 beyond n_cols.
__device__ inline void encode_latent(KvType type, const float (&v)[4], int first, int n_cols,
                                     uint8_t* row) {
  const int lane = int(threadIdx.x % 32);
  if (type == KvType::kF8) {
    float largest = 0;
    bool finite = true;
    for (int i = 0; i < 4; ++i) {
      largest = fmaxf(largest, fabsf(v[i]));
      finite = finite && is_finite(v[i]);
    }
    largest = warp_max(largest);
    finite = __ballot_sync(0xffffffffu, finite) == 0xffffffffu;
    const float scale = finite ? largest / 448.0f : float_of_bits(0x7fc00000u);
    if (lane < 4)
      row[first / kEncodeColumns * 4 + lane] = uint8_t(bits_of_float(scale) >> (8 * lane));
    uint8_t* codes = row + 4 * f8_scales(n_cols);
    for (int i = 0; i < 4; ++i) {
      const int c = first + 32 * i + lane;
      if (c < n_cols) codes[c] = scale > 0 ? e4m3_bits(v[i] / scale) : uint8_t(0);
    }
    return;
  }
  if (type != KvType::kQ8_0 && type != KvType::kQ4_0)
    return encode_plain(type, v, first, n_cols, row);
  for (int i = 0; i < 4; ++i) {
    const int block_first = first + 32 * i;
    if (block_first >= n_cols) break;
    const float largest = warp_max(fabsf(v[i]));
    const bool finite = __ballot_sync(0xffffffffu, is_finite(v[i])) == 0xffffffffu;
    // The value of largest magnitude with its sign; the first of equals.
    const uint32_t holders = __ballot_sync(0xffffffffu, fabsf(v[i]) == largest);
    const int holder = holders == 0 ? 0 : __popc((holders & (0u - holders)) - 1);
    const float held = __shfl_sync(0xffffffffu, v[i], holder);
    const float extreme = largest == 0 ? 0.0f : held;  // of zeros, the positive one
    if (type == KvType::kQ8_0) {
      uint8_t* block = row + block_first / 32 * 34;
      const float d = largest / 127.0f;
      if (lane == 0) *reinterpret_cast<uint16_t*>(block) = finite ? f16_bits(d) : uint16_t(0x7e00);
      block[2 + lane] = finite ? uint8_t(int8_t(roundf(v[i] * inverse(d)))) : uint8_t(0);
    } else {
      uint8_t* block = row + block_first / 32 * 18;
      const float d = extreme / -8.0f;
      if (lane == 0) *reinterpret_cast<uint16_t*>(block) = finite ? f16_bits(d) : uint16_t(0x7e00);
      const int q = finite ? int(v[i] * inverse(d) + 8.5f) : 0;
      const int code = q < 15 ? q : 15;
      const int other = __shfl_xor_sync(0xffffffffu, code, 16);
      if (lane < 16) block[2 + lane] = uint8_t(code | other << 4);
    }
  }
}

}  // namespace fathom::cuda
