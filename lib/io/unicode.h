// UTF-8 and character classes for the tokenizer.  Independent of locale and of the C++ library's
// idea of characters; the class tables are generated (unicode_tables.py, Unicode 16).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "unicode_tables.h"

namespace fathom::io {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

// What stands at the start of a sequence of bytes.
enum class Utf8Form : uint8_t {
  kCharacter,   // a whole character of `length` bytes
  kIncomplete,  // all bytes there are: a proper beginning of a character
  kInvalid,     // `length` bytes that are a maximal ill-formed subpart (Unicode 3.9, table 3-7)
};
struct Utf8Step {
  Utf8Form form;
  int length;  // 1..4
};
// Looks at the first bytes of `text`, which is not empty.
Utf8Step utf8_step(std::string_view text) noexcept;

// Length of the longest prefix that is valid UTF-8.
size_t utf8_valid_prefix(std::string_view text) noexcept;
// Appends `text` with U+FFFD for each maximal ill-formed subpart, an incomplete end among them.
void append_utf8_replacing(std::string_view text, std::string& out);
// The same, but an incomplete end (at most 3 bytes) is not appended: returns its length.
size_t append_utf8_complete(std::string_view text, std::string& out);

// Decodes the character at `at` of *valid* UTF-8 and moves past it.
inline uint32_t next_code_point(const char*& at) noexcept {
  const auto byte = [&](int i) { return static_cast<uint32_t>(static_cast<unsigned char>(at[i])); };
  const uint32_t lead = byte(0);
  uint32_t point;
  if (lead < 0x80) {
    point = lead;
    at += 1;
  } else if (lead < 0xE0) {
    point = (lead & 0x1F) << 6 | (byte(1) & 0x3F);
    at += 2;
  } else if (lead < 0xF0) {
    point = (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    at += 3;
  } else {
    point = (lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
    at += 4;
  }
  return point;
}

void append_code_point(uint32_t point, std::string& out);

// CharClass bits of a code point (at most 0x10FFFF).
inline uint32_t char_classes(uint32_t point) noexcept {
  const uint32_t block = kClassBlock[point / kClassBlockSize];
  return kClassSets[kClassOfBlock[block * kClassBlockSize + point % kClassBlockSize]];
}

}  // namespace fathom::io
