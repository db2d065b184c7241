/// What the current device can do.
#pragma once

#include "common/check.cuh"

namespace lrnn::cuda {

/// Major compute capability times 10 plus minor of the current device.
inline int compute_capability() {
  int device = 0;
  int major = 0;
  int minor = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}
/// Bytes of shared memory that a block of the current device may ask for.
inline int shared_memory_per_block() {
  int device = 0;
  int bytes = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}
inline int multiprocessors() {
  int device = 0;
  int count = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}
/// Whether tensor cores take bfloat16.
inline bool has_mma() {
  return compute_capability() >= 80;
}

/// Whether the device runs clusters of blocks and `kernel` was compiled for such devices.
template <class Kernel>
bool takes_clusters(Kernel* kernel) {
  int device = 0;
  int clusters = 0;
  LRNN_CUDA_CHECK(cudaGetDevice(&device));
  LRNN_CUDA_CHECK(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  if (clusters == 0) return false;
  cudaFuncAttributes attributes{};
  LRNN_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

}  // namespace lrnn::cuda
