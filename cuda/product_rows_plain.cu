// Products for few rows: plain types and FP8.
#include "cuda/product_rows.cuh"

namespace fathom::cuda {

int product_rows_plain(Stream stream, const ProductParams& p) {
  switch (p.w.dtype) {
    case DType::kF32:
      return launch_product_rows<DType::kF32>(stream, p);
    case DType::kF16:
      return launch_product_rows<DType::kF16>(stream, p);
    case DType::kBF16:
      return launch_product_rows<DType::kBF16>(stream, p);
    case DType::kF8E4M3:
      return launch_product_rows<DType::kF8E4M3>(stream, p);
    default:
      return product_rows_blocks(stream, p);
  }
}

}  // namespace fathom::cuda
