// Chat templates: 80 conversations as the published templates render them, recognition of the
// texts, and what is refused.
#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "fathom/tokenizer.hpp"
#include "lib/io/chat.h"
#include "support/golden.h"

using namespace fathom;
using nlohmann::json;

namespace {

const json& golden() {
  static const json parsed = [] {
    const auto bytes = test::read_file(test::test_data("tokenizers/chat_templates.golden.json"));
    const auto* const text = reinterpret_cast<const char*>(bytes.data());
    return json::parse(text, text + bytes.size());
  }();
  return parsed;
}

ChatFormat format_named(const std::string& name) {
  for (const ChatFormat format :
       {ChatFormat::kDeepSeekV2, ChatFormat::kDeepSeekV3, ChatFormat::kDeepSeekR1})
    if (io::chat_format_name(format) == name) return format;
  FAIL("no format " << name);
  return ChatFormat::kNone;
}

std::vector<ChatMessage> messages_of(const json& list) {
  std::vector<ChatMessage> messages;
  for (const json& one : list) {
    ChatMessage message;
    message.role = one.at("role");
    if (one.at("content").is_string()) message.content = one.at("content");
    for (const json& call : one.value("tool_calls", json::array()))
      message.tool_calls.push_back({.type = call.at("type"),
                                    .name = call.at("function").at("name"),
                                    .arguments = call.at("function").at("arguments")});
    messages.push_back(message);
  }
  return messages;
}

}  // namespace

TEST_CASE("80 conversations are rendered as the published templates do") {
  const std::string bos = golden().at("bos_token"), eos = golden().at("eos_token");
  Result<Tokenizer> tokenizer = Tokenizer::open(test::test_data("tokenizers/deepseek-v3"));
  REQUIRE(tokenizer.ok());
  int n = 0;
  for (const json& one : golden().at("cases")) {
    INFO(one.dump(-1, ' ', true));
    const ChatFormat format = format_named(one.at("template"));
    const std::vector<ChatMessage> messages = messages_of(one.at("messages"));
    const bool add_prompt = one.at("add_generation_prompt");
    const Result<std::string> text = io::render_chat(format, bos, eos, messages, add_prompt);
    REQUIRE(text.ok());
    CHECK(*text == one.at("rendered").get<std::string>());
    // Through the tokenizer: the same text, in which bos is the first token and is not doubled.
    const Result<std::string> again = tokenizer->render_chat(messages, add_prompt, format);
    REQUIRE(again.ok());
    CHECK(*again == *text);
    std::vector<int32_t> ids;
    REQUIRE(tokenizer->encode(*text, {.add_bos = true}, ids).ok());
    REQUIRE(ids.size() > 1);
    CHECK(ids[0] == tokenizer->bos());
    CHECK(ids[1] != tokenizer->bos());
    ++n;
  }
  CHECK(n == 80);
}

TEST_CASE("published templates are recognised by their text") {
  for (const auto& [name, value] : golden().at("templates").items()) {
    INFO(name);
    const ChatFormat format = format_named(name);
    const std::string text = value;
    CHECK(io::recognise_chat_template(text) == format);
    CHECK(io::recognise_chat_template(text + "\n") == format);
    // Line breaks inside literals, written as they are or as an escape.
    std::string escaped, plain;
    for (size_t i = 0; i < text.size(); ++i) {
      const bool is_escape = text.compare(i, 2, "\\n") == 0;
      const bool is_break = is_escape || text[i] == '\n';
      escaped += is_break ? "\\n" : std::string(1, text[i]);
      plain += is_break ? "\n" : std::string(1, text[i]);
      i += is_escape;
    }
    CHECK(escaped != plain);
    CHECK(io::recognise_chat_template(escaped) == format);
    CHECK(io::recognise_chat_template(plain) == format);
    // Every other text is unknown.
    for (size_t at = 0; at < text.size(); at += 7) {
      std::string changed = text;
      changed[at] ^= 1;
      if (io::recognise_chat_template(changed) != ChatFormat::kNone)
        FAIL("recognised with byte " << at << " changed");
      if (io::recognise_chat_template(text.substr(0, at)) != ChatFormat::kNone)
        FAIL("recognised when cut at " << at);
    }
    CHECK(io::recognise_chat_template(text + "{{ evil() }}") == ChatFormat::kNone);
  }
  CHECK(io::recognise_chat_template("") == ChatFormat::kNone);
  CHECK(io::recognise_chat_template("\n \n") == ChatFormat::kNone);
  CHECK(io::recognise_chat_template(
            "{{ ''.__class__.__mro__[1].__subclasses__()[104].__init__.__globals__ }}") ==
        ChatFormat::kNone);
  CHECK(io::recognise_chat_template(std::string(10 << 20, '{')) == ChatFormat::kNone);
}

TEST_CASE("the format comes from the file, or from the caller") {
  const ChatMessage hello = {.role = "user", .content = "Hello"};
  const auto render = [&](const std::string& path, ChatFormat format) {
    Result<Tokenizer> tokenizer = Tokenizer::open(test::test_data(path));
    REQUIRE(tokenizer.ok());
    return tokenizer->render_chat({&hello, 1}, true, format);
  };
  const std::string bos = "<｜begin▁of▁sentence｜>";
  CHECK(*render("trained/trained.Q8_0.gguf", ChatFormat::kNone) ==
        bos + "User: Hello\n\nAssistant:");
  CHECK(*render("models/tiny-v2", ChatFormat::kNone) == bos + "User: Hello\n\nAssistant:");
  CHECK(*render("tokenizers/deepseek-v3", ChatFormat::kNone) ==
        bos + "<｜User｜>Hello<｜Assistant｜>");
  CHECK(*render("tokenizers/deepseek-v3", ChatFormat::kDeepSeekR1) ==
        bos + "<｜User｜>Hello<｜Assistant｜><think>\n");
  // A template of its own, and none at all.
  CHECK(render("models/tiny-v3", ChatFormat::kNone).status().code() == Code::kUnsupported);
  CHECK(render("tokenizers/ggml-vocab-deepseek-llm.gguf", ChatFormat::kNone).status().code() ==
        Code::kUnsupported);
  CHECK(*render("models/tiny-v3", ChatFormat::kDeepSeekV3) ==
        bos + "<｜User｜>Hello<｜Assistant｜>");
}

TEST_CASE("roles and calls that a format does not know are refused") {
  const auto render = [](ChatFormat format, ChatMessage message) {
    const std::vector<ChatMessage> messages = {{.role = "user", .content = "x"},
                                               std::move(message)};
    const Result<std::string> text = io::render_chat(format, "<b>", "<e>", messages, true);
    REQUIRE_FALSE(text.ok());
    CHECK(std::string(text.status().message()).find("message 1") != std::string::npos);
    return text.status().code();
  };
  const ChatToolCall call = {.type = "function", .name = "f", .arguments = "{}"};
  for (const ChatFormat format :
       {ChatFormat::kDeepSeekV2, ChatFormat::kDeepSeekV3, ChatFormat::kDeepSeekR1})
    for (const char* role : {"", "User", "developer", "user "})
      CHECK(render(format, {.role = role, .content = "y"}) == Code::kInvalidArgument);
  CHECK(render(ChatFormat::kDeepSeekV2, {.role = "tool", .content = "y"}) ==
        Code::kInvalidArgument);
  CHECK(
      render(ChatFormat::kDeepSeekV2, {.role = "assistant", .content = "", .tool_calls = {call}}) ==
      Code::kInvalidArgument);
  CHECK(render(ChatFormat::kDeepSeekV3, {.role = "user", .content = "", .tool_calls = {call}}) ==
        Code::kInvalidArgument);
  CHECK(io::render_chat(ChatFormat::kNone, "", "", {}, true).status().code() == Code::kUnsupported);
  CHECK(*io::render_chat(ChatFormat::kDeepSeekV3, "<b>", "<e>", {}, false) == "<b>");
}
