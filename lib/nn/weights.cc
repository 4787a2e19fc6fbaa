// Placing weights in memory and reading them from the file.
#include "weights.h"

#include <fmt/format.h>

#include <algorithm>

namespace fathom::nn {
namespace {

// Rows per read: enough to amortise the call, few enough to stay in the outer caches.
constexpr int64_t kStagingRowsBytes = int64_t{4} << 20;
constexpr int64_t kRowGroup = 16;  // store_rows() takes multiples of it

// Bytes of one row as the file has it.
int64_t file_row_bytes(const WeightItem& item) {
  return row_bytes(item.rows.front().tensor->dtype, item.weight.cols);
}

// Rows of `item` that one staging read holds.
int64_t staging_rows(const WeightItem& item) {
  const int64_t row = file_row_bytes(item) + (item.to_f32 ? item.weight.cols * 4 : 0);
  const int64_t rows = std::max(kRowGroup, kStagingRowsBytes / row / kRowGroup * kRowGroup);
  return std::min(rows, (item.weight.rows + kRowGroup - 1) / kRowGroup * kRowGroup);
}

// The staging block of an item: raw rows, then converted rows when needed, then block scales.
struct Staging {
  std::byte* raw;
  float* f32;
  float* scales;
};
Staging carve_staging(const WeightItem& item, Arena& arena) {
  Staging s{};
  const int64_t rows = staging_rows(item);
  s.raw = arena.take<std::byte>(rows * file_row_bytes(item));
  if (item.to_f32) s.f32 = arena.take<float>(rows * item.weight.cols);
  if (const io::TensorInfo* t = item.rows.front().scales)
    s.scales = arena.take<float>(t->elements());
  return s;
}

}  // namespace

void WeightMap::carve(int device, Purpose purpose, Arena& arena) {
  for (WeightItem& item : items_) {
    if (item.device != device || item.purpose != purpose) continue;
    set_place(static_cast<size_t>(&item - items_.data()),
              item.vector != nullptr
                  ? arena.take<float>(item.weight.cols)
                  : arena.take_bytes(item.weight.count * item.weight.matrix_bytes));
  }
}

void WeightMap::set_place(size_t index, void* data) noexcept {
  WeightItem& item = items_[index];
  if (item.vector != nullptr) {
    *item.vector = static_cast<float*>(data);
  } else {
    item.weight.data = data;
    *item.target = item.weight;
  }
  if (head_is_embed_) weights_->head = weights_->embed;
}

int64_t staging_bytes(const WeightItem& item) noexcept {
  Arena arena;
  carve_staging(item, arena);
  return arena.peak_bytes();
}

int64_t WeightMap::staging_bytes() const noexcept {
  int64_t most = 0;
  for (const WeightItem& item : items_) most = std::max(most, nn::staging_bytes(item));
  return most;
}

Status load_matrix(const io::TensorFile& file, const WeightItem& item, size_t index,
                   const Weight& target, int64_t at, Backend& device, std::span<std::byte> staging,
                   const std::function<bool(int64_t)>& on_bytes, bool scales_read) {
  Arena arena(staging.data(), static_cast<int64_t>(staging.size()));
  const Staging s = carve_staging(item, arena);
  const int64_t row_size = file_row_bytes(item), cols = item.weight.cols;
  const int64_t scale_cols = (cols + 127) / 128;
  const RowSource& source = item.rows[index];
  if (source.scales != nullptr && !scales_read)
    FATHOM_TRY(file.read(*source.scales, 0,
                         std::as_writable_bytes(
                             std::span(s.scales, static_cast<size_t>(source.scales->elements())))));
  if (item.weight.block_scaled)
    FATHOM_TRY(device.store_scales(target, at, s.scales + source.first_row / 128 * scale_cols));

  const int64_t step = staging_rows(item);
  for (int64_t row = 0; row < item.weight.rows; row += step) {
    const int64_t n = std::min(step, item.weight.rows - row);
    const int64_t file_row = source.first_row + row;
    FATHOM_TRY(
        file.read(*source.tensor, file_row * row_size, {s.raw, static_cast<size_t>(n * row_size)}));
    const void* rows = s.raw;
    if (item.to_f32) {
      dequantize(source.tensor->dtype, s.raw, n * cols, s.f32);
      if (source.scales != nullptr)
        for (int64_t r = 0; r < n; ++r)
          for (int64_t c = 0; c < cols; ++c)
            s.f32[r * cols + c] *= s.scales[(file_row + r) / 128 * scale_cols + c / 128];
      rows = s.f32;
    }
    if (item.vector != nullptr) {
      FATHOM_TRY(device.upload(const_cast<float*>(*item.vector), rows, cols * 4));
    } else {
      FATHOM_TRY(device.store_rows(target, at, row, n, rows));
    }
    if (on_bytes && !on_bytes(n * row_size))
      return Status(Code::kCancelled, "loading was cancelled");
  }
  return {};
}

Status WeightMap::load(const io::TensorFile& file, const WeightItem& item, Backend& device,
                       std::span<std::byte> staging,
                       const std::function<bool(int64_t)>& on_bytes) const {
  for (size_t index = 0; index < item.rows.size(); ++index) {
    const bool same_scales = index > 0 && item.rows[index].scales == item.rows[index - 1].scales;
    FATHOM_TRY(load_matrix(file, item, index, item.weight, static_cast<int64_t>(index), device,
                           staging, on_bytes, same_scales));
  }
  return {};
}

Result<ExpertWeights> experts_on(const Backend& device, const LayerWeights& layer,
                                 int64_t n_experts) {
  ExpertWeights out = layer.experts.front();
  out.first = 0;
  for (Weight* w : {&out.gate, &out.up, &out.down}) {
    w->data = nullptr;
    w->count = n_experts;
    FATHOM_TRY(device.weight_layout(*w));
  }
  return out;
}

int64_t file_bytes(const WeightItem& item) noexcept {
  return item.weight.count * item.weight.rows * file_row_bytes(item);
}

int64_t WeightMap::file_bytes() const noexcept {
  int64_t bytes = 0;
  for (const WeightItem& item : items_) bytes += nn::file_bytes(item);
  return bytes;
}

int64_t WeightMap::n_params() const noexcept {
  int64_t n = 0;
  for (const WeightItem& item : items_)
    n += item.weight.count * item.weight.rows * item.weight.cols;
  return n;
}

int64_t WeightMap::n_params_active(const ModelConfig& c) const noexcept {
  int64_t n = 0, chosen = 0;
  for (const WeightItem& item : items_) {
    const int64_t matrix = item.weight.rows * item.weight.cols;
    if (item.purpose == Purpose::kExperts)  // spans of a layer add up to all its experts
      chosen += c.num_experts_per_tok * item.weight.count * matrix;
    else if (item.target != &weights_->embed)  // of which one row is used
      n += item.weight.count * matrix;
  }
  return n + (c.n_routed_experts > 0 ? chosen / c.n_routed_experts : 0);
}

}  // namespace fathom::nn
