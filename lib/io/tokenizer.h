// How a Tokenizer's tables are laid out and built.  The tables are flat and stand in one block of
// memory that the caller provides (a ledger block for a model's tokenizer, the heap for
// Tokenizer::open), so their bytes are known before they are taken.  The tables: tokenizer_data.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "fathom/status.hpp"
#include "fathom/tokenizer.hpp"
#include "tensor_file.h"

namespace fathom::io {

struct RawTokenizer;

// A parsed tokenizer, counted but not yet laid out.  Holds scratch memory; short-lived.
class TokenizerBuilder {
 public:
  // Reads tokenizer.json when the source names one.  Errors as Tokenizer::open;
  // kNotFound when the file has no tokenizer at all.
  static Result<TokenizerBuilder> parse(const TokenizerSource& source);
  // From the texts of tokenizer.json and tokenizer_config.json (empty: there is none).
  static Result<TokenizerBuilder> parse_json(std::string_view tokenizer_json,
                                             std::string_view config_json);

  TokenizerBuilder(TokenizerBuilder&&) noexcept;
  ~TokenizerBuilder();
  // Bytes that build() needs: the same layout function, run with a counting arena.
  int64_t size_bytes() const noexcept;
  // `storage` has size_bytes() bytes, 64-byte aligned, kept alive by `owner` (may be null when the
  // storage outlives every copy of the tokenizer).
  Tokenizer build(std::span<std::byte> storage, std::shared_ptr<void> owner) &&;

 private:
  struct Parsed;
  explicit TokenizerBuilder(std::unique_ptr<Parsed>) noexcept;
  static Result<TokenizerBuilder> from_raw(const RawTokenizer& raw);
  std::unique_ptr<Parsed> parsed_;
};

}  // namespace fathom::io
