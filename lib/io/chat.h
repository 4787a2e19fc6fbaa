// The chat templates of DeepSeek's models, built in as code.  A template that a file brings is
// compared with the published texts and never executed.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "fathom/status.hpp"
#include "fathom/tokenizer.hpp"

namespace fathom::io {

// The format whose published template has this text; kNone for any other.  A line break and the
// escape \n inside the template's literals are the same, so is white space at its end.
ChatFormat recognise_chat_template(std::string_view text);

// "deepseek-v2", ...; "none".
std::string_view chat_format_name(ChatFormat format) noexcept;

// What the template of `format` renders.  `bos` and `eos` are the texts of these tokens.
// Errors: kUnsupported for kNone; kInvalidArgument as Tokenizer::render_chat.
Result<std::string> render_chat(ChatFormat format, std::string_view bos, std::string_view eos,
                                std::span<const ChatMessage> messages, bool add_generation_prompt);

}  // namespace fathom::io
