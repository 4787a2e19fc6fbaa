// libfathom_cuda.so itself on a machine without a GPU: what it says of a driver that is missing or
// too old, and that the CPU does the work.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <filesystem>
#include <string>

#include "support/loaded_model.h"

using namespace fathom;
using Catch::Contains;

namespace {

// libfathom_cuda.so, where it is built and no driver is there; empty otherwise.
std::string real_plugin() {
  const std::string real = std::string(FATHOM_BINARY_DIR) + "/lib/libfathom_cuda.so";
  if (!std::filesystem::exists(real))
    WARN("not run: " << real << " is not built");
  else if (std::filesystem::exists("/dev/nvidiactl"))
    WARN("not run: this machine has a driver");
  else
    return real;
  return "";
}

Result<Engine> create(const std::string& real, const char* missing = "refuse") {
  return Engine::create(test::config_of(
      {{"devices", "cuda:0,cpu"}, {"cuda.plugin", real}, {"devices.missing", missing}}));
}

}  // namespace

TEST_CASE("the real plug-in tells of a driver that is too old, in its words", "[plugin]") {
  const std::string real = real_plugin();
  if (real.empty()) return;
  // In a process of its own: the runtime asks once.  The first case, before the plug-in is opened
  // here.
  int out[2];
  REQUIRE(pipe(out) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const bool loaded =
        dlopen(FATHOM_TEST_PLUGINS "/old_driver.so", RTLD_NOW | RTLD_GLOBAL) != nullptr;
    const Status refused = create(real).status().clone();
    const auto without = create(real, "skip");
    std::string text(refused.message());
    if (loaded && refused.code() == Code::kDevice) text += "; refused";
    if (without.ok() && without->n_devices() == 1) text += "; goes on";
    (void)!write(out[1], text.data(), text.size());
    _exit(0);
  }
  close(out[1]);
  std::string text(4096, 0);
  const ssize_t n = read(out[0], text.data(), text.size());
  close(out[0]);
  waitpid(child, nullptr, 0);
  text.resize(static_cast<size_t>(std::max<ssize_t>(n, 0)));
  CHECK_THAT(text, Contains("cuda:0: the driver is for CUDA 11.4") &&
                       Contains("driver version is insufficient") && Contains("; refused") &&
                       Contains("; goes on"));
}

TEST_CASE("the real plug-in on a machine without a driver says so, and the CPU does the work",
          "[plugin]") {
  const std::string real = real_plugin();
  if (real.empty()) return;
  const Status refused = create(real).status().clone();
  CHECK(refused.code() == Code::kDevice);
  CHECK_THAT(std::string(refused.message()), Contains("cuda:0: no NVIDIA driver is installed"));
  const Model model = test::load_model(FATHOM_EXAMPLE_MODEL, {{"devices", "cuda:0,cpu"},
                                                              {"cuda.plugin", real},
                                                              {"devices.missing", "skip"},
                                                              {"context.max", "64"}});
  CHECK(model.engine().n_devices() == 1);
  Session session = test::new_session(model);
  test::require_ok(session.step(3));
}
