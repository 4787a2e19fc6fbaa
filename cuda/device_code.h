// What kernels are written in: CUDA under nvcc, its emulation under any other compiler.  The one
// place that knows which.  Included by .cu and .cuh files only.
//
// A kernel takes one parameter struct, and shared memory from SharedMemory alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda/emulation.h"
#include "fathom/tensor.hpp"
#endif

namespace fathom::cuda {

#ifdef __CUDACC__

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fathom_shared[];
  return fathom_shared;
}

// d += a * b for tiles of 16 x 8 x 16: m16n8k16, bf16 with f32 sums (PTX ISA, section 9.7.14).
// With g = lane / 4 and t = lane % 4, a pair being two neighbours in one register:
//   a  rows g, g + 8, g, g + 8;  k 2t, 2t, 2t + 8, 2t + 8      b  column g;  k 2t, 2t + 8
//   d  rows g, g, g + 8, g + 8;  columns 2t, 2t + 1, 2t, 2t + 1
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with f16.
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory, both aligned to 16, beside what the thread does next.
// Copies between two commits are a group; wait_copies<n> waits for all but the thread's last n.
// Others see them behind a barrier.
__device__ inline void copy_async16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kGroups>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Two 8 x 8 tiles of 16-bit values, transposed on the way: lane i < 8 gives the address of row i of
// the first, lane 8 + i that of row i of the second; out[j] has rows 2t, 2t + 1 of column g of tile
// j.
__device__ inline void load_transposed(uint32_t (&out)[2], const uint16_t* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(address)
               : "memory");
}

#else

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(emulated::Machine::here().shared());
}

template <class Params>
void emulate(const KernelLaunch& l) {
  struct Call {
    void (*kernel)(Params);
    Params params;
  } call{reinterpret_cast<void (*)(Params)>(const_cast<void*>(l.kernel)), {}};
  std::memcpy(&call.params, l.params, sizeof(Params));
  emulated::Machine::here().run(
      {l.grid[0], l.grid[1], l.grid[2]}, {l.threads, 1, 1}, l.shared_bytes,
      [](void* arg) {
        const Call& c = *static_cast<const Call*>(arg);
        c.kernel(c.params);
      },
      &call);
}

// Value `which` of a pair of 16-bit numbers.
template <bool kF16>
float of_pair(uint32_t pair, int which) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * which));
  return kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

template <bool kF16>
void emulate_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* slots = emulated::exchange(mine, __FILE__, __LINE__);
  const int g = emulated::lane() / 4, t = emulated::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const auto left = emulated::lane_value<Operands>(slots, row % 8 * 4 + k % 8 / 2);
      const auto right = emulated::lane_value<Operands>(slots, column * 4 + k % 8 / 2);
      d[i] +=
          of_pair<kF16>(left.a[row / 8 + k / 8 * 2], k % 2) * of_pair<kF16>(right.b[k / 8], k % 2);
    }
  }
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma<false>(d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulate_mma<true>(d, a, b);
}

// As late as allowed: what is used before its wait is still what was there before.
inline void copy_async16(void* shared, const void* global) {
  emulated::Machine::here().thread().copies.add(shared, global);
}
inline void commit_copies() {
  emulated::Machine::here().thread().copies.commit();
}
template <int kGroups>
void wait_copies() {
  emulated::Machine::here().thread().copies.wait(kGroups);
}

inline void load_transposed(uint32_t (&out)[2], const uint16_t* row) {
  const auto* slots = emulated::exchange(row, __FILE__, __LINE__);
  const int g = emulated::lane() / 4, t = emulated::lane() % 4;
  for (int tile = 0; tile < 2; ++tile) {
    const auto* even = emulated::lane_value<const uint16_t*>(slots, tile * 8 + 2 * t);
    const auto* odd = emulated::lane_value<const uint16_t*>(slots, tile * 8 + 2 * t + 1);
    out[tile] = even[g] | uint32_t{odd[g]} << 16;
  }
  __syncwarp();  // nobody overwrites the rows before all have read them
}

#endif

// Queues a kernel.  Errors: of the launch itself, or, where launches are kept for a graph, none:
// they come when the step is waited for, as what a kernel does wrong does.
//
// Graphs tell by the bytes of the struct what has changed; padding that differs costs an update.
// (Not __builtin_clear_padding: GCC 12 clears more than padding in nested arrays.)
template <class Params>
int launch(void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared_bytes, Stream stream,
           Params params) {
  static_assert(std::is_trivially_copyable_v<Params> && alignof(Params) <= 16);
  KernelLaunch l{.kernel = reinterpret_cast<const void*>(kernel),
                 .grid = {grid.x, grid.y, grid.z},
                 .threads = threads,
                 .shared_bytes = shared_bytes,
                 .params = &params,
                 .params_bytes = sizeof params,
                 .emulate = nullptr};
#ifndef __CUDACC__
  l.emulate = emulate<Params>;
  if (stream == nullptr) {
    l.emulate(l);
    return emulated::Machine::here().failed() ? kEmulationFailed : 0;
  }
#endif
  return stream->launch(l);
}

}  // namespace fathom::cuda
