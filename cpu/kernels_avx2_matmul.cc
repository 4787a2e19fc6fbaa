// Products with stored weights for AVX2: the shared body over this set's vectors.
#include "cpu/simd_avx2.h"
// The body is written in the names of the vectors.
#include "cpu/matmul_body.h"

namespace fathom::cpu {

const MatmulKernels& matmul_kernels_avx2() noexcept {
  static constexpr MatmulKernels kTable = table("avx2", INT64_MAX);
  return kTable;
}

}  // namespace fathom::cpu
