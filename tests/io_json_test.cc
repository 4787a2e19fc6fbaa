// lib/io/json.h.
#include "lib/io/json.h"

#include <catch2/catch.hpp>
#include <string>

#include "io_raw_files.h"

using namespace fathom;
using namespace fathom::io;
using fathom::test::check_refused;

namespace {

JsonDocument parsed(std::string_view text) {
  Result<JsonDocument> document = JsonDocument::parse(text);
  INFO(document.status().message());
  REQUIRE(document.ok());
  return std::move(document).value();
}

}  // namespace

TEST_CASE("values of every type") {
  const JsonDocument document = parsed(
      R"({"null": null, "yes": true, "no": false, "int": -12, "big": 9223372036854775807,
          "huge": 9223372036854775808, "real": 0.25, "text": "a\u00e9\ud83d\ude00\n\u0000z",
          "empty": "", "array": [1, [2, 3], {"x": 4}, "five"], "none": [], "object": {"a": {}}})");
  const JsonValue root = document.root();
  REQUIRE(root.is_object());
  CHECK(root.size() == 12);
  CHECK(root.find("null").type() == JsonType::kNull);
  CHECK(root.find("null").is_null_or_absent());
  CHECK(root.find("yes").boolean());
  CHECK_FALSE(root.find("no").boolean());
  CHECK(root.find("int").integer() == -12);
  CHECK(root.find("int").number() == -12);
  CHECK(root.find("big").integer() == INT64_MAX);
  CHECK(root.find("huge").type() == JsonType::kUnsigned);
  CHECK(root.find("huge").number() == 9223372036854775808.0);
  CHECK(root.find("huge").integer() == 0);
  CHECK(root.find("real").number() == 0.25);
  CHECK(root.find("text").string() == std::string_view("a\xC3\xA9\xF0\x9F\x98\x80\n\0z", 10));
  CHECK(root.find("empty").is_string());
  CHECK(root.find("empty").string().empty());
  CHECK(root.find("missing").is_absent());
  CHECK(root.find("missing").find("deeper").is_absent());
  CHECK(root.find("text").find("deeper").is_absent());

  const JsonValue array = root.find("array");
  REQUIRE(array.size() == 4);
  std::vector<std::string> texts;
  for (const JsonValue element : array) texts.push_back(json_text(element));
  CHECK(texts == std::vector<std::string>{"1", "[2 values]", "{1 members}", "five"});
  CHECK_FALSE(root.find("none").begin() != root.find("none").end());
  CHECK_FALSE(root.begin() != root.end());  // an object is no array

  std::vector<std::string> keys;
  for (const JsonMember member : root.members()) keys.emplace_back(member.key);
  CHECK(keys == std::vector<std::string>{"null", "yes", "no", "int", "big", "huge", "real", "text",
                                         "empty", "array", "none", "object"});
  CHECK_FALSE(array.members().begin() != array.members().end());
}

TEST_CASE("scalars as documents, and a byte order mark") {
  CHECK(parsed("3").root().integer() == 3);
  CHECK(parsed(" \"x\" ").root().string() == "x");
  CHECK(parsed("\xEF\xBB\xBF{\"a\":1}").root().find("a").integer() == 1);
  CHECK(parsed("-0").root().integer() == 0);
}

TEST_CASE("malformed texts are refused with their place") {
  const std::string_view texts[] = {"",
                                    " ",
                                    "{",
                                    "}",
                                    "[",
                                    "[1",
                                    "[1,",
                                    "[1,]",
                                    "{\"a\"",
                                    "{\"a\":",
                                    "{\"a\":1",
                                    "{\"a\":1,}",
                                    "{a:1}",
                                    "{'a':1}",
                                    "1 2",
                                    "{} {}",
                                    "nul",
                                    "NaN",
                                    "Infinity",
                                    "-Infinity",
                                    "1e999",
                                    "-1e999",
                                    "01",
                                    "+1",
                                    ".5",
                                    "1.",
                                    "1e",
                                    "0x10",
                                    "1,5",
                                    "\"",
                                    "\"\\x\"",
                                    "\"\\u12\"",
                                    "\"\\ud800\"",
                                    "\"\\udc00\"",
                                    "\"\\ud800\\u0041\"",
                                    "\"\xFF\"",
                                    "\"\xC0\x80\"",
                                    "\"\xED\xA0\x80\"",
                                    "\"a\nb\"",
                                    "// c\n1",
                                    "/* c */ 1",
                                    "[1 /* c */]",
                                    "{\"a\":1 \"b\":2}",
                                    "\xEF\xBB{}",
                                    std::string_view("{\0}", 3),
                                    std::string_view("{\"a\":1}\0", 8),
                                    std::string_view("\xFE\xFF\0{\0}", 6),
                                    std::string_view("\xFF\xFE{\0}\0", 6)};
  for (const std::string_view text : texts) {
    INFO("text: " << text);
    const Result<JsonDocument> document = JsonDocument::parse(text);
    REQUIRE_FALSE(document.ok());
    check_refused(document.status(), Code::kFormat);
    CHECK(document.status().offset() <= text.size() + 1);
  }
  CHECK(JsonDocument::parse("[1, 2, x]").status().offset() == 8);
}

TEST_CASE("every prefix of a text is refused") {
  const std::string_view text = fathom::test::kSmallConfigJson;
  for (size_t n = 0; n < text.size(); ++n)
    CHECK(JsonDocument::parse(text.substr(0, n)).status().code() == Code::kFormat);
  CHECK(JsonDocument::parse(text).ok());
}

TEST_CASE("two members of one name are refused") {
  for (const std::string_view text : {R"({"a":1,"a":1})", R"({"a":1,"b":2,"\u0061":3})",
                                      R"([{"x":{"y":1,"z":2,"y":[]}}])", R"({"":1,"":2})"}) {
    const Result<JsonDocument> document = JsonDocument::parse(text);
    REQUIRE_FALSE(document.ok());
    check_refused(document.status(), Code::kFormat);
    CHECK(document.status().message().find("twice") != std::string_view::npos);
    CHECK(document.status().offset() > 0);
  }
  CHECK(JsonDocument::parse(R"([{"a":1},{"a":1}])").ok());
  CHECK(JsonDocument::parse(R"({"a":{"a":{"a":1}}})").ok());
}

TEST_CASE("limits") {
  SECTION("depth") {
    const auto nested = [](int depth, const char* open, const char* inner, const char* close) {
      std::string text;
      for (int i = 0; i < depth; ++i) text += open;
      text += inner;
      for (int i = 0; i < depth; ++i) text += close;
      return text;
    };
    JsonLimits limits;
    limits.max_depth = 10;
    CHECK(JsonDocument::parse(nested(10, "[", "1", "]"), limits).ok());
    CHECK_FALSE(JsonDocument::parse(nested(11, "[", "1", "]"), limits).ok());
    CHECK(JsonDocument::parse(nested(10, "{\"a\":", "1", "}"), limits).ok());
    CHECK_FALSE(JsonDocument::parse(nested(11, "{\"a\":", "1", "}"), limits).ok());
    for (const char* open : {"[", "{\"a\":"}) {
      const Result<JsonDocument> deep = JsonDocument::parse(nested(100'000, open, "1", ""));
      REQUIRE_FALSE(deep.ok());
      check_refused(deep.status(), Code::kFormat);
      CHECK(deep.status().message().find("deeper than 64") != std::string_view::npos);
    }
  }
  SECTION("size") {
    JsonLimits limits;
    limits.max_bytes = 8;
    CHECK(JsonDocument::parse("[1,2,34]", limits).ok());
    CHECK_FALSE(JsonDocument::parse("[1,2,345]", limits).ok());
  }
  SECTION("values") {
    JsonLimits limits;
    limits.max_values = 5;
    CHECK(JsonDocument::parse("[1,2,3,4]", limits).ok());
    CHECK_FALSE(JsonDocument::parse("[1,2,3,4,5]", limits).ok());
    CHECK(JsonDocument::parse(R"({"a":1,"b":2})", limits).ok());  // names count
    CHECK_FALSE(JsonDocument::parse(R"({"a":1,"b":2,"c":3})", limits).ok());
  }
  SECTION("a string of 10 MB is none") {
    const std::string text = "\"" + std::string(10 << 20, 'x') + "\"";
    CHECK(parsed(text).root().string().size() == 10 << 20);
  }
}

TEST_CASE("an object of 100,000 members takes no quadratic time") {
  std::string text = "{";
  for (int i = 0; i < 100'000; ++i) text += (i ? ",\"k" : "\"k") + std::to_string(i) + "\":1";
  text += "}";
  const fathom::test::CpuTimer timer;
  CHECK(parsed(text).root().size() == 100'000);
  const std::string twice = text.substr(0, text.size() - 1) + ",\"k5\":2}";
  CHECK_FALSE(JsonDocument::parse(twice).ok());
  // Quadratic would be 10^10 comparisons; sanitizers get their share.
  CHECK(timer.seconds() < 5);
}

TEST_CASE("typed members name key, value and bound") {
  const JsonDocument document = parsed(
      R"({"n": 7, "neg": -1, "huge": 18446744073709551615, "half": 0.5, "s": "x", "b": true,
          "z": null, "whole": 2.0, "a": []})");
  const JsonValue root = document.root();
  CHECK(json_integer(root, "n", 0, 7).value() == 7);
  CHECK(json_integer_or(root, "missing", 3, 10, 20).value() == 3);
  CHECK(json_integer_or(root, "z", 3, 10, 20).value() == 3);
  CHECK(json_number(root, "half", 0, 1).value() == 0.5);
  CHECK(json_number(root, "n", 0, 10).value() == 7);
  CHECK(json_number_or(root, "missing", 1.5, 0, 1).value() == 1.5);
  CHECK(json_boolean_or(root, "b", false).value());
  CHECK(json_boolean_or(root, "z", true).value());
  CHECK(json_string(root, "s").value() == "x");
  CHECK(json_string_or(root, "missing", "d").value() == "d");

  const auto refused = [](const Status& status, std::string_view key, std::string_view part) {
    check_refused(status, Code::kFormat);
    CHECK(status.key() == key);
    CHECK(status.message().find(key) != std::string_view::npos);
    CHECK(status.message().find(part) != std::string_view::npos);
  };
  refused(json_integer(root, "n", 0, 6).status(), "n", "7, must be in [0, 6]");
  refused(json_integer(root, "neg", 0, 6).status(), "neg", "-1");
  refused(json_integer(root, "huge", 0, INT64_MAX).status(), "huge", "18446744073709551616");
  refused(json_integer(root, "half", 0, 6).status(), "half", "an integer");
  refused(json_integer(root, "whole", 0, 6).status(), "whole", "an integer");
  refused(json_integer(root, "missing", 0, 6).status(), "missing", "missing");
  refused(json_integer(root, "z", 0, 6).status(), "z", "null");
  refused(json_integer_or(root, "s", 0, 0, 6).status(), "s", "a string");
  refused(json_number(root, "huge", 0, 1).status(), "huge", "[0, 1]");
  refused(json_number(root, "a", 0, 1).status(), "a", "an array");
  refused(json_boolean_or(root, "n", true).status(), "n", "true or false");
  refused(json_string(root, "n").status(), "n", "a string");
  refused(json_string_or(root, "a", "").status(), "a", "a string");
}

TEST_CASE("text files are read up to a size") {
  const test::TemporaryFolder folder;
  folder.write("ten", "0123456789");
  CHECK(read_text_file(folder / "ten", 10).value() == "0123456789");
  check_refused(read_text_file(folder / "ten", 9).status(), Code::kFormat);
  check_refused(read_text_file(folder / "none", 9).status(), Code::kNotFound);
}
