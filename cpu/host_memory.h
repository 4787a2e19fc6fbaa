// The operating-system seam of the CPU backend: ranges of host memory, and what this process may
// have of the machine's memory and processors, control groups included.
//
// A range is reserved as addresses that cost nothing, then committed and decommitted in pages.
// Only committed pages count against RLIMIT_DATA and the system's overcommit policy.
#pragma once

#include <cstdint>

#include "fathom/backend.hpp"
#include "fathom/status.hpp"

namespace fathom::cpu {

enum class HugePages : uint8_t { kOff, kAdvise };

inline constexpr int64_t kHugePageBytes = int64_t{2} << 20;

// Size of a page of the system; commits are multiples of it.
int64_t host_page_bytes() noexcept;

// Addresses for `bytes` > 0 (rounded up to pages).  Ranges of kHugePageBytes and more are aligned
// to it, and with kAdvise the system is told to back them with huge pages where whole ones fit
// into committed memory.  Errors: kInvalidArgument; kMemory.
Result<void*> host_reserve(int64_t bytes, HugePages huge_pages) noexcept;

// Backs [offset, offset + bytes) of a reserved range, none of which is committed, with zeroed
// memory.  offset and bytes are multiples of host_page_bytes().  All or nothing.
// Errors: kInvalidArgument; kMemory when the system refuses.
Status host_commit(void* base, int64_t offset, int64_t bytes) noexcept;

// Gives the pages back at once; their addresses stay reserved.
void host_decommit(void* base, int64_t offset, int64_t bytes, HugePages huge_pages) noexcept;

// Ends the reservation of host_reserve(bytes), committed or not.
void host_release(void* base, int64_t bytes) noexcept;

// total: the machine's memory or the smallest limit of the control groups above this process.
// free: what could be had now without swapping, from the same sources and RLIMIT_DATA.
// `root` is put before /proc and /sys, for tests.  Zeros where the system does not tell.
MemoryState host_memory_state(const char* root = "") noexcept;

// Processors that this process may use: its affinity mask, and no more than the quota of its
// control groups, rounded up.  At least 1.
int usable_processors(const char* root = "") noexcept;

}  // namespace fathom::cpu
