// ffn and experts: gate and up together where they are of one type, then down.
#include <algorithm>

#include "cuda/cuda_backend.h"
#include "cuda/products.h"
#include "cuda/weights.h"
#include "fathom/quant.hpp"

namespace fathom::cuda {
namespace {

// One kernel can do both products and join them.
bool are_pair(const Weight& gate, const Weight& up) noexcept {
  return gate.dtype == up.dtype && gate.block_scaled == up.block_scaled;
}

// ---- ffn ----

struct FfnScratch {
  float *gate, *up;  // [n_tokens, intermediate_size]; up only where they are computed apart
  Int8Rows x;        // few rows, rounded, for gate and up together
};
FfnScratch carve(Workspace& space, const FfnParams& p, bool exact) noexcept {
  FfnScratch s{};
  const int64_t n_hidden = p.n_tokens * p.gate->rows;
  s.gate = space.take<float>(n_hidden);
  if (!are_pair(*p.gate, *p.up) || product_method(exact, p.n_tokens) == Method::kGemm)
    s.up = space.take<float>(n_hidden);
  if (takes_int8(*p.gate, exact))
    s.x = carve_int8(space, std::min(p.n_tokens, kFewRows), p.gate->cols);
  // Gate, up and down one after the other in the same place.
  for (const Weight* w : {p.gate, p.up, p.down}) {
    const int64_t mark = space.mark();
    carve_product(space, *w, p.n_tokens, exact);
    space.rewind(mark);
  }
  return s;
}

// `space` is as carve() left it.
int run_ffn(Device& device, const FfnParams& p, bool exact, const Workspace& space,
            const FfnScratch& s) noexcept {
  const int64_t inner = p.gate->rows, cols = p.gate->cols;
  const auto dense = [&](const MatmulParams& m) {
    Workspace place = space;  // behind the hidden values, the same for each product
    return multiply(device, m, exact, carve_product(place, *m.w, m.n_rows, exact));
  };
  if (s.up == nullptr) {
    ProductParams product{.w = view_of(*p.gate),
                          .up = view_of(*p.up),
                          .x = p.x,
                          .x_stride = cols,
                          .x_matrix_stride = 0,
                          .out = s.gate,
                          .out_stride = inner,
                          .out_matrix_stride = 0,
                          .n_rows = p.n_tokens,
                          .add = false,
                          .groups = {}};
    const Stream stream = device.stream();
    if (p.n_tokens > kFewRows) {
      if (int e = product_tiles(stream, product)) return e;
    } else if (takes_int8(*p.gate, exact)) {
      if (int e = round_to_int8(stream, p.x, cols, p.n_tokens, cols, s.x)) return e;
      if (int e = product_int8(stream, product, s.x)) return e;
    } else {
      if (int e = product_few_rows(stream, product)) return e;
    }
  } else {
    if (int e = dense({p.x, cols, p.n_tokens, p.gate, s.gate, inner})) return e;
    if (int e = dense({p.x, cols, p.n_tokens, p.up, s.up, inner})) return e;
    if (int e = swiglu(device.stream(), s.gate, s.up, p.n_tokens * inner)) return e;
  }
  return dense({s.gate, inner, p.n_tokens, p.down, p.out, p.down->rows, p.add});
}

// ---- experts ----
//
// The results of all (token, expert) pairs are kept until they are added up in order, so the
// columns are taken in slices that fit.

constexpr int64_t kResultValues = int64_t{4} << 20;
constexpr int64_t kSliceUnit = 128;  // as the rows of a scale block, which a slice must not cut
static_assert(kSliceUnit % kF8ScaleBlock == 0);

struct ExpertsScratch {
  SortParams sort;
  float *gate, *up;    // [n_pairs, moe_intermediate_size]; up only where they are computed apart
  float* results;      // [n_pairs, slice]
  int64_t slice;       // rows of down at a time
  Int8Rows x, hidden;  // few rows for each expert, rounded: [n_tokens], [n_pairs]
};

// By all experts of the layer: the same choice on every device that has some of them.
int64_t most_few_pairs(const ExpertsParams& p) noexcept {
  return kFewRows * (p.n_experts > 0 ? p.n_experts : p.gate->count);
}

ExpertsScratch carve(Workspace& space, const ExpertsParams& p, bool exact) noexcept {
  const int64_t n_pairs = p.n_tokens * p.num_experts_per_tok, n_experts = p.gate->count;
  ExpertsScratch s{};
  const int64_t few = std::min(n_pairs, most_few_pairs(p));
  if (takes_int8(*p.gate, exact) || takes_int8(*p.up, exact))
    s.x = carve_int8(space, std::min(p.n_tokens, few), p.gate->cols);
  if (takes_int8(*p.down, exact)) s.hidden = carve_int8(space, few, p.down->cols);
  s.sort = {.ids = p.ids,
            .n_pairs = n_pairs,
            .num_experts_per_tok = p.num_experts_per_tok,
            .first_expert = p.first_expert,
            .n_experts = n_experts,
            .first = space.take<int32_t>(n_experts + 1),
            .active = space.take<int32_t>(n_experts),
            .n_active = space.take<int32_t>(1),
            .tokens = space.take<int32_t>(n_pairs),
            .places = space.take<int32_t>(n_pairs)};
  s.gate = space.take<float>(n_pairs * p.gate->rows);
  if (!are_pair(*p.gate, *p.up)) s.up = space.take<float>(n_pairs * p.gate->rows);
  const int64_t hidden = p.down->rows;
  const int64_t fits = n_pairs > 0 ? kResultValues / n_pairs / kSliceUnit * kSliceUnit : hidden;
  s.slice = std::min(hidden, std::max(fits, kSliceUnit));
  // Never less for more pairs: the slices' rounding must not show.
  s.results = space.take<float>(
      std::max(std::min(n_pairs * hidden, kResultValues), n_pairs * std::min(hidden, kSliceUnit)));
  return s;
}

// Rows [first, first + n) of every matrix.
WeightView row_slice(const Weight& w, int64_t first, int64_t n) noexcept {
  WeightView view = view_of(w);
  view.data += first * view.code_stride;
  view.meta_at += first * (view.meta_stride - view.code_stride);
  view.scales_at += first / kF8ScaleBlock * ((w.cols + kF8ScaleBlock - 1) / kF8ScaleBlock) * 4 -
                    first * view.code_stride;
  view.rows = n;
  return view;
}

int run_experts(Device& device, const ExpertsParams& p, bool exact,
                const ExpertsScratch& s) noexcept {
  const Stream stream = device.stream();
  const int64_t n_pairs = s.sort.n_pairs, inner = p.gate->rows, hidden = p.down->rows;
  const bool few = exact || n_pairs <= most_few_pairs(p);
  const auto product = [&](const ProductParams& params, const Int8Rows& rounded) {
    if (!few) return product_tiles(stream, params);
    return !exact && has_int8_product(params.w.dtype) ? product_int8(stream, params, rounded)
                                                      : product_few_rows(stream, params);
  };
  if (few && s.x.codes != nullptr)
    if (int e = round_to_int8(stream, p.x, p.gate->cols, p.n_tokens, p.gate->cols, s.x)) return e;
  if (int e = sort_by_expert(stream, s.sort)) return e;
  ProductParams in{.w = view_of(*p.gate),
                   .up = {},
                   .x = p.x,
                   .x_stride = p.gate->cols,
                   .x_matrix_stride = 0,
                   .out = s.gate,
                   .out_stride = inner,
                   .out_matrix_stride = 0,
                   .n_rows = n_pairs,
                   .add = false,
                   .groups = {s.sort.n_active, s.sort.active, s.sort.first, s.sort.tokens}};
  if (s.up == nullptr) {
    in.up = view_of(*p.up);
    if (int e = product(in, s.x)) return e;
  } else {
    if (int e = product(in, s.x)) return e;
    in.w = view_of(*p.up);
    in.out = s.up;
    if (int e = product(in, s.x)) return e;
    if (int e = swiglu(stream, s.gate, s.up, n_pairs * inner)) return e;
  }
  ProductParams down = in;
  down.up = {};
  down.x = s.gate;
  down.x_stride = inner;
  down.out = s.results;
  down.groups.tokens = nullptr;
  if (few && s.hidden.codes != nullptr)
    if (int e = round_to_int8(stream, s.gate, inner, n_pairs, inner, s.hidden)) return e;
  for (int64_t first = 0; first < hidden; first += s.slice) {
    const int64_t n = std::min(s.slice, hidden - first);
    down.w = row_slice(*p.down, first, n);
    down.out_stride = n;
    if (int e = product(down, s.hidden)) return e;
    if (p.rows != nullptr) {
      if (int e = keep_expert_rows(stream, {.rows = s.results,
                                            .places = s.sort.places,
                                            .n_pairs = n_pairs,
                                            .n_cols = n,
                                            .first_col = first,
                                            .out_stride = hidden,
                                            .out = p.rows}))
        return e;
      continue;
    }
    if (int e = combine_experts(stream, {.rows = s.results,
                                         .places = s.sort.places,
                                         .weights = p.weights,
                                         .n_tokens = p.n_tokens,
                                         .num_experts_per_tok = p.num_experts_per_tok,
                                         .n_cols = n,
                                         .first_col = first,
                                         .out_stride = hidden,
                                         .out = p.out,
                                         .add = p.add}))
      return e;
  }
  return 0;
}

}  // namespace

int64_t CudaBackend::workspace_bytes(const FfnParams& p) const noexcept {
  Workspace counting;
  carve(counting, p, exact());
  return counting.peak_bytes();
}

void CudaBackend::ffn(const OpContext& op, const FfnParams& p) noexcept {
  if (p.n_tokens == 0) return;
  Workspace space(op);
  const FfnScratch s = carve(space, p, exact());
  check(op, run_ffn(*device_, p, exact(), space, s));
}

int64_t CudaBackend::workspace_bytes(const ExpertsParams& p) const noexcept {
  Workspace counting;
  carve(counting, p, exact());
  return counting.peak_bytes();
}

void CudaBackend::experts(const OpContext& op, const ExpertsParams& p) noexcept {
  if (p.n_tokens == 0 || p.num_experts_per_tok == 0) return;
  Workspace space(op);
  const ExpertsScratch s = carve(space, p, exact());
  check(op, run_experts(*device_, p, exact(), s));
}

}  // namespace fathom::cuda
