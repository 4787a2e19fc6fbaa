// Files that a tokenizer is read from, mostly hostile: each is refused with its code, or read as
// the reference reads it.  And the builder's promise about its bytes.
#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "fathom/tokenizer.hpp"
#include "lib/io/tokenizer.h"
#include "support/small_tokenizer.h"

using namespace fathom;
using nlohmann::json;

namespace {

// The code that a text is refused with, or kOk; the message must not be empty.
Code code_of(const Result<io::TokenizerBuilder>& builder) {
  if (builder.ok()) return Code::kOk;
  INFO(builder.status().message());
  CHECK_FALSE(builder.status().message().empty());
  return builder.status().code();
}
Code code_of(const std::string& file, const std::string& config = "") {
  return code_of(io::TokenizerBuilder::parse_json(file, config));
}

struct Change {
  const char* what;
  Code expected;
  std::function<void(json&)> change;
};

json added(int64_t id, const std::string& content) {
  return {{"id", id}, {"content", content}, {"special", true}};
}

// A GGUF tokenizer: the bytes, two merges, an unused and a control token.
struct GgufTokens {
  std::vector<std::string> pieces;
  std::vector<std::string> merges = {"h e", "he l"};
  io::TokenizerSource source;

  GgufTokens() {
    source.gguf_model = "gpt2";
    source.gguf_pre = "deepseek-llm";
    for (int byte = 0; byte < 256; ++byte) pieces.push_back(test::byte_character(byte));
    source.token_type.assign(256, 1);
    add("he", 1);
    add("hel", 1);
    add("[PAD258]", 5);
    add("<eos>", 3);
    source.bos_token_id = source.eos_token_id = 259;
  }
  void add(const std::string& piece, int32_t type) {
    pieces.push_back(piece);
    source.token_type.push_back(type);
  }
  io::TokenizerSource flat() const {
    io::TokenizerSource flat = source;
    for (const std::string& piece : pieces) {
      flat.pieces += piece;
      flat.piece_end.push_back(static_cast<uint32_t>(flat.pieces.size()));
    }
    for (const std::string& merge : merges) {
      flat.merges += merge;
      flat.merge_end.push_back(static_cast<uint32_t>(flat.merges.size()));
    }
    return flat;
  }
};

}  // namespace

TEST_CASE("tokenizer.json: what is read and what is refused") {
  CHECK(code_of(test::small_tokenizer().dump()) == Code::kOk);
  const auto vocab = [](json& file) -> json& { return file["model"]["vocab"]; };
  const auto merges = [](json& file) -> json& { return file["model"]["merges"]; };
  const auto steps = [](json& file) -> json& { return file["pre_tokenizer"]["pretokenizers"]; };
  const Change changes[] = {
      // The vocabulary.
      {"no model", Code::kFormat, [](json& f) { f.erase("model"); }},
      {"model is a list", Code::kFormat, [](json& f) { f["model"] = json::array(); }},
      {"no vocabulary", Code::kFormat, [](json& f) { f["model"].erase("vocab"); }},
      {"vocabulary is a list", Code::kFormat, [](json& f) { f["model"]["vocab"] = {"a"}; }},
      {"empty vocabulary", Code::kFormat,
       [&](json& f) {
         vocab(f) = json::object();
         f["added_tokens"] = json::array();
         merges(f) = json::array();
       }},
      {"a byte without token", Code::kFormat, [&](json& f) { vocab(f).erase("Q"); }},
      {"bytes that UTF-8 never has", Code::kOk,
       [&](json& f) {
         for (const int byte : {0xC0, 0xC1, 0xF5, 0xFF}) vocab(f).erase(test::byte_character(byte));
       }},
      {"negative id", Code::kFormat, [&](json& f) { vocab(f)["Q"] = -1; }},
      {"id 2^31", Code::kFormat, [&](json& f) { vocab(f)["zz"] = int64_t{1} << 31; }},
      {"id 2^31 - 1", Code::kFormat, [&](json& f) { vocab(f)["zz"] = INT32_MAX; }},
      {"id 2^63", Code::kFormat, [&](json& f) { vocab(f)["zz"] = uint64_t{1} << 63; }},
      {"id is a fraction", Code::kFormat, [&](json& f) { vocab(f)["zz"] = 300.5; }},
      {"id is a text", Code::kFormat, [&](json& f) { vocab(f)["zz"] = "300"; }},
      {"id is null", Code::kFormat, [&](json& f) { vocab(f)["zz"] = nullptr; }},
      {"id twice", Code::kFormat, [&](json& f) { vocab(f)["zz"] = 7; }},
      {"a small gap between ids", Code::kOk, [&](json& f) { vocab(f)["zz"] = 1000; }},
      {"a gap of a million ids", Code::kFormat, [&](json& f) { vocab(f)["zz"] = 1000000; }},
      {"empty piece", Code::kFormat, [&](json& f) { vocab(f)[""] = 300; }},
      {"piece of 10 MB", Code::kOk, [&](json& f) { vocab(f)[std::string(10 << 20, 'x')] = 300; }},
      {"piece of zero bytes", Code::kOk, [&](json& f) { vocab(f)[std::string(3, '\0')] = 300; }},
      // Merges.
      {"no merges", Code::kFormat, [](json& f) { f["model"].erase("merges"); }},
      {"merges are a text", Code::kFormat, [](json& f) { f["model"]["merges"] = "a b"; }},
      {"empty list of merges", Code::kOk, [&](json& f) { merges(f) = json::array(); }},
      {"left side unknown", Code::kFormat, [&](json& f) { merges(f).push_back("xyz a"); }},
      {"right side unknown", Code::kFormat, [&](json& f) { merges(f).push_back("a xyz"); }},
      {"result unknown", Code::kFormat, [&](json& f) { merges(f).push_back("x y"); }},
      {"no space", Code::kFormat, [&](json& f) { merges(f).push_back("xy"); }},
      {"two spaces", Code::kFormat, [&](json& f) { merges(f).push_back("h e l"); }},
      {"empty left side", Code::kFormat, [&](json& f) { merges(f).push_back(" a"); }},
      {"empty right side: a cycle", Code::kFormat, [&](json& f) { merges(f).push_back("a "); }},
      {"a pair", Code::kOk,
       [&](json& f) {
         merges(f).push_back({"h", "e"});
       }},
      {"a pair with an empty side", Code::kFormat,
       [&](json& f) {
         merges(f).push_back({"", "a"});
       }},
      {"three sides", Code::kFormat,
       [&](json& f) {
         merges(f).push_back({"h", "e", "l"});
       }},
      {"a pair of numbers", Code::kFormat,
       [&](json& f) {
         merges(f).push_back({1, 2});
       }},
      {"a merge is a number", Code::kFormat, [&](json& f) { merges(f).push_back(5); }},
      {"the same merge many times", Code::kOk,
       [&](json& f) {
         for (int i = 0; i < 10000; ++i) merges(f).push_back("h e");
       }},
      // Added tokens.
      {"no added tokens", Code::kOk, [](json& f) { f.erase("added_tokens"); }},
      {"added tokens are an object", Code::kFormat,
       [](json& f) { f["added_tokens"] = json::object(); }},
      {"added token is a text", Code::kFormat, [](json& f) { f["added_tokens"].push_back("x"); }},
      {"without content", Code::kFormat, [](json& f) { f["added_tokens"][0].erase("content"); }},
      {"without id", Code::kFormat, [](json& f) { f["added_tokens"][0].erase("id"); }},
      {"with empty content", Code::kFormat,
       [](json& f) { f["added_tokens"].push_back(added(400, "")); }},
      {"id of another piece", Code::kFormat,
       [](json& f) { f["added_tokens"].push_back(added(7, "<x>")); }},
      {"added twice", Code::kFormat,
       [](json& f) { f["added_tokens"].push_back(f["added_tokens"][0]); }},
      {"same text, other id", Code::kFormat,
       [](json& f) { f["added_tokens"].push_back(added(400, test::kBos)); }},
      {"also in the vocabulary", Code::kOk,
       [&](json& f) { vocab(f)[test::kBos] = f["added_tokens"][0]["id"]; }},
      {"of 10 MB", Code::kUnsupported,
       [](json& f) { f["added_tokens"].push_back(added(400, std::string(10 << 20, 'x'))); }},
      {"that strips spaces", Code::kUnsupported,
       [](json& f) { f["added_tokens"][0]["lstrip"] = true; }},
      {"special is a number", Code::kFormat, [](json& f) { f["added_tokens"][0]["special"] = 1; }},
      // Other tokenizers.
      {"WordPiece", Code::kUnsupported, [](json& f) { f["model"]["type"] = "WordPiece"; }},
      {"byte fallback", Code::kUnsupported, [](json& f) { f["model"]["byte_fallback"] = true; }},
      {"ignores merges", Code::kUnsupported, [](json& f) { f["model"]["ignore_merges"] = true; }},
      {"dropout", Code::kUnsupported, [](json& f) { f["model"]["dropout"] = 0.1; }},
      {"suffixes", Code::kUnsupported, [](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }},
      {"no pre-tokenizer", Code::kUnsupported, [](json& f) { f.erase("pre_tokenizer"); }},
      {"no steps", Code::kUnsupported, [&](json& f) { steps(f) = json::array(); }},
      {"no ByteLevel", Code::kUnsupported, [&](json& f) { steps(f).erase(steps(f).size() - 1); }},
      {"ByteLevel with its own split", Code::kUnsupported,
       [&](json& f) { steps(f).back()["use_regex"] = true; }},
      {"ByteLevel adds a space", Code::kUnsupported,
       [&](json& f) { steps(f).back().erase("add_prefix_space"); }},
      {"a step twice", Code::kUnsupported,
       [&](json& f) { steps(f).insert(steps(f).begin(), steps(f)[0]); }},
      {"another behaviour", Code::kUnsupported,
       [&](json& f) { steps(f)[0]["behavior"] = "Removed"; }},
      {"inverted", Code::kUnsupported, [&](json& f) { steps(f)[0]["invert"] = true; }},
      {"a text instead of an expression", Code::kUnsupported,
       [&](json& f) {
         steps(f)[0]["pattern"] = {{"String", "\\p{N}{1,3}"}};
       }},
      {"another expression", Code::kUnsupported,
       [&](json& f) { steps(f)[0]["pattern"]["Regex"] = "\\p{N}{1,4}"; }},
      {"a catastrophic expression", Code::kUnsupported,
       [&](json& f) { steps(f)[0]["pattern"]["Regex"] = "(a+)+$"; }},
      {"normalizer", Code::kUnsupported,
       [](json& f) {
         f["normalizer"] = {{"type", "NFC"}};
       }},
      {"empty normalizer", Code::kOk,
       [](json& f) {
         f["normalizer"] = {{"type", "Sequence"}, {"normalizers", json::array()}};
       }},
      {"another decoder", Code::kUnsupported, [](json& f) { f["decoder"]["type"] = "Metaspace"; }},
      {"post-processor ByteLevel", Code::kOk,
       [](json& f) {
         f["post_processor"] = {{"type", "ByteLevel"}};
       }},
      {"another post-processor", Code::kUnsupported,
       [](json& f) {
         f["post_processor"] = {{"type", "BertProcessing"}};
       }},
  };
  for (const Change& change : changes) {
    INFO(change.what);
    json file = test::small_tokenizer();
    change.change(file);
    CHECK(code_of(file.dump()) == change.expected);
  }
}

TEST_CASE("tokenizer.json: texts that are no JSON, or too much of it") {
  const std::string file = test::small_tokenizer().dump();
  for (size_t size = 0; size < file.size(); size += 61) {
    INFO("cut to " << size << " bytes");
    CHECK(code_of(file.substr(0, size)) == Code::kFormat);
  }
  const std::string in_vocab = R"("vocab":{)";
  const size_t at = file.find(in_vocab) + in_vocab.size();
  const auto with = [&](const std::string& entry) {
    return file.substr(0, at) + entry + "," + file.substr(at);
  };
  CHECK(code_of(with(R"("zz":300)")) == Code::kOk);
  CHECK(code_of(with(R"("zz":300,"zz":301)")) == Code::kFormat);
  CHECK(code_of(with(R"("\ud800":300)")) == Code::kFormat);
  CHECK(code_of(with(R"("\ud83d\ude00":300)")) == Code::kOk);
  CHECK(code_of(with("\"\xFF\":300")) == Code::kFormat);
  CHECK(code_of(with("\"zz\":1e999")) == Code::kFormat);
  CHECK(code_of(with("\"zz\":" + std::string(1 << 20, '9'))) == Code::kFormat);
  CHECK(code_of(with("\"zz\":" + std::string(100000, '[') + std::string(100000, ']'))) ==
        Code::kFormat);
  CHECK(code_of(std::string(100000, '[')) == Code::kFormat);
  CHECK(code_of("\xEF\xBB\xBF" + file) == Code::kOk);  // byte order mark
  CHECK(code_of(file + "x") == Code::kFormat);
  CHECK(code_of("[]") == Code::kFormat);
  CHECK(code_of("null") == Code::kFormat);
  // Errors say where.
  const Result<io::TokenizerBuilder> cut =
      io::TokenizerBuilder::parse_json(file.substr(0, 1000), "");
  CHECK(cut.status().offset() >= 999);
  const Result<io::TokenizerBuilder> wrong =
      io::TokenizerBuilder::parse_json(with("\"zz\":-5"), "");
  CHECK(wrong.status().offset() >= at + 7);
  CHECK(wrong.status().offset() <= at + 8);
}

TEST_CASE("tokenizer_config.json") {
  const std::string file = test::small_tokenizer().dump();
  const auto built = [&](const std::string& config) {
    Result<Tokenizer> tokenizer =
        test::build_tokenizer(io::TokenizerBuilder::parse_json(file, config));
    INFO(tokenizer.status().message());
    REQUIRE(tokenizer.ok());
    return std::move(tokenizer).value();
  };
  CHECK(built("").bos() == -1);
  const Tokenizer named = built(R"({"bos_token":"<bos>","eos_token":{"content":"<user>"}})");
  CHECK(named.bos() == named.find("<bos>"));
  CHECK(named.eos() == named.find("<user>"));
  CHECK(named.bos() >= 256);
  CHECK_FALSE(named.adds_bos());
  CHECK(built(R"({"bos_token":"<bos>","add_bos_token":true})").adds_bos());
  CHECK(built(R"({"bos_token":null})").bos() == -1);
  CHECK(built(R"({"chat_template":"{{ evil() }}"})").chat_format() == ChatFormat::kNone);
  // Without a bos there is none to add.
  std::vector<int32_t> ids;
  REQUIRE(built("").encode("hello", {.add_bos = true}, ids).ok());
  CHECK(ids == std::vector<int32_t>{named.find("hello")});

  CHECK(code_of(file, "[]") == Code::kFormat);
  CHECK(code_of(file, "{") == Code::kFormat);
  CHECK(code_of(file, R"({"bos_token":"<none>"})") == Code::kFormat);
  CHECK(code_of(file, R"({"add_bos_token":"yes"})") == Code::kFormat);

  json processed = test::small_tokenizer();
  processed["post_processor"] = {
      {"type", "TemplateProcessing"},
      {"single", {{{"SpecialToken", {{"id", "<bos>"}}}}, {{"Sequence", {{"id", "A"}}}}}}};
  CHECK(test::build_tokenizer(processed)->adds_bos());
}

TEST_CASE("GGUF: what is read and what is refused") {
  struct GgufChange {
    const char* what;
    Code expected;
    std::function<void(GgufTokens&)> change;
  };
  const GgufChange changes[] = {
      {"as it is", Code::kOk, [](GgufTokens&) {}},
      {"llama", Code::kUnsupported, [](GgufTokens& g) { g.source.gguf_model = "llama"; }},
      {"no model", Code::kUnsupported, [](GgufTokens& g) { g.source.gguf_model = ""; }},
      {"deepseek-r1-qwen", Code::kUnsupported,
       [](GgufTokens& g) { g.source.gguf_pre = "deepseek-r1-qwen"; }},
      {"no pre-split", Code::kUnsupported, [](GgufTokens& g) { g.source.gguf_pre = ""; }},
      {"pre-split of 1 MB", Code::kUnsupported,
       [](GgufTokens& g) { g.source.gguf_pre.assign(1 << 20, '\xFF'); }},
      {"a type too few", Code::kFormat, [](GgufTokens& g) { g.source.token_type.pop_back(); }},
      {"a type too many", Code::kFormat, [](GgufTokens& g) { g.source.token_type.push_back(1); }},
      {"no types", Code::kOk, [](GgufTokens& g) { g.source.token_type.clear(); }},
      {"type 0", Code::kFormat, [](GgufTokens& g) { g.source.token_type[9] = 0; }},
      {"type 7", Code::kFormat, [](GgufTokens& g) { g.source.token_type[9] = 7; }},
      {"type -1", Code::kFormat, [](GgufTokens& g) { g.source.token_type[9] = -1; }},
      {"a byte without token", Code::kFormat, [](GgufTokens& g) { g.pieces['Q'] = "QQ"; }},
      {"byte token", Code::kOk, [](GgufTokens& g) { g.add("<0x0A>", 6); }},
      {"byte token <0x-1>", Code::kFormat, [](GgufTokens& g) { g.add("<0x-1>", 6); }},
      {"byte token <0x1>", Code::kFormat, [](GgufTokens& g) { g.add("<0x1>", 6); }},
      {"byte token <0x100>", Code::kFormat, [](GgufTokens& g) { g.add("<0x100>", 6); }},
      {"byte token <0xGG>", Code::kFormat, [](GgufTokens& g) { g.add("<0xGG>", 6); }},
      {"byte token without text", Code::kFormat, [](GgufTokens& g) { g.add("", 6); }},
      {"a piece twice", Code::kFormat, [](GgufTokens& g) { g.add("hel", 1); }},
      {"a control token twice", Code::kFormat, [](GgufTokens& g) { g.add("<eos>", 3); }},
      {"an unused token twice", Code::kOk, [](GgufTokens& g) { g.add("[PAD258]", 5); }},
      {"invalid UTF-8", Code::kFormat, [](GgufTokens& g) { g.add("a\xC3", 1); }},
      {"empty pieces", Code::kOk,
       [](GgufTokens& g) {
         g.add("", 1);
         g.add("", 3);
       }},
      {"piece of 10 MB", Code::kOk, [](GgufTokens& g) { g.add(std::string(10 << 20, 'x'), 1); }},
      {"user token of 10 MB", Code::kUnsupported,
       [](GgufTokens& g) { g.add(std::string(10 << 20, 'x'), 4); }},
      {"many long control tokens", Code::kUnsupported,
       [](GgufTokens& g) {
         for (int i = 0; i < 20000; ++i) g.add(std::string(249, 'x') + std::to_string(i), 3);
       }},
      {"merge of an unknown token", Code::kFormat,
       [](GgufTokens& g) { g.merges.push_back("hello w"); }},
      {"merge with an unknown result", Code::kFormat,
       [](GgufTokens& g) { g.merges.push_back("x y"); }},
      {"empty merge", Code::kFormat, [](GgufTokens& g) { g.merges.push_back(""); }},
      {"merge of nothing", Code::kFormat, [](GgufTokens& g) { g.merges.push_back(" "); }},
      {"merge cycle", Code::kFormat, [](GgufTokens& g) { g.merges.push_back("hel "); }},
      {"bos beyond the end", Code::kFormat, [](GgufTokens& g) { g.source.bos_token_id = 260; }},
      {"bos 2^31", Code::kFormat, [](GgufTokens& g) { g.source.bos_token_id = int64_t{1} << 31; }},
      {"bos -2", Code::kFormat, [](GgufTokens& g) { g.source.bos_token_id = -2; }},
      {"no bos", Code::kOk, [](GgufTokens& g) { g.source.bos_token_id = -1; }},
      {"eos 2^62", Code::kFormat, [](GgufTokens& g) { g.source.eos_token_id = int64_t{1} << 62; }},
      {"template that is code", Code::kOk,
       [](GgufTokens& g) { g.source.chat_template = "{{ ''.__class__ }}"; }},
  };
  for (const GgufChange& change : changes) {
    INFO(change.what);
    GgufTokens tokens;
    change.change(tokens);
    CHECK(code_of(io::TokenizerBuilder::parse(tokens.flat())) == change.expected);
  }

  CHECK(code_of(io::TokenizerBuilder::parse({})) == Code::kNotFound);
  io::TokenizerSource source = GgufTokens().flat();
  source.piece_end[5] = 1;  // ends before it begins
  CHECK(code_of(io::TokenizerBuilder::parse(source)) == Code::kFormat);
  source = GgufTokens().flat();
  source.piece_end.back() = UINT32_MAX;
  CHECK(code_of(io::TokenizerBuilder::parse(source)) == Code::kFormat);
  source = GgufTokens().flat();
  source.merge_end.back() += 1;
  CHECK(code_of(io::TokenizerBuilder::parse(source)) == Code::kFormat);
  source = GgufTokens().flat();
  source.piece_end.clear();
  source.token_type.clear();
  CHECK(code_of(io::TokenizerBuilder::parse(source)) == Code::kFormat);  // empty vocabulary
  source.piece_end.assign((size_t{1} << 24) + 1, 0);
  CHECK(code_of(io::TokenizerBuilder::parse(source)) == Code::kUnsupported);
  source = {};
  source.json_path = "no/such/tokenizer.json";
  CHECK(code_of(io::TokenizerBuilder::parse(source)) == Code::kNotFound);

  // The message says which pre-split it was.
  GgufTokens qwen;
  qwen.source.gguf_pre = "deepseek-r1-qwen";
  const Result<io::TokenizerBuilder> refused = io::TokenizerBuilder::parse(qwen.flat());
  CHECK(std::string(refused.status().message()).find("deepseek-r1-qwen") != std::string::npos);
  // Unused tokens and those of bytes mean what they say.
  GgufTokens tokens;
  tokens.add("<0xE4>", 6);
  const Result<Tokenizer> built = test::build_tokenizer(io::TokenizerBuilder::parse(tokens.flat()));
  REQUIRE(built.ok());
  CHECK(built->token_bytes(260) == "\xE4");
  CHECK(built->token_bytes(258) == "[PAD258]");
  std::vector<int32_t> ids;
  REQUIRE(built->encode("[PAD258]hel<eos>", {}, ids).ok());
  CHECK(ids.size() == 10);  // eight characters, hel, <eos>
  CHECK(ids.back() == 259);
}

TEST_CASE("added tokens: leftmost, then longest, in two passes") {
  json file = test::small_tokenizer();
  const char* texts[] = {"ab", "abcd", "bcd", "bcdefg", "aaab"};
  int64_t id = 300;
  for (const char* text : texts) {
    file["added_tokens"].push_back(added(id++, text));
    file["added_tokens"].back()["normalized"] = false;
  }
  file["added_tokens"].push_back(added(file["model"]["vocab"]["c"], "c"));  // in both
  for (const char* text : {"xy", "ybc"}) {                                  // second pass
    file["added_tokens"].push_back(added(id++, text));
    file["added_tokens"].back()["normalized"] = true;
  }
  const Result<Tokenizer> tokenizer = test::build_tokenizer(file);
  REQUIRE(tokenizer.ok());
  const auto split = [&](const std::string& text) {
    std::vector<int32_t> ids;
    REQUIRE(tokenizer->encode(text, {}, ids).ok());
    std::string pieces;
    for (const int32_t one : ids)
      pieces.append(pieces.empty() ? "" : "|").append(tokenizer->token_bytes(one));
    return pieces;
  };
  CHECK(split("abcd") == "abcd");
  CHECK(split("abcx") == "ab|c|x");
  CHECK(split("abcdefg") == "abcd|e|f|g");
  CHECK(split("bcdefx") == "bcd|e|f|x");
  CHECK(split("bcdefg") == "bcdefg");
  CHECK(split("bcbcd") == "b|c|bcd");
  CHECK(split("aaaab") == "a|aaab");
  CHECK(split("aaaaab") == "aa|aaab");
  CHECK(split("aab") == "a|ab");
  // What the first pass takes is gone for the second.
  CHECK(split("xybc") == "xy|b|c");
  CHECK(split("xyab") == "xy|ab");
  CHECK(split("ybcd") == "y|bcd");
  CHECK(split("<bos><user>hello<bos") == "<bos>|<user>|hello|<|b|o|s");
}

TEST_CASE("a tokenizer takes exactly the bytes it asked for and keeps its block alive") {
  Result<io::TokenizerBuilder> builder =
      io::TokenizerBuilder::parse_json(test::small_tokenizer().dump(), "");
  REQUIRE(builder.ok());
  const auto size = static_cast<size_t>(builder->size_bytes());
  CHECK(size > 256 * 4);
  constexpr std::align_val_t kAlignment{64};
  constexpr size_t kGuard = 64;
  bool freed = false;
  {
    std::shared_ptr<void> owner(::operator new(size + kGuard, kAlignment), [&](void* p) {
      freed = true;
      ::operator delete(p, kAlignment);
    });
    auto* const bytes = static_cast<std::byte*>(owner.get());
    std::memset(bytes, 0xA5, size + kGuard);
    Tokenizer tokenizer = std::move(*builder).build({bytes, size}, std::move(owner));
    CHECK(tokenizer.size_bytes() == static_cast<int64_t>(size));
    for (size_t i = size; i < size + kGuard; ++i) CHECK(bytes[i] == std::byte{0xA5});
    const Tokenizer copy = tokenizer;
    StreamDecoder decoder(std::move(tokenizer), false);
    std::vector<int32_t> ids;
    REQUIRE(copy.encode(" hello", {}, ids).ok());
    REQUIRE(ids.size() == 1);
    std::string text;
    REQUIRE(decoder.push(ids[0], text).ok());
    CHECK(text == " hello");
    CHECK_FALSE(freed);
  }
  CHECK(freed);
}
