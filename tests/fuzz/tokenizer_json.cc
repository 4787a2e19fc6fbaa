// Files that a tokenizer is read from.  The input is a tokenizer.json, up to a zero byte, and then
// a tokenizer_config.json; or the beginning of a GGUF file.  What is accepted must work.
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "lib/io/gguf_header.h"
#include "support/small_tokenizer.h"

using namespace fathom;

namespace {

Result<io::TokenizerBuilder> parse(std::string_view input) {
  if (input.starts_with("GGUF")) {
    const auto* const bytes = reinterpret_cast<const std::byte*>(input.data());
    const auto source = io::memory_source("fuzz", {bytes, bytes + input.size()});
    io::Hash128 hash;
    FATHOM_TRY_ASSIGN(const io::GgufHeader header, io::read_gguf_header(*source, 0, hash));
    return io::TokenizerBuilder::parse(header.tokenizer);
  }
  const size_t zero = input.find('\0');
  const std::string_view config = zero == input.npos ? std::string_view() : input.substr(zero + 1);
  return io::TokenizerBuilder::parse_json(input.substr(0, zero), config);
}

void check(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  Result<Tokenizer> tokenizer = test::build_tokenizer(parse(input));
  if (!tokenizer.ok()) {
    check(!tokenizer.status().message().empty());
    return 0;
  }
  std::vector<int32_t> ids;
  const std::string_view text = "The <bos>quick <user> brown\r\n fox.  你好 123 😀\xFF";
  check(tokenizer->encode(text, {.add_bos = true}, ids).ok());
  check(!ids.empty());
  std::string decoded;
  check(tokenizer->decode(ids, false, decoded).ok());
  for (int32_t id = 0; id < tokenizer->n_tokens(); ++id)
    if (!tokenizer->token_bytes(id).empty())
      check(tokenizer->token_bytes(tokenizer->find(tokenizer->token_bytes(id))) ==
            tokenizer->token_bytes(id));
  const ChatMessage message = {.role = "user", .content = "x"};
  check(tokenizer->render_chat({&message, 1}, true).ok() ==
        (tokenizer->chat_format() != ChatFormat::kNone));
  return 0;
}
