// rows_kernels.h for AVX2: the shared body over this set's vectors.
#include <stddef.h>

#include "cpu/rows_simd_avx2.h"
// The body is written in the names of the vectors.
#include "cpu/rows_body.h"

namespace fathom::cpu {

const RowKernels& row_kernels_avx2() noexcept {
  static constexpr RowKernels kKernels = {.name = "avx2",
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
