/// Exchange among the blocks of a cluster (sm_90 and later; nothing elsewhere).
#pragma once

#include <cstdint>

#include "common/mma.cuh"

namespace lrnn::cuda {

/// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

/// The same without order of memory, but for mailboxes made before: it waits for no access.
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

/// Counts what other blocks have sent to this one. It takes no fence, which would wait for
/// everything that the sender has on its way to global memory.
struct Mailbox {
  std::uint64_t barrier;

  /// By one thread, before a cluster_sync().
  __device__ __forceinline__ void init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(this)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  /// By one thread, once per phase.
  __device__ __forceinline__ void expect(int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
#endif
  }
  /// Until the bytes of the phase are there; phases alternate between 0 and 1.
  __device__ __forceinline__ void wait(int phase) {
#if __CUDA_ARCH__ >= 900
    std::uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}\n"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(phase)
          : "memory");
    } while (done == 0);
#endif
  }
};

/// Where block `rank` of the cluster has what this one has at shared address `at`.
__device__ __forceinline__ std::uint32_t address_in(int rank, std::uint32_t at) {
  std::uint32_t there = at;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
#endif
  return there;
}

/// What block `rank` of the cluster has where this one has `p`, in shared memory.
__device__ __forceinline__ uint2 load_of(int rank, const uint2* p) {
  uint2 v{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address_in(rank, shared_address(p)))
               : "memory");
#endif
  return v;
}

/// Stores where block `rank` of the cluster has `p`.
__device__ __forceinline__ void store_in(int rank, uint2* p, uint2 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address_in(rank, shared_address(p))),
      "r"(v.x), "r"(v.y)
      : "memory");
#endif
}

/// Stores at a shared address of any block of the cluster; the bytes count at a barrier there.
__device__ __forceinline__ void send(std::uint32_t to, float v, std::uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v),
      "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void send(std::uint32_t to, float2 v, std::uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          to),
      "f"(v.x), "f"(v.y), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void send(std::uint32_t to, const float (&v)[4], std::uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
#endif
}
__device__ __forceinline__ void send(std::uint32_t to, std::uint32_t v, std::uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(v),
      "r"(barrier)
      : "memory");
#endif
}
/// The same of `bytes` of shared memory, a multiple of 16.
__device__ __forceinline__ void send(std::uint32_t to, std::uint32_t from, int bytes,
                                     std::uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

/// Stores where block `rank` of the cluster has `to`, and counts there in `mailbox`.
template <class T, class V>
__device__ __forceinline__ void send(T* to, Mailbox& mailbox, int rank, V v) {
  send(address_in(rank, shared_address(to)), v, address_in(rank, shared_address(&mailbox)));
}

}  // namespace lrnn::cuda
