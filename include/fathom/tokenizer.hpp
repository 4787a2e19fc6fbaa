// Tokenizer: text <-> token ids for the DeepSeek tokenizers (byte-level BPE with the deepseek-llm,
// deepseek-coder and deepseek-v3 pre-splits), exact to the token, in time linear in the text.
//
//   auto tokenizer = Tokenizer::open("model.gguf");           // or a folder with tokenizer.json
//   std::vector<int32_t> ids;
//   Status s = tokenizer->encode("Hello", {.add_bos = true}, ids);
//
// Immutable after creation; threads may share one.  Cheap to copy: copies share the data.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fathom/status.hpp"

namespace fathom {

struct EncodeOptions {
  bool add_bos = false;       // put bos first (never twice when the text begins with it)
  bool parse_special = true;  // "<｜User｜>" in the text becomes its token; false: plain text
};

enum class ChatFormat : uint8_t { kNone, kDeepSeekV2, kDeepSeekV3, kDeepSeekR1 };

// A call that an assistant's message makes (V3 and R1).
struct ChatToolCall {
  std::string type;  // "function"
  std::string name;
  std::string arguments;  // JSON text
};

struct ChatMessage {
  std::string role;     // "system", "user", "assistant"; V3 and R1 also "tool": a call's result
  std::string content;  // UTF-8
  std::vector<ChatToolCall> tool_calls = {};  // of an assistant, V3 and R1 only
};

class Tokenizer {
 public:
  // A GGUF file, a tokenizer.json, a folder that holds one, or a .safetensors file beside one.
  // Errors: kNotFound, kIo, kFormat (offset, field), kUnsupported (another kind of tokenizer).
  static Result<Tokenizer> open(const std::string& path);

  int64_t n_tokens() const noexcept;           // ids are 0 .. n_tokens-1; some may be unused
  int32_t bos() const noexcept;                // -1: none
  int32_t eos() const noexcept;                // -1: none
  bool adds_bos() const noexcept;              // the file says that prompts begin with bos
  std::string_view kind() const noexcept;      // "deepseek-llm", "deepseek-coder", "deepseek-v3"
  bool is_special(int32_t id) const noexcept;  // control tokens
  // Id of a token by its exact text (special tokens), -1 when there is none.
  int32_t find(std::string_view text) const noexcept;

  // Appends the ids of `text` (UTF-8; invalid bytes are encoded as U+FFFD is, like the reference).
  // Errors: kInvalidArgument when text is longer than 2^31 - 1 bytes.
  Status encode(std::string_view text, const EncodeOptions&, std::vector<int32_t>& ids) const;

  // Bytes of one token (not necessarily whole characters); empty for ids out of range.  The view
  // lives as long as the tokenizer.
  std::string_view token_bytes(int32_t id) const noexcept;
  // Text of `ids`; invalid UTF-8 is replaced by U+FFFD per maximal subpart, as the reference does.
  // Errors: kInvalidArgument for an id out of range, naming it and the bound.
  Status decode(std::span<const int32_t> ids, bool skip_special, std::string& text) const;

  // The chat format recognised from the file's template (compared, never executed); kNone when the
  // template is unknown or missing.
  ChatFormat chat_format() const noexcept;
  // The prompt text of a conversation, bos included, as the published template renders it.
  // `format` kNone means chat_format().  Errors: kUnsupported when that is kNone too,
  // kInvalidArgument for a role, or a message with tool calls, that the format does not know.
  Result<std::string> render_chat(std::span<const ChatMessage> messages, bool add_generation_prompt,
                                  ChatFormat format = ChatFormat::kNone) const;

  int64_t size_bytes() const noexcept;  // of the tables, as counted by the ledger

  struct Data;  // lib/io/tokenizer_data.h
  explicit Tokenizer(std::shared_ptr<const Data>) noexcept;

 private:
  std::shared_ptr<const Data> data_;
};

// Turns tokens into text one by one and never hands out part of a character: bytes of an
// unfinished one wait for the next token.  One per stream; not shared between threads.
class StreamDecoder {
 public:
  StreamDecoder(Tokenizer tokenizer, bool skip_special);
  // Appends to `text` what is complete after `id`.  Invalid sequences become U+FFFD as in decode().
  Status push(int32_t id, std::string& text);
  // Appends what is left as U+FFFD; the decoder is then empty.
  void finish(std::string& text);

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  std::string pending_;  // at most 3 bytes
};

}  // namespace fathom
