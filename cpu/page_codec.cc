// Encoding and decoding of cached rows.
#include "cpu/page_codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "fathom/quant.hpp"
#include "fathom/tensor.hpp"

namespace fathom::cpu {
namespace {

constexpr float kF8Largest = 448;

template <class T>
T load(const std::byte* bytes) noexcept {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

// One scale group: up to 128 values.
void encode_f8(const float* values, int64_t n, std::byte* scale_bytes, std::byte* codes) noexcept {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::fabs(values[i]));
    finite = finite && std::isfinite(values[i]);
  }
  const float scale = finite ? largest / kF8Largest : std::numeric_limits<float>::quiet_NaN();
  std::memcpy(scale_bytes, &scale, sizeof scale);
  if (!(scale > 0)) {  // all zero, or damaged
    std::memset(codes, 0, static_cast<size_t>(n));
    return;
  }
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<std::byte>(f32_to_e4m3(values[i] / scale));
}

template <void (*kQuantize)(const float*, int64_t, void*) noexcept, int64_t kBlockBytes>
void encode_blocks(const float* values, int64_t n, std::byte* out) noexcept {
  const int64_t whole = n / 32 * 32;
  kQuantize(values, whole, out);
  if (whole == n) return;
  float last[32] = {};
  std::copy(values + whole, values + n, last);
  kQuantize(last, 32, out + whole / 32 * kBlockBytes);
}

}  // namespace

RowType latent_row_type(KvType type) noexcept {
  switch (type) {
    case KvType::kF32:
      return kRowF32;
    case KvType::kBF16:
      return kRowBF16;
    case KvType::kF16:
      return kRowF16;
    case KvType::kF8:
      return kRowF8;
    case KvType::kQ8_0:
      return kRowQ8_0;
    case KvType::kQ4_0:
      return kRowQ4_0;
  }
  return kRowTypes;
}

RowType rope_row_type(KvType type) noexcept {
  return type == KvType::kF32 ? kRowF32 : type == KvType::kBF16 ? kRowBF16 : kRowF16;
}

PageRun page_run(const KvRows& rows, int64_t row, int64_t max_rows) noexcept {
  const KvLayout& layout = rows.layout;
  const KvPage& page = rows.pages[row / layout.page_tokens];
  const int64_t in_page = row % layout.page_tokens;
  std::byte* slot =
      static_cast<std::byte*>(page.data) + rows.layer_slot * layout.layer_bytes(page.type);
  return {.type = page.type,
          .latent = slot + in_page * layout.latent_row_bytes(page.type),
          .rope = slot + layout.rope_plane_offset(page.type) +
                  in_page * layout.rope_row_bytes(page.type),
          .n_rows = std::min(max_rows, layout.page_tokens - in_page)};
}

void encode_columns(const RowKernels& kernels, RowType type, const float* values, int64_t first,
                    int64_t n, int64_t n_cols, std::byte* row) noexcept {
  switch (type) {
    case kRowF32:
      std::memcpy(row + 4 * first, values, static_cast<size_t>(4 * n));
      break;
    case kRowF16: {
      uint16_t codes[kEncodeColumns];
      kernels.pack_f16(values, n, codes);
      std::memcpy(row + 2 * first, codes, static_cast<size_t>(2 * n));
      break;
    }
    case kRowBF16: {
      uint16_t codes[kEncodeColumns];
      for (int64_t i = 0; i < n; ++i) codes[i] = f32_to_bf16(values[i]);
      std::memcpy(row + 2 * first, codes, static_cast<size_t>(2 * n));
      break;
    }
    case kRowF8: {
      const int64_t n_scales = (n_cols + kKvF8ScaleColumns - 1) / kKvF8ScaleColumns;
      encode_f8(values, n, row + 4 * (first / kKvF8ScaleColumns), row + 4 * n_scales + first);
      break;
    }
    case kRowQ8_0:
      encode_blocks<quantize_q8_0, sizeof(BlockQ8_0)>(values, n, row + first / 32 * 34);
      break;
    case kRowQ4_0:
      encode_blocks<quantize_q4_0, sizeof(BlockQ4_0)>(values, n, row + first / 32 * 18);
      break;
    case kRowTypes:
      break;
  }
}

void decode_row(RowType type, const std::byte* row, int64_t n_cols, float* out) noexcept {
  switch (type) {
    case kRowF32:
      std::memcpy(out, row, static_cast<size_t>(4 * n_cols));
      break;
    case kRowF16:
      for (int64_t i = 0; i < n_cols; ++i) out[i] = f16_to_f32(load<uint16_t>(row + 2 * i));
      break;
    case kRowBF16:
      for (int64_t i = 0; i < n_cols; ++i) out[i] = bf16_to_f32(load<uint16_t>(row + 2 * i));
      break;
    case kRowF8: {
      const int64_t n_scales = (n_cols + kKvF8ScaleColumns - 1) / kKvF8ScaleColumns;
      for (int64_t i = 0; i < n_cols; ++i)
        out[i] = load<float>(row + 4 * (i / kKvF8ScaleColumns)) *
                 e4m3_to_f32(load<uint8_t>(row + 4 * n_scales + i));
      break;
    }
    case kRowQ8_0:
      for (int64_t i = 0; i < n_cols; ++i) {
        const auto block = load<BlockQ8_0>(row + i / 32 * 34);
        out[i] = f16_to_f32(block.d) * block.qs[i % 32];
      }
      break;
    case kRowQ4_0:
      for (int64_t i = 0; i < n_cols; ++i) {
        const auto block = load<BlockQ4_0>(row + i / 32 * 18);
        const int j = static_cast<int>(i % 32);
        const int code = j < 16 ? block.qs[j] & 15 : block.qs[j - 16] >> 4;
        out[i] = f16_to_f32(block.d) * static_cast<float>(code - 8);
      }
      break;
    case kRowTypes:
      break;
  }
}

void decode_pages(const RowKernels& kernels, const KvRows& rows, int64_t first_row, int64_t n_rows,
                  float* latent, int64_t latent_stride, float* rope, int64_t rope_stride) noexcept {
  const KvLayout& layout = rows.layout;
  for (int64_t done = 0; done < n_rows;) {
    const PageRun run = page_run(rows, first_row + done, n_rows - done);
    kernels.decode({.type = latent_row_type(run.type),
                    .rows = run.latent,
                    .row_bytes = layout.latent_row_bytes(run.type),
                    .n_rows = run.n_rows,
                    .n_cols = layout.kv_lora_rank,
                    .out = latent + done * latent_stride,
                    .out_stride = latent_stride});
    kernels.decode({.type = rope_row_type(run.type),
                    .rows = run.rope,
                    .row_bytes = layout.rope_row_bytes(run.type),
                    .n_rows = run.n_rows,
                    .n_cols = layout.qk_rope_head_dim,
                    .out = rope + done * rope_stride,
                    .out_stride = rope_stride});
    done += run.n_rows;
  }
}

namespace {

// One plane of a page, row by row.  A row is decoded whole before it is written, and is written at
// or below where it was read, so nothing unread is overwritten.
void convert_plane(const RowKernels& kernels, int64_t n_rows, int64_t n_cols, RowType from,
                   const std::byte* src, int64_t src_row_bytes, RowType to, std::byte* dst,
                   int64_t dst_row_bytes) noexcept {
  if (from == to) {
    std::memmove(dst, src, static_cast<size_t>(n_rows * src_row_bytes));
    return;
  }
  float values[kKvMaxColumns];
  for (int64_t row = 0; row < n_rows; ++row) {
    kernels.decode({.type = from,
                    .rows = src + row * src_row_bytes,
                    .row_bytes = src_row_bytes,
                    .n_rows = 1,
                    .n_cols = n_cols,
                    .out = values,
                    .out_stride = n_cols});
    for (int64_t first = 0; first < n_cols; first += kEncodeColumns)
      encode_columns(kernels, to, values + first, first, std::min(kEncodeColumns, n_cols - first),
                     n_cols, dst + row * dst_row_bytes);
  }
}

}  // namespace

void convert_page(const RowKernels& kernels, const KvConvertParams& p) noexcept {
  const KvLayout& layout = p.layout;
  auto* page = static_cast<std::byte*>(p.page);
  for (int64_t slot = 0; slot < p.n_layers; ++slot) {
    const std::byte* src = page + slot * layout.layer_bytes(p.from);
    std::byte* dst = page + slot * layout.layer_bytes(p.to);
    convert_plane(kernels, layout.page_tokens, layout.kv_lora_rank, latent_row_type(p.from), src,
                  layout.latent_row_bytes(p.from), latent_row_type(p.to), dst,
                  layout.latent_row_bytes(p.to));
    convert_plane(kernels, layout.page_tokens, layout.qk_rope_head_dim, rope_row_type(p.from),
                  src + layout.rope_plane_offset(p.from), layout.rope_row_bytes(p.from),
                  rope_row_type(p.to), dst + layout.rope_plane_offset(p.to),
                  layout.rope_row_bytes(p.to));
  }
}

}  // namespace fathom::cpu
