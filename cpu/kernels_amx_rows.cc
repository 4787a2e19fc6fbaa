// rows_kernels.h for machines with AMX: the AVX-512 arithmetic, without tile products.
#include <stddef.h>

#include "cpu/rows_simd_avx512.h"
// The body is written in the names of the vectors.
#include "cpu/rows_body.h"

namespace fathom::cpu {

const RowKernels& row_kernels_amx() noexcept {
  static constexpr RowKernels kKernels = {.name = "amx",
                                          .lanes = kLanes,
                                          .sum_squares = sum_squares,
                                          .scale = scale,
                                          .rotate = rotate,
                                          .pack_f16 = pack_f16,
                                          .decode = decode,
                                          .expand = expand,
                                          .attend_tile = attend_tile,
                                          .merge = merge};
  return kKernels;
}

}  // namespace fathom::cpu
