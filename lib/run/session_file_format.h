// The format of a saved session, version 1.  Little endian, packed, no padding.
//
//   header    0  magic          8 bytes: "FTHMSES" 0x1a
//             8  version        u32   1
//            12  flags          u32   bit 0: logits follow the tokens; all others 0
//            16  file_bytes     u64   of the whole file, trailer included
//            24  fingerprint    u64 x 2 (lo, hi): of the model file
//            40  n_layers       u64
//            48  kv_lora_rank   u64
//            56  qk_rope_head_dim u64
//            64  vocab_size     u64
//            72  page_tokens    u64   rows of a full page
//            80  n_tokens       u64
//            88  digest
//   tokens       i32 [n_tokens] | digest
//   logits       f32 [vocab_size] | digest            when flag 0 is set: of the last token
//   page * ceil(n_tokens / page_tokens):
//             0  type           u32   KvType
//             4  n_rows         u32   rows in use: page_tokens, in the last page what is left
//             8  digest
//            24  rows of layer 0, 1, ... n_layers - 1, each as kv_page.hpp describes them:
//                  [n_rows, latent_row_bytes(type)] then [n_rows, rope_row_bytes(type)]
//                digest
//   trailer      digest of all digests before it, in order
//
// A digest is the MurmurHash3 x64 128 (lo, hi; io/hash128.h) of the section since the digest before
// it.  Every step of that hash can be undone, so a change inside one 16-byte block is always found,
// and any other with a probability of 1 - 2^-128; the trailer finds sections that were exchanged.
// It is a checksum and no signature: whoever reads a file trusts no length in it.
//
// Rows are stored by layer, not by device, and each row stands alone, so that a session moves to
// other devices and to another page size.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "fathom/kv_page.hpp"
#include "fathom/model_config.hpp"
#include "fathom/status.hpp"

namespace fathom::run {

inline constexpr uint32_t kSessionFileVersion = 1;
inline constexpr int64_t kDigestBytes = 16;
inline constexpr int64_t kSessionHeaderBytes = 88;  // and a digest
inline constexpr int64_t kPageHeaderBytes = 8;      // and a digest

struct SessionFileHeader {
  bool has_logits = false;
  int64_t file_bytes = 0;
  uint64_t fingerprint_lo = 0, fingerprint_hi = 0;
  int64_t n_layers = 0, kv_lora_rank = 0, qk_rope_head_dim = 0, vocab_size = 0;
  int64_t page_tokens = 0;
  int64_t n_tokens = 0;

  int64_t n_pages() const noexcept { return (n_tokens + page_tokens - 1) / page_tokens; }
  int64_t rows_of_page(int64_t page) const noexcept {
    const int64_t left = n_tokens - page * page_tokens;
    return left < page_tokens ? left : page_tokens;
  }
  KvLayout layout() const noexcept { return {page_tokens, kv_lora_rank, qk_rope_head_dim}; }
};

using SessionHeaderBytes = std::array<std::byte, static_cast<size_t>(kSessionHeaderBytes)>;
SessionHeaderBytes encode(const SessionFileHeader&) noexcept;

// Whether these bytes begin a session file that this version reads: to be asked before the digest,
// since a newer version may have another one.  Errors: kFormat, kVersion.
Status check_magic(std::span<const std::byte, static_cast<size_t>(kSessionHeaderBytes)> bytes);

// The fields.  After check_magic() and the digest.  Holds against a forged header: afterwards every
// size below is representable, and the file has room for the tokens, the logits and the rows in
// their smallest type.  `file_bytes` is what the file has.  Errors: kFormat (offset and field).
Result<SessionFileHeader> decode(
    std::span<const std::byte, static_cast<size_t>(kSessionHeaderBytes)> bytes, int64_t file_bytes);

// Errors: kMismatch, naming the field and both values.
Status check_model(const SessionFileHeader&, const ModelConfig&, uint64_t fingerprint_lo,
                   uint64_t fingerprint_hi);

// Bytes of one page in the file, headers and digests included.
int64_t page_file_bytes(const SessionFileHeader&, KvType type, int64_t n_rows) noexcept;
// Bytes of all that is not a page.
int64_t fixed_file_bytes(const SessionFileHeader&) noexcept;

struct PageHeader {
  KvType type = KvType::kF16;
  int64_t n_rows = 0;
};
using PageHeaderBytes = std::array<std::byte, static_cast<size_t>(kPageHeaderBytes)>;
PageHeaderBytes encode(const PageHeader&) noexcept;
// Errors: kFormat: an unknown type, or another number of rows than `n_rows`; `offset` is the
// header's place in the file.
Result<PageHeader> decode_page(const PageHeaderBytes&, int64_t page, int64_t n_rows,
                               int64_t offset);

}  // namespace fathom::run
