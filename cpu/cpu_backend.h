// CpuBackend: the host's processors behind the Backend interface.  It owns the threads and the
// choice of kernels; every operation forwards to the file that holds it.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "cpu/cpu_context.h"
#include "cpu/failed_ops.h"
#include "cpu/node_memory.h"
#include "fathom/backend.hpp"

namespace fathom::cpu {

// What lies under the device; tests put another machine there.
struct CpuSystem {
  std::string root;  // before /sys and /proc
  NumaSystem* numa = &kernel_numa();
};

// Operations of several OpContexts share the threads and are served in the order of their arrival;
// each has finished when its call returns, so sync() has nothing to wait for: it tells what failed.
class CpuBackend final : public Backend {
 public:
  // Errors: as make_cpu_backend().
  static Result<std::unique_ptr<CpuBackend>> create(const CpuOptions&, const CpuSystem& = {});

  const CpuContext& context() const noexcept { return context_; }

  DeviceKind kind() const noexcept override { return DeviceKind::kCpu; }
  std::string_view name() const noexcept override { return name_; }
  std::string describe() const override;

  int64_t granularity() const noexcept override;
  MemoryState memory() const noexcept override;
  int64_t runtime_bytes() const noexcept override;
  std::vector<std::string> remarks() const override;
  void adopt_thread() noexcept override;
  Result<void*> reserve(int64_t bytes) noexcept override;
  Status commit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void decommit(void* base, int64_t offset, int64_t bytes) noexcept override;
  void release(void* base, int64_t bytes) noexcept override;
  bool host_accessible() const noexcept override { return true; }
  Status upload(void* device, const void* host, int64_t bytes) noexcept override;
  Status download(void* host, const void* device, int64_t bytes) noexcept override;

  Status weight_layout(Weight& weight) const noexcept override;
  Status store_rows(const Weight& weight, int64_t index, int64_t first_row, int64_t n_rows,
                    const void* rows) noexcept override;
  Status store_scales(const Weight& weight, int64_t index, const float* scales) noexcept override;

  int64_t workspace_bytes(const MatmulParams&) const noexcept override;
  int64_t workspace_bytes(const HeadsMatmulParams&) const noexcept override;
  int64_t workspace_bytes(const AttendAbsorbedParams&) const noexcept override;
  int64_t workspace_bytes(const AttendExpandedParams&) const noexcept override;
  int64_t workspace_bytes(const FfnParams&) const noexcept override;
  int64_t workspace_bytes(const ExpertsParams&) const noexcept override;

  void embed(const OpContext&, const EmbedParams&) noexcept override;
  void rms_norm(const OpContext&, const RmsNormParams&) noexcept override;
  void matmul(const OpContext&, const MatmulParams&) noexcept override;
  void heads_matmul(const OpContext&, const HeadsMatmulParams&) noexcept override;
  void rope_table(const OpContext&, const RopeTableParams&) noexcept override;
  void rope(const OpContext&, const RopeParams&) noexcept override;
  void kv_append(const OpContext&, const KvAppendParams&) noexcept override;
  void kv_convert(const OpContext&, const KvConvertParams&) noexcept override;
  void attend_absorbed(const OpContext&, const AttendAbsorbedParams&) noexcept override;
  void merge_attention(const OpContext&, const MergeAttentionParams&) noexcept override;
  void attend_expanded(const OpContext&, const AttendExpandedParams&) noexcept override;
  void route(const OpContext&, const RouteParams&) noexcept override;
  void ffn(const OpContext&, const FfnParams&) noexcept override;
  void experts(const OpContext&, const ExpertsParams&) noexcept override;
  void add(const OpContext&, const AddParams&) noexcept override;
  bool keeps_expert_rows() const noexcept override { return true; }
  void sum_experts(const OpContext&, const SumExpertsParams&) noexcept override;
  Status sync(const OpContext&) noexcept override;

 private:
  // The nodes that the device uses: several for rows, one that it is itself, or none.
  struct Nodes {
    std::vector<NumaNode> used;
    std::string why;  // for describe()
    std::string doubt;
  };
  static Result<Nodes> choose_nodes(const CpuOptions&, const NumaTopology&, int& n_threads);

  CpuBackend(const CpuOptions& options, const CpuSystem& system, Nodes nodes,
             std::unique_ptr<ThreadPool> threads, std::unique_ptr<NodeMemory> memory,
             CpuContext context)
      : name_(options.name),
        isa_option_(options.isa),
        node_(options.node),
        system_(system),
        nodes_(std::move(nodes)),
        threads_(std::move(threads)),
        node_memory_(std::move(memory)),
        context_(context),
        allocator_(options.allocator) {}

  std::string name_;
  std::string isa_option_;
  int node_;  // that it is alone; -1
  CpuSystem system_;
  Nodes nodes_;
  std::unique_ptr<ThreadPool> threads_;
  std::unique_ptr<NodeMemory> node_memory_;  // null: memory lies where the system puts it
  CpuContext context_;
  FailedOps failed_;
  HostAllocator allocator_;
};

}  // namespace fathom::cpu
