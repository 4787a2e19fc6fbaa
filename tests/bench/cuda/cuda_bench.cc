// cuda_bench PLUGIN: what the kernels of the CUDA backend reach on this machine's first GPU,
// against a plain copy and cuBLASLt measured in the same run.  For `cmake/dev test cuda`.
//
// Every figure is the best of several runs of many calls between two waits.  Weights and rows are
// zeros: their values do not change the work.
#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/gpu_gemm.h"
#include "fathom/tensor.hpp"
#include "lib/run/backend_plugin.h"

using namespace fathom;

namespace {

[[noreturn]] void fail(std::string_view text) {
  fmt::print(stderr, "cuda_bench: {}\n", text);
  std::exit(1);
}
void check(const Status& status) {
  if (!status.ok()) fail(status.message());
}

class Buffer {
 public:
  Buffer(Backend& device, int64_t bytes) : device_(device) {
    const int64_t unit = device.granularity();
    bytes_ = std::max<int64_t>(1, (bytes + unit - 1) / unit) * unit;
    auto base = device.reserve(bytes_);
    check(base.status());
    base_ = *base;
    check(device.commit(base_, 0, bytes_));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { device_.release(base_, bytes_); }
  template <class T = float>
  T* data() const {
    return static_cast<T*>(base_);
  }

 private:
  Backend& device_;
  void* base_ = nullptr;
  int64_t bytes_ = 0;
};

double seconds_per_call(Backend& device, const OpContext& op, const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  const auto run = [&](int n) {
    check(device.sync(op));
    const auto start = Clock::now();
    for (int i = 0; i < n; ++i) call();
    check(device.sync(op));
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  run(2);
  const int n = std::clamp(static_cast<int>(0.05 / std::max(run(3) / 3, 1e-7)), 3, 2000);
  double best = 1e9;
  for (int i = 0; i < 5; ++i) best = std::min(best, run(n) / n);
  return best;
}

struct Weights {
  Weight weight;
  std::unique_ptr<Buffer> memory;
  Weights(Backend& device, DType dtype, int64_t rows, int64_t cols)
      : weight{.dtype = dtype, .rows = rows, .cols = cols} {
    check(device.weight_layout(weight));
    memory = std::make_unique<Buffer>(device, weight.matrix_bytes);
    weight.data = memory->data<void>();
  }
};

// Bytes per second that a copy reads and writes.
double copy_bandwidth(Backend& device) {
  constexpr int64_t kBytes = int64_t{1} << 30;
  const Buffer from(device, kBytes), to(device, kBytes);
  const double seconds = seconds_per_call(device, {}, [&] {
    cudaMemcpyAsync(to.data<void>(), from.data<void>(), kBytes, cudaMemcpyDeviceToDevice, nullptr);
    cudaStreamSynchronize(nullptr);
  });
  return 2.0 * kBytes / seconds;
}

void bench_gemv(Backend& device, double copy) {
  constexpr int64_t kRows = 16384, kCols = 7168;
  fmt::print("\nproduct with one row, {} x {}\n", kRows, kCols);
  for (const DType dtype : {DType::kQ8_0, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K, DType::kQ4_0,
                            DType::kIQ4_XS, DType::kF8E4M3, DType::kBF16})
    for (const int64_t n : {1, 8}) {
      const Weights w(device, dtype, kRows, kCols);
      const Buffer x(device, n * kCols * 4), out(device, n * kRows * 4);
      const MatmulParams p{x.data(), kCols, n, &w.weight, out.data(), kRows};
      const Buffer space(device, device.workspace_bytes(p));
      const OpContext op{space.data<void>(), device.workspace_bytes(p)};
      const double seconds = seconds_per_call(device, op, [&] { device.matmul(op, p); });
      const double rate = double(kRows) * double(row_bytes(dtype, kCols)) / seconds;
      fmt::print("  {:8} rows {}  {:7.1f} us  {:7.1f} GB/s  {:3.0f} % of copy\n",
                 dtype_info(dtype).name, n, seconds * 1e6, rate / 1e9, 100 * rate / copy);
    }
}

// Returns the rate of the library's bf16 product.
double bench_gemm(Backend& device) {
  constexpr int64_t kRows = 8192, kCols = 7168, kTokens = 2048;
  const double flops = 2.0 * kRows * kCols * kTokens;
  auto library = cuda::open_gemm_library();
  check(library.status());
  const Buffer x(device, kTokens * kCols * 4), w(device, kRows * kCols * 2),
      out(device, kTokens * kRows * 4), space(device, cuda::kGemmWorkspaceBytes);
  const cuda::GemmParams gemm{.x = x.data(),
                              .x_stride = kCols,
                              .x_batch_stride = 0,
                              .w = w.data(),
                              .w_stride = kCols,
                              .w_batch_stride = 0,
                              .w_is_turned = false,
                              .out = out.data(),
                              .out_stride = kRows,
                              .out_batch_stride = 0,
                              .n_rows = kTokens,
                              .n_cols = kRows,
                              .k = kCols,
                              .n_batch = 1,
                              .bf16 = true,
                              .out_bf16 = false,
                              .add = false,
                              .workspace = space.data<void>()};
  const double library_seconds = seconds_per_call(device, {}, [&] {
    if ((*library)->gemm(nullptr, gemm) != 0) fail("cuBLASLt refused the product");
    cudaStreamSynchronize(nullptr);
  });
  const double rate = flops / library_seconds;
  fmt::print("\nproduct with {} rows, {} x {}: cuBLASLt bf16 {:.1f} TFLOP/s\n", kTokens, kRows,
             kCols, rate / 1e12);
  for (const DType dtype : {DType::kBF16, DType::kQ8_0, DType::kQ4_K})
    for (const int64_t n : {int64_t{32}, int64_t{512}, kTokens}) {
      const Weights weights(device, dtype, kRows, kCols);
      const MatmulParams p{x.data(), kCols, n, &weights.weight, out.data(), kRows};
      const Buffer scratch(device, device.workspace_bytes(p));
      const OpContext op{scratch.data<void>(), device.workspace_bytes(p)};
      const double seconds = seconds_per_call(device, op, [&] { device.matmul(op, p); });
      const double reached = 2.0 * kRows * kCols * double(n) / seconds;
      fmt::print("  {:8} rows {:5}  {:8.1f} us  {:6.1f} TFLOP/s  {:3.0f} % of cuBLASLt\n",
                 dtype_info(dtype).name, n, seconds * 1e6, reached / 1e12, 100 * reached / rate);
    }
  return rate;
}

void bench_attention(Backend& device, double copy, double gemm) {
  fmt::print("\nabsorbed attention, one layer, latent 512 + rope 64\n");
  constexpr int64_t kRank = 512, kRope = 64, kPageTokens = 64;
  const KvLayout layout{kPageTokens, kRank, kRope};
  for (const KvType type : {KvType::kF16, KvType::kF8, KvType::kQ8_0, KvType::kQ4_0})
    for (const int64_t heads : {16, 128})
      for (const int64_t depth : {16384, 131072})
        for (const int64_t n_tokens : {1, 8}) {
          const int64_t n_pages = depth / kPageTokens, page = layout.page_bytes(type, 1);
          const Buffer rows(device, n_pages * page);
          std::vector<KvPage> pages;
          for (int64_t i = 0; i < n_pages; ++i)
            pages.push_back({rows.data<std::byte>() + i * page, type});
          const int64_t columns = n_tokens * heads;
          const Buffer q(device, columns * (kRank + kRope) * 4), out(device, columns * kRank * 4),
              state(device, 2 * columns * 4);
          const AttendAbsorbedParams p{.q_latent = q.data(),
                                       .q_latent_token_stride = heads * kRank,
                                       .q_latent_head_stride = kRank,
                                       .q_rope = q.data() + columns * kRank,
                                       .q_rope_token_stride = heads * kRope,
                                       .q_rope_head_stride = kRope,
                                       .n_tokens = n_tokens,
                                       .n_heads = heads,
                                       .first_position = depth - n_tokens,
                                       .scale = 0.1f,
                                       .rows = {pages.data(), layout, 0, 0, depth},
                                       .state = {state.data(), state.data() + columns},
                                       .out = out.data()};
          const Buffer space(device, device.workspace_bytes(p));
          const OpContext op{space.data<void>(), device.workspace_bytes(p)};
          const double seconds =
              seconds_per_call(device, op, [&] { device.attend_absorbed(op, p); });
          const double bytes =
              double(depth) * double(layout.latent_row_bytes(type) + layout.rope_row_bytes(type));
          const double flops = 2.0 * double(columns) * double(depth) * (2 * kRank + kRope);
          fmt::print(
              "  {:5} heads {:3} depth {:6} tokens {}  {:8.1f} us  {:7.1f} GB/s {:3.0f} % of "
              "copy  {:6.1f} TFLOP/s {:3.0f} % of cuBLASLt\n",
              kv_type_name(type), heads, depth, n_tokens, seconds * 1e6, bytes / seconds / 1e9,
              100 * bytes / seconds / copy, flops / seconds / 1e12, 100 * flops / seconds / gemm);
        }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) fail("usage: cuda_bench /path/to/libfathom_cuda.so");
  auto device = run::open_plugin_device(argv[1], {.name = "cuda:0"});
  check(device.status());
  fmt::print("{}", (*device)->describe());
  const double copy = copy_bandwidth(**device);
  fmt::print("\ncopy: {:.1f} GB/s read and written\n", copy / 1e9);
  bench_gemv(**device, copy);
  const double gemm = bench_gemm(**device);
  bench_attention(**device, copy, gemm);
  return 0;
}
