// The AMX tile registers, behind the few names that amx_body.h uses.  amx_emulated.h in the tests
// has the same names in plain C++, so that the kernels are tested on any machine.
//
//   tile 0..3  C: 16 rows of 16 int32      tile 4  B: weights, k / 4 rows of 64 bytes
//   tile 5     A: activations, 16 rows of k bytes
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fathom::cpu {
namespace {

// Shapes for products of `k` columns, a multiple of 4 up to 64.
inline void tiles_configure(int k) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 4; ++tile) {
    config.rows[tile] = 16;
    config.row_bytes[tile] = 64;
  }
  config.rows[4] = static_cast<uint8_t>(k / 4);
  config.row_bytes[4] = 64;
  config.rows[5] = 16;
  config.row_bytes[5] = static_cast<uint16_t>(k);
  // GCC 12 takes the instruction to read 8 bytes only and drops the other stores.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}
inline void tiles_release() {
  _tile_release();
}

inline void load_b(const void* p) {
  _tile_loadd(4, p, 64);
}
inline void load_a(const void* p, int64_t stride) {
  _tile_loadd(5, p, stride);
}

// out[16][16] = A * B.  A is signed; B is signed or not.
// The instructions name their registers, and GCC pastes the names as text: hence the literals.
#define FATHOM_TILE_MULTIPLY(tile) \
  _tile_zero(tile);                \
  if constexpr (kSigned)           \
    _tile_dpbssd(tile, 5, 4);      \
  else                             \
    _tile_dpbsud(tile, 5, 4);      \
  _tile_stored(tile, out, 64)

template <int kTile, bool kSigned>
inline void multiply(int32_t* out) {
  static_assert(kTile >= 0 && kTile < 4);
  if constexpr (kTile == 0) {
    FATHOM_TILE_MULTIPLY(0);
  } else if constexpr (kTile == 1) {
    FATHOM_TILE_MULTIPLY(1);
  } else if constexpr (kTile == 2) {
    FATHOM_TILE_MULTIPLY(2);
  } else {
    FATHOM_TILE_MULTIPLY(3);
  }
}
#undef FATHOM_TILE_MULTIPLY

}  // namespace
}  // namespace fathom::cpu
