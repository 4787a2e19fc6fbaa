// Cache and attention of the CUDA backend against the scalar CPU backend: typed pages in place,
// awkward shapes, rows handed in several calls, pages anywhere in memory.
#include <algorithm>

#include "cuda_test.h"

using namespace fathom;
using namespace fathom::cuda_test;
using cpu_test::random_weight;

namespace {

constexpr KvType kTypes[] = {KvType::kF32, KvType::kBF16, KvType::kF16,
                             KvType::kF8,  KvType::kQ8_0, KvType::kQ4_0};

// Pages of several layers, written by kv_append of a backend.
struct Cache {
  KvLayout layout;
  int64_t n_layers, n_rows;
  std::vector<cpu_test::AlignedBytes> memory;
  std::vector<KvPage> pages;

  // `together`: pages at equal distances, as a cache has them; else each anywhere.
  Cache(KvLayout layout, std::vector<KvType> types, int64_t n_rows, int64_t n_layers = 1,
        bool together = false)
      : layout(layout), n_layers(n_layers), n_rows(n_rows) {
    const int64_t n_pages = (n_rows + layout.page_tokens - 1) / layout.page_tokens;
    const int64_t slot = layout.page_bytes(KvType::kF32, n_layers);
    if (together) memory.push_back(cpu_test::aligned_bytes(n_pages * slot));
    for (int64_t i = 0; i < n_pages; ++i) {
      const KvType type = types[static_cast<size_t>(i) % types.size()];
      if (!together) memory.push_back(cpu_test::aligned_bytes(layout.page_bytes(type, n_layers)));
      std::byte* data = together ? memory[0].get() + i * slot : memory.back().get();
      std::memset(data, 0xff, static_cast<size_t>(layout.page_bytes(type, n_layers)));
      pages.push_back({data, type});
    }
  }
  KvRows rows(int64_t first, int64_t n, int64_t layer = 0) const {
    return {pages.data(), layout, layer, first, n};
  }
  int64_t bytes(size_t page) const { return layout.page_bytes(pages[page].type, n_layers); }
};

struct AppendInput {
  std::vector<float> kv, weight, cos_sin;
};
AppendInput random_input(Rng& rng, const KvLayout& layout, int64_t n) {
  AppendInput in{random_values(rng, n * (layout.kv_lora_rank + layout.qk_rope_head_dim + 1)),
                 random_values(rng, layout.kv_lora_rank),
                 {}};
  for (int64_t i = 0; i < n * layout.qk_rope_head_dim / 2; ++i) {
    const float angle = static_cast<float>(rng() % 6283) / 1000;
    in.cos_sin.push_back(std::cos(angle));
    in.cos_sin.push_back(std::sin(angle));
  }
  return in;
}
void append(Backend& backend, const AppendInput& in, const Cache& cache, int64_t first, int64_t n,
            int64_t layer) {
  backend.kv_append({}, {.kv = in.kv.data(),
                         .kv_stride = cache.layout.kv_lora_rank + cache.layout.qk_rope_head_dim + 1,
                         .norm_weight = in.weight.data(),
                         .eps = 1e-6f,
                         .cos_sin = in.cos_sin.data(),
                         .rows = cache.rows(first, n, layer)});
}

// Whole pages of both are the same bytes.
void check_same_pages(const Cache& a, const Cache& b, const std::string& what) {
  for (size_t i = 0; i < a.pages.size(); ++i) {
    const auto* x = static_cast<const uint8_t*>(a.pages[i].data);
    const auto* y = static_cast<const uint8_t*>(b.pages[i].data);
    const auto differs = std::mismatch(x, x + a.bytes(i), y).first - x;
    INFO(what << ": page " << i << " (" << kv_type_name(a.pages[i].type) << ") byte " << differs);
    CHECK(differs == a.bytes(i));
  }
}

}  // namespace

TEST_CASE("appended rows are the bytes that the CPU writes", "[cuda][kv]") {
  const auto scalar = make_scalar();
  Rng rng(71);
  for (const Order order : kOrders)
    for (const KvLayout layout : {KvLayout{16, 64, 16}, KvLayout{32, 512, 64}, KvLayout{16, 40, 6},
                                  KvLayout{64, 200, 10}}) {
      TestGpu gpu(Numerics::kFast, order);
      const std::vector<KvType> types(std::begin(kTypes), std::end(kTypes));
      const int64_t n = 5 * layout.page_tokens + 3;
      Cache ours(layout, types, n, 2), theirs(layout, types, n, 2);
      AppendInput in = random_input(rng, layout, n);
      in.kv[7] = 1e-30f;  // rounds to nothing
      for (int64_t c = 0; c < layout.kv_lora_rank; ++c) in.kv[static_cast<size_t>(c)] *= 1e-3f;
      for (const int64_t layer : {0, 1}) {
        append(*gpu, in, ours, 0, n - 7, layer);
        append(*gpu, in, ours, n - 7, 7, layer);
        append(*scalar, in, theirs, 0, n - 7, layer);
        append(*scalar, in, theirs, n - 7, 7, layer);
      }
      gpu.finish();
      check_same_pages(ours, theirs, "rank " + std::to_string(layout.kv_lora_rank));
    }
}

TEST_CASE("damage stays visible in every type", "[cuda][kv]") {
  const auto scalar = make_scalar();
  Rng rng(72);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    TestGpu gpu(Numerics::kFast);
    const KvLayout layout{16, 64, 16};
    const std::vector<KvType> types = {KvType::kF8, KvType::kQ8_0, KvType::kQ4_0};
    Cache ours(layout, types, 48), theirs(layout, types, 48);
    AppendInput in = random_input(rng, layout, 48);
    for (size_t row : {size_t{2}, size_t{20}, size_t{40}}) in.kv[row * 81 + 33] = bad;
    append(*gpu, in, ours, 0, 48, 0);
    append(*scalar, in, theirs, 0, 48, 0);
    gpu.finish();
    check_same_pages(ours, theirs, "damage");
  }
}

TEST_CASE("pages are rewritten in place as the CPU rewrites them", "[cuda][kv]") {
  const auto scalar = make_scalar();
  Rng rng(73);
  for (const Order order : kOrders)
    for (const KvLayout layout : {KvLayout{16, 64, 16}, KvLayout{64, 512, 64}, KvLayout{16, 72, 6}})
      for (const KvType from : {KvType::kF32, KvType::kF16, KvType::kBF16, KvType::kQ8_0})
        for (const KvType to : kTypes) {
          if (layout.latent_row_bytes(to) > layout.latent_row_bytes(from) ||
              layout.rope_row_bytes(to) > layout.rope_row_bytes(from))
            continue;
          TestGpu gpu(Numerics::kFast, order);
          const int64_t n = layout.page_tokens;
          Cache ours(layout, {from}, n, 3), theirs(layout, {from}, n, 3);
          const AppendInput in = random_input(rng, layout, n);
          for (const int64_t layer : {0, 1, 2}) {
            append(*scalar, in, ours, 0, n, layer);
            append(*scalar, in, theirs, 0, n, layer);
          }
          gpu->kv_convert({}, {ours.pages[0].data, layout, 3, from, to});
          gpu.finish();
          scalar->kv_convert({}, {theirs.pages[0].data, layout, 3, from, to});
          ours.pages[0].type = theirs.pages[0].type = to;
          check_same_pages(
              ours, theirs,
              std::string(kv_type_name(from)) + " to " + std::string(kv_type_name(to)));
        }
}

namespace {

struct Absorbed {
  KvLayout layout;
  int64_t n_heads, n_tokens, first_position;
};

// Attends rows [0, first_position + n_tokens), cut at `cuts`.
std::vector<float> attend(Backend& backend, TestGpu* gpu, const Absorbed& s, const Cache& cache,
                          const std::vector<float>& q, const std::vector<int64_t>& cuts,
                          std::vector<float>* sums = nullptr) {
  const int64_t rank = s.layout.kv_lora_rank, rope = s.layout.qk_rope_head_dim;
  const int64_t n_columns = s.n_tokens * s.n_heads, head_stride = rank + rope + 3;
  std::vector<float> out(static_cast<size_t>(n_columns * rank), -3.0f);
  std::vector<float> max(static_cast<size_t>(n_columns), 9.0f), sum(max);
  AttendAbsorbedParams p{.q_latent = q.data(),
                         .q_latent_token_stride = s.n_heads * head_stride,
                         .q_latent_head_stride = head_stride,
                         .q_rope = q.data() + rank,
                         .q_rope_token_stride = s.n_heads * head_stride,
                         .q_rope_head_stride = head_stride,
                         .n_tokens = s.n_tokens,
                         .n_heads = s.n_heads,
                         .first_position = s.first_position,
                         .scale = 0.3f / std::sqrt(static_cast<float>(rank)),
                         .rows = {},
                         .state = {max.data(), sum.data()},
                         .out = out.data()};
  int64_t first = 0;
  for (size_t i = 0; i <= cuts.size(); ++i) {
    const int64_t end = i < cuts.size() ? cuts[i] : cache.n_rows;
    p.rows = cache.rows(first, end - first, cache.n_layers - 1);
    p.begin = i == 0;
    p.finish = i == cuts.size();
    if (gpu != nullptr) {
      gpu->run(p, [&](const OpContext& op) { backend.attend_absorbed(op, p); });
    } else {
      const cpu_test::GuardedWorkspace space(backend.workspace_bytes(p));
      backend.attend_absorbed(space.op(), p);
    }
    first = end;
  }
  if (sums != nullptr) *sums = sum;
  return out;
}

}  // namespace

TEST_CASE("absorbed attention over pages of every type", "[cuda][attention]") {
  const auto scalar = make_scalar();
  Rng rng(74);
  const Absorbed shapes[] = {{{16, 64, 16}, 1, 1, 0},     {{16, 64, 16}, 4, 1, 300},
                             {{64, 512, 64}, 16, 1, 200}, {{16, 32, 16}, 3, 7, 520},
                             {{32, 40, 6}, 2, 3, 70},     {{16, 96, 32}, 20, 2, 610},
                             {{64, 64, 16}, 128, 1, 90},  {{128, 128, 16}, 5, 9, 255}};
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const Absorbed& s : shapes)
      for (int mix = 0; mix <= kKvTypeCount; ++mix) {
        // All types with small shapes; with the others one type and the mixture.
        const bool small = s.n_heads <= 4 && s.layout.kv_lora_rank < 512;
        if (!small && mix != kKvTypeCount && mix != static_cast<int>(&s - shapes) % kKvTypeCount)
          continue;
        TestGpu gpu(numerics, kOrders[rng() % 3]);
        const std::vector<KvType> all(std::begin(kTypes), std::end(kTypes));
        const int64_t n_rows = s.first_position + s.n_tokens;
        Cache cache(s.layout, mix < kKvTypeCount ? std::vector{kTypes[mix]} : all, n_rows, 2,
                    mix % 2 == 0);
        append(*scalar, random_input(rng, s.layout, n_rows), cache, 0, n_rows, 1);
        const auto q = random_values(
            rng, s.n_tokens * s.n_heads * (s.layout.kv_lora_rank + s.layout.qk_rope_head_dim + 3));
        const std::string what = std::string(name_of(numerics)) + " rank " +
                                 std::to_string(s.layout.kv_lora_rank) + " heads " +
                                 std::to_string(s.n_heads) + " rows " + std::to_string(n_rows) +
                                 " mix " + std::to_string(mix);
        const auto expected = attend(*scalar, nullptr, s, cache, q, {});
        const auto got = attend(*gpu, &gpu, s, cache, q, {});
        // Fast: queries, rows and weights rounded to bf16; values are about 1, weights add up to 1.
        check_close(what, got, expected, numerics == Numerics::kExact ? 2e-5 : 0.03);
        if (n_rows > 512) {
          const auto cut = attend(*gpu, &gpu, s, cache, q, {512});
          CHECK(std::memcmp(got.data(), cut.data(), got.size() * 4) == 0);
        }
      }
}

TEST_CASE("absorbed attention: same bits for any pages, calls and waves",
          "[cuda][attention][slow]") {
  const auto scalar = make_scalar();
  Rng rng(75);
  // 700 columns: a wave holds eleven splits; 3,100 rows are thirteen.
  const Absorbed s{{16, 32, 16}, 100, 7, 3100};
  const int64_t n_rows = s.first_position + s.n_tokens;
  const AppendInput in = random_input(rng, s.layout, n_rows);
  const auto q = random_values(rng, s.n_tokens * s.n_heads * 51);
  std::vector<float> first;
  for (const int64_t page_tokens : {16, 64, 4096}) {
    const bool together = page_tokens == 64;
    Absorbed shape = s;
    shape.layout.page_tokens = page_tokens;
    Cache cache(shape.layout, {KvType::kF16}, n_rows, 1, together);
    append(*scalar, in, cache, 0, n_rows, 0);
    TestGpu gpu(Numerics::kFast, kOrders[rng() % 3]);
    const auto got = attend(*gpu, &gpu, shape, cache, q,
                            together ? std::vector<int64_t>{} : std::vector<int64_t>{1024, 2560});
    if (first.empty()) {
      first = got;
      check_close("waves", got, attend(*scalar, nullptr, shape, cache, q, {}), 0.03);
    }
    INFO(page_tokens << " " << together);
    CHECK(std::memcmp(got.data(), first.data(), got.size() * 4) == 0);
  }
}

namespace {

struct Texts {
  KvLayout layout;
  int64_t n_heads, n_texts;
  bool together;
  int64_t n_launches;  // of a batch in f16 pages; -1: more than one wave
  int64_t depth = 0;   // 0: any
};

// A batch's step: texts of any depth and page types at once.
void check_texts(Rng& rng, const Texts& s, Numerics numerics, bool mixed) {
  const auto scalar = make_scalar();
  TestGpu gpu(numerics, kOrders[rng() % 3]);
  const int64_t rank = s.layout.kv_lora_rank, rope = s.layout.qk_rope_head_dim;
  const int64_t head_stride = rank + rope + 3, columns = s.n_heads;
  std::vector<Cache> caches;
  std::vector<int64_t> n_tokens, first;
  int64_t all = 0;
  for (int64_t i = 0; i < s.n_texts; ++i) {
    n_tokens.push_back(i % 4 == 3 ? 2 : 1);
    const int64_t depth = s.depth > 0 ? s.depth + i : i == 0 ? 600 : 1 + int64_t(rng() % 400);
    std::vector<KvType> types = {KvType::kF16};
    if (!s.together) types.push_back(KvType::kBF16);  // a segment for every page
    if (mixed) types = {kTypes[i % 6], kTypes[i % 6], kTypes[i * 5 % 6]};
    caches.emplace_back(s.layout, types, depth + n_tokens.back(), 1, s.together);
    append(*scalar, random_input(rng, s.layout, caches.back().n_rows), caches.back(), 0,
           caches.back().n_rows, 0);
    first.push_back(all);
    all += n_tokens.back();
  }
  const auto q = random_values(rng, all * columns * head_stride);
  std::vector<float> out(static_cast<size_t>(all * columns * rank), -3.0f), alone = out;
  std::vector<float> max(static_cast<size_t>(all * columns), 9.0f), sum(max), max1(max), sum1(max);
  const auto text = [&](int64_t i, std::vector<float>& o, std::vector<float>& m,
                        std::vector<float>& u) -> AttendAbsorbedParams {
    const auto at = static_cast<size_t>(i);
    const int64_t column = first[at] * columns;
    return {.q_latent = q.data() + column * head_stride,
            .q_latent_token_stride = columns * head_stride,
            .q_latent_head_stride = head_stride,
            .q_rope = q.data() + column * head_stride + rank,
            .q_rope_token_stride = columns * head_stride,
            .q_rope_head_stride = head_stride,
            .n_tokens = n_tokens[at],
            .n_heads = columns,
            .first_position = caches[at].n_rows - n_tokens[at],
            .scale = 0.3f / std::sqrt(static_cast<float>(rank)),
            .rows = caches[at].rows(0, caches[at].n_rows),
            .state = {m.data() + column, u.data() + column},
            .out = o.data() + column * rank};
  };
  std::vector<AttendAbsorbedParams> texts;
  for (int64_t i = 0; i < s.n_texts; ++i) {
    texts.push_back(text(i, out, max, sum));
    const AttendAbsorbedParams p = text(i, alone, max1, sum1);
    gpu.run(p, [&](const OpContext& op) { gpu->attend_absorbed(op, p); });
  }
  AttendAbsorbedParams whole = texts[0];
  whole.n_tokens = all;
  const int64_t before = gpu.device().graphs.n_launches;
  gpu.run(whole, [&](const OpContext& op) { gpu->attend_texts(op, texts.data(), s.n_texts); });
  const int64_t n_launches = gpu.device().graphs.n_launches - before;
  INFO(name_of(numerics) << " " << s.n_texts << " texts of " << s.n_heads << " heads, "
                         << n_launches << " launches");
  CHECK(std::memcmp(out.data(), alone.data(), out.size() * 4) == 0);
  CHECK(std::memcmp(max.data(), max1.data(), max.size() * 4) == 0);
  CHECK(std::memcmp(sum.data(), sum1.data(), sum.size() * 4) == 0);
  if (!mixed) CHECK((s.n_launches > 0 ? n_launches == s.n_launches : n_launches > 3));
  CHECK(n_launches <= 4 * s.n_texts);
}

}  // namespace

TEST_CASE("several texts at once have the bits of each by itself", "[cuda][attention]") {
  Rng rng(78);
  const Texts shapes[] = {{{16, 32, 16}, 4, 5, true, 3},
                          {{16, 64, 16}, 20, 1, true, 3},
                          {{16, 32, 16}, 2, 20, true, -1},  // more than the pieces of a wave
                          {{16, 32, 16}, 3, 7, false, -1},  // more segments than a wave's table
                          {{32, 40, 6}, 3, 4, true, 3}};    // not for tensor cores
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const Texts& s : shapes)
      for (const bool mixed : {false, true}) check_texts(rng, s, numerics, mixed);
}
TEST_CASE("several texts with more partial results than a wave holds", "[cuda][attention][slow]") {
  Rng rng(79);
  check_texts(rng, {{16, 32, 16}, 1000, 5, true, -1, 300}, Numerics::kFast, false);
}

TEST_CASE("expanded attention over pages of every type", "[cuda][attention]") {
  const auto scalar = make_scalar();
  Rng rng(76);
  struct Shape {
    KvLayout layout;
    int64_t n_heads, nope, value, n_tokens, first_position;
    DType dtype;
    bool transposed;
  };
  const Shape shapes[] = {{{16, 64, 16}, 3, 32, 24, 70, 0, DType::kF32, true},
                          {{32, 64, 16}, 2, 16, 16, 1, 100, DType::kBF16, false},
                          {{16, 96, 32}, 18, 32, 32, 9, 40, DType::kF32, false},
                          {{64, 40, 6}, 3, 10, 12, 33, 65, DType::kF16, true},
                          {{64, 64, 64}, 2, 128, 128, 130, 200, DType::kQ8_0, false},
                          {{64, 32, 16}, 1, 32, 8, 3, 2100, DType::kF32, true}};
  for (const Numerics numerics : {Numerics::kExact, Numerics::kFast})
    for (const Shape& s : shapes)
      for (const bool cut : {false, true}) {
        const int64_t rank = s.layout.kv_lora_rank, n_rows = s.first_position + s.n_tokens;
        if (cut && n_rows <= 512) continue;
        TestGpu gpu(numerics, kOrders[rng() % 3]);
        const auto k_b = s.transposed ? random_weight(rng, s.dtype, s.nope, rank, s.n_heads)
                                      : random_weight(rng, s.dtype, rank, s.nope, s.n_heads);
        const auto v_b = random_weight(rng, s.dtype, s.value, rank, s.n_heads);
        const auto gpu_k = gpu.store(k_b), gpu_v = gpu.store(v_b);
        const std::vector<KvType> all(std::begin(kTypes), std::end(kTypes));
        Cache cache(s.layout, all, n_rows, 1, false);
        append(*scalar, random_input(rng, s.layout, n_rows), cache, 0, n_rows, 0);
        const auto q =
            random_values(rng, s.n_tokens * s.n_heads * (s.nope + s.layout.qk_rope_head_dim));
        const auto run = [&](Backend& backend, TestGpu* emulated, const Weight* k,
                             const Weight* v) {
          std::vector<float> out(static_cast<size_t>(s.n_tokens * s.n_heads * s.value), -3.0f);
          std::vector<float> max(static_cast<size_t>(s.n_tokens * s.n_heads), 9.0f), sum(max);
          const int64_t qk = s.nope + s.layout.qk_rope_head_dim;
          AttendExpandedParams p{.q = q.data(),
                                 .q_token_stride = s.n_heads * qk,
                                 .q_head_stride = qk,
                                 .n_tokens = s.n_tokens,
                                 .n_heads = s.n_heads,
                                 .qk_nope_head_dim = s.nope,
                                 .v_head_dim = s.value,
                                 .first_position = s.first_position,
                                 .scale = 0.1f / std::sqrt(static_cast<float>(rank)),
                                 .k_b = k,
                                 .k_b_transposed = s.transposed,
                                 .v_b = v,
                                 .rows = {},
                                 .state = {max.data(), sum.data()},
                                 .out = out.data()};
          for (int part = 0; part < (cut ? 2 : 1); ++part) {
            p.rows = cut ? cache.rows(part == 0 ? 0 : 512, part == 0 ? 512 : n_rows - 512)
                         : cache.rows(0, n_rows);
            p.begin = part == 0;
            p.finish = !cut || part == 1;
            if (emulated != nullptr) {
              emulated->run(p, [&](const OpContext& op) { backend.attend_expanded(op, p); });
            } else {
              const cpu_test::GuardedWorkspace space(backend.workspace_bytes(p));
              backend.attend_expanded(space.op(), p);
            }
          }
          return out;
        };
        const auto expected = run(*scalar, nullptr, &k_b.weight, &v_b.weight);
        const auto got = run(*gpu, &gpu, &gpu_k.weight, &gpu_v.weight);
        double size = 0;
        for (const float v : expected) size = std::max(size, std::fabs(double(v)));
        check_close(std::string(name_of(numerics)) + " rank " + std::to_string(rank) + " heads " +
                        std::to_string(s.n_heads) + " tokens " + std::to_string(s.n_tokens) +
                        (cut ? " cut" : ""),
                    got, expected, (numerics == Numerics::kExact ? 3e-5 : 0.02) * size);
      }
}

TEST_CASE("sums of two parts of the rows are added as the CPU adds them", "[cuda][attention]") {
  const auto scalar = make_scalar();
  Rng rng(80);
  for (const int64_t rank : {16, 52, 512})
    for (const bool finish : {false, true}) {
      const int64_t n = 3, heads = 5, columns = n * heads;
      TestGpu gpu(Numerics::kFast);
      std::vector<float> max = random_values(rng, columns), sum = random_values(rng, columns);
      std::vector<float> out = random_values(rng, columns * rank);
      std::vector<float> part_max = random_values(rng, columns);
      std::vector<float> part_sum = random_values(rng, columns);
      const std::vector<float> part_out = random_values(rng, columns * rank);
      for (float& v : part_sum) v = 2 + std::fabs(v);
      for (float& v : sum) v = 2 + std::fabs(v);
      max[1] = -std::numeric_limits<float>::infinity();  // nothing seen before
      sum[1] = 0;
      MergeAttentionParams p{.n_tokens = n,
                             .n_heads = heads,
                             .kv_lora_rank = rank,
                             .state = {max.data(), sum.data()},
                             .out = out.data(),
                             .part = {part_max.data(), part_sum.data()},
                             .part_out = part_out.data(),
                             .finish = finish};
      auto expected_max = max, expected_sum = sum, expected = out;
      gpu->merge_attention({}, p);
      gpu.finish();
      p.state = {expected_max.data(), expected_sum.data()};
      p.out = expected.data();
      scalar->merge_attention({}, p);
      check_close("max", max, expected_max, 0);
      check_close("sum", sum, expected_sum, 1e-4);
      check_close("out", out, expected, 1e-4);
    }
}

TEST_CASE("attention over no rows gives zeros", "[cuda][attention]") {
  TestGpu gpu(Numerics::kFast);
  const Absorbed s{{16, 32, 16}, 4, 2, 0};
  Cache cache(s.layout, {KvType::kF16}, 16);
  cache.n_rows = 0;
  Rng rng(77);
  const auto out = attend(*gpu, &gpu, s, cache, random_values(rng, 2 * 4 * 51), {});
  CHECK(std::all_of(out.begin(), out.end(), [](float v) { return v == 0; }));
}
