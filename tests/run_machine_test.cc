// Machine descriptions: what a file may leave out, what it may not say, and the way back to text.
#include <catch2/catch.hpp>

#include "fathom/engine.hpp"
#include "fathom/machine.hpp"
#include "support/loaded_model.h"
#include "support/spill.h"

namespace fathom {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

MachineDescription parsed(std::string_view text) {
  auto machine = MachineDescription::parse(text);
  INFO(machine.status().message());
  REQUIRE(machine.ok());
  return std::move(machine).value();
}

TEST_CASE("the smallest machine file gets documented rates and links", "[machine]") {
  const MachineDescription machine = parsed(R"({"devices": [
      {"name": "cpu", "kind": "cpu", "bytes": 274877906944},
      {"name": "cuda:0", "kind": "cuda", "bytes": "24G"},
      {"name": "cuda:1", "kind": "cuda", "like": "rtx-3060"}]})");
  REQUIRE(machine.devices.size() == 3);
  CHECK(machine.devices[0].bytes == 256 * kGiB);
  CHECK(machine.devices[1].bytes == 24 * kGiB);
  CHECK(machine.devices[1].budget_bytes == 24 * kGiB);
  CHECK(machine.devices[2].bytes == 12 * kGiB);  // what the card has
  for (const MachineDevice& device : machine.devices) {
    CHECK(device.read_bytes_per_s > 0);
    CHECK(device.quantised_flops_per_s > 0);
    CHECK(device.dense_flops_per_s > 0);
    CHECK(device.attention_flops_per_s > 0);
    CHECK(device.operation_s > 0);
    CHECK(device.source == RateSource::kDocumented);
  }
  CHECK(machine.devices[1].read_bytes_per_s > machine.devices[2].read_bytes_per_s);
  CHECK(machine.devices[1].read_bytes_per_s > machine.devices[0].read_bytes_per_s);
  REQUIRE(machine.links.size() == 3);
  for (int a = 0; a < 3; ++a)
    for (int b = 0; b < 3; ++b) {
      if (a == b) continue;
      CHECK(machine.link(a, b).from == std::min(a, b));
      CHECK(machine.link(a, b).to == std::max(a, b));
      CHECK(machine.link(a, b).bytes_per_s > 0);
    }
  CHECK(machine.find("cuda:1") == 2);
  CHECK(machine.find("cuda:2") == -1);
  CHECK(machine.host() == 0);
}

TEST_CASE("what a machine file says is kept, and written back", "[machine]") {
  const MachineDescription machine = parsed(R"({"name": "bench", "expert_skew": 0.5, "devices": [
      {"name": "cuda:0", "bytes": "24G", "budget_bytes": "20G", "runtime_bytes": 1000,
       "read_bytes_per_s": 9e11, "read_bytes_per_s_by_type": {"q4_k": 7.5e11, "fp8": 8e11},
       "quantised_flops_per_s": 1e14, "dense_flops_per_s": 1.5e14, "attention_flops_per_s": 5e13,
       "operation_s": 3e-6},
      {"name": "cpu", "bytes": "64G", "threads": 24, "like": "ddr5-2ch"}],
      "links": [{"from": "cpu", "to": "cuda:0", "bytes_per_s": 5e10, "latency_s": 2e-6}]})");
  const MachineDevice& card = machine.devices[0];
  CHECK(card.kind == DeviceKind::kCuda);
  CHECK(card.budget_bytes == 20 * kGiB);
  CHECK(card.runtime_bytes == 1000);
  CHECK(card.read_rate(DType::kQ4_K) == 7.5e11);
  CHECK(card.read_rate(DType::kF8E4M3) == 8e11);
  CHECK(card.read_rate(DType::kQ8_0) == 9e11);
  CHECK(card.source == RateSource::kDeclared);
  CHECK(machine.host() == 1);
  CHECK(machine.link(0, 1).bytes_per_s == 5e10);
  CHECK(machine.link(1, 0).source == RateSource::kDeclared);

  CHECK(machine.file_bytes_per_s == 2e9);
  CHECK(machine.file_source == RateSource::kDocumented);
  const MachineDescription disk =
      parsed(R"({"devices": [{"name": "cpu", "bytes": "8G"}], "file": {"bytes_per_s": 3e8}})");
  CHECK(parsed(disk.to_json()).file_bytes_per_s == 3e8);
  CHECK(parsed(disk.to_json()).file_source == RateSource::kDeclared);

  const MachineDescription again = parsed(machine.to_json());
  CHECK(again.to_json() == machine.to_json());
  CHECK(again.devices[0].source == RateSource::kDeclared);
  CHECK(again.devices[1].source == RateSource::kDocumented);
  CHECK(again.devices[1].threads == 24);
  CHECK(again.name == "bench");
  CHECK(again.expert_skew == 0.5);
}

TEST_CASE("a wrong machine file is refused by the name of what is wrong", "[machine]") {
  struct Wrong {
    const char* text;
    const char* key;
    const char* says;
  };
  const std::string cpu = R"({"name": "cpu", "bytes": "8G"})";
  for (const Wrong& wrong :
       {Wrong{"[]", "", "object"},
        Wrong{"{}", "devices", "at least one"},
        Wrong{R"({"devices": []})", "devices", "at least one"},
        Wrong{R"({"device": [{"name": "cpu", "bytes": 1}]})", "device", "nearest is devices"},
        Wrong{R"({"devices": [{"name": "cpu", "bites": 1}]})", "bites", "nearest is bytes"},
        Wrong{R"({"devices": [{"name": "cpu"}]})", "bytes", "bytes = 0"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": "24X"}]})", "", "24X"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": -1}]})", "bytes", "-1"},
        Wrong{R"({"devices": [{"name": "tpu:0", "bytes": 1}]})", "kind", "cpu or cuda"},
        Wrong{R"({"devices": [{"name": "CPU", "kind": "cpu", "bytes": 1}]})", "", "CPU"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 1}, {"name": "cpu", "bytes": 1}]})", "name",
              "twice"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9, "budget_bytes": 10}]})", "budget_bytes",
              "10"},
        Wrong{R"({"devices": [{"name": "cuda:0", "like": "rtx-4091"}]})", "like",
              "nearest is rtx-4090"},
        Wrong{R"({"devices": [{"name": "cuda:0", "like": "ddr5-2ch"}]})", "like", "not known"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9, "read_bytes_per_s": -2}]})",
              "read_bytes_per_s", "-2"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9,
                  "read_bytes_per_s_by_type": {"q4k": 1e9}}]})",
              "read_bytes_per_s_by_type", "q4k"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9}],
                  "links": [{"from": "cpu", "to": "cuda:0"}]})",
              "to", "cuda:0"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9}], "file": 3})", "file", "an object"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9}], "file": {"bytes_per_s": 0.5}})", "file",
              "0.5"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9}], "file": {"rate": 1}})", "rate",
              "nearest is"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9}],
                  "links": [{"from": "cpu", "to": "cpu"}]})",
              "links", "from device 0 to device 0"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9}, {"name": "cpu:1", "bytes": 9}],
                  "links": [{"from": "cpu", "to": "cpu:1"}, {"from": "cpu:1", "to": "cpu"}]})",
              "links", "twice"},
        Wrong{R"({"devices": [{"name": "cpu", "bytes": 9}], "expert_skew": 5})", "expert_skew",
              "5"}}) {
    const auto machine = MachineDescription::parse(wrong.text);
    INFO(wrong.text << "\n" << machine.status().message());
    REQUIRE_FALSE(machine.ok());
    CHECK(machine.status().code() == Code::kConfig);
    CHECK(machine.status().message().find(wrong.says) != std::string_view::npos);
    if (*wrong.key != '\0') CHECK(machine.status().key() == wrong.key);
  }
  // Every prefix of a good file is refused, and crashes nothing.
  const std::string good = parsed(R"({"devices": [{"name": "cpu", "bytes": "8G"}]})").to_json();
  for (size_t n = 0; n < good.size(); ++n)
    CHECK_FALSE(MachineDescription::parse(std::string_view(good).substr(0, n)).ok());
  CHECK(MachineDescription::read("/nowhere/machine.json").status().code() == Code::kNotFound);
}

TEST_CASE("every known device is complete", "[machine]") {
  for (const KnownDevice& known : known_devices()) {
    MachineDescription machine;
    MachineDevice device;
    device.name = known.kind == DeviceKind::kCpu ? "cpu" : "cuda:0";
    device.kind = known.kind;
    device.like = known.name;
    if (known.bytes == 0) device.bytes = 64 * kGiB;
    machine.devices.push_back(device);
    const Status status = machine.complete();
    INFO(known.name << ": " << known.text << " " << status.message());
    CHECK(status.ok());
    CHECK(machine.devices[0].bytes >= kGiB);
    CHECK(machine.devices[0].read_bytes_per_s > 1e10);
  }
}

TEST_CASE("an engine describes its own devices", "[machine]") {
  auto engine = Engine::create(test::config_of({{"devices", "cpu:0,cpu:1"}}));
  REQUIRE(engine.ok());
  const MachineDescription& machine = engine->machine();
  REQUIRE(machine.devices.size() == 2);
  for (const MachineDevice& device : machine.devices) {
    CHECK(device.kind == DeviceKind::kCpu);
    CHECK(device.bytes == engine->device(0).memory().total_bytes);
    CHECK(device.read_bytes_per_s > 0);
  }
  CHECK(machine.link(0, 1).bytes_per_s > 0);
}

TEST_CASE("an engine measures its devices, and another one plans with the result", "[machine]") {
  const test::TemporaryFolder folder("measured");
  const Config config = test::config_of({{"devices", "cpu:0,cpu:1"},
                                         {"threads", "1"},
                                         {"kv.tiers", "device,file"},
                                         {"kv.spill_tmpfs", "allow"},
                                         {"kv.spill_folder", folder.path()}});
  auto engine = Engine::create(config);
  REQUIRE(engine.ok());
  const int64_t before = engine->memory().devices[0].bytes_now;
  auto measured = engine->measure(0.1);
  INFO(measured.status().message());
  REQUIRE(measured.ok());
  CHECK(engine->memory().devices[0].bytes_now == before);
  INFO(measured->to_json());
  for (const MachineDevice& device : measured->devices) {
    CHECK(device.source == RateSource::kMeasured);
    // Any machine that can build this: between 100 MB/s and 10 TB/s, 100 MFLOP/s and 1 PFLOP/s.
    for (const auto& [type, rate] : device.read_bytes_per_s_by_type) {
      CHECK(rate > 1e8);
      CHECK(rate < 1e13);
      CHECK(rate <= device.read_bytes_per_s);
    }
    CHECK(device.read_bytes_per_s_by_type.size() == 4);
    for (const double rate :
         {device.quantised_flops_per_s, device.dense_flops_per_s, device.attention_flops_per_s}) {
      CHECK(rate > 1e8);
      CHECK(rate < 1e15);
    }
    CHECK(device.operation_s > 0);
    CHECK(device.operation_s < 0.1);
  }
  CHECK(measured->links[0].source == RateSource::kMeasured);
  CHECK(measured->file_source == RateSource::kMeasured);
  CHECK(measured->file_bytes_per_s > 1e5);
  CHECK(measured->file_bytes_per_s < 1e12);

  auto known = MachineDescription::parse(measured->to_json());  // through a profile's file
  REQUIRE(known.ok());
  auto again = Engine::create(config, {}, &*known);
  REQUIRE(again.ok());
  auto plan = again->plan(FATHOM_EXAMPLE_MODEL);
  REQUIRE(plan.ok());
  CHECK(plan->speed.source == RateSource::kMeasured);
  CHECK(engine->plan(FATHOM_EXAMPLE_MODEL)->speed.source == RateSource::kDocumented);
  CHECK(again->machine().devices[1].read_bytes_per_s == measured->devices[1].read_bytes_per_s);
  CHECK(again->machine().file_bytes_per_s == known->file_bytes_per_s);

  CHECK(engine->measure(0).status().code() == Code::kInvalidArgument);
  auto simulated = Engine::simulate(*measured);
  REQUIRE(simulated.ok());
  CHECK(simulated->measure().status().code() == Code::kState);
}

}  // namespace
}  // namespace fathom
