// Norm, RoPE and cache append over the kernels of the chosen instruction set.  Every row is
// computed by itself, so the cut into groups never shows in the results.
#include "cpu/rows.h"

#include <algorithm>
#include <cmath>

#include "cpu/page_codec.h"
#include "cpu/pair_kernels.h"
#include "cpu/rows_kernels.h"

namespace fathom::cpu {
namespace {

// 1 / sqrt(mean of squares + eps).
float norm_factor(const RowKernels& kernels, const float* x, int64_t n, float eps) noexcept {
  const double mean = kernels.sum_squares(x, n) / static_cast<double>(n);
  return static_cast<float>(1.0 / std::sqrt(mean + eps));
}

void append_row(const RowKernels& kernels, const KvAppendParams& p, int64_t index) noexcept {
  const KvLayout& layout = p.rows.layout;
  const PageRun run = page_run(p.rows, p.rows.first_row + index, 1);
  const float* latent = p.kv + index * p.kv_stride;
  const float* position = latent + layout.kv_lora_rank;
  const float* cos_sin = p.cos_sin + index * layout.qk_rope_head_dim;
  const float factor = norm_factor(kernels, latent, layout.kv_lora_rank, p.eps);
  float piece[kEncodeColumns];
  for (int64_t first = 0; first < layout.kv_lora_rank; first += kEncodeColumns) {
    const int64_t n = std::min(kEncodeColumns, layout.kv_lora_rank - first);
    kernels.scale(latent + first, factor, p.norm_weight + first, n, piece);
    encode_columns(kernels, latent_row_type(run.type), piece, first, n, layout.kv_lora_rank,
                   run.latent);
  }
  for (int64_t first = 0; first < layout.qk_rope_head_dim; first += kEncodeColumns) {
    const int64_t n = std::min(kEncodeColumns, layout.qk_rope_head_dim - first);
    kernels.rotate(position + first, cos_sin + first, n, piece);
    encode_columns(kernels, rope_row_type(run.type), piece, first, n, layout.qk_rope_head_dim,
                   run.rope);
  }
}

}  // namespace

const RowKernels& row_kernels(Isa isa) noexcept {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
      return row_kernels_amx();
    case Isa::kAvx512:
      return row_kernels_avx512();
    case Isa::kAvx2:
      return row_kernels_avx2();
#endif
    default:
      return row_kernels_scalar();
  }
}

const PairKernels* pair_kernels(Isa isa, Numerics numerics) noexcept {
#if defined(__x86_64__)
  const CpuFeatures& features = cpu_features();
  if (numerics == Numerics::kFast && isa >= Isa::kAvx512 && features.avx512_bf16 &&
      !features.amx_bf16)
    return &pair_kernels_avx512bf16();
#endif
  static_cast<void>(isa), static_cast<void>(numerics);
  return nullptr;
}

void rms_norm(const CpuContext& context, const RmsNormParams& p) noexcept {
  const RowKernels& kernels = *context.rows;
  for_row_groups(context, p.n_rows, p.n_cols, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const float* x = p.x + row * p.x_stride;
      kernels.scale(x, norm_factor(kernels, x, p.n_cols, p.eps), p.weight, p.n_cols,
                    p.out + row * p.out_stride);
    }
  });
}

void rope_table(const CpuContext& context, const RopeTableParams& p) noexcept {
  const int64_t n_pairs = p.rope_dim / 2;
  // A sine and cosine in double cost about as much as 16 simple values.
  for_row_groups(context, p.n_tokens, p.rope_dim * 16, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t)
      for (int64_t i = 0; i < n_pairs; ++i) {
        const double angle = static_cast<double>(p.first_position + t) * p.inv_freq[i];
        float* out = p.cos_sin + (t * n_pairs + i) * 2;
        out[0] = static_cast<float>(std::cos(angle) * p.multiplier);
        out[1] = static_cast<float>(std::sin(angle) * p.multiplier);
      }
  });
}

void rope(const CpuContext& context, const RopeParams& p) noexcept {
  for_row_groups(context, p.n_tokens, p.n_heads * p.rope_dim, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t)
      for (int64_t head = 0; head < p.n_heads; ++head) {
        float* x = p.x + t * p.token_stride + head * p.head_stride;
        context.rows->rotate(x, p.cos_sin + t * p.rope_dim, p.rope_dim, x);
      }
  });
}

void kv_append(const CpuContext& context, const KvAppendParams& p) noexcept {
  const int64_t row_values = p.rows.layout.kv_lora_rank + p.rows.layout.qk_rope_head_dim;
  // Encoding costs several times a plain pass over the values.
  for_row_groups(context, p.rows.n_rows, row_values * 4, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) append_row(*context.rows, p, row);
  });
}

void add(const CpuContext& context, const AddParams& p) noexcept {
  for_row_groups(context, p.n, 1, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) p.out[i] += p.x[i];
  });
}

}  // namespace fathom::cpu
