// Products for few rows: blocks of 32 values.
#include "cuda/product_rows.cuh"

namespace fathom::cuda {

int product_rows_blocks(Stream stream, const ProductParams& p) {
  switch (p.w.dtype) {
    case DType::kQ4_0:
      return launch_product_rows<DType::kQ4_0>(stream, p);
    case DType::kQ4_1:
      return launch_product_rows<DType::kQ4_1>(stream, p);
    case DType::kQ5_0:
      return launch_product_rows<DType::kQ5_0>(stream, p);
    case DType::kQ5_1:
      return launch_product_rows<DType::kQ5_1>(stream, p);
    case DType::kQ8_0:
      return launch_product_rows<DType::kQ8_0>(stream, p);
    case DType::kIQ4_NL:
      return launch_product_rows<DType::kIQ4_NL>(stream, p);
    case DType::kMXFP4:
      return launch_product_rows<DType::kMXFP4>(stream, p);
    default:
      return product_rows_super(stream, p);
  }
}

}  // namespace fathom::cuda
