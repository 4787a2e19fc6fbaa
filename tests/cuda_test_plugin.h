// Which plug-in the tests of CUDA devices use: the one that FATHOM_TEST_CUDA_PLUGIN names, or the
// emulated one.
#pragma once

#include <catch2/catch.hpp>
#include <cstdlib>
#include <memory>
#include <string>

#include "fathom/backend.hpp"
#include "lib/run/backend_plugin.h"

namespace fathom::cuda_test {

inline bool real_gpu() {
  return std::getenv("FATHOM_TEST_CUDA_PLUGIN") != nullptr;
}
inline std::string plugin_path() {
  const char* named = std::getenv("FATHOM_TEST_CUDA_PLUGIN");
  return named != nullptr ? named : std::string(FATHOM_TEST_PLUGINS) + "/emulated.so";
}
inline std::unique_ptr<Backend> open_device(Numerics numerics) {
  auto device = run::open_plugin_device(plugin_path(), {.name = "cuda:0", .numerics = numerics});
  INFO(device.status().message());
  REQUIRE(device.ok());
  return std::move(device).value();
}

}  // namespace fathom::cuda_test
