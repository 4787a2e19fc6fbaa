// inspect_file and read_tensor_f32: the public view of lib/io/tensor_file.h.
#include "fathom/inspect.hpp"

#include <algorithm>
#include <new>

#include <fmt/format.h>

#include "fathom/quant.hpp"
#include "lib/io/tensor_file.h"

namespace fathom {
namespace {

constexpr int64_t kPieceElements = 16384;  // 64 KiB of values; a multiple of every block size

FileInfo describe(const io::TensorFile& file) {
  FileInfo info;
  info.format = file.format() == io::FileFormat::kGguf ? "gguf" : "safetensors";
  info.total_bytes = file.total_bytes();
  info.fingerprint_lo = file.fingerprint().lo;
  info.fingerprint_hi = file.fingerprint().hi;
  info.has_config = file.has_config();
  if (info.has_config) info.config = file.config();
  info.metadata = file.metadata();
  info.tensors.reserve(file.tensors().size());
  for (const io::TensorInfo& tensor : file.tensors())
    info.tensors.push_back({.name = tensor.name,
                            .dtype = tensor.dtype,
                            .shape = {tensor.shape, tensor.shape + tensor.n_dims},
                            .bytes = tensor.bytes});
  return info;
}

// Scales of an FP8 tensor as values, or empty when the file has none.
// Errors: kFormat for scales of another shape than ceil(rows / 128) x ceil(cols / 128).
Result<std::vector<float>> block_scales(const io::TensorFile& file, const io::TensorInfo& tensor) {
  std::vector<float> scales;
  const io::TensorInfo* stored = file.find(tensor.name + "_scale_inv");
  if (tensor.dtype != DType::kF8E4M3 || stored == nullptr) return scales;
  const int64_t rows = tensor.elements() / tensor.cols();
  const int64_t wanted = (rows + kF8ScaleBlock - 1) / kF8ScaleBlock *
                         ((tensor.cols() + kF8ScaleBlock - 1) / kF8ScaleBlock);
  if (stored->dtype != DType::kF32 || stored->elements() != wanted)
    return Status(Code::kFormat,
                  fmt::format("{}: {} {} scales, expected {} F32", stored->name, stored->elements(),
                              dtype_info(stored->dtype).name, wanted))
        .about(stored->name);
  scales.resize(static_cast<size_t>(wanted));
  FATHOM_TRY(file.read(*stored, 0, std::as_writable_bytes(std::span(scales))));
  return scales;
}

// values[i] *= the scale of element first + i.
void apply_scales(std::span<const float> scales, int64_t cols, int64_t first,
                  std::span<float> values) {
  const int64_t scale_cols = (cols + kF8ScaleBlock - 1) / kF8ScaleBlock;
  int64_t row = first / cols, col = first % cols;
  for (float& value : values) {
    value *= scales[static_cast<size_t>(row / kF8ScaleBlock * scale_cols + col / kF8ScaleBlock)];
    if (++col == cols) {
      col = 0;
      ++row;
    }
  }
}

Status read_values(const std::string& path, std::string_view name,
                   const std::function<bool(std::span<const float>)>& on_piece) {
  FATHOM_TRY_ASSIGN(const io::TensorFile file, io::TensorFile::open(path));
  const io::TensorInfo* tensor = file.find(name);
  if (tensor == nullptr)
    return Status(Code::kNotFound, fmt::format("{}: no tensor is called {}", path, name))
        .about(name);
  if (!is_weight_dtype(tensor->dtype))
    return Status(Code::kUnsupported, fmt::format("{}: values of type {} are not weights", name,
                                                  dtype_info(tensor->dtype).name))
        .about(name);
  FATHOM_TRY_ASSIGN(const std::vector<float> scales, block_scales(file, *tensor));

  const int64_t n = tensor->elements();
  const int64_t most = std::min(n, kPieceElements);
  std::vector<std::byte> stored(static_cast<size_t>(row_bytes(tensor->dtype, most)));
  std::vector<float> values(static_cast<size_t>(most));
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = std::min(most, n - first);
    const std::span<std::byte> bytes =
        std::span(stored).first(static_cast<size_t>(row_bytes(tensor->dtype, count)));
    FATHOM_TRY(file.read(*tensor, row_bytes(tensor->dtype, first), bytes));
    const std::span<float> piece = std::span(values).first(static_cast<size_t>(count));
    dequantize(tensor->dtype, bytes.data(), count, piece.data());
    if (!scales.empty()) apply_scales(scales, tensor->cols(), first, piece);
    if (!on_piece(piece))
      return Status(Code::kCallback, fmt::format("{}: stopped by the caller", name));
  }
  return {};
}

}  // namespace

Result<FileInfo> inspect_file(const std::string& path) try {
  FATHOM_TRY_ASSIGN(const io::TensorFile file, io::TensorFile::open(path));
  return describe(file);
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for the file's header");
}

Status read_tensor_f32(const std::string& path, std::string_view name,
                       const std::function<bool(std::span<const float> values)>& on_piece) try {
  return read_values(path, name, on_piece);
} catch (const std::bad_alloc&) {
  return Status(Code::kMemory, "no memory for the file's header");
}

}  // namespace fathom
