#include "predict.h"

#include <algorithm>

#include "../nn/forward.h"
#include "../nn/transfer.h"
#include "kv_pages.h"
#include "kv_parts.h"
#include "pipeline.h"
#include "simulated_backend.h"

namespace fathom::run {
namespace {

// Rows of one type at no address; those on other devices than their layers, in host memory or in
// the file cost the copies that KvPages makes.
class PredictedRows final : public nn::RowSourceOf {
 public:
  PredictedRows(const Plan& plan, int64_t n_rows, std::span<const nn::Stage> stages,
                SimulatedMachine& clocks, std::byte* staging)
      : clocks_(clocks),
        layout_{plan.kv_page_tokens, plan.model.kv_lora_rank, plan.model.qk_rope_head_dim},
        parts_(kv_parts(plan)),
        stages_(stages),
        staging_(staging) {
    const KvPolicy& policy = plan.kv_policy;
    const int64_t first = policy.first_cold_page(), end = policy.cold_end(n_rows);
    for (int64_t page = 0; page < policy.pages_for(n_rows); ++page)
      pages_.push_back({nullptr, page >= first && page < end ? policy.type : policy.hot_type});
    // What is resident is the same at all lengths; the oldest of the rest is in the file.
    for (const KvPart& part : parts_) {
      const PlanDevice& device = plan.devices[static_cast<size_t>(part.device)];
      int64_t bytes = 0;  // of a page of all parts there
      for (const KvPart& other : parts_)
        if (other.device == part.device) bytes += kv_payload_bytes(plan, other, plan.kv_type);
      const auto tokens = [&](int64_t of) {
        return bytes == 0 ? 0 : (of + bytes - 1) / bytes * plan.kv_page_tokens;
      };
      const int64_t host = tokens(device.kv_host_bytes), file = tokens(device.kv_file_bytes);
      const int64_t away = std::max<int64_t>(host + file - (plan.max_context - n_rows), 0);
      Moved moved;
      moved.begin = std::max(part.first_page, first) * plan.kv_page_tokens;
      moved.file_end = moved.begin + std::max<int64_t>(away - host, 0);
      moved.host_end = moved.begin + away;
      moved_.push_back(moved);
    }
  }
  KvRows rows(int, int64_t layer_slot, int64_t n_rows) const noexcept override {
    return {pages_.data(), layout_, layer_slot, 0, n_rows};
  }
  nn::RowPiece piece(int stage, int64_t layer_slot, const OpContext& op, int64_t first_row,
                     int64_t end_row, nn::Where where) const noexcept override {
    const KvPart& part = part_of(stage, first_row);
    end_row = std::min(end_row, end_of(part));
    if (where == nn::Where::kAnywhere || part.device == stage) {
      const Moved& moved = moved_[static_cast<size_t>(&part - parts_.data())];
      if (first_row < moved.host_end) {
        const int64_t step = stream_rows(layout_.page_tokens);
        for (const int64_t end : {moved.begin, moved.file_end, moved.host_end})
          if (first_row < end) end_row = std::min(end_row, end);
        if (first_row >= moved.begin) {
          end_row = std::min(end_row, first_row / step * step + step);
          fetch(stage, first_row, end_row, first_row < moved.file_end);
        }
      }
    }
    const KvRows piece = RowSourceOf::room(stage, layer_slot, op, first_row, end_row);
    if (where == nn::Where::kAnywhere) return {piece, part.device};
    copy(part.device, stage, first_row, end_row);
    return {piece, stage};
  }
  int lies_on(int stage, int64_t first_row, int64_t end_row) const noexcept override {
    const KvPart& part = part_of(stage, first_row);
    const Moved& moved = moved_[static_cast<size_t>(&part - parts_.data())];
    return first_row >= moved.host_end && end_row <= end_of(part) ? part.device : -1;
  }
  KvRows room(int stage, int64_t layer_slot, const OpContext& op, int64_t first_row,
              int64_t end_row) const noexcept override {
    return RowSourceOf::room(stage, layer_slot, op, first_row,
                             std::min(end_row, end_of(part_of(stage, first_row))));
  }
  void written(int stage, int64_t, const OpContext&, const KvRows& rows) const noexcept override {
    copy(stage, part_of(stage, rows.first_row).device, rows.first_row,
         rows.first_row + rows.n_rows);
  }

 private:
  struct Moved {  // rows: the file's, then the host's
    int64_t begin = 0, file_end = 0, host_end = 0;
  };
  // Through the staging buffer, which the operation before may still read.
  void fetch(int stage, int64_t first_row, int64_t end_row, bool from_file) const noexcept {
    const nn::Stage& s = stages_[static_cast<size_t>(stage)];
    (void)s.device->sync(s.op);
    for (int64_t row = first_row; row < end_row; row += layout_.page_tokens) {
      const int64_t n = std::min(end_row - row, layout_.page_tokens);
      const KvType type = pages_[static_cast<size_t>(row / layout_.page_tokens)].type;
      const int64_t bytes = n * (layout_.latent_row_bytes(type) + layout_.rope_row_bytes(type));
      if (from_file)
        clocks_.read_file(bytes, stream_rows(layout_.page_tokens) / layout_.page_tokens *
                                     layout_.layer_bytes(type));
      if (!s.device->host_accessible()) (void)s.device->upload(s.scratch.q, staging_, bytes);
    }
  }
  const KvPart& part_of(int home, int64_t row) const noexcept {
    return *std::find_if(parts_.begin(), parts_.end(), [&](const KvPart& part) {
      return part.home == home && row / layout_.page_tokens < part.end_page;
    });
  }
  int64_t end_of(const KvPart& part) const noexcept {
    return part.end_page < static_cast<int64_t>(pages_.size())
               ? part.end_page * layout_.page_tokens
               : static_cast<int64_t>(pages_.size()) * layout_.page_tokens;
  }
  // Page by page, a part of one by its planes.
  void copy(int from, int to, int64_t first_row, int64_t end_row) const noexcept {
    if (from == to) return;
    const nn::Stage &a = stages_[static_cast<size_t>(from)], &b = stages_[static_cast<size_t>(to)];
    (void)a.device->sync(a.op);
    for (int64_t row = first_row; row < end_row;) {
      const int64_t end = std::min(end_row, (row / layout_.page_tokens + 1) * layout_.page_tokens);
      const KvType type = pages_[static_cast<size_t>(row / layout_.page_tokens)].type;
      const auto transfer = [&](int64_t bytes) {
        (void)nn::transfer(*a.device, a.scratch.q, *b.device, b.scratch.q, bytes, staging_);
      };
      if (end - row == layout_.page_tokens) {
        transfer(layout_.layer_bytes(type));
      } else {
        transfer((end - row) * layout_.latent_row_bytes(type));
        transfer((end - row) * layout_.rope_row_bytes(type));
      }
      row = end;
    }
  }

  SimulatedMachine& clocks_;
  KvLayout layout_;
  std::vector<KvPage> pages_;
  std::vector<KvPart> parts_;
  std::vector<Moved> moved_;  // by part
  std::span<const nn::Stage> stages_;
  std::byte* staging_;
};

// Layers look for copies of experts and find none: what a full cache leaves of them.
class NoCopies final : public nn::ExpertCopies {
 public:
  NoCopies(const Placement& placement, const nn::Weights& weights)
      : placement_(placement), weights_(weights) {}
  const nn::ExpertWeights* copies(size_t layer) const noexcept override {
    const LayerPlacement& at = placement_.layers[layer];
    const bool elsewhere = std::any_of(at.experts.begin(), at.experts.end(),
                                       [&](const auto& e) { return e.device != at.device; });
    return placement_.has_copies(at.device) && elsewhere ? &weights_.layers[layer].experts.front()
                                                         : nullptr;
  }
  bool has(size_t, int32_t) const noexcept override { return false; }
  void used(size_t, std::span<const int32_t>, bool, int64_t) noexcept override {}

 private:
  const Placement& placement_;
  const nn::Weights& weights_;
};

// `count` passes of n_tokens tokens, one behind the other.
struct Passage {
  int64_t n_tokens, first_position;
  AttentionForm form;
  int64_t count = 1;
  ChunkFlow flow = ChunkFlow::kOneByOne;
  int64_t in_flight = 1;  // of those that take turns
};

struct PassSeconds {
  double total = 0;          // of a pass: to the logits, or to the next pass where several follow
  std::vector<double> busy;  // by device, of one pass
};

PassSeconds run_passes(const Plan& plan, const MachineDescription& machine, const nn::Rope& rope,
                       const nn::Weights& weights, const Passage& passage) {
  auto clocks = std::make_shared<SimulatedMachine>(machine);
  std::vector<std::unique_ptr<SimulatedBackend>> devices;
  const auto in_flight = static_cast<size_t>(std::min(passage.in_flight, passage.count));
  std::vector<std::vector<nn::Stage>> stages(in_flight);  // by pass under way
  std::byte* staging = nullptr;
  float* host_logits = nullptr;
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d) {
    devices.push_back(std::make_unique<SimulatedBackend>(clocks, d, nullptr));
    // Addresses are never followed; each device has some of its own, so that copies know their
    // ends.
    constexpr int64_t kAddresses = int64_t{1} << 44;
    auto* base = reinterpret_cast<void*>(static_cast<uintptr_t>((d + 1) * kAddresses));
    clocks->add_range(base, kAddresses, d);
    Arena arena(base, kAddresses);
    const nn::Scratch::InFlight scratch = nn::Scratch::carve_in_flight(
        arena, plan.model, std::max(passage.n_tokens, plan.prefill_chunk),
        nn::DeviceRoles::of(plan.placement, d), static_cast<int64_t>(in_flight));
    for (size_t i = 0; i < in_flight; ++i)
      stages[i].push_back({.device = devices.back().get(), .op = {}, .scratch = scratch[i]});
    if (d == std::max(machine.host(), 0)) {
      staging = static_cast<std::byte*>(base) + kAddresses / 2;
      host_logits = reinterpret_cast<float*>(staging + kAddresses / 4);
    }
  }
  const std::vector<int32_t> tokens(static_cast<size_t>(passage.n_tokens));
  const PredictedRows rows(plan, passage.first_position + passage.count * passage.n_tokens,
                           stages[0], *clocks, staging);
  std::vector<nn::Sequence> sequences(in_flight);
  NoCopies none(plan.placement, weights);
  const auto params_of = [&](int64_t index) {
    const size_t place = static_cast<size_t>(index) % in_flight;
    sequences[place] = {&rows, 0, passage.n_tokens,
                        passage.first_position + index * passage.n_tokens};
    return nn::ForwardParams{.config = plan.model,
                             .rope = rope,
                             .weights = weights,
                             .placement = plan.placement,
                             .stages = stages[place],
                             .staging = staging,
                             .tokens = tokens,
                             .sequences = {&sequences[place], 1},
                             .form = passage.form,
                             .copies = &none};
  };
  PassSeconds out;
  const auto n = static_cast<double>(passage.count);
  if (passage.flow == ChunkFlow::kOneByOne) {
    const bool read_at_once =
        devices[static_cast<size_t>(plan.placement.head_device)]->host_accessible();
    const nn::ForwardParams params = params_of(0);
    if (!nn::forward(params).ok() ||
        !nn::forward_logits(params, passage.n_tokens - 1, 1, read_at_once ? nullptr : host_logits)
             .ok())
      return out;
    out.total = clocks->now();
  } else {
    double first = 0;
    Passes passes{.count = passage.count, .params = params_of, .finish = {}};
    passes.finish = [&](const nn::ForwardParams&, int64_t index) {
      if (index == 0) first = clocks->now();
      return Status();
    };
    const bool waves = passage.flow == ChunkFlow::kWaves;
    if (!(waves ? run_in_waves(layer_runs(plan.placement), passes)
                : run_in_turns(plan.placement, passage.in_flight, passes))
             .ok())
      return out;
    // In waves a pass ends with each; those that take turns end one close behind the other.
    out.total = waves ? (clocks->now() - first) / (n - 1) : clocks->now() / n;
  }
  for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d)
    out.busy.push_back(clocks->busy_seconds(d) / n);
  return out;
}

// Chunks of a prompt which end at `end`, as they follow each other through the devices.
PassSeconds run_chunks(const Plan& plan, const MachineDescription& machine, const nn::Rope& rope,
                       const nn::Weights& weights, int64_t end) {
  const int64_t chunk = std::min(plan.prefill_chunk, std::max<int64_t>(plan.max_context, 1));
  Passage passage{chunk, 0, plan.attention_form};
  const ChunkFlow flow = chunk_flow(plan);
  int64_t most = 1;
  if (flow == ChunkFlow::kWaves)
    most = static_cast<int64_t>(layer_runs(plan.placement).size()) + 1;
  else if (flow == ChunkFlow::kTurns)
    most = passage.in_flight = plan.prefill_in_flight;
  passage.count = std::min(most, std::max(plan.max_context / chunk, int64_t{1}));
  if (passage.count > 1) passage.flow = flow;
  passage.first_position = std::max(end - passage.count * chunk, int64_t{0});
  return run_passes(plan, machine, rope, weights, passage);
}

double rate(int64_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

}  // namespace

double step_seconds(const Plan& plan, const MachineDescription& machine, const nn::Weights& weights,
                    int64_t n_tokens) {
  return run_passes(plan, machine, nn::make_rope(plan.model), weights,
                    {1, std::max<int64_t>(n_tokens, 1) - 1, AttentionForm::kAbsorbed})
      .total;
}

double turns_seconds(const Plan& plan, const MachineDescription& machine,
                     const nn::Weights& weights, int64_t n_rows, int64_t position, int64_t groups) {
  return static_cast<double>(groups) * run_passes(plan, machine, nn::make_rope(plan.model), weights,
                                                  {.n_tokens = (n_rows + groups - 1) / groups,
                                                   .first_position = position,
                                                   .form = AttentionForm::kAbsorbed,
                                                   .count = groups,
                                                   .flow = ChunkFlow::kTurns,
                                                   .in_flight = groups})
                                           .total;
}

double prefill_rate(const Plan& plan, const MachineDescription& machine,
                    const nn::Weights& weights) {
  const int64_t chunk = std::min(plan.prefill_chunk, std::max<int64_t>(plan.max_context, 1));
  return rate(
      chunk,
      run_chunks(plan, machine, nn::make_rope(plan.model), weights, plan.max_context / 2).total);
}

void predict(Plan& plan, const MachineDescription& machine, const nn::Weights& weights) {
  const nn::Rope rope = nn::make_rope(plan.model);
  const int64_t full = std::max<int64_t>(plan.max_context, 1);
  const int64_t chunk = std::min(plan.prefill_chunk, full);
  const auto prefill = [&](int64_t end) { return run_chunks(plan, machine, rope, weights, end); };
  const auto decode = [&](int64_t at) {
    return run_passes(plan, machine, rope, weights, {1, at, AttentionForm::kAbsorbed});
  };
  plan.speed.prefill_first = rate(chunk, prefill(0).total);
  plan.speed.decode_first = rate(1, decode(0).total);
  const PassSeconds last_chunk = prefill(full), last_step = decode(full - 1);
  plan.speed.prefill_last = rate(chunk, last_chunk.total);
  plan.speed.decode_last = rate(1, last_step.total);
  plan.speed.source = RateSource::kMeasured;
  for (size_t d = 0; d < plan.devices.size(); ++d) {
    PlanDevice& device = plan.devices[d];
    if (d < last_chunk.busy.size()) device.prefill_seconds = last_chunk.busy[d];
    if (d < last_step.busy.size()) device.decode_seconds = last_step.busy[d];
    plan.speed.source = std::min(plan.speed.source, machine.devices[d].source);
  }
}

}  // namespace fathom::run
