// RoPE tables and rotation, and appending to the cache, which norms, rotates and writes in one.
#include <catch2/catch.hpp>

#include "support/cpu_pages.h"
#include "support/cpu_test.h"

using namespace fathom;
using namespace fathom::cpu_test;

namespace {

std::vector<double> frequencies(int64_t rope_dim) {
  std::vector<double> f;
  for (int64_t i = 0; i < rope_dim / 2; ++i)
    f.push_back(std::pow(10000.0, -2.0 * double(i) / double(rope_dim)));
  return f;
}

}  // namespace

TEST_CASE("the table holds cosines and sines of double angles, far positions included") {
  for (const std::string& isa : runnable_isas())
    for (const int64_t rope_dim : {2, 12, 64}) {
      auto backend = make_backend(isa, 2);
      const std::vector<double> f = frequencies(rope_dim);
      const int64_t first = 163000, n = 37;
      std::vector<float> table(static_cast<size_t>(n * rope_dim));
      backend->rope_table({}, {.inv_freq = f.data(),
                               .multiplier = 1.25,
                               .rope_dim = rope_dim,
                               .first_position = first,
                               .n_tokens = n,
                               .cos_sin = table.data()});
      std::vector<double> expected;
      for (int64_t t = 0; t < n; ++t)
        for (const double frequency : f) {
          expected.push_back(std::cos(double(first + t) * frequency) * 1.25);
          expected.push_back(std::sin(double(first + t) * frequency) * 1.25);
        }
      check_close(isa, table, expected, 1e-7);
    }
}

TEST_CASE("pairs are rotated by hand") {
  for (const std::string& isa : runnable_isas()) {
    auto backend = make_backend(isa, 1);
    std::vector<float> x = {1, 2, 3, 4}, cos_sin = {0, 1, -1, 0};
    backend->rope({}, {.x = x.data(),
                       .token_stride = 4,
                       .head_stride = 4,
                       .n_tokens = 1,
                       .n_heads = 1,
                       .rope_dim = 4,
                       .cos_sin = cos_sin.data()});
    CHECK(x == std::vector<float>{-2, 1, -3, -4});
  }
}

TEST_CASE("rope turns the rope columns of every head and leaves the others") {
  for (const int64_t rope_dim : {2, 12, 16, 30, 32, 64}) {
    const int64_t n_tokens = 5, n_heads = 3, nope = 7;
    const int64_t head_stride = nope + rope_dim + 2, token_stride = n_heads * head_stride + 1;
    const std::vector<float> x = random_values(n_tokens * token_stride, 3);
    const std::vector<float> cos_sin = random_values(n_tokens * rope_dim, 4);
    std::vector<double> expected(x.begin(), x.end());
    for (int64_t t = 0; t < n_tokens; ++t)
      for (int64_t h = 0; h < n_heads; ++h)
        for (int64_t i = 0; i < rope_dim; i += 2) {
          const auto at = static_cast<size_t>(t * token_stride + h * head_stride + nope + i);
          const double c = cos_sin[size_t(t * rope_dim + i)];
          const double s = cos_sin[size_t(t * rope_dim + i + 1)];
          expected[at] = x[at] * c - x[at + 1] * s;
          expected[at + 1] = x[at + 1] * c + x[at] * s;
        }
    for (const std::string& isa : runnable_isas()) {
      auto backend = make_backend(isa);
      std::vector<float> got = x;
      backend->rope({}, {.x = got.data() + nope,
                         .token_stride = token_stride,
                         .head_stride = head_stride,
                         .n_tokens = n_tokens,
                         .n_heads = n_heads,
                         .rope_dim = rope_dim,
                         .cos_sin = cos_sin.data()});
      check_close(fmt::format("{} rope {}", isa, rope_dim), got, expected, 2e-6);
      for (int64_t i = 0; i < nope; ++i) CHECK(got[size_t(i)] == x[size_t(i)]);
    }
  }
}

TEST_CASE("kv_append norms, rotates and stores rows into pages of every type") {
  const KvType types[] = {KvType::kF32, KvType::kQ8_0, KvType::kBF16,
                          KvType::kF8,  KvType::kF16,  KvType::kQ4_0};
  for (const auto& [r, rope] : {std::pair<int64_t, int64_t>{44, 12}, {300, 16}, {512, 64}}) {
    const int64_t page_tokens = 16, first = 13, n = 70, stride = r + rope + 3;
    const std::vector<float> kv = random_values(n * stride, 5, 2);
    const std::vector<float> weight = random_values(r, 6), cos_sin = random_values(n * rope, 7);
    std::vector<float> rows;  // normed and rotated, in double
    for (int64_t i = 0; i < n; ++i) {
      const float* x = kv.data() + i * stride;
      double sum = 0;
      for (int64_t c = 0; c < r; ++c) sum += double(x[c]) * x[c];
      const double factor = 1 / std::sqrt(sum / double(r) + 1e-6);
      for (int64_t c = 0; c < r; ++c) rows.push_back(float(x[c] * factor * weight[size_t(c)]));
      for (int64_t c = 0; c < rope; c += 2) {
        const double cosine = cos_sin[size_t(i * rope + c)];
        const double sine = cos_sin[size_t(i * rope + c + 1)];
        rows.push_back(float(x[r + c] * cosine - x[r + c + 1] * sine));
        rows.push_back(float(x[r + c + 1] * cosine + x[r + c] * sine));
      }
    }
    for (const std::string& isa : runnable_isas()) {
      auto backend = make_backend(isa);
      Pages pages(page_tokens, r, rope, {types, types + 6}, first + n, 3, 1);
      const std::vector<float> before = random_values((first + n) * (r + rope), 8);
      pages.write(before);
      const std::vector<float> held_before = pages.decoded();
      backend->kv_append({}, {.kv = kv.data(),
                              .kv_stride = stride,
                              .norm_weight = weight.data(),
                              .eps = 1e-6f,
                              .cos_sin = cos_sin.data(),
                              .rows = pages.rows(first, n)});
      const std::vector<float> held = pages.decoded();
      const auto split = static_cast<std::ptrdiff_t>(first * (r + rope));
      check_same_bits(isa + ": rows before", {held.begin(), held.begin() + split},
                      {held_before.begin(), held_before.begin() + split});
      // Against rows stored from double: at most one rounding step of the type apart.
      Pages stored(page_tokens, r, rope, {types, types + 6}, first + n);
      std::vector<float> all(held_before.begin(), held_before.begin() + split);
      all.insert(all.end(), rows.begin(), rows.end());
      stored.write(all);
      const std::vector<float> expected = stored.decoded();
      int64_t far = 0;
      for (size_t i = static_cast<size_t>(split); i < held.size(); ++i) {
        const KvType type = types[i / static_cast<size_t>(r + rope) / 16 % 6];
        const double size = std::fabs(expected[i]);
        const double step = type == KvType::kF32    ? 2e-6
                            : type == KvType::kF16  ? size * 1e-3 + 1e-6
                            : type == KvType::kBF16 ? size * 8e-3 + 1e-6
                            : type == KvType::kF8   ? size * 0.13 + 0.02
                            : type == KvType::kQ8_0 ? 0.1
                                                    : 2.0;
        if (!(std::fabs(held[i] - expected[i]) <= step))
          FAIL(
              fmt::format("{} r {}: value {} is {}, expected {}", isa, r, i, held[i], expected[i]));
        far += std::fabs(held[i] - expected[i]) > 1e-5 * (1 + size);
      }
      // Rounding to another step is rare: it needs a value at the border of two.
      CHECK(far * 100 < static_cast<int64_t>(rows.size()));
    }
  }
}
