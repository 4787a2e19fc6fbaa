// The tokenizer against the reference: every golden line of the three tokenizers from both file
// formats, the published vectors, invalid UTF-8, streams, and the time it takes.
#include <algorithm>
#include <atomic>
#include <catch2/catch.hpp>
#include <ctime>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "fathom/tokenizer.hpp"
#include "support/golden.h"
#include "support/small_tokenizer.h"

using namespace fathom;
using nlohmann::json;

namespace {

std::string slurp(const std::string& path) {
  const std::vector<std::byte> bytes = test::read_file(path);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Tokenizer open(const std::string& relative) {
  Result<Tokenizer> tokenizer = Tokenizer::open(test::test_data(relative));
  INFO(relative << ": " << tokenizer.status().message());
  REQUIRE(tokenizer.ok());
  return std::move(tokenizer).value();
}

const Tokenizer& v3() {
  static const Tokenizer tokenizer = open("tokenizers/deepseek-v3");
  return tokenizer;
}
const Tokenizer& llm() {
  static const Tokenizer tokenizer = open("tokenizers/ggml-vocab-deepseek-llm.gguf");
  return tokenizer;
}
const Tokenizer& coder() {
  static const Tokenizer tokenizer = open("tokenizers/ggml-vocab-deepseek-coder.gguf");
  return tokenizer;
}

std::vector<int32_t> encode(const Tokenizer& tokenizer, std::string_view text,
                            const EncodeOptions& options = {}) {
  std::vector<int32_t> ids;
  const Status status = tokenizer.encode(text, options, ids);
  INFO(status.message());
  REQUIRE(status.ok());
  return ids;
}

std::string decode(const Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                   bool skip_special = false) {
  std::string text;
  const Status status = tokenizer.decode(ids, skip_special, text);
  INFO(status.message());
  REQUIRE(status.ok());
  return text;
}

std::string stream(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  StreamDecoder decoder(tokenizer, false);
  std::string text;
  for (const int32_t id : ids) REQUIRE(decoder.push(id, text).ok());
  decoder.finish(text);
  return text;
}

// Of this process: other programs on the machine do not count.
double cpu_seconds() {
  return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
}

// All golden lines of one tokenizer.
void check_golden(const Tokenizer& tokenizer, const std::string& name) {
  CHECK(tokenizer.kind() == name);
  std::istringstream lines(slurp(test::test_data("tokenizers/" + name + ".golden.jsonl")));
  int n_lines = 0, n_exact = 0;
  for (std::string line; std::getline(lines, line); ++n_lines) {
    const json golden = json::parse(line);
    const std::string text = golden.at("text");
    INFO(name << " line " << golden.at("i") << ": " << golden.at("text").dump(-1, ' ', true));
    const auto expected = golden.at("ids").get<std::vector<int32_t>>();
    CHECK(encode(tokenizer, text) == expected);
    CHECK(stream(tokenizer, expected) == decode(tokenizer, expected));
    if (!golden.at("decode_exact").get<bool>()) continue;
    ++n_exact;
    CHECK(decode(tokenizer, expected) == text);
  }
  CHECK(n_lines == 380);
  CHECK(n_exact >= 337);
}

// The vectors of llama.cpp: texts and lines of ids.
void check_vectors(const Tokenizer& tokenizer, const std::string& name) {
  const std::string base = test::test_data("tokenizers/ggml-vocab-" + name + ".gguf");
  std::string inputs = slurp(base + ".inp");
  std::istringstream outputs(slurp(base + ".out"));
  constexpr std::string_view kSeparator = "\n__ggml_vocab_test__\n";
  int n = 0;
  for (size_t begin = 0; begin != std::string::npos; ++n) {
    const size_t end = inputs.find(kSeparator, begin);
    const std::string text = inputs.substr(begin, end == std::string::npos ? end : end - begin);
    begin = end == std::string::npos ? end : end + kSeparator.size();
    std::string line;
    if (!std::getline(outputs, line)) break;
    std::istringstream numbers(line);
    std::vector<int32_t> expected;
    for (int32_t id; numbers >> id;) expected.push_back(id);
    INFO(name << " vector " << n << ": " << json(text).dump(-1, ' ', true));
    CHECK(encode(tokenizer, text) == expected);
  }
  CHECK(n >= 46);
}

}  // namespace

TEST_CASE("every golden line: deepseek-v3 from tokenizer.json") {
  check_golden(v3(), "deepseek-v3");
}

TEST_CASE("every golden line and vector: deepseek-llm from GGUF") {
  check_golden(llm(), "deepseek-llm");
  check_vectors(llm(), "deepseek-llm");
}

TEST_CASE("every golden line and vector: deepseek-coder from GGUF") {
  check_golden(coder(), "deepseek-coder");
  check_vectors(coder(), "deepseek-coder");
}

TEST_CASE("both formats of a model give the same tokenizer") {
  struct Pair {
    const char *folder, *gguf;
  };
  const Pair pair =
      GENERATE(Pair{"models/tiny-v2", "gguf/tiny-v2.new.BF16.gguf"},
               Pair{"models/tiny-v2", "gguf/tiny-v2.old.F16.gguf"},
               Pair{"models/tiny-v2-lite", "gguf/tiny-v2-lite.mid.F16.gguf"},
               Pair{"models/tiny-v2-lite-sharded", "gguf/tiny-v2-lite.split-00001-of-00003.gguf"},
               Pair{"models/tiny-v3", "gguf/tiny-v3.new.BF16.gguf"},
               Pair{"models/tiny-v3-fp8", "gguf/tiny-v3.new.BF16.gguf"});
  INFO(pair.folder << " and " << pair.gguf);
  const Tokenizer folder = open(pair.folder), gguf = open(pair.gguf);
  CHECK(folder.kind() == gguf.kind());
  CHECK(folder.bos() == gguf.bos());
  CHECK(folder.eos() == gguf.eos());
  CHECK(folder.bos() >= 0);
  CHECK(folder.adds_bos());
  CHECK(gguf.adds_bos());
  CHECK(folder.chat_format() == gguf.chat_format());
  CHECK(folder.n_tokens() <= gguf.n_tokens());  // GGUF is filled up with [PADn]
  for (int32_t id = 0; id < folder.n_tokens(); ++id) {
    CHECK(folder.token_bytes(id) == gguf.token_bytes(id));
    // The converter makes control tokens of "added" ones that look like it (the fim tokens).
    CHECK((!folder.is_special(id) || gguf.is_special(id)));
  }
  std::istringstream lines(slurp(test::test_data("tokenizers/deepseek-v3.golden.jsonl")));
  for (std::string line; std::getline(lines, line);) {
    const std::string text = json::parse(line).at("text");
    INFO(json(text).dump(-1, ' ', true));
    const std::vector<int32_t> ids = encode(folder, text);
    CHECK(ids == encode(gguf, text));
    CHECK(decode(folder, ids) == text);
  }
}

TEST_CASE("every GGUF of the golden tree has a tokenizer that goes round") {
  const std::string name =
      GENERATE("trained/trained.Q8_0.gguf", "quant/quant.Q4_K.gguf", "quant/quant.IQ4_NL.gguf");
  const Tokenizer tokenizer = open(name);
  const std::string text = "What is the code? 你好, naïve 😀 0123\r\n\tx";
  CHECK(decode(tokenizer, encode(tokenizer, text, {.add_bos = true}), true) == text);
  CHECK(tokenizer.chat_format() == ChatFormat::kDeepSeekV2);
}

TEST_CASE("ids, names and bytes of tokens") {
  const json info = json::parse(slurp(test::test_data("tokenizers/deepseek-v3.info.json")));
  CHECK(v3().n_tokens() == info.at("vocab_size_with_added"));
  for (const auto& [text, id] : info.at("special_ids").items()) {
    INFO(text);
    CHECK(v3().find(text) == id);
    CHECK(v3().token_bytes(id) == text);
  }
  CHECK(v3().bos() == 0);
  CHECK(v3().eos() == 1);
  CHECK_FALSE(v3().adds_bos());
  CHECK(llm().adds_bos());
  CHECK(v3().is_special(0));
  CHECK_FALSE(v3().is_special(v3().find("<think>")));
  CHECK_FALSE(v3().is_special(-1));
  CHECK_FALSE(v3().is_special(static_cast<int32_t>(v3().n_tokens())));
  CHECK(v3().token_bytes(-1).empty());
  CHECK(v3().token_bytes(static_cast<int32_t>(v3().n_tokens())).empty());
  CHECK(v3().token_bytes(INT32_MIN).empty());
  CHECK(v3().find("") == -1);
  CHECK(v3().find("no such token, surely") == -1);
  // A name leads back to its token; of two tokens with the same bytes to an added one.
  for (const Tokenizer* tokenizer : {&v3(), &llm(), &coder()}) {
    for (int32_t id = 0; id < tokenizer->n_tokens(); ++id) {
      const std::string_view bytes = tokenizer->token_bytes(id);
      if (bytes.empty()) continue;
      const int32_t found = tokenizer->find(bytes);
      if (found != id && (found < 0 || tokenizer->token_bytes(found) != bytes))
        FAIL("token " << id << " of " << tokenizer->kind() << " leads to " << found);
    }
  }
}

TEST_CASE("bos and special tokens as the options say") {
  const std::string bos = "<｜begin▁of▁sentence｜>";
  const std::vector<int32_t> plain = encode(v3(), "Hello");
  std::vector<int32_t> with_bos = {0};
  with_bos.insert(with_bos.end(), plain.begin(), plain.end());
  CHECK(encode(v3(), "Hello", {.add_bos = true}) == with_bos);
  CHECK(encode(v3(), bos + "Hello", {.add_bos = true}) == with_bos);
  CHECK(encode(v3(), bos + "Hello") == with_bos);
  CHECK(encode(v3(), "", {.add_bos = true}) == std::vector<int32_t>{0});
  CHECK(encode(v3(), "").empty());

  // As plain text the name is no bos, and goes round as text.
  const auto text_ids = encode(v3(), bos + "<think>", {.add_bos = true, .parse_special = false});
  REQUIRE(text_ids.size() > 4);
  CHECK(text_ids[0] == 0);
  for (size_t i = 1; i < text_ids.size(); ++i) {
    CHECK(text_ids[i] != 0);
    CHECK(text_ids[i] != v3().find("<think>"));
  }
  CHECK(decode(v3(), text_ids, true) == bos + "<think>");

  // encode() and decode() append.
  std::vector<int32_t> ids = {7};
  REQUIRE(v3().encode("Hello", {}, ids).ok());
  CHECK(ids.size() == 1 + plain.size());
  std::string text = "x";
  REQUIRE(v3().decode(plain, false, text).ok());
  CHECK(text == "xHello");
}

TEST_CASE("invalid UTF-8 is encoded and decoded as U+FFFD per maximal subpart") {
  const json golden =
      json::parse(slurp(test::test_data("tokenizers/deepseek-v3.bytes.golden.json")));
  CHECK(golden.at("invalid").size() == 14);
  for (const json& one : golden.at("invalid")) {
    const std::string hex = one.at("hex");
    INFO(hex);
    std::string bytes;
    std::vector<int32_t> byte_ids;
    for (size_t i = 0; i < hex.size(); i += 2) {
      bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
      byte_ids.push_back(v3().find(bytes.substr(bytes.size() - 1)));
      REQUIRE(byte_ids.back() >= 0);
    }
    CHECK(encode(v3(), bytes) == one.at("ids").get<std::vector<int32_t>>());
    CHECK(decode(v3(), byte_ids) == one.at("replaced").get<std::string>());
    CHECK(stream(v3(), byte_ids) == one.at("replaced").get<std::string>());
  }
}

TEST_CASE("a stream hands out whole characters as soon as they are complete") {
  const json golden =
      json::parse(slurp(test::test_data("tokenizers/deepseek-v3.bytes.golden.json")));
  CHECK(golden.at("stream").size() == 8);
  for (const json& one : golden.at("stream")) {
    const std::string expected = one.at("text");
    INFO(one.at("text").dump(-1, ' ', true));
    const auto ids = one.at("ids").get<std::vector<int32_t>>();
    CHECK(encode(v3(), expected) == ids);
    StreamDecoder decoder(v3(), false);
    std::string text, bytes;
    for (size_t i = 0; i < ids.size(); ++i) {
      const std::string hex = one.at("token_bytes_hex")[i];
      std::string token;
      for (size_t at = 0; at < hex.size(); at += 2)
        token.push_back(static_cast<char>(std::stoi(hex.substr(at, 2), nullptr, 16)));
      CHECK(v3().token_bytes(ids[i]) == token);
      bytes += token;
      REQUIRE(decoder.push(ids[i], text).ok());
      // All of the text that the bytes so far complete, and nothing of the next character.
      size_t complete = 0;
      for (size_t at = 0; at <= bytes.size(); ++at)
        if (at == expected.size() || (static_cast<unsigned char>(expected[at]) & 0xC0) != 0x80)
          complete = at;
      CHECK(text == expected.substr(0, complete));
    }
    decoder.finish(text);
    CHECK(text == expected);
  }

  StreamDecoder decoder(v3(), true);
  std::string text;
  REQUIRE(decoder.push(v3().find("\xF0\x9F\x98"), text).ok());
  REQUIRE(decoder.push(v3().bos(), text).ok());  // skipped, does not come between
  CHECK(text.empty());
  REQUIRE(decoder.push(v3().find("\x80"), text).ok());
  CHECK(text == "😀");
  REQUIRE(decoder.push(v3().find("\xF0\x9F\x98"), text).ok());
  decoder.finish(text);
  CHECK(text == "😀\uFFFD");
  decoder.finish(text);  // nothing is left
  CHECK(text == "😀\uFFFD");
}

TEST_CASE("arguments out of range are refused and change nothing") {
  const auto n = static_cast<int32_t>(v3().n_tokens());
  for (const int32_t id : {-1, n, INT32_MAX, INT32_MIN}) {
    std::string text = "kept";
    const std::vector<int32_t> ids = {5, id};
    const Status decoded = v3().decode(ids, false, text);
    CHECK(decoded.code() == Code::kInvalidArgument);
    CHECK(std::string(decoded.message()).find(std::to_string(id)) != std::string::npos);
    CHECK(std::string(decoded.message()).find(std::to_string(n)) != std::string::npos);
    StreamDecoder decoder(v3(), true);
    CHECK(decoder.push(id, text).code() == Code::kInvalidArgument);
    CHECK(text == "kept");
  }
  // Refused by its size, before a byte is looked at.
  const char one = 'x';
  std::vector<int32_t> ids = {1};
  for (const size_t size : {size_t{1} << 31, SIZE_MAX / 2}) {
    const Status status = v3().encode(std::string_view(&one, size), {}, ids);
    CHECK(status.code() == Code::kInvalidArgument);
    CHECK(std::string(status.message()).find("2147483647") != std::string::npos);
  }
  CHECK(ids.size() == 1);
}

TEST_CASE("paths without a tokenizer are refused") {
  const auto code = [](const std::string& path) {
    const Result<Tokenizer> tokenizer = Tokenizer::open(path);
    REQUIRE_FALSE(tokenizer.ok());
    INFO(tokenizer.status().message());
    CHECK(std::string(tokenizer.status().message()).find(path) != std::string::npos);
    return tokenizer.status().code();
  };
  CHECK(code(test::test_data("no-such-file.gguf")) == Code::kNotFound);
  CHECK(code(test::test_data("gguf")) == Code::kNotFound);  // a folder without tokenizer.json
  CHECK(code(test::test_data("quant/blocks.gguf")) == Code::kNotFound);  // no tokenizer inside
  CHECK(code(test::test_data("tokenizers/deepseek-v3.golden.jsonl")) == Code::kFormat);
  CHECK(code(test::test_data("tokenizers/deepseek-v3.info.json")) == Code::kFormat);
  CHECK(Tokenizer::open(test::test_data("models/tiny-v2/model.safetensors")).ok());
  CHECK(Tokenizer::open(test::test_data("tokenizers/deepseek-v3/tokenizer.json")).ok());
}

TEST_CASE("merging is the reference's: lowest rank first, of equals the leftmost") {
  // Random lists of merges, in any order: a token may be made by several merges and be used before
  // the rank that makes it.  Pieces on both sides of the length where the method changes.
  std::mt19937 random(20240501);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  for (int round = 0; round < 60; ++round) {
    std::vector<std::string> tokens = {"a", "b", "c"};
    test::MergeList merges;
    const size_t n_merges = 1 + below(30);
    for (size_t i = 0; i < n_merges; ++i) {
      merges.emplace_back(tokens[below(tokens.size())], tokens[below(tokens.size())]);
      const std::string made = merges.back().first + merges.back().second;
      if (made.size() <= 12) tokens.push_back(made);
    }
    if (round % 2) std::shuffle(merges.begin(), merges.end(), random);
    const json file = test::small_tokenizer(io::SplitKind::kDeepSeekCoder, merges);
    const auto tokenizer = test::build_tokenizer(file);
    REQUIRE(tokenizer.ok());
    for (const size_t length : {size_t{2}, size_t{9}, size_t{64}, size_t{65}, size_t{300}}) {
      std::string text;
      const size_t letters = 1 + below(3);
      while (text.size() < length) text += "abc"[below(letters)];
      std::vector<std::string> symbols;
      for (const char c : text) symbols.emplace_back(1, c);
      while (true) {
        size_t best_rank = merges.size(), best_at = 0;
        for (size_t i = 0; i + 1 < symbols.size(); ++i)
          for (size_t rank = merges.size(); rank-- > 0;)  // of equal pairs the later rank counts
            if (merges[rank].first == symbols[i] && merges[rank].second == symbols[i + 1]) {
              if (rank < best_rank) best_rank = rank, best_at = i;
              break;
            }
        if (best_rank == merges.size()) break;
        symbols[best_at] += symbols[best_at + 1];
        symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best_at) + 1);
      }
      std::vector<int32_t> expected;
      for (const std::string& symbol : symbols) expected.push_back(tokenizer->find(symbol));
      INFO("round " << round << ", text " << text << ", merges "
                    << file.at("model").at("merges").dump());
      CHECK(encode(*tokenizer, text) == expected);
    }
  }
}

TEST_CASE("threads share a tokenizer") {
  const std::vector<int32_t> expected = encode(v3(), "The quick brown fox. 你好世界 123456");
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, tokenizer = v3()] {
      for (int i = 0; i < 200; ++i) {
        std::vector<int32_t> ids;
        const Status status = tokenizer.encode("The quick brown fox. 你好世界 123456", {}, ids);
        if (!status.ok() || ids != expected) ++wrong;
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("the time is linear in the text, whatever the text") {
  // One piece without end, and texts that make a backtracking matcher look again and again.
  const std::string unit = GENERATE("a", " ", "\u0301", "\n ", "<", "<｜", "\xFF", "你", "1", " \t",
                                    "a\u3000", ".", "ab");
  for (const Tokenizer* tokenizer : {&v3(), &llm(), &coder()}) {
    INFO(tokenizer->kind() << ": "
                           << json(unit).dump(-1, ' ', true, json::error_handler_t::replace));
    const auto seconds = [&](size_t size) {
      std::string text;
      while (text.size() < size) text += unit;
      double best = 1e9;
      for (int i = 0; i < 3; ++i) {
        std::vector<int32_t> ids;
        const double start = cpu_seconds();
        REQUIRE(tokenizer->encode(text, {}, ids).ok());
        best = std::min(best, cpu_seconds() - start);
      }
      return best;
    };
    // Sixteen times the text: n log n makes it 20, caches and a busy machine up to 60, a square
    // 256.
    const double small = seconds(16 << 10), large = seconds(256 << 10);
    INFO(small << " s, then " << large << " s");
    CHECK((large < 100 * small || large < 0.02));
  }
}

TEST_CASE("ten megabytes of one letter", "[slow]") {
  const std::string text(10 << 20, 'a');
  for (const Tokenizer* tokenizer : {&v3(), &llm(), &coder()}) {
    const double start = cpu_seconds();
    const std::vector<int32_t> ids = encode(*tokenizer, text);
    const double taken = cpu_seconds() - start;
    CHECK(decode(*tokenizer, ids) == text);
#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    CHECK(taken < 5);
#else
    CHECK(taken < 60);
#endif
  }
}
