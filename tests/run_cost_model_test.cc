// The roofline against figures worked out by hand.
#include "lib/run/cost_model.h"

#include <catch2/catch.hpp>

#include "lib/io/tensor_listing.h"
#include "lib/run/engine_state.h"
#include "support/loaded_model.h"
#include "support/model_shapes.h"

namespace fathom {
namespace {

// A device on which the sums are easy: 100 GB/s, 1, 2 and 4 TFLOP/s, nothing for an operation.
MachineDevice plain_device() {
  MachineDevice device;
  device.name = "cpu";
  device.bytes = 1;
  device.read_bytes_per_s = 1e11;
  device.quantised_flops_per_s = 1e12;
  device.dense_flops_per_s = 2e12;
  device.attention_flops_per_s = 4e12;
  return device;
}

Weight weight_of(DType dtype, int64_t rows, int64_t cols, int64_t count = 1) {
  Weight w;
  w.dtype = dtype;
  w.rows = rows;
  w.cols = cols;
  w.count = count;
  return w;
}

MatmulParams matmul_of(const Weight& w, int64_t n) {
  return {nullptr, w.cols, n, &w, nullptr, w.rows};
}

TEST_CASE("an operation takes the longer of its bytes and its arithmetic", "[cost]") {
  MachineDevice device = plain_device();
  const Weight w = weight_of(DType::kQ8_0, 4096, 4096);
  // One row: 4096 x 4096 x 34/32 bytes and two rows of f32 against 2 x 4096 x 4096 operations.
  const run::Work one = run::work_of(matmul_of(w, 1));
  CHECK(one.weight_bytes == 4096.0 * 4096 * 34 / 32);
  CHECK(one.other_bytes == 2 * 4096 * 4.0);
  CHECK(one.flops == 2.0 * 4096 * 4096);
  CHECK(one.arithmetic == run::Arithmetic::kQuantised);
  CHECK(run::seconds(device, one) == Approx((one.weight_bytes + one.other_bytes) / 1e11));
  // Many rows: the arithmetic.
  CHECK(run::seconds(device, run::work_of(matmul_of(w, 1000))) ==
        Approx(2.0 * 4096 * 4096 * 1000 / 1e12));
  // A rate of the type's own, the fixed cost, and dense arithmetic.
  device.read_bytes_per_s_by_type[DType::kQ8_0] = 5e10;
  device.operation_s = 1e-3;
  CHECK(run::seconds(device, one) ==
        Approx(1e-3 + one.weight_bytes / 5e10 + one.other_bytes / 1e11));
  const Weight dense = weight_of(DType::kBF16, 4096, 4096);
  CHECK(run::seconds(device, run::work_of(matmul_of(dense, 10000))) ==
        Approx(1e-3 + 2.0 * 4096 * 4096 * 10000 / 2e12));
  CHECK(run::seconds(MachineLink{0, 1, 1e10, 1e-5}, 1000000) == Approx(1e-5 + 1e-4));
}

TEST_CASE("experts read what the tokens choose", "[cost]") {
  CHECK(run::experts_touched(1, 8, 256) == Approx(8));
  CHECK(run::experts_touched(2, 8, 256) == Approx(256 * (1 - 248.0 / 256 * 248 / 256)));
  CHECK(run::experts_touched(100000, 8, 256) == Approx(256));
  CHECK(run::experts_touched(5, 0, 0) == 0);
  const Weight up = weight_of(DType::kQ4_K, 2048, 7168, 256);
  const Weight down = weight_of(DType::kQ4_K, 7168, 2048, 256);
  ExpertsParams params{};
  params.n_tokens = 1;
  params.num_experts_per_tok = 8;
  params.gate = params.up = &up;
  params.down = &down;
  const run::Work work = run::work_of(params);
  CHECK(work.weight_bytes == Approx(8 * 3 * 2048.0 * 7168 / 256 * 144));
  CHECK(work.flops == Approx(8 * 3 * 2 * 2048.0 * 7168));
}

TEST_CASE("attention counts the rows that each query sees", "[cost]") {
  const KvLayout layout{64, 512, 64};
  const KvRows rows{nullptr, layout, 0, 0, 1001};
  AttendAbsorbedParams params{};
  params.n_tokens = 1;
  params.n_heads = 128;
  params.first_position = 1000;
  params.rows = rows;
  const run::Work decode = run::work_of(params, 1152);
  CHECK(decode.flops == Approx(2.0 * 1001 * 128 * (2 * 512 + 64)));
  CHECK(decode.other_bytes == Approx(1001.0 * 1152 + 128 * (2 * 512 + 64) * 4));
  // Four queries behind 997 rows see 998, 999, 1000 and 1001 rows.
  params.n_tokens = 4;
  params.n_heads = 1;
  params.first_position = 997;
  CHECK(run::work_of(params, 1152).flops ==
        Approx(2.0 * (998 + 999 + 1000 + 1001) * (2 * 512 + 64)));
}

// V2-Lite, one token behind none, in q8_0: the bytes of all active weights over the bandwidth.
TEST_CASE("a decode step is bound by the active weights", "[cost]") {
  const std::string path = std::string(FATHOM_TEST_SOURCE_DATA) + "/configs/v2-lite.json";
  auto file = io::list_tensors(path, WeightsType::kQ8_0);
  REQUIRE(file.ok());
  auto engine = Engine::create();
  REQUIRE(engine.ok());
  const ModelConfig& c = file->config();
  const Placement placement =
      Placement::by_layer(c, std::vector<int>(static_cast<size_t>(c.num_hidden_layers), 0));
  auto map = nn::WeightMap::create(*file, placement, engine->state()->devices);
  REQUIRE(map.ok());
  const MachineDevice device = plain_device();
  double total = run::head_seconds(device, c, map->weights());
  for (int64_t l = 0; l < c.num_hidden_layers; ++l) {
    const run::LayerSeconds layer =
        run::layer_seconds(device, c, map->weights().layers[static_cast<size_t>(l)],
                           c.is_moe_layer(l), {.n_tokens = 1, .first_position = 0});
    CHECK(layer.attention > 0);
    CHECK(layer.shared > 0);
    CHECK((layer.experts > 0) == c.is_moe_layer(l));
    total += layer.total();
  }
  const double weights = static_cast<double>(map->n_params_active(c)) * 34 / 32 / 1e11;
  CHECK(total > weights);
  CHECK(total < weights * 1.05);  // router in f32, norms, activations
}

}  // namespace
}  // namespace fathom
