#include "input.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "exit.h"
#include "signals.h"

namespace cli {

std::string read_text(const std::string& path) {
  const bool is_stdin = path == "-";
  std::FILE* file = is_stdin ? stdin : std::fopen(path.c_str(), "rb");
  if (file == nullptr) fail(kExitIo, fmt::format("{}: {}", path, std::strerror(errno)));
  std::string text;
  char piece[1 << 16];
  size_t n;
  while ((n = std::fread(piece, 1, sizeof piece, file)) > 0) text.append(piece, n);
  const int error = std::ferror(file) != 0 ? errno : 0;
  if (!is_stdin) std::fclose(file);
  if (signal_exit_code() != 0) throw Exit{signal_exit_code()};
  if (error != 0) fail(kExitIo, fmt::format("{}: {}", path, std::strerror(error)));
  return text;
}

std::vector<int32_t> read_tokens(const std::string& path) {
  const nlohmann::json json = nlohmann::json::parse(read_text(path), nullptr, false);
  const nlohmann::json* array = &json;
  if (json.is_object() && json.contains("tokens")) array = &json["tokens"];
  if (!array->is_array()) usage_error(fmt::format("{}: expected a JSON array of token ids", path));
  std::vector<int32_t> tokens;
  tokens.reserve(array->size());
  for (const nlohmann::json& value : *array) {
    if (!value.is_number_integer() || value < INT32_MIN || value > INT32_MAX)
      usage_error(fmt::format("{}: element {} is {}, not a token id", path, tokens.size(),
                              value.dump().substr(0, 40)));
    tokens.push_back(value.get<int32_t>());
  }
  return tokens;
}

std::vector<fathom::ChatMessage> parse_conversation(const std::string& text) {
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, false);
  if (!json.is_array() || json.empty() || !json[0].is_object() || !json[0].contains("role"))
    return {{"user", text}};
  std::vector<fathom::ChatMessage> messages;
  try {
    for (const nlohmann::json& item : json) {
      fathom::ChatMessage message{item.at("role"), ""};
      // A message that calls tools may have null for its content.
      if (const auto content = item.find("content"); content != item.end() && !content->is_null())
        message.content = content->get<std::string>();
      if (const auto calls = item.find("tool_calls"); calls != item.end())
        for (const nlohmann::json& call : *calls)
          message.tool_calls.push_back({.type = call.at("type"),
                                        .name = call.at("function").at("name"),
                                        .arguments = call.at("function").at("arguments")});
      messages.push_back(std::move(message));
    }
  } catch (const nlohmann::json::exception&) {
    usage_error(fmt::format(
        "message {} of the conversation: expected {{\"role\": text, \"content\": text}}",
        messages.size()));
  }
  return messages;
}

std::vector<int32_t> prompt_tokens(const PromptFlags& flags, const ChatFlags& chat,
                                   const fathom::Tokenizer* tokenizer) {
  if (!flags.tokens.empty()) {
    if (chat.chat) usage_error("--chat needs a text: it does not go with --tokens");
    return read_tokens(flags.tokens);
  }
  if (tokenizer == nullptr)
    fail(kExitBadModel, "the model has no tokenizer: give the prompt as ids, with --tokens");
  std::string text = flags.has_prompt ? flags.prompt : read_text(flags.file);
  fathom::EncodeOptions options{.add_bos = tokenizer->adds_bos()};
  if (chat.chat) {
    text = must(tokenizer->render_chat(parse_conversation(text), true, chat_format(chat)));
    options.add_bos = false;  // the template has it
  }
  std::vector<int32_t> tokens;
  must(tokenizer->encode(text, options, tokens));
  return tokens;
}

}  // namespace cli
