// The AMX kernels over emulated tiles: the same source as in the AMX table, against scalar.
#include "cpu_weights.h"

#include "cpu_simd_plain.h"
// The bodies are written in the names above.
#include "cpu/matmul_body.h"
// And this one in those of the body.
#include "cpu/amx_body.h"

using namespace fathom;
using namespace fathom::cpu_test;

TEST_CASE("AMX integer products equal the scalar ones", "[cpu][amx]") {
  const cpu::MatmulKernels amx = cpu::amx_table();
  const cpu::MatmulKernels& scalar = cpu::matmul_kernels(cpu::Isa::kScalar);
  for (const DType dtype : weight_dtypes()) {
    if (cpu::packed_type(dtype) == cpu::kPackedTypes) continue;
    for (const int64_t n_rows : {1, 11, 12, 16, 17, 63, 64, 65, 130}) {
      Rng rng(61);
      const int64_t cols = 512, rows = 40;
      const TestWeight t = random_weight(rng, dtype, rows, cols);
      const std::vector<float> x = random_values(rng, n_rows * cols);
      std::vector<cpu::XBlock> blocks(static_cast<size_t>(n_rows * cols / 32));
      scalar.quantize(x.data(), n_rows * cols, blocks.data());
      std::vector<int32_t> order(static_cast<size_t>(n_rows));
      for (size_t i = 0; i < order.size(); ++i)
        order[i] = static_cast<int32_t>(i * 7 % order.size());
      const cpu::PackedType type = cpu::packed_type(dtype);
      for (const bool chosen : {false, true}) {
        const auto size = static_cast<size_t>(n_rows * (rows + 3));
        std::vector<float> want(size, 1.0f), got(size, 1.0f);
        cpu::Int8Product p{.weights = reinterpret_cast<const uint8_t*>(t.memory.get()),
                           .n_groups = 3,
                           .n_blocks = cols / cpu::kPackedBlocks[type].cols,
                           .x = blocks.data(),
                           .x_stride = cols / 32,
                           .rows = chosen ? order.data() : nullptr,
                           .n_rows = n_rows,
                           .out = want.data(),
                           .out_stride = rows + 3,
                           .n_cols = rows,
                           .add = chosen};
        scalar.int8_product[type](p);
        p.out = got.data();
        amx.int8_product[type](p);
        CHECK(cpu::tiles.k == 0);  // released
        Expected expected;
        for (const float v : want) expected.add(v, 1e-5 * std::fabs(v) + 2e-3);
        expected.check(got, "amx " + std::string(dtype_info(dtype).name) + " rows " +
                                std::to_string(n_rows) + (chosen ? " chosen" : ""));
      }
    }
  }
}

TEST_CASE("the AMX table serves all operations", "[cpu][amx]") {
  const cpu::MatmulKernels amx = cpu::amx_table();
  CHECK(std::string(amx.name) == "amx");
  TestContext test = make_context(cpu::Isa::kScalar, Numerics::kFast, 1);  // one emulated unit
  test.ctx.matmul = &amx;
  Rng rng(62);
  const TestWeight t = random_weight(rng, DType::kQ4_K, 50, 256);
  for (const int64_t n_rows : {1, 20, 150}) {
    const std::vector<float> x = random_values(rng, n_rows * 256);
    std::vector<float> out(static_cast<size_t>(n_rows * 50));
    const MatmulParams p{.x = x.data(),
                         .x_stride = 256,
                         .n_rows = n_rows,
                         .w = &t.weight,
                         .out = out.data(),
                         .out_stride = 50};
    const GuardedWorkspace space(cpu::workspace_bytes(test.ctx, p));
    cpu::matmul(test.ctx, space.op(), p);
    space.check();
    Expected expected;
    for (int64_t i = 0; i < n_rows; ++i)
      for (int64_t c = 0; c < 50; ++c)
        expected.add(dot(x.data() + i * 256, t.row(0, c), 256),
                     tolerance(true, 256) * norm(x.data() + i * 256, 256) * norm(t.row(0, c), 256));
    expected.check(out, "amx matmul");
  }
}
