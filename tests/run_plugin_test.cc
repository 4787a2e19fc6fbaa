// Devices in plug-ins: what is refused and with which words, and what happens to the rest.
#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "support/loaded_model.h"

using namespace fathom;
using Catch::Contains;

namespace {

std::string plugin(const std::string& name) {
  return std::string(FATHOM_TEST_PLUGINS) + "/" + name + ".so";
}

struct Made {
  Code code = Code::kOk;
  std::string message, key;
  std::vector<std::string> warnings;
  std::vector<std::string> devices;
};
Made make(const test::Settings& settings) {
  Made made;
  HostHooks hooks;
  hooks.log = [&](LogLevel level, std::string_view text) {
    if (level == LogLevel::kWarn) made.warnings.emplace_back(text);
  };
  const Result<Engine> engine = Engine::create(test::config_of(settings), hooks);
  if (!engine.ok()) {
    made.code = engine.status().code();
    made.message = engine.status().message();
    made.key = engine.status().key();
    return made;
  }
  for (int d = 0; d < engine->n_devices(); ++d) made.devices.emplace_back(engine->device(d).name());
  return made;
}
Made with_plugin(const std::string& name, const std::string& devices = "cuda:0,cpu") {
  return make({{"devices", devices}, {"cuda.plugin", plugin(name)}});
}

}  // namespace

TEST_CASE("a plug-in of another version is refused before it is called", "[plugin]") {
  const Made interface = with_plugin("other_interface");
  CHECK(interface.code == Code::kVersion);
  CHECK(interface.key == "devices");
  CHECK_THAT(interface.message,
             Contains("cuda:0") && Contains("other_interface.so") &&
                 Contains("built for version " + std::to_string(kBackendVersion + 1)));
  const Made release = with_plugin("other_release");
  CHECK(release.code == Code::kVersion);
  CHECK_THAT(release.message, Contains("belongs to Fathom 0.0.1"));
}

TEST_CASE("what is no plug-in is refused by name", "[plugin]") {
  const Made no_entry = with_plugin("no_entry");
  CHECK(no_entry.code == Code::kUnsupported);
  CHECK_THAT(no_entry.message, Contains("no_entry.so is no plug-in"));
  const Made missing = with_plugin("missing");
  CHECK(missing.code == Code::kUnsupported);
  CHECK_THAT(missing.message, Contains("missing.so") && Contains("could not be opened"));
  const Made text = make({{"devices", "cuda:0,cpu"}, {"cuda.plugin", FATHOM_EXAMPLE_MODEL}});
  CHECK(text.code == Code::kUnsupported);
  CHECK_THAT(text.message, Contains("invalid ELF header"));
}

TEST_CASE("a missing device is skipped where the configuration says so, with the reason",
          "[plugin]") {
  for (const char* name : {"other_interface", "other_release", "no_entry", "missing"}) {
    const Made made = make(
        {{"devices", "cuda:0,cpu"}, {"devices.missing", "skip"}, {"cuda.plugin", plugin(name)}});
    INFO(made.message);
    CHECK(made.devices == std::vector<std::string>{"cpu"});
    REQUIRE(made.warnings.size() == 1);
    CHECK_THAT(made.warnings[0], Contains("left out") && Contains("cuda:0") && Contains(name));
  }
  // A machine without the plug-in beside the library, or without a driver: the same.
  const Made here = make({{"devices", "cuda:63,cpu"}, {"devices.missing", "skip"}});
  CHECK(here.devices == std::vector<std::string>{"cpu"});
  CHECK(here.warnings.size() == 1);
  // Nothing is left.
  const Made nothing = make(
      {{"devices", "cuda:0"}, {"devices.missing", "skip"}, {"cuda.plugin", plugin("missing")}});
  CHECK(nothing.code == Code::kConfig);
  CHECK_THAT(nothing.message, Contains("none of them can be had"));
}

TEST_CASE("names of devices that nothing makes are refused", "[plugin]") {
  const Made made = make({{"devices", "tpu:0,cpu"}, {"devices.missing", "skip"}});
  CHECK(made.code == Code::kUnsupported);
  CHECK_THAT(made.message, Contains("\"tpu:0\" is not a device"));
}
