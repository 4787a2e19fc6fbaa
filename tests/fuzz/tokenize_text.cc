// Texts for the three pre-splits.  The first byte picks one and the options, the rest is the text.
// Decoding gives the text back, with its invalid UTF-8 replaced; so does a stream, piece by piece.
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "support/small_tokenizer.h"

using namespace fathom;

namespace {

void check(bool holds) {
  if (!holds) std::abort();
}

const Tokenizer& tokenizer_of(int kind) {
  static const std::vector<Tokenizer> all = [] {
    std::vector<Tokenizer> made;
    for (const io::SplitKind split :
         {io::SplitKind::kDeepSeekLlm, io::SplitKind::kDeepSeekCoder, io::SplitKind::kDeepSeekV3}) {
      Result<Tokenizer> tokenizer = test::build_tokenizer(test::small_tokenizer(split));
      check(tokenizer.ok());
      made.push_back(std::move(tokenizer).value());
    }
    return made;
  }();
  return all[static_cast<size_t>(kind)];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const Tokenizer& tokenizer = tokenizer_of(data[0] % 3);
  const bool parse_special = (data[0] & 4) != 0;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);

  std::vector<int32_t> ids;
  check(tokenizer.encode(text, {.parse_special = parse_special}, ids).ok());
  std::string expected, decoded, streamed;
  io::append_utf8_replacing(text, expected);
  check(tokenizer.decode(ids, false, decoded).ok());
  check(decoded == expected);
  StreamDecoder stream(tokenizer, false);
  for (const int32_t id : ids) {
    check(stream.push(id, streamed).ok());
    check(io::utf8_valid_prefix(streamed) == streamed.size());
  }
  stream.finish(streamed);
  check(streamed == expected);

  // Any bytes as tokens: the ids 0 to 255 are the bytes.
  std::vector<int32_t> bytes(data + 1, data + size);
  decoded.clear();
  check(tokenizer.decode(bytes, false, decoded).ok());
  check(decoded == expected);
  return 0;
}
