// lib/io/checked.h, hash128.h and text.h.
#include "lib/io/checked.h"

#include <catch2/catch.hpp>
#include <string>

#include "lib/io/hash128.h"
#include "lib/io/text.h"

using fathom::io::Checked;
using fathom::io::Hash128;

TEST_CASE("sizes keep the first thing that went wrong") {
  constexpr int64_t kMax = INT64_MAX;
  SECTION("operands") {
    CHECK(Checked(0).ok());
    CHECK(Checked(kMax).ok());
    CHECK_FALSE(Checked(-1).ok());
    CHECK_FALSE(Checked(INT64_MIN).ok());
    CHECK_FALSE(Checked(uint64_t{1} << 63).ok());
    CHECK_FALSE(Checked(UINT64_MAX).ok());
    CHECK(Checked(uint64_t{INT64_MAX}).value() == kMax);
    CHECK(Checked(uint8_t{255}).value() == 255);
  }
  SECTION("sums and differences") {
    CHECK((Checked(2) + 3).value() == 5);
    CHECK((Checked(kMax) + 0).value() == kMax);
    CHECK_FALSE((Checked(kMax) + 1).ok());
    CHECK_FALSE((Checked(kMax) + kMax).ok());
    CHECK((Checked(5) - 5).value() == 0);
    CHECK_FALSE((Checked(4) - 5).ok());
    CHECK_FALSE((Checked(-1) + 1).ok());
    CHECK_FALSE((1 + Checked(-1) - 0).ok());
  }
  SECTION("products and quotients") {
    CHECK((Checked(3) * 4).value() == 12);
    CHECK((Checked(0) * kMax).value() == 0);
    CHECK((Checked(kMax) * 0).value() == 0);
    CHECK((Checked(kMax) * 1).value() == kMax);
    CHECK_FALSE((Checked(kMax) * 2).ok());
    CHECK_FALSE((Checked(int64_t{1} << 32) * (int64_t{1} << 31)).ok());
    CHECK((Checked(int64_t{1} << 32) * (int64_t{1} << 30)).ok());
    // 4 * 4194305^2 * 211106198978564 is 16 modulo 2^64.
    CHECK_FALSE((Checked(4194305) * 4194305 * 211106198978564 * 4).ok());
    CHECK_FALSE((Checked(-1) * 0).ok());
    CHECK(exact_quotient(Checked(12), 4).value() == 3);
    CHECK_FALSE(exact_quotient(Checked(13), 4).ok());
    CHECK_FALSE(exact_quotient(Checked(13), 0).ok());
    CHECK_FALSE(exact_quotient(Checked(-4), 4).ok());
  }
  SECTION("alignment") {
    CHECK(Checked(0).aligned(32).value() == 0);
    CHECK(Checked(1).aligned(32).value() == 32);
    CHECK(Checked(32).aligned(32).value() == 32);
    CHECK(Checked(33).aligned(1).value() == 33);
    CHECK(Checked(kMax - 31).aligned(32).value() == kMax - 31);
    CHECK_FALSE(Checked(kMax - 30).aligned(32).ok());
    CHECK_FALSE(Checked(-1).aligned(32).ok());
  }
  SECTION("questions") {
    CHECK(Checked(5).at_most(5));
    CHECK_FALSE(Checked(6).at_most(5));
    CHECK_FALSE(Checked(-1).at_most(kMax));
    CHECK(Checked(255).fits<uint8_t>());
    CHECK_FALSE(Checked(256).fits<uint8_t>());
    CHECK_FALSE(Checked(-1).fits<int64_t>());
    CHECK(Checked(255).narrow<uint8_t>() == 255);
  }
}

TEST_CASE("hash of known text, however it is cut") {
  const std::string text = "The quick brown fox jumps over the lazy dog";
  const auto bytes = std::as_bytes(std::span(text));
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    for (size_t second : {cut, (cut + text.size()) / 2, text.size()}) {
      Hash128 hash;
      hash.update(bytes.first(cut));
      hash.update(bytes.subspan(cut, second - cut));
      hash.update(bytes.subspan(second));
      // MurmurHash3_x64_128, seed 0.
      CHECK(hash.digest().lo == 0xe34bbc7bbc071b6c);
      CHECK(hash.digest().hi == 0x7a433ca9c49a9347);
    }
  }
  CHECK(Hash128().digest().lo == 0);
}

TEST_CASE("plain UTF-8") {
  using fathom::io::is_plain_utf8;
  for (const std::string_view good :
       {"", "a", "\x7f", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80",
        "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF", "a\xC3\xA9z"})
    CHECK(is_plain_utf8(good));
  using namespace std::string_view_literals;
  for (const std::string_view bad :
       {"\0"sv, "a\0b"sv, "\x80"sv, "\xBF"sv, "\xC0\x80"sv, "\xC1\xBF"sv, "\xC2"sv, "\xC2z"sv,
        "\xE0\x9F\xBF"sv, "\xED\xA0\x80"sv, "\xE1\x80"sv, "\xE1\x80z"sv, "\xF0\x8F\xBF\xBF"sv,
        "\xF4\x90\x80\x80"sv, "\xF5\x80\x80\x80"sv, "\xFF"sv, "\xF0\x90\x80"sv})
    CHECK_FALSE(is_plain_utf8(bad));
}

TEST_CASE("names, and text for messages") {
  using namespace std::string_view_literals;
  using fathom::io::is_plain_name;
  using fathom::io::printable;
  CHECK(is_plain_name("blk.0.Gr\xC3\xBC\xC3\x9F"));
  for (const std::string_view bad : {"a\0"sv, "\x1b[2J"sv, "a\n"sv, "\x7f"sv, "\xC3"sv})
    CHECK_FALSE(is_plain_name(bad));
  CHECK(printable("ok \xC3\xBC") == "ok \xC3\xBC");
  CHECK(printable("\x1b[2J\0\xFF\xC3z\n"sv) == "?[2J???z?");
  CHECK(printable(std::string(200, 'x')) == std::string(100, 'x') + "...");
  CHECK(printable("aaa\xC3\xBC", 4) == "aaa\xC3\xBC");
  CHECK(printable("aaa\xC3\xBC.", 4) == "aaa\xC3\xBC...");
  CHECK(printable("").empty());
}

TEST_CASE("layer numbers in tensor names") {
  using fathom::io::layer_of;
  CHECK(layer_of("blk.0.attn_norm.weight", "blk.") == 0);
  CHECK(layer_of("blk.61.x", "blk.") == 61);
  CHECK(layer_of("blk.99999999999999999999.x", "blk.") == 1'000'000);
  CHECK(layer_of("blk.x", "blk.") == -1);
  CHECK(layer_of("blk.-1.x", "blk.") == -1);
  CHECK(layer_of("blk.12", "blk.") == -1);
  CHECK(layer_of("token_embd.weight", "blk.") == -1);
}
