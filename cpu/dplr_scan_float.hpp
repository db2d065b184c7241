/// Chunks of dplr_scan in float, compiled for several instruction sets: see common/isa.hpp.
#pragma once

#include <cstdint>

#include "lrnn/ops/dplr_scan.hpp"

#include "common/lanes.hpp"
#include "common/lines.hpp"

namespace lrnn::cpu {

/// Heads of a block. Below, complex numbers are [.., 2, kFloatHeads].
inline constexpr std::int64_t kFloatHeads = kBlockLanes;

struct FloatDplrModel {
  std::int64_t states, rank, channels;  // N, R, C
  const float *e, *e_low, *b;           // [N]; e_low may be null
  const float *const *w, *const *k;     // R times [N]
  const float* const* C;                // C times [N]
};
struct FloatDplrForward {
  FloatDplrModel model;
  std::int64_t steps;
  const float* u;     ///< [steps, kFloatHeads]
  float* x;           ///< [N], before the chunk, then after it
  float* y;           ///< [C, kDplrScanChunk, kFloatHeads], without the skip; overwritten
  float* scratch;     ///< [R, kFloatHeads]
  const Lines* next;  ///< [nexts], of the chunk after this one
  std::int64_t nexts;
};
struct FloatDplrBackward {
  FloatDplrModel model;  ///< without e_low
  std::int64_t steps;
  const float *u, *x;  ///< as in forward, x before the chunk
  const float* dy;     ///< [C, kDplrScanChunk, kFloatHeads]
  float* carry;        ///< [N], M^* q of the token after the chunk, then of its first
  float* du;           ///< [steps, kFloatHeads], without the skip; overwritten
  float* fields;       ///< [2 + 2 R + C, N], gradients of e, b, w, k, C; overwritten
  float* scratch;      ///< float_dplr_scratch() floats
  const Lines* next;   ///< [nexts], of the chunk before this one
  std::int64_t nexts;
};

/// That many, for x and q of all tokens, <k, x> and <w, q>.
constexpr std::int64_t float_dplr_scratch(std::int64_t states, std::int64_t rank) {
  return (states * (kDplrScanChunk + 1) * 4 + 2 * rank * kDplrScanChunk) * kFloatHeads;
}

void run_float_dplr(const FloatDplrForward& p);
void run_float_dplr_backward(const FloatDplrBackward& p);

}  // namespace lrnn::cpu
