// The one door to nlohmann-json.  A text becomes a flat, read-only tree: nodes in document order in
// one array, all strings in another, so that a tokenizer.json of a million values is two
// allocations.  Limits on size, depth and number of values hold while parsing; two members of the
// same name are an error (which one counts would be a guess).  Strings are valid UTF-8.
//
//   FATHOM_TRY_ASSIGN(const JsonDocument document, JsonDocument::parse(text));
//   FATHOM_TRY_ASSIGN(const int64_t n, json_integer(document.root(), "vocab_size", 1, 1 << 24));
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/status.hpp"

namespace fathom::io {

struct JsonLimits {
  int64_t max_bytes = int64_t{16} << 20;  // of the text; at most 1 GiB
  int max_depth = 64;                     // of nested arrays and objects
  int64_t max_values = int64_t{1} << 20;  // scalars, keys, arrays and objects; 24 bytes each
};

enum class JsonType : uint8_t {
  kNull,
  kBool,
  kInteger,   // fits int64_t
  kUnsigned,  // only in [2^63, 2^64)
  kReal,      // finite
  kString,
  kArray,
  kObject,
  kAbsent,  // what find() answers when there is no such member
};

class JsonDocument;

// A place in a JsonDocument, which must outlive it.  Two words; copied freely.
class JsonValue {
 public:
  JsonValue() noexcept = default;  // absent

  JsonType type() const noexcept;
  bool is_absent() const noexcept { return type() == JsonType::kAbsent; }
  bool is_null_or_absent() const noexcept { return is_absent() || type() == JsonType::kNull; }
  bool is_string() const noexcept { return type() == JsonType::kString; }
  bool is_array() const noexcept { return type() == JsonType::kArray; }
  bool is_object() const noexcept { return type() == JsonType::kObject; }
  bool is_number() const noexcept {
    const JsonType t = type();
    return t == JsonType::kInteger || t == JsonType::kUnsigned || t == JsonType::kReal;
  }

  // Neutral (false, 0, "") when the type is another one.
  bool boolean() const noexcept;
  int64_t integer() const noexcept;  // kInteger only
  double number() const noexcept;    // any number
  std::string_view string() const noexcept;
  int64_t size() const noexcept;  // elements of an array, members of an object

  // Member by name; absent when there is none or this is no object.  Linear in the members.
  JsonValue find(std::string_view key) const noexcept;
  // Byte offset in the text just behind the token (behind the opening bracket of a container).
  uint64_t offset() const noexcept;

  // for (JsonValue element : array)          for (JsonMember member : object.members())
  class Iterator;
  class Members;
  Iterator begin() const noexcept;  // empty range unless an array
  Iterator end() const noexcept;
  Members members() const noexcept;  // empty range unless an object

 private:
  friend class JsonDocument;
  JsonValue(const JsonDocument* document, uint32_t node) noexcept
      : document_(document), node_(node) {}
  uint32_t after() const noexcept;  // node behind this value and all it contains
  const JsonDocument* document_ = nullptr;
  uint32_t node_ = 0;
};

struct JsonMember {
  std::string_view key;
  JsonValue value;
};

// Movable.  Immutable after parse(), hence shared freely between threads.
class JsonDocument {
 public:
  // Errors: kFormat with the byte offset.  Takes UTF-8, with or without a byte order mark.
  static Result<JsonDocument> parse(std::string_view text, const JsonLimits& limits = {});
  // Invalid after the document was moved.
  JsonValue root() const noexcept { return JsonValue(this, 0); }

 private:
  friend class JsonValue;
  friend class JsonBuilder;
  struct Node {
    JsonType type;
    uint32_t offset;  // behind the token
    uint32_t after;   // containers: node behind the last one inside; else this node + 1
    union Payload {
      int64_t integer;
      double real;
      uint64_t text_offset;  // strings: place in strings_
      bool boolean;
    } payload;
    uint32_t size;  // bytes of a string, elements or members of a container
  };
  std::vector<Node> nodes_;  // members: a kString node with the key, then the value
  std::string strings_;
};

class JsonValue::Iterator {
 public:
  JsonValue operator*() const noexcept { return at_; }
  Iterator& operator++() noexcept {
    at_.node_ = at_.after();
    return *this;
  }
  bool operator!=(const Iterator& other) const noexcept { return at_.node_ != other.at_.node_; }

 private:
  friend class JsonValue;
  explicit Iterator(JsonValue at) noexcept : at_(at) {}
  JsonValue at_;
};

class JsonValue::Members {
 public:
  class Iterator {
   public:
    JsonMember operator*() const noexcept {
      return {key_.string(), JsonValue(key_.document_, key_.node_ + 1)};
    }
    Iterator& operator++() noexcept {
      key_.node_ = JsonValue(key_.document_, key_.node_ + 1).after();
      return *this;
    }
    bool operator!=(const Iterator& other) const noexcept { return key_.node_ != other.key_.node_; }

   private:
    friend class Members;
    explicit Iterator(JsonValue key) noexcept : key_(key) {}
    JsonValue key_;
  };
  Iterator begin() const noexcept { return Iterator(JsonValue(document_, first_)); }
  Iterator end() const noexcept { return Iterator(JsonValue(document_, last_)); }

 private:
  friend class JsonValue;
  const JsonDocument* document_ = nullptr;
  uint32_t first_ = 0, last_ = 0;
};

// Typed members of `object`.  Errors: kFormat that names key, value and bound.  Where there is a
// fallback, it stands for a member that is absent or null.
Result<int64_t> json_integer(JsonValue object, std::string_view key, int64_t min, int64_t max);
Result<int64_t> json_integer_or(JsonValue object, std::string_view key, int64_t fallback,
                                int64_t min, int64_t max);
Result<double> json_number(JsonValue object, std::string_view key, double min, double max);
Result<double> json_number_or(JsonValue object, std::string_view key, double fallback, double min,
                              double max);
Result<bool> json_boolean_or(JsonValue object, std::string_view key, bool fallback);
Result<std::string_view> json_string(JsonValue object, std::string_view key);
Result<std::string_view> json_string_or(JsonValue object, std::string_view key,
                                        std::string_view fallback);

// A whole file as text.  Errors as open_file; kFormat when it is larger than `max_bytes`.
Result<std::string> read_text_file(const std::string& path, int64_t max_bytes);

// A value for messages and listings: numbers and strings as they are, "[n values]", "{n members}".
std::string json_text(JsonValue value);

// "object", "string", ...; a static string.
const char* json_type_name(JsonType type) noexcept;

}  // namespace fathom::io
