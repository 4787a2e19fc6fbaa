// Engine::measure: what the devices of an engine really do, through the operations that a model
// uses - products of one row (bandwidth by weight type), products of many (arithmetic), attention,
// the fixed cost of an operation, and copies between devices.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "../io/arena.h"
#include "../io/spill_file.h"
#include "../nn/transfer.h"
#include "cost_model.h"
#include "engine_state.h"
#include "fathom/engine.hpp"

namespace fathom {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
// Shapes of a large model's projections; a block of weights that no cache holds.
constexpr int64_t kRows = 2048, kCols = 4096, kManyTokens = 256;
constexpr int64_t kBlockBytes = 128 * kMiB, kCopyBytes = 64 * kMiB;
constexpr int64_t kHeads = 16, kRank = 512, kRope = 64, kCachedRows = 2048, kPageTokens = 64;
constexpr int kFewest = 3;       // repetitions behind each figure
constexpr double kFigures = 20;  // that share the time, counting the filling of the blocks twice

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best time of `work` (which ends with a sync), repeated for `long_enough` seconds.
template <class Work>
Result<double> best_seconds(double long_enough, Work&& work) {
  FATHOM_TRY(work());  // first touches are not what is measured
  double best = HUGE_VAL;
  const double start = now();
  for (int i = 0; i < kFewest || now() - start < long_enough; ++i) {
    const double before = now();
    FATHOM_TRY(work());
    best = std::min(best, now() - before);
  }
  return std::max(best, 1e-9);
}

class Meter {
 public:
  Meter(run::EngineState& engine, int device, double total_s)
      : engine_(engine),
        index_(device),
        device_(*engine.devices[static_cast<size_t>(device)]),
        figure_s_(total_s / kFigures),
        block_bytes_(static_cast<int64_t>(kBlockBytes * std::clamp(total_s / 2, 0.05, 2.0))) {}

  // Fills in the rates of `out`.
  Status run(MachineDevice& out) {
    FATHOM_TRY(operation(out));
    const double fixed = out.operation_s;
    double fastest = 0, quantised = 0, dense = 0;
    out.read_bytes_per_s_by_type.clear();
    for (const DType type : {DType::kQ8_0, DType::kQ4_K, DType::kBF16, DType::kF8E4M3}) {
      double read = 0, flops = 0;
      FATHOM_TRY(products(type, fixed, read, flops));
      out.read_bytes_per_s_by_type[type] = read;
      fastest = std::max(fastest, read);
      double& best = dtype_info(type).block_elements > 1 ? quantised : dense;
      best = std::max(best, flops);
    }
    out.read_bytes_per_s = fastest;
    out.quantised_flops_per_s = quantised;
    out.dense_flops_per_s = dense;
    FATHOM_TRY(attention(out));
    out.source = RateSource::kMeasured;
    return {};
  }

 private:
  Result<run::MemoryRange> take(int64_t bytes) {
    return engine_.allocate(index_, Purpose::kWorkspace, bytes);
  }
  template <class Params>
  Result<OpContext> context_for(const Params& params, run::MemoryRange& range) {
    const int64_t bytes = device_.workspace_bytes(params);
    FATHOM_TRY_ASSIGN(range, take(bytes));
    return OpContext{range.data(), range.size_bytes()};
  }

  Status operation(MachineDevice& out) {
    constexpr int64_t kFew = 64;
    constexpr int kCalls = 64;
    FATHOM_TRY_ASSIGN(const run::MemoryRange memory, take(2 * kFew * 4));
    auto* x = reinterpret_cast<float*>(memory.data());
    FATHOM_TRY_ASSIGN(const double s, best_seconds(figure_s_, [&] {
                        for (int i = 0; i < kCalls; ++i)
                          device_.rms_norm({}, {x, kFew, x + kFew, 1e-6f, 1, kFew, x, kFew});
                        return device_.sync({});
                      }));
    out.operation_s = s / kCalls;
    return {};
  }

  // Seconds per pass over all matrices of a block of weights, with `n_rows` rows each.
  Status products(DType type, double fixed, double& read, double& flops) {
    Weight w;
    w.dtype = type;
    w.block_scaled = type == DType::kF8E4M3;
    w.rows = kRows;
    w.cols = kCols;
    FATHOM_TRY(device_.weight_layout(w));
    const int64_t available = engine_.ledger.available(index_) / 2;
    w.count = std::max<int64_t>(1, std::min(block_bytes_, available) / w.matrix_bytes);
    FATHOM_TRY_ASSIGN(const run::MemoryRange block, take(w.count * w.matrix_bytes));
    w.data = block.data();
    FATHOM_TRY(fill(w));

    const int64_t activations = kManyTokens * (kCols + kRows) * 4;
    FATHOM_TRY_ASSIGN(const run::MemoryRange rows, take(activations));
    auto* x = reinterpret_cast<float*>(rows.data());
    Weight one = w;
    one.count = 1;
    MatmulParams params{x, kCols, kManyTokens, &one, x + kManyTokens * kCols, kRows};
    run::MemoryRange workspace;
    FATHOM_TRY_ASSIGN(const OpContext op, context_for(params, workspace));
    const auto all = [&](int64_t n_rows, int64_t n_matrices) {
      params.n_rows = n_rows;
      for (int64_t i = 0; i < n_matrices; ++i) {
        one.data = w.matrix(i);
        device_.matmul(op, params);
      }
      return device_.sync(op);
    };
    FATHOM_TRY_ASSIGN(const double single,
                      best_seconds(figure_s_, [&] { return all(1, w.count); }));
    params.n_rows = 1;
    const double bytes = run::work_of(params).weight_bytes * static_cast<double>(w.count);
    read = bytes / std::max(single - fixed * static_cast<double>(w.count), single / 10);
    FATHOM_TRY_ASSIGN(const double many,
                      best_seconds(figure_s_, [&] { return all(kManyTokens, 1); }));
    params.n_rows = kManyTokens;
    flops = run::work_of(params).flops / std::max(many - fixed, many / 10);
    return {};
  }

  // The same sixteen rows of small values everywhere: what is measured does not depend on them.
  Status fill(const Weight& w) {
    constexpr int64_t kGroup = 16;
    const int64_t row = row_bytes(w.dtype, w.cols);
    std::vector<uint8_t> bytes(static_cast<size_t>(kGroup * row));
    for (size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = static_cast<uint8_t>((i * 37 + 11) & 0x3b);  // no NaN or infinity in any type
    const std::vector<float> scales(
        static_cast<size_t>(((w.rows + 127) / 128) * ((w.cols + 127) / 128)), 0.5f);
    for (int64_t m = 0; m < w.count; ++m) {
      if (w.block_scaled) FATHOM_TRY(device_.store_scales(w, m, scales.data()));
      for (int64_t r = 0; r < w.rows; r += kGroup)
        FATHOM_TRY(device_.store_rows(w, m, r, kGroup, bytes.data()));
    }
    return {};
  }

  Status attention(MachineDevice& out) {
    constexpr int64_t kTokens = nn::kAbsorbedRows;
    const KvLayout layout{kPageTokens, kRank, kRope};
    const int64_t page = layout.page_bytes(KvType::kF16, 1), n_pages = kCachedRows / kPageTokens;
    Arena counting;
    const auto carve = [&](Arena& arena, AttendAbsorbedParams& p, std::byte*& pages) {
      p.q_latent = arena.take<float>(kTokens * kHeads * kRank);
      p.q_rope = arena.take<float>(kTokens * kHeads * kRope);
      p.out = arena.take<float>(kTokens * kHeads * kRank);
      p.state.max = arena.take<float>(kTokens * kHeads);
      p.state.sum = arena.take<float>(kTokens * kHeads);
      pages = arena.take<std::byte>(page * n_pages);
    };
    AttendAbsorbedParams p{};
    std::byte* pages = nullptr;
    carve(counting, p, pages);
    FATHOM_TRY_ASSIGN(const run::MemoryRange memory, take(counting.peak_bytes()));
    Arena arena(memory.data(), memory.size_bytes());
    carve(arena, p, pages);
    std::vector<KvPage> table;
    for (int64_t i = 0; i < n_pages; ++i) table.push_back({pages + i * page, KvType::kF16});
    p.q_latent_token_stride = kHeads * kRank;
    p.q_latent_head_stride = kRank;
    p.q_rope_token_stride = kHeads * kRope;
    p.q_rope_head_stride = kRope;
    p.n_tokens = kTokens;
    p.n_heads = kHeads;
    p.first_position = kCachedRows - kTokens;
    p.scale = 0.1f;
    p.rows = {table.data(), layout, 0, 0, kCachedRows};
    run::MemoryRange workspace;
    FATHOM_TRY_ASSIGN(const OpContext op, context_for(p, workspace));
    FATHOM_TRY_ASSIGN(const double s, best_seconds(figure_s_, [&] {
                        device_.attend_absorbed(op, p);
                        return device_.sync(op);
                      }));
    out.attention_flops_per_s = run::work_of(p, 1152).flops / std::max(s - out.operation_s, s / 10);
    return {};
  }

  run::EngineState& engine_;
  const int index_;
  Backend& device_;
  const double figure_s_;
  const int64_t block_bytes_;
};

// One of the two is memory of the host, or the copy goes through it.
Status measure_link(run::EngineState& engine, MachineLink& link, double figure_s) {
  Backend& a = *engine.devices[static_cast<size_t>(link.from)];
  Backend& b = *engine.devices[static_cast<size_t>(link.to)];
  const auto seconds = [&](int64_t bytes) -> Result<double> {
    FATHOM_TRY_ASSIGN(const run::MemoryRange at_a,
                      engine.allocate(link.from, Purpose::kWorkspace, bytes));
    FATHOM_TRY_ASSIGN(const run::MemoryRange at_b,
                      engine.allocate(link.to, Purpose::kWorkspace, bytes));
    run::MemoryRange between;
    if (!a.host_accessible() && !b.host_accessible()) {
      FATHOM_TRY_ASSIGN(between, engine.allocate(engine.host_device, Purpose::kStaging, bytes));
    }
    return best_seconds(figure_s, [&] {
      return nn::transfer(a, at_a.data(), b, at_b.data(), bytes, between.data());
    });
  };
  FATHOM_TRY_ASSIGN(const double small, seconds(4096));
  FATHOM_TRY_ASSIGN(const double large, seconds(kCopyBytes));
  link.latency_s = small;
  link.bytes_per_s = static_cast<double>(kCopyBytes) / std::max(large - small, large / 10);
  link.source = RateSource::kMeasured;
  return {};
}

// Pieces of a file that the system does not hold, each asked for while the one before is read.
Status measure_file(run::EngineState& engine, double total_s, MachineDescription& machine) {
  constexpr int64_t kPiece = 4 * kMiB;
  const Config& config = engine.config;
  const int64_t n_pieces =
      std::max<int64_t>(2, static_cast<int64_t>(kCopyBytes * std::min(total_s, 4.0)) / kPiece);
  FATHOM_TRY_ASSIGN(const run::MemoryRange memory,
                    engine.allocate(engine.host_device, Purpose::kStaging, kPiece));
  const std::span<std::byte> piece(memory.data(), kPiece);
  Result<io::SpillFile> made =
      io::SpillFile::create(config.kv_spill_folder, config.kv_spill_tmpfs == SpillTmpfs::kAllow);
  if (!made.ok()) return {};  // no file will be read there: sessions say why when they want one
  const io::SpillFile file = std::move(made).value();
  for (int64_t i = 0; i < n_pieces; ++i) FATHOM_TRY(file.write(i * kPiece, piece));
  FATHOM_TRY(file.leave_cache());
  const double start = now();
  for (int64_t i = 0; i < n_pieces; ++i) {
    if (i + 1 < n_pieces) file.read_ahead((i + 1) * kPiece, kPiece);
    FATHOM_TRY(file.read(i * kPiece, piece));
  }
  machine.file_bytes_per_s = static_cast<double>(n_pieces * kPiece) / std::max(now() - start, 1e-9);
  machine.file_source = RateSource::kMeasured;
  return {};
}

}  // namespace

Result<MachineDescription> Engine::measure(double seconds_per_device) const {
  return run::guarded([&]() -> Result<MachineDescription> {
    if (simulated())
      return Status(Code::kState, "simulated devices have the rates they were declared with");
    if (!(seconds_per_device > 0 && seconds_per_device <= 3600))
      return Status(Code::kInvalidArgument,
                    fmt::format("{} seconds per device are not in (0, 3600]", seconds_per_device));
    MachineDescription machine = state_->machine;
    for (int d = 0; d < n_devices(); ++d) {
      MachineDevice& device = machine.devices[static_cast<size_t>(d)];
      if (Status status = Meter(*state_, d, seconds_per_device).run(device); !status.ok())
        return std::move(status).in(device.name);
    }
    for (MachineLink& link : machine.links)
      FATHOM_TRY(measure_link(*state_, link, seconds_per_device / kFigures));
    const std::vector<KvTier>& tiers = state_->config.kv_tiers;
    if (std::find(tiers.begin(), tiers.end(), KvTier::kFile) != tiers.end())
      FATHOM_TRY(measure_file(*state_, seconds_per_device, machine));
    FATHOM_TRY(machine.complete());
    return machine;
  });
}

}  // namespace fathom
