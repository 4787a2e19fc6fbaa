// Making a CpuBackend, and its forwarding.
#include "cpu/cpu_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/host_memory.h"
#include "cpu/matmul.h"
#include "cpu/matmul_kernels.h"
#include "cpu/page_codec.h"
#include "cpu/pair_kernels.h"
#include "cpu/route.h"
#include "cpu/rows.h"
#include "cpu/rows_kernels.h"
#include "cpu/weight_layout.h"

namespace fathom {

Result<std::unique_ptr<Backend>> make_cpu_backend(const CpuOptions& options) {
  FATHOM_TRY_ASSIGN(std::unique_ptr<Backend> backend, cpu::CpuBackend::create(options));
  return backend;
}

namespace cpu {
namespace {

constexpr HugePages kHugePages = HugePages::kAdvise;

// What the host's allocator answers; null and exceptions are refusals.
template <class Ask>
Result<void*> asked_of_host(int64_t bytes, Ask&& ask) noexcept {
  void* answer = nullptr;
  try {
    answer = ask();
  } catch (...) {  // a host's exception must not pass through the library
  }
  if (answer != nullptr) return answer;
  char text[96];
  std::snprintf(text, sizeof text, "the host's allocator refused %lld bytes",
                static_cast<long long>(bytes));
  return Status(Code::kMemory, text).bytes(bytes, 0);
}

}  // namespace

Result<CpuBackend::Nodes> CpuBackend::choose_nodes(const CpuOptions& options,
                                                   const NumaTopology& machine, int& n_threads) {
  Nodes nodes;
  if (options.node >= 0 || options.numa != NumaMode::kOff) nodes.doubt = machine.doubt;
  std::vector<NumaNode> working;
  size_t n_cpus = 0;
  for (const NumaNode& node : machine.nodes)
    if (!node.cpus.empty()) working.push_back(node), n_cpus += node.cpus.size();
  if (options.node >= 0) {
    const auto it = std::find_if(working.begin(), working.end(),
                                 [&](const NumaNode& n) { return n.id == options.node; });
    if (it == working.end())
      return Status(Code::kConfig, fmt::format("{}: node {} has no processor that this process may "
                                               "use",
                                               options.name, options.node))
          .about("devices");
    // Its part of what a quota allows.
    if (options.threads == 0) {
      const auto cpus = static_cast<int64_t>(it->cpus.size());
      const auto all = static_cast<int64_t>(n_cpus);
      n_threads =
          static_cast<int>(std::clamp<int64_t>((n_threads * cpus + all - 1) / all, 1, cpus));
    }
    nodes.used = {*it};
    nodes.why = fmt::format("this device is node {}", options.node);
  } else if (options.numa == NumaMode::kOff) {
    nodes.why = "numa is off";
  } else if (working.size() < 2) {
    nodes.why = fmt::format("one node{}{}", machine.doubt.empty() ? "" : ": ", machine.doubt);
  } else if (working.size() > kMaxNodes) {
    nodes.why = fmt::format("{} nodes are more than the {} that rows are cut over", working.size(),
                            kMaxNodes);
  } else if (n_threads < static_cast<int>(working.size())) {
    nodes.why = fmt::format("{} threads are fewer than the {} nodes", n_threads, working.size());
  } else {
    nodes.used = std::move(working);
    nodes.why = "rows of weights are cut over them";
  }
  return nodes;
}

Result<std::unique_ptr<CpuBackend>> CpuBackend::create(const CpuOptions& options,
                                                       const CpuSystem& system) {
  if (options.threads < 0 || options.threads > ThreadPool::kMaxThreads)
    return Status(Code::kConfig, fmt::format("threads is {}, but must be in [0, {}]",
                                             options.threads, ThreadPool::kMaxThreads))
        .about("threads");
  FATHOM_TRY_ASSIGN(const Isa isa, choose_isa(options.isa));
  int n_threads = options.threads > 0
                      ? options.threads
                      : std::min(usable_processors(system.root.c_str()), ThreadPool::kMaxThreads);
  const NumaTopology machine = read_numa_topology(system.root);
  FATHOM_TRY_ASSIGN(Nodes nodes, choose_nodes(options, machine, n_threads));
  FATHOM_TRY_ASSIGN(std::unique_ptr<ThreadPool> threads,
                    ThreadPool::create(n_threads, nodes.used, *system.numa));
  std::unique_ptr<NodeMemory> memory;
  if (!nodes.used.empty())
    memory = std::make_unique<NodeMemory>(*system.numa, nodes.used, machine.nodes,
                                          /*ours=*/!options.allocator);
  const CpuContext context{.threads = threads.get(),
                           .nodes = memory && memory->has_rows() ? &memory->shares() : nullptr,
                           .isa = isa,
                           .numerics = options.numerics,
                           .matmul = &matmul_kernels(isa),
                           .rows = &row_kernels(isa),
                           .pairs = pair_kernels(isa, options.numerics),
                           .f8_pairs = f8_pair_kernels(isa, options.numerics)};
  return std::unique_ptr<CpuBackend>(new CpuBackend(
      options, system, std::move(nodes), std::move(threads), std::move(memory), context));
}

std::string CpuBackend::describe() const {
  std::string text = fmt::format(
      "{}: instruction set {} ({}), {} thread{}, numerics {}\n", name_, isa_name(context_.isa),
      isa_option_ == "auto" ? "best that runs here" : "as configured", threads_->size(),
      threads_->size() == 1 ? "" : "s", context_.numerics == Numerics::kFast ? "fast" : "exact");
  text += fmt::format("  products with weights: {} kernels{}\n", context_.matmul->name,
                      context_.f8_pairs != nullptr ? ", few rows with E4M3 in bf16 pairs" : "");
  text += fmt::format("  norm, rope, cache rows, attention: {} kernels{}\n", context_.rows->name,
                      context_.isa == Isa::kAmx ? " (AVX-512 arithmetic, no tile products)" : "");
  text += fmt::format("  products of attention: {}\n",
                      context_.pairs != nullptr ? "bf16 pairs with f32 sums" : "f32");
  text += fmt::format("  memory nodes: {}\n", nodes_.why);
  for (size_t i = 0; i < nodes_.used.size(); ++i) {
    int n_threads = 0;
    for (int worker = 0; worker < threads_->size(); ++worker)
      n_threads += threads_->node_of(worker) == static_cast<int>(i) ? 1 : 0;
    text += fmt::format("    node {}: {} processors, {} threads, {} bytes\n", nodes_.used[i].id,
                        nodes_.used[i].cpus.size(), n_threads, nodes_.used[i].total_bytes);
  }
  for (const std::string& remark : remarks()) text += fmt::format("  but: {}\n", remark);
  for (const IsaInfo& info : cpu_isas())
    if (!info.available) text += fmt::format("  not {}: {}\n", info.name, info.reason);
  return text;
}

// ---- memory -----------------------------------------------------------------------------------

int64_t CpuBackend::granularity() const noexcept {
  return host_page_bytes();
}
MemoryState CpuBackend::memory() const noexcept {
  // A node of which the system does not tell: what the machine has.
  const MemoryState node = node_ >= 0 ? node_memory_state(node_, system_.root) : MemoryState{};
  return node.total_bytes > 0 ? node : host_memory_state(system_.root.c_str());
}
std::vector<std::string> CpuBackend::remarks() const {
  std::vector<std::string> remarks;
  if (!nodes_.doubt.empty())
    remarks.push_back(fmt::format("{}: memory nodes are not used: {}", name_, nodes_.doubt));
  if (node_memory_)
    if (std::string text = node_memory_->remark(); !text.empty())
      remarks.push_back(fmt::format("{}: {}", name_, text));
  if (const int error = threads_->bind_error(); error != 0)
    remarks.push_back(
        fmt::format("{}: the system does not let threads be bound to the processors of a node ({})",
                    name_, std::strerror(error)));
  return remarks;
}
void CpuBackend::adopt_thread() noexcept {
  // A refusal is told by those of the pool.
  if (node_ >= 0 && !nodes_.used.empty())
    (void)system_.numa->bind_thread(pthread_self(), nodes_.used.front().cpus);
}
int64_t CpuBackend::runtime_bytes() const noexcept {
  return static_cast<int64_t>(sizeof(*this)) + threads_->runtime_bytes() +
         static_cast<int64_t>(node_memory_ ? sizeof(NodeMemory) : 0);
}
Result<void*> CpuBackend::reserve(int64_t bytes) noexcept {
  if (!allocator_) {
    FATHOM_TRY_ASSIGN(void* const base, host_reserve(bytes, kHugePages));
    if (node_memory_) node_memory_->place(base, bytes);
    return base;
  }
  return asked_of_host(bytes, [&] { return allocator_.reserve(bytes); });
}
Status CpuBackend::commit(void* base, int64_t offset, int64_t bytes) noexcept {
  if (!allocator_) return host_commit(base, offset, bytes);
  return asked_of_host(bytes,
                       [&] { return allocator_.commit(base, offset, bytes) ? base : nullptr; })
      .status();
}
void CpuBackend::decommit(void* base, int64_t offset, int64_t bytes) noexcept {
  if (!allocator_) {
    host_decommit(base, offset, bytes, kHugePages);
    if (node_memory_ && base != nullptr)  // the addresses are a fresh mapping
      node_memory_->place(static_cast<std::byte*>(base) + offset, bytes);
    return;
  }
  (void)asked_of_host(bytes, [&] { return allocator_.decommit(base, offset, bytes), base; });
}
void CpuBackend::release(void* base, int64_t bytes) noexcept {
  if (!allocator_) return host_release(base, bytes);
  (void)asked_of_host(bytes, [&] { return allocator_.release(base, bytes), base; });
}
Status CpuBackend::upload(void* device, const void* host, int64_t bytes) noexcept {
  if (bytes > 0) std::memcpy(device, host, static_cast<size_t>(bytes));
  return {};
}
Status CpuBackend::download(void* host, const void* device, int64_t bytes) noexcept {
  if (bytes > 0) std::memcpy(host, device, static_cast<size_t>(bytes));
  return {};
}

// ---- weights ----------------------------------------------------------------------------------

Status CpuBackend::weight_layout(Weight& weight) const noexcept {
  return cpu::weight_layout(weight);
}
Status CpuBackend::store_rows(const Weight& weight, int64_t index, int64_t first_row,
                              int64_t n_rows, const void* rows) noexcept {
  return cpu::store_rows(*threads_, weight, index, first_row, n_rows, rows, node_memory_.get());
}
Status CpuBackend::store_scales(const Weight& weight, int64_t index, const float* scales) noexcept {
  return cpu::store_scales(weight, index, scales);
}

// ---- workspace --------------------------------------------------------------------------------

int64_t CpuBackend::workspace_bytes(const MatmulParams& p) const noexcept {
  return cpu::workspace_bytes(context_, p);
}
int64_t CpuBackend::workspace_bytes(const HeadsMatmulParams& p) const noexcept {
  return cpu::workspace_bytes(context_, p);
}
int64_t CpuBackend::workspace_bytes(const AttendAbsorbedParams& p) const noexcept {
  return cpu::workspace_bytes(context_, p);
}
int64_t CpuBackend::workspace_bytes(const AttendExpandedParams& p) const noexcept {
  return cpu::workspace_bytes(context_, p);
}
int64_t CpuBackend::workspace_bytes(const FfnParams& p) const noexcept {
  return cpu::workspace_bytes(context_, p);
}
int64_t CpuBackend::workspace_bytes(const ExpertsParams& p) const noexcept {
  return cpu::workspace_bytes(context_, p);
}

// ---- operations -------------------------------------------------------------------------------

void CpuBackend::embed(const OpContext& op, const EmbedParams& p) noexcept {
  cpu::embed(context_, op, p);
}
void CpuBackend::rms_norm(const OpContext&, const RmsNormParams& p) noexcept {
  cpu::rms_norm(context_, p);
}
void CpuBackend::matmul(const OpContext& op, const MatmulParams& p) noexcept {
  if (!cpu::matmul(context_, op, p)) failed_.mark(op);
}
void CpuBackend::heads_matmul(const OpContext& op, const HeadsMatmulParams& p) noexcept {
  cpu::heads_matmul(context_, op, p);
}
void CpuBackend::rope_table(const OpContext&, const RopeTableParams& p) noexcept {
  cpu::rope_table(context_, p);
}
void CpuBackend::rope(const OpContext&, const RopeParams& p) noexcept {
  cpu::rope(context_, p);
}
void CpuBackend::kv_append(const OpContext&, const KvAppendParams& p) noexcept {
  cpu::kv_append(context_, p);
}
void CpuBackend::kv_convert(const OpContext&, const KvConvertParams& p) noexcept {
  convert_page(*context_.rows, p);
}
void CpuBackend::attend_absorbed(const OpContext& op, const AttendAbsorbedParams& p) noexcept {
  cpu::attend_absorbed(context_, op, p);
}
void CpuBackend::merge_attention(const OpContext&, const MergeAttentionParams& p) noexcept {
  cpu::merge_attention(context_, p);
}
void CpuBackend::attend_expanded(const OpContext& op, const AttendExpandedParams& p) noexcept {
  cpu::attend_expanded(context_, op, p);
}
void CpuBackend::route(const OpContext&, const RouteParams& p) noexcept {
  cpu::route(context_, p);
}
void CpuBackend::ffn(const OpContext& op, const FfnParams& p) noexcept {
  cpu::ffn(context_, op, p);
}
void CpuBackend::experts(const OpContext& op, const ExpertsParams& p) noexcept {
  cpu::experts(context_, op, p);
}
void CpuBackend::add(const OpContext&, const AddParams& p) noexcept {
  cpu::add(context_, p);
}
void CpuBackend::sum_experts(const OpContext&, const SumExpertsParams& p) noexcept {
  cpu::sum_experts(context_, p);
}
Status CpuBackend::sync(const OpContext& op) noexcept {
  if (!failed_.take(op)) return {};
  return Status(Code::kMemory, "the heap has no room for the small objects of a bf16 product");
}

}  // namespace cpu
}  // namespace fathom
