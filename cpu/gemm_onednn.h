// Products of bf16 matrices by oneDNN: the one file that knows it is gemm_onednn.cc.  In a build
// without oneDNN, and on machines without bf16 instructions, every product is refused and the
// caller's own kernels serve.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fathom::cpu {

// Whether this build and this machine have it; why not, for describe(): a static string.
bool onednn_serves_bf16() noexcept;
const char* onednn_refusal() noexcept;  // empty when it serves

// out[n_rows, n_cols] = x[n_rows, k] * weights[n_cols, k] transposed; all rows dense, f32 sums.
// Making one takes some microseconds (oneDNN keeps what it has generated) and a few small heap
// blocks, so it is for many rows; decoding never comes here.
class Bf16Gemm {
 public:
  // A product of no rows or no columns is nothing to do, and not refused.
  Bf16Gemm(int64_t n_rows, int64_t n_cols, int64_t k) noexcept;
  ~Bf16Gemm();
  Bf16Gemm(Bf16Gemm&&) noexcept;

  // Scratch of such a product, without making it; 0 where it would be refused.  Also 0 where the
  // heap has nothing left to find out with; once found out, an answer is kept.
  static int64_t scratch_bytes(int64_t n_rows, int64_t n_cols, int64_t k) noexcept;
  // What oneDNN keeps for itself, for as long as the process lives, of the products of a model:
  // most of a megabyte of addresses each for generated code (a tenth of it touched), and DeepSeek's
  // dense projections have six shapes at most - three lengths of rows, whole and last slices.  The
  // workspace of matmul books it.  Repeated by: cpu_onednn_test "what oneDNN keeps*"
  static constexpr int64_t kKeptBytes = int64_t{8} << 20;

  // Also true when the heap refused oneDNN's small objects: of a product with scratch_bytes() above
  // 0 it means that.
  bool refused() const noexcept { return refused_; }
  int64_t scratch_bytes() const noexcept;  // 0 when refused
  // On the calling thread.  May be called from several threads with a scratch for each.  False when
  // the heap refused oneDNN's small objects; then `out` is undefined.
  bool run(const uint16_t* x, const uint16_t* weights, float* out,
           std::byte* scratch) const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  bool refused_ = true;
};

}  // namespace fathom::cpu
