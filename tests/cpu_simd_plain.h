// The vectors of simd_<isa>.h and the tiles of amx_tiles.h in plain C++, so that the bodies of the
// kernels, those for AMX among them, are tested on machines that lack the instructions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "cpu/matmul_kernels.h"
#include "fathom/quant.hpp"
#include "fathom/tensor.hpp"

namespace fathom::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kPanelRows = 3;

struct F {
  float v[kLanes];
};
struct I {
  int32_t v[kLanes];
};
struct B {
  uint8_t v[4 * kLanes];
};

// Bytes that packed scales are taken apart in.
struct S {
  uint8_t v[32];
};

template <int kShift>
int shifted(int byte) {
  return kShift > 0 ? byte >> (kShift > 0 ? kShift : 0) : byte << (kShift < 0 ? -kShift : 0);
}

template <class Fn>
F f_each(Fn fn) {
  F r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = fn(i);
  return r;
}
template <class Fn>
I i_each(Fn fn) {
  I r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = fn(i);
  return r;
}
template <class Fn>
B b_each(Fn fn) {
  B r;
  for (int i = 0; i < 4 * kLanes; ++i) r.v[i] = static_cast<uint8_t>(fn(i));
  return r;
}

F f_set(float v) {
  return f_each([&](int) { return v; });
}
F f_zero() {
  return f_set(0);
}
F f_load(const float* p) {
  return f_each([&](int i) { return p[i]; });
}
void f_store(float* p, F v) {
  std::memcpy(p, v.v, sizeof v.v);
}
F f_load_first(const float* p, int n) {
  return f_each([&](int i) { return i < n ? p[i] : 0.0f; });
}
void f_store_first(float* p, F v, int n) {
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = v.v[i];
}
F f_add(F a, F b) {
  return f_each([&](int i) { return a.v[i] + b.v[i]; });
}
F f_sub(F a, F b) {
  return f_each([&](int i) { return a.v[i] - b.v[i]; });
}
F f_mul(F a, F b) {
  return f_each([&](int i) { return a.v[i] * b.v[i]; });
}
F f_div(F a, F b) {
  return f_each([&](int i) { return a.v[i] / b.v[i]; });
}
F f_max(F a, F b) {
  return f_each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
F f_min(F a, F b) {
  return f_each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
F f_fma(F a, F b, F c) {
  return f_each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
F f_fnma(F a, F b, F c) {
  return f_each([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); });
}
F f_abs(F v) {
  return f_each([&](int i) { return std::fabs(v.v[i]); });
}
F f_round(F v) {
  return f_each([&](int i) { return std::nearbyintf(v.v[i]); });
}
F f_from_i(I v) {
  return f_each([&](int i) { return static_cast<float>(v.v[i]); });
}
I f_to_i(F v) {
  return i_each([&](int i) { return static_cast<int32_t>(std::nearbyintf(v.v[i])); });
}
F f_scale2(F v, F n) {
  return f_each([&](int i) { return std::ldexp(v.v[i], static_cast<int>(n.v[i])); });
}
float f_sum(F v) {
  float sum = 0;
  for (const float x : v.v) sum += x;
  return sum;
}
float f_max_lane(F v) {
  float max = v.v[0];
  for (const float x : v.v) max = x > max ? x : max;
  return max;
}
int32_t i_sum(I v) {
  int32_t sum = 0;
  for (const int32_t x : v.v) sum += x;
  return sum;
}
I i_load(const int32_t* p) {
  return i_each([&](int i) { return p[i]; });
}
I i_set(int32_t v) {
  return i_each([&](int) { return v; });
}
I i_add(I a, I b) {
  return i_each([&](int i) { return a.v[i] + b.v[i]; });
}
void i_store_i8(int8_t* p, I v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(v.v[i]);
}

uint16_t load16(const void* p, int i) {
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(p) + 2 * i, 2);
  return bits;
}
F f_load_f16(const void* p) {
  return f_each([&](int i) { return f16_to_f32(load16(p, i)); });
}
F f_load_bf16(const void* p) {
  return f_each([&](int i) { return bf16_to_f32(load16(p, i)); });
}
F f_load_u8(const void* p) {
  return f_each([&](int i) { return static_cast<float>(static_cast<const uint8_t*>(p)[i]); });
}
F f_load_i8(const void* p) {
  return f_each([&](int i) { return static_cast<float>(static_cast<const int8_t*>(p)[i]); });
}
F f_load_f8(const void* p) {
  return f_each([&](int i) { return e4m3_to_f32(static_cast<const uint8_t*>(p)[i]); });
}
void f_load_f8_parts(const void* p, F& a, F& b) {
  a = f_mul(f_load_f8(p), f_set(1.0f / 256));
  b = f_mul(f_load_f8(static_cast<const uint8_t*>(p) + kLanes), f_set(1.0f / 256));
}
void f_store_bf16(uint16_t* p, F v) {
  for (int i = 0; i < kLanes; ++i) p[i] = f32_to_bf16(v.v[i]);
}

B b_load(const void* p) {
  B r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
void b_store(void* p, B v) {
  std::memcpy(p, v.v, sizeof v.v);
}
B b_zero() {
  return b_each([](int) { return 0; });
}
template <int kByte>
F f_f8_plane(B codes) {
  return f_each([&](int i) {
    const uint32_t code = codes.v[4 * i + kByte];
    const uint32_t bits = (code & 0x80) << 24 | (code & 0x7f) << 20;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  });
}
B b_max_twice(B largest, B v) {
  return b_each([&](int i) { return std::max<int>(largest.v[i], 2 * v.v[i] & 0xff); });
}
bool b_any_equal(B v, uint8_t value) {
  return std::find(std::begin(v.v), std::end(v.v), value) != std::end(v.v);
}
void f_split_quads(F (&v)[4]) {
  F from[4];
  std::copy_n(v, 4, from);
  for (int j = 0; j < 4; ++j)
    v[j] = f_each([&](int i) { return from[(4 * i + j) / kLanes].v[(4 * i + j) % kLanes]; });
}
template <int kShift, int kMask>
B b_bits(B v) {
  return b_each([&](int i) { return shifted<kShift>(v.v[i]) & kMask; });
}
template <int kShift, int kMask>
B b_or_bits(B codes, B v) {
  return b_each([&](int i) { return codes.v[i] | (shifted<kShift>(v.v[i]) & kMask); });
}
B b_signed(B v) {
  return v;
}
B b_iq4_values(B codes) {
  return b_each([&](int i) { return kIQ4Values[codes.v[i]]; });
}
template <class Fn>
S s_each(Fn fn) {
  S r;
  for (int i = 0; i < 32; ++i) r.v[i] = static_cast<uint8_t>(fn(i));
  return r;
}
S s_load(const void* p) {
  return s_each([&](int i) { return static_cast<const uint8_t*>(p)[i]; });
}
void s_store(void* p, S v) {
  std::memcpy(p, v.v, sizeof v.v);
}
S s_sub(S a, int8_t b) {
  return s_each([&](int i) { return a.v[i] - b; });
}
template <int kShift, int kMask>
S s_bits(S v) {
  return s_each([&](int i) { return shifted<kShift>(v.v[i]) & kMask; });
}
template <int kShift, int kMask>
S s_or_bits(S a, S v) {
  return s_each([&](int i) { return a.v[i] | (shifted<kShift>(v.v[i]) & kMask); });
}

// Pairs of int16, the first in the low half.
int32_t pair(int first, int last) {
  return static_cast<int32_t>(static_cast<uint32_t>(first & 0xffff) | static_cast<uint32_t>(last)
                                                                          << 16);
}
int first_of(int32_t pair) {
  return static_cast<int16_t>(pair & 0xffff);
}
int last_of(int32_t pair) {
  return pair >> 16;
}
I i_load_u8_pairs(const void* p) {
  const auto* bytes = static_cast<const uint8_t*>(p);
  return i_each([&](int i) { return pair(bytes[2 * i], bytes[2 * i + 1]); });
}
I i_load_i8_pairs(const void* p) {
  const auto* bytes = static_cast<const int8_t*>(p);
  return i_each([&](int i) { return pair(bytes[2 * i], bytes[2 * i + 1]); });
}
template <int kLastShift>
I i_join_pairs(I first, I last) {
  return i_each([&](int i) { return pair(first.v[i], last.v[i] / (1 << kLastShift)); });
}
I i_low_nibbles(I v) {
  return i_each([&](int i) { return pair(first_of(v.v[i]) & 15, last_of(v.v[i]) & 15); });
}
I i_high_nibbles(I v) {
  return i_each([&](int i) { return pair(first_of(v.v[i]) >> 4, last_of(v.v[i]) >> 4); });
}
I i_first_of_pairs(I v) {
  return i_each([&](int i) { return first_of(v.v[i]); });
}
I i_last_of_pairs(I v) {
  return i_each([&](int i) { return last_of(v.v[i]); });
}
I i_sub_pairs(I a, I b) {
  return i_each([&](int i) {
    return pair(first_of(a.v[i]) - first_of(b.v[i]), last_of(a.v[i]) - last_of(b.v[i]));
  });
}
template <int kBits>
I i_shift_left_pairs(I v) {
  return i_each(
      [&](int i) { return pair(first_of(v.v[i]) * (1 << kBits), last_of(v.v[i]) * (1 << kBits)); });
}
I i_dot_pairs(I a, I b) {
  return i_each([&](int i) {
    return first_of(a.v[i]) * first_of(b.v[i]) + last_of(a.v[i]) * last_of(b.v[i]);
  });
}
template <int kByte>
I i_byte(B v) {
  return i_each([&](int i) { return int32_t{v.v[4 * i + kByte]}; });
}
template <int kByte>
I i_signed_byte(B v) {
  return i_each([&](int i) { return int32_t{static_cast<int8_t>(v.v[4 * i + kByte])}; });
}
template <int kMaxCode, int kQuads>
I i_dot_unsigned(const B* w, const int8_t* x, I start) {
  return i_each([&](int lane) {
    int32_t sum = start.v[lane];
    for (int k = 0; k < 4 * kQuads; ++k) sum += w[k / 4].v[4 * lane + k % 4] * x[k];
    return sum;
  });
}
I i_dot_signed(const B* w, const XBlock& x) {
  return i_each([&](int lane) {
    int32_t sum = 0;
    for (int k = 0; k < 32; ++k) sum += static_cast<int8_t>(w[k / 4].v[4 * lane + k % 4]) * x.q[k];
    return sum;
  });
}
void transpose_tile(const float* rows, int64_t stride, float* out, int64_t out_stride) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) out[j * out_stride + i] = rows[i * stride + j];
}

// ---- tiles ----

struct Tiles {
  int k = 0;  // 0: not configured
  uint8_t b[16][64];
  int8_t a[16][64];
};
Tiles tiles;

void tiles_configure(int k) {
  tiles.k = k;
}
void tiles_release() {
  tiles.k = 0;
}
void load_b(const void* p) {
  std::memcpy(tiles.b, p, static_cast<size_t>(tiles.k / 4 * 64));
}
void load_a(const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(tiles.a[r], static_cast<const char*>(p) + r * stride, static_cast<size_t>(tiles.k));
}
template <int kTile, bool kSigned>
void multiply(int32_t* out) {
  static_assert(kTile >= 0 && kTile < 4);
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) {
      int32_t sum = 0;
      for (int k = 0; k < tiles.k; ++k) {
        const uint8_t code = tiles.b[k / 4][4 * c + k % 4];
        sum += (kSigned ? static_cast<int8_t>(code) : code) * tiles.a[r][k];
      }
      out[16 * r + c] = sum;
    }
  }
}

}  // namespace
}  // namespace fathom::cpu
