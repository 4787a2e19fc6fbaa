// The only file that knows cuBLASLt.
#include "cuda/gpu_gemm.h"

#include <cublasLt.h>
#include <fmt/format.h>

#include <array>
#include <mutex>

#include "cuda/shared_library.h"

namespace fathom::cuda {
namespace {

// The functions used here, by their own types.
struct Functions {
  decltype(cublasLtCreate)* create = nullptr;
  decltype(cublasLtDestroy)* destroy = nullptr;
  decltype(cublasLtGetVersion)* version = nullptr;
  decltype(cublasLtMatmul)* matmul = nullptr;
  decltype(cublasLtMatmulDescCreate)* desc_create = nullptr;
  decltype(cublasLtMatmulDescDestroy)* desc_destroy = nullptr;
  decltype(cublasLtMatmulDescSetAttribute)* desc_set = nullptr;
  decltype(cublasLtMatrixLayoutCreate)* layout_create = nullptr;
  decltype(cublasLtMatrixLayoutDestroy)* layout_destroy = nullptr;
  decltype(cublasLtMatrixLayoutSetAttribute)* layout_set = nullptr;
  decltype(cublasLtMatmulPreferenceCreate)* preference_create = nullptr;
  decltype(cublasLtMatmulPreferenceDestroy)* preference_destroy = nullptr;
  decltype(cublasLtMatmulPreferenceSetAttribute)* preference_set = nullptr;
  decltype(cublasLtMatmulAlgoGetHeuristic)* heuristic = nullptr;
};

Result<Functions> find_functions(const SharedLibrary& library) {
  Functions f;
  FATHOM_TRY(library.find("cublasLtCreate", f.create));
  FATHOM_TRY(library.find("cublasLtDestroy", f.destroy));
  FATHOM_TRY(library.find("cublasLtGetVersion", f.version));
  FATHOM_TRY(library.find("cublasLtMatmul", f.matmul));
  FATHOM_TRY(library.find("cublasLtMatmulDescCreate", f.desc_create));
  FATHOM_TRY(library.find("cublasLtMatmulDescDestroy", f.desc_destroy));
  FATHOM_TRY(library.find("cublasLtMatmulDescSetAttribute", f.desc_set));
  FATHOM_TRY(library.find("cublasLtMatrixLayoutCreate", f.layout_create));
  FATHOM_TRY(library.find("cublasLtMatrixLayoutDestroy", f.layout_destroy));
  FATHOM_TRY(library.find("cublasLtMatrixLayoutSetAttribute", f.layout_set));
  FATHOM_TRY(library.find("cublasLtMatmulPreferenceCreate", f.preference_create));
  FATHOM_TRY(library.find("cublasLtMatmulPreferenceDestroy", f.preference_destroy));
  FATHOM_TRY(library.find("cublasLtMatmulPreferenceSetAttribute", f.preference_set));
  FATHOM_TRY(library.find("cublasLtMatmulAlgoGetHeuristic", f.heuristic));
  return f;
}

// A description of the library's, destroyed with this.
template <class Handle>
class Owned {
 public:
  explicit Owned(cublasStatus_t (*destroy)(Handle)) noexcept : destroy_(destroy) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (handle != nullptr) destroy_(handle);
  }
  Handle handle = nullptr;

 private:
  cublasStatus_t (*destroy_)(Handle);
};

// Bytes that an address is a multiple of, as far as the library cares.
uint32_t alignment_of(const void* p) noexcept {
  const auto bits = reinterpret_cast<uintptr_t>(p) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// What the choice of an algorithm depends on: the shape of a product, and how its operands lie.
struct Shape {
  int64_t n_rows, n_cols, k, n_batch, x_stride, w_stride, out_stride;
  bool turned, bf16, out_bf16, add;
  uint32_t w_alignment, x_alignment, out_alignment;
  bool operator==(const Shape&) const = default;
};

class LtLibrary final : public GemmLibrary {
 public:
  LtLibrary(Functions functions, cublasLtHandle_t handle) noexcept
      : f_(functions), handle_(handle) {}
  ~LtLibrary() override { f_.destroy(handle_); }

  std::string version() const override { return fmt::format("cuBLASLt {}", f_.version()); }

  int gemm(void* stream, const GemmParams& p) noexcept override {
    const cublasStatus_t status = run(static_cast<cudaStream_t>(stream), p);
    return status == CUBLAS_STATUS_SUCCESS ? 0 : kGemmError + static_cast<int>(status);
  }

 private:
#define FATHOM_LT(call) \
  if (const cublasStatus_t status = (call); status != CUBLAS_STATUS_SUCCESS) return status

  cublasStatus_t layout(Owned<cublasLtMatrixLayout_t>& out, cudaDataType_t type, int64_t rows,
                        int64_t cols, int64_t stride, int64_t n_batch, int64_t batch_stride) {
    FATHOM_LT(f_.layout_create(&out.handle, type, static_cast<uint64_t>(rows),
                               static_cast<uint64_t>(cols), stride));
    const auto count = static_cast<int32_t>(n_batch);
    FATHOM_LT(f_.layout_set(out.handle, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    return f_.layout_set(out.handle, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &batch_stride,
                         sizeof batch_stride);
  }

  // Row-major out = x w^T is, in the library's columns, out^T = w x^T: w comes first.
  cublasStatus_t run(cudaStream_t stream, const GemmParams& p) {
    const cudaDataType_t in = p.bf16 ? CUDA_R_16BF : CUDA_R_32F;
    const cudaDataType_t result = p.out_bf16 ? CUDA_R_16BF : CUDA_R_32F;
    Owned<cublasLtMatmulDesc_t> desc(f_.desc_destroy);
    // f32 means f32: no TF32, which would round the factors to 11 bits.
    FATHOM_LT(f_.desc_create(&desc.handle, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t turn = p.w_is_turned ? CUBLAS_OP_N : CUBLAS_OP_T;
    FATHOM_LT(f_.desc_set(desc.handle, CUBLASLT_MATMUL_DESC_TRANSA, &turn, sizeof turn));
    Owned<cublasLtMatrixLayout_t> w(f_.layout_destroy), x(f_.layout_destroy),
        out(f_.layout_destroy);
    FATHOM_LT(layout(w, in, p.w_is_turned ? p.n_cols : p.k, p.w_is_turned ? p.k : p.n_cols,
                     p.w_stride, p.n_batch, p.w_batch_stride));
    FATHOM_LT(layout(x, in, p.k, p.n_rows, p.x_stride, p.n_batch, p.x_batch_stride));
    FATHOM_LT(layout(out, result, p.n_cols, p.n_rows, p.out_stride, p.n_batch, p.out_batch_stride));

    const Shape shape{.n_rows = p.n_rows,
                      .n_cols = p.n_cols,
                      .k = p.k,
                      .n_batch = p.n_batch,
                      .x_stride = p.x_stride,
                      .w_stride = p.w_stride,
                      .out_stride = p.out_stride,
                      .turned = p.w_is_turned,
                      .bf16 = p.bf16,
                      .out_bf16 = p.out_bf16,
                      .add = p.add,
                      .w_alignment = alignment_of(p.w),
                      .x_alignment = alignment_of(p.x),
                      .out_alignment = alignment_of(p.out)};
    cublasLtMatmulAlgo_t algo;
    FATHOM_LT(choose(shape, desc.handle, w.handle, x.handle, out.handle, algo));
    const float one = 1, beta = p.add ? 1.0f : 0.0f;
    return f_.matmul(handle_, desc.handle, &one, p.w, w.handle, p.x, x.handle, &beta, p.out,
                     out.handle, p.out, out.handle, &algo, p.workspace,
                     static_cast<size_t>(kGemmWorkspaceBytes), stream);
  }

  // The library's first suggestion, remembered: asking costs more than a small product.
  cublasStatus_t choose(const Shape& shape, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t w,
                        cublasLtMatrixLayout_t x, cublasLtMatrixLayout_t out,
                        cublasLtMatmulAlgo_t& algo) {
    const std::lock_guard lock(mutex_);
    for (const Choice& choice : choices_)
      if (choice.known && choice.shape == shape) {
        algo = choice.algo;
        return CUBLAS_STATUS_SUCCESS;
      }
    Owned<cublasLtMatmulPreference_t> preference(f_.preference_destroy);
    FATHOM_LT(f_.preference_create(&preference.handle));
    const auto bytes = static_cast<size_t>(kGemmWorkspaceBytes);
    FATHOM_LT(f_.preference_set(preference.handle, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                sizeof bytes));
    const auto align = [&](cublasLtMatmulPreferenceAttributes_t attribute, uint32_t bytes) {
      return f_.preference_set(preference.handle, attribute, &bytes, sizeof bytes);
    };
    FATHOM_LT(align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, shape.w_alignment));
    FATHOM_LT(align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, shape.x_alignment));
    FATHOM_LT(align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, shape.out_alignment));
    FATHOM_LT(align(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, shape.out_alignment));
    cublasLtMatmulHeuristicResult_t found;
    int n_found = 0;
    FATHOM_LT(f_.heuristic(handle_, desc, w, x, out, out, preference.handle, 1, &found, &n_found));
    if (n_found == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
    algo = found.algo;
    choices_[next_++ % choices_.size()] = {true, shape, algo};
    return CUBLAS_STATUS_SUCCESS;
  }
#undef FATHOM_LT

  struct Choice {
    bool known = false;
    Shape shape{};
    cublasLtMatmulAlgo_t algo{};
  };
  const Functions f_;
  const cublasLtHandle_t handle_;
  std::mutex mutex_;
  std::array<Choice, 64> choices_;  // the last of them; a model has a dozen shapes
  size_t next_ = 0;
};

}  // namespace

Result<std::unique_ptr<GemmLibrary>> open_gemm_library() {
  FATHOM_TRY_ASSIGN(const SharedLibrary library,
                    SharedLibrary::open({"libcublasLt.so.13", "libcublasLt.so"}));
  FATHOM_TRY_ASSIGN(const Functions functions, find_functions(library));
  cublasLtHandle_t handle = nullptr;
  if (const cublasStatus_t status = functions.create(&handle); status != CUBLAS_STATUS_SUCCESS)
    return Status(Code::kDevice, fmt::format("{}: cublasLtCreate failed with status {}",
                                             library.name(), static_cast<int>(status)));
  return std::unique_ptr<GemmLibrary>(std::make_unique<LtLibrary>(functions, handle));
}

}  // namespace fathom::cuda
