#include "simulated_backend.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <functional>

namespace fathom::run {
namespace {

// What CUDA maps at least (cuMemGetAllocationGranularity on all cards so far).
constexpr int64_t kCudaGranularity = int64_t{2} << 20;

// Copies up to this are really made: those of ids, of a pass that looks for copies of experts.
constexpr int64_t kMostReal = nn::kCopyPairs * static_cast<int64_t>(sizeof(int32_t));

// a = max(a, floor) + add; the new value.
double advance(std::atomic<double>& a, double floor, double add) noexcept {
  double old = a.load(std::memory_order_relaxed), next;
  do {
    next = std::max(old, floor) + add;
  } while (!a.compare_exchange_weak(old, next, std::memory_order_relaxed));
  return next;
}

}  // namespace

SimulatedMachine::SimulatedMachine(MachineDescription machine)
    : machine_(std::move(machine)), clocks_(machine_.devices.size()) {
  for (const MachineDevice& device : machine_.devices)
    free_.push_back(device.bytes - device.runtime_bytes);
}

void SimulatedMachine::run(int device, double s) noexcept {
  Clock& c = clock(device);
  advance(c.free_at, now(), s);
  advance(c.busy, 0, s);
}

void SimulatedMachine::wait(int device) noexcept {
  advance(host_, clock(device).free_at.load(std::memory_order_relaxed), 0);
}

void SimulatedMachine::transfer(int from, int to, int64_t bytes) noexcept {
  if (from == to) {
    advance(clock(to).free_at, now(),
            2 * static_cast<double>(bytes) /
                machine_.devices[static_cast<size_t>(to)].read_bytes_per_s);
    return wait(to);
  }
  advance(host_, now(), seconds(machine_.link(from, to), bytes));
}

void SimulatedMachine::read_file(int64_t bytes, int64_t ahead_bytes) noexcept {
  const auto s = [&](int64_t n) { return static_cast<double>(n) / machine_.file_bytes_per_s; };
  advance(host_, advance(file_, now() - s(ahead_bytes), s(bytes)), 0);
}

void SimulatedMachine::add_range(const void* base, int64_t bytes, int device) {
  std::lock_guard lock(mutex_);
  const auto* begin = static_cast<const std::byte*>(base);
  const auto at = std::upper_bound(ranges_.begin(), ranges_.end(), begin,
                                   [](const std::byte* p, const Range& r) { return p < r.begin; });
  ranges_.insert(at, {begin, begin + bytes, device, 0});
}

void SimulatedMachine::remove_range(const void* base) noexcept {
  std::lock_guard lock(mutex_);
  std::erase_if(ranges_, [&](const Range& r) {
    if (r.begin != base) return false;
    free_[static_cast<size_t>(r.device)] += r.committed;
    return true;
  });
}

bool SimulatedMachine::count(const void* base, int64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  const auto at = std::lower_bound(
      ranges_.begin(), ranges_.end(), base,
      [](const Range& r, const void* p) { return std::less<const void*>()(r.begin, p); });
  int64_t& left = free_[static_cast<size_t>(at->device)];
  if (bytes > left) return false;
  left -= bytes;
  at->committed += bytes;
  return true;
}

int64_t SimulatedMachine::free_bytes(int device) const noexcept {
  std::lock_guard lock(mutex_);
  return free_[static_cast<size_t>(device)];
}

int SimulatedMachine::owner(const void* address) const noexcept {
  std::lock_guard lock(mutex_);
  const auto* p = static_cast<const std::byte*>(address);
  auto at = std::upper_bound(ranges_.begin(), ranges_.end(), p,
                             [](const std::byte* q, const Range& r) { return q < r.begin; });
  if (at == ranges_.begin()) return -1;
  --at;
  return p < at->end ? at->device : -1;
}

SimulatedBackend::SimulatedBackend(std::shared_ptr<SimulatedMachine> machine, int index,
                                   std::shared_ptr<const Backend> rules)
    : CostBackend(machine->description().devices[static_cast<size_t>(index)]),
      machine_(std::move(machine)),
      index_(index),
      rules_(std::move(rules)),
      granularity_(device_.kind != DeviceKind::kCpu ? kCudaGranularity
                   : rules_                         ? rules_->granularity()
                                                    : 1) {}

// Not counted by the kernel's overcommit rules and backed by its one page of zeros until somebody
// writes, which only the library's own bookkeeping does.
Result<void*> SimulatedBackend::reserve(int64_t bytes) noexcept {
  void* base = mmap(nullptr, static_cast<size_t>(bytes + granularity_), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED)
    return Status(Code::kMemory, "the system refused the addresses of a simulated device")
        .bytes(bytes, 0)
        .with_errno(errno);
  auto* begin = static_cast<std::byte*>(base);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base)) % granularity_;
  if (past != 0) begin += granularity_ - past;
  // The pieces before and behind what is aligned go back.
  const auto before = static_cast<size_t>(begin - static_cast<std::byte*>(base));
  if (before > 0) munmap(base, before);
  const size_t behind = static_cast<size_t>(granularity_) - before;
  if (behind > 0) munmap(begin + bytes, behind);
  try {
    machine_->add_range(begin, bytes, index_);
  } catch (...) {
    munmap(begin, static_cast<size_t>(bytes));
    return Status(Code::kMemory, "the system refused memory for the library's own bookkeeping");
  }
  return static_cast<void*>(begin);
}

Status SimulatedBackend::commit(void* base, int64_t, int64_t bytes) noexcept {
  if (machine_->count(base, bytes)) return {};
  const int64_t left = machine_->free_bytes(index_);
  char text[160];
  std::snprintf(text, sizeof text,
                "the simulated device has %lld bytes, %lld of them free; %lld more do not fit",
                static_cast<long long>(device_.bytes), static_cast<long long>(left),
                static_cast<long long>(bytes));
  return Status(Code::kMemory, text).bytes(bytes, left);
}

void SimulatedBackend::decommit(void* base, int64_t offset, int64_t bytes) noexcept {
  (void)machine_->count(base, -bytes);
  (void)madvise(static_cast<std::byte*>(base) + offset, static_cast<size_t>(bytes), MADV_DONTNEED);
}

void SimulatedBackend::release(void* base, int64_t bytes) noexcept {
  machine_->remove_range(base);
  munmap(base, static_cast<size_t>(bytes));
}

Status SimulatedBackend::upload(void* device, const void* host, int64_t bytes) noexcept {
  const int from = machine_->owner(host);
  // Only what differs is written, so that pages of zeros stay untouched.
  if (from < 0 && rules_ && bytes <= kMostReal &&
      std::memcmp(device, host, static_cast<size_t>(bytes)) != 0)
    std::memcpy(device, host, static_cast<size_t>(bytes));
  machine_->transfer(from >= 0 ? from : machine_->description().host(), index_, bytes);
  return {};
}

Status SimulatedBackend::download(void* host, const void* device, int64_t bytes) noexcept {
  const int to = machine_->owner(host);
  machine_->transfer(index_, to >= 0 ? to : machine_->description().host(), bytes);
  if (to < 0 && rules_ && bytes <= kMostReal)
    std::memcpy(host, device, static_cast<size_t>(bytes));
  else if (to < 0 && bytes > 0)
    std::memset(host, 0, static_cast<size_t>(bytes));
  return {};
}

void SimulatedBackend::route(const OpContext& op, const RouteParams& p) noexcept {
  CostBackend::route(op, p);
  if (rules_ && machine_->routing().begun())
    machine_->routing().choose(p.n_tokens, p.num_experts_per_tok, p.ids);
}

// Where results are kept apart the ids say who has what to do; sums are over what is chosen on
// average.
void SimulatedBackend::experts(const OpContext& op, const ExpertsParams& p) noexcept {
  if (p.rows == nullptr || !rules_ || !machine_->routing().begun())
    return CostBackend::experts(op, p);
  int64_t n_pairs = 0, n_touched = 0;
  const int64_t all = p.n_tokens * p.num_experts_per_tok;
  for (int64_t i = 0; i < all; ++i) {
    if (p.ids[i] < p.first_expert || p.ids[i] >= p.first_expert + p.gate->count) continue;
    ++n_pairs;
    n_touched += std::find(p.ids, p.ids + i, p.ids[i]) == p.ids + i;
  }
  spend(work_of(p, static_cast<double>(n_touched), static_cast<double>(n_pairs)),
        /*routed=*/true);
}

void SimulatedBackend::kv_convert(const OpContext& op, const KvConvertParams& p) noexcept {
  {
    std::lock_guard lock(seen_mutex_);
    seen_ = {};  // a page gets another type
  }
  CostBackend::kv_convert(op, p);
}

Status SimulatedBackend::sync(const OpContext&) noexcept {
  machine_->wait(index_);
  return {};
}

void SimulatedBackend::spend(const Work& work, bool) noexcept {
  machine_->run(index_, seconds(device_, work));
}

double SimulatedBackend::row_bytes(const KvRows& rows) const noexcept {
  if (rows.n_rows == 0) return 0;
  const int64_t page_tokens = rows.layout.page_tokens, end = rows.first_row + rows.n_rows;
  const auto average = [&] {
    double bytes = 0;
    for (int64_t row = rows.first_row; row < end;) {
      const int64_t page = row / page_tokens, next = std::min((page + 1) * page_tokens, end);
      const KvType type = rows.pages[page].type;
      bytes +=
          static_cast<double>(next - row) * static_cast<double>(rows.layout.latent_row_bytes(type) +
                                                                rows.layout.rope_row_bytes(type));
      row = next;
    }
    return bytes / static_cast<double>(rows.n_rows);
  };
  if (rows.n_rows <= page_tokens) return average();  // as fast as looking it up
  const void* first_page = rows.pages[rows.first_row / page_tokens].data;
  std::lock_guard lock(seen_mutex_);
  if (seen_.pages != rows.pages || seen_.first_page != first_page ||
      seen_.first_row != rows.first_row || seen_.n_rows != rows.n_rows)
    seen_ = {rows.pages, first_page, rows.first_row, rows.n_rows, average()};
  return seen_.row_bytes;
}

}  // namespace fathom::run
