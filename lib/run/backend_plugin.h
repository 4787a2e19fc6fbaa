// Opening backends that live in shared libraries (fathom/backend_plugin.hpp).
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "fathom/backend_plugin.hpp"

namespace fathom::run {

// "cuda:0" -> "libfathom_cuda.so"; empty for devices that are built in.
std::string plugin_file(std::string_view device);

// Opens the plug-in of `options.name` and makes the device.  `path`: the file; empty:
// libfathom_<kind>.so beside this library, in ../lib of there, or where the system looks for
// libraries.  A plug-in stays open for the life of the process. Errors: kUnsupported (no such file,
// or it cannot be loaded), kVersion (built for another release), and those of the plug-in.
Result<std::unique_ptr<Backend>> open_plugin_device(const std::string& path,
                                                    const PluginOptions& options);

}  // namespace fathom::run
