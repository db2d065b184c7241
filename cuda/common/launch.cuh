/// Launches that overlap the kernel before them (programmatic dependent launch, sm_90).
///
/// A step of decoding is a chain of kernels of a few microseconds each. A kernel that allows it is
/// made resident while the one before it still runs, so that neither the launch nor the first
/// instructions stand in the chain; what is written by others waits for
/// wait_for_previous_kernel(). Recorded into a graph, such a launch becomes a programmatic edge.
///
/// What a kernel launched by launch_overlapped() owes:
///   - every block calls wait_for_previous_kernel() on every path, before it reads or writes
///     anything that another kernel touches. Then all kernels before it have ended, because each of
///     them waited as well;
///   - before that it may ask for anything by prefetch_to_l2(), a hint, which reads nothing, and
///     read the parameters of a layer and tables made of them;
///   - behind a kernel of the same op that calls let_next_kernel_start() only after its own wait,
///     it may also read what neither that one nor one between them writes: all kernels before that
///     one have ended. Past the first-level cache, which may have lines of older contents;
///   - one that may write parameters or such tables does not call let_next_kernel_start(): then
///     nothing behind it starts before its end.
/// A kernel that is launched in the ordinary way waits for everything by itself.
#pragma once

#include <array>
#include <atomic>
#include <utility>

#include "common/check.cuh"

namespace lrnn::cuda {

/// Returns when the kernels before this one have ended and what they wrote can be read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// The next kernel may become resident once every block has said so, or ended. First thing of a
/// kernel of the chain: the next one waits for the end of this one all the same.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// The cache line of `p` is on its way to L2, should the kernel read it soon.
__device__ __forceinline__ void prefetch_to_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

static __global__ void version_probe_kernel() {}

/// Whether the device runs code that was compiled for sm_90 or later, in which waiting has effect,
/// and such launches can be recorded.
inline bool kernels_wait() {
  constexpr int kKnownDevices = 64;
  static std::array<std::atomic<int>, kKnownDevices> known{};  // 0: not yet, 1: no, 2: yes
  int device = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  if (device >= kKnownDevices) return false;
  auto& answer = known[static_cast<std::size_t>(device)];
  if (answer == 0) {
    constexpr int kRecordable = 12030;  // the first CUDA whose graphs take such launches
    int driver = 0;
    cudaFuncAttributes attributes{};
    LRNN_CUDA_CHECK(cudaDriverGetVersion(&driver));
    LRNN_CUDA_CHECK(cudaFuncGetAttributes(&attributes, version_probe_kernel));
    const bool compiled = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    answer = compiled && CUDART_VERSION >= kRecordable && driver >= kRecordable ? 2 : 1;
  }
  return answer == 2;
}

/// kernel<<<grid, threads, shared, stream>>>(args...) in clusters of `ranks` neighbouring blocks,
/// overlapping where the device can.
template <class... Parameters, class... Args>
void launch_clusters(void (*kernel)(Parameters...), unsigned ranks, dim3 grid, dim3 threads,
                     std::size_t shared, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (kernels_wait()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (ranks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {ranks, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  LRNN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}
/// The same without clusters.
template <class... Parameters, class... Args>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 threads, std::size_t shared,
                       cudaStream_t stream, Args&&... args) {
  launch_clusters(kernel, 1, grid, threads, shared, stream, std::forward<Args>(args)...);
}

/// Shared memory beyond 48 KB, with what the kernel declares itself, must be asked for.
template <class Kernel>
void allow_shared(Kernel kernel, std::size_t bytes, std::size_t declared = 0) {
  if (bytes + declared > 48 * 1024)
    LRNN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(bytes)));
}

}  // namespace lrnn::cuda
