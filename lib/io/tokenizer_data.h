// The tables of a tokenizer, as the running program uses them.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "arena.h"
#include "fathom/tokenizer.hpp"
#include "tokenizer_added.h"
#include "tokenizer_bpe.h"
#include "tokenizer_index.h"
#include "tokenizer_split.h"

namespace fathom {

struct Tokenizer::Data {
  io::SplitKind split = io::SplitKind::kDeepSeekLlm;
  ChatFormat chat = ChatFormat::kNone;
  int32_t bos = -1, eos = -1;
  bool adds_bos = false;
  int64_t n_tokens = 0;
  int64_t size_bytes = 0;

  const char* bytes = nullptr;          // the bytes of all tokens, one after another
  const uint32_t* end = nullptr;        // [n_tokens] where each ends
  const uint8_t* control = nullptr;     // [n_tokens] 1: a control token
  const int32_t* byte_token = nullptr;  // [256] token of each byte; -1: one that UTF-8 never has
  io::MergeTable merges;
  io::AddedMatcher added[2];  // first pass, second pass
  io::TextIndex index;        // bytes of a token -> id

  std::shared_ptr<void> owner;  // of the block that all these point into

  std::string_view token(uint32_t id) const noexcept {
    const uint32_t begin = id == 0 ? 0 : end[id - 1];
    return {bytes + begin, end[id] - begin};
  }
  bool has(int32_t id) const noexcept { return id >= 0 && id < n_tokens; }
};

}  // namespace fathom
