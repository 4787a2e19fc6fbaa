// Kernels over bf16 pairs: the vector ones against the scalar ones, over awkward shapes.
#include "cpu/pair_kernels.h"

#include <catch2/catch.hpp>

#include "cpu/isa.h"
#include "fathom/tensor.hpp"
#include "support/cpu_test.h"

using namespace fathom;
using namespace fathom::cpu_test;

namespace {

// The tables that run here, the scalar one left out.
std::vector<const cpu::PairKernels*> vector_tables() {
  std::vector<const cpu::PairKernels*> tables;
#if defined(__x86_64__)
  if (cpu::isa_refusal(cpu::Isa::kAvx512, cpu::cpu_features()).empty() &&
      cpu::cpu_features().avx512_bf16)
    tables.push_back(&cpu::pair_kernels_avx512bf16());
#endif
  if (tables.empty()) WARN("skipped: no processor feature for bf16 pairs");
  return tables;
}

std::vector<uint16_t> random_bf16(int64_t n, uint32_t seed, float size = 1) {
  std::vector<uint16_t> out;
  for (const float v : random_values(n, seed, size)) out.push_back(f32_to_bf16(v));
  return out;
}
std::vector<uint32_t> random_pairs(int64_t n, uint32_t seed, float size = 1) {
  const std::vector<uint16_t> halves = random_bf16(2 * n, seed, size);
  std::vector<uint32_t> out(static_cast<size_t>(n));
  std::memcpy(out.data(), halves.data(), out.size() * 4);
  return out;
}

// As numbers, within one unit of bf16 of sums near `size`: rounding may go either way.
void check_rounded(const std::string& what, const std::vector<uint16_t>& got,
                   const std::vector<uint16_t>& want, float size) {
  REQUIRE(got.size() == want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const float a = bf16_to_f32(got[i]), b = bf16_to_f32(want[i]);
    if (std::fabs(a - b) > std::fabs(b) / 128 + 1e-5f * size)
      FAIL(fmt::format("{}: value {} is {}, expected {}", what, i, a, b));
  }
  SUCCEED();
}

}  // namespace

TEST_CASE("columns and rows are packed to the same bits", "[cpu][pairs]") {
  for (const cpu::PairKernels* table : vector_tables()) {
    INFO(table->name);
    for (const int64_t n_columns : {1, 5, 16, 17, 32})
      for (const int64_t n : {1, 2, 6, 31, 32, 34, 64, 100, 512}) {
        const std::vector<float> x = random_values(n_columns * (n + 3), 1);
        std::vector<const float*> columns;
        for (int64_t c = 0; c < n_columns; ++c) columns.push_back(x.data() + c * (n + 3));
        const int64_t unit = (n + 1) / 2 * 16 + 32;
        std::vector<uint32_t> want(static_cast<size_t>(2 * unit), 7u), got = want;
        cpu::PackColumns p{columns.data(), n_columns, n, 0.37f, want.data(), unit};
        cpu::pair_kernels_scalar().pack_columns(p);
        p.out = got.data();
        table->pack_columns(p);
        INFO(n_columns << " columns of " << n);
        CHECK(got == want);
      }
    for (const cpu::RowType type : {cpu::kRowF32, cpu::kRowF16, cpu::kRowBF16})
      for (const int64_t n_rows : {1, 2, 3, 8, 63})
        for (const int64_t n_cols : {16, 44, 512})
          for (const int forms : {1, 2, 3}) {
            std::vector<float> x = random_values(n_rows * (n_cols + 5), 2);
            x[3] = std::numeric_limits<float>::infinity();
            std::vector<uint16_t> words;
            for (const float v : x)
              words.push_back(type == cpu::kRowF16 ? f32_to_f16(v) : f32_to_bf16(v));
            const int64_t width = (n_cols + 15) / 16 * 16;
            std::vector<uint16_t> rows(static_cast<size_t>(n_rows * (width + 16)), 9);
            std::vector<uint32_t> pairs(static_cast<size_t>(((n_rows + 1) / 2 + 1) * width), 9);
            std::vector<uint16_t> got_rows = rows;
            std::vector<uint32_t> got_pairs = pairs;
            const bool wide = type == cpu::kRowF32;
            cpu::PackRows p{.type = type,
                            .x = wide ? static_cast<void*>(x.data()) : words.data(),
                            .x_bytes = (n_cols + 5) * (wide ? 4 : 2),
                            .n_rows = n_rows,
                            .n_cols = n_cols,
                            .rows = (forms & 1) != 0 ? rows.data() : nullptr,
                            .row_stride = width + 16,
                            .pairs = (forms & 2) != 0 ? pairs.data() : nullptr,
                            .panel_stride = ((n_rows + 1) / 2 + 1) * 16};
            cpu::pair_kernels_scalar().pack_rows(p);
            if (p.rows != nullptr) p.rows = got_rows.data();
            if (p.pairs != nullptr) p.pairs = got_pairs.data();
            table->pack_rows(p);
            INFO(n_rows << " rows of " << n_cols << ", forms " << forms << ", type " << type);
            CHECK(got_rows == rows);
            CHECK(got_pairs == pairs);
          }
  }
}

TEST_CASE("rows are expanded to what the scalar kernel gives", "[cpu][pairs]") {
  for (const cpu::PairKernels* table : vector_tables())
    for (const int64_t n_rows : {1, 2, 7, 8, 9, 16, 31, 64})
      for (const int64_t n_panels : {1, 2, 3, 8})
        for (const bool to_rows : {true, false}) {
          const int64_t k = 96, width = n_panels * 16;
          const std::vector<uint16_t> x = random_bf16(n_rows * (k + 2), 3);
          const std::vector<uint32_t> panels = random_pairs(n_panels * (k / 2) * 16, 4);
          const size_t size = static_cast<size_t>((n_rows + 3) * (width + 4));
          std::vector<uint16_t> want(2 * size, 0), got = want;
          cpu::ExpandPairs p{.x = x.data(),
                             .x_stride = k + 2,
                             .n_rows = n_rows,
                             .k = k,
                             .weights = panels.data(),
                             .weight_stride = k / 2 * 16,
                             .n_panels = n_panels,
                             .rows = nullptr,
                             .row_stride = width + 4,
                             .pairs = nullptr,
                             .panel_stride = ((n_rows + 1) / 2 + 1) * 16};
          const auto run = [&](const cpu::PairKernels& kernels, std::vector<uint16_t>& out) {
            if (to_rows)
              p.rows = out.data();
            else
              p.pairs = reinterpret_cast<uint32_t*>(out.data());
            kernels.expand(p);
          };
          run(cpu::pair_kernels_scalar(), want);
          run(*table, got);
          check_rounded(fmt::format("{}: {} rows, {} panels, {}", table->name, n_rows, n_panels,
                                    to_rows ? "rows" : "pairs"),
                        got, want, 10);
        }
}

TEST_CASE("attention over pairs is what the scalar kernel gives", "[cpu][pairs]") {
  struct Case {
    int64_t n_cols, n_used, n_rows, k, n_values;
    bool limited;
  };
  const Case cases[] = {{16, 1, 1, 32, 16, false},      {16, 16, 2, 64, 32, true},
                        {16, 16, 128, 576, 512, false}, {32, 32, 127, 80, 48, true},
                        {32, 17, 256, 192, 128, true},  {16, 9, 255, 96, 16, false},
                        {32, 31, 3, 192, 144, true}};
  for (const cpu::PairKernels* table : vector_tables())
    for (const Case& c : cases) {
      const auto queries = random_pairs(c.n_cols * c.k / 2, 5, 0.2f);
      const auto keys = random_bf16(c.n_rows * (c.k + 16), 6);
      const auto values = random_pairs((c.n_rows + 1) / 2 * c.n_values, 7);
      std::vector<int32_t> limits;
      for (int64_t col = 0; col < c.n_cols; ++col)
        limits.push_back(static_cast<int32_t>(col * 37 % (c.n_rows + 1)));
      struct State {
        std::vector<float> max, sum, out, scores, decay;
        std::vector<uint32_t> weights;
      };
      const auto run = [&](const cpu::PairKernels& kernels) {
        const auto n = static_cast<size_t>(c.n_cols);
        State s;
        s.max = std::vector<float>(n, 0.5f);
        s.max[0] = -std::numeric_limits<float>::infinity();
        s.sum = std::vector<float>(n, 2.0f);
        s.sum[0] = 0;
        s.out = random_values(c.n_used * (c.n_values + 8), 8);
        s.scores.resize(n * static_cast<size_t>(c.n_rows));
        s.decay.resize(n);
        s.weights.resize(n * static_cast<size_t>((c.n_rows + 1) / 2));
        kernels.attend({.queries = queries.data(),
                        .query_stride = c.k / 2 * 16,
                        .n_cols = c.n_cols,
                        .n_used = c.n_used,
                        .keys = keys.data(),
                        .key_stride = c.k + 16,
                        .k = c.k,
                        .values = values.data(),
                        .value_stride = (c.n_rows + 1) / 2 * 16,
                        .n_values = c.n_values,
                        .n_rows = c.n_rows,
                        .limits = c.limited ? limits.data() : nullptr,
                        .max = s.max.data(),
                        .sum = s.sum.data(),
                        .out = s.out.data(),
                        .out_stride = c.n_values + 8,
                        .scores = s.scores.data(),
                        .weights = s.weights.data(),
                        .decay = s.decay.data()});
        return s;
      };
      const State want = run(cpu::pair_kernels_scalar()), got = run(*table);
      const std::string what = fmt::format("{}: {} of {} columns, {} rows, {} values", table->name,
                                           c.n_used, c.n_cols, c.n_rows, c.n_values);
      // Scores near 5 in f32; a weight on the edge of two bf16 numbers may fall on either.
      for (int64_t col = 0; col < c.n_cols; ++col) {
        const float a = got.max[static_cast<size_t>(col)], b = want.max[static_cast<size_t>(col)];
        if (!(a == b || std::fabs(a - b) < 1e-4f)) FAIL(what << ": maximum of column " << col);
        const float sum = want.sum[static_cast<size_t>(col)];
        if (std::fabs(got.sum[static_cast<size_t>(col)] - sum) > 1e-4f * std::fabs(sum) + 1e-6f)
          FAIL(what << ": sum of column " << col);
      }
      for (size_t i = 0; i < want.out.size(); ++i) {
        const size_t col = i / static_cast<size_t>(c.n_values + 8);
        const float bound = 2e-3f * (1 + std::fabs(want.sum[col]));
        if (!(std::fabs(got.out[i] - want.out[i]) <= bound))
          FAIL(what << ": value " << i << " is " << got.out[i] << ", expected " << want.out[i]);
      }
      SUCCEED();
    }
}
