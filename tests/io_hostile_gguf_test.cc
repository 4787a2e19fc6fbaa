// GGUF files made to break their reader: each differs from the small good file in one place and is
// refused with its code.  The families are those of published advisories against GGUF readers:
// counts and lengths beyond the file, products that wrap, tables that overlap, names that repeat.
#include <set>

#include "io_raw_files.h"

using namespace fathom;
using namespace fathom::io;
using namespace fathom::test;

namespace {

Status parse(const std::string& bytes) {
  return TensorFile::parse_gguf(source_of(bytes)).status();
}

struct Case {
  const char* name;
  Code expected;
  const char* mentions;  // in the message
  std::function<void(RawGguf&)> spoil;
};

void run(std::span<const Case> cases, size_t at_least) {
  std::set<std::string> names;
  for (const Case& c : cases) {
    INFO("case: " << c.name);
    CHECK(names.insert(c.name).second);
    RawGguf raw = small_gguf();
    c.spoil(raw);
    const Status status = parse(raw.bytes());
    check_refused(status, c.expected);
    CHECK_THAT(std::string(status.message()), Catch::Contains(c.mentions));
  }
  CHECK(cases.size() >= at_least);
}

constexpr uint64_t kMax64 = UINT64_MAX;
constexpr uint64_t kMaxSigned = INT64_MAX;

std::string array(uint32_t element_type, uint64_t count, std::string_view bytes = "") {
  return raw<uint32_t>(9) + raw(element_type) + raw(count) + std::string(bytes);
}

// Gives tensor "output.weight" a type, dimensions and as many bytes of data as the base file has.
std::function<void(RawGguf&)> output_is(uint32_t type, std::vector<uint64_t> dims) {
  return [type, dims](RawGguf& f) {
    f.tensor("output.weight").type = type;
    f.tensor("output.weight").dims = dims;
  };
}

}  // namespace

TEST_CASE("the small file itself is good") {
  CHECK(parse(small_gguf().bytes()).ok());
}

TEST_CASE("hostile GGUF: preamble and counts") {
  const Case cases[] = {
      {"magic GGML", Code::kFormat, "GGUF", [](RawGguf& f) { f.magic = "GGML"; }},
      {"magic in lower case", Code::kFormat, "GGUF", [](RawGguf& f) { f.magic = "gguf"; }},
      {"magic FUGG, a big-endian word", Code::kFormat, "GGUF",
       [](RawGguf& f) { f.magic = "FUGG"; }},
      {"magic of zeros", Code::kFormat, "GGUF", [](RawGguf& f) { f.magic.assign(4, '\0'); }},
      {"version 0", Code::kFormat, "version", [](RawGguf& f) { f.version = 0; }},
      {"version 1", Code::kVersion, "2 and 3", [](RawGguf& f) { f.version = 1; }},
      {"version 4", Code::kVersion, "2 and 3", [](RawGguf& f) { f.version = 4; }},
      {"version 2^32-1", Code::kVersion, "4294967295", [](RawGguf& f) { f.version = UINT32_MAX; }},
      {"version 3 big-endian", Code::kUnsupported, "big-endian",
       [](RawGguf& f) { f.version = 0x03000000; }},
      {"n_tensors 2^63-1", Code::kFormat, "n_tensors",
       [](RawGguf& f) { f.n_tensors = kMaxSigned; }},
      {"n_tensors -1", Code::kFormat, "n_tensors", [](RawGguf& f) { f.n_tensors = kMax64; }},
      {"n_tensors 2^63", Code::kFormat, "n_tensors", [](RawGguf& f) { f.n_tensors = 1ull << 63; }},
      {"n_tensors wraps times 24", Code::kFormat, "n_tensors",
       [](RawGguf& f) { f.n_tensors = kMax64 / 24 + 1; }},
      {"n_tensors larger than the file", Code::kFormat, "n_tensors",
       [](RawGguf& f) { f.n_tensors = f.bytes().size(); }},
      {"n_tensors one more", Code::kFormat, "", [](RawGguf& f) { f.n_tensors = 5; }},
      {"n_kv 2^63-1", Code::kFormat, "n_kv", [](RawGguf& f) { f.n_keys = kMaxSigned; }},
      {"n_kv -1", Code::kFormat, "n_kv", [](RawGguf& f) { f.n_keys = kMax64; }},
      {"n_kv wraps times 14", Code::kFormat, "n_kv",
       [](RawGguf& f) { f.n_keys = kMax64 / 14 + 1; }},
      {"n_kv one more", Code::kFormat, "", [](RawGguf& f) { f.n_keys = f.keys.size() + 1; }},
      {"n_kv one fewer", Code::kFormat, "", [](RawGguf& f) { f.n_keys = f.keys.size() - 1; }},
      {"n_kv 65,537", Code::kFormat, "65536",
       [](RawGguf& f) {
         f.n_keys = 65'537;
         f.extra_data = 2'000'000;
       }},
  };
  run(cases, 21);
  check_refused(parse(""), Code::kFormat);
  check_refused(parse("GGU"), Code::kFormat);
  check_refused(parse("GGUF"), Code::kFormat);
}

TEST_CASE("hostile GGUF: keys and strings") {
  // A string of another length than it says.
  const auto name_is = [](uint64_t length, std::string text) {
    return raw<uint32_t>(8) + raw(length) + text;
  };
  using namespace std::string_literals;
  const Case cases[] = {
      {"empty key", Code::kFormat, "empty", [](RawGguf& f) { f.set_u32("", 1); }},
      {"key with a zero byte", Code::kFormat, "UTF-8", [](RawGguf& f) { f.set_u32("a\0b"s, 1); }},
      {"key with an escape sequence", Code::kFormat, "control",
       [](RawGguf& f) { f.set_u32("a\x1b[2J", 1); }},
      {"architecture with an escape sequence", Code::kUnsupported, "?[2J",
       [](RawGguf& f) { f.set_string("general.architecture", "\x1b[2J"); }},
      {"architecture of 10 MB", Code::kUnsupported, "...",
       [](RawGguf& f) { f.set_string("general.architecture", std::string(10 << 20, 'a')); }},
      {"key in bad UTF-8", Code::kFormat, "UTF-8", [](RawGguf& f) { f.set_u32("a\xFF", 1); }},
      {"key with an overlong zero", Code::kFormat, "UTF-8",
       [](RawGguf& f) { f.set_u32("a\xC0\x80", 1); }},
      {"key of 65,536 bytes", Code::kFormat, "1023",
       [](RawGguf& f) { f.set_u32(std::string(65'536, 'k'), 1); }},
      {"key length 2^64-1", Code::kFormat, "18446744073709551615",
       [](RawGguf& f) {
         f.keys.insert(f.keys.begin(), {"", ""});
         f.keys[0].value = "";
         f.magic = "GGUF" + raw<uint32_t>(3) + raw<uint64_t>(0) + raw<uint64_t>(1) + raw(kMax64);
       }},
      {"value length 2^64-1", Code::kFormat, "general.name",
       [=](RawGguf& f) { f.set("general.name", name_is(kMax64, "x")); }},
      {"value length 2^63", Code::kFormat, "general.name",
       [=](RawGguf& f) { f.set("general.name", name_is(1ull << 63, "x")); }},
      {"value longer than the file", Code::kFormat, "general.name",
       [=](RawGguf& f) { f.set("general.name", name_is(100'000, "x")); }},
      {"value of 17 MB", Code::kFormat, "general.name",
       [](RawGguf& f) { f.set_string("general.name", std::string(17 << 20, 'x')); }},
      {"value with a zero byte", Code::kFormat, "general.name",
       [](RawGguf& f) { f.set_string("general.name", "a\0b"s); }},
      {"value in bad UTF-8", Code::kFormat, "general.name",
       [](RawGguf& f) { f.set_string("general.name", "\xED\xA0\x80"); }},
      {"a key twice", Code::kFormat, "twice", [](RawGguf& f) { f.keys.push_back(f.keys[2]); }},
      {"a key twice with other values", Code::kFormat, "twice",
       [](RawGguf& f) {
         f.keys.push_back({"general.alignment", raw<uint32_t>(4) + raw<uint32_t>(32)});
         f.keys.push_back({"general.alignment", raw<uint32_t>(4) + raw<uint32_t>(64)});
       }},
      {"the vocabulary twice", Code::kFormat, "twice",
       [](RawGguf& f) {
         for (const auto& key : small_gguf().keys)
           if (key.name == "tokenizer.ggml.tokens") f.keys.push_back(key);
       }},
  };
  run(cases, 18);
}

TEST_CASE("hostile GGUF: value types and arrays") {
  std::string nested;
  for (int i = 0; i < 100'000; ++i) nested += raw<uint32_t>(9) + raw<uint64_t>(1);
  const Case cases[] = {
      {"value type 13", Code::kFormat, "13", [](RawGguf& f) { f.set("x", raw<uint32_t>(13)); }},
      {"value type 2^32-1", Code::kFormat, "4294967295",
       [](RawGguf& f) { f.set("x", raw(UINT32_MAX)); }},
      {"bool 2", Code::kFormat, "must be 0 or 1", [](RawGguf& f) { f.set_bool("x", 2); }},
      {"bool 255", Code::kFormat, "must be 0 or 1", [](RawGguf& f) { f.set_bool("x", 255); }},
      {"array of type 13", Code::kFormat, "13", [](RawGguf& f) { f.set("x", array(13, 0)); }},
      {"array of arrays", Code::kFormat, "arrays of arrays",
       [](RawGguf& f) { f.set("x", array(9, 1, array(4, 0).substr(4))); }},
      {"arrays nested 100,000 times", Code::kFormat, "arrays of arrays",
       [&](RawGguf& f) { f.set("x", raw<uint32_t>(9) + nested); }},
      {"array of 2^40 bytes", Code::kFormat, "1099511627776",
       [](RawGguf& f) { f.set("x", array(0, 1ull << 40)); }},
      {"array of 2^61 doubles, which wraps", Code::kFormat,
       "x:", [](RawGguf& f) { f.set("x", array(12, 1ull << 61)); }},
      {"array of 2^64-1 bytes", Code::kFormat,
       "x:", [](RawGguf& f) { f.set("x", array(0, kMax64)); }},
      {"array of 2^61 strings, which wraps", Code::kFormat,
       "x:", [](RawGguf& f) { f.set("x", array(8, 1ull << 61)); }},
      {"array of strings, one longer than the file", Code::kFormat, "x",
       [](RawGguf& f) { f.set("x", array(8, 1, raw<uint64_t>(1 << 20))); }},
      {"array of strings, one of 2^64-1", Code::kFormat, "x",
       [](RawGguf& f) { f.set("x", array(8, 1, raw(kMax64))); }},
      {"architecture is a number", Code::kFormat, "general.architecture",
       [](RawGguf& f) { f.set_u32("general.architecture", 1); }},
      {"architecture is missing", Code::kFormat, "general.architecture",
       [](RawGguf& f) { f.erase("general.architecture"); }},
      {"architecture of another model", Code::kUnsupported, "\"llama\"",
       [](RawGguf& f) { f.set_string("general.architecture", "llama"); }},
      {"an adapter", Code::kUnsupported, "adapter",
       [](RawGguf& f) { f.set_string("general.type", "adapter"); }},
      {"old quantisation", Code::kUnsupported, "general.quantization_version",
       [](RawGguf& f) {
         f.set_u32("general.quantization_version", 1);
         output_is(8, {32, 5})(f);
       }},
  };
  run(cases, 18);
}

TEST_CASE("hostile GGUF: tensor shapes and types") {
  const auto n_dims = [](uint32_t n) {
    return [n](RawGguf& f) { f.tensor("output.weight").n_dims = n; };
  };
  constexpr uint64_t k31 = 1ull << 31, k32 = 1ull << 32;
  const Case cases[] = {
      {"0 dimensions", Code::kFormat, "dimensions", n_dims(0)},
      {"5 dimensions", Code::kFormat, "dimensions", n_dims(5)},
      {"2^31 dimensions", Code::kFormat, "dimensions", n_dims(1u << 31)},
      {"2^32-1 dimensions", Code::kFormat, "dimensions", n_dims(UINT32_MAX)},
      {"dimension 0", Code::kFormat, "dimension", output_is(0, {8, 0})},
      {"dimension 0 inside", Code::kFormat, "dimension", output_is(0, {0, 6})},
      {"dimension -1", Code::kFormat, "dimension", output_is(0, {kMax64, 6})},
      {"dimension 2^63", Code::kFormat, "dimension", output_is(0, {1ull << 63, 1})},
      {"2^63-1 elements times 2", Code::kFormat, "dimension", output_is(0, {kMaxSigned, 2})},
      {"elements wrap to 0", Code::kFormat, "dimension", output_is(0, {k32, k32})},
      {"elements wrap to 1", Code::kFormat, "dimension", output_is(0, {0xAAAAAAAAAAAAAAABull, 3})},
      {"elements wrap in four dimensions", Code::kFormat, "dimension",
       output_is(0, {1 << 16, 1 << 16, 1 << 16, 1 << 16})},
      {"bytes wrap", Code::kFormat, "do not fit", output_is(0, {k31, k31})},
      {"bytes wrap to 16", Code::kFormat, "dimension",
       output_is(0, {4194305, 4194305, 211106198978564})},
      {"bytes near 2^63 wrap when padded", Code::kFormat, "do not fit",
       output_is(24, {kMaxSigned})},
      {"larger than the file", Code::kFormat, "do not fit", output_is(0, {8, 1 << 20})},
      {"one row too many", Code::kFormat, "end behind",
       [](RawGguf& f) { f.tensor("blk.1.exp_probs_b.bias").dims = {13}; }},
      {"row no multiple of a block", Code::kFormat, "blocks of 32", output_is(8, {8, 6})},
      {"row no multiple of a large block", Code::kFormat, "blocks of 256", output_is(12, {128, 1})},
      {"removed type 4", Code::kUnsupported, "type number 4", output_is(4, {32, 1})},
      {"removed type 5", Code::kUnsupported, "type number 5", output_is(5, {32, 1})},
      {"removed type 31", Code::kUnsupported, "type number 31", output_is(31, {32, 1})},
      {"removed type 36", Code::kUnsupported, "type number 36", output_is(36, {32, 1})},
      {"unknown type 999", Code::kUnsupported, "type number 999", output_is(999, {32, 1})},
      {"type -1", Code::kUnsupported, "type number 4294967295", output_is(UINT32_MAX, {32, 1})},
  };
  run(cases, 25);
}

TEST_CASE("hostile GGUF: tensor names and places") {
  using namespace std::string_literals;
  const auto named = [](std::string name) {
    return [name](RawGguf& f) { f.tensor("output_norm.weight").name = name; };
  };
  const auto placed = [](uint64_t offset) {
    return [offset](RawGguf& f) { f.tensor("output.weight").offset = offset; };
  };
  const auto aligned = [](std::string value) {
    return [value](RawGguf& f) { f.set("general.alignment", value); };
  };
  const Case cases[] = {
      {"empty name", Code::kFormat, "empty", named("")},
      {"name with a zero byte", Code::kFormat, "UTF-8", named("a\0b"s)},
      {"name in bad UTF-8", Code::kFormat, "UTF-8", named("\xFE")},
      {"name of 65,536 bytes", Code::kFormat, "1023", named(std::string(65'536, 'n'))},
      {"name twice", Code::kFormat, "two tensors", named("output.weight")},
      {"offset not aligned", Code::kFormat, "alignment", placed(1)},
      {"offset behind the end", Code::kFormat, "", placed(1 << 20)},
      {"offset at the end", Code::kFormat, "end behind", placed(480)},
      {"offset 2^63", Code::kFormat, "do not fit", placed(1ull << 63)},
      {"offset 2^64-32, which wraps", Code::kFormat, "do not fit", placed(kMax64 - 31)},
      {"offset 2^63-32, where the sum wraps", Code::kFormat, "do not fit", placed(kMaxSigned - 31)},
      {"offset and size equal to the file's size", Code::kFormat, "end behind",
       [](RawGguf& f) {
         const uint64_t size = f.bytes().size();
         f.tensor("output.weight").offset = (size - 192) / 32 * 32;
       }},
      {"overlapping the one before", Code::kFormat, "overlap", placed(160)},
      {"at the same place as another", Code::kFormat, "overlap", placed(0)},
      {"inside another", Code::kFormat, "overlap",
       [](RawGguf& f) { f.tensor("output_norm.weight").offset = 64; }},
      {"data cut by one byte", Code::kFormat, "end behind", [](RawGguf& f) { f.extra_data = -1; }},
      {"no data", Code::kFormat, "", [](RawGguf& f) { f.extra_data = -432; }},
      {"alignment 0", Code::kFormat, "general.alignment", aligned(raw<uint32_t>(4) + raw(0u))},
      {"alignment 1", Code::kFormat, "general.alignment", aligned(raw<uint32_t>(4) + raw(1u))},
      {"alignment 3", Code::kFormat, "general.alignment", aligned(raw<uint32_t>(4) + raw(3u))},
      {"alignment 33", Code::kFormat, "general.alignment", aligned(raw<uint32_t>(4) + raw(33u))},
      {"alignment 2^31", Code::kFormat, "general.alignment",
       aligned(raw<uint32_t>(4) + raw(1u << 31))},
      {"alignment of type u64", Code::kFormat, "general.alignment",
       aligned(raw<uint32_t>(10) + raw<uint64_t>(32))},
      {"alignment of type string", Code::kFormat, "general.alignment",
       aligned(raw<uint32_t>(8) + raw_string("32"))},
      {"alignment of type f32", Code::kFormat, "general.alignment",
       aligned(raw<uint32_t>(6) + raw(32.0f))},
      {"alignment larger than that of the offsets", Code::kFormat, "alignment",
       aligned(raw<uint32_t>(4) + raw(256u))},
  };
  run(cases, 26);
}

TEST_CASE("hostile GGUF: the vocabulary") {
  const auto tokens = [](std::string value) {
    return [value](RawGguf& f) { f.set("tokenizer.ggml.tokens", value); };
  };
  const Case cases[] = {
      {"empty vocabulary", Code::kFormat, "empty", tokens(array(8, 0))},
      {"vocabulary of numbers", Code::kFormat, "tokenizer.ggml.tokens",
       tokens(array(4, 1, raw(1u)))},
      {"vocabulary of 2^60 pieces", Code::kFormat, "tokenizer.ggml.tokens",
       tokens(array(8, 1ull << 60))},
      {"piece of 10 MB", Code::kFormat, "65535",
       tokens(array(8, 1, raw_string(std::string(10 << 20, 'x'))))},
      {"piece longer than the file", Code::kFormat, "tokenizer.ggml.tokens",
       tokens(array(8, 1, raw<uint64_t>(60'000)))},
      {"piece of length 2^64-1", Code::kFormat, "tokenizer.ggml.tokens",
       tokens(array(8, 1, raw(kMax64)))},
      {"more pieces than rows", Code::kFormat, "tokenizer.ggml.tokens",
       [](RawGguf& f) {
         f.set_strings("tokenizer.ggml.tokens", {"a", "b", "c", "d", "e", "f", "g"});
         f.erase("tokenizer.ggml.token_type");
       }},
      {"merges of numbers", Code::kFormat, "tokenizer.ggml.merges",
       [](RawGguf& f) { f.set("tokenizer.ggml.merges", array(5, 1, raw(1))); }},
      {"token types too few", Code::kFormat, "tokenizer.ggml.token_type",
       [](RawGguf& f) { f.set("tokenizer.ggml.token_type", array(5, 1, raw(1))); }},
      {"token types of strings", Code::kFormat, "tokenizer.ggml.token_type",
       [](RawGguf& f) {
         f.set_strings("tokenizer.ggml.token_type", {"a", "b", "c", "d", "e"});
       }},
      {"token types no array", Code::kFormat, "tokenizer.ggml.token_type",
       [](RawGguf& f) { f.set_u32("tokenizer.ggml.token_type", 5); }},
      {"scores too many", Code::kFormat, "tokenizer.ggml.scores",
       [](RawGguf& f) { f.set("tokenizer.ggml.scores", array(6, 6, std::string(24, '\0'))); }},
      {"bos behind the vocabulary", Code::kFormat, "bos_token_id",
       [](RawGguf& f) { f.set_u32("tokenizer.ggml.bos_token_id", 5); }},
      {"bos -1", Code::kFormat, "bos_token_id",
       [](RawGguf& f) { f.set_i32("tokenizer.ggml.bos_token_id", -1); }},
      {"eos 2^32-1", Code::kFormat, "eos_token_id",
       [](RawGguf& f) { f.set_u32("tokenizer.ggml.eos_token_id", UINT32_MAX); }},
      {"eos 2^64-1", Code::kFormat, "eos_token_id",
       [](RawGguf& f) { f.set_u64("tokenizer.ggml.eos_token_id", kMax64); }},
      {"eos is a string", Code::kFormat, "eos_token_id",
       [](RawGguf& f) { f.set_string("tokenizer.ggml.eos_token_id", "1"); }},
      {"add_bos_token is a number", Code::kFormat, "add_bos_token",
       [](RawGguf& f) { f.set_u32("tokenizer.ggml.add_bos_token", 1); }},
      {"chat template is a number", Code::kFormat, "chat_template",
       [](RawGguf& f) { f.set_u32("tokenizer.chat_template", 1); }},
  };
  run(cases, 19);

  // A template is text to compare and nothing else, whatever it says.
  RawGguf code = small_gguf();
  const std::string attack =
      "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(9) %}";
  code.set_string("tokenizer.chat_template", attack);
  const Result<TensorFile> file = TensorFile::parse_gguf(source_of(code.bytes()));
  REQUIRE(file.ok());
  CHECK(file->tokenizer().chat_template == attack);
}

TEST_CASE("hostile GGUF: splits") {
  const TemporaryFolder folder;
  const auto part = [&](uint16_t no, uint16_t count, std::vector<RawGguf::Tensor> tensors) {
    RawGguf f;
    if (no == 0) f.keys = small_gguf().keys;
    f.set_u16("split.no", no);
    f.set_u16("split.count", count);
    f.set_i32("split.tensors.count", 4);
    f.tensors = std::move(tensors);
    return f;
  };
  const auto t = small_gguf().tensors;
  const std::string first = "m-00001-of-00002.gguf", second = "m-00002-of-00002.gguf";
  const RawGguf a = part(0, 2, {t[0], t[1]}), b = part(1, 2, {t[2], t[3]});
  folder.write(first, a.bytes());
  folder.write(second, b.bytes());
  const auto open = [&](std::string_view name) { return TensorFile::open(folder / name).status(); };
  REQUIRE(open(first).ok());

  const auto check = [&](std::string_view name, Code code, const char* mentions) {
    const Status status = open(name);
    check_refused(status, code);
    CHECK_THAT(std::string(status.message()), Catch::Contains(mentions));
  };
  SECTION("the second part is opened") {
    check(second, Code::kInvalidArgument, first.c_str());
  }
  SECTION("a part is missing") {
    std::filesystem::remove(folder / second);
    check(first, Code::kNotFound, second.c_str());
  }
  SECTION("a part is a directory") {
    std::filesystem::remove(folder / second);
    std::filesystem::create_directory(folder / second);
    check(first, Code::kFormat, "a directory");
  }
  SECTION("the name has another count") {
    folder.write("m-00001-of-00003.gguf", a.bytes());
    check("m-00001-of-00003.gguf", Code::kFormat, "must end in -00001-of-00002.gguf");
  }
  SECTION("the name has no number") {
    folder.write("whole.gguf", a.bytes());
    check("whole.gguf", Code::kFormat, "must end in -00001-of-00002.gguf");
  }
  SECTION("split.no twice") {
    folder.write(second, part(0, 2, {t[2], t[3]}).bytes());
    check(first, Code::kFormat, "split.no 0");
  }
  SECTION("split.count differs") {
    folder.write(second, part(1, 3, {t[2], t[3]}).bytes());
    check(first, Code::kFormat, "split.count 3");
  }
  SECTION("split.tensors.count differs") {
    RawGguf other = b;
    other.set_i32("split.tensors.count", 5);
    folder.write(second, other.bytes());
    check(first, Code::kFormat, "split.tensors.count 5");
  }
  SECTION("tensors are missing") {
    folder.write(second, part(1, 2, {t[2]}).bytes());
    check(first, Code::kFormat, "the parts have 3 tensors");
  }
  SECTION("a tensor is in both") {
    folder.write(second, part(1, 2, {t[1], t[2]}).bytes());
    check(first, Code::kFormat, "two tensors");
  }
  SECTION("no split keys in the second") {
    RawGguf other = b;
    other.keys.clear();
    folder.write(second, other.bytes());
    check(first, Code::kFormat, "split.count 1");
  }
  SECTION("split.no beyond split.count") {
    folder.write(first, part(2, 2, {t[0], t[1]}).bytes());
    check(first, Code::kFormat, "split.no");
  }
  SECTION("65,535 parts") {
    folder.write("m-00001-of-65535.gguf", part(0, 65'535, {t[0]}).bytes());
    check("m-00001-of-65535.gguf", Code::kFormat, "split.count");
  }
  SECTION("split.count negative or a string") {
    RawGguf other = a;
    other.set_i32("split.count", -2);
    folder.write(first, other.bytes());
    check(first, Code::kFormat, "split.count");
    other.set_string("split.count", "../../../etc/passwd");
    folder.write(first, other.bytes());
    check(first, Code::kFormat, "split.count");
  }
  SECTION("split.no is missing") {
    RawGguf other = a;
    other.erase("split.no");
    folder.write(first, other.bytes());
    check(first, Code::kFormat, "split.no");
  }
  SECTION("the second part is damaged") {
    folder.write(second, b.bytes().substr(0, b.bytes().size() - 1));
    check(first, Code::kFormat, second.c_str());
  }
  SECTION("from memory there are no other parts") {
    check_refused(parse(a.bytes()), Code::kInvalidArgument);
  }
}

TEST_CASE("a file cut anywhere is refused") {
  const std::string bytes = small_gguf().bytes();
  for (size_t n = 0; n < bytes.size(); ++n) {
    const Status status = parse(bytes.substr(0, n));
    if (status.code() != Code::kFormat || status.message().empty()) {
      INFO("cut at " << n << ": " << status.message());
      CHECK(status.code() == Code::kFormat);
      CHECK_FALSE(status.message().empty());
    }
  }
  CHECK(parse(bytes).ok());
}

TEST_CASE("every length field enlarged, every byte inverted: an answer, never a crash") {
  const std::string bytes = small_gguf().bytes();
  const size_t n_header = small_gguf().header().size();
  int n_refused = 0;
  for (size_t i = 0; i < n_header; ++i) {
    std::string copy = bytes;
    copy[i] = static_cast<char>(~copy[i]);
    n_refused += parse(copy).ok() ? 0 : 1;
    if (i + 8 > n_header) continue;
    copy = bytes;
    copy.replace(i, 8, raw<uint64_t>(1ull << 40));
    n_refused += parse(copy).ok() ? 0 : 1;
  }
  CHECK(n_refused > static_cast<int>(n_header));  // most of 2 * n_header
}

TEST_CASE("many names take no quadratic time") {
  const auto timed = [](const RawGguf& f, Code expected) {
    const std::string bytes = f.bytes();
    const CpuTimer timer;
    CHECK(parse(bytes).code() == expected);
    // A few hundred milliseconds at most; sanitizers get their share.  Quadratic: minutes.
    CHECK(timer.seconds() < 4);
  };
  SECTION("200,000 different tensors") {
    RawGguf f;
    f.set_string("general.architecture", "deepseek2");
    for (int i = 0; i < 200'000; ++i) f.add_f32("tensor." + std::to_string(i), {1});
    timed(f, Code::kOk);
  }
  SECTION("200,000 tensors of one name") {
    RawGguf f;
    f.set_string("general.architecture", "deepseek2");
    for (int i = 0; i < 200'000; ++i) f.add_f32("tensor", {1});
    timed(f, Code::kFormat);
  }
  SECTION("a million tensors: more than are accepted") {
    RawGguf f;
    f.n_tensors = 1'000'000;
    f.add_f32("tensor", {10'000'000});
    timed(f, Code::kFormat);
  }
  SECTION("60,000 keys of one name") {
    RawGguf f;
    for (int i = 0; i < 60'000; ++i) f.keys.push_back({"key", raw<uint32_t>(4) + raw(1u)});
    timed(f, Code::kFormat);
  }
}
