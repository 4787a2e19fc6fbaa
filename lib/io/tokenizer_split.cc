// The three pre-splits.  A matcher answers the first match of its expression in [from, end) of a
// piece, the way a backtracking engine with leftmost, greedy semantics finds it.
#include "tokenizer_split.h"

#include "unicode.h"

namespace fathom::io {
namespace {

// clang-format off
constexpr std::string_view kLlmPatterns[] = {
    "[\r\n]",
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-"
    "\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-"
    "\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    kDigits,
};
constexpr std::string_view kCoderPatterns[] = {
    "[\r\n]",
    "\\s?\\p{L}+",
    "\\s?\\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    kDigits,
};
constexpr std::string_view kV3Patterns[] = {
    "\\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M"
    "}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
};
// clang-format on

// A character of valid UTF-8 and where it ends.
struct Char {
  uint32_t point;
  uint32_t classes;
  const char* end;
  bool is(uint32_t wanted) const noexcept { return (classes & wanted) != 0; }
  bool is_newline() const noexcept { return point == '\n' || point == '\r'; }
};

Char char_at(const char* at) noexcept {
  Char c;
  c.point = next_code_point(at);
  c.classes = char_classes(c.point);
  c.end = at;
  return c;
}

// The end of the longest run of characters of `wanted` classes that begins at `at`.
const char* run_end(const char* at, const char* end, uint32_t wanted) noexcept {
  while (at < end) {
    const Char c = char_at(at);
    if (!c.is(wanted)) break;
    at = c.end;
  }
  return at;
}

struct Match {
  const char* begin;
  const char* end;  // begin == end: no match
};

// An expression that can tell at each place, by looking only forward, whether and how far it
// matches: `Here` returns the end of the match at `at`, or `at`.
template <const char* (*Here)(const char* at, const char* end) noexcept>
Match first_match(const char* from, const char* end) noexcept {
  while (from < end) {
    const char* const match_end = Here(from, end);
    if (match_end != from) return {from, match_end};
    next_code_point(from);
  }
  return {end, end};
}

// [\r\n]
const char* newline_here(const char* at, const char*) noexcept {
  return *at == '\n' || *at == '\r' ? at + 1 : at;
}

// [Class]+
template <uint32_t Class>
const char* run_here(const char* at, const char* end) noexcept {
  return run_end(at, end, Class);
}

// \s?[Class]+   When the character after the space is none of the class, the space itself may be:
// U+3000 is both a space and in the punctuation of deepseek-llm.
template <uint32_t Class>
const char* spaced_run_here(const char* at, const char* end) noexcept {
  const Char first = char_at(at);
  if (first.is(kSpace)) {
    const char* const run = run_end(first.end, end, Class);
    if (run != first.end) return run;
  }
  return first.is(Class) ? run_end(first.end, end, Class) : at;
}

// Digits: every numeric character alone.
const char* digit_here(const char* at, const char*) noexcept {
  const Char c = char_at(at);
  return c.is(kNumber) ? c.end : at;
}

// \p{N}{1,3}
const char* number_here(const char* at, const char* end) noexcept {
  for (int n = 0; n < 3 && at < end; ++n) {
    const Char c = char_at(at);
    if (!c.is(kNumber)) break;
    at = c.end;
  }
  return at;
}

// \s+$   Pieces hold no newline here unless they are one, so $ is the end of the piece.  Found from
// behind, because a forward search would look at each run of spaces again from each of its places.
Match trailing_spaces(const char* from, const char* end) noexcept {
  const char* begin = end;
  while (begin > from) {
    const char* previous = begin - 1;
    while ((static_cast<unsigned char>(*previous) & 0xC0) == 0x80) --previous;
    if (!char_at(previous).is(kSpace)) break;
    begin = previous;
  }
  return {begin, end};
}

bool is_ascii_letter(uint32_t point) noexcept {
  return (point | 0x20) - 'a' < 26;
}
bool is_ascii_punct(uint32_t point) noexcept {
  return point > 0x20 && point < 0x7F && !is_ascii_letter(point) && point - '0' >= 10;
}

// The alternatives of deepseek-v3's last expression, in its order; the first that matches counts.
const char* v3_word_here(const char* at, const char* end) noexcept {
  constexpr uint32_t kWord = kLetter | kMark, kSign = kPunct | kSymbol;
  const Char first = char_at(at);
  const bool more = first.end < end;
  const Char second = more ? char_at(first.end) : Char{0, 0, end};

  // [ASCII punctuation][A-Za-z]+
  if (is_ascii_punct(first.point) && more && is_ascii_letter(second.point)) {
    at = second.end;
    while (at < end && is_ascii_letter(static_cast<unsigned char>(*at))) ++at;
    return at;
  }
  // [^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+
  if (!first.is_newline() && !first.is(kLetter | kSign) && more && second.is(kWord))
    return run_end(second.end, end, kWord);
  if (first.is(kWord)) return run_end(first.end, end, kWord);
  //  ?[\p{P}\p{S}]+[\r\n]*
  if (first.is(kSign) || (first.point == ' ' && more && second.is(kSign))) {
    at = run_end(first.end, end, kSign);
    while (at < end && (*at == '\n' || *at == '\r')) ++at;
    return at;
  }
  if (!first.is(kSpace)) return at;

  // \s*[\r\n]+ up to the last newline of the run of spaces;  \s+(?!\S) the run, less its last
  // character when something follows;  \s+ that last character.  The part of the run after the
  // last newline is looked at twice, no more.
  const char* run = at;
  const char* after_newline = nullptr;
  const char* last = at;
  while (run < end) {
    const Char c = char_at(run);
    if (!c.is(kSpace)) break;
    last = run;
    run = c.end;
    if (c.is_newline()) after_newline = run;
  }
  if (after_newline != nullptr) return after_newline;
  if (run == end || last == at) return run;
  return last;
}

using Matcher = Match (*)(const char* from, const char* end) noexcept;

constexpr Matcher kLlm[] = {first_match<newline_here>,
                            first_match<spaced_run_here<kLlmLetter>>,
                            first_match<spaced_run_here<kLlmPunct>>,
                            trailing_spaces,
                            first_match<run_here<kLlmCjk>>,
                            first_match<digit_here>};
constexpr Matcher kCoder[] = {first_match<newline_here>, first_match<spaced_run_here<kLetter>>,
                              first_match<spaced_run_here<kPunct>>, first_match<run_here<kLlmCjk>>,
                              first_match<digit_here>};
constexpr Matcher kV3[] = {first_match<number_here>, first_match<run_here<kV3Cjk>>,
                           first_match<v3_word_here>};

struct Output {
  PieceFunction emit;
  void* context;
};

// Each matcher cuts [begin, end); matches and what lies between go on to the next matcher.
void split(std::span<const Matcher> matchers, const char* begin, const char* end,
           const Output& out) {
  if (begin == end) return;
  if (matchers.empty()) {
    out.emit(out.context, std::string_view(begin, static_cast<size_t>(end - begin)));
    return;
  }
  while (begin < end) {
    const Match match = matchers.front()(begin, end);
    split(matchers.subspan(1), begin, match.begin, out);
    split(matchers.subspan(1), match.begin, match.end, out);
    begin = match.end;
  }
}

}  // namespace

std::string_view split_name(SplitKind kind) noexcept {
  switch (kind) {
    case SplitKind::kDeepSeekLlm:
      return "deepseek-llm";
    case SplitKind::kDeepSeekCoder:
      return "deepseek-coder";
    case SplitKind::kDeepSeekV3:
      return "deepseek-v3";
  }
  return "";
}

std::span<const std::string_view> split_patterns(SplitKind kind) noexcept {
  switch (kind) {
    case SplitKind::kDeepSeekLlm:
      return kLlmPatterns;
    case SplitKind::kDeepSeekCoder:
      return kCoderPatterns;
    case SplitKind::kDeepSeekV3:
      return kV3Patterns;
  }
  return {};
}

void split_text(SplitKind kind, std::string_view text, PieceFunction emit, void* context) {
  std::span<const Matcher> matchers = kV3;
  if (kind == SplitKind::kDeepSeekLlm) matchers = kLlm;
  if (kind == SplitKind::kDeepSeekCoder) matchers = kCoder;
  split(matchers, text.data(), text.data() + text.size(), {emit, context});
}

}  // namespace fathom::io
