// Safetensors files, shard indexes and folders made to break their reader: each differs from a good
// one in one place and is refused with its code.
#include <set>

#include "io_raw_files.h"
#include "lib/io/safetensors.h"

using namespace fathom;
using namespace fathom::io;
using namespace fathom::test;

namespace {

Status parse(const std::string& bytes) {
  return TensorFile::parse_safetensors(source_of(bytes)).status();
}

struct Case {
  const char* name;
  Code expected;
  const char* mentions;  // in the message
  RawSafetensors file;
};

void check(const char* name, Code expected, const char* mentions, const Status& status) {
  INFO("case: " << name);
  check_refused(status, expected);
  CHECK_THAT(std::string(status.message()), Catch::Contains(mentions));
}

// A file with one tensor "t" of `data` bytes.
RawSafetensors one(std::string_view dtype, std::string_view shape, std::string_view offsets,
                   int64_t data) {
  return {.json = R"({"t":{"dtype":)" + std::string(dtype) + R"(,"shape":)" + std::string(shape) +
                  R"(,"data_offsets":)" + std::string(offsets) + "}}",
          .n_data = data,
          .length = {}};
}

RawSafetensors with_json(std::string json, int64_t data = 0) {
  return {.json = std::move(json), .n_data = data, .length = {}};
}

RawSafetensors with_length(uint64_t length) {
  RawSafetensors file = small_safetensors();
  file.length = length;
  return file;
}

std::string two(std::string_view first, std::string_view second) {
  return R"({"a":{"dtype":"I8","shape":[4],"data_offsets":)" + std::string(first) +
         R"(},"b":{"dtype":"I8","shape":[4],"data_offsets":)" + std::string(second) + "}}";
}

}  // namespace

TEST_CASE("hostile safetensors: headers") {
  REQUIRE(parse(small_safetensors().bytes()).ok());
  using namespace std::string_literals;
  const std::string good = small_safetensors().json;
  const Case cases[] = {
      {"length 0", Code::kFormat, "length is 0", with_length(0)},
      {"length 1", Code::kFormat, "length is 1", with_length(1)},
      {"length 7", Code::kFormat, "JSON", with_length(7)},
      {"length one less", Code::kFormat, "JSON", with_length(good.size() - 1)},
      {"length one more", Code::kFormat, "JSON", with_length(good.size() + 1)},
      {"length more than the file", Code::kFormat, "length is", with_length(1 << 20)},
      {"length over 100 MB", Code::kFormat, "length is 100000001", with_length(100'000'001)},
      {"length 2^63", Code::kFormat, "length is", with_length(1ull << 63)},
      {"length 2^64-1", Code::kFormat, "length is", with_length(UINT64_MAX)},
      {"length 2^64-8, which wraps", Code::kFormat, "length is", with_length(UINT64_MAX - 7)},
      {"begins with a blank", Code::kFormat, "'{'", with_json(" " + good, 308)},
      {"begins with a byte order mark", Code::kFormat, "'{'",
       with_json("\xEF\xBB\xBF" + good, 308)},
      {"an array", Code::kFormat, "'{'", with_json("[]")},
      {"not JSON", Code::kFormat, "JSON", with_json("{}}")},
      {"data behind the JSON", Code::kFormat, "JSON", with_json("{} {}")},
      {"zeros behind the JSON", Code::kFormat, "zero byte", with_json("{}\0\0\0"s)},
      {"UTF-16", Code::kFormat, "", with_json("{\0}\0"s)},
      {"a comment", Code::kFormat, "JSON", with_json("{/**/}")},
      {"nested too deep", Code::kFormat, "deeper",
       with_json("{\"t\":" + std::string(100'000, '['))},
      {"a number of a megabyte", Code::kFormat, "",
       with_json("{\"t\":" + std::string(1 << 20, '9') + "}")},
      {"a name twice", Code::kFormat, "twice",
       with_json(R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},)"
                 R"("a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}})",
                 1)},
      {"dtype twice", Code::kFormat, "twice",
       with_json(R"({"a":{"dtype":"I8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1)},
      {"a name with a zero byte", Code::kFormat, "control characters",
       with_json(R"({"a\u0000b":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1)},
      {"an empty name", Code::kFormat, "empty",
       with_json(R"({"":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1)},
      {"a name of 65,536 bytes", Code::kFormat, "1023",
       with_json("{\"" + std::string(65'536, 'n') +
                     R"(":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}})",
                 1)},
      {"a name in bad UTF-8", Code::kFormat, "JSON", with_json("{\"\xFF\":1}")},
      {"a lone surrogate", Code::kFormat, "JSON", with_json(R"({"\ud800":1})")},
      {"metadata is no object", Code::kFormat, "__metadata__", with_json(R"({"__metadata__":[]})")},
      {"metadata has a number", Code::kFormat, "__metadata__",
       with_json(R"({"__metadata__":{"a":1}})")},
      {"a tensor is no object", Code::kFormat, "tensor t", with_json(R"({"t":[]})")},
      {"a tensor is null", Code::kFormat, "tensor t", with_json(R"({"t":null})")},
      {"a tensor is empty", Code::kFormat, "dtype", with_json(R"({"t":{}})")},
  };
  for (const Case& c : cases) check(c.name, c.expected, c.mentions, parse(c.file.bytes()));
  for (size_t n = 0; n < 8; ++n) check_refused(parse(std::string(n, '\1')), Code::kFormat);
}

TEST_CASE("hostile safetensors: tensors") {
  const Case cases[] = {
      {"dtype missing", Code::kFormat, "dtype",
       with_json(R"({"t":{"shape":[1],"data_offsets":[0,1]}})", 1)},
      {"dtype a number", Code::kFormat, "dtype", one("8", "[4]", "[0,4]", 4)},
      {"dtype unknown", Code::kUnsupported, "F128", one("\"F128\"", "[1]", "[0,16]", 16)},
      {"dtype in lower case", Code::kUnsupported, "f32", one("\"f32\"", "[1]", "[0,4]", 4)},
      {"dtype of half bytes", Code::kUnsupported, "F4", one("\"F4\"", "[3]", "[0,2]", 2)},
      {"dtype E5M2", Code::kUnsupported, "F8_E5M2", one("\"F8_E5M2\"", "[1]", "[0,1]", 1)},
      {"dtype of 10 MB", Code::kUnsupported, "dtype",
       one("\"" + std::string(10 << 20, 'D') + "\"", "[1]", "[0,1]", 1)},
      {"shape missing", Code::kFormat, "shape",
       with_json(R"({"t":{"dtype":"I8","data_offsets":[0,1]}})", 1)},
      {"shape a number", Code::kFormat, "shape", one("\"I8\"", "4", "[0,4]", 4)},
      {"dimension negative", Code::kFormat, "dimension 0 is -4", one("\"I8\"", "[-4]", "[0,4]", 4)},
      {"two dimensions negative", Code::kFormat, "dimension 0 is -2",
       one("\"I8\"", "[-2,-2]", "[0,4]", 4)},
      {"dimension a fraction", Code::kFormat, "dimension 0", one("\"I8\"", "[4.0]", "[0,4]", 4)},
      {"dimension a string", Code::kFormat, "dimension 0", one("\"I8\"", "[\"4\"]", "[0,4]", 4)},
      {"dimension 2^63", Code::kFormat, "dimension 0",
       one("\"I8\"", "[9223372036854775808]", "[0,4]", 4)},
      {"dimension 2^64", Code::kFormat, "dimension 0",
       one("\"I8\"", "[18446744073709551616]", "[0,4]", 4)},
      {"dimension 0", Code::kUnsupported, "empty", one("\"I8\"", "[0]", "[0,0]", 0)},
      {"five dimensions", Code::kUnsupported, "5 dimensions",
       one("\"I8\"", "[1,1,1,1,1]", "[0,1]", 1)},
      {"a thousand dimensions", Code::kUnsupported, "dimensions",
       one(
           "\"I8\"",
           [] {
             std::string shape = "[1";
             for (int i = 1; i < 1000; ++i) shape += ",1";
             return shape + "]";
           }(),
           "[0,1]", 1)},
      {"product wraps to 16 bytes", Code::kFormat, "2^63",
       one("\"F32\"", "[4194305,4194305,211106198978564]", "[0,16]", 16)},
      {"product wraps to 0", Code::kFormat, "2^63",
       one("\"F32\"", "[4294967296,4294967296]", "[0,0]", 0)},
      {"bytes wrap", Code::kFormat, "2^63", one("\"F64\"", "[2305843009213693952]", "[0,0]", 0)},
      {"size does not fit the shape", Code::kFormat, "need 8", one("\"F32\"", "[2]", "[0,4]", 4)},
      {"offsets missing", Code::kFormat, "data_offsets",
       with_json(R"({"t":{"dtype":"I8","shape":[1]}})", 1)},
      {"offsets a number", Code::kFormat, "data_offsets", one("\"I8\"", "[4]", "4", 4)},
      {"one offset", Code::kFormat, "data_offsets", one("\"I8\"", "[4]", "[4]", 4)},
      {"three offsets", Code::kFormat, "data_offsets", one("\"I8\"", "[4]", "[0,4,4]", 4)},
      {"offsets reversed", Code::kFormat, "do not fit", one("\"I8\"", "[4]", "[4,0]", 4)},
      {"offset negative", Code::kFormat, "-1", one("\"I8\"", "[4]", "[-1,3]", 4)},
      {"offset a fraction", Code::kFormat, "integer", one("\"I8\"", "[4]", "[0.0,4]", 4)},
      {"offset 2^53+1 as a fraction", Code::kFormat, "integer",
       one("\"I8\"", "[4]", "[0,9007199254740993.0]", 4)},
      {"offset 2^53+1", Code::kFormat, "9007199254740989",
       one("\"I8\"", "[4]", "[9007199254740989,9007199254740993]", 4)},
      {"offset 2^63", Code::kFormat, "integer", one("\"I8\"", "[4]", "[0,9223372036854775808]", 4)},
      {"offset 2^64", Code::kFormat, "integer",
       one("\"I8\"", "[4]", "[0,18446744073709551616]", 4)},
      {"offset 1e999", Code::kFormat, "JSON", one("\"I8\"", "[4]", "[0,1e999]", 4)},
      {"past the end", Code::kFormat, "in [0, 3]", one("\"I8\"", "[4]", "[0,4]", 3)},
      {"data left over", Code::kFormat, "the file has", one("\"I8\"", "[4]", "[0,4]", 5)},
      {"data without tensors", Code::kFormat, "the file has", with_json("{}", 5)},
      {"a hole at the front", Code::kFormat, "hole", one("\"I8\"", "[4]", "[1,5]", 5)},
      {"a hole between", Code::kFormat, "hole", with_json(two("[0,4]", "[5,9]"), 9)},
      {"overlap", Code::kFormat, "although", with_json(two("[0,4]", "[3,7]"), 7)},
      {"the same place", Code::kFormat, "although", with_json(two("[0,4]", "[0,4]"), 4)},
  };
  for (const Case& c : cases) check(c.name, c.expected, c.mentions, parse(c.file.bytes()));
  CHECK(parse(with_json(two("[4,8]", "[0,4]"), 8).bytes()).ok());  // any order
}

TEST_CASE("hostile safetensors: shard indexes") {
  const auto index = [](std::string_view file) {
    return R"({"weight_map":{"t":)" + std::string(file) + "}}";
  };
  REQUIRE(parse_shard_index(index("\"a.safetensors\"")).ok());
  const struct {
    const char *name, *mentions;
    std::string text;
  } cases[] = {
      {"empty", "empty", ""},
      {"not JSON", "JSON", "weight_map"},
      {"an array", "weight_map", "[]"},
      {"no map", "weight_map", R"({"metadata":{}})"},
      {"map is an array", "weight_map", R"({"weight_map":[]})"},
      {"map is empty", "weight_map", R"({"weight_map":{}})"},
      {"file is a number", "plain name", index("1")},
      {"file is null", "plain name", index("null")},
      {"file is empty", "plain name", index("\"\"")},
      {"file in the folder above", "../../etc/passwd", index("\"../../etc/passwd\"")},
      {"file above with the right ending", "plain name", index("\"../a.safetensors\"")},
      {"absolute file", "plain name", index("\"/etc/a.safetensors\"")},
      {"file in a folder", "plain name", index("\"b/a.safetensors\"")},
      {"backslashes", "plain name", index(R"("..\\a.safetensors")")},
      {"a drive", "plain name", index("\"c:a.safetensors\"")},
      {"a hidden file", "plain name", index("\".safetensors\"")},
      {"a zero byte", "plain name", index(R"("a\u0000.safetensors")")},
      {"a tensor's name with an escape sequence", "control", R"({"weight_map":{"\u001b[2J":1}})"},
      {"a tensor's name of 1,024 bytes", "1023",
       R"({"weight_map":{")" + std::string(1024, 't') + R"(":"a.safetensors"}})"},
      {"another ending", "plain name", index("\"pytorch_model.bin\"")},
      {"a file name of 300 bytes", "plain name",
       index("\"" + std::string(300, 'a') + ".safetensors\"")},
      {"a tensor twice", "twice", R"({"weight_map":{"t":"a.safetensors","t":"b.safetensors"}})"},
      {"two maps", "twice",
       R"({"weight_map":{"t":"a.safetensors"},"weight_map":{"t":"a.safetensors"}})"},
      {"nested too deep", "deeper", R"({"metadata":)" + std::string(100'000, '[')},
  };
  for (const auto& c : cases)
    check(c.name, Code::kFormat, c.mentions, parse_shard_index(c.text).status());

  std::string many = R"({"weight_map":{)";
  for (int i = 0; i < 1025; ++i)
    many += (i ? ",\"" : "\"") + std::to_string(i) + "\":\"" + std::to_string(i) + ".safetensors\"";
  check("1,025 files", Code::kFormat, "1025 files", parse_shard_index(many + "}}").status());

  std::string million = R"({"weight_map":{)";
  for (int i = 0; i < 1'000'000; ++i)
    million += (i ? ",\"" : "\"") + std::to_string(i) + R"(":"a.safetensors")";
  const CpuTimer timer;
  check("a million tensors", Code::kFormat, "more than",
        parse_shard_index(million + "}}").status());
  CHECK(timer.seconds() < 4);
}

TEST_CASE("hostile safetensors: folders") {
  const TemporaryFolder folder;
  const RawSafetensors a = {
      .json = R"({"model.embed_tokens.weight":{"dtype":"I8","shape":[6,8],"data_offsets":[0,48]}})",
      .n_data = 48,
      .length = {}};
  const RawSafetensors b = {
      .json = R"({"lm_head.weight":{"dtype":"I8","shape":[6,8],"data_offsets":[0,48]}})",
      .n_data = 48,
      .length = {}};
  const std::string index = R"({"weight_map":{"model.embed_tokens.weight":"a.safetensors",)"
                            R"("lm_head.weight":"b.safetensors"}})";
  const std::string index_name = "model.safetensors.index.json";
  folder.write("config.json", kSmallConfigJson);
  folder.write("a.safetensors", a.bytes());
  folder.write("b.safetensors", b.bytes());
  folder.write(index_name, index);
  const auto open = [&] { return TensorFile::open(folder.path()).status(); };
  REQUIRE(open().ok());

  SECTION("a shard is missing") {
    std::filesystem::remove(folder / "b.safetensors");
    check("", Code::kNotFound, "b.safetensors", open());
  }
  SECTION("a shard is a loop of links") {
    std::filesystem::remove(folder / "b.safetensors");
    std::filesystem::create_symlink("b.safetensors", folder / "b.safetensors");
    check("", Code::kIo, "b.safetensors", open());
  }
  SECTION("a shard is damaged") {
    folder.write("b.safetensors", b.bytes().substr(0, 60));
    check("", Code::kFormat, "b.safetensors", open());
  }
  SECTION("a tensor is listed in the wrong shard") {
    folder.write(index_name, R"({"weight_map":{"model.embed_tokens.weight":"b.safetensors",)"
                             R"("lm_head.weight":"a.safetensors"}})");
    check("", Code::kFormat, "the index says in", open());
  }
  SECTION("a tensor is in both shards") {
    folder.write("b.safetensors", a.bytes());
    check("", Code::kFormat, "the index says in", open());
  }
  SECTION("a listed tensor is nowhere") {
    folder.write(index_name, replaced(index, "lm_head.weight", "lm_head.bias"));
    check("", Code::kFormat, "lm_head.bias", open());
  }
  SECTION("a shard outside") {
    folder.write(index_name, replaced(index, "\"b.safetensors\"", "\"../b.safetensors\""));
    check("", Code::kFormat, "plain name", open());
  }
  SECTION("no embeddings") {
    folder.write(index_name, R"({"weight_map":{"lm_head.weight":"b.safetensors"}})");
    check("", Code::kFormat, "model.embed_tokens.weight", open());
  }
  SECTION("embeddings of another size than config.json says") {
    folder.write("config.json", replaced(std::string(kSmallConfigJson), R"("vocab_size": 6)",
                                         R"("vocab_size": 7)"));
    check("", Code::kFormat, "must have 7 of 8", open());
    folder.write("config.json", replaced(std::string(kSmallConfigJson), R"("hidden_size": 8)",
                                         R"("hidden_size": 16)"));
    check("", Code::kFormat, "must have 6 of 16", open());
  }
  SECTION("config.json is a directory") {
    std::filesystem::remove(folder / "config.json");
    std::filesystem::create_directory(folder / "config.json");
    check("", Code::kFormat, "a directory", open());
  }
  SECTION("config.json is damaged") {
    folder.write("config.json", kSmallConfigJson.substr(0, 100));
    check("", Code::kFormat, "config.json", open());
  }
  SECTION("config.json is larger than 16 MB") {
    folder.write("config.json", std::string((16 << 20) + 1, ' '));
    check("", Code::kFormat, "config.json", open());
  }
  SECTION("model.safetensors is damaged, the shards would do") {
    folder.write("model.safetensors", "damaged!");
    check("", Code::kFormat, "model.safetensors", open());
  }
}

TEST_CASE("a file cut anywhere is refused") {
  const std::string bytes = small_safetensors().bytes();
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

TEST_CASE("every byte of the header inverted: an answer, never a crash") {
  const std::string bytes = small_safetensors().bytes();
  int n_refused = 0;
  for (size_t i = 0; i < small_safetensors().json.size() + 8; ++i)
    for (const char flip : {'\xFF', '\x01', '\x10'}) {
      std::string copy = bytes;
      copy[i] = static_cast<char>(copy[i] ^ flip);
      n_refused += parse(copy).ok() ? 0 : 1;
    }
  CHECK(n_refused > 600);
}

TEST_CASE("many tensors take no quadratic time") {
  const auto timed = [](int n, bool same_name, Code expected) {
    std::string json = "{";
    for (int i = 0; i < n; ++i) {
      const std::string at = std::to_string(i), end = std::to_string(i + 1);
      json += (i ? ",\"t" : "\"t") + (same_name ? std::string() : at) +
              R"(":{"dtype":"I8","shape":[1],"data_offsets":[)" + at + "," + end + "]}";
    }
    const std::string bytes = RawSafetensors{.json = json + "}", .n_data = n, .length = {}}.bytes();
    const CpuTimer timer;
    CHECK(parse(bytes).code() == expected);
    // Well under a second; sanitizers get their share.  Quadratic: minutes.
    CHECK(timer.seconds() < 8);
  };
  timed(100'000, false, Code::kOk);
  timed(100'000, true, Code::kFormat);
  timed(1'000'000, false, Code::kFormat);  // more than are accepted
}
