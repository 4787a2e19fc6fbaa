// The tokenizer against the reference: every golden line of the three tokenizers from both file
// formats, the published vectors, invalid UTF-8, streams, hostile files, and the time it takes.
#include <catch2/catch.hpp>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "fathom/tokenizer.hpp"
#include "lib/io/tokenizer.h"
#include "support/golden.h"

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
