// Config: every key through text, JSON and back; refusals that name key, value and range.
#include <catch2/catch.hpp>
#include <clocale>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "fathom/config.hpp"

using namespace fathom;
using Catch::Contains;

namespace {

std::string message(const Status& status) {
  CHECK(status.code() == Code::kConfig);
  return std::string(status.message());
}

std::string text(const Config& config, std::string_view key) {
  Result<std::string> value = config.get(key);
  REQUIRE(value.ok());
  return *value;
}

std::string refusal(std::string_view key, std::string_view value) {
  Config config;
  const std::string before = config.to_json();
  const Status status = config.set(key, value);
  INFO(key << " = " << value);
  CHECK(config.to_json() == before);
  return message(status);
}

}  // namespace

TEST_CASE("defaults are those of the fields, and valid") {
  const Config config;
  CHECK(config.validate().ok());
  CHECK(text(config, "devices") == "cpu");
  CHECK(text(config, "devices.missing") == "refuse");
  CHECK(text(config, "cuda.plugin") == "auto");
  CHECK(text(config, "budget.cpu") == "auto");
  CHECK(text(config, "context.max") == "auto");
  CHECK(text(config, "context.reserve") == "0");
  CHECK(text(config, "kv.type") == "auto");
  CHECK(text(config, "kv.page_tokens") == "auto");
  CHECK(text(config, "kv.tiers") == "device");
  CHECK(text(config, "kv.spill_folder") == "/var/tmp");
  CHECK(text(config, "kv.ladder") == "chunk,spill,file");
  CHECK(text(config, "kv.ladder_type") == "q8_0");
  CHECK(text(config, "prefill.chunk") == "auto");
  CHECK(text(config, "attention.form") == "auto");
  CHECK(text(config, "sessions.max") == "1");
  CHECK(text(config, "threads") == "0");
  CHECK(text(config, "numa") == "auto");
  CHECK(text(config, "isa") == "auto");
  CHECK(text(config, "numerics") == "fast");
}

TEST_CASE("set reaches the field, auto clears it") {
  Config config;
  REQUIRE(config.set("devices", "cpu:0,cpu:1").ok());
  CHECK(config.devices == "cpu:0,cpu:1");
  REQUIRE(config.set("devices.missing", "skip").ok());
  CHECK(config.devices_missing == MissingDevice::kSkip);
  REQUIRE(config.set("cuda.plugin", "/opt/fathom/libfathom_cuda.so").ok());
  CHECK(config.cuda_plugin == "/opt/fathom/libfathom_cuda.so");
  REQUIRE(config.set("budget.cpu:1", "1.5G").ok());
  CHECK(config.budget.at("cpu:1") == int64_t{3} << 29);
  REQUIRE(config.set("budget.host", "2G").ok());
  REQUIRE(config.set("context.max", "163840").ok());
  CHECK(config.context_max == 163840);
  REQUIRE(config.set("context.reserve", "64").ok());
  CHECK(config.context_reserve == 64);
  REQUIRE(config.set("kv.type", "fp8").ok());
  CHECK(config.kv_type == KvType::kF8);
  REQUIRE(config.set("kv.page_tokens", "128").ok());
  CHECK(config.kv_page_tokens == 128);
  REQUIRE(config.set("kv.tiers", "device,file").ok());
  CHECK(config.kv_tiers == std::vector{KvTier::kDevice, KvTier::kFile});
  REQUIRE(config.set("kv.spill_folder", "/scratch/fathom").ok());
  CHECK(config.kv_spill_folder == "/scratch/fathom");
  REQUIRE(config.set("kv.ladder", "file,requantise").ok());
  CHECK(config.kv_ladder == std::vector{LadderStep::kFile, LadderStep::kRequantise});
  REQUIRE(config.set("kv.ladder_type", "q4_0").ok());
  CHECK(config.kv_ladder_type == KvType::kQ4_0);
  REQUIRE(config.set("prefill.chunk", "8192").ok());
  CHECK(config.prefill_chunk == 8192);
  REQUIRE(config.set("attention.form", "expanded").ok());
  CHECK(config.attention_form == AttentionForm::kExpanded);
  REQUIRE(config.set("sessions.max", "4096").ok());
  CHECK(config.sessions_max == 4096);
  REQUIRE(config.set("threads", "2").ok());
  CHECK(config.threads == 2);
  REQUIRE(config.set("isa", "avx2").ok());
  CHECK(config.isa == "avx2");
  REQUIRE(config.set("numerics", "exact").ok());
  CHECK(config.numerics == Numerics::kExact);
  CHECK(config.validate().ok());

  REQUIRE(config.set("kv.type", "auto").ok());
  CHECK(!config.kv_type);
  REQUIRE(config.set("context.max", "auto").ok());
  CHECK(!config.context_max);
  REQUIRE(config.set("budget.cpu:1", "auto").ok());
  CHECK(config.budget.count("cpu:1") == 0);
}

TEST_CASE("a refused value is named with its key and range, and changes nothing") {
  CHECK(refusal("context.max", "0") ==
        "context.max = \"0\": must be auto or an integer in [1, 2147483647]");
  CHECK_THAT(refusal("context.max", "2147483648"), Contains("[1, 2147483647]"));
  CHECK_THAT(refusal("context.max", "18446744073709551616"), Contains("18446744073709551616"));
  CHECK_THAT(refusal("context.reserve", "-1"), Contains("\"-1\""));
  CHECK(refusal("devices.missing", "ignore") ==
        "devices.missing = \"ignore\": must be refuse, skip");
  CHECK(refusal("cuda.plugin", "libfathom_cuda.so") ==
        "cuda.plugin = \"libfathom_cuda.so\": must be auto or an absolute path of at most 1024 "
        "bytes");
  CHECK(refusal("experts.cache", "lots").ends_with("at most 2^63 - 1, or auto"));
  CHECK(refusal("kv.type", "f64") ==
        "kv.type = \"f64\": must be auto, f32, bf16, f16, fp8, q8_0, q4_0");
  for (const char* v : {"48", "8", "8192", "64.0", "0x40"})
    CHECK_THAT(refusal("kv.page_tokens", v), Contains("a power of two in [16, 4096]"));
  CHECK(refusal("kv.ladder", "chunk,swap") ==
        "kv.ladder = \"chunk,swap\": must be none, or some of chunk, spill, requantise, file, "
        "separated by commas");
  CHECK_THAT(refusal("kv.ladder", "file,file"), Contains("file is named twice"));
  CHECK_THAT(refusal("kv.ladder", ""), Contains("must be none"));
  CHECK_THAT(refusal("kv.ladder", "chunk,"), Contains("must be none"));
  for (const char* v : {"", "tmp", "./tmp", "/tmp/\n"})
    CHECK_THAT(refusal("kv.spill_folder", v), Contains("an absolute path"));
  for (const char* v : {"0", "8193", "1e3", "512 ", " 512", "+512", "", "1,5", "512K"})
    CHECK_THAT(refusal("prefill.chunk", v), Contains("an integer in [1, 8192]"));
  CHECK_THAT(refusal("sessions.max", "auto"), Contains("an integer in [1, 4096]"));
  CHECK_THAT(refusal("threads", "1025"), Contains("[0, 1024]"));
  CHECK_THAT(refusal("numa", "columns"), Contains("auto, off, rows"));
  CHECK_THAT(refusal("isa", "sse9"), Contains("auto, scalar, avx2, avx512, amx"));
  CHECK_THAT(refusal("numerics", "Exact"), Contains("fast, exact"));
  CHECK_THAT(refusal("devices", ""), Contains("\"\" is no name"));
  CHECK_THAT(refusal("devices", "cpu,,cuda:0"), Contains("\"\" is no name"));
  CHECK_THAT(refusal("devices", "cpu,"), Contains("\"\" is no name"));
  CHECK_THAT(refusal("devices", "cpu:0,cpu:0"), Contains("cpu:0 is named twice"));
  CHECK_THAT(refusal("devices", "cpu:x"), Contains("\"cpu:x\""));
  CHECK_THAT(refusal("budget.cpu", "-1"), Contains("budget.cpu"));
  CHECK_THAT(refusal("budget.cpu", "2048T"), Contains("[0, 1125899906842624] bytes"));
  CHECK_THAT(refusal("budget.cpu", "24GB"), Contains("\"24GB\""));
  CHECK_THAT(refusal("budget.", "1G"), Contains("\"\" is no name"));
  CHECK_THAT(refusal("budget.cpu,cuda:0", "1G"), Contains("one device"));
  // What could harm a terminal is not repeated, and long values are cut.
  const std::string hostile = "\x1b[31m\xff" + std::string(10 << 20, 'x');
  const std::string told = refusal("kv.type", hostile);
  CHECK_THAT(told, Contains("\"?[31m?xxx") && Contains("xxx...\""));
  CHECK(told.size() < 300);
}

TEST_CASE("an unknown key gets the nearest known one") {
  CHECK(refusal("kv.typ", "q8_0") == "unknown key \"kv.typ\"; the nearest is kv.type");
  CHECK_THAT(refusal("context_max", "1"), Contains("nearest is context.max"));
  CHECK_THAT(refusal("prefil.chunks", "1"), Contains("nearest is prefill.chunk"));
  CHECK_THAT(refusal("thread", "1"), Contains("nearest is threads"));
  CHECK_THAT(refusal("budgetcpu", "1"), Contains("nearest is budget.<device>"));
  CHECK_THAT(refusal("KV.TYPE", "f32"), Contains("nearest is"));
  CHECK_THAT(refusal("", "1"), Contains("unknown key \"\""));
  CHECK(refusal(std::string(1 << 20, 'k'), "1").size() < 200);
  const Config config;
  CHECK(config.get("kv.typ").status().code() == Code::kConfig);
  CHECK(config.get("kv.typ").status().key() == "kv.typ");
}

TEST_CASE("bytes: powers of 1024, whole or with a fraction") {
  const auto bytes = [](std::string_view t) {
    const Result<int64_t> r = parse_bytes(t);
    return r.ok() ? *r : int64_t{-1};
  };
  CHECK(bytes("0") == 0);
  CHECK(bytes("1073741824") == 1073741824);
  CHECK(bytes("3K") == 3072);
  CHECK(bytes("512M") == int64_t{512} << 20);
  CHECK(bytes("24G") == int64_t{24} << 30);
  CHECK(bytes("24g") == int64_t{24} << 30);
  CHECK(bytes("24GiB") == int64_t{24} << 30);
  CHECK(bytes("2T") == int64_t{2} << 40);
  CHECK(bytes("1.5G") == int64_t{3} << 29);
  CHECK(bytes("0.1K") == 102);
  CHECK(bytes("9223372036854775807") == INT64_MAX);
  CHECK(bytes("8388607T") == int64_t{8388607} << 40);
  for (const char* t : {"",
                        "G",
                        "-1",
                        "-1G",
                        "1.5",
                        "1,5G",
                        "24GB",
                        "24B",
                        "24iB",
                        "iB",
                        "1e3G",
                        "0x10",
                        " 1",
                        "1 G",
                        "1 ",
                        "nan",
                        "infG",
                        "nanK",
                        "9223372036854775808",
                        "8388608T",
                        "99999999999999999999999G",
                        ".",
                        ".K",
                        "1GG",
                        "auto"}) {
    INFO(t);
    const Result<int64_t> r = parse_bytes(t);
    REQUIRE(!r.ok());
    CHECK_THAT(message(r.status()), Contains("powers of 1024"));
  }
}

TEST_CASE("numbers do not depend on the locale") {
  const std::string before = std::setlocale(LC_ALL, nullptr);
  for (const char* name : {"de_DE.UTF-8", "fr_FR.UTF-8", "C.UTF-8"}) {
    if (std::setlocale(LC_ALL, name) == nullptr) continue;
    CHECK(*parse_bytes("1.5K") == 1536);
    CHECK(!parse_bytes("1,5K").ok());
    Config config;
    CHECK(config.merge_json(R"({"context.max": 1500000})").ok());
    CHECK(text(config, "context.max") == "1500000");
  }
  std::setlocale(LC_ALL, before.c_str());
}

TEST_CASE("JSON: flat, nested, numbers, text, lists") {
  Config config;
  REQUIRE(config
              .merge_json(R"({
    "devices": ["cpu:0", "cpu:1"],
    "budget": {"cpu:0": "1G", "cpu:1": 1048576},
    "budget.host": "2G",
    "kv": {"type": "q8_0", "page_tokens": 64},
    "context.max": 4096, "prefill.chunk": "128", "numerics": "exact", "context": {"reserve": -0}})")
              .ok());
  CHECK(config.devices == "cpu:0,cpu:1");
  CHECK(config.budget == std::map<std::string, int64_t>{
                             {"cpu:0", 1 << 30}, {"cpu:1", 1 << 20}, {"host", int64_t{2} << 30}});
  CHECK(config.kv_type == KvType::kQ8_0);
  CHECK(config.kv_page_tokens == 64);
  CHECK(config.context_max == 4096);
  CHECK(config.prefill_chunk == 128);
  CHECK(config.numerics == Numerics::kExact);
  REQUIRE(config.merge_json("{}").ok());
  CHECK(config.context_max == 4096);
  REQUIRE(config.merge_json(R"({"kv.type": "auto"})").ok());
  CHECK(!config.kv_type);
}

TEST_CASE("malformed or unfit JSON is refused whole, with the place") {
  struct Case {
    std::string json;
    std::string says;
    int64_t offset;  // -1: not told
  };
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "{\"a\":";
  const std::vector<Case> cases = {
      {"", "empty", -1},
      {"   ", "", -1},
      {"[1]", "a configuration is a JSON object", -1},
      {"null", "a configuration is a JSON object", -1},
      {R"({"threads": 1)", "byte 14", 13},
      {R"({"threads": 1,})", "byte 15", 15},
      {R"({"threads": 1} x)", "byte 16", 16},
      {R"({"threads": 1 /* one */})", "byte 15", 15},
      {R"({'threads': 1})", "byte 2", 2},
      {R"({"threads": NaN})", "byte 13", 13},
      {R"({"threads": Infinity})", "byte 13", 13},
      {R"({"threads": 1e999})", "", -1},
      {R"({"threads": 01})", "byte", -1},
      {R"({"threads": 1.5})", "threads = \"1.5\": must be an integer in [0, 1024]", 15},
      {R"({"threads": -1})", "threads = \"-1\"", 14},
      {R"({"threads": 18446744073709551615})", "threads = \"184467440737095516", 32},
      {R"({"threads": 18446744073709551616})", "threads = ", 32},
      {R"({"threads": true})", "threads = \"true\"", 16},
      {R"({"threads": null})", "null is no value", 16},
      {R"({"threads": []})", "threads", -1},
      {R"({"devices": [1]})", "an array is no value", -1},
      {R"({"devices": []})", "\"\" is no name", -1},
      {R"({"threads": 1, "threads": 2})", "appears twice", -1},
      {R"({"kv.type": "f32", "kv": {"type": "f32"}})", "key \"kv.type\" appears twice", -1},
      {R"({"threads": 3, "kv": {"tipe": "f32"}})", "nearest is kv.type", 34},
      {R"({"kv": "q8_0"})", "unknown key \"kv\"", -1},
      {R"({"threads": "1)" + std::string("\xff\""), "byte", -1},
      {std::string("{\"thr\0eads\": 1}", 15), "byte", -1},
      {std::string("\xff\xfe{\0}\0", 6), "byte", -1},
      {deep, "nested deeper than 16", -1},
      {"{\"kv.type\": \"" + std::string(10 << 20, 'x') + "\"}", "at most 1048576", -1},
      {"{\"kv.type\": \"" + std::string(1 << 19, 'x') + "\"}", "xxx...", -1},
  };
  for (const Case& c : cases) {
    INFO(c.json.substr(0, 80));
    Config config;
    REQUIRE(config.set("threads", "7").ok());
    const std::string before = config.to_json();
    const Status status = config.merge_json(c.json);
    REQUIRE(!status.ok());
    CHECK_THAT(message(status), Contains(c.says));
    CHECK(status.message().size() < 500);
    if (c.offset >= 0) {  // the parser may have looked at the byte behind a number
      CHECK(static_cast<int64_t>(status.offset()) >= c.offset);
      CHECK(static_cast<int64_t>(status.offset()) <= c.offset + 1);
    }
    CHECK(config.to_json() == before);
  }
  // The first keys are fine, the last is not: none is taken.
  Config config;
  CHECK(!config.merge_json(R"({"threads": 2, "kv.type": "f32", "isa": "x"})").ok());
  CHECK(config.threads == 0);
  CHECK(!config.kv_type);
}

TEST_CASE("conflicts name both keys") {
  Config config;
  REQUIRE(config.merge_json(R"({"context.max": 100, "context.reserve": 101})").ok());
  CHECK(message(config.validate()) == "context.reserve = 101 is more than context.max = 100");
  config.context_reserve = 100;
  CHECK(config.validate().ok());
  config.prefill_chunk = 512;  // a chunk longer than the text is no conflict
  CHECK(config.validate().ok());

  REQUIRE(config.set("budget.cuda:0", "1G").ok());
  CHECK_THAT(message(config.validate()),
             Contains("budget.cuda:0") && Contains("devices = \"cpu\""));
  REQUIRE(config.set("devices", "cpu,cuda:0").ok());
  CHECK(config.validate().ok());
  REQUIRE(config.merge_json(R"({"numerics": "exact", "kv.type": "q4_0"})").ok());
  CHECK(config.validate().ok());
}

TEST_CASE("validate checks fields that were assigned directly") {
  const auto complaint = [](auto change) {
    Config config;
    change(config);
    return message(config.validate());
  };
  CHECK_THAT(complaint([](Config& c) { c.prefill_chunk = 0; }), Contains("prefill.chunk = \"0\""));
  CHECK_THAT(complaint([](Config& c) { c.kv_page_tokens = 65; }),
             Contains("kv.page_tokens = \"65\""));
  CHECK_THAT(complaint([](Config& c) { c.context_max = -5; }), Contains("context.max = \"-5\""));
  CHECK_THAT(complaint([](Config& c) { c.threads = 5000; }), Contains("threads"));
  CHECK_THAT(complaint([](Config& c) { c.isa = "z80"; }), Contains("isa = \"z80\""));
  CHECK_THAT(complaint([](Config& c) { c.devices = "cpu, gpu"; }), Contains("devices"));
  CHECK_THAT(complaint([](Config& c) { c.kv_type = static_cast<KvType>(77); }),
             Contains("kv.type"));
  CHECK_THAT(complaint([](Config& c) { c.numerics = static_cast<Numerics>(9); }),
             Contains("numerics"));
  CHECK_THAT(complaint([](Config& c) { c.budget["cpu"] = -1; }), Contains("budget.cpu"));
  CHECK_THAT(complaint([](Config& c) { c.budget["no such"] = 1; }), Contains("no such"));
}

TEST_CASE("to_json is valid JSON with every key, and merges back to the same") {
  Config config;
  REQUIRE(config
              .merge_json(R"({"devices": "cpu:0,cpu:1", "budget.cpu:1": "3G", "kv.type": "fp8",
                "context.max": 9000, "numerics": "exact", "budget.host": 5})")
              .ok());
  const nlohmann::json json = nlohmann::json::parse(config.to_json());
  CHECK(json.at("context.max") == 9000);
  CHECK(json.at("budget.cpu:0") == "auto");
  CHECK(json.at("budget.cpu:1") == int64_t{3} << 30);
  CHECK(json.at("budget.host") == 5);
  CHECK(json.at("kv.type") == "fp8");
  Config copy;
  REQUIRE(copy.merge_json(config.to_json()).ok());
  CHECK(copy.to_json() == config.to_json());
  for (const auto& [key, value] : json.items()) CHECK(config.get(key).ok());
}

TEST_CASE("the schema is complete: every key can be set to its default and to its bounds") {
  const nlohmann::json schema = nlohmann::json::parse(Config::schema_json());
  REQUIRE(schema.is_array());
  const nlohmann::json defaults = nlohmann::json::parse(Config().to_json());
  CHECK(schema.size() == defaults.size());
  for (const nlohmann::json& row : schema) {
    std::string key = row.at("key");
    INFO(key);
    for (const char* field : {"type", "range", "memory", "text", "default"})
      CHECK(!row.at(field).get<std::string>().empty());
    CHECK(row.contains("unit"));
    if (key.ends_with("<device>")) key = key.substr(0, key.find('<')) + "cpu";
    CHECK(defaults.contains(key));
    Config config;
    const auto takes = [&](const std::string& value) { return config.set(key, value).ok(); };
    CHECK(takes(row.at("default")));
    CHECK(config.to_json() == Config().to_json());
    if (row.contains("min")) {
      const int64_t min = row.at("min"), max = row.at("max");
      CHECK(takes(std::to_string(min)));
      CHECK(takes(std::to_string(max)));
      CHECK(text(config, key) == std::to_string(max));
      CHECK(!takes(std::to_string(max + 1)));
      CHECK(!takes(std::to_string(min - 1)));
    }
    if (row.contains("choices"))
      for (const std::string choice : row.at("choices")) {
        CHECK(takes(choice));
        CHECK(text(config, key) == choice);
      }
    CHECK(!takes("nonsense?"));
  }
}

TEST_CASE("tiers begin with the device and go down; a ladder may be none") {
  Config config;
  for (const char* tiers : {"none", "host", "file", "device,file,host", "host,device"}) {
    REQUIRE(config.set("kv.tiers", tiers).ok());
    INFO(tiers);
    CHECK_THAT(message(config.validate()), Contains("it begins with device"));
  }
  REQUIRE(config.set("kv.tiers", "device,host,file").ok());
  CHECK(config.validate().ok());
  REQUIRE(config.set("kv.ladder", "none").ok());
  CHECK(config.kv_ladder.empty());
  CHECK(text(config, "kv.ladder") == "none");
  CHECK(config.validate().ok());
  REQUIRE(config.merge_json(R"({"kv": {"ladder": ["requantise", "file"]}})").ok());
  CHECK(text(config, "kv.ladder") == "requantise,file");
}
