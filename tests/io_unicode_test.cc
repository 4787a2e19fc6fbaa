// UTF-8 by an independent definition (the set of all encodings), and the generated classes.
#include <catch2/catch.hpp>
#include <string>
#include <unordered_set>

#include "lib/io/unicode.h"

using namespace fathom::io;

namespace {

std::string encoded(uint32_t point) {
  std::string text;
  append_code_point(point, text);
  return text;
}

bool is_surrogate(uint32_t point) {
  return point >= 0xD800 && point <= 0xDFFF;
}

// Beginnings of encodings and whole encodings, as numbers 1 b b b b.
struct Encodings {
  std::unordered_set<uint64_t> whole, beginnings;
  static uint64_t number(std::string_view bytes) {
    uint64_t n = 1;
    for (const char byte : bytes) n = n << 8 | static_cast<unsigned char>(byte);
    return n;
  }
  Encodings() {
    for (uint32_t point = 0; point <= 0x10FFFF; ++point) {
      if (is_surrogate(point)) continue;
      const std::string text = encoded(point);
      whole.insert(number(text));
      for (size_t n = 1; n < text.size(); ++n) beginnings.insert(number(text.substr(0, n)));
    }
  }
};

std::string replaced(std::string_view text) {
  std::string out;
  append_utf8_replacing(text, out);
  return out;
}

}  // namespace

TEST_CASE("every code point goes round") {
  for (uint32_t point = 0; point <= 0x10FFFF; ++point) {
    if (is_surrogate(point)) continue;
    const std::string text = encoded(point);
    const char* at = text.data();
    const Utf8Step step = utf8_step(text);
    if (next_code_point(at) != point || at != text.data() + text.size() ||
        step.form != Utf8Form::kCharacter || step.length != static_cast<int>(text.size()) ||
        utf8_valid_prefix(text) != text.size())
      FAIL("U+" << std::hex << point);
  }
}

TEST_CASE("sequences of bytes: characters, beginnings and maximal ill-formed subparts") {
  const Encodings encodings;
  CHECK(encodings.whole.size() == 0x110000 - 0x800);
  const auto check = [&](std::string_view bytes) {
    // By definition: the longest start that begins an encoding, at least one byte.
    Utf8Step expected = {Utf8Form::kInvalid, 1};
    for (size_t n = 1; n <= bytes.size(); ++n) {
      const uint64_t number = Encodings::number(bytes.substr(0, n));
      if (encodings.whole.count(number)) {
        expected = {Utf8Form::kCharacter, static_cast<int>(n)};
        break;
      }
      if (!encodings.beginnings.count(number)) break;
      expected = {n == bytes.size() ? Utf8Form::kIncomplete : Utf8Form::kInvalid,
                  static_cast<int>(n)};
    }
    const Utf8Step step = utf8_step(bytes);
    if (step.form != expected.form || step.length != expected.length)
      FAIL("bytes " << std::hex << Encodings::number(bytes) << ": form "
                    << static_cast<int>(step.form) << ", length " << step.length << ", expected "
                    << static_cast<int>(expected.form) << ", " << expected.length);
  };
  // Second and third bytes at and around every border of the definition.
  const unsigned char borders[] = {0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F,
                                   0xA0, 0xBF, 0xC0, 0xC2, 0xE0, 0xF4, 0xFF};
  for (int lead = 0; lead < 256; ++lead) {
    check(std::string(1, static_cast<char>(lead)));
    for (int second = 0; second < 256; ++second) {
      const std::string two = {static_cast<char>(lead), static_cast<char>(second)};
      check(two);
      for (const unsigned char third : borders) {
        const std::string three = two + static_cast<char>(third);
        check(three);
        for (const unsigned char fourth : borders) check(three + static_cast<char>(fourth));
      }
    }
  }
}

TEST_CASE("replacing: the example of the Unicode standard, table 3-11") {
  CHECK(replaced("\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64") ==
        "a\uFFFD\uFFFD\uFFFDb\uFFFDc\uFFFD\uFFFDd");
  CHECK(replaced("") == "");
  CHECK(replaced("long enough for words of eight bytes, \xC3\xA9, \xFF!") ==
        "long enough for words of eight bytes, \u00E9, \uFFFD!");
  CHECK(replaced("\xF0\x9F\x98") == "\uFFFD");
  std::string out = "kept ";
  CHECK(append_utf8_complete("ab\xF0\x9F\x98", out) == 3);
  CHECK(out == "kept ab");
  CHECK(append_utf8_complete("\xF0\x9F\x41\xE4\xBD", out) == 2);
  CHECK(out == "kept ab\uFFFDA");
  CHECK(append_utf8_complete("\xFF", out) == 0);
  CHECK(out == "kept ab\uFFFDA\uFFFD");
}

TEST_CASE("classes of characters") {
  CHECK(char_classes('a') == (kLetter | kLlmLetter | kLlmPunct));
  CHECK(char_classes('7') == kNumber);
  CHECK(char_classes('!') == (kPunct | kLlmPunct));
  CHECK(char_classes('+') == (kSymbol | kLlmPunct));
  CHECK(char_classes(' ') == kSpace);
  CHECK(char_classes(0x85) == kSpace);     // next line
  CHECK(char_classes(0x200B) == kLlmCjk);  // zero width space is no space
  CHECK(char_classes(0x3000) == (kSpace | kLlmPunct | kLlmCjk));
  CHECK(char_classes(0x301) == kMark);
  CHECK(char_classes(0x4E00) == (kLetter | kLlmCjk | kV3Cjk));
  CHECK(char_classes(0x9FA5) == (kLetter | kLlmCjk | kV3Cjk));
  CHECK(char_classes(0x9FA6) == kLetter);
  CHECK(char_classes(0x30FB) == (kPunct | kLlmCjk | kV3Cjk));
  CHECK(char_classes(0x3099) == (kMark | kLlmCjk | kV3Cjk));
  CHECK(char_classes(0xAC00) == (kLetter | kLlmCjk));
  CHECK(char_classes(0xBD) == kNumber);                // one half
  CHECK(char_classes(0x1C89) == (kLetter | kLlmCjk));  // new in Unicode 16
  CHECK(char_classes(0x1F600) == kSymbol);
  CHECK(char_classes(0x20000) == kLetter);
  CHECK(char_classes(0xE000) == 0);
  CHECK(char_classes(0x10FFFF) == 0);
  // At most one general category each; their sizes in Unicode 16.0.
  int counts[5] = {};
  for (uint32_t point = 0; point <= 0x10FFFF; ++point) {
    const uint32_t category = char_classes(point) & (kLetter | kMark | kNumber | kPunct | kSymbol);
    if ((category & (category - 1)) != 0) FAIL("U+" << std::hex << point);
    for (int i = 0; i < 5; ++i) counts[i] += (category >> i) & 1;
  }
  CHECK(counts[0] == 141028);
  CHECK(counts[1] == 2501);
  CHECK(counts[2] == 1911);
  CHECK(counts[3] == 855);
  CHECK(counts[4] == 8514);
}
