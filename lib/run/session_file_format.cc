// Headers of a saved session: fields to bytes and back, with every bound checked on the way back.
#include "session_file_format.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "../io/checked.h"

namespace fathom::run {
namespace {

static_assert(std::endian::native == std::endian::little, "fields are copied as they are");
// Numbers of a public enumeration that stand in files.
static_assert(static_cast<int>(KvType::kF32) == 0 && static_cast<int>(KvType::kBF16) == 1 &&
              static_cast<int>(KvType::kF16) == 2 && static_cast<int>(KvType::kF8) == 3 &&
              static_cast<int>(KvType::kQ8_0) == 4 && static_cast<int>(KvType::kQ4_0) == 5);

constexpr char kMagic[8] = {'F', 'T', 'H', 'M', 'S', 'E', 'S', '\x1a'};
constexpr uint32_t kFlagLogits = 1;
// Far above what any machine holds, and low enough that sums of products of two stay in 64 bits.
constexpr int64_t kMaxDimension = int64_t{1} << 24;
constexpr int64_t kMaxTokens = int64_t{1} << 40;

enum Offset : int64_t {
  kVersionAt = 8,
  kFlagsAt = 12,
  kFileBytesAt = 16,
  kFingerprintAt = 24,
  kLayersAt = 40,
  kLoraRankAt = 48,
  kRopeDimAt = 56,
  kVocabAt = 64,
  kPageTokensAt = 72,
  kTokensAt = 80
};

template <class T>
void put(std::byte* bytes, int64_t at, T value) noexcept {
  std::memcpy(bytes + at, &value, sizeof value);
}
template <class T>
T get(const std::byte* bytes, int64_t at) noexcept {
  T value;
  std::memcpy(&value, bytes + at, sizeof value);
  return value;
}

Status bad_field(int64_t at, const char* field, std::string_view message) {
  return Status(Code::kFormat, message).at(static_cast<uint64_t>(at)).about(field);
}

Status read_field(const std::byte* bytes, int64_t at, const char* field, int64_t least,
                  int64_t most, int64_t* out) {
  const auto value = get<uint64_t>(bytes, at);
  if (value < static_cast<uint64_t>(least) || value > static_cast<uint64_t>(most))
    return bad_field(at, field,
                     fmt::format("{} is {}, not in [{}, {}]", field, value, least, most));
  *out = static_cast<int64_t>(value);
  return {};
}

// The least bytes that a row of all layers takes, over the types there are.
io::Checked smallest_row(const SessionFileHeader& header) {
  int64_t least = INT64_MAX;
  for (int t = 0; t < kKvTypeCount; ++t) {
    const auto type = static_cast<KvType>(t);
    const KvLayout layout = header.layout();
    least = std::min(least, layout.latent_row_bytes(type) + layout.rope_row_bytes(type));
  }
  return io::Checked(least) * header.n_layers;
}

}  // namespace

SessionHeaderBytes encode(const SessionFileHeader& header) noexcept {
  SessionHeaderBytes out{};
  std::byte* bytes = out.data();
  std::memcpy(bytes, kMagic, sizeof kMagic);
  put<uint32_t>(bytes, kVersionAt, kSessionFileVersion);
  put<uint32_t>(bytes, kFlagsAt, header.has_logits ? kFlagLogits : 0);
  put(bytes, kFileBytesAt, header.file_bytes);
  put(bytes, kFingerprintAt, header.fingerprint_lo);
  put(bytes, kFingerprintAt + 8, header.fingerprint_hi);
  put(bytes, kLayersAt, header.n_layers);
  put(bytes, kLoraRankAt, header.kv_lora_rank);
  put(bytes, kRopeDimAt, header.qk_rope_head_dim);
  put(bytes, kVocabAt, header.vocab_size);
  put(bytes, kPageTokensAt, header.page_tokens);
  put(bytes, kTokensAt, header.n_tokens);
  return out;
}

Status check_magic(std::span<const std::byte, static_cast<size_t>(kSessionHeaderBytes)> bytes) {
  if (std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0)
    return bad_field(0, "magic", "not a saved session: it does not begin with \"FTHMSES\"");
  const auto version = get<uint32_t>(bytes.data(), kVersionAt);
  if (version == 0)
    return bad_field(kVersionAt, "version", "version 0 of the format does not exist");
  if (version > kSessionFileVersion)
    return Status(Code::kVersion,
                  fmt::format("the session was saved in version {} of the format, this library "
                              "reads up to {}",
                              version, kSessionFileVersion))
        .at(kVersionAt)
        .about("version");
  return {};
}

Result<SessionFileHeader> decode(
    std::span<const std::byte, static_cast<size_t>(kSessionHeaderBytes)> span, int64_t file_bytes) {
  const std::byte* bytes = span.data();
  SessionFileHeader h;
  const auto flags = get<uint32_t>(bytes, kFlagsAt);
  if ((flags & ~kFlagLogits) != 0)
    return bad_field(kFlagsAt, "flags", fmt::format("flags {:#x} are not known", flags));
  h.has_logits = (flags & kFlagLogits) != 0;
  FATHOM_TRY(read_field(bytes, kFileBytesAt, "file_bytes", 0, INT64_MAX, &h.file_bytes));
  if (h.file_bytes != file_bytes)
    return bad_field(
        kFileBytesAt, "file_bytes",
        fmt::format("the file has {} bytes, its header says {}", file_bytes, h.file_bytes));
  h.fingerprint_lo = get<uint64_t>(bytes, kFingerprintAt);
  h.fingerprint_hi = get<uint64_t>(bytes, kFingerprintAt + 8);
  FATHOM_TRY(read_field(bytes, kLayersAt, "n_layers", 1, kMaxDimension, &h.n_layers));
  FATHOM_TRY(read_field(bytes, kLoraRankAt, "kv_lora_rank", 1, kMaxDimension, &h.kv_lora_rank));
  FATHOM_TRY(
      read_field(bytes, kRopeDimAt, "qk_rope_head_dim", 0, kMaxDimension, &h.qk_rope_head_dim));
  FATHOM_TRY(read_field(bytes, kVocabAt, "vocab_size", 1, INT32_MAX, &h.vocab_size));
  FATHOM_TRY(
      read_field(bytes, kPageTokensAt, "page_tokens", kKvTileRows, kMaxDimension, &h.page_tokens));
  if (h.page_tokens % kKvTileRows != 0)
    return bad_field(
        kPageTokensAt, "page_tokens",
        fmt::format("page_tokens is {}, not a multiple of {}", h.page_tokens, kKvTileRows));
  FATHOM_TRY(read_field(bytes, kTokensAt, "n_tokens", 0, kMaxTokens, &h.n_tokens));
  if (h.has_logits && h.n_tokens == 0)
    return bad_field(kFlagsAt, "flags", "logits without a token");

  // Before anything is taken for them: do the tokens fit the file at all?
  const io::Checked least = io::Checked(kSessionHeaderBytes + 3 * kDigestBytes) +
                            io::Checked(h.n_tokens) * 4 + io::Checked(h.n_tokens) * smallest_row(h);
  if (!least.at_most(file_bytes) || fixed_file_bytes(h) > file_bytes)
    return bad_field(
        kTokensAt, "n_tokens",
        fmt::format("{} tokens do not fit a file of {} bytes", h.n_tokens, file_bytes));
  return h;
}

Status check_model(const SessionFileHeader& header, const ModelConfig& model,
                   uint64_t fingerprint_lo, uint64_t fingerprint_hi) {
  const struct {
    int64_t at;
    const char* field;
    int64_t saved, loaded;
  } fields[] = {
      {kLayersAt, "n_layers", header.n_layers, model.num_hidden_layers},
      {kLoraRankAt, "kv_lora_rank", header.kv_lora_rank, model.kv_lora_rank},
      {kRopeDimAt, "qk_rope_head_dim", header.qk_rope_head_dim, model.qk_rope_head_dim},
      {kVocabAt, "vocab_size", header.vocab_size, model.vocab_size},
  };
  for (const auto& f : fields)
    if (f.saved != f.loaded)
      return Status(Code::kMismatch,
                    fmt::format("the session was saved with another model: {} is {} there and {} "
                                "in the model loaded",
                                f.field, f.saved, f.loaded))
          .at(static_cast<uint64_t>(f.at))
          .about(f.field);
  if (header.fingerprint_lo != fingerprint_lo || header.fingerprint_hi != fingerprint_hi)
    return Status(Code::kMismatch,
                  fmt::format("the session was saved with another model file: fingerprint "
                              "{:016x}{:016x}, the model loaded has {:016x}{:016x}",
                              header.fingerprint_hi, header.fingerprint_lo, fingerprint_hi,
                              fingerprint_lo))
        .at(kFingerprintAt)
        .about("fingerprint");
  return {};
}

int64_t page_file_bytes(const SessionFileHeader& header, KvType type, int64_t n_rows) noexcept {
  const KvLayout layout = header.layout();
  const int64_t row = layout.latent_row_bytes(type) + layout.rope_row_bytes(type);
  return kPageHeaderBytes + kDigestBytes + n_rows * row * header.n_layers + kDigestBytes;
}

int64_t fixed_file_bytes(const SessionFileHeader& header) noexcept {
  int64_t bytes = kSessionHeaderBytes + kDigestBytes + header.n_tokens * 4 + kDigestBytes;
  if (header.has_logits) bytes += header.vocab_size * 4 + kDigestBytes;
  return bytes + kDigestBytes;
}

PageHeaderBytes encode(const PageHeader& header) noexcept {
  PageHeaderBytes bytes;
  put(bytes.data(), 0, static_cast<uint32_t>(header.type));
  put(bytes.data(), 4, static_cast<uint32_t>(header.n_rows));
  return bytes;
}

Result<PageHeader> decode_page(const PageHeaderBytes& bytes, int64_t page, int64_t n_rows,
                               int64_t offset) {
  const auto type = get<uint32_t>(bytes.data(), 0);
  if (type >= kKvTypeCount)
    return bad_field(offset, "type",
                     fmt::format("page {} has type {}, not in [0, {})", page, type, kKvTypeCount));
  const auto rows = get<uint32_t>(bytes.data(), 4);
  if (rows != n_rows)
    return bad_field(offset + 4, "n_rows",
                     fmt::format("page {} has {} rows, not {}", page, rows, n_rows));
  return PageHeader{static_cast<KvType>(type), n_rows};
}

}  // namespace fathom::run
