// A plug-in that opens another one, named by FATHOM_TEST_TRACED_PLUGIN, and keeps what the library
// called of its devices and when each call returned.  For tests/bench/cuda/cuda_hybrid.cc.
#include "support/traced_calls.h"

#include <cstdlib>
#include <mutex>

#include "fathom/backend_plugin.hpp"
#include "fathom/version.hpp"
#include "lib/run/backend_plugin.h"
#include "lib/run/observed_backend.h"

namespace fathom::test {
namespace {

std::mutex calls_mutex;
std::vector<TracedCall> calls;

void keep(const OpTime& op) {
  const TracedCall::Clock::time_point end = TracedCall::Clock::now();
  const std::lock_guard lock(calls_mutex);
  calls.push_back({std::string(op.op), end, op.seconds});
}

Result<std::unique_ptr<Backend>> make(const PluginOptions& options) {
  const char* path = std::getenv("FATHOM_TEST_TRACED_PLUGIN");
  if (path == nullptr)
    return Status(Code::kUnsupported, "FATHOM_TEST_TRACED_PLUGIN names no plug-in");
  FATHOM_TRY_ASSIGN(std::unique_ptr<Backend> real, run::open_plugin_device(path, options));
  return run::observed(std::move(real), 0, keep, run::Observed::kCalls);
}

Result<std::unique_ptr<Backend>> make_backend(const PluginOptions& options) noexcept try {
  return make(options);
} catch (const std::exception& e) {
  return Status(Code::kMemory, e.what());
}

constexpr BackendPlugin kPlugin{kBackendVersion, FATHOM_VERSION_STRING, make_backend};

}  // namespace
}  // namespace fathom::test

extern "C" __attribute__((visibility("default"))) const fathom::BackendPlugin*
fathom_backend_plugin() noexcept {
  return &fathom::test::kPlugin;
}

extern "C" __attribute__((visibility("default"))) void fathom_traced_calls(
    std::vector<fathom::test::TracedCall>& out) {
  const std::lock_guard lock(fathom::test::calls_mutex);
  out = std::move(fathom::test::calls);
  fathom::test::calls.clear();
}
