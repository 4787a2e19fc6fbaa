#include "reference_backend.h"

#include <sys/mman.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "fathom/quant.hpp"

namespace fathom::test {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using FloatMap =
    Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, 0,
               Eigen::OuterStride<>>;

// Only unquantised rows: what the reference compares is attention, not the page codec.
double read_value(const void* row, int64_t i, KvType type) {
  if (type == KvType::kF32) return static_cast<const float*>(row)[i];
  const uint16_t bits = static_cast<const uint16_t*>(row)[i];
  return type == KvType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}
void write_value(void* row, int64_t i, KvType type, float value) {
  if (type == KvType::kF32)
    static_cast<float*>(row)[i] = value;
  else
    static_cast<uint16_t*>(row)[i] = type == KvType::kF16 ? f32_to_f16(value) : f32_to_bf16(value);
}

struct Row {
  std::byte* latent;
  std::byte* rope;
  KvType type;
};
Row row_of(const KvRows& rows, int64_t i) {
  const KvLayout& layout = rows.layout;
  const KvPage& page = rows.pages[i / layout.page_tokens];
  auto* slot = static_cast<std::byte*>(page.data) + rows.layer_slot * layout.layer_bytes(page.type);
  const int64_t at = i % layout.page_tokens;
  return {slot + at * layout.latent_row_bytes(page.type),
          slot + layout.rope_plane_offset(page.type) + at * layout.rope_row_bytes(page.type),
          page.type};
}

Matrix weight_matrix(const Weight& w, int64_t index) {
  return FloatMap(reinterpret_cast<const float*>(w.matrix(index)), w.rows, w.cols,
                  Eigen::OuterStride<>(w.cols))
      .cast<double>();
}

Matrix silu_product(const Matrix& gate, const Matrix& up) {
  return (gate.array() / (1 + (-gate.array()).exp()) * up.array()).matrix();
}

class ReferenceBackend final : public Backend {
 public:
  DeviceKind kind() const noexcept override { return DeviceKind::kCpu; }
  std::string_view name() const noexcept override { return "cpu"; }
  std::string describe() const override { return "reference: double precision, Eigen"; }
  int64_t granularity() const noexcept override { return 4096; }
  MemoryState memory() const noexcept override { return {int64_t{8} << 30, int64_t{8} << 30}; }
  int64_t runtime_bytes() const noexcept override { return 0; }
  bool host_accessible() const noexcept override { return true; }

  Result<void*> reserve(int64_t bytes) noexcept override {
    void* base = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return Status(Code::kMemory, "mmap");
    return base;
  }
  Status commit(void*, int64_t, int64_t) noexcept override { return {}; }
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept override {
    madvise(static_cast<std::byte*>(base) + offset, static_cast<size_t>(bytes), MADV_DONTNEED);
  }
  void release(void* base, int64_t bytes) noexcept override {
    munmap(base, static_cast<size_t>(bytes));
  }
  Status upload(void* device, const void* host, int64_t bytes) noexcept override {
    std::memcpy(device, host, static_cast<size_t>(bytes));
    return {};
  }
  Status download(void* host, const void* device, int64_t bytes) noexcept override {
    return upload(host, device, bytes);
  }

  Status weight_layout(Weight& w) const noexcept override {
    w.matrix_bytes = (w.rows * w.cols * 4 + 63) / 64 * 64;
    return {};
  }
  Status store_rows(const Weight& w, int64_t index, int64_t first, int64_t n,
                    const void* rows) noexcept override {
    auto* out = reinterpret_cast<float*>(w.matrix(index)) + first * w.cols;
    // Scales come first (the loader's order) and are waiting in the matrix: keep a copy.
    dequantize(w.dtype, rows, n * w.cols, out);
    if (w.block_scaled)
      for (int64_t r = 0; r < n; ++r)
        for (int64_t c = 0; c < w.cols; ++c)
          out[r * w.cols + c] *=
              scales_[static_cast<size_t>((first + r) / 128 * ((w.cols + 127) / 128) + c / 128)];
    return {};
  }
  Status store_scales(const Weight& w, int64_t, const float* scales) noexcept override {
    scales_.assign(scales, scales + (w.rows + 127) / 128 * ((w.cols + 127) / 128));
    return {};
  }

  int64_t workspace_bytes(const MatmulParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const HeadsMatmulParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const AttendAbsorbedParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const AttendExpandedParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const FfnParams&) const noexcept override { return 0; }
  int64_t workspace_bytes(const ExpertsParams&) const noexcept override { return 0; }

  void embed(const OpContext&, const EmbedParams& p) noexcept override {
    const auto* table = reinterpret_cast<const float*>(p.table->matrix(0));
    for (int64_t t = 0; t < p.n_tokens; ++t)
      std::copy_n(table + p.tokens[t] * p.table->cols, p.table->cols, p.out + t * p.table->cols);
  }

  void rms_norm(const OpContext&, const RmsNormParams& p) noexcept override {
    for (int64_t t = 0; t < p.n_rows; ++t) {
      const float* x = p.x + t * p.x_stride;
      double sum = 0;
      for (int64_t i = 0; i < p.n_cols; ++i) sum += double{x[i]} * x[i];
      const double scale = 1 / std::sqrt(sum / static_cast<double>(p.n_cols) + double{p.eps});
      for (int64_t i = 0; i < p.n_cols; ++i)
        p.out[t * p.out_stride + i] = static_cast<float>(x[i] * scale * p.weight[i]);
    }
  }

  void matmul(const OpContext&, const MatmulParams& p) noexcept override {
    const Matrix y =
        rows_of(p.x, p.x_stride, p.n_rows, p.w->cols) * weight_matrix(*p.w, 0).transpose();
    for (int64_t t = 0; t < p.n_rows; ++t)
      for (int64_t r = 0; r < p.w->rows; ++r) {
        float& out = p.out[t * p.out_stride + r];
        out = static_cast<float>(p.add ? out + y(t, r) : y(t, r));
      }
  }

  void heads_matmul(const OpContext&, const HeadsMatmulParams& p) noexcept override {
    for (int64_t h = 0; h < p.w->count; ++h) {
      Matrix w = weight_matrix(*p.w, h);
      if (p.transposed) w.transposeInPlace();
      const Matrix y = rows_of(p.x + h * p.x_head_stride, p.x_token_stride, p.n_tokens, w.cols()) *
                       w.transpose();
      for (int64_t t = 0; t < p.n_tokens; ++t)
        for (int64_t r = 0; r < w.rows(); ++r)
          p.out[t * p.out_token_stride + h * p.out_head_stride + r] = static_cast<float>(y(t, r));
    }
  }

  void rope_table(const OpContext&, const RopeTableParams& p) noexcept override {
    for (int64_t t = 0; t < p.n_tokens; ++t)
      for (int64_t i = 0; i < p.rope_dim / 2; ++i) {
        const double angle = static_cast<double>(p.first_position + t) * p.inv_freq[i];
        float* out = p.cos_sin + (t * p.rope_dim / 2 + i) * 2;
        out[0] = static_cast<float>(std::cos(angle) * p.multiplier);
        out[1] = static_cast<float>(std::sin(angle) * p.multiplier);
      }
  }

  void rope(const OpContext&, const RopeParams& p) noexcept override {
    for (int64_t t = 0; t < p.n_tokens; ++t)
      for (int64_t h = 0; h < p.n_heads; ++h)
        rotate(p.x + t * p.token_stride + h * p.head_stride, p.cos_sin + t * p.rope_dim,
               p.rope_dim);
  }

  void kv_append(const OpContext& op, const KvAppendParams& p) noexcept override {
    const KvLayout& layout = p.rows.layout;
    std::vector<float> latent(static_cast<size_t>(layout.kv_lora_rank));
    std::vector<float> rope(static_cast<size_t>(layout.qk_rope_head_dim));
    for (int64_t i = 0; i < p.rows.n_rows; ++i) {
      const float* kv = p.kv + i * p.kv_stride;
      rms_norm(op,
               {kv, p.kv_stride, p.norm_weight, p.eps, 1, layout.kv_lora_rank, latent.data(), 0});
      std::copy_n(kv + layout.kv_lora_rank, rope.size(), rope.data());
      rotate(rope.data(), p.cos_sin + i * layout.qk_rope_head_dim, layout.qk_rope_head_dim);
      const Row row = row_of(p.rows, p.rows.first_row + i);
      for (size_t c = 0; c < latent.size(); ++c)
        write_value(row.latent, static_cast<int64_t>(c), row.type, latent[c]);
      for (size_t c = 0; c < rope.size(); ++c)
        write_value(row.rope, static_cast<int64_t>(c), row.type, rope[c]);
    }
  }

  void kv_convert(const OpContext&, const KvConvertParams&) noexcept override {
    std::abort();  // the reference has unquantised rows only
  }

  void attend_absorbed(const OpContext&, const AttendAbsorbedParams& p) noexcept override {
    const int64_t rank = p.rows.layout.kv_lora_rank, rope = p.rows.layout.qk_rope_head_dim;
    const Matrix keys = read_rows(p.rows);
    for (int64_t t = 0; t < p.n_tokens; ++t)
      for (int64_t h = 0; h < p.n_heads; ++h) {
        Eigen::RowVectorXd q(rank + rope);
        for (int64_t i = 0; i < rank; ++i)
          q(i) = p.q_latent[t * p.q_latent_token_stride + h * p.q_latent_head_stride + i];
        for (int64_t i = 0; i < rope; ++i)
          q(rank + i) = p.q_rope[t * p.q_rope_token_stride + h * p.q_rope_head_stride + i];
        const int64_t seen = std::min(keys.rows(), p.first_position + t + 1);
        const Eigen::VectorXd weights =
            softmax(keys.topRows(seen) * q.transpose() * double{p.scale});
        const Eigen::RowVectorXd out = weights.transpose() * keys.topRows(seen).leftCols(rank);
        for (int64_t i = 0; i < rank; ++i)
          p.out[(t * p.n_heads + h) * rank + i] = static_cast<float>(out(i));
      }
  }

  void attend_expanded(const OpContext&, const AttendExpandedParams& p) noexcept override {
    const int64_t rank = p.rows.layout.kv_lora_rank, rope = p.rows.layout.qk_rope_head_dim;
    const Matrix rows = read_rows(p.rows);
    for (int64_t h = 0; h < p.n_heads; ++h) {
      Matrix k_b = weight_matrix(*p.k_b, h);  // as [nope, rank]
      if (!p.k_b_transposed) k_b.transposeInPlace();
      Matrix keys(rows.rows(), p.qk_nope_head_dim + rope);
      keys << rows.leftCols(rank) * k_b.transpose(), rows.rightCols(rope);
      const Matrix values = rows.leftCols(rank) * weight_matrix(*p.v_b, h).transpose();
      for (int64_t t = 0; t < p.n_tokens; ++t) {
        const Matrix q =
            rows_of(p.q + t * p.q_token_stride + h * p.q_head_stride, 0, 1, keys.cols());
        const int64_t seen = std::min(rows.rows(), p.first_position + t + 1);
        const Eigen::VectorXd weights =
            softmax(keys.topRows(seen) * q.row(0).transpose() * double{p.scale});
        const Eigen::RowVectorXd out = weights.transpose() * values.topRows(seen);
        for (int64_t i = 0; i < p.v_head_dim; ++i)
          p.out[(t * p.n_heads + h) * p.v_head_dim + i] = static_cast<float>(out(i));
      }
    }
  }

  void merge_attention(const OpContext&, const MergeAttentionParams& p) noexcept override {
    for (int64_t col = 0; col < p.n_tokens * p.n_heads; ++col) {
      const double a = p.state.max[col], b = p.part.max[col], top = std::max(a, b);
      const double keep = p.state.sum[col] == 0 ? 0 : std::exp(a - top);
      const double take = p.part.sum[col] == 0 ? 0 : std::exp(b - top);
      const double sum = keep * p.state.sum[col] + take * p.part.sum[col];
      for (int64_t i = col * p.kv_lora_rank; i < (col + 1) * p.kv_lora_rank; ++i) {
        const double value =
            (keep == 0 ? 0 : keep * p.out[i]) + (take == 0 ? 0 : take * p.part_out[i]);
        p.out[i] = static_cast<float>(!p.finish ? value : sum == 0 ? 0 : value / sum);
      }
      p.state.max[col] = static_cast<float>(top);
      p.state.sum[col] = static_cast<float>(sum);
    }
  }

  void route(const OpContext&, const RouteParams& p) noexcept override {
    const auto n = static_cast<size_t>(p.n_experts);
    std::vector<double> score(n), choice(n);
    for (int64_t t = 0; t < p.n_tokens; ++t) {
      const float* logits = p.scores + t * p.n_experts;
      double sum = 0, most = *std::max_element(logits, logits + p.n_experts);
      for (size_t e = 0; e < n; ++e) {
        score[e] = p.scoring_func == ScoringFunc::kSigmoid ? 1 / (1 + std::exp(-double{logits[e]}))
                                                           : std::exp(logits[e] - most);
        sum += score[e];
      }
      for (size_t e = 0; e < n; ++e) {
        if (p.scoring_func == ScoringFunc::kSoftmax) score[e] /= sum;
        choice[e] = score[e] + (p.bias ? double{p.bias[e]} : 0);
      }
      if (p.n_group > 1 && p.topk_method != TopkMethod::kGreedy) drop_groups(p, choice);
      const std::vector<size_t> best = top(choice, static_cast<size_t>(p.num_experts_per_tok));
      double total = 0;
      for (size_t e : best) total += score[e];
      for (size_t k = 0; k < best.size(); ++k) {
        const size_t at = static_cast<size_t>(t * p.num_experts_per_tok) + k;
        p.ids[at] = static_cast<int32_t>(best[k]);
        p.weights[at] = static_cast<float>(score[best[k]] / (p.norm_topk_prob ? total + 1e-20 : 1) *
                                           double{p.routed_scaling_factor});
      }
    }
  }

  void ffn(const OpContext&, const FfnParams& p) noexcept override {
    const Matrix y =
        network(rows_of(p.x, p.gate->cols, p.n_tokens, p.gate->cols), p.gate, p.up, p.down, 0);
    for (int64_t t = 0; t < p.n_tokens; ++t)
      for (int64_t i = 0; i < y.cols(); ++i) {
        float& out = p.out[t * y.cols() + i];
        out = static_cast<float>(p.add ? out + y(t, i) : y(t, i));
      }
  }

  void experts(const OpContext&, const ExpertsParams& p) noexcept override {
    if (!p.add) std::fill_n(p.out, p.n_tokens * p.down->rows, 0.0f);
    for (int64_t t = 0; t < p.n_tokens; ++t)
      for (int64_t k = 0; k < p.num_experts_per_tok; ++k) {
        const int64_t at = t * p.num_experts_per_tok + k;
        const int64_t expert = p.ids[at] - p.first_expert;
        if (expert < 0 || expert >= p.gate->count) continue;
        const Matrix y = network(rows_of(p.x + t * p.gate->cols, 0, 1, p.gate->cols), p.gate, p.up,
                                 p.down, expert);
        for (int64_t i = 0; i < y.cols(); ++i)
          p.out[t * y.cols() + i] += static_cast<float>(y(0, i) * double{p.weights[at]});
      }
  }

  void add(const OpContext&, const AddParams& p) noexcept override {
    for (int64_t i = 0; i < p.n; ++i) p.out[i] += p.x[i];
  }

  Status sync(const OpContext&) noexcept override { return {}; }

 private:
  static Matrix rows_of(const float* x, int64_t stride, int64_t n_rows, int64_t n_cols) {
    return FloatMap(x, n_rows, n_cols, Eigen::OuterStride<>(std::max<int64_t>(stride, 1)))
        .cast<double>();
  }
  static Matrix network(const Matrix& x, const Weight* gate, const Weight* up, const Weight* down,
                        int64_t index) {
    return silu_product(x * weight_matrix(*gate, index).transpose(),
                        x * weight_matrix(*up, index).transpose()) *
           weight_matrix(*down, index).transpose();
  }
  static void rotate(float* x, const float* cos_sin, int64_t dim) {
    for (int64_t i = 0; i < dim / 2; ++i) {
      const double a = x[2 * i], b = x[2 * i + 1], c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
      x[2 * i] = static_cast<float>(a * c - b * s);
      x[2 * i + 1] = static_cast<float>(a * s + b * c);
    }
  }
  static Matrix read_rows(const KvRows& rows) {
    const int64_t rank = rows.layout.kv_lora_rank, rope = rows.layout.qk_rope_head_dim;
    Matrix m(rows.n_rows, rank + rope);
    for (int64_t i = 0; i < rows.n_rows; ++i) {
      const Row row = row_of(rows, rows.first_row + i);
      for (int64_t c = 0; c < rank; ++c) m(i, c) = read_value(row.latent, c, row.type);
      for (int64_t c = 0; c < rope; ++c) m(i, rank + c) = read_value(row.rope, c, row.type);
    }
    return m;
  }
  static Eigen::VectorXd softmax(const Eigen::VectorXd& scores) {
    const Eigen::VectorXd e = (scores.array() - scores.maxCoeff()).exp();
    return e / e.sum();
  }
  // Indices of the k largest, descending, ties to the lower index.
  static std::vector<size_t> top(const std::vector<double>& values, size_t k) {
    std::vector<size_t> order(values.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return values[a] > values[b]; });
    order.resize(k);
    return order;
  }
  static void drop_groups(const RouteParams& p, std::vector<double>& choice) {
    const auto size = static_cast<size_t>(p.n_experts / p.n_group);
    std::vector<double> score;
    for (size_t g = 0; g < static_cast<size_t>(p.n_group); ++g) {
      const std::vector<double> group(choice.begin() + static_cast<int64_t>(g * size),
                                      choice.begin() + static_cast<int64_t>((g + 1) * size));
      const std::vector<size_t> best = top(group, std::min<size_t>(2, size));
      score.push_back(p.topk_method == TopkMethod::kNoauxTc && size > 1
                          ? group[best[0]] + group[best[1]]
                          : group[best[0]]);
    }
    std::vector<bool> kept(score.size(), false);
    for (size_t g : top(score, static_cast<size_t>(p.topk_group))) kept[g] = true;
    for (size_t e = 0; e < choice.size(); ++e)
      if (!kept[e / size]) choice[e] = -std::numeric_limits<double>::infinity();
  }

  std::vector<float> scales_;  // of the matrix being stored
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend() {
  return std::make_unique<ReferenceBackend>();
}

}  // namespace fathom::test
