// Allocations that fail on demand: large memory through the host's allocator hook, and the heap
// through an operator new that a test program defines.
#pragma once

#include <cstdint>

#include "fathom/engine.hpp"

namespace fathom::test {

// Counts down over the allocations of this thread; the one that reaches zero is refused, once.
class Faults {
 public:
  // The n-th (from 1) allocation from now on is refused.
  static void arm(int64_t n) noexcept { left() = n; }
  // True when the fault has struck since arm().
  static bool disarm() noexcept {
    const bool struck = left() <= 0;
    left() = INT64_MAX;
    return struck;
  }
  static bool strikes() noexcept { return left() != INT64_MAX && --left() == 0; }

 private:
  static int64_t& left() noexcept {
    static thread_local int64_t value = INT64_MAX;
    return value;
  }
};

// Memory of the system behind the hook, with refusals by Faults.  `held` counts what is committed.
HostAllocator faulty_allocator(int64_t* held);

// While it lives, operator new of this thread is refused by Faults too.
class HeapFaults {
 public:
  HeapFaults() noexcept { on() = true; }
  ~HeapFaults() { on() = false; }
  static bool& on() noexcept {
    static thread_local bool value = false;
    return value;
  }
  // Blocks of operator new that this thread has not given back.
  static int64_t& live() noexcept {
    static thread_local int64_t value = 0;
    return value;
  }
};

}  // namespace fathom::test
