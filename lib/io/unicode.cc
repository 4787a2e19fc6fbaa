#include "unicode.h"

#include <cstring>

namespace fathom::io {
namespace {

// Bytes of `text` that are ASCII from the start, eight at a time.
size_t ascii_prefix(std::string_view text) noexcept {
  size_t n = 0;
  for (; n + 8 <= text.size(); n += 8) {
    uint64_t word;
    std::memcpy(&word, text.data() + n, 8);
    if (word & 0x8080808080808080u) break;
  }
  while (n < text.size() && static_cast<unsigned char>(text[n]) < 0x80) ++n;
  return n;
}

}  // namespace

Utf8Step utf8_step(std::string_view text) noexcept {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Utf8Form::kCharacter, 1};
  int length;
  unsigned char low = 0x80, high = 0xBF;  // bounds of the second byte
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
    return {Utf8Form::kInvalid, 1};
  }
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) == text.size()) return {Utf8Form::kIncomplete, i};
    if (byte(static_cast<size_t>(i)) < low || byte(static_cast<size_t>(i)) > high)
      return {Utf8Form::kInvalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8Form::kCharacter, length};
}

size_t utf8_valid_prefix(std::string_view text) noexcept {
  size_t at = 0;
  while (true) {
    at += ascii_prefix(text.substr(at));
    if (at == text.size()) return at;
    const Utf8Step step = utf8_step(text.substr(at));
    if (step.form != Utf8Form::kCharacter) return at;
    at += static_cast<size_t>(step.length);
  }
}

size_t append_utf8_complete(std::string_view text, std::string& out) {
  while (true) {
    const size_t valid = utf8_valid_prefix(text);
    out.append(text.substr(0, valid));
    text.remove_prefix(valid);
    if (text.empty()) return 0;
    const Utf8Step step = utf8_step(text);
    if (step.form == Utf8Form::kIncomplete) return text.size();
    out.append(kReplacement);
    text.remove_prefix(static_cast<size_t>(step.length));
  }
}

void append_utf8_replacing(std::string_view text, std::string& out) {
  if (append_utf8_complete(text, out) > 0) out.append(kReplacement);
}

void append_code_point(uint32_t point, std::string& out) {
  const auto add = [&](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (point < 0x80) {
    add(point);
  } else if (point < 0x800) {
    add(0xC0 | point >> 6);
    add(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    add(0xE0 | point >> 12);
    add(0x80 | (point >> 6 & 0x3F));
    add(0x80 | (point & 0x3F));
  } else {
    add(0xF0 | point >> 18);
    add(0x80 | (point >> 12 & 0x3F));
    add(0x80 | (point >> 6 & 0x3F));
    add(0x80 | (point & 0x3F));
  }
}

}  // namespace fathom::io
