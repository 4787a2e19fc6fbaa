// Lookup and typed, range-checked access to GGUF metadata.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "gguf_header.h"
#include "range.h"

namespace fathom::io {
namespace {

bool is_integer(GgufType type) noexcept {
  switch (type) {
    case GgufType::kU8:
    case GgufType::kI8:
    case GgufType::kU16:
    case GgufType::kI16:
    case GgufType::kU32:
    case GgufType::kI32:
    case GgufType::kU64:
    case GgufType::kI64:
      return true;
    default:
      return false;
  }
}

bool is_signed(GgufType type) noexcept {
  return type == GgufType::kI8 || type == GgufType::kI16 || type == GgufType::kI32 ||
         type == GgufType::kI64;
}

Status missing(std::string_view key) {
  return Status(Code::kFormat, fmt::format("the key {} is missing", key)).about(key);
}

Status wrong_type(const GgufEntry& entry, const char* wanted) {
  return Status(Code::kFormat, fmt::format("{} is of type {}, must be {}", entry.key,
                                           gguf_type_name(entry.type), wanted))
      .about(entry.key)
      .at(entry.offset);
}

}  // namespace

std::string GgufEntry::to_text() const {
  if (is_integer(type))
    return is_signed(type) ? fmt::format("{}", static_cast<int64_t>(bits))
                           : fmt::format("{}", bits);
  switch (type) {
    case GgufType::kBool:
      return bits != 0 ? "true" : "false";
    case GgufType::kF32:
      return fmt::format("{}", static_cast<float>(real));
    case GgufType::kF64:
      return fmt::format("{}", real);
    case GgufType::kString:
      return text;
    default:
      return fmt::format("[{} values]", bits);
  }
}

Status GgufMetadata::index() {
  by_key_.resize(entries.size());
  std::iota(by_key_.begin(), by_key_.end(), 0u);
  std::sort(by_key_.begin(), by_key_.end(),
            [&](uint32_t a, uint32_t b) { return entries[a].key < entries[b].key; });
  for (size_t i = 1; i < by_key_.size(); ++i) {
    const GgufEntry &a = entries[by_key_[i - 1]], &b = entries[by_key_[i]];
    if (a.key == b.key)
      return Status(Code::kFormat,
                    fmt::format("the key {} appears twice, at bytes {} and {}", a.key,
                                std::min(a.offset, b.offset), std::max(a.offset, b.offset)))
          .about(a.key)
          .at(std::max(a.offset, b.offset));
  }
  return {};
}

const GgufEntry* GgufMetadata::find(std::string_view key) const noexcept {
  const auto it = std::lower_bound(
      by_key_.begin(), by_key_.end(), key,
      [&](uint32_t entry, std::string_view wanted) { return entries[entry].key < wanted; });
  return it != by_key_.end() && entries[*it].key == key ? &entries[*it] : nullptr;
}

Result<int64_t> GgufMetadata::integer(std::string_view key, int64_t min, int64_t max) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return missing(key);
  if (!is_integer(entry->type)) return wrong_type(*entry, "one integer");
  if (entry->type == GgufType::kU64 && entry->bits > uint64_t{INT64_MAX})
    return Status(Code::kFormat,
                  fmt::format("{} is {}, must be in [{}, {}]", key, entry->bits, min, max))
        .about(key)
        .at(entry->offset);
  Result<int64_t> value = in_range(key, static_cast<int64_t>(entry->bits), min, max);
  if (!value.ok()) return std::move(value).status().at(entry->offset);
  return value;
}

Result<int64_t> GgufMetadata::integer_or(std::string_view key, int64_t fallback, int64_t min,
                                         int64_t max) const {
  if (find(key) == nullptr) return fallback;
  return integer(key, min, max);
}

Result<double> GgufMetadata::number(std::string_view key, double min, double max) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return missing(key);
  double value = entry->real;
  if (is_integer(entry->type))
    value = is_signed(entry->type) ? static_cast<double>(static_cast<int64_t>(entry->bits))
                                   : static_cast<double>(entry->bits);
  else if (entry->type != GgufType::kF32 && entry->type != GgufType::kF64)
    return wrong_type(*entry, "a number");
  Result<double> checked = in_range(key, value, min, max);
  if (!checked.ok()) return std::move(checked).status().at(entry->offset);
  return checked;
}

Result<double> GgufMetadata::number_or(std::string_view key, double fallback, double min,
                                       double max) const {
  if (find(key) == nullptr) return fallback;
  return number(key, min, max);
}

Result<bool> GgufMetadata::boolean_or(std::string_view key, bool fallback) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return fallback;
  if (entry->type != GgufType::kBool) return wrong_type(*entry, "a bool");
  return entry->bits != 0;
}

Result<std::string_view> GgufMetadata::string(std::string_view key) const {
  const GgufEntry* entry = find(key);
  if (entry == nullptr) return missing(key);
  if (entry->type != GgufType::kString) return wrong_type(*entry, "a string");
  return std::string_view(entry->text);
}

Result<std::string_view> GgufMetadata::string_or(std::string_view key,
                                                 std::string_view fallback) const {
  if (find(key) == nullptr) return fallback;
  return string(key);
}

}  // namespace fathom::io
