// Reading what the user names: texts, token ids, conversations.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "fathom/tokenizer.hpp"
#include "options.h"

namespace cli {

// The whole of a file, or of standard input for "-".  Leaves with kExitIo.
std::string read_text(const std::string& path);

// A JSON array of token ids, or an object with such an array under "tokens" (as `tokenize --json`
// and `run --json` print it).  Leaves with kExitUsage for anything else.
std::vector<int32_t> read_tokens(const std::string& path);

// A JSON array of {role, content, tool_calls}, as chat interfaces exchange it; any other text is
// what one user says.
std::vector<fathom::ChatMessage> parse_conversation(const std::string& text);

// The prompt's token ids.  Text gets the beginning-of-sentence token if the model's file says so.
// `tokenizer` may be null when the flags name token ids.
std::vector<int32_t> prompt_tokens(const PromptFlags&, const ChatFlags&,
                                   const fathom::Tokenizer* tokenizer);

}  // namespace cli
