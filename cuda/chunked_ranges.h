// Address ranges for a driver that cannot map memory into reserved addresses: the addresses only
// name places, and every commit gets a chunk of memory of its own (Backend::address).
//
//   reserve    [ a ............................................ a + bytes )   nothing behind it
//   commits        [chunk 1)         [chunk 2)  [chunk 3)                     each somewhere
//
// Giving back a part of a chunk moves what stays into smaller chunks.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

#include "fathom/status.hpp"

namespace fathom::cuda {

class ChunkedRanges {
 public:
  // Where chunks come from.
  class Memory {
   public:
    virtual ~Memory() = default;
    virtual Result<void*> allocate(int64_t bytes) noexcept = 0;  // errors: kMemory
    virtual void free(void*) noexcept = 0;                       // nothing uses it any more
    // Done before what is queued later; false where it failed.
    virtual bool copy(void* to, const void* from, int64_t bytes) noexcept = 0;
  };
  ChunkedRanges(Memory& memory, int64_t granularity) noexcept
      : memory_(memory), granularity_(static_cast<uintptr_t>(granularity)), next_(granularity_) {}
  ~ChunkedRanges();

  // As the functions of Backend.
  void* reserve(int64_t bytes) noexcept;
  Status commit(void* base, int64_t offset, int64_t bytes) noexcept;
  // What stays of a chunk keeps its memory where there is none to move it to.
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept;
  void release(void* base, int64_t bytes) noexcept { decommit(base, 0, bytes); }
  // Null where nothing is committed.
  void* address(void* base, int64_t offset) const noexcept;
  int64_t held_bytes() const noexcept;

 private:
  struct Chunk {
    uintptr_t end;  // the names it stands for, up to here
    void* memory;
    int64_t bytes;       // of the memory
    int64_t offset = 0;  // of the first name
  };
  using Chunks = std::map<uintptr_t, Chunk>;  // by the first name
  bool move_part(uintptr_t first, uintptr_t end, const Chunk& of, uintptr_t of_first);

  Memory& memory_;
  const uintptr_t granularity_;
  mutable std::mutex mutex_;
  uintptr_t next_;
  Chunks chunks_;
};

}  // namespace fathom::cuda
