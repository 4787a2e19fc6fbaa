// A tokenizer as its file tells it, from either format, before anything is believed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fathom/status.hpp"
#include "tensor_file.h"
#include "tokenizer_split.h"

namespace fathom::io {

// GGUF's token_type; tokenizer.json knows normal, control ("special") and user ("added").
enum class TokenType : uint8_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUser = 4,
  kUnused = 5,
  kByte = 6,
};
// Added tokens are looked for in the text before it is split: the first pass, then in what is left
// the second (tokenizer.json calls the tokens of the second pass "normalized").
enum class AddedPass : uint8_t { kNone, kFirst, kSecond };

// Most ids that a vocabulary may have; the largest in circulation has 164 thousand.
inline constexpr int64_t kMaxTokens = int64_t{1} << 24;

struct RawTokenizer {
  SplitKind split = SplitKind::kDeepSeekLlm;
  std::vector<std::string_view> pieces;  // by id, byte-level alphabet; empty: no such id
  std::vector<TokenType> types;          // by id
  std::vector<AddedPass> added;          // by id
  std::vector<std::pair<std::string_view, std::string_view>> merges;  // left, right; by rank
  int64_t bos = -1, eos = -1;
  bool adds_bos = false;
  std::string chat_template;
  std::shared_ptr<void> keep;  // what the views point into; null: the TokenizerSource
};

// The views point into `source`.  Errors: kUnsupported (another kind of tokenizer), kFormat.
Result<RawTokenizer> raw_from_gguf(const TokenizerSource& source);
// From the texts of tokenizer.json and tokenizer_config.json (empty: there is none).
// Errors: kFormat with the offset in the text, kUnsupported.
Result<RawTokenizer> raw_from_json(std::string_view tokenizer_json, std::string_view config_json);

// "left right", the form in which both formats store merges.
Result<std::pair<std::string_view, std::string_view>> split_merge(std::string_view merge,
                                                                  size_t rank);
// For messages: a piece cut to a length that can be shown.
std::string quoted_piece(std::string_view piece);

}  // namespace fathom::io
