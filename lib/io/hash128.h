// MurmurHash3 x64 128 (Austin Appleby, public domain), fed in pieces: the fingerprint of a model's
// headers.  Tells models apart; it is no signature and resists no forger.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace fathom::io {

class Hash128 {
 public:
  void update(std::span<const std::byte> bytes) noexcept {
    length_ += bytes.size();
    if (n_tail_ > 0) {
      const size_t take = bytes.size() < 16 - n_tail_ ? bytes.size() : 16 - n_tail_;
      std::memcpy(tail_ + n_tail_, bytes.data(), take);
      n_tail_ += take;
      bytes = bytes.subspan(take);
      if (n_tail_ < 16) return;
      block(tail_);
      n_tail_ = 0;
    }
    for (; bytes.size() >= 16; bytes = bytes.subspan(16)) block(bytes.data());
    if (!bytes.empty()) std::memcpy(tail_, bytes.data(), bytes.size());
    n_tail_ = bytes.size();
  }
  void update(uint64_t value) noexcept { update(std::as_bytes(std::span(&value, 1))); }

  struct Digest {
    uint64_t lo, hi;
  };
  Digest digest() const noexcept {
    std::byte last[16] = {};
    std::memcpy(last, tail_, n_tail_);
    uint64_t h1 = h1_, h2 = h2_;
    if (n_tail_ > 8) h2 ^= mix_k2(word(last + 8));
    if (n_tail_ > 0) h1 ^= mix_k1(word(last));
    h1 ^= length_;
    h2 ^= length_;
    h1 += h2;
    h2 += h1;
    h1 = avalanche(h1);
    h2 = avalanche(h2);
    h1 += h2;
    h2 += h1;
    return {h1, h2};
  }

 private:
  static constexpr uint64_t kC1 = 0x87c37b91114253d5, kC2 = 0x4cf5ad432745937f;

  static uint64_t word(const std::byte* p) noexcept {
    static_assert(std::endian::native == std::endian::little);
    uint64_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  static uint64_t mix_k1(uint64_t k) noexcept { return std::rotl(k * kC1, 31) * kC2; }
  static uint64_t mix_k2(uint64_t k) noexcept { return std::rotl(k * kC2, 33) * kC1; }
  static uint64_t avalanche(uint64_t k) noexcept {
    k = (k ^ (k >> 33)) * 0xff51afd7ed558ccd;
    k = (k ^ (k >> 33)) * 0xc4ceb9fe1a85ec53;
    return k ^ (k >> 33);
  }
  void block(const std::byte* p) noexcept {
    h1_ = (std::rotl(h1_ ^ mix_k1(word(p)), 27) + h2_) * 5 + 0x52dce729;
    h2_ = (std::rotl(h2_ ^ mix_k2(word(p + 8)), 31) + h1_) * 5 + 0x38495ab5;
  }

  uint64_t h1_ = 0, h2_ = 0, length_ = 0;
  std::byte tail_[16];
  size_t n_tail_ = 0;
};

}  // namespace fathom::io
