// Integer products of packed weights on AMX tiles: 16 rows of activations times 16 rows of weights
// times the columns that share a scale.  The sums of each such block leave the tile as int32 and
// are scaled and added in f32, in the same order as everywhere else.
//
// Include matmul_body.h and the tiles first.
#pragma once

#include <stdint.h>

#include "cpu/matmul_kernels.h"

namespace fathom::cpu {
namespace {

constexpr int kTileRows = 16;
constexpr int kTilesPerPass = 4;  // tiles of activations that one load of weights serves
// Fewer rows leave most of a tile empty; vectors are faster.
constexpr int64_t kAmxMinRows = 12;

// Rows of activations as a tile wants them: at an even distance, 16 of them.
struct TileRows {
  const XBlock* x[kTileRows];  // the rows, null where there is none
  int n_rows;
  bool even;  // 16 rows, x_stride apart
};

// Codes and scales of 32 columns of 16 weight rows.
struct TileColumns {
  alignas(64) uint8_t codes[8 * 64];
  alignas(64) float scale[kGroupRows],
      scale_high[kGroupRows], min[kGroupRows], min_high[kGroupRows];
};

// Signed bytes that are a tile as they lie.
template <class Type>
constexpr bool kLiesAsTile = Type::kSigned&& Type::kBlock.bytes == PackedQ8_0::kBlock.bytes;

template <class Type>
inline void read_columns(const uint8_t* block, const OpenBlock<Type>& factors, int sub,
                         TileColumns& out) {
  for (int h = 0; h < kHalves; ++h) {
    Columns32 c;
    Type::read(block, sub, h, factors[h], c);
    f_store(out.scale + kLanes * h, c.scale);
    if constexpr (Type::kTwoScales) f_store(out.scale_high + kLanes * h, c.scale_high);
    if constexpr (Type::kMin) f_store(out.min + kLanes * h, c.min);
    if constexpr (Type::kMin && Type::kTwoScales) f_store(out.min_high + kLanes * h, c.min_high);
    if constexpr (!kLiesAsTile<Type>)
      for (int q = 0; q < 8; ++q)  // b_signed() undoes itself
        b_store(out.codes + 64 * q + 4 * kLanes * h, Type::kSigned ? b_signed(c.w[q]) : c.w[q]);
  }
}

// Loads columns [first, first + k) of block `at` of the rows.
inline void load_rows(const TileRows& rows, int64_t x_stride, int64_t at, int first, int k) {
  if (rows.even) {
    load_a(rows.x[0][at].q + first, x_stride * static_cast<int64_t>(sizeof(XBlock)));
    return;
  }
  alignas(64) int8_t gathered[kTileRows * 32];
  for (int r = 0; r < kTileRows; ++r) {
    if (r < rows.n_rows)
      __builtin_memcpy(gathered + r * k, rows.x[r][at].q + first, static_cast<uint64_t>(k));
    else
      __builtin_memset(gathered + r * k, 0, static_cast<uint64_t>(k));
  }
  load_a(gathered, k);
}

// sums[r][c] += (dots[r][c] + start of row r) * scale[c] * scale of row r.
template <int kOffset>
inline void add_dots(const TileRows& rows, int64_t at, int half, const int32_t* dots,
                     const float* scale, float* sums) {
  for (int r = 0; r < rows.n_rows; ++r) {
    const XBlock& x = rows.x[r][at];
    for (int h = 0; h < kHalves; ++h) {
      I dot = i_load(dots + kGroupRows * r + kLanes * h);
      if constexpr (kOffset != 0) dot = i_add(dot, start_of<kOffset>(x, half));
      float* sum = sums + kGroupRows * r + kLanes * h;
      f_store(sum,
              f_fma(f_mul(f_from_i(dot), f_load(scale + kLanes * h)), f_set(x.scale), f_load(sum)));
    }
  }
}

template <class Type, int kTile>
inline void add_block(const TileRows* tiles, int n_tiles, int64_t x_stride, int64_t at, int half,
                      const float* scale, float* sums) {
  if constexpr (kTile < kTilesPerPass) {
    if (kTile >= n_tiles) return;
    alignas(64) int32_t dots[kTileRows * kGroupRows];
    load_rows(tiles[kTile], x_stride, at, 16 * half, Type::kTwoScales ? 16 : 32);
    multiply<kTile, Type::kSigned>(dots);
    add_dots<Type::kOffset>(tiles[kTile], at, half, dots, scale,
                            sums + kTile * kTileRows * kGroupRows);
    add_block<Type, kTile + 1>(tiles, n_tiles, x_stride, at, half, scale, sums);
  }
}

template <class Type>
void amx_int8_group(const uint8_t* group, int64_t n_blocks, const TileRows* tiles, int n_tiles,
                    int64_t x_stride, float* sums) {
  constexpr int kSubs = Type::kBlock.cols / 32;
  int64_t at = 0;
  for (int64_t b = 0; b < n_blocks; ++b, group += Type::kBlock.bytes) {
    const OpenBlock<Type> factors(group);
    for (int s = 0; s < kSubs; ++s, ++at) {
      TileColumns columns;
      read_columns<Type>(group, factors, s, columns);
      const uint8_t* codes = columns.codes;
      if constexpr (kLiesAsTile<Type>) codes = group + Type::kCodes;
      load_b(codes);
      add_block<Type, 0>(tiles, n_tiles, x_stride, at, 0, columns.scale, sums);
      if constexpr (Type::kTwoScales) {
        load_b(codes + 4 * 64);
        add_block<Type, 0>(tiles, n_tiles, x_stride, at, 1, columns.scale_high, sums);
      }
      if constexpr (Type::kMin) {
        for (int t = 0; t < n_tiles; ++t) {
          for (int r = 0; r < tiles[t].n_rows; ++r) {
            float* sum = sums + (t * kTileRows + r) * kGroupRows;
            const XBlock& x = tiles[t].x[r][at];
            for (int h = 0; h < kHalves; ++h) {
              float* to = sum + kLanes * h;
              const F min = f_load(columns.min + kLanes * h);
              if constexpr (Type::kTwoScales) {
                const F low = f_mul(f_set(x.sums[0]), min);
                const F both = f_fma(f_set(x.sums[1]), f_load(columns.min_high + kLanes * h), low);
                f_store(to, f_fnma(both, f_set(x.scale), f_load(to)));
              } else {
                f_store(to, f_fnma(min, f_set(x.scaled_sum), f_load(to)));
              }
            }
          }
        }
      }
    }
  }
}

template <class Type>
void amx_int8_product(const Int8Product& p) {
  if (p.n_rows < kAmxMinRows) {
    int8_product<Type>(p);
    return;
  }
  tiles_configure(Type::kTwoScales ? 16 : 32);
  const int64_t group_bytes = p.n_blocks * Type::kBlock.bytes;
  constexpr int64_t kPassRows = kTilesPerPass * kTileRows;
  for (int64_t row0 = 0; row0 < p.n_rows; row0 += kPassRows) {
    const int64_t pass = p.n_rows - row0 < kPassRows ? p.n_rows - row0 : kPassRows;
    const int n_tiles = static_cast<int>((pass + kTileRows - 1) / kTileRows);
    TileRows tiles[kTilesPerPass];
    for (int t = 0; t < n_tiles; ++t) {
      const int64_t left = pass - t * kTileRows;
      tiles[t].n_rows = left < kTileRows ? static_cast<int>(left) : kTileRows;
      tiles[t].even = p.rows == nullptr && tiles[t].n_rows == kTileRows;
      for (int r = 0; r < tiles[t].n_rows; ++r) {
        const int64_t row = row0 + t * kTileRows + r;
        tiles[t].x[r] = p.x + (p.rows ? p.rows[row] : row) * p.x_stride;
      }
    }
    for (int64_t g = 0; g < p.n_groups; ++g) {
      alignas(64) float sums[kPassRows * kGroupRows];
      __builtin_memset(sums, 0, sizeof sums);
      amx_int8_group<Type>(p.weights + g * group_bytes, p.n_blocks, tiles, n_tiles, p.x_stride,
                           sums);
      const int64_t left = p.n_cols - kGroupRows * g;
      const int n_cols = left < kGroupRows ? static_cast<int>(left) : kGroupRows;
      for (int64_t r = 0; r < pass; ++r) {
        for (int h = 0; h < kHalves; ++h) {
          float* to = p.out + (row0 + r) * p.out_stride + kGroupRows * g + kLanes * h;
          const int n = n_cols - kLanes * h;
          F sum = f_load(sums + kGroupRows * r + kLanes * h);
          if (p.add) sum = f_add(sum, f_load_first(to, n));
          f_store_first(to, sum, n);
        }
      }
    }
  }
  tiles_release();
}

constexpr MatmulKernels amx_table() {
  MatmulKernels kernels = table("amx", INT64_MAX);
  kernels.int8_product[kPackedQ8_0] = amx_int8_product<ReadQ8_0>;
  kernels.int8_product[kPackedQ4_0] = amx_int8_product<ReadQ4_0>;
  kernels.int8_product[kPackedQ4_1] = amx_int8_product<ReadQ4_1>;
  kernels.int8_product[kPackedQ5_0] = amx_int8_product<ReadQ5_0>;
  kernels.int8_product[kPackedQ5_1] = amx_int8_product<ReadQ5_1>;
  kernels.int8_product[kPackedIQ4_NL] = amx_int8_product<ReadIQ4_NL>;
  kernels.int8_product[kPackedQ2_K] = amx_int8_product<ReadQ2_K>;
  kernels.int8_product[kPackedQ3_K] = amx_int8_product<ReadQ3_K>;
  kernels.int8_product[kPackedQ4_K] = amx_int8_product<ReadQ4_K>;
  kernels.int8_product[kPackedQ5_K] = amx_int8_product<ReadQ5_K>;
  kernels.int8_product[kPackedQ6_K] = amx_int8_product<ReadQ6_K>;
  kernels.int8_product[kPackedIQ4_XS] = amx_int8_product<ReadIQ4_XS>;
  return kernels;
}

}  // namespace
}  // namespace fathom::cpu
