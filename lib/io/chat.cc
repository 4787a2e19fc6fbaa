#include "chat.h"

#include <fmt/format.h>

namespace fathom::io {
namespace {

// clang-format off
// DeepSeek-V2-Chat, Coder-V2-Instruct and their Lite forms.
constexpr std::string_view kV2Template =
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'Assistant:' }}{% endif %}";
// DeepSeek-V3 and R1 have the same text up to the last expression: R1 opens the thought.
constexpr std::string_view kV3Common =
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
    "{% set ns.is_first_sp = false %}{%- else %}"
    "{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}"
    "{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' in message %}"
    "{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls'] %}"
    "{%- if not ns.is_first %}{%- if message['content'] is none %}"
    "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + tool['function']['arguments'] + '\n' + '```' + '<｜tool▁call▁end｜>'}}"
    "{%- else %}"
    "{{'<｜Assistant｜>' + message['content'] + '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + tool['function']['arguments'] + '\n' + '```' + '<｜tool▁call▁end｜>'}}"
    "{%- endif %}{%- set ns.is_first = true -%}{%- else %}"
    "{{'\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + tool['function']['arguments'] + '\n' + '```' + '<｜tool▁call▁end｜>'}}"
    "{%- endif %}{%- endfor %}{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}"
    "{%- if ns.is_tool %}"
    "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}"
    "{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}"
    "{%- if ns.is_output_first %}"
    "{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
    "{%- set ns.is_output_first = false %}{%- else %}"
    "{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}"
    "{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}";
constexpr std::string_view kV3End =
    "{{'<｜Assistant｜>'}}{% endif %}";
constexpr std::string_view kR1End =
    "{{'<｜Assistant｜><think>\n'}}{% endif %}";
// clang-format on

constexpr std::string_view kUser = "<｜User｜>", kAssistant = "<｜Assistant｜>",
                           kEndOfSentence = "<｜end▁of▁sentence｜>", kThinkEnd = "</think>";

Status unknown_role(const ChatMessage& message, size_t index, ChatFormat format) {
  constexpr size_t kShown = 40;
  return Status(Code::kInvalidArgument,
                fmt::format("message {}: {} knows no role \"{}\"", index, chat_format_name(format),
                            std::string_view(message.role).substr(0, kShown)))
      .about("role");
}

Result<std::string> render_v2(std::string_view bos, std::string_view eos,
                              std::span<const ChatMessage> messages, bool add_generation_prompt) {
  std::string text(bos);
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    if (!message.tool_calls.empty())
      return Status(Code::kInvalidArgument,
                    fmt::format("message {}: deepseek-v2 knows no tool calls", i))
          .about("tool_calls");
    if (message.role == "user")
      text.append("User: ").append(message.content).append("\n\n");
    else if (message.role == "assistant")
      text.append("Assistant: ").append(message.content).append(eos);
    else if (message.role == "system")
      text.append(message.content).append("\n\n");
    else
      return unknown_role(message, i, ChatFormat::kDeepSeekV2);
  }
  if (add_generation_prompt) text.append("Assistant:");
  return text;
}

// Renders V3 and R1 message by message.  The state is the template's namespace: in particular the
// opening tags of tool calls and of outputs are written once in a conversation, as published.
class V3Renderer {
 public:
  std::string text;

  void user(const ChatMessage& message) {
    in_tool_ = false;
    text.append(kUser).append(message.content);
  }

  void assistant(const ChatMessage& message) {
    if (!message.tool_calls.empty()) return calls(message);
    if (in_tool_) {
      text.append("<｜tool▁outputs▁end｜>").append(message.content);
      in_tool_ = false;
    } else {
      // Thoughts of earlier turns are left out.
      std::string_view content = message.content;
      if (const size_t end = content.rfind(kThinkEnd); end != content.npos)
        content.remove_prefix(end + kThinkEnd.size());
      text.append(kAssistant).append(content);
    }
    text.append(kEndOfSentence);
  }

  void tool(const ChatMessage& message) {
    in_tool_ = true;
    if (first_output_) text.append("<｜tool▁outputs▁begin｜>");
    first_output_ = false;
    text.append("<｜tool▁output▁begin｜>").append(message.content).append("<｜tool▁output▁end｜>");
  }

  void finish(bool add_generation_prompt, bool open_thought) {
    if (in_tool_) {
      text.append("<｜tool▁outputs▁end｜>");
    } else if (add_generation_prompt) {
      text.append(kAssistant);
      if (open_thought) text.append("<think>\n");
    }
  }

 private:
  void calls(const ChatMessage& message) {
    in_tool_ = false;
    for (const ChatToolCall& call : message.tool_calls) {
      if (first_call_)
        text.append(kAssistant).append(message.content).append("<｜tool▁calls▁begin｜>");
      else
        text.append("\n");
      first_call_ = false;
      text.append("<｜tool▁call▁begin｜>").append(call.type).append("<｜tool▁sep｜>");
      text.append(call.name).append("\n```json\n").append(call.arguments).append("\n```");
      text.append("<｜tool▁call▁end｜>");
    }
    text.append("<｜tool▁calls▁end｜>").append(kEndOfSentence);
  }

  bool in_tool_ = false;
  bool first_call_ = true;
  bool first_output_ = true;
};

Result<std::string> render_v3(ChatFormat format, std::string_view bos,
                              std::span<const ChatMessage> messages, bool add_generation_prompt) {
  V3Renderer renderer;
  renderer.text = bos;
  bool first = true;
  for (const ChatMessage& message : messages) {
    if (message.role != "system") continue;
    if (!first) renderer.text.append("\n\n");
    renderer.text.append(message.content);
    first = false;
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    if (!message.tool_calls.empty() && message.role != "assistant")
      return Status(Code::kInvalidArgument,
                    fmt::format("message {}: tool calls are made by the assistant", i))
          .about("tool_calls");
    if (message.role == "user")
      renderer.user(message);
    else if (message.role == "assistant")
      renderer.assistant(message);
    else if (message.role == "tool")
      renderer.tool(message);
    else if (message.role != "system")
      return unknown_role(message, i, format);
  }
  renderer.finish(add_generation_prompt, format == ChatFormat::kDeepSeekR1);
  return std::move(renderer.text);
}

}  // namespace

ChatFormat recognise_chat_template(std::string_view text) {
  constexpr size_t kLongest = 8192;  // of texts worth comparing
  if (text.empty() || text.size() > kLongest) return ChatFormat::kNone;
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r' || text.back() == ' '))
    text.remove_suffix(1);
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool escape = text.substr(i, 2) == "\\n";
    plain += escape ? '\n' : text[i];
    i += escape;
  }
  std::string_view rest = plain;
  if (rest == kV2Template) return ChatFormat::kDeepSeekV2;
  if (!rest.starts_with(kV3Common)) return ChatFormat::kNone;
  rest.remove_prefix(kV3Common.size());
  if (rest == kV3End) return ChatFormat::kDeepSeekV3;
  if (rest == kR1End) return ChatFormat::kDeepSeekR1;
  return ChatFormat::kNone;
}

std::string_view chat_format_name(ChatFormat format) noexcept {
  switch (format) {
    case ChatFormat::kNone:
      return "none";
    case ChatFormat::kDeepSeekV2:
      return "deepseek-v2";
    case ChatFormat::kDeepSeekV3:
      return "deepseek-v3";
    case ChatFormat::kDeepSeekR1:
      return "deepseek-r1";
  }
  return "none";
}

Result<std::string> render_chat(ChatFormat format, std::string_view bos, std::string_view eos,
                                std::span<const ChatMessage> messages, bool add_generation_prompt) {
  switch (format) {
    case ChatFormat::kDeepSeekV2:
      return render_v2(bos, eos, messages, add_generation_prompt);
    case ChatFormat::kDeepSeekV3:
    case ChatFormat::kDeepSeekR1:
      return render_v3(format, bos, messages, add_generation_prompt);
    case ChatFormat::kNone:
      break;
  }
  return Status(Code::kUnsupported,
                "the file's chat template is missing or none of deepseek-v2, deepseek-v3 and "
                "deepseek-r1; name one of these formats");
}

}  // namespace fathom::io
