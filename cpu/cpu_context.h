// What every operation of the CPU backend is given beside its parameters: the threads it may use
// and the kernels that were chosen when the backend was made.
#pragma once

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "fathom/backend.hpp"

namespace fathom::cpu {

struct MatmulKernels;  // cpu/matmul_kernels.h: products with stored weights
struct F8PairKernels;  // there: rows of E4M3 in bf16 pairs
struct RowKernels;     // cpu/rows_kernels.h: norm, RoPE, rows of the cache, attention tiles
struct PairKernels;    // cpu/pair_kernels.h: attention tiles over bf16 pairs

// Constant for the backend's life.
struct CpuContext {
  ThreadPool* threads = nullptr;
  const NodeShares* nodes = nullptr;  // over which rows are cut; null: over none
  Isa isa = Isa::kScalar;
  Numerics numerics = Numerics::kFast;
  const MatmulKernels* matmul = nullptr;
  const RowKernels* rows = nullptr;
  const PairKernels* pairs = nullptr;       // null: attention in f32
  const F8PairKernels* f8_pairs = nullptr;  // null: few rows times E4M3 in f32
};

}  // namespace fathom::cpu
