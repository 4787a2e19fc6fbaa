// TokenizerSource of a GGUF file -> RawTokenizer.
#include <fmt/format.h>

#include "tokenizer_raw.h"
#include "unicode.h"

namespace fathom::io {
namespace {

Status inconsistent(std::string_view key, std::string_view message) {
  return Status(Code::kFormat, fmt::format("{} {}", key, message)).about(key);
}

// The texts of an array that is stored in one string with the ends of its elements.
Result<std::vector<std::string_view>> elements(std::string_view key, std::string_view all,
                                               const std::vector<uint32_t>& ends) {
  std::vector<std::string_view> texts;
  texts.reserve(ends.size());
  uint32_t begin = 0;
  for (const uint32_t end : ends) {
    if (end < begin || end > all.size()) return inconsistent(key, "has elements out of order");
    texts.push_back(all.substr(begin, end - begin));
    begin = end;
  }
  return texts;
}

}  // namespace

Result<std::pair<std::string_view, std::string_view>> split_merge(std::string_view merge,
                                                                  size_t rank) {
  const size_t space = merge.find(' ');
  if (space == merge.npos)
    return Status(Code::kFormat,
                  fmt::format("merge {} is {}, which has no space between two tokens", rank,
                              quoted_piece(merge)))
        .about("merges");
  return std::pair(merge.substr(0, space), merge.substr(space + 1));
}

std::string quoted_piece(std::string_view piece) {
  constexpr size_t kShown = 60;
  std::string text = "\"";
  append_utf8_replacing(piece.substr(0, kShown), text);
  text += piece.size() > kShown ? fmt::format("\" ... ({} bytes)", piece.size()) : "\"";
  return text;
}

Result<RawTokenizer> raw_from_gguf(const TokenizerSource& source) {
  if (source.gguf_model != "gpt2")
    return Status(Code::kUnsupported,
                  fmt::format("tokenizer.ggml.model is {}; only \"gpt2\" (byte-level BPE) is read",
                              quoted_piece(source.gguf_model)))
        .about("tokenizer.ggml.model");
  RawTokenizer raw;
  bool known = false;
  for (const SplitKind kind :
       {SplitKind::kDeepSeekLlm, SplitKind::kDeepSeekCoder, SplitKind::kDeepSeekV3}) {
    if (source.gguf_pre != split_name(kind)) continue;
    raw.split = kind;
    known = true;
  }
  if (!known)
    return Status(
               Code::kUnsupported,
               fmt::format("tokenizer.ggml.pre is {}; known are deepseek-llm, deepseek-coder and "
                           "deepseek-v3",
                           quoted_piece(source.gguf_pre)))
        .about("tokenizer.ggml.pre");

  const size_t n = source.piece_end.size();
  if (n > static_cast<size_t>(kMaxTokens))
    return Status(Code::kUnsupported,
                  fmt::format("tokenizer.ggml.tokens has {} tokens, at most {} are read", n,
                              kMaxTokens))
        .about("tokenizer.ggml.tokens");
  FATHOM_TRY_ASSIGN(raw.pieces, elements("tokenizer.ggml.tokens", source.pieces, source.piece_end));
  if (!source.token_type.empty() && source.token_type.size() != n)
    return inconsistent("tokenizer.ggml.token_type",
                        fmt::format("has {} elements for {} tokens", source.token_type.size(), n));
  raw.types.assign(n, TokenType::kNormal);
  raw.added.assign(n, AddedPass::kNone);
  for (size_t id = 0; id < source.token_type.size(); ++id) {
    const int32_t type = source.token_type[id];
    if (type < 1 || type > 6)
      return inconsistent("tokenizer.ggml.token_type",
                          fmt::format("of token {} is {}, must be in [1, 6]", id, type));
    raw.types[id] = static_cast<TokenType>(type);
    if (raw.types[id] == TokenType::kControl || raw.types[id] == TokenType::kUser)
      raw.added[id] = AddedPass::kFirst;
  }

  FATHOM_TRY_ASSIGN(const std::vector<std::string_view> merges,
                    elements("tokenizer.ggml.merges", source.merges, source.merge_end));
  raw.merges.reserve(merges.size());
  for (const std::string_view merge : merges) {
    FATHOM_TRY_ASSIGN(const auto pair, split_merge(merge, raw.merges.size()));
    raw.merges.push_back(pair);
  }
  raw.bos = source.bos_token_id;
  raw.eos = source.eos_token_id;
  raw.adds_bos = source.add_bos_token;
  raw.chat_template = source.chat_template;
  return raw;
}

}  // namespace fathom::io
