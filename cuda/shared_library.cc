#include "cuda/shared_library.h"

#include <dlfcn.h>
#include <fmt/format.h>

namespace fathom::cuda {

Result<SharedLibrary> SharedLibrary::open(std::initializer_list<const char*> names) {
  std::string reasons;
  for (const char* name : names) {
    if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)) {
      SharedLibrary library;
      library.handle_ = handle;
      library.name_ = name;
      return library;
    }
    const char* why = dlerror();
    reasons += fmt::format("{}{}", reasons.empty() ? "" : "; ", why != nullptr ? why : name);
  }
  return Status(Code::kDevice, fmt::format("{} could not be opened: {}", *names.begin(), reasons));
}

Result<void*> SharedLibrary::find_address(const char* symbol) const {
  if (void* found = dlsym(handle_, symbol)) return found;
  return Status(Code::kDevice, fmt::format("{} has no {}", name_, symbol));
}

}  // namespace fathom::cuda
