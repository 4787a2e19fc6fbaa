// Attention in both forms: against softmax written out in double precision over the rows that the
// pages hold, on every instruction set; and the same bits however the work is cut.
#include <catch2/catch.hpp>

#include "support/cpu_pages.h"
#include "support/cpu_test.h"

using namespace fathom;
using namespace fathom::cpu_test;

namespace {

// f32 sums of up to 576 products and a polynomial exponential, over values of size 1; the results
// are means of values of size 1.  Scalar sums run in double.
constexpr double kTolerance = 2e-5;
constexpr double kScalarTolerance = 3e-6;
// bf16 pairs: every factor is off by up to 2^-9.  Scores near 2 add up hundreds of products with
// random signs: off by about 0.005; weights by as much, relatively; values of size 4 by 0.008.
constexpr double kPairsTolerance = 0.03;

// One way in which attention runs here: f32 on each instruction set, bf16 pairs where there are
// any.
struct Form {
  std::string name, isa;
  Numerics numerics;
  double tolerance;
  std::unique_ptr<cpu::CpuBackend> backend(int threads = 2) const {
    return make_backend(isa, threads, numerics);
  }
};
std::vector<Form> forms() {
  std::vector<Form> all;
  for (const std::string& isa : runnable_isas()) {
    all.push_back({isa, isa, Numerics::kExact, isa == "scalar" ? kScalarTolerance : kTolerance});
    if (make_backend(isa, 1, Numerics::kFast)->context().pairs != nullptr)
      all.push_back({isa + " pairs", isa, Numerics::kFast, kPairsTolerance});
  }
  return all;
}

struct Shape {
  int64_t n_tokens, n_heads, r, rope, nope, v;
  int64_t first_position;  // of the first query; n_rows = first_position + n_tokens
  int64_t page_tokens = 64;
  int64_t n_rows() const { return first_position + n_tokens; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(nope + rope)); }
  std::string text() const {
    return fmt::format("tokens {} heads {} r {} rope {} nope {} v {} from {} pages {}", n_tokens,
                       n_heads, r, rope, nope, v, first_position, page_tokens);
  }
};

struct Outcome {
  std::vector<float> out, max, sum;
};

void check_same(const std::string& what, const Outcome& got, const Outcome& expected) {
  check_same_bits(what + ", out", got.out, expected.out);
  check_same_bits(what + ", max", got.max, expected.max);
  check_same_bits(what + ", sum", got.sum, expected.sum);
}

// softmax(scores) * values for one query, all in double.  score(row), value(row, i).
template <class Score, class Value>
void reference_query(int64_t n_seen, int64_t n_values, Score&& score, Value&& value, double* out) {
  std::vector<double> weights(static_cast<size_t>(n_seen));
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t row = 0; row < n_seen; ++row) {
    weights[size_t(row)] = score(row);
    top = std::max(top, weights[size_t(row)]);
  }
  for (double& w : weights) sum += w = std::exp(w - top);
  for (int64_t i = 0; i < n_values; ++i) {
    out[i] = 0;
    for (int64_t row = 0; row < n_seen; ++row) out[i] += weights[size_t(row)] / sum * value(row, i);
  }
}

// ---- absorbed ---------------------------------------------------------------------------------

struct AbsorbedCase {
  Shape shape;
  std::vector<float> q;  // [tokens, heads, r + 3 + rope + 2]: strides are not the dense ones
  int64_t head_stride() const { return shape.r + shape.rope + 5; }

  explicit AbsorbedCase(const Shape& s, uint32_t seed = 1) : shape(s) {
    q = random_values(s.n_tokens * s.n_heads * head_stride(), seed);
  }

  AttendAbsorbedParams params(const KvRows& rows, Outcome& o) const {
    return {.q_latent = q.data(),
            .q_latent_token_stride = shape.n_heads * head_stride(),
            .q_latent_head_stride = head_stride(),
            .q_rope = q.data() + shape.r + 3,
            .q_rope_token_stride = shape.n_heads * head_stride(),
            .q_rope_head_stride = head_stride(),
            .n_tokens = shape.n_tokens,
            .n_heads = shape.n_heads,
            .first_position = shape.first_position,
            .scale = shape.scale(),
            .rows = rows,
            .state = {o.max.data(), o.sum.data()},
            .out = o.out.data()};
  }

  Outcome empty() const {
    const auto n = static_cast<size_t>(shape.n_tokens * shape.n_heads);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return {std::vector<float>(n * size_t(shape.r), nan), std::vector<float>(n, nan),
            std::vector<float>(n, nan)};
  }

  // Rows handed over in calls that end at `cuts`, then the rest.
  Outcome run(cpu::CpuBackend& backend, const Pages& pages, std::vector<int64_t> cuts = {}) const {
    Outcome o = empty();
    cuts.push_back(shape.n_rows());
    int64_t first = 0;
    for (size_t i = 0; i < cuts.size(); ++i) {
      AttendAbsorbedParams p = params(pages.rows(first, cuts[i] - first), o);
      p.begin = i == 0;
      p.finish = i + 1 == cuts.size();
      GuardedWorkspace workspace(backend.workspace_bytes(p));
      backend.attend_absorbed(workspace.op(), p);
      CHECK(workspace.intact());
      first = cuts[i];
    }
    return o;
  }

  std::vector<double> reference(const std::vector<float>& rows) const {
    const int64_t d = shape.r + shape.rope;
    std::vector<double> out(static_cast<size_t>(shape.n_tokens * shape.n_heads * shape.r));
    for (int64_t t = 0; t < shape.n_tokens; ++t)
      for (int64_t h = 0; h < shape.n_heads; ++h) {
        const float* query = q.data() + (t * shape.n_heads + h) * head_stride();
        const auto score = [&](int64_t row) {
          double sum = 0;
          for (int64_t i = 0; i < shape.r; ++i) sum += double(query[i]) * rows[size_t(row * d + i)];
          for (int64_t i = 0; i < shape.rope; ++i)
            sum += double(query[shape.r + 3 + i]) * rows[size_t(row * d + shape.r + i)];
          return sum * double(shape.scale());
        };
        reference_query(
            shape.first_position + t + 1, shape.r, score,
            [&](int64_t row, int64_t i) { return double(rows[size_t(row * d + i)]); },
            out.data() + (t * shape.n_heads + h) * shape.r);
      }
    return out;
  }
};

// ---- expanded ---------------------------------------------------------------------------------

struct ExpandedCase {
  Shape shape;
  bool k_b_transposed;
  std::vector<float> q;         // [tokens, heads, nope + rope + 1]
  std::vector<float> k_b, v_b;  // as stored, f32
  std::vector<std::byte> k_data, v_data;
  Weight k_weight, v_weight;
  int64_t head_stride() const { return shape.nope + shape.rope + 1; }

  ExpandedCase(const Shape& s, bool transposed, Backend& backend, uint32_t seed = 2)
      : shape(s), k_b_transposed(transposed) {
    q = random_values(s.n_tokens * s.n_heads * head_stride(), seed);
    // Keys and values of size 1.
    const float size = 1 / std::sqrt(static_cast<float>(s.r));
    k_b = random_values(s.n_heads * s.nope * s.r, seed + 1, size);
    v_b = random_values(s.n_heads * s.v * s.r, seed + 2, size);
    k_weight = store(backend, k_b, transposed ? s.nope : s.r, transposed ? s.r : s.nope, k_data);
    v_weight = store(backend, v_b, s.v, s.r, v_data);
  }

  Weight store(Backend& backend, const std::vector<float>& values, int64_t rows, int64_t cols,
               std::vector<std::byte>& data) const {
    Weight w;
    w.dtype = DType::kF32;
    w.rows = rows;
    w.cols = cols;
    w.count = shape.n_heads;
    REQUIRE(backend.weight_layout(w).ok());
    data.resize(static_cast<size_t>(w.matrix_bytes * w.count) + 64);
    w.data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data.data()) + 63) / 64 * 64);
    for (int64_t h = 0; h < w.count; ++h)
      REQUIRE(backend.store_rows(w, h, 0, rows, values.data() + h * rows * cols).ok());
    return w;
  }

  AttendExpandedParams params(const KvRows& rows, Outcome& o) const {
    return {.q = q.data(),
            .q_token_stride = shape.n_heads * head_stride(),
            .q_head_stride = head_stride(),
            .n_tokens = shape.n_tokens,
            .n_heads = shape.n_heads,
            .qk_nope_head_dim = shape.nope,
            .v_head_dim = shape.v,
            .first_position = shape.first_position,
            .scale = shape.scale(),
            .k_b = &k_weight,
            .k_b_transposed = k_b_transposed,
            .v_b = &v_weight,
            .rows = rows,
            .state = {o.max.data(), o.sum.data()},
            .out = o.out.data()};
  }

  Outcome empty() const {
    const auto n = static_cast<size_t>(shape.n_tokens * shape.n_heads);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    return {std::vector<float>(n * size_t(shape.v), nan), std::vector<float>(n, nan),
            std::vector<float>(n, nan)};
  }

  Outcome run(cpu::CpuBackend& backend, const Pages& pages, std::vector<int64_t> cuts = {}) const {
    Outcome o = empty();
    cuts.push_back(shape.n_rows());
    int64_t first = 0;
    for (size_t i = 0; i < cuts.size(); ++i) {
      AttendExpandedParams p = params(pages.rows(first, cuts[i] - first), o);
      p.begin = i == 0;
      p.finish = i + 1 == cuts.size();
      GuardedWorkspace workspace(backend.workspace_bytes(p));
      backend.attend_expanded(workspace.op(), p);
      CHECK(workspace.intact());
      first = cuts[i];
    }
    return o;
  }

  std::vector<double> reference(const std::vector<float>& rows) const {
    const Shape& s = shape;
    const int64_t d = s.r + s.rope, n_rows = s.n_rows();
    std::vector<double> out(static_cast<size_t>(s.n_tokens * s.n_heads * s.v));
    for (int64_t h = 0; h < s.n_heads; ++h) {
      std::vector<double> keys(size_t(n_rows * s.nope)), values(size_t(n_rows * s.v));
      for (int64_t row = 0; row < n_rows; ++row) {
        const float* latent = rows.data() + row * d;
        for (int64_t i = 0; i < s.nope; ++i) {
          double sum = 0;
          for (int64_t c = 0; c < s.r; ++c)
            sum += double(latent[c]) * (k_b_transposed ? k_b[size_t((h * s.nope + i) * s.r + c)]
                                                       : k_b[size_t((h * s.r + c) * s.nope + i)]);
          keys[size_t(row * s.nope + i)] = sum;
        }
        for (int64_t i = 0; i < s.v; ++i) {
          double sum = 0;
          for (int64_t c = 0; c < s.r; ++c)
            sum += double(latent[c]) * v_b[size_t((h * s.v + i) * s.r + c)];
          values[size_t(row * s.v + i)] = sum;
        }
      }
      for (int64_t t = 0; t < s.n_tokens; ++t) {
        const float* query = q.data() + (t * s.n_heads + h) * head_stride();
        const auto score = [&](int64_t row) {
          double sum = 0;
          for (int64_t i = 0; i < s.nope; ++i)
            sum += double(query[i]) * keys[size_t(row * s.nope + i)];
          for (int64_t i = 0; i < s.rope; ++i)
            sum += double(query[s.nope + i]) * rows[size_t(row * d + s.r + i)];
          return sum * double(s.scale());
        };
        reference_query(
            s.first_position + t + 1, s.v, score,
            [&](int64_t row, int64_t i) { return values[size_t(row * s.v + i)]; },
            out.data() + (t * s.n_heads + h) * s.v);
      }
    }
    return out;
  }
};

std::vector<float> random_rows(const Shape& s, uint32_t seed = 7) {
  return random_values(s.n_rows() * (s.r + s.rope), seed);
}

const std::vector<KvType> kAllTypes = {KvType::kF32, KvType::kBF16, KvType::kF16,
                                       KvType::kF8,  KvType::kQ8_0, KvType::kQ4_0};

// tokens, heads, r, rope, nope, v, first position, page_tokens
const Shape kShapes[] = {
    {1, 1, 44, 12, 20, 20, 0},        // one row
    {1, 4, 52, 16, 24, 28, 6},        // fewer rows than a tile
    {1, 16, 512, 64, 128, 128, 699},  // V2-Lite, decode
    {1, 5, 96, 32, 36, 52, 63, 16},   // exactly one tile
    {1, 3, 96, 32, 36, 52, 64, 16},   // one row more
    {1, 128, 56, 16, 20, 20, 1100, 128},
    {3, 4, 44, 12, 20, 24, 0, 16},     // causal limit inside the first tile
    {7, 3, 52, 16, 68, 36, 509, 512},  // ... and at the end of a split
    {33, 2, 56, 12, 40, 20, 0, 64},
    {70, 5, 96, 32, 64, 48, 130, 32},
    {130, 1, 52, 16, 24, 28, 30, 1024},  // many blocks of one head
    {90, 16, 64, 16, 32, 32, 515, 64},   // blocks alone are enough tasks
};

}  // namespace

TEST_CASE("absorbed attention equals softmax written out, on every instruction set") {
  for (const Shape& shape : kShapes) {
    const AbsorbedCase c(shape);
    Pages pages(shape.page_tokens, shape.r, shape.rope, {KvType::kF32}, shape.n_rows());
    pages.write(random_rows(shape));
    const std::vector<double> expected = c.reference(pages.decoded());
    for (const Form& form : forms()) {
      const std::string& isa = form.name;
      auto backend = form.backend();
      REQUIRE(std::string(backend->context().rows->name) == form.isa);
      REQUIRE((backend->context().pairs != nullptr) == (form.numerics == Numerics::kFast));
      check_close(isa + ": " + shape.text(), c.run(*backend, pages).out, expected, form.tolerance);
    }
  }
}

TEST_CASE("expanded attention equals softmax written out, on every instruction set") {
  for (Shape shape : kShapes)
    for (const bool transposed : {false, true}) {
      if (shape.n_rows() > 600) {  // time: heads are all alike here
        if (transposed) continue;
        shape.n_heads = std::min<int64_t>(shape.n_heads, 4);
      }
      auto scalar = make_backend("scalar");
      const ExpandedCase c(shape, transposed, *scalar);
      Pages pages(shape.page_tokens, shape.r, shape.rope, {KvType::kF32}, shape.n_rows());
      pages.write(random_rows(shape));
      const std::vector<double> expected = c.reference(pages.decoded());
      for (const Form& form : forms()) {
        const std::string& isa = form.name;
        auto backend = form.backend();
        check_close(fmt::format("{}: {} transposed {}", isa, shape.text(), transposed),
                    c.run(*backend, pages).out, expected, form.tolerance);
      }
    }
}

TEST_CASE("attention over typed pages is attention over the rows they hold") {
  const Shape shape{5, 6, 300, 12, 20, 28, 200, 32};  // 300: tails of every kind of block
  const std::vector<float> values = random_rows(shape);
  std::vector<std::vector<KvType>> mixes;
  for (const KvType type : kAllTypes) mixes.push_back({type});
  mixes.push_back(kAllTypes);  // another type on each page
  for (const auto& types : mixes) {
    Pages pages(shape.page_tokens, shape.r, shape.rope, types, shape.n_rows(), 3, 2);
    pages.write(values);
    const std::vector<float> held = pages.decoded();
    Pages plain(shape.page_tokens, shape.r, shape.rope, {KvType::kF32}, shape.n_rows());
    plain.write(held);
    const AbsorbedCase absorbed(shape);
    const std::vector<double> expected = absorbed.reference(held);
    for (const Form& form : forms()) {
      const std::string& isa = form.name;
      const std::string what =
          fmt::format("{}, {} types from {}", isa, types.size(), kv_type_name(types[0]));
      auto backend = form.backend();
      const Outcome got = absorbed.run(*backend, pages);
      check_close(what, got.out, expected, form.tolerance);
      check_same(what + ": absorbed as over f32 rows", got, absorbed.run(*backend, plain));
      const ExpandedCase expanded(shape, true, *backend);
      check_same(what + ": expanded as over f32 rows", expanded.run(*backend, pages),
                 expanded.run(*backend, plain));
    }
  }
}

TEST_CASE("page size, threads and the cut of rows into calls do not change a bit") {
  const Shape shapes[] = {{1, 16, 56, 16, 20, 20, 1700},    // decode
                          {2, 3, 52, 12, 20, 24, 1500},     // few columns
                          {40, 16, 52, 12, 20, 24, 1030}};  // many columns
  for (const Shape& shape : shapes) {
    const std::vector<float> values = random_rows(shape);
    for (const Form& form : forms()) {
      const std::string& isa = form.name;
      if (form.isa == "scalar" && shape.n_heads > 3) continue;  // the same driver; time
      auto single = form.backend(1);
      const AbsorbedCase absorbed(shape);
      const ExpandedCase expanded(shape, true, *single);
      Pages first_pages(64, shape.r, shape.rope, kAllTypes, shape.n_rows());
      Pages bf16_pages(64, shape.r, shape.rope, {KvType::kBF16}, shape.n_rows());
      first_pages.write(values);
      bf16_pages.write(values);
      const Outcome want_absorbed = absorbed.run(*single, bf16_pages);
      const Outcome want_expanded = expanded.run(*single, bf16_pages);
      const Outcome want_mixed = absorbed.run(*single, first_pages);
      for (const int64_t page_tokens : {16, 128, 512, 1024}) {
        const std::string what = fmt::format("{}: {} tokens to a page", isa, page_tokens);
        Pages pages(page_tokens, shape.r, shape.rope, {KvType::kBF16}, shape.n_rows());
        pages.write(values);
        check_same(what + ", absorbed", absorbed.run(*single, pages), want_absorbed);
        check_same(what + ", expanded", expanded.run(*single, pages), want_expanded);
      }
      for (const int threads : {2, 3, 5}) {
        const std::string what = fmt::format("{}: {} threads", isa, threads);
        auto backend = form.backend(threads);
        check_same(what + ", absorbed", absorbed.run(*backend, bf16_pages), want_absorbed);
        check_same(what + ", expanded", expanded.run(*backend, bf16_pages), want_expanded);
        check_same(what + ", mixed types", absorbed.run(*backend, first_pages), want_mixed);
      }
      for (const std::vector<int64_t>& cuts :
           {std::vector<int64_t>{512}, {1024}, {512, 1024}, {0, 1024, 1024}}) {
        const std::string what = fmt::format("{}: {} cuts, first {}", isa, cuts.size(), cuts[0]);
        for (const int threads : {1, 3}) {
          auto backend = form.backend(threads);
          check_same(what + ", absorbed", absorbed.run(*backend, bf16_pages, cuts), want_absorbed);
          check_same(what + ", expanded", expanded.run(*backend, bf16_pages, cuts), want_expanded);
        }
      }
    }
  }
}

TEST_CASE("a token of a chunk gets the bits that it gets alone") {
  const Shape shape{41, 6, 52, 16, 20, 24, 600};
  const std::vector<float> values = random_rows(shape);
  Pages pages(64, shape.r, shape.rope, {KvType::kBF16}, shape.n_rows());
  pages.write(values);
  for (const Form& form : forms()) {
    const std::string& isa = form.name;
    auto backend = form.backend();
    const AbsorbedCase absorbed(shape);
    const ExpandedCase expanded(shape, true, *backend);
    const Outcome chunk = absorbed.run(*backend, pages), tiles = expanded.run(*backend, pages);
    for (const int64_t token : {0, 7, 40}) {
      Shape one = shape;
      one.n_tokens = 1;
      one.first_position += token;
      AbsorbedCase alone(one);
      const auto width = static_cast<int64_t>(alone.q.size());
      alone.q.assign(absorbed.q.begin() + token * width, absorbed.q.begin() + (token + 1) * width);
      const int64_t n = shape.n_heads * shape.r;
      check_same_bits(fmt::format("{}: token {} absorbed", isa, token),
                      alone.run(*backend, pages).out,
                      {chunk.out.begin() + token * n, chunk.out.begin() + (token + 1) * n});
      ExpandedCase alone_tiles(one, true, *backend);
      const auto tiles_width = static_cast<int64_t>(alone_tiles.q.size());
      alone_tiles.q.assign(expanded.q.begin() + token * tiles_width,
                           expanded.q.begin() + (token + 1) * tiles_width);
      const int64_t m = shape.n_heads * shape.v;
      check_same_bits(fmt::format("{}: token {} expanded", isa, token),
                      alone_tiles.run(*backend, pages).out,
                      {tiles.out.begin() + token * m, tiles.out.begin() + (token + 1) * m});
    }
  }
}

TEST_CASE("rows behind the last query are never read, rows before it always count") {
  const Shape shape{3, 4, 52, 16, 20, 24, 70, 16};
  Pages pages(shape.page_tokens, shape.r, shape.rope, {KvType::kF32}, shape.n_rows() + 60);
  pages.write(random_values((shape.n_rows() + 60) * (shape.r + shape.rope), 3));
  for (const Form& form : forms()) {
    const std::string& isa = form.name;
    auto backend = form.backend();
    const AbsorbedCase absorbed(shape);
    const ExpandedCase expanded(shape, false, *backend);
    const Outcome want = absorbed.run(*backend, pages), want_tiles = expanded.run(*backend, pages);
    // More rows than the queries can see, the pages behind them not even resident.
    Outcome got = absorbed.empty(), tiles = expanded.empty();
    AttendAbsorbedParams a = absorbed.params(pages.rows(0, shape.n_rows() + 60), got);
    AttendExpandedParams e = expanded.params(a.rows, tiles);
    std::vector<KvPage> resident(pages.rows().pages, pages.rows().pages + 9);
    for (size_t i = 5; i < resident.size(); ++i) resident[i].data = nullptr;
    a.rows.pages = e.rows.pages = resident.data();
    GuardedWorkspace wa(backend->workspace_bytes(a)), we(backend->workspace_bytes(e));
    backend->attend_absorbed(wa.op(), a);
    backend->attend_expanded(we.op(), e);
    check_same(isa + " absorbed", got, want);
    check_same(isa + " expanded", tiles, want_tiles);
  }
}

TEST_CASE("workspace of attention: no term of the context, and more tokens never need less") {
  for (const Form& form : forms())
    for (const int threads : {1, 2, 7}) {
      auto backend = form.backend(threads);
      for (const int64_t n_heads : {1, 16, 128}) {
        int64_t last_absorbed = 0, last_expanded = 0;
        for (const int64_t n_tokens : {1, 2, 31, 32, 33, 64, 100, 512, 1024, 1025, 2048, 8192}) {
          AttendAbsorbedParams a{};
          a.n_tokens = n_tokens;
          a.n_heads = n_heads;
          a.rows.layout = {64, 512, 64};
          AttendExpandedParams e{};
          e.n_tokens = n_tokens;
          e.n_heads = n_heads;
          e.qk_nope_head_dim = e.v_head_dim = 128;
          e.rows.layout = a.rows.layout;
          const int64_t absorbed = backend->workspace_bytes(a);
          const int64_t expanded = backend->workspace_bytes(e);
          a.rows.n_rows = e.rows.n_rows = 163840;
          a.first_position = e.first_position = 163840 - n_tokens;
          CHECK(backend->workspace_bytes(a) == absorbed);
          CHECK(backend->workspace_bytes(e) == expanded);
          CHECK(absorbed >= last_absorbed);
          CHECK(expanded >= last_expanded);
          // V3 at a chunk of 512 has 160 MiB for everything.
          CHECK(absorbed <= threads * (int64_t{2} << 20));
          CHECK(expanded <= threads * (int64_t{3} << 20));
          last_absorbed = absorbed;
          last_expanded = expanded;
        }
      }
    }
}

TEST_CASE("extreme scores: large ones do not overflow, a NaN shows") {
  const Shape shape{2, 3, 64, 16, 32, 32, 90, 16};
  std::vector<float> values = random_rows(shape);
  for (float& v : values) v *= 100;  // scores of some ten thousands
  Pages pages(shape.page_tokens, shape.r, shape.rope, {KvType::kF32}, shape.n_rows());
  pages.write(values);
  const AbsorbedCase c(shape);
  const std::vector<double> expected = c.reference(values);
  for (const Form& form : forms()) {
    const std::string& isa = form.name;
    auto backend = form.backend();
    const Outcome got = c.run(*backend, pages);
    // Scores near 1e4 carry rounding of 1e-3, which the exponential turns into relative error; in
    // bf16 of 20, so that the best row may be another one.
    if (form.numerics == Numerics::kExact)
      check_close(isa, got.out, expected, 100 * 5e-3);
    else
      for (const float v : got.out) CHECK(std::fabs(v) < 1000);
  }
  values[5] = std::numeric_limits<float>::quiet_NaN();  // a latent of row 0: all see it
  pages.write(values);
  for (const Form& form : forms()) {
    auto backend = form.backend();
    const Outcome got = c.run(*backend, pages);
    for (const float v : got.out) CHECK(std::isnan(v));
  }
}
