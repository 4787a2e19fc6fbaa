// Packing and unpacking: what was stored comes back bit for bit, on every instruction set.
#include "cpu_weights.h"

using namespace fathom;
using namespace fathom::cpu_test;

namespace {

bool same_bits(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// -0 and 0 are the same weight: a zero scale times a negative code.
bool same_weight(float a, float b) {
  return same_bits(a, b) || (a == 0 && b == 0);
}

void check_unpacked(const cpu::CpuContext& ctx, const TestWeight& t, int64_t index, int64_t col0,
                    int64_t n_cols) {
  const Weight& w = t.weight;
  AlignedBytes memory = aligned_bytes(n_cols * 16 * 4);
  const auto* panel = reinterpret_cast<float*>(memory.get());
  for (int64_t g = 0; g < cpu::row_groups(w); ++g) {
    cpu::unpack_rows16(ctx, w, index, g, col0, n_cols, const_cast<float*>(panel));
    for (int64_t k = 0; k < n_cols; ++k) {
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t row = 16 * g + r;
        const float want = row < w.rows ? t.row(index, row)[col0 + k] : 0.0f;
        const float got = panel[k * 16 + r];
        if (same_weight(got, want)) continue;
        FAIL_CHECK("row " << row << " column " << col0 + k << ": " << got << ", expected " << want);
        return;
      }
    }
  }
  SUCCEED();
}

}  // namespace

TEST_CASE("weights of every type come back bit for bit", "[cpu][weights]") {
  for (const cpu::Isa isa : runnable_isas()) {
    const TestContext test = make_context(isa, Numerics::kExact, 1);
    for (const DType dtype : weight_dtypes()) {
      for (const int64_t rows : {1, 15, 16, 33}) {
        Rng rng(7);
        const int64_t cols = whole_blocks(dtype, rows == 33 ? 600 : 76);
        const TestWeight t = random_weight(rng, dtype, rows, cols, 2);
        INFO(test.ctx.matmul->name << " " << dtype_info(dtype).name << " " << rows << " x "
                                   << cols);
        for (int64_t index : {0, 1}) check_unpacked(test.ctx, t, index, 0, cols);
        check_unpacked(test.ctx, t, 1, 32, cols - 32 - cols % 32);
        AlignedBytes memory = aligned_bytes((rows + 15) / 16 * 16 * cols * 4);
        auto* tile = reinterpret_cast<float*>(memory.get());
        cpu::unpack_tile(test.ctx, t.weight, 1, 0, rows, 0, cols, tile, cols);
        int64_t wrong = 0;
        for (int64_t i = 0; i < rows * cols; ++i) wrong += !same_weight(tile[i], t.row(1, 0)[i]);
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("block scales multiply 128 by 128 weights", "[cpu][weights]") {
  for (const cpu::Isa isa : runnable_isas()) {
    const TestContext test = make_context(isa, Numerics::kExact, 1);
    Rng rng(8);
    const TestWeight t = random_weight(rng, DType::kF8E4M3, 150, 300, 2, true);
    INFO(test.ctx.matmul->name);
    check_unpacked(test.ctx, t, 1, 0, 300);
    check_unpacked(test.ctx, t, 0, 100, 101);
  }
}

TEST_CASE("every FP8 code is decoded as the reference does", "[cpu][weights]") {
  uint8_t codes[256];
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
  for (const cpu::Isa isa : runnable_isas()) {
    float got[256];
    cpu::matmul_kernels(isa).widen[cpu::kPlainF8](codes, 256, 1.0f, got);
    for (int i = 0; i < 256; ++i) {
      const float want = e4m3_to_f32(codes[i]);
      INFO(cpu::matmul_kernels(isa).name << " code " << i);
      CHECK((same_bits(got[i], want) || (std::isnan(got[i]) && std::isnan(want))));
    }
  }
}

TEST_CASE("packed weights take no more than the file, scales aside", "[cpu][weights]") {
  for (const DType dtype : weight_dtypes()) {
    Weight w{.dtype = dtype, .rows = 64, .cols = 2048};
    REQUIRE(cpu::weight_layout(w).ok());
    INFO(dtype_info(dtype).name);
    CHECK(w.matrix_bytes <= 64 * row_bytes(dtype, 2048) * 1.03);
    CHECK(w.matrix_bytes >= 64 * row_bytes(dtype, 2048));
    CHECK(w.matrix_bytes % 64 == 0);
  }
}

TEST_CASE("rows may be stored in any pieces of 16", "[cpu][weights]") {
  for (const DType dtype : {DType::kQ4_K, DType::kBF16}) {
    Rng rng(9);
    const TestWeight whole = random_weight(rng, dtype, 53, 512);
    Weight w = whole.weight;
    const AlignedBytes memory = aligned_bytes(w.matrix_bytes);
    w.data = memory.get();
    const int64_t bytes = row_bytes(dtype, 512);
    for (const auto& [first, n] : {std::pair{48, 5}, std::pair{0, 32}, std::pair{32, 16}})
      REQUIRE(
          cpu::store_rows(store_threads(), w, 0, first, n, whole.file.data() + first * bytes).ok());
    const int64_t used = cpu::is_packed(w) ? w.matrix_bytes : 53 * bytes;
    CHECK(std::memcmp(memory.get(), whole.memory.get(), static_cast<size_t>(used)) == 0);
  }
}

TEST_CASE("threads share the storing of many rows and change nothing", "[cpu][weights]") {
  for (const DType dtype : {DType::kQ5_0, DType::kQ3_K, DType::kF16}) {
    Rng rng(11);
    const int64_t rows = 1000 + 7, cols = 512;
    const TestWeight whole = random_weight(rng, dtype, rows, cols);
    const auto alone = cpu::ThreadPool::create(1), several = cpu::ThreadPool::create(5);
    const int64_t used =
        cpu::is_packed(whole.weight) ? whole.weight.matrix_bytes : rows * row_bytes(dtype, cols);
    for (const auto* pool : {&alone, &several}) {
      Weight w = whole.weight;
      const AlignedBytes memory = aligned_bytes(w.matrix_bytes);
      w.data = memory.get();
      REQUIRE(cpu::store_rows(*pool->value(), w, 0, 0, rows, whole.file.data()).ok());
      CHECK(std::memcmp(memory.get(), whole.memory.get(), static_cast<size_t>(used)) == 0);
    }
  }
}

TEST_CASE("what cannot be stored is refused with numbers", "[cpu][weights]") {
  Weight w{.dtype = DType::kI32, .rows = 4, .cols = 4};
  CHECK(cpu::weight_layout(w).code() == Code::kUnsupported);
  w = {.dtype = DType::kQ4_K, .rows = 4, .cols = 100};
  const Status ragged = cpu::weight_layout(w);
  CHECK(ragged.code() == Code::kInvalidArgument);
  CHECK(std::string(ragged.message()).find("4 x 100") != std::string::npos);
  w = {.dtype = DType::kBF16, .block_scaled = true, .rows = 4, .cols = 4};
  CHECK(cpu::weight_layout(w).code() == Code::kUnsupported);

  Rng rng(10);
  const TestWeight t = random_weight(rng, DType::kQ8_0, 40, 64, 2);
  const void* file = t.file.data();
  CHECK(cpu::store_rows(store_threads(), t.weight, 0, 8, 16, file).code() ==
        Code::kInvalidArgument);  // start
  CHECK(cpu::store_rows(store_threads(), t.weight, 0, 0, 20, file).code() ==
        Code::kInvalidArgument);  // length
  CHECK(cpu::store_rows(store_threads(), t.weight, 0, 32, 16, file).code() ==
        Code::kInvalidArgument);  // end
  CHECK(cpu::store_rows(store_threads(), t.weight, 2, 0, 16, file).code() ==
        Code::kInvalidArgument);  // matrix
  CHECK(cpu::store_rows(store_threads(), t.weight, 1, 32, 8, file).ok());
  CHECK(cpu::store_scales(t.weight, 0, t.values.data()).code() == Code::kInvalidArgument);
}
