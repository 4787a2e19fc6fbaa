// Weights, faults, and the operations that are one kernel.  Products:
// products.cc.  Attention: attention.cc.  Feed-forward and experts: feed_forward.cc.
#include "cuda/cuda_backend.h"

#include <fmt/format.h>

#include <algorithm>

#include "cuda/kv_view.h"
#include "cuda/products.h"
#include "cuda/weights.h"
#include "fathom/quant.hpp"

namespace fathom::cuda {

std::string CudaBackend::describe() const {
  const LaunchQueue::Counts steps = device_->queue().counts();
  return fmt::format(
      "{}, numerics {}\n"
      "  products: own kernels below {} rows, then dequantised panels and cuBLASLt\n"
      "  steps: {} graphs made, run {} times, {} nodes updated{}\n",
      device_->describe(), exact() ? "exact" : "fast", exact() ? 9 : 64, steps.graphs_made,
      steps.graph_runs, steps.nodes_updated, steps.off ? "; off, the driver refused one" : "");
}

// ---- weights ----------------------------------------------------------------------------------

Status CudaBackend::weight_layout(Weight& weight) const noexcept {
  FATHOM_TRY(cuda::weight_layout(weight));
  const WeightView view = view_of(weight);
  if (view.code_stride + view.meta_stride > kStagingBytes)
    return Status(Code::kUnsupported, "a row of a weight is longer than the staging buffer");
  return {};
}

Status CudaBackend::store_rows(const Weight& weight, int64_t index, int64_t first_row,
                               int64_t n_rows, const void* rows) noexcept try {
  if (index < 0 || index >= weight.count || first_row < 0 || n_rows < 0 ||
      first_row + n_rows > weight.rows)
    return Status(Code::kInvalidArgument,
                  fmt::format("rows {} + {} of matrix {} do not fit {} matrices of {} rows",
                              first_row, n_rows, index, weight.count, weight.rows));
  const WeightView view = view_of(weight);
  auto* matrix = reinterpret_cast<uint8_t*>(weight.matrix(index));
  const auto* src = static_cast<const uint8_t*>(rows);
  const int64_t step = kStagingBytes / (view.code_stride + view.meta_stride);
  const int64_t file_bytes = row_bytes(weight.dtype, weight.cols);
  const std::lock_guard lock(staging_mutex_);
  for (int64_t row = 0; row < n_rows; row += step) {
    const int64_t n = std::min(step, n_rows - row), at = first_row + row;
    auto* codes = reinterpret_cast<uint8_t*>(device_->staging());
    uint8_t* meta = codes + n * view.code_stride;
    split_rows(view, n, src + row * file_bytes, codes, meta);
    FATHOM_TRY(device_->upload(matrix + at * view.code_stride, codes, n * view.code_stride));
    if (view.meta_stride > 0)
      FATHOM_TRY(device_->upload(matrix + view.meta_at + at * view.meta_stride, meta,
                                 n * view.meta_stride));
  }
  return {};
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for a message");
}

Status CudaBackend::store_scales(const Weight& weight, int64_t index, const float* scales) noexcept
    try {
  if (!weight.block_scaled || index < 0 || index >= weight.count)
    return Status(Code::kInvalidArgument,
                  fmt::format("scales for matrix {} of {} ({})", index, weight.count,
                              weight.block_scaled ? "block-scaled" : "without block scales"));
  const auto blocks = [](int64_t n) { return (n + kF8ScaleBlock - 1) / kF8ScaleBlock; };
  return device_->upload(weight.matrix(index) + view_of(weight).scales_at, scales,
                         blocks(weight.rows) * blocks(weight.cols) * 4);
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for a message");
}

// ---- faults -----------------------------------------------------------------------------------

void CudaBackend::check(const OpContext& op, int error) noexcept {
  if (error == 0) return;
  const std::lock_guard lock(faults_mutex_);
  for (int i = 0; i < n_faults_; ++i)
    if (faults_[i].context == op.workspace) return;
  if (n_faults_ < kMaxFaults)
    faults_[n_faults_++] = {op.workspace, error};
  else
    lost_ = error;
}

Status CudaBackend::sync(const OpContext& op) noexcept try {
  Status waited = device_->wait();
  int error = 0;
  {
    const std::lock_guard lock(faults_mutex_);
    error = lost_;
    // Faults of operations without a context (rewritten pages) go to whoever waits first.
    for (int i = n_faults_ - 1; i >= 0; --i)
      if (faults_[i].context == op.workspace || faults_[i].context == nullptr) {
        error = faults_[i].error;
        faults_[i] = faults_[--n_faults_];
      }
  }
  if (!waited.ok()) return waited;
  if (error != 0)
    return Status(Code::kDevice, fmt::format("{}: a kernel could not be started: {}", name(),
                                             device_->error_text(error)));
  return {};
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for a message");
}

// ---- operations of one kernel -----------------------------------------------------------------

// A pass of few rows begins on this device: with the embedding, or with the rotations of its first
// layer.  What a longer pass queues keeps the device busy as it is.
void CudaBackend::begin_pass(int64_t n_rows) noexcept {
  if (n_rows <= kFewRows) device_->queue().begin();
}

void CudaBackend::embed(const OpContext& op, const EmbedParams& p) noexcept {
  begin_pass(p.n_tokens);
  check(op, cuda::embed(device_->stream(), view_of(*p.table), p));
}
void CudaBackend::rms_norm(const OpContext& op, const RmsNormParams& p) noexcept {
  check(op, cuda::rms_norm(device_->stream(), p));
}
void CudaBackend::rope_table(const OpContext& op, const RopeTableParams& p) noexcept {
  begin_pass(p.n_tokens);
  check(op, cuda::rope_table(device_->stream(), p));
}
void CudaBackend::rope(const OpContext& op, const RopeParams& p) noexcept {
  check(op, cuda::rope(device_->stream(), p));
}
void CudaBackend::add(const OpContext& op, const AddParams& p) noexcept {
  check(op, cuda::add(device_->stream(), p));
}
void CudaBackend::route(const OpContext& op, const RouteParams& p) noexcept {
  check(op, cuda::route(device_->stream(), p));
}
void CudaBackend::sum_experts(const OpContext& op, const SumExpertsParams& p) noexcept {
  check(op, cuda::sum_experts(device_->stream(), p));
}
void CudaBackend::kv_append(const OpContext& op, const KvAppendParams& p) noexcept {
  const int64_t end = p.rows.first_row + p.rows.n_rows;
  for (int64_t row = p.rows.first_row; row < end;) {
    const int64_t done = row - p.rows.first_row;
    AppendParams part{.kv = p.kv + done * p.kv_stride,
                      .kv_stride = p.kv_stride,
                      .norm_weight = p.norm_weight,
                      .eps = p.eps,
                      .cos_sin = p.cos_sin + done * p.rows.layout.qk_rope_head_dim,
                      .rows = {}};
    row = make_view(p.rows, row, end, 1, part.rows);
    check(op, cuda::kv_append(device_->stream(), part));
  }
}
void CudaBackend::kv_convert(const OpContext& op, const KvConvertParams& p) noexcept {
  check(op, cuda::kv_convert(device_->stream(), p));
}

// ---- sampling ---------------------------------------------------------------------------------

namespace {

struct TopKScratch {
  TokenLogit *found, *broken;
};
TopKScratch carve(Workspace& space, const TopKParams& p) noexcept {
  const int64_t slices = p.n_rows * top_k_slices(p.n_cols);
  TopKScratch s{};
  s.found = space.take<TokenLogit>(slices * p.k);
  s.broken = space.take<TokenLogit>(slices);
  return s;
}

}  // namespace

int64_t CudaBackend::workspace_bytes(const TopKParams& p) const noexcept {
  Workspace counting;
  carve(counting, p);
  return counting.peak_bytes();
}

void CudaBackend::top_k(const OpContext& op, const TopKParams& p) noexcept {
  Workspace space(op);
  const TopKScratch s = carve(space, p);
  check(op, cuda::top_k(device_->stream(), p, s.found, s.broken));
}

}  // namespace fathom::cuda
