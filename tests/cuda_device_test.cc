// The CUDA backend through its plug-in and the Backend interface alone, with all operands in device
// memory, against the scalar CPU backend.  FATHOM_TEST_CUDA_PLUGIN names a plug-in (`cmake/dev test
// cuda` names libfathom_cuda.so, on a machine with a GPU); otherwise the emulated one is tested.
// FATHOM_TEST_CUDA_SMALL keeps operands small on a GPU too, for compute-sanitizer.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu_weights.h"
#include "cuda_compare.h"
#include "cuda_test_plugin.h"

using namespace fathom;
using cpu_test::random_values;
using cpu_test::random_weight;
using cpu_test::Rng;
using cuda_test::real_gpu;
using cuda_test::size_of;

namespace {

// Device memory with what a host vector has.
class Buffer {
 public:
  Buffer(Backend& device, const void* data, int64_t bytes) : device_(device), bytes_(bytes) {
    reserved_ = std::max<int64_t>(1, (bytes + device.granularity() - 1) / device.granularity()) *
                device.granularity();
    auto base = device.reserve(reserved_);
    REQUIRE(base.ok());
    base_ = *base;
    REQUIRE(device.commit(base_, 0, reserved_).ok());
    if (data != nullptr) REQUIRE(device.upload(base_, data, bytes).ok());
  }
  template <class T>
  Buffer(Backend& device, const std::vector<T>& values)
      : Buffer(device, values.data(), static_cast<int64_t>(values.size() * sizeof(T))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { device_.release(base_, reserved_); }

  template <class T = float>
  T* data() const {
    return static_cast<T*>(base_);
  }
  int64_t bytes() const { return bytes_; }
  std::vector<float> floats() const {
    std::vector<float> values(static_cast<size_t>(bytes_ / 4));
    REQUIRE(device_.download(values.data(), base_, bytes_).ok());
    return values;
  }

 private:
  Backend& device_;
  void* base_ = nullptr;
  int64_t bytes_, reserved_;
};

struct Pair {
  std::unique_ptr<Backend> gpu, cpu;
  explicit Pair(Numerics numerics)
      : gpu(cuda_test::open_device(numerics)), cpu(cuda_test::make_scalar()) {}

  // Runs an operation that needs a workspace, and waits for it.
  template <class Params, class Run>
  void run(const Params& p, Run&& body) {
    const Buffer space(*gpu, nullptr, gpu->workspace_bytes(p));
    const OpContext op{space.data<void>(), space.bytes()};
    body(op);
    sync(op);
  }
  void sync(const OpContext& op = {}) {
    const Status status = gpu->sync(op);
    INFO(status.message());
    REQUIRE(status.ok());
  }
};

struct Stored {
  Weight weight;
  std::unique_ptr<Buffer> memory;
};
Stored store(Backend& gpu, const cpu_test::TestWeight& t) {
  Stored s{t.weight, nullptr};
  REQUIRE(gpu.weight_layout(s.weight).ok());
  s.memory = std::make_unique<Buffer>(gpu, nullptr, s.weight.matrix_bytes * s.weight.count);
  s.weight.data = s.memory->data<void>();
  const int64_t bytes = t.weight.rows * row_bytes(t.weight.dtype, t.weight.cols);
  const int64_t blocks = (t.weight.rows + 127) / 128 * ((t.weight.cols + 127) / 128);
  for (int64_t m = 0; m < t.weight.count; ++m) {
    REQUIRE(gpu.store_rows(s.weight, m, 0, t.weight.rows, t.file.data() + m * bytes).ok());
    if (t.weight.block_scaled)
      REQUIRE(gpu.store_scales(s.weight, m, t.scales.data() + m * blocks).ok());
  }
  return s;
}

// Small without a GPU and under a sanitizer: both are slow.
bool full_size() {
  return real_gpu() && std::getenv("FATHOM_TEST_CUDA_SMALL") == nullptr;
}
int64_t scaled(int64_t small, int64_t full) {
  return full_size() ? full : small;
}

}  // namespace

TEST_CASE("device memory: zeroed, kept, grown in place, given back", "[cuda][device]") {
  const auto gpu = cuda_test::open_device(Numerics::kFast);
  const int64_t unit = gpu->granularity();
  auto base = gpu->reserve(8 * unit);
  REQUIRE(base.ok());
  REQUIRE(gpu->commit(*base, 0, 2 * unit).ok());
  auto* first = static_cast<float*>(*base);
  std::vector<float> got(16, 1.0f);
  REQUIRE(gpu->download(got.data(), first, 64).ok());
  CHECK(std::all_of(got.begin(), got.end(), [](float v) { return v == 0; }));
  std::vector<float> values(16, 2.5f);
  REQUIRE(gpu->upload(first + unit / 4, values.data(), 64).ok());
  const int64_t free_before = gpu->memory().free_bytes;
  REQUIRE(gpu->commit(*base, 2 * unit, 6 * unit).ok());  // grows; nothing moves
  CHECK(free_before - gpu->memory().free_bytes >= 6 * unit);
  REQUIRE(gpu->download(got.data(), first + unit / 4, 64).ok());
  CHECK(got == values);
  gpu->decommit(*base, 3 * unit, 2 * unit);  // a part of what was committed at once
  REQUIRE(gpu->commit(*base, 3 * unit, unit).ok());
  REQUIRE(gpu->download(got.data(), first + unit / 4, 64).ok());
  CHECK(got == values);
  gpu->release(*base, 8 * unit);
  CHECK(gpu->memory().free_bytes >= free_before);
}

TEST_CASE("every FP8 code and f16 has its value on the device", "[cuda][device]") {
  Pair test(Numerics::kExact);
  for (const DType dtype : {DType::kF8E4M3, DType::kF16, DType::kBF16}) {
    const int64_t bytes = dtype == DType::kF8E4M3 ? 1 : 2, n = int64_t{1} << (8 * bytes);
    const int64_t cols = 256, rows = n / cols;
    Weight weight{.dtype = dtype, .rows = rows, .cols = cols};
    REQUIRE(test.gpu->weight_layout(weight).ok());
    const Buffer memory(*test.gpu, nullptr, weight.matrix_bytes);
    weight.data = memory.data<void>();
    std::vector<uint8_t> codes(static_cast<size_t>(n * bytes));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t b = 0; b < bytes; ++b)
        codes[static_cast<size_t>(i * bytes + b)] = static_cast<uint8_t>(i >> (8 * b));
    REQUIRE(test.gpu->store_rows(weight, 0, 0, rows, codes.data()).ok());
    std::vector<int32_t> ids;
    for (int32_t row = 0; row < rows; ++row) ids.push_back(row);
    const Buffer out(*test.gpu, nullptr, n * 4);
    test.gpu->embed({}, {ids.data(), rows, &weight, out.data()});
    test.sync();
    const std::vector<float> got = out.floats();
    int64_t n_wrong = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float v = got[static_cast<size_t>(i)];
      const auto bits = static_cast<uint16_t>(i);
      const float expected = dtype == DType::kF8E4M3 ? e4m3_to_f32(static_cast<uint8_t>(i))
                             : dtype == DType::kF16  ? f16_to_f32(bits)
                                                     : bf16_to_f32(bits);
      n_wrong += std::memcmp(&v, &expected, 4) != 0 && !(std::isnan(v) && std::isnan(expected));
    }
    INFO(dtype_info(dtype).name);
    CHECK(n_wrong == 0);
  }
}

TEST_CASE("more memory than there is is refused, and the device goes on", "[cuda][device]") {
  const auto gpu = cuda_test::open_device(Numerics::kFast);
  const int64_t unit = gpu->granularity();
  const int64_t bytes = (gpu->memory().total_bytes / unit + 1) * unit;
  auto base = gpu->reserve(bytes);
  if (base.ok()) {
    const Status status = gpu->commit(*base, 0, bytes);
    CHECK(status.code() == Code::kMemory);
    gpu->release(*base, bytes);
  } else {
    CHECK(base.status().code() == Code::kMemory);  // a driver without address ranges
  }
  const Buffer buffer(*gpu, std::vector<float>(8, 3.0f));
  CHECK(buffer.floats() == std::vector<float>(8, 3.0f));
}

TEST_CASE("products on the device", "[cuda][device]") {
  Rng rng(91);
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
    Pair pair(numerics);
    for (const DType dtype :
         {DType::kF32, DType::kBF16, DType::kF16, DType::kF8E4M3, DType::kQ8_0, DType::kQ4_0,
          DType::kQ4_K, DType::kQ5_K, DType::kQ6_K, DType::kIQ4_XS}) {
      const int64_t rows = scaled(40, 1000), cols = scaled(256, 1536);
      const auto t = random_weight(rng, dtype, rows, cols, 1, dtype == DType::kF8E4M3);
      const Stored w = store(*pair.gpu, t);
      for (const int64_t n : {int64_t{1}, int64_t{7}, int64_t{20}, scaled(64, 300)}) {
        const auto x = random_values(rng, n * cols, 1 / std::sqrt(float(cols)));
        std::vector<float> expected(static_cast<size_t>(n * rows));
        const MatmulParams host{x.data(), cols, n, &t.weight, expected.data(), rows};
        const cpu_test::GuardedWorkspace space(pair.cpu->workspace_bytes(host));
        pair.cpu->matmul(space.op(), host);
        const Buffer gpu_x(*pair.gpu, x), gpu_out(*pair.gpu, std::vector<float>(expected.size()));
        const MatmulParams p{gpu_x.data(), cols, n, &w.weight, gpu_out.data(), rows};
        pair.run(p, [&](const OpContext& op) { pair.gpu->matmul(op, p); });
        // Few rows are rounded for integer codes, many for tensor cores.
        const bool exact =
            numerics == Numerics::kExact || (n <= 8 && dtype_info(dtype).block_elements == 1);
        cuda_test::check_close(std::string(dtype_info(dtype).name) + " rows " + std::to_string(n),
                               gpu_out.floats(), expected,
                               (exact ? 1e-5 : 0.02) * (size_of(expected) + 1));
      }
    }
  }
}

TEST_CASE("append and both forms of attention on the device", "[cuda][device]") {
  Rng rng(92);
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const int64_t n_heads : {int64_t{1}, int64_t{16}, scaled(20, 128)})
      for (const KvType type :
           {KvType::kBF16, KvType::kF16, KvType::kF8, KvType::kQ8_0, KvType::kQ4_0}) {
        const bool chosen = n_heads > 16 && (type == KvType::kF16 || type == KvType::kQ4_0);
        if (!full_size() && !chosen) continue;  // cuda_attention_test has the others
        Pair pair(numerics);
        const KvLayout layout{64, scaled(64, 512), scaled(16, 64)};
        const int64_t rank = layout.kv_lora_rank, rope = layout.qk_rope_head_dim;
        const int64_t n_rows = scaled(300, 1900), n_tokens = 3, row = rank + rope;
        const int64_t n_pages = (n_rows + 63) / 64, page = layout.page_bytes(type, 1);
        const Buffer memory(*pair.gpu, nullptr, n_pages * page);
        const cpu_test::AlignedBytes host_memory = cpu_test::aligned_bytes(n_pages * page);
        std::vector<KvPage> pages, host_pages;
        for (int64_t i = 0; i < n_pages; ++i) {
          pages.push_back({memory.data<std::byte>() + i * page, type});
          host_pages.push_back({host_memory.get() + i * page, type});
        }
        const auto kv = random_values(rng, n_rows * row), weight = random_values(rng, rank);
        std::vector<float> cos_sin;
        for (int64_t i = 0; i < n_rows * rope / 2; ++i) {
          cos_sin.push_back(std::cos(float(i % 628) / 100));
          cos_sin.push_back(std::sin(float(i % 628) / 100));
        }
        const Buffer gpu_kv(*pair.gpu, kv), gpu_weight(*pair.gpu, weight),
            gpu_cs(*pair.gpu, cos_sin);
        pair.gpu->kv_append({}, {gpu_kv.data(),
                                 row,
                                 gpu_weight.data(),
                                 1e-6f,
                                 gpu_cs.data(),
                                 {pages.data(), layout, 0, 0, n_rows}});
        pair.cpu->kv_append({}, {kv.data(),
                                 row,
                                 weight.data(),
                                 1e-6f,
                                 cos_sin.data(),
                                 {host_pages.data(), layout, 0, 0, n_rows}});
        pair.sync();

        const int64_t columns = n_tokens * n_heads;
        const auto q = random_values(rng, columns * row);
        std::vector<float> expected(static_cast<size_t>(columns * rank)),
            state(static_cast<size_t>(columns));
        std::vector<float> state2 = state;
        AttendAbsorbedParams host{.q_latent = q.data(),
                                  .q_latent_token_stride = n_heads * row,
                                  .q_latent_head_stride = row,
                                  .q_rope = q.data() + rank,
                                  .q_rope_token_stride = n_heads * row,
                                  .q_rope_head_stride = row,
                                  .n_tokens = n_tokens,
                                  .n_heads = n_heads,
                                  .first_position = n_rows - n_tokens,
                                  .scale = 0.3f / std::sqrt(float(rank)),
                                  .rows = {host_pages.data(), layout, 0, 0, n_rows},
                                  .state = {state.data(), state2.data()},
                                  .out = expected.data()};
        const cpu_test::GuardedWorkspace space(pair.cpu->workspace_bytes(host));
        pair.cpu->attend_absorbed(space.op(), host);
        const Buffer gpu_q(*pair.gpu, q), out(*pair.gpu, expected), max(*pair.gpu, state),
            sum(*pair.gpu, state);
        AttendAbsorbedParams p = host;
        p.q_latent = gpu_q.data();
        p.q_rope = gpu_q.data() + rank;
        p.rows.pages = pages.data();
        p.state = {max.data(), sum.data()};
        p.out = out.data();
        pair.run(p, [&](const OpContext& op) { pair.gpu->attend_absorbed(op, p); });
        cuda_test::check_close(
            "absorbed " + std::string(kv_type_name(type)) + " heads " + std::to_string(n_heads),
            out.floats(), expected, numerics == Numerics::kExact ? 5e-5 : 0.03);

        const int64_t nope = scaled(32, 128), value = scaled(32, 128);
        const auto k_b = random_weight(rng, DType::kQ8_0, nope, rank, n_heads);
        const auto v_b = random_weight(rng, DType::kQ8_0, value, rank, n_heads);
        const Stored gpu_k = store(*pair.gpu, k_b), gpu_v = store(*pair.gpu, v_b);
        const auto queries = random_values(rng, columns * (nope + rope));
        std::vector<float> wanted(static_cast<size_t>(columns * value));
        AttendExpandedParams h{.q = queries.data(),
                               .q_token_stride = n_heads * (nope + rope),
                               .q_head_stride = nope + rope,
                               .n_tokens = n_tokens,
                               .n_heads = n_heads,
                               .qk_nope_head_dim = nope,
                               .v_head_dim = value,
                               .first_position = n_rows - n_tokens,
                               .scale = 0.1f / std::sqrt(float(rank)),
                               .k_b = &k_b.weight,
                               .k_b_transposed = true,
                               .v_b = &v_b.weight,
                               .rows = host.rows,
                               .state = {state.data(), state2.data()},
                               .out = wanted.data()};
        const cpu_test::GuardedWorkspace space2(pair.cpu->workspace_bytes(h));
        pair.cpu->attend_expanded(space2.op(), h);
        const Buffer gpu_queries(*pair.gpu, queries), out2(*pair.gpu, wanted);
        AttendExpandedParams e = h;
        e.q = gpu_queries.data();
        e.k_b = &gpu_k.weight;
        e.v_b = &gpu_v.weight;
        e.rows.pages = pages.data();
        e.state = {max.data(), sum.data()};
        e.out = out2.data();
        pair.run(e, [&](const OpContext& op) { pair.gpu->attend_expanded(op, e); });
        cuda_test::check_close(
            "expanded " + std::string(kv_type_name(type)) + " heads " + std::to_string(n_heads),
            out2.floats(), wanted, (numerics == Numerics::kExact ? 5e-5 : 0.02) * size_of(wanted));
      }
}

TEST_CASE("experts on the device", "[cuda][device]") {
  Rng rng(93);
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast}) {
    Pair pair(numerics);
    const int64_t n_experts = 8, hidden = 256, inner = 256, k = 2;
    const auto gate = random_weight(rng, DType::kQ4_K, inner, hidden, n_experts);
    const auto up = random_weight(rng, DType::kQ4_K, inner, hidden, n_experts);
    const auto down = random_weight(rng, DType::kQ6_K, hidden, inner, n_experts);
    const Stored g = store(*pair.gpu, gate), u = store(*pair.gpu, up), d = store(*pair.gpu, down);
    for (const int64_t n : {int64_t{1}, scaled(40, 400)}) {
      std::vector<int32_t> ids;
      for (int64_t i = 0; i < n * k; ++i) ids.push_back(static_cast<int32_t>(rng() % n_experts));
      const auto weights = random_values(rng, n * k), x = random_values(rng, n * hidden, 0.06f);
      std::vector<float> expected(static_cast<size_t>(n * hidden), 0.5f);
      const Buffer gpu_ids(*pair.gpu, ids), gpu_weights(*pair.gpu, weights), gpu_x(*pair.gpu, x),
          out(*pair.gpu, expected);
      ExpertsParams p{gpu_x.data(),       n,         gpu_ids.data<int32_t>(),
                      gpu_weights.data(), k,         &g.weight,
                      &u.weight,          &d.weight, out.data()};
      pair.run(p, [&](const OpContext& op) { pair.gpu->experts(op, p); });
      const ExpertsParams h{x.data(),     n,          ids.data(),   weights.data(), k,
                            &gate.weight, &up.weight, &down.weight, expected.data()};
      const cpu_test::GuardedWorkspace space(pair.cpu->workspace_bytes(h));
      pair.cpu->experts(space.op(), h);
      cuda_test::check_close(
          "experts", out.floats(), expected,
          (numerics == Numerics::kExact ? 1e-5 : 0.02) * (size_of(expected) + 1));
    }
  }
}
