// cuda_bench PLUGIN gemv|gemm|attention [--tiny]: what the kernels of the CUDA backend reach on
// this machine's first GPU, against a plain copy and cuBLASLt measured in the same run.  For
// `cmake/dev test cuda`; with --tiny, over the emulated plug-in, only to see that it runs.
//
// Every figure is the best of several runs of many calls between two waits.  Weights and rows are
// zeros: their values do not change the work.
#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fathom/tensor.hpp"
#include "lib/run/backend_plugin.h"
#include "report.h"
#include "yardstick.h"

using namespace fathom;
using test::must;

namespace {

// What the issue asks for.
constexpr double kCopyShare = 0.8, kGemmShare = 0.7;

struct Sizes {
  int64_t copy_bytes, gemv_rows, gemm_rows, cols, gemm_tokens;
  std::vector<int64_t> heads, depths, batches;
  int runs;
  double seconds;  // of a run
  bool judged;     // figures say something
};
const Sizes kFull{.copy_bytes = int64_t{1} << 30,
                  .gemv_rows = 16384,
                  .gemm_rows = 8192,
                  .cols = 7168,
                  .gemm_tokens = 2048,
                  .heads = {16, 128},
                  .depths = {16384, 65536, 131072},
                  .batches = {1, 8, 64},
                  .runs = 5,
                  .seconds = 0.02,
                  .judged = true};
const Sizes kTiny{.copy_bytes = 1 << 20,
                  .gemv_rows = 32,
                  .gemm_rows = 64,
                  .cols = 256,
                  .gemm_tokens = 96,
                  .heads = {4},
                  .depths = {256},
                  .batches = {1, 2},
                  .runs = 1,
                  .seconds = 0,
                  .judged = false};

class Buffer {
 public:
  Buffer(Backend& device, int64_t bytes) : device_(device) {
    const int64_t unit = device.granularity();
    bytes_ = std::max<int64_t>(1, (bytes + unit - 1) / unit) * unit;
    base_ = must(device.reserve(bytes_));
    must(device.commit(base_, 0, bytes_));
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

class Bench {
 public:
  Bench(Backend& device, const Sizes& sizes) : device_(device), sizes_(sizes) {}

  void gemv() {
    const double copy = copy_rate();
    for (const DType dtype : {DType::kQ8_0, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K, DType::kQ4_0,
                              DType::kIQ4_XS, DType::kF8E4M3, DType::kBF16})
      for (const int64_t n : {1, 8}) {
        const double seconds = product(dtype, sizes_.gemv_rows, n);
        const double rate =
            double(sizes_.gemv_rows) * double(row_bytes(dtype, sizes_.cols)) / seconds;
        const std::string name = fmt::format("gemv {} x{}", dtype_info(dtype).name, n);
        const std::string figure =
            fmt::format("{} x {}: {:.1f} us, {:.1f} GB/s, {:.0f} % of copy", sizes_.gemv_rows,
                        sizes_.cols, seconds * 1e6, rate / 1e9, 100 * rate / copy);
        if (n == 1)
          judge(name, figure, rate >= kCopyShare * copy);
        else
          test::report(name, figure);
      }
  }

  void gemm() {
    const double library = library_rate();
    for (const DType dtype : {DType::kBF16, DType::kQ8_0, DType::kQ4_K})
      for (const int64_t n :
           {int64_t{16}, int64_t{32}, sizes_.gemm_tokens / 4, sizes_.gemm_tokens}) {
        const double seconds = product(dtype, sizes_.gemm_rows, n);
        const double rate = 2.0 * double(sizes_.gemm_rows * sizes_.cols * n) / seconds;
        const std::string name = fmt::format("gemm {} x{}", dtype_info(dtype).name, n);
        const std::string figure = fmt::format(
            "{} x {}: {:.1f} us, {:.1f} TFLOP/s, {:.0f} % of cuBLASLt", sizes_.gemm_rows,
            sizes_.cols, seconds * 1e6, rate / 1e12, 100 * rate / library);
        if (n == sizes_.gemm_tokens)
          judge(name, figure, rate >= kGemmShare * library);
        else
          test::report(name, figure);
      }
  }

  void attention() {
    const double copy = copy_rate(), library = library_rate();
    for (const KvType type : {KvType::kF16, KvType::kF8, KvType::kQ8_0, KvType::kQ4_0})
      for (const int64_t heads : sizes_.heads)
        for (const int64_t depth : sizes_.depths)
          for (const int64_t batch : sizes_.batches)
            attend(type, heads, depth, batch, copy, library);
  }

 private:
  void judge(const std::string& name, const std::string& figure, bool reached) const {
    if (sizes_.judged)
      test::report(name, figure, reached);
    else
      test::report(name, figure);
  }

  double seconds_per_call(const OpContext& op, const std::function<void(int n)>& calls) {
    using Clock = std::chrono::steady_clock;
    const auto run = [&](int n) {
      must(device_.sync(op));
      const auto start = Clock::now();
      calls(n);
      must(device_.sync(op));
      return std::chrono::duration<double>(Clock::now() - start).count();
    };
    run(1);
    const int n = std::clamp(static_cast<int>(sizes_.seconds / std::max(run(1), 1e-7)), 1, 2000);
    double best = 1e9;
    for (int i = 0; i < sizes_.runs; ++i) best = std::min(best, run(n) / n);
    return best;
  }

  // Bytes per second that a copy reads and writes.
  double copy_rate() {
    const Buffer from(device_, sizes_.copy_bytes), to(device_, sizes_.copy_bytes);
    const double seconds = seconds_per_call({}, [&](int n) {
      yardstick_->copy(to.data<void>(), from.data<void>(), sizes_.copy_bytes, n);
    });
    const double rate = 2.0 * double(sizes_.copy_bytes) / seconds;
    test::report("copy", fmt::format("{:.1f} GB/s read and written", rate / 1e9));
    return rate;
  }

  // Operations per second of the library's product in bf16.
  double library_rate() {
    const int64_t rows = sizes_.gemm_rows, cols = sizes_.cols, tokens = sizes_.gemm_tokens;
    const Buffer x(device_, tokens * cols * 2), w(device_, rows * cols * 2),
        out(device_, tokens * rows * 4), space(device_, cuda::kGemmWorkspaceBytes);
    const cuda::GemmParams p{.x = x.data(),
                             .x_stride = cols,
                             .x_batch_stride = 0,
                             .w = w.data(),
                             .w_stride = cols,
                             .w_batch_stride = 0,
                             .w_is_turned = false,
                             .out = out.data(),
                             .out_stride = rows,
                             .out_batch_stride = 0,
                             .n_rows = tokens,
                             .n_cols = rows,
                             .k = cols,
                             .n_batch = 1,
                             .bf16 = true,
                             .out_bf16 = false,
                             .add = false,
                             .workspace = space.data<void>()};
    const double seconds = seconds_per_call({}, [&](int n) { yardstick_->gemm(p, n); });
    const double rate = 2.0 * double(rows * cols * tokens) / seconds;
    test::report("cuBLASLt bf16",
                 fmt::format("{} x {} x {}: {:.1f} TFLOP/s", tokens, rows, cols, rate / 1e12));
    return rate;
  }

  // Seconds of a product with n rows.
  double product(DType dtype, int64_t rows, int64_t n) {
    Weight weight{.dtype = dtype, .rows = rows, .cols = sizes_.cols};
    must(device_.weight_layout(weight));
    const Buffer memory(device_, weight.matrix_bytes), x(device_, n * sizes_.cols * 4),
        out(device_, n * rows * 4);
    weight.data = memory.data<void>();
    const MatmulParams p{x.data(), sizes_.cols, n, &weight, out.data(), rows};
    const Buffer space(device_, device_.workspace_bytes(p));
    const OpContext op{space.data<void>(), device_.workspace_bytes(p)};
    return seconds_per_call(op, [&](int calls) {
      for (int i = 0; i < calls; ++i) device_.matmul(op, p);
    });
  }

  // A step of `batch` texts of `depth` rows each, one layer, latent 512 + rope 64; in operations of
  // up to kAtOnce texts, as layers ask for.
  void attend(KvType type, int64_t heads, int64_t depth, int64_t batch, double copy,
              double library) {
    constexpr int64_t kRank = 512, kRope = 64, kPageTokens = 64, kAtOnce = 32;
    const KvLayout layout{kPageTokens, kRank, kRope};
    const int64_t n_pages = depth / kPageTokens, page = layout.page_bytes(type, 1);
    const std::string name = fmt::format("attention {} heads {} depth {} batch {}",
                                         kv_type_name(type), heads, depth, batch);
    if (batch * n_pages * page > device_.memory().free_bytes / 2)
      return test::report(name, "not measured: the rows do not fit half of the free memory");
    const Buffer rows(device_, batch * n_pages * page);
    std::vector<KvPage> pages;
    for (int64_t i = 0; i < batch * n_pages; ++i)
      pages.push_back({rows.data<std::byte>() + i * page, type});
    const int64_t columns = batch * heads;
    const Buffer q(device_, columns * (kRank + kRope) * 4), out(device_, columns * kRank * 4),
        state(device_, 2 * columns * 4);
    std::vector<AttendAbsorbedParams> texts;
    for (int64_t text = 0; text < batch; ++text)
      texts.push_back(
          {.q_latent = q.data() + text * heads * kRank,
           .q_latent_token_stride = heads * kRank,
           .q_latent_head_stride = kRank,
           .q_rope = q.data() + columns * kRank + text * heads * kRope,
           .q_rope_token_stride = heads * kRope,
           .q_rope_head_stride = kRope,
           .n_tokens = 1,
           .n_heads = heads,
           .first_position = depth - 1,
           .scale = 0.1f,
           .rows = {pages.data() + text * n_pages, layout, 0, 0, depth},
           .state = {state.data() + text * heads, state.data() + columns + text * heads},
           .out = out.data() + text * heads * kRank});
    AttendAbsorbedParams whole = texts[0];
    whole.n_tokens = std::min(batch, kAtOnce);
    const Buffer space(device_, device_.workspace_bytes(whole));
    const OpContext op{space.data<void>(), device_.workspace_bytes(whole)};
    const double seconds = seconds_per_call(op, [&](int calls) {
      for (int i = 0; i < calls; ++i)
        for (int64_t text = 0; text < batch; text += kAtOnce)
          device_.attend_texts(op, texts.data() + text, std::min(kAtOnce, batch - text));
    });
    const double bytes =
        double(batch * depth) * double(layout.latent_row_bytes(type) + layout.rope_row_bytes(type));
    const double flops = 2.0 * double(batch * heads * depth) * double(2 * kRank + kRope);
    const double by_memory = bytes / copy, by_products = flops / library;
    const std::string figure = fmt::format(
        "{:.1f} us, {:.1f} GB/s, {:.0f} % of copy; {:.1f} TFLOP/s, {:.0f} % of cuBLASLt",
        seconds * 1e6, bytes / seconds / 1e9, 100 * by_memory / seconds, flops / seconds / 1e12,
        100 * by_products / seconds);
    if (by_memory >= by_products)
      judge(name, figure, by_memory / seconds >= kCopyShare);
    else
      test::report(name, figure + " (bound by products)");
  }

  Backend& device_;
  const Sizes& sizes_;
  const std::unique_ptr<test::Yardstick> yardstick_ = test::open_yardstick();
};

}  // namespace

int main(int argc, char** argv) {
  const bool tiny = argc == 4 && std::string_view(argv[3]) == "--tiny";
  if (argc != 3 && !tiny) test::fail("usage: cuda_bench PLUGIN gemv|gemm|attention [--tiny]");
  const auto device = must(run::open_plugin_device(argv[1], {.name = "cuda:0"}));
  fmt::print("{}", device->describe());
  Bench bench(*device, tiny ? kTiny : kFull);
  const std::string_view what = argv[2];
  if (what == "gemv")
    bench.gemv();
  else if (what == "gemm")
    bench.gemm();
  else if (what == "attention")
    bench.attention();
  else
    test::fail(fmt::format("cuda_bench measures gemv, gemm or attention, not {}", what));
  return 0;
}
