// The pre-split: cuts a text into the pieces that byte-pair merges may not cross.  The reference
// applies a list of regular expressions one after the other, each to every piece that the one
// before left, and each isolates its matches.  Here every expression is a hand-written matcher that
// looks at each character a bounded number of times, so the whole is linear for any text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace fathom::io {

enum class SplitKind : uint8_t { kDeepSeekLlm, kDeepSeekCoder, kDeepSeekV3 };

// "deepseek-llm", "deepseek-coder", "deepseek-v3": the values of tokenizer.ggml.pre.
std::string_view split_name(SplitKind kind) noexcept;

// The regular expressions of a kind as tokenizer.json has them; kDigits stands for the
// pre-tokenizer "Digits" with individual_digits.
inline constexpr std::string_view kDigits = "\\p{N}";
std::span<const std::string_view> split_patterns(SplitKind kind) noexcept;

// Calls emit(context, piece) for the pieces of `text` (valid UTF-8) in order; they are not empty
// and together they are the text.
using PieceFunction = void (*)(void* context, std::string_view piece);
void split_text(SplitKind kind, std::string_view text, PieceFunction emit, void* context);

}  // namespace fathom::io
