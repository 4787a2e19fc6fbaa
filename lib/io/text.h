// Checks on text from files: names and values that are shown, compared and handed to hosts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fathom::io {

// Bytes of the UTF-8 character that begins at `p` (1 to 4), or 0 when there is none: stray and
// missing continuation bytes, overlong forms, surrogates, numbers beyond U+10FFFF.
inline int utf8_length(const char* p, const char* end) noexcept {
  const auto byte = [p](int i) { return static_cast<unsigned char>(p[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  int length;
  unsigned char low = 0x80, high = 0xBF;  // bounds of the second byte (Unicode, table 3-7)
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return 0;
  }
  if (end - p < length || byte(1) < low || byte(1) > high) return 0;
  for (int i = 2; i < length; ++i)
    if (byte(i) < 0x80 || byte(i) > 0xBF) return 0;
  return length;
}

// True when `text` is valid UTF-8 without a zero byte.
inline bool is_plain_utf8(std::string_view text) noexcept {
  const char* p = text.data();
  const char* const end = p + text.size();
  while (p < end) {
    const int length = *p == '\0' ? 0 : utf8_length(p, end);
    if (length == 0) return false;
    p += length;
  }
  return true;
}

// True for what keys and tensor names may be: plain UTF-8 without control characters, which would
// reach terminals through messages.
inline bool is_plain_name(std::string_view text) noexcept {
  for (const char c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) return false;
  return is_plain_utf8(text);
}

// `text` as it may stand in a message: at most about `max_bytes`, what cannot be printed as "?".
inline std::string printable(std::string_view text, size_t max_bytes = 100) {
  std::string out;
  const char* p = text.data();
  const char* const end = p + text.size();
  while (p < end && out.size() < max_bytes) {
    const int length = utf8_length(p, end);
    if (length == 0 || static_cast<unsigned char>(*p) < 0x20 || *p == 0x7F)
      out += '?';
    else
      out.append(p, static_cast<size_t>(length));
    p += length == 0 ? 1 : length;
  }
  if (p < end) out += "...";
  return out;
}

// Changes of a character that make `a` into `b` (Levenshtein, one row of memory), for "the nearest
// known key is".  Looks at 128 bytes of each: longer words resemble none, and the cost is bounded.
inline size_t edit_distance(std::string_view a, std::string_view b) {
  constexpr size_t kLongest = 128;
  a = a.substr(0, kLongest);
  b = b.substr(0, kLongest);
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

// The layer number of a tensor name: "blk.12.attn_norm.weight" with prefix "blk." gives 12; -1 when
// the name does not start with prefix, digits and a dot.  Numbers beyond a million are a million.
inline int64_t layer_of(std::string_view name, std::string_view prefix) noexcept {
  if (!name.starts_with(prefix)) return -1;
  name.remove_prefix(prefix.size());
  constexpr int64_t kMany = 1'000'000;
  int64_t layer = 0;
  size_t digits = 0;
  for (; digits < name.size() && name[digits] >= '0' && name[digits] <= '9'; ++digits) {
    layer = layer * 10 + (name[digits] - '0');
    if (layer > kMany) layer = kMany;
  }
  return digits > 0 && digits < name.size() && name[digits] == '.' ? layer : -1;
}

}  // namespace fathom::io
