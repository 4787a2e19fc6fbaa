// The emulation itself: that it runs blocks, warps and barriers as a GPU would, and that each kind
// of mistake it promises to find is found.
#include "cuda/emulation.h"

#include <catch2/catch.hpp>
#include <random>
#include <vector>

#include "cuda/device_code.h"
#include "fathom/tensor.hpp"

namespace fathom::cuda {
namespace {

using emulated::Machine;
using emulated::Order;

constexpr Order kOrders[] = {Order::kForward, Order::kBackward, Order::kMixed};

struct OrderGuard {
  explicit OrderGuard(Order order) { Machine::here().order = order; }
  ~OrderGuard() { Machine::here().order = Order::kForward; }
};

struct Args {
  float* in;
  float* out;
  int n;
  int mistake = 0;
};

float* shared_floats() {
  return reinterpret_cast<float*>(shared_memory());
}

// out[block] = sum of the block's values, through shared memory; `mistake` leaves a barrier out.
__global__ void sum_kernel(Args p) {
  float* shared = shared_floats();
  const int i = int(threadIdx.x);
  shared[i] = p.in[int(blockIdx.x) * p.n + i];
  if (p.mistake != 1) __syncthreads();
  for (int step = p.n / 2; step > 0; step /= 2) {
    if (i < step) shared[i] += shared[i + step];
    __syncthreads();
  }
  if (i == 0) p.out[blockIdx.x] = shared[0];
}

std::string failure() {
  return Machine::here().take_failure();
}

TEST_CASE("a block's sum through shared memory, in any order", "[cuda][emulation]") {
  for (const Order order : kOrders) {
    const OrderGuard guard(order);
    for (const int n : {32, 64, 256, 1024}) {
      std::vector<float> in(static_cast<size_t>(3 * n)), out(3);
      for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 97);
      const auto threads = static_cast<unsigned>(n);
      REQUIRE(launch(sum_kernel, {3, 1, 1}, threads, threads * 4, nullptr,
                     Args{in.data(), out.data(), n}) == 0);
      for (size_t b = 0; b < 3; ++b) {
        float expected = 0;
        for (size_t i = 0; i < threads; ++i) expected += in[b * threads + i];
        CHECK(out[b] == expected);
      }
    }
  }
}

TEST_CASE("a missing barrier reads what nobody wrote", "[cuda][emulation]") {
  const OrderGuard guard(Order::kForward);  // low threads add before high threads have written
  std::vector<float> in(64, 1.0f), out(1);
  REQUIRE(launch(sum_kernel, {1, 1, 1}, 64, 64 * 4, nullptr, Args{in.data(), out.data(), 64, 1}) ==
          0);
  CHECK(std::isnan(out[0]));
}

__global__ void divergent_kernel(Args p) {
  if (p.mistake == 1 && threadIdx.x == 5) return;
  if (p.mistake == 2 && threadIdx.x % 2 == 1) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (p.mistake == 3 && threadIdx.x >= 16) return;
  p.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, float(threadIdx.x), 1);
  if (p.mistake == 4 && threadIdx.x < 32) __syncthreads();
}

TEST_CASE("threads that do not meet are found and named", "[cuda][emulation]") {
  for (const Order order : kOrders) {
    const OrderGuard guard(order);
    std::vector<float> out(64);
    for (int mistake = 0; mistake <= 4; ++mistake) {
      const int e = launch(divergent_kernel, {1, 1, 1}, 64, 0, nullptr,
                           Args{nullptr, out.data(), 64, mistake});
      const std::string text = failure();
      INFO(mistake << ": " << text);
      CHECK((e == 0) == (mistake == 0));
      CHECK(text.empty() == (mistake == 0));
      if (mistake > 0) CHECK(text.find("thread (") != std::string::npos);
    }
  }
}

TEST_CASE("after a failure nothing runs until it is taken", "[cuda][emulation]") {
  std::vector<float> out(64, 7.0f);
  CHECK(launch(divergent_kernel, {1, 1, 1}, 64, 0, nullptr, Args{nullptr, out.data(), 64, 1}) != 0);
  CHECK(launch(divergent_kernel, {1, 1, 1}, 64, 0, nullptr, Args{nullptr, out.data(), 64, 0}) != 0);
  CHECK(out[40] == 7.0f);
  CHECK_FALSE(failure().empty());
  CHECK(launch(divergent_kernel, {1, 1, 1}, 64, 0, nullptr, Args{nullptr, out.data(), 64, 0}) == 0);
  CHECK(out[40] == 41.0f);
}

TEST_CASE("launches that a GPU refuses are refused", "[cuda][emulation]") {
  const Args args{nullptr, nullptr, 0};
  CHECK(launch(sum_kernel, {0, 1, 1}, 32, 0, nullptr, args) != 0);
  CHECK_FALSE(failure().empty());
  CHECK(launch(sum_kernel, {1, 1, 1}, 1056, 0, nullptr, args) != 0);
  CHECK_FALSE(failure().empty());
  CHECK(launch(sum_kernel, {1, 70000, 1}, 32, 0, nullptr, args) != 0);
  CHECK_FALSE(failure().empty());
  CHECK(launch(sum_kernel, {1, 1, 1}, 32, 300 << 10, nullptr, args) != 0);
  CHECK_FALSE(failure().empty());
}

// ---- the tensor core's product and the transposing load ----

constexpr int kM = 16, kN = 8, kK = 16;
struct MmaArgs {
  const uint16_t* a;         // [kM, kK]
  const uint16_t* b;         // [kK, kN]
  const uint16_t* b_turned;  // [kN, kK]
  float* out;                // [kM, kN]
  bool load;
};

__global__ void mma_kernel(MmaArgs p) {
  auto* tile = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = lane; i < kK * kN; i += 32) tile[i] = p.b[i];
  __syncwarp();
  const auto pair = [](const uint16_t* at) { return uint32_t(at[0]) | uint32_t(at[1]) << 16; };
  const uint32_t a[4] = {pair(p.a + g * kK + 2 * t), pair(p.a + (g + 8) * kK + 2 * t),
                         pair(p.a + g * kK + 2 * t + 8), pair(p.a + (g + 8) * kK + 2 * t + 8)};
  uint32_t b[2] = {pair(p.b_turned + g * kK + 2 * t), pair(p.b_turned + g * kK + 2 * t + 8)};
  if (p.load) load_transposed(b, tile + lane % 16 * kN);
  float d[4] = {};
  mma_bf16(d, a, b);
  for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * kN + 2 * t + i % 2] = d[i];
}

TEST_CASE("mma and the transposing load are a matrix product", "[cuda][emulation]") {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> a(kM * kK), b(kK * kN), turned(kK * kN);
  for (uint16_t& v : a) v = f32_to_bf16(normal(random));
  for (uint16_t& v : b) v = f32_to_bf16(normal(random));
  for (int k = 0; k < kK; ++k)
    for (int n = 0; n < kN; ++n)
      turned[static_cast<size_t>(n * kK + k)] = b[static_cast<size_t>(k * kN + n)];
  for (const bool load : {false, true}) {
    std::vector<float> out(kM * kN);
    REQUIRE(launch(mma_kernel, {1, 1, 1}, 32, kK * kN * 2, nullptr,
                   MmaArgs{a.data(), b.data(), turned.data(), out.data(), load}) == 0);
    for (int m = 0; m < kM; ++m)
      for (int n = 0; n < kN; ++n) {
        double sum = 0;
        for (int k = 0; k < kK; ++k)
          sum += double(bf16_to_f32(a[static_cast<size_t>(m * kK + k)])) *
                 bf16_to_f32(b[static_cast<size_t>(k * kN + n)]);
        INFO(m << ", " << n << (load ? " loaded" : ""));
        CHECK(std::fabs(out[static_cast<size_t>(m * kN + n)] - sum) < 1e-5);
      }
  }
}

// Four floats go to shared memory beside the thread's work; `mistake` leaves out what is needed.
__global__ void async_kernel(Args p) {
  float* shared = shared_floats();
  const int i = int(threadIdx.x);
  for (int stage = 0; stage < 2; ++stage) {
    copy_async16(shared + stage * 4 * p.n + 4 * i, p.in + stage * 4 * p.n + 4 * i);
    commit_copies();
  }
  if (p.mistake != 1) wait_copies<1>();  // for the first of two
  if (p.mistake == 0) __syncthreads();
  const int neighbour = (i + 1) % p.n;
  if (p.mistake != 3) p.out[i] = shared[4 * neighbour];
  if (p.mistake != 2) wait_copies<0>();
}

TEST_CASE("copies that run beside a thread are there when they were waited for",
          "[cuda][emulation]") {
  for (const Order order : kOrders) {
    const OrderGuard guard(order);
    const int n = 64;
    std::vector<float> in(static_cast<size_t>(8 * n)), out(static_cast<size_t>(n));
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
    const auto run = [&](int mistake) {
      launch(async_kernel, {1, 1, 1}, 64, 8 * 64 * 4, nullptr,
             Args{in.data(), out.data(), n, mistake});
      return failure();
    };
    CHECK(run(0).empty());
    for (int i = 0; i < n; ++i)
      CHECK(out[static_cast<size_t>(i)] == static_cast<float>(4 * ((i + 1) % n)));
    run(1);                                                   // not waited for: what nobody wrote
    if (order == Order::kForward) CHECK(std::isnan(out[0]));  // its neighbour comes later
    CHECK_THAT(run(2), Catch::Contains("copies that it did not wait for"));
  }
}

}  // namespace
}  // namespace fathom::cuda
