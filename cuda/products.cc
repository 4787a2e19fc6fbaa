#include "cuda/products.h"

#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/weights.h"

namespace fathom::cuda {
namespace {

// Values of a dequantised panel: large enough to keep the GPU busy, small beside a chunk's
// activations.
constexpr int64_t kPanelValues = int64_t{8} << 20;
constexpr int64_t kPanelUnit = 64;

// A matrix whose codes are what the library takes needs no panel.
bool is_plain(const Weight& w, bool exact) noexcept {
  return w.dtype == (exact ? DType::kF32 : DType::kBF16);
}

int multiply_gemm(Device& device, const MatmulParams& p, bool exact,
                  const ProductScratch& s) noexcept {
  const WeightView view = view_of(*p.w);
  const Stream stream = device.stream();
  GemmParams gemm{.x = p.x,
                  .x_stride = p.x_stride,
                  .x_batch_stride = 0,
                  .w = view.data,
                  .w_stride = view.code_stride / (exact ? 4 : 2),
                  .w_batch_stride = 0,
                  .w_is_turned = false,
                  .out = p.out,
                  .out_stride = p.out_stride,
                  .out_batch_stride = 0,
                  .n_rows = p.n_rows,
                  .n_cols = view.rows,
                  .k = view.cols,
                  .n_batch = 1,
                  .bf16 = !exact,
                  .out_bf16 = false,
                  .add = p.add,
                  .workspace = s.gemm};
  if (!exact) {
    if (int e = round_to_bf16(stream, p.x, p.x_stride, p.n_rows, view.cols, s.x)) return e;
    gemm.x = s.x;
    gemm.x_stride = view.cols;
  }
  if (is_plain(*p.w, exact)) return device.gemm(gemm);
  for (int64_t row = 0; row < view.rows; row += s.panel_rows) {
    const int64_t n = std::min(s.panel_rows, view.rows - row);
    if (int e = dequantize_rows(stream, {.w = view,
                                         .first_matrix = 0,
                                         .n_matrices = 1,
                                         .first_row = row,
                                         .n_rows = n,
                                         .out = s.panel,
                                         .bf16 = !exact}))
      return e;
    gemm.w = s.panel;
    gemm.w_stride = view.cols;
    gemm.n_cols = n;
    gemm.out = p.out + row;
    if (int e = device.gemm(gemm)) return e;
  }
  return 0;
}

}  // namespace

Int8Rows carve_int8(Workspace& space, int64_t n_rows, int64_t cols) noexcept {
  Int8Rows rows{};
  rows.codes = space.take<uint8_t>(n_rows * cols);
  rows.scales = space.take<Int8Scale>(n_rows * cols / 16);
  return rows;
}

ProductScratch carve_product(Workspace& space, const Weight& w, int64_t n_rows,
                             bool exact) noexcept {
  ProductScratch s;
  // Also where more rows have no use for it: a longer pass asks for no less.
  if (takes_int8(w, exact)) s.int8 = carve_int8(space, std::min(n_rows, kFewRows), w.cols);
  if (product_method(exact, n_rows) != Method::kGemm) return s;
  if (!exact) s.x = space.take<uint16_t>(n_rows * w.cols);
  if (!is_plain(w, exact)) {
    s.panel_rows = std::clamp(kPanelValues / w.cols / kPanelUnit * kPanelUnit, kPanelUnit,
                              (w.rows + kPanelUnit - 1) / kPanelUnit * kPanelUnit);
    s.panel = space.take_bytes(s.panel_rows * w.cols * (exact ? 4 : 2));
  }
  s.gemm = space.take_bytes(kGemmWorkspaceBytes);
  return s;
}

int multiply(Device& device, const MatmulParams& p, bool exact, const ProductScratch& s) noexcept {
  const Method method = product_method(exact, p.n_rows);
  if (method == Method::kGemm) return multiply_gemm(device, p, exact, s);
  const ProductParams product{.w = view_of(*p.w),
                              .up = {},
                              .x = p.x,
                              .x_stride = p.x_stride,
                              .x_matrix_stride = 0,
                              .out = p.out,
                              .out_stride = p.out_stride,
                              .out_matrix_stride = 0,
                              .n_rows = p.n_rows,
                              .add = p.add,
                              .groups = {}};
  const Stream stream = device.stream();
  if (method == Method::kTiles) return product_tiles(stream, product);
  if (!takes_int8(*p.w, exact)) return product_few_rows(stream, product);
  if (int e = round_to_int8(stream, p.x, p.x_stride, p.n_rows, p.w->cols, s.int8)) return e;
  return product_int8(stream, product, s.int8);
}

// ---- matmul, heads_matmul ---------------------------------------------------------------------

int64_t CudaBackend::workspace_bytes(const MatmulParams& p) const noexcept {
  Workspace counting;
  carve_product(counting, *p.w, p.n_rows, exact() || p.exact);
  return counting.peak_bytes();
}

void CudaBackend::matmul(const OpContext& op, const MatmulParams& p) noexcept {
  if (p.n_rows == 0) return;
  Workspace space(op);
  const bool f32 = exact() || p.exact;
  check(op, multiply(*device_, p, f32, carve_product(space, *p.w, p.n_rows, f32)));
}

int64_t CudaBackend::workspace_bytes(const HeadsMatmulParams&) const noexcept {
  return 0;
}

void CudaBackend::heads_matmul(const OpContext& op, const HeadsMatmulParams& p) noexcept {
  if (p.n_tokens == 0) return;
  const ProductParams product{.w = view_of(*p.w),
                              .up = {},
                              .x = p.x,
                              .x_stride = p.x_token_stride,
                              .x_matrix_stride = p.x_head_stride,
                              .out = p.out,
                              .out_stride = p.out_token_stride,
                              .out_matrix_stride = p.out_head_stride,
                              .n_rows = p.n_tokens,
                              .add = false,
                              .groups = {}};
  const Stream stream = device_->stream();
  if (p.transposed)
    check(op, product_transposed(stream, product));
  else if (exact() || p.n_tokens <= kFewRows)
    check(op, product_few_rows(stream, product));
  else
    check(op, product_tiles(stream, product));
}

}  // namespace fathom::cuda
