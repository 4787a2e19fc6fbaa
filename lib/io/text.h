// Checks on text from files: names and values that are shown, compared and handed to hosts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fathom::io {

// True when `text` is valid UTF-8 without a zero byte (no overlong forms, no surrogates).
inline bool is_plain_utf8(std::string_view text) noexcept {
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const auto* const end = p + text.size();
  while (p < end) {
    const unsigned char lead = *p++;
    if (lead == 0) return false;
    if (lead < 0x80) continue;
    int more;
    unsigned char low = 0x80, high = 0xBF;  // bounds of the second byte (Unicode, table 3-7)
    if (lead >= 0xC2 && lead <= 0xDF) {
      more = 1;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      more = 2;
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      more = 3;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    } else {
      return false;
    }
    if (end - p < more || *p < low || *p > high) return false;
    for (++p, --more; more > 0; ++p, --more)
      if (*p < 0x80 || *p > 0xBF) return false;
  }
  return true;
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
