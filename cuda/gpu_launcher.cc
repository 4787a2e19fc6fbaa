#include "cuda/gpu_launcher.h"

#include <memory>
#include <new>
#include <vector>

namespace fathom::cuda {
namespace {

// What the driver says of a call is told here, and not to the next caller.
cudaError_t told(cudaError_t e) noexcept {
  if (e != cudaSuccess) cudaGetLastError();
  return e;
}

cudaKernelNodeParams node_of(const KernelLaunch& l, void** args) noexcept {
  args[0] = const_cast<void*>(l.params);
  cudaKernelNodeParams node{};
  node.func = const_cast<void*>(l.kernel);
  node.gridDim = dim3(l.grid[0], l.grid[1], l.grid[2]);
  node.blockDim = dim3(l.threads);
  node.sharedMemBytes = static_cast<unsigned>(l.shared_bytes);
  node.kernelParams = args;
  return node;
}

// Nodes are named by the graph they were made in, so it lives as long as what runs.
struct Graph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  std::vector<cudaGraphNode_t> nodes;
  ~Graph() {
    if (exec != nullptr) told(cudaGraphExecDestroy(exec));
    if (graph != nullptr) told(cudaGraphDestroy(graph));
  }
};

}  // namespace

cudaError_t GpuLauncher::allow_shared(const KernelLaunch& l) noexcept {
  constexpr size_t kSharedForAll = 48 << 10;
  if (l.shared_bytes <= kSharedForAll) return cudaSuccess;
  for (const Allowed& known : allowed_)
    if (known.kernel == l.kernel && known.bytes >= l.shared_bytes) return cudaSuccess;
  const cudaError_t e = told(cudaFuncSetAttribute(
      l.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.shared_bytes)));
  if (e == cudaSuccess) allowed_[next_++ % allowed_.size()] = {l.kernel, l.shared_bytes};
  return e;
}

int GpuLauncher::run(const KernelLaunch& l) noexcept {
  // The runtime's current device belongs to the thread.
  if (cudaError_t e = told(cudaSetDevice(device_)); e != cudaSuccess) return e;
  if (cudaError_t e = allow_shared(l); e != cudaSuccess) return e;
  void* args[] = {const_cast<void*>(l.params)};
  return told(cudaLaunchKernel(l.kernel, dim3(l.grid[0], l.grid[1], l.grid[2]), dim3(l.threads),
                               args, l.shared_bytes, stream_));
}

void* GpuLauncher::make(std::span<const KernelLaunch> launches) noexcept try {
  if (told(cudaSetDevice(device_)) != cudaSuccess) return nullptr;
  auto made = std::make_unique<Graph>();
  if (told(cudaGraphCreate(&made->graph, 0)) != cudaSuccess) return nullptr;
  made->nodes.reserve(launches.size());
  for (const KernelLaunch& l : launches) {
    if (allow_shared(l) != cudaSuccess) return nullptr;
    void* args[1];
    const cudaKernelNodeParams params = node_of(l, args);
    const bool first = made->nodes.empty();
    cudaGraphNode_t node = nullptr;
    if (told(cudaGraphAddKernelNode(&node, made->graph, first ? nullptr : &made->nodes.back(),
                                    first ? 0 : 1, &params)) != cudaSuccess)
      return nullptr;
    made->nodes.push_back(node);
  }
  if (told(cudaGraphInstantiate(&made->exec, made->graph, 0)) != cudaSuccess) return nullptr;
  return made.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

int GpuLauncher::update(void* graph, size_t index, const KernelLaunch& l) noexcept {
  auto& g = *static_cast<Graph*>(graph);
  if (cudaError_t e = told(cudaSetDevice(device_)); e != cudaSuccess) return e;
  void* args[1];
  const cudaKernelNodeParams params = node_of(l, args);
  return told(cudaGraphExecKernelNodeSetParams(g.exec, g.nodes[index], &params));
}

int GpuLauncher::run(void* graph) noexcept {
  if (cudaError_t e = told(cudaSetDevice(device_)); e != cudaSuccess) return e;
  return told(cudaGraphLaunch(static_cast<Graph*>(graph)->exec, stream_));
}

void GpuLauncher::destroy(void* graph) noexcept {
  if (told(cudaSetDevice(device_)) != cudaSuccess) return;  // the driver is gone, and it with it
  delete static_cast<Graph*>(graph);
}

}  // namespace fathom::cuda
