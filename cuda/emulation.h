// Runs CUDA kernels on the host, so that every kernel is tested where there is no GPU: the same
// source, compiled by g++, with a fiber for each thread of a block.  For tests only; slow.
//
//   what it runs     blocks one after another; within a block every thread until it waits
//   what it finds    copies into shared memory that are used before they are waited for, or never
//                    waited for; __syncthreads() that some threads do not reach, or reach
//                    elsewhere; warp operations with lanes missing; reads of shared memory nobody
//                    wrote (it begins as NaN); missing barriers (the order of threads and blocks is
//                    an option); and what the address and undefined-behaviour sanitizers find
//   what it is not   concurrent: races between blocks show only as a dependence on their order
//
// A failure ends the launch and is kept until take_failure(); launches before that do nothing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
#define FATHOM_EMULATION_ASAN 1
#else
#define FATHOM_EMULATION_ASAN 0
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace fathom::cuda::emulated {

// The order in which threads and blocks run.  A kernel is right only if all give the same.
enum class Order { kForward, kBackward, kMixed };

enum class Wait : uint8_t { kReady, kBlock, kWarp, kDone };

struct Fiber {
  static constexpr size_t kStackBytes = FATHOM_EMULATION_ASAN ? 256 << 10 : 64 << 10;
  std::unique_ptr<std::byte[]> stack;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // of the address sanitizer
};

// Copies from global to shared memory that a thread has started and not waited for.
class Copies {
 public:
  void add(void* to, const void* from) { pending_.push_back({to, from, group_}); }
  void commit() { ++group_; }
  void wait(int but_last) {
    size_t n = 0;
    while (n < pending_.size() && pending_[n].group < group_ - but_last) ++n;
    for (size_t i = 0; i < n; ++i) std::memcpy(pending_[i].to, pending_[i].from, 16);
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(n));
  }
  bool empty() const { return pending_.empty(); }
  void forget() { pending_.clear(); }

 private:
  struct Copy {
    void* to;
    const void* from;
    int group;
  };
  std::vector<Copy> pending_;
  int group_ = 0;
};

struct Thread {
  Copies copies;
  dim3 index;
  int lane = 0, warp = 0;
  Wait wait = Wait::kDone;
  const char* file = "";
  int line = 0;  // where it waits
  int parity = 0;
};

// What lanes show to each other; two sets, so that one barrier per exchange is enough.
struct Warp {
  alignas(16) std::byte slots[2][32][32];
};

class Machine {
 public:
  static Machine& here() {
    static thread_local Machine machine;
    return machine;
  }

  Order order = Order::kForward;
  dim3 grid, block, block_index;
  int64_t launches = 0;

  Thread& thread() { return threads_[current_]; }
  Warp& warp() { return warps_[static_cast<size_t>(thread().warp)]; }
  std::byte* shared() { return shared_.get(); }
  std::string take_failure() { return std::exchange(failure_, {}); }
  bool failed() const { return !failure_.empty(); }

  void run(dim3 grid_size, dim3 block_size, size_t shared_bytes, void (*body)(void*), void* arg) {
    if (failed()) return;
    ++launches;
    grid = grid_size;
    block = block_size;
    body_ = body;
    arg_ = arg;
    const size_t n_threads = size_t{block.x} * block.y * block.z;
    const int64_t n_blocks = int64_t{grid.x} * grid.y * grid.z;
    if (n_threads == 0 || n_threads > 1024 || n_blocks == 0 || grid.y > 65535 || grid.z > 65535 ||
        shared_bytes > kMaxSharedBytes) {
      failure_ = "a launch of " + std::to_string(n_blocks) + " blocks of " +
                 std::to_string(n_threads) + " threads with " + std::to_string(shared_bytes) +
                 " bytes of shared memory";
      return;
    }
    prepare(n_threads);
    // Of exactly this size, so that the address sanitizer sees what is read or written behind it.
    shared_.reset(new (std::align_val_t(16)) std::byte[shared_bytes]);
    for (int64_t i = 0; i < n_blocks && !failed(); ++i) {
      const int64_t b = order == Order::kForward ? i : n_blocks - 1 - i;
      block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / grid.x / grid.y)};
      std::memset(shared_.get(), 0xff, shared_bytes);
      run_block(n_threads);
    }
  }

  // Called on a thread's fiber: waits until all threads of the block or warp are there.
  void wait(Wait what, const char* file, int line) {
    Thread& t = thread();
    t.wait = what;
    t.file = file;
    t.line = line;
    leave();
  }

 private:
  static constexpr size_t kMaxSharedBytes = 227 << 10;  // of a block on sm_90

  struct AlignedDelete {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(16)); }
  };

  void prepare(size_t n_threads) {
    threads_.resize(n_threads);
    warps_.resize((n_threads + 31) / 32);
    order_.resize(n_threads);
    std::iota(order_.begin(), order_.end(), size_t{0});
    if (order == Order::kBackward) std::reverse(order_.begin(), order_.end());
    if (order == Order::kMixed) {
      uint32_t seed = 12345;
      for (size_t i = n_threads - 1; i > 0; --i) {
        seed = seed * 1664525u + 1013904223u;
        std::swap(order_[i], order_[(seed >> 8) % (i + 1)]);
      }
    }
    for (size_t i = 0; i < n_threads; ++i) {
      Thread& t = threads_[i] = {};
      const auto n = static_cast<unsigned>(i);
      t.index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
      t.lane = static_cast<int>(i % 32);
      t.warp = static_cast<int>(i / 32);
    }
    while (fibers_.size() < n_threads) fibers_.push_back(new_fiber());
  }

  void run_block(size_t n_threads) {
    for (Thread& t : threads_) t.wait = Wait::kReady;
    for (size_t n_done = 0; n_done < n_threads;) {
      for (size_t i : order_) {
        if (threads_[i].wait != Wait::kReady) continue;
        current_ = i;
        enter(*fibers_[i]);
        n_done += threads_[i].wait == Wait::kDone;
      }
      if (n_done < n_threads && !release(n_threads)) {
        fibers_.clear();  // their stacks are in the middle of something
        return;
      }
    }
    for (Thread& t : threads_) {
      if (!t.copies.empty() && failure_.empty())
        failure_ = "a thread ended with copies that it did not wait for";
      t.copies.forget();
    }
  }

  static bool same_place(const Thread& a, const Thread& b) {
    return a.wait == b.wait && a.line == b.line && std::strcmp(a.file, b.file) == 0;
  }
  static std::string place(const Thread& t) {
    const char* what = t.wait == Wait::kDone    ? " has ended"
                       : t.wait == Wait::kBlock ? " waits for its block at "
                                                : " waits for its warp at ";
    std::string text = "thread (" + std::to_string(t.index.x) + ", " + std::to_string(t.index.y) +
                       ", " + std::to_string(t.index.z) + ")" + what;
    if (t.wait != Wait::kDone) text += std::string(t.file) + ":" + std::to_string(t.line);
    return text;
  }

  // Lets those go on whose companions have all arrived; false when nobody can go on.
  bool release(size_t n_threads) {
    bool any = false, whole_block = true;
    for (size_t first = 0; first < n_threads; first += 32) {
      const size_t end = std::min(n_threads, first + 32);
      bool whole = threads_[first].wait == Wait::kWarp;
      for (size_t i = first; i < end; ++i) whole &= same_place(threads_[i], threads_[first]);
      if (whole)
        for (size_t i = first; i < end; ++i) threads_[i].wait = Wait::kReady;
      any |= whole;
    }
    for (const Thread& t : threads_)
      whole_block &= t.wait == Wait::kBlock && same_place(t, threads_.front());
    if (whole_block)
      for (Thread& t : threads_) t.wait = Wait::kReady;
    if (any || whole_block) return true;
    const Thread& one = threads_.front();
    for (const Thread& other : threads_)
      if (!same_place(one, other)) {
        failure_ = "divergence: " + place(one) + ", " + place(other);
        return false;
      }
    failure_ = "divergence: " + place(one);  // a partial warp at a warp operation
    return false;
  }

  static void fiber_main() {
    Machine& machine = here();
#if FATHOM_EMULATION_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &machine.host_bottom_, &machine.host_size_);
#endif
    for (;;) {
      machine.body_(machine.arg_);
      machine.thread().wait = Wait::kDone;
      machine.leave();
    }
  }

#if defined(__x86_64__)
  // Saves the callee's registers and the stack pointer, and goes on with another stack.
  [[gnu::naked, gnu::noinline]] static void switch_stack(void** /*save*/, void* /*load*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
  }
  static std::unique_ptr<Fiber> new_fiber() {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new std::byte[Fiber::kStackBytes]);
    auto top = reinterpret_cast<uintptr_t>(fiber->stack.get() + Fiber::kStackBytes);
    // Six registers, fiber_main, and a return address, as a call leaves the stack.
    auto* words = reinterpret_cast<void**>(top / 16 * 16 - 64);
    std::fill_n(words, 8, nullptr);
    words[6] = reinterpret_cast<void*>(&fiber_main);
    fiber->pointer = words;
    return fiber;
  }
  void swap_in(Fiber& fiber) {
    switch_stack(&host_, fiber.pointer);
  }
  void swap_out(Fiber& fiber) {
    switch_stack(&fiber.pointer, host_);
  }
  void* host_ = nullptr;
#else
  static std::unique_ptr<Fiber> new_fiber() {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new std::byte[Fiber::kStackBytes]);
    return fiber;
  }
  void swap_in(Fiber& fiber) {
    if (fiber.context.uc_stack.ss_sp == nullptr) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
      makecontext(&fiber.context, fiber_main, 0);
    }
    swapcontext(&host_, &fiber.context);
  }
  void swap_out(Fiber& fiber) {
    swapcontext(&fiber.context, &host_);
  }
  ucontext_t host_;
#endif

  void enter(Fiber& fiber) {
#if FATHOM_EMULATION_ASAN
    __sanitizer_start_switch_fiber(&host_fake_, fiber.stack.get(), Fiber::kStackBytes);
    swap_in(fiber);
    __sanitizer_finish_switch_fiber(host_fake_, nullptr, nullptr);
#else
    swap_in(fiber);
#endif
  }
  void leave() {
    Fiber& fiber = *fibers_[current_];
#if FATHOM_EMULATION_ASAN
    __sanitizer_start_switch_fiber(&fiber.fake_stack, host_bottom_, host_size_);
    swap_out(fiber);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &host_bottom_, &host_size_);
#else
    swap_out(fiber);
#endif
  }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;  // a fiber must not move while it sleeps
  std::vector<size_t> order_;
  std::unique_ptr<std::byte[], AlignedDelete> shared_;
  size_t current_ = 0;
  void (*body_)(void*) = nullptr;
  void* arg_ = nullptr;
  std::string failure_;
  void* host_fake_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_size_ = 0;
};

// All lanes of the warp show `value`; returns the lane's slot array.
template <class T>
const std::byte (*exchange(const T& value, const char* file, int line))[32] {
  static_assert(sizeof(T) <= 32);
  Machine& machine = Machine::here();
  Thread& t = machine.thread();
  t.parity ^= 1;
  auto* slots = machine.warp().slots[t.parity];
  std::memcpy(slots[t.lane], &value, sizeof(T));
  machine.wait(Wait::kWarp, file, line);
  return slots;
}
template <class T>
T lane_value(const std::byte (*slots)[32], int lane) {
  T value;
  std::memcpy(&value, slots[lane & 31], sizeof(T));
  return value;
}
template <class T>
T shuffle(T value, int lane, const char* file, int line) {
  return lane_value<T>(exchange(value, file, line), lane);
}
inline uint32_t ballot(bool value, const char* file, int line) {
  const auto* slots = exchange(value, file, line);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= uint32_t{lane_value<bool>(slots, lane)} << lane;
  return bits;
}
inline int lane() {
  return Machine::here().thread().lane;
}

}  // namespace fathom::cuda::emulated

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::fathom::cuda::emulated::Machine::here().thread().index)
#define blockIdx (::fathom::cuda::emulated::Machine::here().block_index)
#define blockDim (::fathom::cuda::emulated::Machine::here().block)
#define gridDim (::fathom::cuda::emulated::Machine::here().grid)
#define __syncthreads()                                                                            \
  ::fathom::cuda::emulated::Machine::here().wait(::fathom::cuda::emulated::Wait::kBlock, __FILE__, \
                                                 __LINE__)
#define __syncwarp()                                                                              \
  ::fathom::cuda::emulated::Machine::here().wait(::fathom::cuda::emulated::Wait::kWarp, __FILE__, \
                                                 __LINE__)
#define __shfl_sync(mask, value, from) \
  ::fathom::cuda::emulated::shuffle(value, from, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits)                                                      \
  ::fathom::cuda::emulated::shuffle(value, ::fathom::cuda::emulated::lane() ^ (bits), __FILE__, \
                                    __LINE__)
#define __ballot_sync(mask, value) ::fathom::cuda::emulated::ballot(value, __FILE__, __LINE__)

inline int atomicAdd(int* at, int value) {
  return std::exchange(*at, *at + value);
}
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i)
    sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return sum;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (which & 7)) & 255);
    if (which & 8) byte = byte & 128 ? 255 : 0;  // its sign, everywhere
    out |= byte << (8 * i);
  }
  return out;
}
inline int __popc(uint32_t bits) {
  return __builtin_popcount(bits);
}
