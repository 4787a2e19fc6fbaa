// A library opened at run time, so that a machine that lacks it keeps everything else.
#pragma once

#include <initializer_list>
#include <string>

#include "fathom/status.hpp"

namespace fathom::cuda {

// Stays open for the life of the process: what libraries of this size leave behind (threads, exit
// handlers) must not lose its code.
class SharedLibrary {
 public:
  // The first of `names` that opens.  Errors: kDevice, with what the loader said of each.
  static Result<SharedLibrary> open(std::initializer_list<const char*> names);
  // Errors: kDevice, naming the library and the symbol.
  template <class Function>
  Status find(const char* symbol, Function*& function) const {
    FATHOM_TRY_ASSIGN(void* found, find_address(symbol));
    function = reinterpret_cast<Function*>(found);
    return {};
  }
  const std::string& name() const noexcept { return name_; }

 private:
  Result<void*> find_address(const char* symbol) const;

  void* handle_ = nullptr;
  std::string name_;
};

}  // namespace fathom::cuda
