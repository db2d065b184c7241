/// A barrier of the threads of a block in two parts: what a warp does between arrive() and wait()
/// hides the time that the others need.
#pragma once

#include <cstdint>

namespace lrnn::cuda {

struct SplitBarrier {
  std::uint64_t bits;  // in shared memory

  __device__ std::uint32_t address() const {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(&bits));
  }
  /// By one thread, before a barrier of the block.
  __device__ void init(int threads) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address()), "r"(threads) : "memory");
#endif
  }
  /// By all threads. Ends turn 0, 1, .. of the calling thread.
  __device__ __forceinline__ void arrive() {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(address())
        : "memory");
#endif
  }
  /// Waits until all threads have ended `turn`, the last one that the calling thread has ended.
  __device__ __forceinline__ void wait(unsigned turn) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(address()),
        "r"(turn & 1)
        : "memory");
#elif __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(address()),
        "r"(turn & 1)
        : "memory");
#else
    __syncthreads();
#endif
  }
};

}  // namespace lrnn::cuda
