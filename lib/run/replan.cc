// Model::replan: a loaded model and its sessions go to another placement.
//
// Nothing that may fail comes after something that cannot be taken back:
//   1. plan      as if the model held nothing
//   2. sessions  are saved into a file without a name, as Session::save does
//   3. sessions  give their memory back but for tokens and page tables, which are there twice
//                while they are restored
//   4. weights   what a device gets is loaded into new memory; what it keeps stays where it is
//   5. sessions  are restored under the new plan
//   6. weights   that moved away are given back
// When 4 or 5 fails, the sessions are restored under the old plan: from 3 on a device may hold as
// much as before although its budget is lower now.
#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "../io/spill_file.h"
#include "model_state.h"
#include "planner.h"
#include "run_control.h"
#include "session_state.h"

namespace fathom {
namespace run {

int64_t SessionState::bytes_on(int device) const noexcept {
  int64_t bytes = pages_.bytes_on(device) + staging.bytes_on(device) + history.bytes_on(device);
  for (const MemoryRange& range : scratch) bytes += range.bytes_on(device);
  return bytes;
}

void SessionState::lose_memory() noexcept {
  cache.truncate(0);
  scratch.clear();
  staging = MemoryRange();
  stages.clear();
  for (auto& others : other_stages) others.clear();
  logits = nullptr;
  has_logits = has_likeliest = false;
  lost = true;
}

Status SessionState::lost_error() const {
  return Status(Code::kDevice, fmt::format("the session's rows were lost with their device; its {} "
                                           "tokens are intact: replan the model",
                                           n_tokens));
}

namespace {

// ---- weights ----

// New weights for a placement: what stays is found among the old ones, the rest is loaded.
class WeightMove {
 public:
  WeightMove(ModelState& model, const io::TensorFile& file) : model_(model), file_(file) {}

  Status prepare(const Plan& plan, const RunOptions& options) {
    EngineState& engine = *model_.engine.state();
    FATHOM_TRY_ASSIGN(nn::WeightMap before,
                      nn::WeightMap::create(file_, model_.plan.placement, engine.devices));
    FATHOM_TRY_ASSIGN(nn::WeightMap after,
                      nn::WeightMap::create(file_, plan.placement, engine.devices));
    find_kept(before, after);
    FATHOM_TRY(take(after));
    FATHOM_TRY(load(after, options));
    map_ = std::make_unique<nn::WeightMap>(std::move(after));
    return {};
  }

  nn::WeightMap& map() noexcept { return *map_; }
  int64_t n_moved() const noexcept { return n_moved_; }
  // What commit() gives back on a device.
  int64_t bytes_freed(int device) const {
    int64_t bytes = 0;
    for (size_t i = 0; i < model_.blocks.size(); ++i)
      if (model_.blocks[i].device == device)
        for (const Span& hole : holes(i)) bytes += hole.bytes;
    return bytes;
  }
  // Weights of a device and purpose once what moved away is given back.
  int64_t bytes_then(int device, Purpose purpose) const {
    int64_t bytes = 0;
    for (const WeightBlock& block : added_)
      if (block.device == device && block.purpose == purpose) bytes += block.range.size_bytes();
    for (size_t i = 0; i < model_.blocks.size(); ++i) {
      const WeightBlock& block = model_.blocks[i];
      if (block.device != device || block.purpose != purpose) continue;
      bytes += block.range.size_bytes();
      for (const Span& hole : holes(i)) bytes -= hole.bytes;
    }
    return bytes;
  }
  // Gives back what was taken; nothing else has changed.
  void abandon() noexcept { added_.clear(); }
  // Gives back what moved away and hands the new blocks to the model.
  void commit() {
    for (size_t i = 0; i < model_.blocks.size(); ++i) {
      WeightBlock& block = model_.blocks[i];
      for (const Span& hole : holes(i)) {
        block.range.decommit(hole.offset, hole.bytes);
        std::vector<Span> left;
        for (const Span& held : block.held) {
          if (hole.offset < held.offset || hole.offset >= held.end()) {
            left.push_back(held);
            continue;
          }
          if (hole.offset > held.offset) left.push_back({held.offset, hole.offset - held.offset});
          if (hole.end() < held.end()) left.push_back({hole.end(), held.end() - hole.end()});
        }
        block.held = std::move(left);
      }
    }
    std::erase_if(model_.blocks, [](const WeightBlock& b) { return b.range.size_bytes() == 0; });
    for (WeightBlock& block : added_) model_.blocks.push_back(std::move(block));
    added_.clear();
  }

 private:
  using Span = WeightBlock::Span;

  // Where the old weights are, by the rows of the file that they are made of.
  struct Old {
    const nn::WeightItem* item;
    size_t index;  // of the matrix in it
    std::byte* data;
  };

  void find_kept(nn::WeightMap& before, nn::WeightMap& after) {
    // The same places in the map's weights and in the model's.
    std::vector<const void*> places;
    std::vector<std::byte*> data;
    nn::for_each_weight(before.weights(), [&](const auto& weight) { places.push_back(&weight); });
    nn::for_each_weight(*model_.weights, [&](const auto& weight) {
      if constexpr (std::is_same_v<std::decay_t<decltype(weight)>, Weight>)
        data.push_back(static_cast<std::byte*>(weight.data));
      else
        data.push_back(reinterpret_cast<std::byte*>(const_cast<float*>(weight)));
    });
    std::map<const void*, std::byte*> data_at;
    for (size_t i = 0; i < places.size(); ++i) data_at[places[i]] = data[i];

    std::multimap<std::pair<const io::TensorInfo*, int64_t>, Old> old;
    for (const nn::WeightItem& item : before.items()) {
      std::byte* at = data_at[item.vector ? static_cast<const void*>(item.vector) : item.target];
      for (size_t i = 0; i < item.rows.size(); ++i)
        old.insert({{item.rows[i].tensor, item.rows[i].first_row},
                    {&item, i, at + static_cast<int64_t>(i) * item.weight.matrix_bytes}});
    }
    kept_.assign(model_.blocks.size(), {});
    for (size_t i = 0; i < after.items().size(); ++i) {
      const nn::WeightItem& item = after.items()[i];
      const auto [first, last] = old.equal_range({item.rows[0].tensor, item.rows[0].first_row});
      const auto found = std::find_if(first, last, [&](const auto& entry) {
        const Old& candidate = entry.second;
        const nn::WeightItem& other = *candidate.item;
        if (other.device != item.device || other.purpose != item.purpose ||
            other.to_f32 != item.to_f32 || (other.vector != nullptr) != (item.vector != nullptr) ||
            candidate.index + item.rows.size() > other.rows.size())
          return false;
        for (size_t r = 0; r < item.rows.size(); ++r)
          if (other.rows[candidate.index + r].tensor != item.rows[r].tensor ||
              other.rows[candidate.index + r].first_row != item.rows[r].first_row)
            return false;
        return true;
      });
      if (found == last || !keep(found->second.data, bytes_of(item))) {
        moved_.push_back(i);
        continue;
      }
      after.set_place(i, found->second.data);
    }
    n_moved_ = static_cast<int64_t>(moved_.size());
  }

  static int64_t bytes_of(const nn::WeightItem& item) {
    return item.vector != nullptr ? item.weight.cols * static_cast<int64_t>(sizeof(float))
                                  : item.weight.count * item.weight.matrix_bytes;
  }

  bool keep(const std::byte* data, int64_t bytes) {
    for (size_t i = 0; i < model_.blocks.size(); ++i) {
      const MemoryRange& range = model_.blocks[i].range;
      if (range.data() == nullptr || data < range.data() ||
          data >= range.data() + range.reserved_bytes())
        continue;
      kept_[i].push_back({data - range.data(), bytes});
      return true;
    }
    return false;
  }

  // Whole commits of a block that nothing kept touches.
  std::vector<Span> holes(size_t block_index) const {
    const WeightBlock& block = model_.blocks[block_index];
    const int64_t unit =
        model_.engine.state()->devices[static_cast<size_t>(block.device)]->granularity();
    std::vector<Span> kept = kept_[block_index], out;
    std::sort(kept.begin(), kept.end(),
              [](const Span& a, const Span& b) { return a.offset < b.offset; });
    for (const Span& held : block.held) {
      int64_t at = held.offset;
      const auto gap_to = [&](int64_t end) {
        const int64_t first = (at + unit - 1) / unit * unit, last = end / unit * unit;
        if (last > first) out.push_back({first, last - first});
      };
      for (const Span& span : kept) {
        if (span.end() <= held.offset || span.offset >= held.end()) continue;
        if (span.offset > at) gap_to(span.offset);
        at = std::max(at, span.end());
      }
      if (at < held.end()) gap_to(held.end());
    }
    return out;
  }

  Status take(nn::WeightMap& after) {
    EngineState& engine = *model_.engine.state();
    for (int d = 0; d < static_cast<int>(engine.devices.size()); ++d)
      for (Purpose purpose : {Purpose::kWeights, Purpose::kExperts}) {
        const auto lay = [&](Arena& arena) {
          for (const size_t i : moved_) {
            const nn::WeightItem& item = after.items()[i];
            if (item.device != d || item.purpose != purpose) continue;
            void* data = arena.take_bytes(bytes_of(item));
            if (!arena.counting()) after.set_place(i, data);
          }
        };
        Arena counting;
        lay(counting);
        if (counting.peak_bytes() == 0) continue;
        FATHOM_TRY_ASSIGN(auto range, engine.allocate(d, purpose, counting.peak_bytes()));
        Arena arena(range.data(), range.size_bytes());
        lay(arena);
        const int64_t bytes = range.size_bytes();
        added_.push_back({d, purpose, std::move(range), {{0, bytes}}});
      }
    return {};
  }

  Status load(const nn::WeightMap& after, const RunOptions& options) {
    EngineState& engine = *model_.engine.state();
    const RunControl control(options);
    int64_t total = 0, done = 0;
    for (const size_t i : moved_) total += nn::file_bytes(after.items()[i]);
    FATHOM_TRY(control.check(ProgressPhase::kLoad, 0, total));
    if (engine.simulation) return {};
    // Any memory of the host will do: the first host device may be the one that holds too much.
    int host = engine.host_device;
    for (int d = 0; d < static_cast<int>(engine.devices.size()); ++d)
      if (engine.ledger.is_host(d) && engine.ledger.available(d) > engine.ledger.available(host))
        host = d;
    FATHOM_TRY_ASSIGN(auto staging,
                      engine.allocate(host, Purpose::kStaging, after.staging_bytes()));
    Status why;
    const auto on_bytes = [&](int64_t n) {
      done += n;
      why = control.check(ProgressPhase::kLoad, done, total);
      return why.ok();
    };
    for (const size_t i : moved_) {
      const nn::WeightItem& item = after.items()[i];
      Status s = after.load(file_, item, *engine.devices[static_cast<size_t>(item.device)],
                            {staging.data(), static_cast<size_t>(staging.size_bytes())}, on_bytes);
      if (!s.ok()) return why.ok() ? std::move(s).in(item.name) : std::move(why);
    }
    return {};
  }

  ModelState& model_;
  const io::TensorFile& file_;
  std::unique_ptr<nn::WeightMap> map_;
  std::vector<std::vector<Span>> kept_;  // by block of the model
  std::vector<size_t> moved_;            // items of the new map
  std::vector<WeightBlock> added_;
  int64_t n_moved_ = 0;
};

// ---- sessions ----

// A session on its way: everything that Session::restore_from and what it leaves out need.
struct Parked {
  Session* session = nullptr;
  io::SpillFile file;
  int64_t bytes = 0;
  SessionOptions options;
  bool from_tokens = false;  // its rows cannot be read: they are computed again
  std::vector<int32_t> tokens;
  SessionTimes times;
  std::vector<Event> events;
};

Status park(Session& session, Parked& parked) {
  SessionState& s = session.state();
  const Plan& plan = s.model.plan();
  parked.session = &session;
  parked.options.max_tokens = s.cache.max_tokens();
  parked.times = s.times;
  parked.events = s.events;
  parked.tokens.assign(s.tokens, s.tokens + s.n_tokens);
  parked.from_tokens = s.lost;
  if (s.lost) return {};
  FATHOM_TRY_ASSIGN(parked.file, io::SpillFile::create(plan.config.kv_spill_folder));
  Status saved = session.save_to([&](std::span<const std::byte> bytes) -> Status {
    FATHOM_TRY(parked.file.write(parked.bytes, bytes));
    parked.bytes += static_cast<int64_t>(bytes.size());
    return {};
  });
  if (saved.code() != Code::kDevice) return saved;
  parked.from_tokens = true;
  return {};
}

Result<Session> unpark(const Model& model, const Parked& parked, const RunOptions& options) {
  if (!parked.from_tokens || parked.tokens.empty())
    return parked.from_tokens ? Session::create(model, parked.options)
                              : Session::restore_from(
                                    model,
                                    [&](int64_t offset, std::span<std::byte> out) {
                                      return parked.file.read(offset, out);
                                    },
                                    parked.bytes, parked.options);
  FATHOM_TRY_ASSIGN(Session session, Session::create(model, parked.options));
  RunOptions quiet;  // without the caller's callbacks, which were told of another call
  quiet.cancel = options.cancel;
  FATHOM_TRY(session.prefill(parked.tokens, quiet));
  return session;
}

// What a plan in force reads and changes of a model; swapped as one.
struct InForce {
  Plan plan;
  std::unique_ptr<nn::Weights> weights;
  std::unique_ptr<ExpertCache> copies;
};
void swap_in(ModelState& model, InForce& other) {
  model.book_plan(-1);
  std::swap(model.plan, other.plan);
  std::swap(model.weights, other.weights);
  std::swap(model.copies, other.copies);
  model.book_plan(1);
}

void settle(Session& session, Session&& restored, Parked& parked) {
  restored.state().times = parked.times;
  restored.state().events = std::move(parked.events);
  session = std::move(restored);
}

Status check_sessions(const ModelState& model, std::span<Session* const> sessions) {
  for (size_t i = 0; i < sessions.size(); ++i) {
    if (sessions[i] == nullptr)
      return Status(Code::kInvalidArgument, fmt::format("session {} is null", i));
    if (sessions[i]->state().model.state().get() != &model)
      return Status(Code::kMismatch, fmt::format("session {} is of another model", i));
    if (std::count(sessions.begin(), sessions.end(), sessions[i]) > 1)
      return Status(Code::kInvalidArgument, fmt::format("session {} is there twice", i));
  }
  const int64_t n = model.n_sessions.load();
  if (n != static_cast<int64_t>(sessions.size()))
    return Status(Code::kState, fmt::format("the model has {} sessions, {} were given: all of them "
                                            "move",
                                            n, sessions.size()));
  return {};
}

// Whether every device keeps its budget once what moved away is given back.
Status within_budgets(const EngineState& engine, const WeightMove& move) {
  const MemorySnapshot now = engine.ledger.snapshot();
  for (int d = 0; d < static_cast<int>(now.devices.size()); ++d) {
    const DeviceMemory& device = now.devices[static_cast<size_t>(d)];
    const int64_t then = device.bytes_now - move.bytes_freed(d);
    if (then >
        std::max(device.budget_bytes, engine.devices[static_cast<size_t>(d)]->runtime_bytes()))
      return Status(Code::kBudget, fmt::format("{} would still hold {} bytes, its budget is {}",
                                               device.name, then, device.budget_bytes))
          .on_device(d)
          .bytes(then, device.budget_bytes);
  }
  return {};
}

// Plans without the devices in `closed` and goes there.
Status move_to_plan(const Model& handle, std::span<Session* const> sessions, const Config& asked,
                    const std::vector<int>& closed, const RunOptions& options) {
  ModelState& model = *handle.state();
  EngineState& engine = *model.engine.state();
  Ledger& ledger = engine.ledger;
  FATHOM_TRY(check_sessions(model, sessions));

  // 1. The ledger's budgets are those that hold now; rows stay as they are.
  Config config = asked;
  std::erase_if(config.budget, [](const auto& entry) { return entry.first != "host"; });
  config.kv_type = model.plan.kv_type;
  config.kv_page_tokens = model.plan.kv_page_tokens;
  if (!sessions.empty()) {
    int64_t longest = 1;
    for (const Session* session : sessions) longest = std::max(longest, session->max_tokens());
    config.context_max = std::max(longest, config.context_max.value_or(0));
    config.context_reserve = std::min(config.context_reserve, *config.context_max);
  }
  if (model.copies) model.copies->drop_all();
  FATHOM_TRY_ASSIGN(auto planner, Planner::open(engine, model.plan.model_path, config));
  if (planner.file().fingerprint().lo != model.plan.fingerprint_lo ||
      planner.file().fingerprint().hi != model.plan.fingerprint_hi)
    return Status(Code::kMismatch,
                  fmt::format("{}: not the file that was loaded any more", model.plan.model_path));
  std::vector<int64_t> own(engine.devices.size());
  for (int d = 0; d < static_cast<int>(own.size()); ++d) {
    own[static_cast<size_t>(d)] = model.bytes_on(d);
    for (const Session* session : sessions)
      own[static_cast<size_t>(d)] += const_cast<Session*>(session)->state().bytes_on(d);
  }
  planner.set_own(own);
  for (const int d : closed) planner.close(d);
  FATHOM_TRY_ASSIGN(Plan plan, planner.plan(config));
  if (!plan.feasible) return infeasible(plan);

  // 2.
  std::vector<Parked> parked(sessions.size());
  for (size_t i = 0; i < sessions.size(); ++i) FATHOM_TRY(park(*sessions[i], parked[i]));

  // 3.
  Ledger::Exchange exchange(ledger);
  for (Session* session : sessions) {
    session->state().lose_memory();
    for (int d = 0; d < static_cast<int>(own.size()); ++d)
      exchange.allow_twice(d, session->state().bytes_on(d));
  }
  auto file = planner.take_file();
  WeightMove move(model, *file);
  InForce other;
  std::vector<Session> restored;
  bool swapped = false;
  const Status failed = guarded([&]() -> Status {
    // 4.
    FATHOM_TRY(move.prepare(plan, options));
    for (int d = 0; d < static_cast<int>(plan.devices.size()); ++d)
      for (Purpose purpose : {Purpose::kWeights, Purpose::kExperts})
        for (auto& phase : plan.devices[static_cast<size_t>(d)].bytes)
          phase[static_cast<size_t>(purpose)] = move.bytes_then(d, purpose);
    if (keeps_any_copies(plan)) {
      FATHOM_TRY_ASSIGN(other.copies,
                        ExpertCache::create(engine, model.gate, plan, std::move(file), move.map()));
    }
    other.plan = std::move(plan);
    other.weights = std::move(move.map()).take_weights();
    // 5.
    swap_in(model, other);
    swapped = true;
    for (const Parked& each : parked) {
      FATHOM_TRY_ASSIGN(Session session, unpark(handle, each, options));
      restored.push_back(std::move(session));
    }
    return within_budgets(engine, move);
  });
  if (failed.ok()) {
    // 6.
    for (size_t i = 0; i < sessions.size(); ++i)
      settle(*sessions[i], std::move(restored[i]), parked[i]);
    move.commit();
    engine.timeline.mark("replanned", fmt::format("{} weights moved", move.n_moved()), 0, 0);
    return {};
  }
  restored.clear();
  if (swapped) swap_in(model, other);
  other.copies.reset();
  move.abandon();
  for (size_t i = 0; i < sessions.size(); ++i) {
    // Rows that were lost with their device are computed again when there is a plan that works.
    if (parked[i].from_tokens) continue;
    if (Result<Session> session = unpark(handle, parked[i], options); session.ok())
      settle(*sessions[i], std::move(session).value(), parked[i]);
  }
  return failed.clone();
}

// A device that holds more than its budget can get nothing new before it has given something away:
// where the plan would have that, it is left out.
Status replan(const Model& handle, std::span<Session* const> sessions, const Config& asked,
              const RunOptions& options) {
  // Weights are pointed at where they lie.
  for (const WeightBlock& block : handle.state()->blocks)
    if (block.range.moves())
      return Status(
                 Code::kUnsupported,
                 fmt::format("{} cannot give back parts of its weights: its driver maps no memory "
                             "into reserved addresses",
                             handle.engine().device(block.device).name()))
          .on_device(block.device);
  std::vector<int> closed;
  for (;;) {
    Status status = move_to_plan(handle, sessions, asked, closed, options);
    const int device = status.device();
    if (status.code() != Code::kBudget || device < 0) return status;
    const DeviceMemory now = handle.engine().memory().devices[static_cast<size_t>(device)];
    const bool again = now.bytes_now > now.budget_bytes &&
                       std::find(closed.begin(), closed.end(), device) == closed.end();
    if (!again) return status;
    closed.push_back(device);
  }
}

}  // namespace
}  // namespace run

Status Model::replan(std::span<Session* const> sessions, const Config& config,
                     const RunOptions& options) {
  return run::guarded([&] { return run::replan(*this, sessions, config, options); });
}

}  // namespace fathom
