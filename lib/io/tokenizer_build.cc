// TokenizerBuilder: a raw tokenizer is checked, its names become numbers, its texts bytes; then the
// tables are laid out in one block.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>

#include "chat.h"
#include "json.h"
#include "tokenizer.h"
#include "tokenizer_data.h"
#include "tokenizer_raw.h"
#include "unicode.h"

namespace fathom::io {
namespace {

constexpr int64_t kMaxJsonBytes = int64_t{64} << 20;
constexpr int64_t kMaxConfigBytes = int64_t{1} << 20;
constexpr int64_t kMaxAddedBytesInAll = int64_t{4} << 20;

// The byte-level alphabet of GPT-2: each byte as a printable character.  Printable Latin-1 stands
// for itself, the other 68 bytes are U+0100 and following, in order.
struct ByteAlphabet {
  std::array<uint16_t, 256> character;
  std::array<int16_t, 0x144> byte;  // -1: not in the alphabet

  constexpr ByteAlphabet() : character(), byte() {
    for (auto& b : byte) b = -1;
    uint16_t next = 0x100;
    for (uint16_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      character[b] = printable ? b : next++;
      byte[character[b]] = static_cast<int16_t>(b);
    }
  }
};
constexpr ByteAlphabet kAlphabet;

// Appends the bytes that a piece stands for.  A piece with a character outside the alphabet stands
// for itself, as in the reference.
void append_bytes(std::string_view piece, std::string& out) {
  const size_t before = out.size();
  const char* at = piece.data();
  const char* const end = at + piece.size();
  while (at < end) {
    const uint32_t point = next_code_point(at);
    if (point >= kAlphabet.byte.size() || kAlphabet.byte[point] < 0) {
      out.resize(before);
      out.append(piece);
      return;
    }
    out.push_back(static_cast<char>(kAlphabet.byte[point]));
  }
}

// "<0x0A>" -> 10.
std::optional<char> byte_piece(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return {};
  int value = 0;
  for (const char digit : piece.substr(3, 2)) {
    value *= 16;
    if (digit >= '0' && digit <= '9')
      value += digit - '0';
    else if (digit >= 'A' && digit <= 'F')
      value += digit - 'A' + 10;
    else
      return {};
  }
  return static_cast<char>(value);
}

// Bytes that no UTF-8 text holds need no token.
bool occurs_in_utf8(int byte) {
  return byte != 0xC0 && byte != 0xC1 && byte < 0xF5;
}

Status check_id(std::string_view name, int64_t id, size_t n_tokens) {
  if (id >= -1 && id < static_cast<int64_t>(n_tokens)) return {};
  return Status(Code::kFormat,
                fmt::format("{} token id is {}, the vocabulary has {} tokens", name, id, n_tokens))
      .about(name);
}

}  // namespace

struct TokenizerBuilder::Parsed {
  Tokenizer::Data facts;  // without tables
  uint64_t seed = 0;
  std::string bytes;
  std::vector<uint32_t> end;
  std::vector<uint8_t> control;
  std::array<int32_t, 256> byte_token;
  std::vector<Merge> merges;
  std::vector<uint32_t> added_ids;  // found first by their text
  std::optional<AddedMatcher::Automaton> added[2];

  Status resolve(const RawTokenizer& raw);
  Tokenizer::Data carve(Arena& arena) const;

 private:
  Status read_pieces(const RawTokenizer& raw);
  Status read_added(const RawTokenizer& raw);
};

// The bytes of each token.
Status TokenizerBuilder::Parsed::read_pieces(const RawTokenizer& raw) {
  const size_t n = raw.pieces.size();
  end.reserve(n);
  control.reserve(n);
  for (size_t id = 0; id < n; ++id) {
    const std::string_view piece = raw.pieces[id];
    if (utf8_valid_prefix(piece) != piece.size())
      return Status(Code::kFormat,
                    fmt::format("token {} is not valid UTF-8: {}", id, quoted_piece(piece)));
    switch (raw.types[id]) {
      case TokenType::kNormal:
      case TokenType::kUnknown:
        append_bytes(piece, bytes);
        break;
      case TokenType::kControl:
      case TokenType::kUser:
      case TokenType::kUnused:
        bytes.append(piece);
        break;
      case TokenType::kByte: {
        const std::optional<char> byte = byte_piece(piece);
        if (!byte)
          return Status(Code::kFormat, fmt::format("byte token {} is {}, expected <0x00> to <0xFF>",
                                                   id, quoted_piece(piece)));
        bytes.push_back(*byte);
        break;
      }
    }
    if (bytes.size() > UINT32_MAX)
      return Status(Code::kUnsupported, "the tokens have more than 4 GiB of text");
    end.push_back(static_cast<uint32_t>(bytes.size()));
    control.push_back(raw.types[id] == TokenType::kControl);
  }
  return {};
}

Status TokenizerBuilder::Parsed::read_added(const RawTokenizer& raw) {
  std::vector<AddedToken> tokens[2];
  int64_t total = 0;
  for (size_t id = 0; id < raw.pieces.size(); ++id) {
    const std::string_view piece = raw.pieces[id];
    if (raw.added[id] == AddedPass::kNone || piece.empty()) continue;
    const auto size = static_cast<int64_t>(piece.size());
    total += size;
    if (size > kMaxAddedBytes || total > kMaxAddedBytesInAll)
      return Status(Code::kUnsupported,
                    fmt::format("added token {} has {} bytes, all so far {}; at most {} and {} "
                                "are read",
                                id, size, total, kMaxAddedBytes, kMaxAddedBytesInAll));
    added_ids.push_back(static_cast<uint32_t>(id));
    tokens[raw.added[id] == AddedPass::kSecond].push_back({piece, static_cast<int32_t>(id)});
  }
  for (int pass = 0; pass < 2; ++pass) added[pass].emplace(std::move(tokens[pass]));
  return {};
}

Status TokenizerBuilder::Parsed::resolve(const RawTokenizer& raw) {
  const size_t n = raw.pieces.size();
  if (n == 0) return Status(Code::kFormat, "the vocabulary is empty");
  for (const std::string_view piece : raw.pieces) seed = hash_text(piece, seed);

  std::vector<uint32_t> slots(static_cast<size_t>(hash_slots(static_cast<int64_t>(n))));
  TextIndex by_piece(slots.data(), static_cast<int64_t>(slots.size()), seed);
  by_piece.clear();
  const auto piece_of = [&](uint32_t id) { return raw.pieces[id]; };
  for (uint32_t id = 0; id < n; ++id) {
    if (raw.pieces[id].empty()) continue;
    const uint32_t first = by_piece.insert(raw.pieces[id], id, piece_of);
    // Converters fill the vocabulary up with unused tokens, not always with different names.
    if (first != id && raw.types[id] != TokenType::kUnused)
      return Status(Code::kFormat, fmt::format("tokens {} and {} have the same text {}", first, id,
                                               quoted_piece(raw.pieces[id])));
  }

  FATHOM_TRY(read_pieces(raw));
  std::string piece;
  for (int byte = 0; byte < 256; ++byte) {
    piece.clear();
    append_code_point(kAlphabet.character[static_cast<size_t>(byte)], piece);
    const uint32_t id = by_piece.find(piece, piece_of);
    byte_token[static_cast<size_t>(byte)] = static_cast<int32_t>(id);  // kNone becomes -1
    if (id == TextIndex::kNone && occurs_in_utf8(byte))
      return Status(Code::kFormat, fmt::format("the vocabulary has no token {} for byte 0x{:02X}",
                                               quoted_piece(piece), byte));
  }

  merges.reserve(raw.merges.size());
  for (const auto& [left, right] : raw.merges) {
    piece.assign(left).append(right);
    const Merge merge = {by_piece.find(left, piece_of), by_piece.find(right, piece_of),
                         by_piece.find(piece, piece_of)};
    if (left.empty() || right.empty() || merge.left == TextIndex::kNone ||
        merge.right == TextIndex::kNone || merge.merged == TextIndex::kNone)
      return Status(Code::kFormat,
                    fmt::format("merge {} of {} and {}: {} is no token", merges.size(),
                                quoted_piece(left), quoted_piece(right),
                                merge.left == TextIndex::kNone    ? "the left one"
                                : merge.right == TextIndex::kNone ? "the right one"
                                                                  : "the result"))
          .about("merges");
    merges.push_back(merge);
  }

  FATHOM_TRY(read_added(raw));
  FATHOM_TRY(check_id("bos", raw.bos, n));
  FATHOM_TRY(check_id("eos", raw.eos, n));
  facts.split = raw.split;
  facts.bos = static_cast<int32_t>(raw.bos);
  facts.eos = static_cast<int32_t>(raw.eos);
  facts.adds_bos = raw.adds_bos;
  facts.chat = recognise_chat_template(raw.chat_template);
  facts.n_tokens = static_cast<int64_t>(n);
  return {};
}

// The one layout: counts or places, as the arena does.
Tokenizer::Data TokenizerBuilder::Parsed::carve(Arena& arena) const {
  Tokenizer::Data data = facts;
  const int64_t n = facts.n_tokens;
  auto* const data_bytes = arena.take<char>(static_cast<int64_t>(bytes.size()));
  auto* const data_end = arena.take<uint32_t>(n);
  auto* const data_control = arena.take<uint8_t>(n);
  auto* const data_byte_token = arena.take<int32_t>(256);
  data.merges = MergeTable::carve(arena, merges, seed);
  for (int pass = 0; pass < 2; ++pass) data.added[pass] = AddedMatcher::carve(arena, *added[pass]);
  const int64_t n_slots = hash_slots(n);
  auto* const slots = arena.take<uint32_t>(n_slots);
  data.size_bytes = arena.peak_bytes();
  if (arena.counting()) return data;

  std::copy(bytes.begin(), bytes.end(), data_bytes);
  std::copy(end.begin(), end.end(), data_end);
  std::copy(control.begin(), control.end(), data_control);
  std::copy(byte_token.begin(), byte_token.end(), data_byte_token);
  data.bytes = data_bytes;
  data.end = data_end;
  data.control = data_control;
  data.byte_token = data_byte_token;
  data.index = TextIndex(slots, n_slots, seed);
  data.index.clear();
  const auto token = [&](uint32_t id) { return data.token(id); };
  for (const uint32_t id : added_ids) data.index.insert(data.token(id), id, token);
  for (uint32_t id = 0; id < n; ++id)
    if (!data.token(id).empty()) data.index.insert(data.token(id), id, token);
  return data;
}

TokenizerBuilder::TokenizerBuilder(std::unique_ptr<Parsed> parsed) noexcept
    : parsed_(std::move(parsed)) {}
TokenizerBuilder::TokenizerBuilder(TokenizerBuilder&&) noexcept = default;
TokenizerBuilder::~TokenizerBuilder() = default;

Result<TokenizerBuilder> TokenizerBuilder::from_raw(const RawTokenizer& raw) {
  auto parsed = std::make_unique<Parsed>();
  FATHOM_TRY(parsed->resolve(raw));
  return TokenizerBuilder(std::move(parsed));
}

Result<TokenizerBuilder> TokenizerBuilder::parse_json(std::string_view tokenizer_json,
                                                      std::string_view config_json) {
  FATHOM_TRY_ASSIGN(const RawTokenizer raw, raw_from_json(tokenizer_json, config_json));
  return from_raw(raw);
}

Result<TokenizerBuilder> TokenizerBuilder::parse(const TokenizerSource& source) {
  if (!source.json_path.empty()) {
    FATHOM_TRY_ASSIGN(const std::string text, read_text_file(source.json_path, kMaxJsonBytes));
    std::string config;
    if (!source.config_json_path.empty()) {
      FATHOM_TRY_ASSIGN(config, read_text_file(source.config_json_path, kMaxConfigBytes));
    }
    Result<TokenizerBuilder> builder = parse_json(text, config);
    if (!builder.ok()) return std::move(builder).status().in(source.json_path);
    return builder;
  }
  if (source.gguf_model.empty() && source.piece_end.empty())
    return Status(Code::kNotFound, "the file has no tokenizer");
  FATHOM_TRY_ASSIGN(const RawTokenizer raw, raw_from_gguf(source));
  return from_raw(raw);
}

int64_t TokenizerBuilder::size_bytes() const noexcept {
  Arena counting;
  return parsed_->carve(counting).size_bytes;
}

Tokenizer TokenizerBuilder::build(std::span<std::byte> storage, std::shared_ptr<void> owner) && {
  Arena arena(storage.data(), static_cast<int64_t>(storage.size()));
  auto data = std::make_shared<Tokenizer::Data>(parsed_->carve(arena));
  data->owner = std::move(owner);
  parsed_.reset();
  return Tokenizer(std::move(data));
}

}  // namespace fathom::io
