// Sums of two parts of the rows become those of both, on every instruction set, against the formula
// in double precision.
#include <catch2/catch.hpp>
#include <limits>

#include "cpu/rows_kernels.h"
#include "support/cpu_test.h"

using namespace fathom;
using namespace fathom::cpu_test;

TEST_CASE("merge_attention adds up what attention found of two parts") {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  for (const int64_t rank : {1, 15, 16, 52, 512})
    for (const auto& [n_tokens, n_heads] :
         {std::pair<int64_t, int64_t>{0, 3}, {1, 1}, {1, 5}, {3, 16}})
      for (const bool finish : {false, true}) {
        const int64_t columns = n_tokens * n_heads;
        const std::vector<float> out = random_values(columns * rank, 1);
        const std::vector<float> part_out = random_values(columns * rank, 2);
        std::vector<float> max = random_values(columns, 3, 5), sum(max.size(), 2.0f);
        std::vector<float> part_max = random_values(columns, 4, 5), part_sum(max.size(), 3.0f);
        // Columns that have seen nothing before, in the part, and at all.
        for (size_t col = 0; col < max.size(); ++col) {
          if (col % 4 == 1 || col % 4 == 3) max[col] = kNothing, sum[col] = 0;
          if (col % 4 == 2 || col % 4 == 3) part_max[col] = kNothing, part_sum[col] = 0;
        }
        std::vector<double> expected, expected_sum;
        for (size_t col = 0; col < max.size(); ++col) {
          const double top = std::max(max[col], part_max[col]);
          const double keep = max[col] == kNothing ? 0 : std::exp(max[col] - top);
          const double take = part_max[col] == kNothing ? 0 : std::exp(part_max[col] - top);
          expected_sum.push_back(keep * sum[col] + take * part_sum[col]);
          const double factor = !finish                    ? 1
                                : expected_sum.back() == 0 ? 0
                                                           : 1 / expected_sum.back();
          for (int64_t i = 0; i < rank; ++i) {
            const size_t at = col * static_cast<size_t>(rank) + static_cast<size_t>(i);
            // What nobody has seen yet is whatever it was.
            const double before = keep == 0 && take == 0 ? out[at] : keep * out[at];
            expected.push_back((before + take * part_out[at]) * factor);
          }
        }
        for (const std::string& isa : runnable_isas())
          for (const int threads : {1, 3}) {
            auto backend = make_backend(isa, threads);
            std::vector<float> got = out, got_max = max, got_sum = sum;
            backend->merge_attention({}, {.n_tokens = n_tokens,
                                          .n_heads = n_heads,
                                          .kv_lora_rank = rank,
                                          .state = {got_max.data(), got_sum.data()},
                                          .out = got.data(),
                                          .part = {part_max.data(), part_sum.data()},
                                          .part_out = part_out.data(),
                                          .finish = finish});
            const std::string what = fmt::format("{}, {} threads: {} x {} x {}, finish {}", isa,
                                                 threads, n_tokens, n_heads, rank, finish);
            REQUIRE(std::string(backend->context().rows->name) == isa);
            check_close(what, got, expected, 1e-5);
            check_close(what + ", sums", got_sum, expected_sum, 1e-5);
            for (size_t col = 0; col < max.size(); ++col)
              REQUIRE(got_max[col] == std::max(max[col], part_max[col]));
          }
      }
}
