// Operations with stored weights: the part of the CPU backend behind Backend::embed, matmul,
// heads_matmul, ffn and experts (contracts in fathom/backend.hpp).  Layouts and packing:
// weight_layout.h.  How one slice of a product is computed: product.h.
//
// Nothing here allocates; temporaries come from the workspace.  workspace_bytes() never falls when
// the number of rows grows, so room for the longest chunk is room for every shorter one.
#pragma once

#include <cstdint>

#include "cpu/cpu_context.h"
#include "cpu/weight_layout.h"
#include "fathom/backend.hpp"

namespace fathom::cpu {

int64_t workspace_bytes(const CpuContext&, const MatmulParams&) noexcept;
int64_t workspace_bytes(const CpuContext&, const HeadsMatmulParams&) noexcept;
int64_t workspace_bytes(const CpuContext&, const FfnParams&) noexcept;
int64_t workspace_bytes(const CpuContext&, const ExpertsParams&) noexcept;

void embed(const CpuContext&, const OpContext&, const EmbedParams&) noexcept;
// False when the heap is too short for oneDNN's small objects: the output is undefined.
bool matmul(const CpuContext&, const OpContext&, const MatmulParams&) noexcept;
void heads_matmul(const CpuContext&, const OpContext&, const HeadsMatmulParams&) noexcept;
void ffn(const CpuContext&, const OpContext&, const FfnParams&) noexcept;
void experts(const CpuContext&, const OpContext&, const ExpertsParams&) noexcept;
void sum_experts(const CpuContext&, const SumExpertsParams&) noexcept;

// The kernels of an instruction set; the scalar ones where a build has no others.
const MatmulKernels& matmul_kernels(Isa isa) noexcept;

// Products of few rows with E4M3 over bf16 pairs: in fast numerics, on processors with AVX512_BF16
// and AVX512_VBMI.  Null: f32.
const F8PairKernels* f8_pair_kernels(Isa isa, Numerics numerics) noexcept;

// Rows 16 * row_group .. + 15 of matrix `index`, dequantised: panel[k][16] for the columns
// k = col0 .. col0 + n_cols - 1.  Rows that do not exist are zero.  For packed types col0 and
// n_cols are multiples of 32.  Runs on the calling thread.
void unpack_rows16(const CpuContext&, const Weight&, int64_t index, int64_t row_group, int64_t col0,
                   int64_t n_cols, float* panel) noexcept;

// Columns [col0, col0 + n_cols) of rows [row0, row0 + n_rows), dequantised: row r of the tile
// begins at tile + r * stride.  Packed types: row0, col0 and n_cols as for unpack_rows16, row0 a
// multiple of 16, and n_rows is rounded up to 16 (the tile has room).  Runs on the calling thread.
void unpack_tile(const CpuContext&, const Weight&, int64_t index, int64_t row0, int64_t n_rows,
                 int64_t col0, int64_t n_cols, float* tile, int64_t stride) noexcept;

}  // namespace fathom::cpu
