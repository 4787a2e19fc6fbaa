// A small, valid tokenizer.json to start from: the 256 bytes, a few merges, two added tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fathom/tokenizer.hpp"
#include "lib/io/tokenizer.h"
#include "lib/io/tokenizer_split.h"
#include "lib/io/unicode.h"

namespace fathom::test {

// A byte as a character of the byte-level alphabet (GPT-2's bytes_to_unicode).
inline std::string byte_character(int byte) {
  int next = 256;
  for (int b = 0; b <= 255; ++b) {
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    const int point = printable ? b : next++;
    if (b != byte) continue;
    std::string text;
    io::append_code_point(static_cast<uint32_t>(point), text);
    return text;
  }
  return {};
}

using MergeList = std::vector<std::pair<std::string, std::string>>;

// Ids 0..255 are the bytes, then what each merge makes (unless it is there), then kBos and kUser.
inline constexpr const char *kBos = "<bos>", *kUser = "<user>";
inline nlohmann::json small_tokenizer(io::SplitKind kind, const MergeList& merges) {
  using nlohmann::json;
  json vocab = json::object();
  for (int byte = 0; byte < 256; ++byte) vocab[byte_character(byte)] = byte;
  json merge_list = json::array();
  for (const auto& [left, right] : merges) {
    merge_list.push_back(left + " " + right);
    if (!vocab.contains(left + right)) vocab[left + right] = vocab.size();
  }
  json steps = json::array();
  for (const std::string_view pattern : io::split_patterns(kind)) {
    if (pattern == io::kDigits)
      steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
    else
      steps.push_back({{"type", "Split"},
                       {"pattern", {{"Regex", pattern}}},
                       {"behavior", "Isolated"},
                       {"invert", false}});
  }
  steps.push_back({{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}});
  const size_t n = vocab.size();
  return {
      {"added_tokens",
       {{{"id", n}, {"content", kBos}, {"special", true}, {"normalized", false}},
        {{"id", n + 1}, {"content", kUser}, {"special", false}, {"normalized", true}}}},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", steps}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merge_list}}},
  };
}
inline nlohmann::json small_tokenizer(io::SplitKind kind = io::SplitKind::kDeepSeekV3) {
  return small_tokenizer(kind, {{"h", "e"},
                                {"l", "l"},
                                {"he", "ll"},
                                {"hell", "o"},
                                {byte_character(' '), "hello"},
                                {"a", "a"},
                                {"aa", "aa"},
                                {byte_character(0xE4), byte_character(0xBD)}});
}

// Built on the heap, in a block of exactly the bytes it asked for.
inline Result<Tokenizer> build_tokenizer(Result<io::TokenizerBuilder> builder) {
  if (!builder.ok()) return std::move(builder).status();
  constexpr std::align_val_t kAlignment{64};
  const auto size = static_cast<size_t>(builder->size_bytes());
  std::shared_ptr<void> block(::operator new(size, kAlignment),
                              [](void* p) { ::operator delete(p, kAlignment); });
  const std::span storage(static_cast<std::byte*>(block.get()), size);
  return std::move(*builder).build(storage, std::move(block));
}
inline Result<Tokenizer> build_tokenizer(const nlohmann::json& file) {
  return build_tokenizer(io::TokenizerBuilder::parse_json(file.dump(), ""));
}

}  // namespace fathom::test
