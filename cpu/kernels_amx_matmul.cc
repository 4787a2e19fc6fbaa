// Products with stored weights for AMX: the table of AVX-512 with integer products on tiles.
#include "cpu/simd_avx512.h"
// The bodies are written in the names of the vectors and the tiles.
#include "cpu/amx_tiles.h"
#include "cpu/matmul_body.h"
// After the body of all instruction sets, whose names it uses.
#include "cpu/amx_body.h"

namespace fathom::cpu {

const MatmulKernels& matmul_kernels_amx() noexcept {
  static constexpr MatmulKernels kTable = amx_table();
  return kTable;
}

}  // namespace fathom::cpu
