/// Chunks of lane_scan in float, compiled for several instruction sets: see common/isa.hpp.
#pragma once

#include <cstdint>

#include "common/lanes.hpp"
#include "common/lines.hpp"

namespace lrnn::cpu {

/// Lanes of a block.
inline constexpr std::int64_t kFloatLanes = kBlockLanes;

/// A chunk of one block: [steps, kFloatLanes] of v, and complex numbers as [.., 2, kFloatLanes].
struct FloatLaneChunk {
  const float* v;
  const float* a;        ///< [M]
  const float* weights;  ///< [C, M]
  std::int64_t steps, substates, channels;
  const Lines* next;  ///< [nexts], of the chunk after this one
  std::int64_t nexts;
};
struct FloatLaneForward {
  FloatLaneChunk in;
  float* states;  ///< [M], those before the chunk, then those after it
  float* w;       ///< [C, kLaneScanChunk, kFloatLanes], overwritten
};
struct FloatLaneBackward {
  FloatLaneChunk in;
  const float* states;  ///< [M], before the chunk
  const float* dy;      ///< [C, kLaneScanChunk, kFloatLanes]
  float* carries;       ///< [M], conj(a) p of the token after the chunk, then of its first
  float* dv;            ///< [steps, kFloatLanes], accumulated into
  float *da, *dW;       ///< [M] and [C, M], sums over the chunk
};

void run_float_lanes(const FloatLaneForward& p);
void run_float_lanes_backward(const FloatLaneBackward& p);

}  // namespace lrnn::cpu
