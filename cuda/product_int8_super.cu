// Products with rows of bytes: blocks of 256 values.
#include "cuda/product_int8.cuh"

namespace fathom::cuda {

int product_int8_super(Stream stream, const ProductParams& p, const Int8Rows& x) {
  switch (p.w.dtype) {
    case DType::kQ4_K:
      return launch_product_int8<DType::kQ4_K>(stream, p, x);
    case DType::kQ5_K:
      return launch_product_int8<DType::kQ5_K>(stream, p, x);
    case DType::kQ6_K:
      return launch_product_int8<DType::kQ6_K>(stream, p, x);
    case DType::kIQ4_XS:
      return launch_product_int8<DType::kIQ4_XS>(stream, p, x);
    default:
      return kNoKernel;
  }
}

}  // namespace fathom::cuda
