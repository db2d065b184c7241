/// Maximum over a block of candidates (ordered key, index) packed in 64 bits.
#pragma once

#include "ops/sample_math.hpp"

namespace lrnn::cuda {

__device__ inline std::uint64_t max_candidate(std::uint64_t a, std::uint64_t b) {
  return a > b ? a : b;
}

__device__ inline std::uint64_t warp_best(std::uint64_t best) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const unsigned long long other =
        __shfl_xor_sync(0xFFFFFFFFU, static_cast<unsigned long long>(best), offset);
    best = max_candidate(best, other);
  }
  return best;
}

/// The maximum over all threads, in every thread. Called once per kernel by all of them.
template <int kThreads>
__device__ std::uint64_t block_best(std::uint64_t best) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ std::uint64_t warps[kThreads / 32];
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  best = warps[0];
  for (int i = 1; i < kThreads / 32; ++i) best = max_candidate(best, warps[i]);
  return best;
}

}  // namespace lrnn::cuda
