// Products for few rows: super-blocks of 256 values.
#include "cuda/product_rows.cuh"

namespace fathom::cuda {

int product_rows_super(Stream stream, const ProductParams& p) {
  switch (p.w.dtype) {
    case DType::kQ2_K:
      return launch_product_rows<DType::kQ2_K>(stream, p);
    case DType::kQ3_K:
      return launch_product_rows<DType::kQ3_K>(stream, p);
    case DType::kQ4_K:
      return launch_product_rows<DType::kQ4_K>(stream, p);
    case DType::kQ5_K:
      return launch_product_rows<DType::kQ5_K>(stream, p);
    case DType::kQ6_K:
      return launch_product_rows<DType::kQ6_K>(stream, p);
    case DType::kIQ4_XS:
      return launch_product_rows<DType::kIQ4_XS>(stream, p);
    default:
      return kNoKernel;
  }
}

}  // namespace fathom::cuda
