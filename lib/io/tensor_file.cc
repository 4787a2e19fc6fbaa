// TensorFile: which reader a path needs, lookup and bounded reads.  The formats: gguf.cc,
// safetensors.cc.
#include "tensor_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <system_error>

#include "checked.h"
#include "tensor_file_builder.h"
#include "text.h"

namespace fathom::io {

Result<TensorFile> TensorFile::open(const std::string& path) {
  if (path.empty()) return Status(Code::kInvalidArgument, "the model path is empty");
  if (path.find('\0') != path.npos)
    return Status(Code::kInvalidArgument, "the model path contains a zero byte");
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return open_folder(path);
  FATHOM_TRY_ASSIGN(std::shared_ptr<ByteSource> source, open_file(path));

  // The first bytes decide, the ending only where they cannot.
  char magic[4] = {};
  const size_t n_magic = static_cast<size_t>(std::min<int64_t>(source->size(), sizeof magic));
  FATHOM_TRY(source->read(0, std::as_writable_bytes(std::span(magic, n_magic))));
  if (std::memcmp(magic, "GGUF", 4) == 0 || path.ends_with(".gguf"))
    return open_gguf(std::move(source), path);
  if (path.ends_with(".safetensors")) return open_safetensors(std::move(source), path);
  return Status(Code::kFormat,
                fmt::format("{} is neither a GGUF file (it does not begin with \"GGUF\") nor named "
                            "*.safetensors",
                            path));
}

Result<TensorFile> TensorFile::parse_gguf(std::shared_ptr<ByteSource> source) {
  return open_gguf(std::move(source), "");
}

Result<TensorFile> TensorFile::parse_safetensors(std::shared_ptr<ByteSource> source) {
  return open_safetensors(std::move(source), "");
}

const TensorInfo* TensorFile::find(std::string_view name) const noexcept {
  const auto it = std::lower_bound(
      tensors_.begin(), tensors_.end(), name,
      [](const TensorInfo& tensor, std::string_view wanted) { return tensor.name < wanted; });
  return it != tensors_.end() && it->name == name ? &*it : nullptr;
}

Status TensorFile::read(const TensorInfo& tensor, int64_t offset,
                        std::span<std::byte> out) const noexcept {
  if (offset < 0 || !(Checked(offset) + Checked(out.size())).at_most(tensor.bytes))
    return Status(Code::kInvalidArgument, "bytes beyond the end of the tensor").about(tensor.name);
  if (!has_weights())
    return Status(Code::kNotFound, "only the configuration is there, no weights")
        .about(tensor.name);
  Status status = sources_[static_cast<size_t>(tensor.source)]->read(tensor.offset + offset, out);
  if (status.ok()) return status;
  return std::move(status).about(tensor.name);
}

int64_t TensorFile::total_bytes() const noexcept {
  return std::accumulate(sources_.begin(), sources_.end(), int64_t{0},
                         [](int64_t sum, const auto& source) { return sum + source->size(); });
}

Status TensorFileBuilder::sort_tensors() {
  std::sort(file.tensors_.begin(), file.tensors_.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.name < b.name; });
  const auto twice =
      std::adjacent_find(file.tensors_.begin(), file.tensors_.end(),
                         [](const TensorInfo& a, const TensorInfo& b) { return a.name == b.name; });
  if (twice == file.tensors_.end()) return {};
  return Status(Code::kFormat, fmt::format("two tensors are named {}", twice->name))
      .about(twice->name);
}

void TensorFileBuilder::drop_extra_layers(std::string_view prefix, int64_t n_layers,
                                          std::vector<std::string>& remarks) {
  const size_t dropped = std::erase_if(file.tensors_, [&](const TensorInfo& tensor) {
    return layer_of(tensor.name, prefix) >= n_layers;
  });
  if (dropped > 0)
    remarks.push_back(
        fmt::format("{} tensors of layers from {} on (multi-token prediction) were skipped.",
                    dropped, n_layers));
}

Result<TensorFile> TensorFileBuilder::finish() && {
  for (const auto& source : file.sources_) hash.update(static_cast<uint64_t>(source->size()));
  // Models fine-tuned from one another have the same headers.  A few bytes from the middle of a few
  // tensors tell them apart and cost as many reads.
  constexpr size_t kSamples = 16, kSampleBytes = 256;
  const bool is_model = file.has_config_ && file.has_weights();
  const size_t n_samples = is_model ? std::min(kSamples, file.tensors_.size()) : 0;
  for (size_t i = 0; i < n_samples; ++i) {
    const TensorInfo& tensor = file.tensors_[i * file.tensors_.size() / n_samples];
    std::byte sample[kSampleBytes];
    const int64_t n = std::min(tensor.bytes, static_cast<int64_t>(kSampleBytes));
    const std::span<std::byte> bytes(sample, static_cast<size_t>(n));
    FATHOM_TRY(file.read(tensor, (tensor.bytes - n) / 2, bytes));
    hash.update(bytes);
  }
  const Hash128::Digest digest = hash.digest();
  file.fingerprint_ = {.lo = digest.lo, .hi = digest.hi};
  return std::move(file);
}

Status check_no_overlap(std::span<const TensorInfo> tensors) {
  std::vector<const TensorInfo*> in_order;
  in_order.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) in_order.push_back(&tensor);
  std::sort(in_order.begin(), in_order.end(), [](const TensorInfo* a, const TensorInfo* b) {
    return a->source != b->source ? a->source < b->source : a->offset < b->offset;
  });
  for (size_t i = 1; i < in_order.size(); ++i) {
    const TensorInfo &a = *in_order[i - 1], &b = *in_order[i];
    if (a.source == b.source && b.offset < a.offset + a.bytes)
      return Status(Code::kFormat,
                    fmt::format("tensors {} and {} overlap: bytes [{}, +{}) and [{}, +{})", a.name,
                                b.name, a.offset, a.bytes, b.offset, b.bytes))
          .about(b.name)
          .at(static_cast<uint64_t>(b.offset));
  }
  return {};
}

}  // namespace fathom::io
