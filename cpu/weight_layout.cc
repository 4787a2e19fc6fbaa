// Packing of file rows into R16 row groups, and the sizes of both layouts.
#include "cpu/weight_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "fathom/quant.hpp"

namespace fathom::cpu {
namespace {

constexpr int64_t kAlignment = 64;

int64_t align_up(int64_t bytes) noexcept {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

uint32_t load32(const uint8_t* p) noexcept {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
void store32(uint8_t* p, uint32_t v) noexcept {
  std::memcpy(p, &v, sizeof v);
}

constexpr uint32_t kNibbles = 0x0f0f0f0f;

// Each function packs one block of one row: `src` is the file's block, `out` the packed block.
using PackBlock = void (*)(const uint8_t* src, int row, uint8_t* out) noexcept;

// The f16 at `src` among the sixteen at `at`.
void pack_factor(const uint8_t* src, int at, int row, uint8_t* out) noexcept {
  std::memcpy(out + at + 2 * row, src, 2);
}

// Nibbles of 32 columns that the file has already paired (x[j], x[j + 16]).
void pack_pairs(const uint8_t* qs, int row, uint8_t* codes) noexcept {
  for (int j = 0; j < 4; ++j) std::memcpy(codes + 64 * j + 4 * row, qs + 4 * j, 4);
}

// Bit i of qh belongs to column i.
void pack_fifth_bits(const uint8_t* qh, int row, uint8_t* high) noexcept {
  const uint32_t bits = load32(qh);
  uint32_t out = 0;
  for (int quad = 0; quad < 8; ++quad)
    for (int c = 0; c < 4; ++c) out |= (bits >> (4 * quad + c) & 1) << (8 * c + quad);
  store32(high + 4 * row, out);
}

// Bits `shift`, shift + 1 of 32 bytes, a column each.
void pack_bit_pairs(const uint8_t* bytes, int shift, int row, uint8_t* codes) noexcept {
  for (int v = 0; v < 2; ++v) {
    uint32_t bits = 0;
    for (int p = 0; p < 4; ++p)
      bits |= (load32(bytes + 16 * v + 4 * p) >> shift & 0x03030303u) << (2 * p);
    store32(codes + 64 * v + 4 * row, bits);
  }
}

// Bit `shift` of 32 bytes, a column each.
void pack_bits(const uint8_t* bytes, int shift, int row, uint8_t* codes) noexcept {
  uint32_t bits = 0;
  for (int j = 0; j < 8; ++j) bits |= (load32(bytes + 4 * j) >> shift & 0x01010101u) << j;
  store32(codes + 4 * row, bits);
}

// n scales of six bits of one row, of which `place` says where they stand among those of all rows.
template <class Place>
void pack_six_bits(const uint8_t* scales, int n, Place place, uint8_t* low,
                   uint8_t* high) noexcept {
  for (int s = 0; s < n / 2; ++s)
    low[place(s)] = static_cast<uint8_t>((scales[s] & 15) | (scales[s + n / 2] & 15) << 4);
  for (int s = 0; s < n / 4; ++s) {
    const uint8_t* of = scales + s;
    high[place(s)] = static_cast<uint8_t>(of[0] >> 4 | of[n / 4] >> 4 << 2 | of[n / 2] >> 4 << 4 |
                                          of[3 * n / 4] >> 4 << 6);
  }
}

// Codes of one row's 32 columns, a byte each, as PackedQ2_K has them.
void pack_two_bits(const uint8_t* codes, int row, uint8_t* out) noexcept {
  const auto quad = [&](int q) { return load32(codes + 4 * q); };
  for (int v = 0; v < 2; ++v)
    store32(out + 64 * v + 4 * row,
            quad(2 * v) | quad(2 * v + 4) << 2 | quad(2 * v + 1) << 4 | quad(2 * v + 5) << 6);
}

// The same as PackedQ3_K has them.
void pack_three_bits(const uint8_t* codes, int row, uint8_t* out) noexcept {
  const auto quad = [&](int q) { return load32(codes + 4 * q); };
  const auto low = [&](int q) { return quad(q) & 0x03030303u; };
  const auto high = [&](int q) { return quad(q) >> 2 & 0x01010101u; };
  const uint32_t rest[3] = {low(3) << 6, low(7) << 6, high(3) << 6 | high(7) << 7};
  for (int v = 0; v < 3; ++v) store32(out + 64 * v + 4 * row, quad(v) | quad(v + 4) << 3 | rest[v]);
}

void pack_q8_0(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src, 0, row, out);
  uint8_t* codes = out + PackedQ8_0::kCodes + 4 * row;
  for (int q = 0; q < 8; ++q) std::memcpy(codes + 64 * q, src + 2 + 4 * q, 4);
}

void pack_q4_0(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src, 0, row, out);
  pack_pairs(src + offsetof(BlockQ4_0, qs), row, out + PackedQ4_0::kCodes);
}

void pack_q4_1(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src, 0, row, out);
  pack_factor(src + offsetof(BlockQ4_1, m), PackedQ4_1::kMinFactors, row, out);
  pack_pairs(src + offsetof(BlockQ4_1, qs), row, out + PackedQ4_1::kCodes);
}

void pack_q5_0(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src, 0, row, out);
  uint8_t* codes = out + PackedQ5_0::kCodes;
  pack_pairs(src + offsetof(BlockQ5_0, qs), row, codes);
  pack_fifth_bits(src + offsetof(BlockQ5_0, qh), row, codes + PackedQ5_0::kHigh);
}

void pack_q5_1(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src, 0, row, out);
  pack_factor(src + offsetof(BlockQ5_1, m), PackedQ5_1::kMinFactors, row, out);
  uint8_t* codes = out + PackedQ5_1::kCodes;
  pack_pairs(src + offsetof(BlockQ5_1, qs), row, codes);
  pack_fifth_bits(src + offsetof(BlockQ5_1, qh), row, codes + PackedQ5_1::kHigh);
}

void pack_iq4_nl(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src, 0, row, out);
  pack_pairs(src + offsetof(BlockIQ4_NL, qs), row, out + PackedIQ4_NL::kCodes);
}

void pack_q2_k(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src + offsetof(BlockQ2_K, d), 0, row, out);
  pack_factor(src + offsetof(BlockQ2_K, dmin), PackedQ2_K::kMinFactors, row, out);
  for (int j = 0; j < 16; ++j)
    out[PackedQ2_K::kScales + 32 * (j / 2) + 2 * row + j % 2] =
        src[offsetof(BlockQ2_K, scales) + j];
  for (int s = 0; s < 8; ++s) {
    const uint8_t* qs = src + offsetof(BlockQ2_K, qs) + 32 * (s / 4);
    uint8_t codes[32];
    for (int i = 0; i < 32; ++i) codes[i] = qs[i] >> (2 * (s % 4)) & 3;
    pack_two_bits(codes, row, out + PackedQ2_K::kCodes + PackedQ2_K::kSubBytes * s);
  }
}

void pack_q3_k(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src + offsetof(BlockQ3_K, d), 0, row, out);
  std::memset(out + 32 + 2 * row, 0, 2);  // padding
  const uint8_t* packed = src + offsetof(BlockQ3_K, scales);
  uint8_t scales[16];
  for (int j = 0; j < 16; ++j)
    scales[j] = static_cast<uint8_t>((packed[j % 8] >> (j / 8 * 4) & 15) |
                                     (packed[8 + j % 4] >> (j / 4 * 2) & 3) << 4);
  const auto place = [row](int s) { return 32 * (s / 2) + 2 * row + s % 2; };
  pack_six_bits(scales, 16, place, out + PackedQ3_K::kScales, out + PackedQ3_K::kHighScales);
  for (int s = 0; s < 8; ++s) {
    const uint8_t* qs = src + offsetof(BlockQ3_K, qs) + 32 * (s / 4);
    const uint8_t* hmask = src + offsetof(BlockQ3_K, hmask);
    uint8_t codes[32];
    for (int i = 0; i < 32; ++i)
      codes[i] = static_cast<uint8_t>((qs[i] >> (2 * (s % 4)) & 3) | (hmask[i] >> s & 1) << 2);
    pack_three_bits(codes, row, out + PackedQ3_K::kCodes + PackedQ3_K::kSubBytes * s);
  }
}

// What Q4_K and Q5_K share.  `scales` and `qs` are fields of the file's block.
void pack_k_scales(const uint8_t* d, const uint8_t* scales, int row, uint8_t* out) noexcept {
  pack_factor(d, 0, row, out);
  pack_factor(d + 2, PackedQ4_K::kMinFactors, row, out);
  for (int k = 0; k < 4; ++k) {
    uint8_t* scale = out + PackedQ4_K::kScales + 16 * k + row;
    uint8_t* min = out + PackedQ4_K::kMins + 16 * k + row;
    scale[0] = scales[k] & 63;
    min[0] = scales[4 + k] & 63;
    scale[64] = static_cast<uint8_t>((scales[8 + k] & 15) | (scales[k] >> 6 << 4));
    min[64] = static_cast<uint8_t>((scales[8 + k] >> 4) | (scales[4 + k] >> 6 << 4));
  }
}
void pack_k_nibbles(const uint8_t* qs, int row, int sub_bytes, uint8_t* out) noexcept {
  for (int s = 0; s < 8; ++s) {
    const uint8_t* quarter = qs + 32 * (s / 2);
    uint8_t* codes = out + PackedQ4_K::kCodes + sub_bytes * s + 4 * row;
    for (int j = 0; j < 4; ++j) {
      const uint32_t a = load32(quarter + 4 * j), b = load32(quarter + 16 + 4 * j);
      store32(codes + 64 * j, s % 2 == 0 ? (a & kNibbles) | (b & kNibbles) << 4
                                         : (a >> 4 & kNibbles) | (b & ~kNibbles));
    }
  }
}

void pack_q4_k(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_k_scales(src + offsetof(BlockQ4_K, d), src + offsetof(BlockQ4_K, scales), row, out);
  pack_k_nibbles(src + offsetof(BlockQ4_K, qs), row, PackedQ4_K::kSubBytes, out);
}

void pack_q5_k(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_k_scales(src + offsetof(BlockQ5_K, d), src + offsetof(BlockQ5_K, scales), row, out);
  pack_k_nibbles(src + offsetof(BlockQ5_K, qs), row, PackedQ5_K::kSubBytes, out);
  for (int s = 0; s < 8; ++s)
    pack_bits(src + offsetof(BlockQ5_K, qh), s, row,
              out + PackedQ5_K::kCodes + PackedQ5_K::kSubBytes * s + PackedQ5_K::kHigh);
}

void pack_q6_k(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src + offsetof(BlockQ6_K, d), 0, row, out);
  std::memset(out + 32 + 2 * row, 0, 2);  // padding
  for (int j = 0; j < 16; ++j)
    out[PackedQ6_K::kScales + 16 * j + row] = src[offsetof(BlockQ6_K, scales) + j];
  for (int s = 0; s < 8; ++s) {
    const int half = s / 4, part = s % 4;
    const uint8_t* ql = src + offsetof(BlockQ6_K, ql) + 64 * half + 32 * (part % 2);
    const int shift = 4 * (part / 2);
    uint8_t* codes = out + PackedQ6_K::kCodes + PackedQ6_K::kSubBytes * s;
    for (int j = 0; j < 4; ++j)
      store32(codes + 64 * j + 4 * row, (load32(ql + 4 * j) >> shift & kNibbles) |
                                            (load32(ql + 16 + 4 * j) >> shift & kNibbles) << 4);
    pack_bit_pairs(src + offsetof(BlockQ6_K, qh) + 32 * half, 2 * part, row,
                   codes + PackedQ6_K::kHigh);
  }
}

void pack_iq4_xs(const uint8_t* src, int row, uint8_t* out) noexcept {
  pack_factor(src, 0, row, out);
  const uint8_t* low = src + offsetof(BlockIQ4_XS, scales_l);
  const uint8_t* high = src + offsetof(BlockIQ4_XS, scales_h);
  uint8_t scales[8];
  for (int j = 0; j < 8; ++j)
    scales[j] = static_cast<uint8_t>((low[j / 2] >> (4 * (j % 2)) & 15) |
                                     (high[j / 4] >> (2 * (j % 4)) & 3) << 4);
  const auto place = [row](int s) { return 16 * s + row; };
  pack_six_bits(scales, 8, place, out + PackedIQ4_XS::kScales, out + PackedIQ4_XS::kHighScales);
  for (int s = 0; s < 8; ++s)
    pack_pairs(src + offsetof(BlockIQ4_XS, qs) + 16 * s, row,
               out + PackedIQ4_XS::kCodes + PackedIQ4_XS::kSubBytes * s);
}

constexpr PackBlock kPackBlock[kPackedTypes] = {pack_q8_0, pack_q4_0,   pack_q4_1, pack_q5_0,
                                                pack_q5_1, pack_iq4_nl, pack_q2_k, pack_q3_k,
                                                pack_q4_k, pack_q5_k,   pack_q6_k, pack_iq4_xs};

// Rows that have been checked.
void store_groups(const Weight& weight, int64_t index, int64_t first_row, int64_t n_rows,
                  const uint8_t* src) noexcept {
  const int64_t bytes_per_row = row_bytes(weight.dtype, weight.cols);
  auto* matrix = reinterpret_cast<uint8_t*>(weight.matrix(index));
  if (!is_packed(weight)) {
    std::memcpy(matrix + first_row * bytes_per_row, src,
                static_cast<size_t>(n_rows * bytes_per_row));
    return;
  }
  const PackedType type = packed_type(weight.dtype);
  const PackedBlock& block = kPackedBlocks[type];
  const int64_t file_block = dtype_info(weight.dtype).block_bytes;
  const int64_t n_blocks = weight.cols / block.cols;
  for (int64_t row = 0; row < n_rows; row += kGroupRows) {
    const int n = static_cast<int>(std::min<int64_t>(kGroupRows, n_rows - row));
    uint8_t* out = matrix + (first_row + row) / kGroupRows * group_bytes(weight);
    for (int64_t b = 0; b < n_blocks; ++b, out += block.bytes) {
      if (n < kGroupRows) std::memset(out, 0, static_cast<size_t>(block.bytes));
      for (int r = 0; r < n; ++r)
        kPackBlock[type](src + (row + r) * bytes_per_row + b * file_block, r, out);
    }
  }
}

}  // namespace

PackedType packed_type(DType dtype) noexcept {
  switch (dtype) {
    case DType::kQ8_0:
      return kPackedQ8_0;
    case DType::kQ4_0:
      return kPackedQ4_0;
    case DType::kQ4_1:
      return kPackedQ4_1;
    case DType::kQ5_0:
      return kPackedQ5_0;
    case DType::kQ5_1:
      return kPackedQ5_1;
    case DType::kIQ4_NL:
      return kPackedIQ4_NL;
    case DType::kIQ4_XS:
      return kPackedIQ4_XS;
    case DType::kQ2_K:
      return kPackedQ2_K;
    case DType::kQ3_K:
      return kPackedQ3_K;
    case DType::kQ4_K:
      return kPackedQ4_K;
    case DType::kQ5_K:
      return kPackedQ5_K;
    case DType::kQ6_K:
      return kPackedQ6_K;
    default:
      return kPackedTypes;
  }
}

int64_t group_bytes(const Weight& w) noexcept {
  if (!is_packed(w)) return kGroupRows * row_bytes(w.dtype, w.cols);
  const PackedBlock& block = kPackedBlocks[packed_type(w.dtype)];
  return w.cols / block.cols * block.bytes;
}

int64_t scales_offset(const Weight& w) noexcept {
  return align_up(w.rows * row_bytes(w.dtype, w.cols));
}

const float* block_scales(const Weight& w, int64_t index) noexcept {
  if (!w.block_scaled) return nullptr;
  return reinterpret_cast<const float*>(w.matrix(index) + scales_offset(w));
}

Status weight_layout(Weight& weight) noexcept try {
  const DTypeInfo& info = dtype_info(weight.dtype);
  if (!is_weight_dtype(weight.dtype))
    return Status(Code::kUnsupported,
                  fmt::format("{} is not a type that weights can have", info.name));
  if (weight.block_scaled && weight.dtype != DType::kF8E4M3)
    return Status(Code::kUnsupported,
                  fmt::format("block scales belong to F8_E4M3 weights, not to {}", info.name));
  if (weight.rows < 1 || weight.cols < 1 || weight.cols % info.block_elements != 0)
    return Status(Code::kInvalidArgument,
                  fmt::format("a {} matrix of {} x {}: columns must be a positive multiple of {}",
                              info.name, weight.rows, weight.cols, info.block_elements));
  const bool packed = packed_type(weight.dtype) != kPackedTypes;
  weight.layout = static_cast<uint8_t>(packed ? WeightLayout::kPacked : WeightLayout::kRows);
  int64_t bytes = packed ? row_groups(weight) * group_bytes(weight) : scales_offset(weight);
  if (weight.block_scaled) {
    const auto blocks = [](int64_t n) { return (n + kF8ScaleBlock - 1) / kF8ScaleBlock; };
    bytes += blocks(weight.rows) * blocks(weight.cols) * static_cast<int64_t>(sizeof(float));
  }
  weight.matrix_bytes = align_up(bytes);
  return {};
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for a message");
}

Status store_rows(ThreadPool& threads, const Weight& weight, int64_t index, int64_t first_row,
                  int64_t n_rows, const void* rows, NodeMemory* memory) noexcept try {
  if (index < 0 || index >= weight.count || first_row < 0 || n_rows < 0 ||
      first_row + n_rows > weight.rows || first_row % kGroupRows != 0 ||
      (n_rows % kGroupRows != 0 && first_row + n_rows != weight.rows))
    return Status(Code::kInvalidArgument,
                  fmt::format("rows {} + {} of matrix {} do not fit {} matrices of {} rows in "
                              "groups of {}",
                              first_row, n_rows, index, weight.count, weight.rows, kGroupRows));
  // Threads share the packing, and with it the first touch of the memory: zeroing fresh pages costs
  // more than packing.
  constexpr int64_t kTaskBytes = 128 * 1024;
  const int64_t n_groups = (n_rows + kGroupRows - 1) / kGroupRows;
  const int64_t groups =
      std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, group_bytes(weight)));
  const auto store = [&](int64_t task, int) {
    const int64_t row = task * groups * kGroupRows;
    store_groups(weight, index, first_row + row, std::min(groups * kGroupRows, n_rows - row),
                 static_cast<const uint8_t*>(rows) + row * row_bytes(weight.dtype, weight.cols));
  };
  const int64_t n_tasks = (n_groups + groups - 1) / groups;
  if (memory == nullptr || !memory->has_rows()) {
    threads.parallel_for(n_tasks, store);
    return {};
  }
  memory->begin_rows(weight, index, first_row, n_rows);
  // Tasks by the node of their first row; without the system's help the first touch decides.
  NodeCut cut;
  cut.n_slices = n_tasks;
  cut.own_threads_only = !memory->binds();
  for (int node = 0; node <= memory->shares().n_nodes(); ++node) {
    const int64_t group = memory->shares().begin(row_groups(weight), node) - first_row / kGroupRows;
    cut.first[node] = (std::clamp<int64_t>(group, 0, n_groups) + groups - 1) / groups;
  }
  threads.parallel_for(n_tasks, cut, store);
  memory->end_rows(weight, index, first_row, n_rows);
  return {};
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for a message");
}

Status store_scales(const Weight& weight, int64_t index, const float* scales) noexcept try {
  if (!weight.block_scaled || index < 0 || index >= weight.count)
    return Status(Code::kInvalidArgument,
                  fmt::format("scales for matrix {} of {} ({})", index, weight.count,
                              weight.block_scaled ? "block-scaled" : "without block scales"));
  const auto blocks = [](int64_t n) { return (n + kF8ScaleBlock - 1) / kF8ScaleBlock; };
  std::memcpy(weight.matrix(index) + scales_offset(weight), scales,
              static_cast<size_t>(blocks(weight.rows) * blocks(weight.cols)) * sizeof(float));
  return {};
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for a message");
}

}  // namespace fathom::cpu
