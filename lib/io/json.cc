// JSON text -> JsonDocument, by nlohmann's event parser (iterative, so depth costs no stack).
#include "json.h"

#include <algorithm>
#include <cassert>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "range.h"
#include "tensor_file.h"
#include "text.h"

namespace fathom::io {
namespace {

// Hands the text to the parser and tells how far it has read: the events come without a place.
class CountingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  CountingIterator(const char* at, const char** cursor) noexcept : at_(at), cursor_(cursor) {}
  reference operator*() const noexcept { return *at_; }
  CountingIterator& operator++() noexcept {
    *cursor_ = ++at_;
    return *this;
  }
  CountingIterator operator++(int) noexcept {
    CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const noexcept { return at_ == other.at_; }
  bool operator!=(const CountingIterator& other) const noexcept { return at_ != other.at_; }

 private:
  const char* at_;
  const char** cursor_;
};

Status wrong_type(std::string_view key, const char* wanted, JsonValue value) {
  if (value.is_absent()) return Status(Code::kFormat, fmt::format("{} is missing", key)).about(key);
  return Status(Code::kFormat,
                fmt::format("{} must be {}, found {}", key, wanted, json_type_name(value.type())))
      .about(key)
      .at(value.offset());
}

}  // namespace

// Receives nlohmann's events.  Each returns false to stop, after setting status_.
class JsonBuilder {
 public:
  JsonBuilder(std::string_view text, const JsonLimits& limits) : text_(text), limits_(limits) {
    cursor_ = text.data();
  }

  Result<JsonDocument> run() {
    const char* const begin = text_.data();
    const char* const end = begin + text_.size();
    const bool done = nlohmann::json::sax_parse(CountingIterator(begin, &cursor_),
                                                CountingIterator(end, &cursor_), this);
    if (!status_.ok()) return std::move(status_);
    if (!done || document_.nodes_.empty())
      return Status(Code::kFormat, "the JSON text is incomplete").at(offset());
    return std::move(document_);
  }

  bool null() { return add(JsonType::kNull, {.integer = 0}, 0); }
  bool boolean(bool value) { return add(JsonType::kBool, {.boolean = value}, 0); }
  bool number_integer(int64_t value) { return add(JsonType::kInteger, {.integer = value}, 0); }
  bool number_unsigned(uint64_t value) {
    if (std::in_range<int64_t>(value)) return number_integer(static_cast<int64_t>(value));
    return add(JsonType::kUnsigned, {.real = static_cast<double>(value)}, 0);
  }
  bool number_float(double value, const std::string&) {
    return add(JsonType::kReal, {.real = value}, 0);
  }
  bool string(const std::string& value) { return add_string(value); }
  bool binary(const nlohmann::json::binary_t&) { return fail("binary values are not JSON"); }

  bool start_object(std::size_t) { return open(JsonType::kObject); }
  bool start_array(std::size_t) { return open(JsonType::kArray); }
  bool key(const std::string& value) {
    // A key is counted as no element of its object: its value is.
    const bool added = add_string(value);
    if (added) --document_.nodes_[open_.back()].size;
    return added;
  }
  bool end_object() { return unique_keys() && close(); }
  bool end_array() { return close(); }

  bool parse_error(std::size_t position, const std::string& token,
                   const nlohmann::detail::exception& e) {
    if (!status_.ok()) return false;
    // what() is "[json.exception.parse_error.101] parse error at line 1, column 3: reason".
    std::string_view reason = e.what();
    if (const size_t bracket = reason.find("] "); bracket != reason.npos)
      reason.remove_prefix(bracket + 2);
    constexpr size_t kMaxReason = 300;  // it may quote the text, and bytes that are no text
    status_ = Status(Code::kFormat, fmt::format("invalid JSON at byte {}: {}", position,
                                                printable(reason, kMaxReason)))
                  .at(position);
    (void)token;
    return false;
  }

 private:
  uint64_t offset() const { return static_cast<uint64_t>(cursor_ - text_.data()); }

  bool fail(std::string_view message) {
    status_ = Status(Code::kFormat, fmt::format("{} at byte {}", message, offset())).at(offset());
    return false;
  }

  bool add(JsonType type, JsonDocument::Node::Payload payload, uint32_t size) {
    std::vector<JsonDocument::Node>& nodes = document_.nodes_;
    if (nodes.size() >= static_cast<size_t>(limits_.max_values))
      return fail(fmt::format("JSON has more than {} values", limits_.max_values));
    if (!open_.empty()) ++nodes[open_.back()].size;
    nodes.push_back({.type = type,
                     .offset = static_cast<uint32_t>(offset()),
                     .after = static_cast<uint32_t>(nodes.size() + 1),
                     .payload = payload,
                     .size = size});
    return true;
  }

  bool add_string(const std::string& value) {
    std::string& strings = document_.strings_;
    const size_t at = strings.size();
    strings += value;
    return add(JsonType::kString, {.text_offset = at}, static_cast<uint32_t>(value.size()));
  }

  bool open(JsonType type) {
    if (open_.size() >= static_cast<size_t>(limits_.max_depth))
      return fail(fmt::format("JSON is nested deeper than {}", limits_.max_depth));
    const size_t node = document_.nodes_.size();
    if (!add(type, {.integer = 0}, 0)) return false;
    open_.push_back(node);
    return true;
  }

  bool close() {
    document_.nodes_[open_.back()].after = static_cast<uint32_t>(document_.nodes_.size());
    open_.pop_back();
    return true;
  }

  // Sorting keeps an object of a million members cheap.
  bool unique_keys() {
    const uint32_t object = static_cast<uint32_t>(open_.back());
    const uint32_t end = static_cast<uint32_t>(document_.nodes_.size());
    keys_.clear();
    for (uint32_t node = object + 1; node < end; node = document_.nodes_[node + 1].after) {
      const JsonDocument::Node& key = document_.nodes_[node];
      keys_.emplace_back(document_.strings_.data() + key.payload.text_offset, key.size);
    }
    std::sort(keys_.begin(), keys_.end());
    const auto twice = std::adjacent_find(keys_.begin(), keys_.end());
    if (twice == keys_.end()) return true;
    const std::string key = printable(*twice);
    status_ = Status(Code::kFormat,
                     fmt::format("key \"{}\" appears twice in the object that ends at byte {}", key,
                                 offset()))
                  .about(key)
                  .at(offset());
    return false;
  }

  std::string_view text_;
  const JsonLimits& limits_;
  const char* cursor_ = nullptr;
  JsonDocument document_;
  std::vector<size_t> open_;  // nodes of the containers around the current place
  std::vector<std::string_view> keys_;
  Status status_;
};

Result<JsonDocument> JsonDocument::parse(std::string_view text, const JsonLimits& limits) {
  assert(limits.max_bytes <= int64_t{1} << 30 && limits.max_values <= int64_t{1} << 30);
  if (std::cmp_greater(text.size(), limits.max_bytes))
    return Status(Code::kFormat, fmt::format("JSON text has {} bytes, at most {} are accepted",
                                             text.size(), limits.max_bytes));
  if (text.empty()) return Status(Code::kFormat, "JSON text is empty");
  // The parser takes a zero byte for the end and would not look at what follows.
  if (const size_t zero = text.find('\0'); zero != text.npos)
    return Status(Code::kFormat, fmt::format("invalid JSON: a zero byte at {}", zero)).at(zero);
  return JsonBuilder(text, limits).run();
}

JsonType JsonValue::type() const noexcept {
  return document_ == nullptr ? JsonType::kAbsent : document_->nodes_[node_].type;
}

bool JsonValue::boolean() const noexcept {
  return type() == JsonType::kBool && document_->nodes_[node_].payload.boolean;
}

int64_t JsonValue::integer() const noexcept {
  return type() == JsonType::kInteger ? document_->nodes_[node_].payload.integer : 0;
}

double JsonValue::number() const noexcept {
  switch (type()) {
    case JsonType::kInteger:
      return static_cast<double>(document_->nodes_[node_].payload.integer);
    case JsonType::kUnsigned:
    case JsonType::kReal:
      return document_->nodes_[node_].payload.real;
    default:
      return 0;
  }
}

std::string_view JsonValue::string() const noexcept {
  if (!is_string()) return {};
  const JsonDocument::Node& node = document_->nodes_[node_];
  return std::string_view(document_->strings_).substr(node.payload.text_offset, node.size);
}

int64_t JsonValue::size() const noexcept {
  return is_array() || is_object() ? document_->nodes_[node_].size : 0;
}

uint64_t JsonValue::offset() const noexcept {
  return document_ == nullptr ? 0 : document_->nodes_[node_].offset;
}

uint32_t JsonValue::after() const noexcept {
  return document_->nodes_[node_].after;
}

JsonValue::Iterator JsonValue::begin() const noexcept {
  return Iterator(is_array() ? JsonValue(document_, node_ + 1) : JsonValue());
}

JsonValue::Iterator JsonValue::end() const noexcept {
  return Iterator(is_array() ? JsonValue(document_, after()) : JsonValue());
}

JsonValue::Members JsonValue::members() const noexcept {
  Members range;
  if (!is_object()) return range;
  range.document_ = document_;
  range.first_ = node_ + 1;
  range.last_ = after();
  return range;
}

JsonValue JsonValue::find(std::string_view key) const noexcept {
  for (const JsonMember member : members())
    if (member.key == key) return member.value;
  return {};
}

Result<int64_t> json_integer(JsonValue object, std::string_view key, int64_t min, int64_t max) {
  const JsonValue value = object.find(key);
  if (value.type() == JsonType::kUnsigned)
    return Status(Code::kFormat,
                  fmt::format("{} is {:.0f}, must be in [{}, {}]", key, value.number(), min, max))
        .about(key)
        .at(value.offset());
  if (value.type() != JsonType::kInteger) return wrong_type(key, "an integer", value);
  return in_range(key, value.integer(), min, max);
}

Result<int64_t> json_integer_or(JsonValue object, std::string_view key, int64_t fallback,
                                int64_t min, int64_t max) {
  if (object.find(key).is_null_or_absent()) return fallback;
  return json_integer(object, key, min, max);
}

Result<double> json_number(JsonValue object, std::string_view key, double min, double max) {
  const JsonValue value = object.find(key);
  if (!value.is_number()) return wrong_type(key, "a number", value);
  return in_range(key, value.number(), min, max);
}

Result<double> json_number_or(JsonValue object, std::string_view key, double fallback, double min,
                              double max) {
  if (object.find(key).is_null_or_absent()) return fallback;
  return json_number(object, key, min, max);
}

Result<bool> json_boolean_or(JsonValue object, std::string_view key, bool fallback) {
  const JsonValue value = object.find(key);
  if (value.is_null_or_absent()) return fallback;
  if (value.type() != JsonType::kBool) return wrong_type(key, "true or false", value);
  return value.boolean();
}

Result<std::string_view> json_string(JsonValue object, std::string_view key) {
  const JsonValue value = object.find(key);
  if (!value.is_string()) return wrong_type(key, "a string", value);
  return value.string();
}

Result<std::string_view> json_string_or(JsonValue object, std::string_view key,
                                        std::string_view fallback) {
  if (object.find(key).is_null_or_absent()) return fallback;
  return json_string(object, key);
}

std::string json_text(JsonValue value) {
  switch (value.type()) {
    case JsonType::kNull:
      return "null";
    case JsonType::kBool:
      return value.boolean() ? "true" : "false";
    case JsonType::kInteger:
      return fmt::format("{}", value.integer());
    case JsonType::kUnsigned:
      return fmt::format("{:.0f}", value.number());
    case JsonType::kReal:
      return fmt::format("{}", value.number());
    case JsonType::kString:
      return std::string(value.string());
    case JsonType::kArray:
      return fmt::format("[{} values]", value.size());
    case JsonType::kObject:
      return fmt::format("{{{} members}}", value.size());
    case JsonType::kAbsent:
      break;
  }
  return "";
}

const char* json_type_name(JsonType type) noexcept {
  switch (type) {
    case JsonType::kNull:
      return "null";
    case JsonType::kBool:
      return "true or false";
    case JsonType::kInteger:
    case JsonType::kUnsigned:
      return "an integer";
    case JsonType::kReal:
      return "a fraction";
    case JsonType::kString:
      return "a string";
    case JsonType::kArray:
      return "an array";
    case JsonType::kObject:
      return "an object";
    case JsonType::kAbsent:
      break;
  }
  return "nothing";
}

Result<std::string> read_text_file(const std::string& path, int64_t max_bytes) {
  FATHOM_TRY_ASSIGN(const std::shared_ptr<ByteSource> source, open_file(path));
  if (source->size() > max_bytes)
    return Status(Code::kFormat, fmt::format("{} has {} bytes, at most {} are accepted", path,
                                             source->size(), max_bytes));
  std::string text(static_cast<size_t>(source->size()), '\0');
  FATHOM_TRY(source->read(0, std::as_writable_bytes(std::span(text))));
  return text;
}

}  // namespace fathom::io
