/// Several sums over the same lanes at once: as every lane keeps half of what it adds with another,
/// kCount of them take about kCount shuffles, where one after the other would take log2(kLanes)
/// each. The pairs that are added do not depend on kCount.
#pragma once

namespace lrnn::cuda {

/// Adds v[0 .. kCount) over the kLanes lanes that differ in lane / kStride % kLanes = id. After it
/// lane id holds sums id kCount / kLanes + i in v[i]; if kCount < kLanes, sum id kCount / kLanes
/// (rounded down) in v[0].
template <int kCount, int kLanes, int kStride, int kSize>
__device__ __forceinline__ void transpose_add(float (&v)[kSize], int id) {
  if constexpr (kLanes > 1) {
    constexpr int kBit = kLanes / 2;
    if constexpr (kCount > 1) {
      constexpr int kHalf = kCount / 2;
      const bool upper = (id & kBit) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float keep = upper ? v[i + kHalf] : v[i];
        const float send = upper ? v[i] : v[i + kHalf];
        v[i] = keep + __shfl_xor_sync(0xFFFFFFFFU, send, kBit * kStride);
      }
      transpose_add<kHalf, kBit, kStride>(v, id);
    } else {
      v[0] += __shfl_xor_sync(0xFFFFFFFFU, v[0], kBit * kStride);
      transpose_add<1, kBit, kStride>(v, id);
    }
  }
}

/// Sums that a lane is left with, and lanes that share one.
template <int kCount, int kLanes>
constexpr int kSumsOfLane = kCount > kLanes ? kCount / kLanes : 1;
template <int kCount, int kLanes>
constexpr int kLanesOfSum = kLanes > kCount ? kLanes / kCount : 1;
/// The first sum of lane `id`.
template <int kCount, int kLanes>
__device__ __forceinline__ int first_sum(int id) {
  return id / kLanesOfSum<kCount, kLanes> * kSumsOfLane<kCount, kLanes>;
}

}  // namespace lrnn::cuda
