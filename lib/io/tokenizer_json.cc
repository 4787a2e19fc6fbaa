// tokenizer.json and tokenizer_config.json (Hugging Face) -> RawTokenizer.  Understood is what
// DeepSeek's files hold: a BPE model, one of the three sequences of pre-tokenizers, ByteLevel.
#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>

#include "json.h"
#include "tokenizer_raw.h"

namespace fathom::io {
namespace {

// DeepSeek-V3's file has 0.4 million values in 4 MB; this bounds the tree to 128 MB.
constexpr JsonLimits kLimits = {
    .max_bytes = int64_t{64} << 20, .max_depth = 32, .max_values = int64_t{1} << 22};

// Names that all DeepSeek tokenizers use, for a folder without tokenizer_config.json.
constexpr std::string_view kBosName = "<｜begin▁of▁sentence｜>", kEosName = "<｜end▁of▁sentence｜>";

Status unsupported(std::string_view what, JsonValue value) {
  return Status(Code::kUnsupported, fmt::format("{}: this tokenizer is none of deepseek-llm, "
                                                "deepseek-coder and deepseek-v3",
                                                what))
      .about(what)
      .at(value.offset());
}

Status malformed(std::string_view message, JsonValue value) {
  return Status(Code::kFormat, fmt::format("{} (byte {})", message, value.offset()))
      .at(value.offset());
}

bool has_type(JsonValue object, std::string_view type) {
  return object.find("type").string() == type;
}

bool is_false_or_absent(JsonValue value) {
  return value.is_null_or_absent() || (value.type() == JsonType::kBool && !value.boolean());
}

// A regular expression with the escapes \r and \n written as the characters they stand for, since
// files use both ways.
std::string plain_newlines(std::string_view pattern) {
  std::string plain;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '\\' || i + 1 == pattern.size()) {
      plain += pattern[i];
      continue;
    }
    const char escaped = pattern[++i];
    if (escaped == 'r') {
      plain += '\r';
    } else if (escaped == 'n') {
      plain += '\n';
    } else {
      plain += '\\';
      plain += escaped;
    }
  }
  return plain;
}

// The regular expression of one element of the sequence, kDigits for Digits; "" for others.
std::string pattern_of(JsonValue element) {
  if (has_type(element, "Digits"))
    return std::string(element.find("individual_digits").boolean() ? kDigits : std::string_view());
  const bool isolates = has_type(element, "Split") &&
                        element.find("behavior").string() == "Isolated" &&
                        is_false_or_absent(element.find("invert"));
  return isolates ? plain_newlines(element.find("pattern").find("Regex").string()) : std::string();
}

Result<SplitKind> split_kind(JsonValue pre_tokenizer) {
  const Status unknown = unsupported("pre_tokenizer", pre_tokenizer);
  if (!has_type(pre_tokenizer, "Sequence")) return unknown.clone();
  std::vector<std::string> patterns;
  bool byte_level = false;
  constexpr int64_t kMaxPatterns = 16;
  if (pre_tokenizer.find("pretokenizers").size() > kMaxPatterns) return unknown.clone();
  for (const JsonValue element : pre_tokenizer.find("pretokenizers")) {
    if (byte_level) return unknown.clone();  // it must be the last
    if (has_type(element, "ByteLevel")) {
      // Both default to true in the reference.
      byte_level = element.find("add_prefix_space").type() == JsonType::kBool &&
                   !element.find("add_prefix_space").boolean() &&
                   element.find("use_regex").type() == JsonType::kBool &&
                   !element.find("use_regex").boolean();
      if (!byte_level) return unknown.clone();
    } else {
      patterns.push_back(pattern_of(element));
    }
  }
  if (!byte_level) return unknown.clone();
  for (const SplitKind kind :
       {SplitKind::kDeepSeekLlm, SplitKind::kDeepSeekCoder, SplitKind::kDeepSeekV3}) {
    const auto known = split_patterns(kind);
    if (std::equal(patterns.begin(), patterns.end(), known.begin(), known.end())) return kind;
  }
  return unknown.clone();
}

// Whether the post-processor puts a special token (bos) first.  Errors: kUnsupported.
Result<bool> begins_with_special(JsonValue post_processor) {
  if (post_processor.is_null_or_absent() || has_type(post_processor, "ByteLevel")) return false;
  if (has_type(post_processor, "TemplateProcessing")) {
    for (const JsonValue first : post_processor.find("single"))
      return first.find("SpecialToken").is_object();
    return false;
  }
  if (has_type(post_processor, "Sequence")) {
    bool begins = false;
    for (const JsonValue element : post_processor.find("processors")) {
      if (has_type(element, "Sequence")) return unsupported("post_processor", element);
      FATHOM_TRY_ASSIGN(const bool this_begins, begins_with_special(element));
      begins = begins || this_begins;
    }
    return begins;
  }
  return unsupported("post_processor", post_processor);
}

Status check_model(JsonValue model) {
  if (!model.is_object()) return malformed("\"model\" is not an object", model);
  // Old files leave the type out.
  if (const JsonValue type = model.find("type"); !type.is_absent() && type.string() != "BPE")
    return unsupported("model.type", type);
  for (const std::string_view key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const JsonValue value = model.find(key);
    if (!value.is_null_or_absent() && !(value.is_string() && value.string().empty()))
      return unsupported(key, value);
  }
  if (const JsonValue dropout = model.find("dropout");
      !dropout.is_null_or_absent() && dropout.number() != 0)
    return unsupported("model.dropout", dropout);
  for (const std::string_view key : {"byte_fallback", "ignore_merges"})
    if (const JsonValue value = model.find(key); !is_false_or_absent(value))
      return unsupported(key, value);
  return {};
}

struct Entry {
  std::string_view piece;
  JsonValue id;
  TokenType type = TokenType::kNormal;
  AddedPass added = AddedPass::kNone;
};

// The entries of "added_tokens".
Status read_added(JsonValue list, std::vector<Entry>& entries) {
  if (list.is_null_or_absent()) return {};
  if (!list.is_array()) return malformed("\"added_tokens\" is not an array", list);
  for (const JsonValue token : list) {
    Entry entry;
    FATHOM_TRY_ASSIGN(entry.piece, json_string(token, "content"));
    entry.id = token.find("id");
    for (const std::string_view key : {"single_word", "lstrip", "rstrip"})
      if (const JsonValue value = token.find(key); !is_false_or_absent(value))
        return unsupported(key, value);
    FATHOM_TRY_ASSIGN(const bool special, json_boolean_or(token, "special", false));
    FATHOM_TRY_ASSIGN(const bool normalized, json_boolean_or(token, "normalized", !special));
    entry.type = special ? TokenType::kControl : TokenType::kUser;
    entry.added = normalized ? AddedPass::kSecond : AddedPass::kFirst;
    entries.push_back(entry);
  }
  return {};
}

// Puts the entries, vocabulary first, in the order of their ids.
Status place_entries(const std::vector<Entry>& entries, RawTokenizer& raw) {
  // Ids need not be dense, but a table by id must not be larger than the file justifies.
  const int64_t bound =
      std::min<int64_t>(kMaxTokens, static_cast<int64_t>(entries.size()) * 2 + 65536);
  int64_t n_ids = 0;
  for (const Entry& entry : entries) {
    const int64_t id = entry.id.integer();
    if (entry.id.type() != JsonType::kInteger || id < 0 || id >= bound)
      return malformed(fmt::format("id {} of token {} must be an integer in [0, {})",
                                   json_text(entry.id), quoted_piece(entry.piece), bound),
                       entry.id);
    n_ids = std::max(n_ids, id + 1);
  }
  const auto n = static_cast<size_t>(n_ids);
  raw.pieces.resize(n);
  raw.types.assign(n, TokenType::kUnused);
  raw.added.assign(n, AddedPass::kNone);
  for (const Entry& entry : entries) {
    const auto id = static_cast<size_t>(entry.id.integer());
    if (entry.piece.empty())
      return malformed(fmt::format("token {} has an empty text", id), entry.id);
    // Added tokens may stand in the vocabulary too, under the same id.
    const bool again = entry.added != AddedPass::kNone && raw.added[id] == AddedPass::kNone &&
                       raw.pieces[id] == entry.piece;
    if (!raw.pieces[id].empty() && !again)
      return malformed(fmt::format("tokens {} and {} have the same id {}",
                                   quoted_piece(raw.pieces[id]), quoted_piece(entry.piece), id),
                       entry.id);
    raw.pieces[id] = entry.piece;
    raw.types[id] = entry.type;
    raw.added[id] = entry.added;
  }
  return {};
}

Status read_merges(JsonValue list, RawTokenizer& raw) {
  if (!list.is_array()) return malformed("\"model.merges\" is not an array", list);
  raw.merges.reserve(static_cast<size_t>(list.size()));
  for (const JsonValue merge : list) {
    if (merge.is_string()) {
      FATHOM_TRY_ASSIGN(const auto pair, split_merge(merge.string(), raw.merges.size()));
      raw.merges.push_back(pair);
      continue;
    }
    std::vector<JsonValue> sides;
    if (merge.size() == 2)
      for (const JsonValue side : merge) sides.push_back(side);
    if (sides.size() != 2 || !sides[0].is_string() || !sides[1].is_string())
      return malformed(fmt::format("merge {} is no pair of strings", raw.merges.size()), merge);
    raw.merges.emplace_back(sides[0].string(), sides[1].string());
  }
  return {};
}

// The text of a token in tokenizer_config.json: a string, or an object with "content"; "" if null.
std::string_view token_text(JsonValue value) {
  return value.is_object() ? value.find("content").string() : value.string();
}

Result<int64_t> id_of(std::string_view key, std::string_view text, const RawTokenizer& raw,
                      bool must_exist) {
  if (text.empty()) return -1;
  const auto found = std::find(raw.pieces.begin(), raw.pieces.end(), text);
  if (found != raw.pieces.end()) return found - raw.pieces.begin();
  if (!must_exist) return -1;
  return Status(Code::kFormat,
                fmt::format("{} of tokenizer_config.json is {}, which is no token of "
                            "tokenizer.json",
                            key, quoted_piece(text)))
      .about(key);
}

Status read_config(std::string_view text, RawTokenizer& raw) {
  FATHOM_TRY_ASSIGN(const JsonDocument document, JsonDocument::parse(text));
  const JsonValue root = document.root();
  if (!root.is_object()) return malformed("tokenizer_config.json is not an object", root);
  FATHOM_TRY_ASSIGN(raw.bos, id_of("bos_token", token_text(root.find("bos_token")), raw, true));
  FATHOM_TRY_ASSIGN(raw.eos, id_of("eos_token", token_text(root.find("eos_token")), raw, true));
  FATHOM_TRY_ASSIGN(raw.adds_bos, json_boolean_or(root, "add_bos_token", raw.adds_bos));
  const JsonValue chat = root.find("chat_template");
  raw.chat_template = std::string(chat.string());
  for (const JsonValue named : chat)  // several templates: [{"name": ..., "template": ...}]
    if (named.find("name").string() == "default")
      raw.chat_template = std::string(named.find("template").string());
  return {};
}

}  // namespace

Result<RawTokenizer> raw_from_json(std::string_view tokenizer_json, std::string_view config_json) {
  FATHOM_TRY_ASSIGN(JsonDocument parsed, JsonDocument::parse(tokenizer_json, kLimits));
  const auto document = std::make_shared<JsonDocument>(std::move(parsed));
  const JsonValue root = document->root();
  if (!root.is_object()) return malformed("tokenizer.json is not an object", root);

  RawTokenizer raw;
  raw.keep = document;
  const JsonValue model = root.find("model");
  FATHOM_TRY(check_model(model));
  if (const JsonValue normalizer = root.find("normalizer");
      !normalizer.is_null_or_absent() &&
      !(has_type(normalizer, "Sequence") && normalizer.find("normalizers").is_array() &&
        normalizer.find("normalizers").size() == 0))
    return unsupported("normalizer", normalizer);
  FATHOM_TRY_ASSIGN(raw.split, split_kind(root.find("pre_tokenizer")));
  FATHOM_TRY_ASSIGN(raw.adds_bos, begins_with_special(root.find("post_processor")));
  if (const JsonValue decoder = root.find("decoder"); !has_type(decoder, "ByteLevel"))
    return unsupported("decoder", decoder);

  const JsonValue vocabulary = model.find("vocab");
  if (!vocabulary.is_object()) return malformed("\"model.vocab\" is not an object", vocabulary);
  std::vector<Entry> entries;
  entries.reserve(static_cast<size_t>(vocabulary.size()));
  for (const JsonMember member : vocabulary.members())
    entries.push_back({.piece = member.key, .id = member.value});
  FATHOM_TRY(read_added(root.find("added_tokens"), entries));
  FATHOM_TRY(place_entries(entries, raw));
  FATHOM_TRY(read_merges(model.find("merges"), raw));

  FATHOM_TRY_ASSIGN(raw.bos, id_of("bos_token", kBosName, raw, false));
  FATHOM_TRY_ASSIGN(raw.eos, id_of("eos_token", kEosName, raw, false));
  if (!config_json.empty()) {
    if (Status s = read_config(config_json, raw); !s.ok())
      return std::move(s).in("tokenizer_config.json");
  }
  return raw;
}

}  // namespace fathom::io
