/// What the kernels of lane_scan for one channel and outputs of their own share: up to
/// kWalkParts kPerPart sub-states per lane, whose constants and states lie in registers. Chunks,
/// segments, groups of tokens and ownership are those of common/lane_scan.cuh; a thread owns
/// exactly kPerPart sub-states, of which those beyond M are 0. The number of threads per lane is
/// known to the compiler, and the tokens of the next chunk are on their way while one is walked.
#pragma once

#include "common/lane_scan.cuh"

namespace lrnn::cuda::lane {

/// The sub-states of a thread in planes [2, N, M].
template <int kParts>
class OwnSubstates {
 public:
  __device__ OwnSubstates(const Sizes& s, const Place& place)
      : plane_(s.plane),
        first_(place.lane * s.substates + place.part),
        rest_(place.exists ? static_cast<int>(s.substates) - place.part : 0) {}

  __device__ __forceinline__ float2 load(const float* planes, int i) const {
    if (planes == nullptr || !exists(i)) return {0.0F, 0.0F};
    const float* const p = planes + first_ + i * kParts;
    return {p[0], p[plane_]};
  }
  /// W, which may be real.
  __device__ __forceinline__ float2 load_weight(const float* W, bool real, int i) const {
    if (!real) return load(W, i);
    return {exists(i) ? W[first_ + i * kParts] : 0.0F, 0.0F};
  }
  __device__ __forceinline__ void store(float* planes, int i, float2 value) const {
    if (!exists(i)) return;
    float* const p = planes + first_ + i * kParts;
    p[0] = value.x;
    p[plane_] = value.y;
  }

 private:
  [[nodiscard]] __device__ __forceinline__ bool exists(int i) const { return i * kParts < rest_; }

  std::int64_t plane_;
  std::int64_t first_;
  int rest_;
};

/// What a thread moves between device memory and tiles of a block: tokens t, t + kParts, ... of
/// one lane, neighbouring threads neighbouring lanes.
template <class T, int kParts>
class TileMover {
 public:
  static constexpr int kLanes = kThreads / kParts;
  static constexpr int kOwn = kChunk / kParts;
  using Values = T[kOwn];

  __device__ TileMover(const Sizes& s, const Place& place)
      : stride_(s.inputs),
        offset_(static_cast<int>(threadIdx.x) / kLanes * s.inputs + place.column +
                static_cast<int>(threadIdx.x) % kLanes),
        token_(static_cast<int>(threadIdx.x) / kLanes),
        at_(static_cast<int>(threadIdx.x) % kLanes * kPitch + token_),
        inside_(static_cast<int>(threadIdx.x) % kLanes < place.columns) {}

  /// `rows` is the first token of a chunk, of which `steps` are valid; the others become 0.
  __device__ __forceinline__ void load(const T* rows, int steps, Values& values) const {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      values[j] = from_float<T>(0.0F);
      if (inside_ && token_ + j * kParts < steps) values[j] = rows[offset_ + j * kParts * stride_];
    }
  }
  __device__ __forceinline__ void put(const Values& values, float* tile) const {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) tile[at_ + j * kParts] = to_float(values[j]);
  }
  /// 0 from token `steps` on; the chunk has `size` tokens.
  __device__ __forceinline__ void store(const float* tile, T* rows, int steps, int size) const {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int t = token_ + j * kParts;
      if (inside_ && t < size)
        rows[offset_ + j * kParts * stride_] =
            from_float<T>(t < steps ? tile[at_ + j * kParts] : 0.0F);
    }
  }

 private:
  std::int64_t stride_;
  std::int64_t offset_;
  int token_;
  int at_;
  bool inside_;
};

// Tokens of a chunk that exist, valid or not.
__device__ __forceinline__ int chunk_size(const Sizes& s, std::int64_t chunk) {
  return static_cast<int>(min(s.seqlen - chunk * kChunk, static_cast<std::int64_t>(kChunk)));
}

/// Calls f.operator()<kParts>().
template <int kMinParts, class F>
void visit_parts(int parts, F&& f) {
  if constexpr (kMinParts < kWalkParts) {
    if (parts > kMinParts) return visit_parts<2 * kMinParts>(parts, f);
  }
  f.template operator()<kMinParts>();
}

}  // namespace lrnn::cuda::lane
