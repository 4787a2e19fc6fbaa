// Products with stored weights: which kernel, in which pieces, with how much workspace.
#pragma once

#include "cuda/device.h"
#include "cuda/workspace.h"

namespace fathom::cuda {

// Up to so many rows go to the kernel that reads each weight once for them all.
inline constexpr int64_t kFewRows = 8;
// From so many rows on a library's product pays for dequantising the matrix.
inline constexpr int64_t kGemmRows = 64;

enum class Method { kFewRows, kTiles, kGemm };
inline Method product_method(bool exact, int64_t n_rows) noexcept {
  if (n_rows <= kFewRows) return Method::kFewRows;
  return exact || n_rows >= kGemmRows ? Method::kGemm : Method::kTiles;
}

// What a dense product takes of the workspace; null but for its method.
struct ProductScratch {
  Int8Rows int8{};             // few rows, rounded
  uint16_t* x = nullptr;       // [n_rows, cols] bf16, for Method::kGemm as all below
  std::byte* panel = nullptr;  // rows of the matrix, dequantised
  int64_t panel_rows = 0;
  std::byte* gemm = nullptr;
};
ProductScratch carve_product(Workspace&, const Weight&, int64_t n_rows, bool exact) noexcept;

// Few rows of x are rounded to bytes for this matrix.
inline bool takes_int8(const Weight& w, bool exact) noexcept {
  return !exact && has_int8_product(w.dtype);
}
Int8Rows carve_int8(Workspace&, int64_t n_rows, int64_t cols) noexcept;

// out (+)= x w^T with the method for n_rows.  Returns 0 or a launch's error.
int multiply(Device&, const MatmulParams&, bool exact, const ProductScratch&) noexcept;

}  // namespace fathom::cuda
