// Operations on rows of activations: norm, RoPE, and writing rows into the cache.  Contracts of the
// parameters: fathom/backend.hpp.
#pragma once

#include "cpu/cpu_context.h"

namespace fathom::cpu {

// The kernels of an instruction set.
const RowKernels& row_kernels(Isa isa) noexcept;
// Attention over bf16 pairs: in fast numerics, on processors whose vector unit multiplies them
// faster than f32.  Null: f32.  Processors with AMX multiply bf16 at half the rate of f32 outside
// their tiles (Sapphire Rapids: 112 against 231 GF), so they stay with f32.
const PairKernels* pair_kernels(Isa isa, Numerics numerics) noexcept;

void rms_norm(const CpuContext&, const RmsNormParams&) noexcept;
void rope_table(const CpuContext&, const RopeTableParams&) noexcept;
void rope(const CpuContext&, const RopeParams&) noexcept;
void kv_append(const CpuContext&, const KvAppendParams&) noexcept;
void add(const CpuContext&, const AddParams&) noexcept;

// Rows of `row_values` values each are handed to the threads in groups of this many: several
// microseconds of work, as long as waking a thread takes.
constexpr int64_t rows_per_task(int64_t row_values) noexcept {
  constexpr int64_t kTaskValues = 32768;
  return row_values < 1 ? kTaskValues : (kTaskValues + row_values - 1) / row_values;
}

// Calls fn(first, end) for groups of rows on the threads of the context.
template <class F>
void for_row_groups(const CpuContext& context, int64_t n_rows, int64_t row_values,
                    F&& fn) noexcept {
  const int64_t group = rows_per_task(row_values);
  context.threads->parallel_for((n_rows + group - 1) / group, [&](int64_t task, int) {
    const int64_t first = task * group;
    fn(first, first + group < n_rows ? first + group : n_rows);
  });
}

}  // namespace fathom::cpu
