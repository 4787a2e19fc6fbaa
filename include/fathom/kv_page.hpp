// What a page of the KV cache looks like: facts shared by the cache that maps pages and by the
// backends that read them in place.
//
// MLA keeps one row per token and layer, shared by all heads (DeepSeek-V2 report, section 2.1):
// `kv_lora_rank` latent columns (RMS-normed) and `qk_rope_head_dim` RoPE columns (rotated).
// A page holds `page_tokens` consecutive tokens of one session for all layers that live on one
// device, and carries its own type:
//
//   page:   | layer slot 0          | layer slot 1          | ...        layer_bytes() each
//   slot:   | latent plane          | rope plane            | pad to 64
//             page_tokens rows of     page_tokens rows of
//             latent_row_bytes()      rope_row_bytes()
//
// Latent row by type: f32, bf16, f16: the values.  f8: ceil(r/128) f32 scales, then r E4M3 codes.
// q8_0, q4_0: ceil(r/32) ggml blocks (34 or 18 bytes), the last one padded with zeros.
// The RoPE columns stay in 16 bits (f32 pages: f32; bf16 pages: bf16; all others: f16), since they
// carry position and are small.
#pragma once

#include <cstdint>
#include <string_view>

namespace fathom {

enum class KvType : uint8_t { kF32, kBF16, kF16, kF8, kQ8_0, kQ4_0 };
inline constexpr int kKvTypeCount = 6;

constexpr std::string_view kv_type_name(KvType type) noexcept {
  constexpr std::string_view kNames[] = {"f32", "bf16", "f16", "fp8", "q8_0", "q4_0"};
  return kNames[static_cast<int>(type)];
}

inline constexpr int64_t kKvF8ScaleColumns = 128;  // latent columns that share one f32 scale
// Attention merges partial results at fixed multiples of this many rows, in order, so that page
// size, tiers, devices and thread count do not change a bit.  page_tokens divides or is a multiple.
inline constexpr int64_t kKvSplitRows = 512;
// Rows that a kernel treats as one tile; page_tokens is a multiple of it.
inline constexpr int64_t kKvTileRows = 16;

// Latent or RoPE columns of a row are at most this many (checked when a configuration is read).
inline constexpr int64_t kKvMaxColumns = 8192;

struct KvLayout {
  int64_t page_tokens = 0;
  int64_t kv_lora_rank = 0;
  int64_t qk_rope_head_dim = 0;

  constexpr int64_t latent_row_bytes(KvType type) const noexcept {
    const int64_t r = kv_lora_rank;
    switch (type) {
      case KvType::kF32:
        return r * 4;
      case KvType::kBF16:
      case KvType::kF16:
        return r * 2;
      case KvType::kF8:
        return (r + kKvF8ScaleColumns - 1) / kKvF8ScaleColumns * 4 + r;
      case KvType::kQ8_0:
        return (r + 31) / 32 * 34;
      case KvType::kQ4_0:
        return (r + 31) / 32 * 18;
    }
    return 0;
  }
  constexpr int64_t rope_row_bytes(KvType type) const noexcept {
    return qk_rope_head_dim * (type == KvType::kF32 ? 4 : 2);
  }
  // Offset of the rope plane inside a layer slot; planes start on cache lines.
  constexpr int64_t rope_plane_offset(KvType type) const noexcept {
    return (page_tokens * latent_row_bytes(type) + 63) / 64 * 64;
  }
  constexpr int64_t layer_bytes(KvType type) const noexcept {
    return rope_plane_offset(type) + (page_tokens * rope_row_bytes(type) + 63) / 64 * 64;
  }
  constexpr int64_t page_bytes(KvType type, int64_t n_layers) const noexcept {
    return n_layers * layer_bytes(type);
  }
};

// Which pages of a session have which type.  Pages that hold one of the first `first_tokens` or of
// the last `recent_tokens` tokens are hot and stay in hot_type; all others are cold and have
// `type`. A page is written hot and rewritten when it becomes cold.  Both 0: every page has `type`.
struct KvPolicy {
  KvType type = KvType::kF16;
  KvType hot_type = KvType::kF16;
  int64_t page_tokens = 64;
  int64_t first_tokens = 0, recent_tokens = 0;

  constexpr int64_t pages_for(int64_t n_tokens) const noexcept {
    return (n_tokens + page_tokens - 1) / page_tokens;
  }
  // Pages [first_cold_page(), cold_end(n)) are cold when the session holds n tokens.
  constexpr int64_t first_cold_page() const noexcept { return pages_for(first_tokens); }
  constexpr int64_t cold_end(int64_t n_tokens) const noexcept {
    const int64_t old = n_tokens - recent_tokens;
    const int64_t end = recent_tokens == 0 ? pages_for(n_tokens) : old > 0 ? old / page_tokens : 0;
    return end > first_cold_page() ? end : first_cold_page();
  }
  constexpr KvType new_page_type(int64_t page) const noexcept {
    return recent_tokens > 0 || page < first_cold_page() ? hot_type : type;
  }
  // Tokens at which the last page of n_tokens, or the last one before `end_page`, is begun. Nowhere
  // on the way to n_tokens do the pages before end_page take more bytes: further on one may have
  // left the window and have been rewritten.
  constexpr int64_t last_page_begun(int64_t n_tokens, int64_t end_page = INT64_MAX) const noexcept {
    const int64_t pages = pages_for(n_tokens) < end_page ? pages_for(n_tokens) : end_page;
    return pages > 0 ? (pages - 1) * page_tokens + 1 : 0;
  }
  // Bytes of a session's pages [first_page, end_page) at n tokens, given those of a cold and of a
  // hot page; without a range, of all.
  constexpr int64_t bytes(int64_t n_tokens, int64_t cold_page_bytes, int64_t hot_page_bytes,
                          int64_t first_page = 0, int64_t end_page = INT64_MAX) const noexcept {
    const auto before = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t pages = before(pages_for(n_tokens), end_page);
    if (pages <= first_page) return 0;
    const int64_t first = first_cold_page() > first_page ? first_cold_page() : first_page;
    const int64_t end = before(cold_end(n_tokens), pages);
    const int64_t cold = end > first ? end - first : 0;
    return cold * cold_page_bytes + (pages - first_page - cold) * hot_page_bytes;
  }
  // The same where room is made for n tokens before the first is written.
  constexpr int64_t reserved_bytes(int64_t n_tokens, int64_t cold_page_bytes,
                                   int64_t hot_page_bytes, int64_t first_page = 0,
                                   int64_t end_page = INT64_MAX) const noexcept {
    const int64_t pages = pages_for(n_tokens) < end_page ? pages_for(n_tokens) : end_page;
    if (pages <= first_page) return 0;
    const int64_t hot_end =
        recent_tokens > 0 || first_cold_page() > pages ? pages : first_cold_page();
    const int64_t hot = hot_end > first_page ? hot_end - first_page : 0;
    return (pages - first_page - hot) * cold_page_bytes + hot * hot_page_bytes;
  }
};

// One page as a backend sees it.  `data` is memory of that backend's device; null while the page
// is not resident (then no operation that reads its rows may be started).
struct KvPage {
  void* data = nullptr;
  KvType type = KvType::kBF16;
};

// The rows of one layer of one session.  Row i of the session is row i % page_tokens of pages[i /
// page_tokens].  An operation reads rows [first_row, first_row + n_rows).
struct KvRows {
  const KvPage* pages = nullptr;  // host memory, valid until the operation has finished
  KvLayout layout;
  int64_t layer_slot = 0;  // which of the page's layers
  int64_t first_row = 0;
  int64_t n_rows = 0;
};

}  // namespace fathom
