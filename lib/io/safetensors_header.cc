// One safetensors header:  u64 length | JSON {"name": {"dtype", "shape", "data_offsets"}, ...} |
// data.  The tensors must cover the data without holes or overlap, as the reference demands.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "checked.h"
#include "safetensors.h"
#include "tensor_file_builder.h"
#include "text.h"

namespace fathom::io {
namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's limit
constexpr int64_t kValuesPerTensor = 13;          // of JSON, with four dimensions

std::optional<DType> dtype_of(std::string_view name) {
  static constexpr std::pair<std::string_view, DType> kTypes[] = {
      {"F32", DType::kF32}, {"F16", DType::kF16}, {"BF16", DType::kBF16},
      {"F64", DType::kF64}, {"I8", DType::kI8},   {"I16", DType::kI16},
      {"I32", DType::kI32}, {"I64", DType::kI64}, {"F8_E4M3", DType::kF8E4M3},
  };
  for (const auto& [known, dtype] : kTypes)
    if (name == known) return dtype;
  return std::nullopt;
}

Status bad(std::string_view name, JsonValue at, std::string_view message) {
  return Status(Code::kFormat, fmt::format("tensor {}: {}", name, message))
      .about(name)
      .at(8 + at.offset());
}

Status read_shape(const JsonMember& member, TensorInfo* tensor) {
  const JsonValue shape = member.value.find("shape");
  if (!shape.is_array()) return bad(member.key, member.value, "shape must be an array");
  if (shape.size() > 4)
    return Status(Code::kUnsupported, fmt::format("tensor {} has {} dimensions, at most 4 are read",
                                                  member.key, shape.size()))
        .about(member.key);
  int i = 0;
  for (const JsonValue dim : shape) {
    if (dim.type() != JsonType::kInteger || dim.integer() < 0)
      return bad(member.key, dim, fmt::format("dimension {} is {}", i, printable(json_text(dim))));
    if (dim.integer() == 0)
      return Status(Code::kUnsupported, fmt::format("tensor {} is empty", member.key))
          .about(member.key);
    tensor->shape[i++] = dim.integer();
  }
  tensor->n_dims = std::max(i, 1);  // a scalar is one row of one
  return {};
}

// `data` is the place of the data in the file, `n_data` its size.
Status read_tensor(const JsonMember& member, int64_t data, int64_t n_data, TensorInfo* tensor) {
  if (member.key.empty() || member.key.size() > kMaxNameBytes || !is_plain_name(member.key))
    return Status(Code::kFormat, fmt::format("the tensor name that ends before byte {} is empty, "
                                             "longer than {} bytes, or has control characters",
                                             8 + member.value.offset(), kMaxNameBytes))
        .at(8 + member.value.offset());
  if (!member.value.is_object()) return bad(member.key, member.value, "must be an object");
  tensor->name = member.key;
  const JsonValue dtype_name = member.value.find("dtype");
  if (!dtype_name.is_string()) return bad(member.key, member.value, "dtype must be a string");
  const std::optional<DType> dtype = dtype_of(dtype_name.string());
  if (!dtype)
    return Status(Code::kUnsupported, fmt::format("tensor {} has the unknown dtype {}", member.key,
                                                  printable(dtype_name.string(), 40)))
        .about(member.key);
  tensor->dtype = *dtype;
  FATHOM_TRY(read_shape(member, tensor));

  const JsonValue offsets = member.value.find("data_offsets");
  if (!offsets.is_array() || offsets.size() != 2)
    return bad(member.key, member.value, "data_offsets must be an array of two");
  int64_t place[2] = {};
  int i = 0;
  for (const JsonValue offset : offsets) {
    if (offset.type() != JsonType::kInteger || offset.integer() < 0 || offset.integer() > n_data)
      return bad(member.key, offset,
                 fmt::format("data_offsets has {}, must be an integer in [0, {}]",
                             printable(json_text(offset)), n_data));
    place[i++] = offset.integer();
  }
  const Checked bytes = Checked(tensor->shape[0]) * tensor->shape[1] * tensor->shape[2] *
                        tensor->shape[3] * dtype_info(*dtype).block_bytes;
  const Checked extent = Checked(place[1]) - place[0];
  if (!bytes.ok() || !extent.ok() || bytes.value() != extent.value())
    return bad(member.key, offsets,
               fmt::format("data_offsets [{}, {}] do not fit dtype and shape, which need {} bytes",
                           place[0], place[1],
                           bytes.ok() ? fmt::format("{}", bytes.value()) : "more than 2^63"));
  tensor->offset = data + place[0];
  tensor->bytes = bytes.value();
  return {};
}

// The tensors lie end to end from `begin` to `end`.
Status check_cover(std::span<const TensorInfo> tensors, int64_t begin, int64_t end) {
  std::vector<const TensorInfo*> in_order;
  in_order.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) in_order.push_back(&tensor);
  std::sort(in_order.begin(), in_order.end(),
            [](const TensorInfo* a, const TensorInfo* b) { return a->offset < b->offset; });
  int64_t at = begin;
  for (const TensorInfo* tensor : in_order) {
    if (tensor->offset != at)
      return Status(Code::kFormat,
                    fmt::format("tensor {} begins at byte {}, {} the one before it ends at {}",
                                tensor->name, tensor->offset,
                                tensor->offset < at ? "although" : "leaving a hole:", at))
          .about(tensor->name)
          .at(static_cast<uint64_t>(tensor->offset));
    at += tensor->bytes;
  }
  if (at == end) return {};
  return Status(Code::kFormat,
                fmt::format("the tensors end at byte {}, the file has {} bytes", at, end))
      .at(static_cast<uint64_t>(at));
}

Status read_header(const ByteSource& source, int source_index, Hash128& hash,
                   std::vector<TensorInfo>* tensors) {
  uint64_t length = 0;
  constexpr int64_t kLengthBytes = sizeof length;
  if (source.size() < kLengthBytes)
    return Status(Code::kFormat,
                  fmt::format("the file has {} bytes, too few for a header", source.size()))
        .at(0);
  FATHOM_TRY(source.read(0, std::as_writable_bytes(std::span(&length, 1))));
  const int64_t available = source.size() - kLengthBytes;
  if (!Checked(length).at_most(std::min(available, kMaxHeaderBytes)) || length < 2)
    return Status(Code::kFormat, fmt::format("the header's length is {}, must be in [2, {}]",
                                             length, std::min(available, kMaxHeaderBytes)))
        .at(0);
  std::string text(length, '\0');
  FATHOM_TRY(source.read(kLengthBytes, std::as_writable_bytes(std::span(text))));
  if (text[0] != '{')
    return Status(Code::kFormat, "the header does not begin with '{'").at(kLengthBytes);
  hash.update(length);
  hash.update(std::as_bytes(std::span(text)));

  constexpr JsonLimits kLimits = {
      .max_bytes = kMaxHeaderBytes, .max_depth = 8, .max_values = kMaxTensors * kValuesPerTensor};
  FATHOM_TRY_ASSIGN(const JsonDocument document, JsonDocument::parse(text, kLimits));
  const int64_t data = kLengthBytes + static_cast<int64_t>(length);
  const int64_t n_data = source.size() - data;
  const size_t n_before = tensors->size();
  for (const JsonMember member : document.root().members()) {
    if (member.key == "__metadata__") {
      if (!member.value.is_object()) return bad(member.key, member.value, "must be an object");
      for (const JsonMember entry : member.value.members())
        if (!entry.value.is_string())
          return bad(member.key, entry.value, "must have strings as values");
      continue;
    }
    if (std::cmp_greater_equal(tensors->size(), kMaxTensors))
      return Status(Code::kFormat, fmt::format("there are more than {} tensors", kMaxTensors));
    TensorInfo tensor;
    tensor.source = source_index;
    FATHOM_TRY(read_tensor(member, data, n_data, &tensor));
    tensors->push_back(std::move(tensor));
  }
  return check_cover(std::span(*tensors).subspan(n_before), data, source.size());
}

}  // namespace

Status read_safetensors_header(const ByteSource& source, int source_index, Hash128& hash,
                               std::vector<TensorInfo>* tensors) {
  Status status = read_header(source, source_index, hash, tensors);
  if (status.ok() || status.message().starts_with(source.name())) return status;
  return std::move(status).in(source.name());
}

}  // namespace fathom::io
